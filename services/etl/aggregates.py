"""The life of the continuous aggregates: created for the configured widths, replaced when a width changes.

They belong to etl and not to the migrations because their bucket width is configuration. A width changes in
steps that a restart repeats safely:

1. create the new aggregate beside the old one, which goes on feeding the summary,
2. refresh the new one over all the raw history there is,
3. in one transaction: replace the summary's rows, the state and the live view,
4. drop the old aggregate.

Readers see the old intervals until the transaction of step 3 commits, and then the new ones.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from datetime import datetime

from psycopg import Connection, sql

from services.core.database import queries
from services.core.logs import fields
from services.etl.metrics import Metric

SQL = queries("services.etl")

log = logging.getLogger("etl")

Refresh = Callable[[Metric, datetime, datetime], None]


def statement(name: str, metric: Metric) -> sql.Composed:
    """A statement of queries.sql with the metric's names filled in."""
    return SQL[name].format(**metric.identifiers())


class Aggregates:
    """The aggregates that exist, and which of them feeds each summary."""

    def __init__(self, connection: Connection, configured: tuple[Metric, ...]) -> None:
        self._connection = connection
        self._configured = configured
        self.current: dict[str, Metric] = {}
        self.building: dict[str, Metric] = {}

    def prepare(self) -> None:
        """Create what is missing, and see which widths have to change. Drops what a crash left behind."""
        for metric in self._configured:
            with self._connection.transaction():
                current = self._read_current(metric.name)
                if current is None or current.aggregate not in self._existing(metric.name):
                    current = current or metric
                    self._create(current)
                    self._connection.execute(
                        SQL["write_state"],
                        {"metric": metric.name, "aggregate": current.aggregate, "width": current.width},
                    )
                    self._connection.execute(statement("replace_live_view", current))
                    self._connection.execute(SQL["queue_all"])
                if current != metric and metric.aggregate not in self._existing(metric.name):
                    self._create(metric)
            self.current[metric.name] = current
            if current != metric:
                self.building[metric.name] = metric
                log.info("interval_change_begun", extra=fields(old=current.aggregate, new=metric.aggregate))
            self._drop_others(metric.name)

    def build(self, metric: Metric, refresh: Refresh) -> None:
        """Fill a new aggregate and let it take over (steps 2 to 4)."""
        old = self.current[metric.name]
        edge = self._common_edge(old, metric)
        start, end = self._history(metric, edge)
        if start is not None and end is not None and start < end:
            refresh(metric, start, end)
        with self._connection.transaction():
            self._connection.execute(statement("delete_from", metric), {"edge": edge})
            filled = self._connection.execute(statement("fill_from", metric), {"edge": edge}).rowcount
            self._connection.execute(
                SQL["replace_state"],
                {"metric": metric.name, "aggregate": metric.aggregate, "width": metric.width, "edge": edge},
            )
            self._connection.execute(statement("replace_live_view", metric))
        self.current[metric.name] = metric
        del self.building[metric.name]
        self._drop_others(metric.name)
        log.info(
            "interval_changed", extra=fields(old=old.aggregate, new=metric.aggregate, summary_rows=filled)
        )

    def all_refreshed(self) -> tuple[Metric, ...]:
        """Every aggregate that must follow the readings: the current ones and those being built."""
        return (*self.current.values(), *self.building.values())

    def _read_current(self, name: str) -> Metric | None:
        row = self._connection.execute(SQL["read_state"], {"metric": name}).fetchone()
        return None if row is None else Metric(name, row[0])

    def _existing(self, name: str) -> set[str]:
        return {row[0] for row in self._connection.execute(SQL["list_aggregates"], {"metric": name})}

    def _create(self, metric: Metric) -> None:
        self._connection.execute(statement("create_aggregate", metric))
        log.info("aggregate_created", extra=fields(aggregate=metric.aggregate))

    def _drop_others(self, name: str) -> None:
        used = {metric.aggregate for metric in self.all_refreshed()}
        for aggregate in self._existing(name) - used:
            self._connection.execute(SQL["drop_aggregate"].format(aggregate=sql.Identifier(aggregate)))
            log.info("aggregate_dropped", extra=fields(aggregate=aggregate))

    def _common_edge(self, old: Metric, new: Metric) -> str:
        """Where the new width takes over: -infinity, or the first boundary of both that is not frozen."""
        common = math.lcm(old.minutes, new.minutes)
        row = self._connection.execute(
            SQL["common_edge"], {"metric": new.name, "common": Metric(new.name, common).width}
        ).fetchone()
        assert row is not None
        return str(row[0])

    def _history(self, metric: Metric, edge: str) -> tuple[datetime | None, datetime | None]:
        row = self._connection.execute(SQL["history"], {"width": metric.width, "edge": edge}).fetchone()
        assert row is not None
        return row[0], row[1]
