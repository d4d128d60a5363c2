"""The life of the continuous aggregates: created for the configured widths, replaced when a width changes.

Each is built on one of minutes, which is there for all widths and never changes.

They belong to etl and not to the migrations because their bucket width is configuration. How a width changes
is told in interval_change.py.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

from psycopg import Connection, sql

from services.core.database import queries
from services.core.logs import fields
from services.etl.lease import Lease
from services.etl.metrics import BASE, BASE_PARTS, Metric

SQL = queries("services.etl")

log = logging.getLogger("etl")


def statement(name: str, metric: Metric, **more: sql.Composable) -> sql.Composed:
    """A statement of queries.sql with the metric's names filled in."""
    return SQL[name].format(**metric.identifiers(), **more)


def stored_metrics(connection: Connection) -> dict[str, Metric]:
    """The metrics by name, at the width that their summaries have now."""
    return {name: Metric(name, minutes) for name, minutes in connection.execute(SQL["read_state"])}


class Aggregates:
    """The aggregates that exist, and which of them feeds each summary."""

    def __init__(self, connection: Connection, lease: Lease, configured: tuple[Metric, ...]) -> None:
        self._connection = connection
        self._lease = lease
        self.configured = configured
        self.current: dict[str, Metric] = {}
        self.building: dict[str, Metric] = {}

    def prepare(self) -> None:
        """Create what the summaries cannot do without."""
        self._prepare_base()
        for metric in self.configured:
            with self._lease.transaction():
                current = stored_metrics(self._connection).get(metric.name, metric)
                if current.aggregate not in self.materialized():
                    self._create(current)
                    self._connection.execute(
                        SQL["write_state"],
                        {"metric": metric.name, "aggregate": current.aggregate, "width": current.width},
                    )
                    self._connection.execute(SQL["queue_all"])
            self.current[metric.name] = current

    def _prepare_base(self) -> None:
        """Create the aggregate of minutes. One that lacks a metric goes first, and all that is built on it.

        The summaries stay as they are; the live views show them until the aggregates are there again.
        """
        wanted = {f"{metric.name}_{part}" for metric in self.configured for part in BASE_PARTS}
        columns = {row[0] for row in self._connection.execute(SQL["list_columns"], {"table": BASE})}
        if wanted <= columns:
            return
        if columns:
            with self._lease.transaction():
                for metric in stored_metrics(self._connection).values():
                    self._connection.execute(statement("show_summary_live", metric))
                    for aggregate in self._of(metric.name):
                        self._drop(aggregate)
                self._drop(BASE)
        parts = sql.SQL(",\n       ").join(statement("base_columns", metric) for metric in self.configured)
        with self._lease.transaction():
            self._connection.execute(SQL["as_owner"])
            self._connection.execute(SQL["create_base"].format(base=sql.Identifier(BASE), columns=parts))
            self._note_created(BASE)

    def show_live(self) -> Iterator[None]:
        """Point each live view at its aggregate. Until then it shows the summary: somebody may be reading it."""
        for metric in self.current.values():
            row = self._connection.execute(statement("live_view_shows", metric)).fetchone()
            if row is not None and not row[0]:
                with self._lease.transaction():
                    self._connection.execute(statement("replace_live_view", metric))
                yield

    def build(self, metric: Metric) -> None:
        """Create the aggregate of a width that is about to take over, unless it was begun before."""
        with self._lease.transaction():
            self._create(metric)
        self.building[metric.name] = metric

    def switch(self, metric: Metric, edge: str) -> int:
        """Let the new aggregate feed the summary from ``edge`` on, in one transaction; returns the summary's rows.

        The view comes last, since whoever wants to read it waits from then on; whether it can be had is tried before.
        """
        with self._lease.transaction():
            self._connection.execute(statement("probe_live_view", metric))
        with self._lease.transaction():
            self._connection.execute(statement("delete_from", metric), {"edge": edge})
            fill = statement("fill_from", metric, materialized=self.materialized()[metric.aggregate])
            filled = self._connection.execute(fill, {"edge": edge}).rowcount
            self._connection.execute(
                SQL["replace_state"],
                {"metric": metric.name, "aggregate": metric.aggregate, "width": metric.width, "edge": edge},
            )
            self._connection.execute(statement("replace_live_view", metric))
        self.current[metric.name] = metric
        del self.building[metric.name]
        return filled

    def drop_others(self) -> None:
        """Drop what feeds no summary and is not about to: aggregates of other widths."""
        for name, current in self.current.items():
            used = {metric.aggregate for metric in (current, self.building.get(name)) if metric is not None}
            for aggregate in self._of(name) - used:
                with self._lease.transaction():
                    self._drop(aggregate)

    def all_refreshed(self) -> tuple[Metric, ...]:
        """Every aggregate that must follow the readings: the current ones and those being built."""
        return (*self.current.values(), *self.building.values())

    def materialized(self) -> dict[str, sql.Identifier]:
        """The aggregates that exist, each with the table of what was refreshed."""
        rows = self._connection.execute(SQL["list_aggregates"])
        return {name: sql.Identifier(schema, table) for name, schema, table in rows}

    def _create(self, metric: Metric) -> None:
        """Unless it exists: an interval change that was begun, or migrations that were taken back and forth."""
        if metric.aggregate in self.materialized():
            return
        self._connection.execute(SQL["as_owner"])
        self._connection.execute(statement("create_aggregate", metric))
        self._note_created(metric.aggregate)

    def _note_created(self, aggregate: str) -> None:
        self._connection.execute(SQL["vacuum_often"].format(materialized=self.materialized()[aggregate]))
        log.info("aggregate_created", extra=fields(aggregate=aggregate))

    def _of(self, name: str) -> set[str]:
        """The aggregates of a metric, of whatever width."""
        return {aggregate for aggregate in self.materialized() if re.fullmatch(f"{name}_[0-9]+min", aggregate)}

    def _drop(self, aggregate: str) -> None:
        self._connection.execute(SQL["drop_aggregate"].format(aggregate=sql.Identifier(aggregate)))
        log.info("aggregate_dropped", extra=fields(aggregate=aggregate))
