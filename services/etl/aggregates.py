"""The life of the continuous aggregates: one of each metric at the configured width, made of the readings.

Where readings are dense it is made of an aggregate of minutes instead, which is there for as long as one is made of it.

They belong to etl and not to the migrations because their bucket width is configuration. How one takes over from
another is told in interval_change.py.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import replace

from psycopg import Connection, sql

from services.core.database import queries
from services.core.logs import fields
from services.etl.lease import Lease
from services.etl.metrics import BASE, BASE_PARTS, OF_MINUTES, Metric, minutes_pay

SQL = queries("services.etl")

log = logging.getLogger("etl")


def statement(name: str, metric: Metric, **more: sql.Composable) -> sql.Composed:
    """A statement of queries.sql with the metric's names filled in."""
    return SQL[name].format(**metric.identifiers(), **more)


def stored_metrics(connection: Connection) -> dict[str, Metric]:
    """The metrics by name, at the width that their summaries have now, and made of what they are made of."""
    return {
        name: Metric(name, minutes, aggregate.endswith(OF_MINUTES))
        for name, minutes, aggregate in connection.execute(SQL["read_state"])
    }


class Aggregates:
    """The aggregates that exist, and which of them feeds each summary."""

    def __init__(self, connection: Connection, lease: Lease, configured: tuple[Metric, ...]) -> None:
        self._connection = connection
        self._lease = lease
        self.configured = configured
        self.current: dict[str, Metric] = {}
        self.building: dict[str, Metric] = {}
        self.is_new = True  # as far as we know, nothing is summarised yet

    def prepare(self) -> None:
        """Create what the summaries cannot do without."""
        self._drop_outdated_base()
        for metric in self.configured:
            with self._lease.transaction():
                current = stored_metrics(self._connection).get(metric.name, metric)
                if current.aggregate not in self.materialized():
                    current = replace(current, of_minutes=minutes_pay(self._rate(), have_paid=False))
                    self._create(current)
                    self._connection.execute(
                        SQL["write_state"],
                        {"metric": metric.name, "aggregate": current.aggregate, "width": current.width},
                    )
                    self._connection.execute(SQL["queue_all"])
            self.current[metric.name] = current

    def suit_first_readings(self) -> None:
        """As long as nothing is summarised, what the summaries are made of can change at once."""
        if not self.is_new or self.building:
            return
        for wanted in self.wanted():
            current = self.current[wanted.name]
            suited = replace(current, of_minutes=wanted.of_minutes)
            if not self._is_empty(current):
                self.is_new = False
            elif suited != current:
                self.build(suited)
                with self._lease.transaction():
                    self._connection.execute(SQL["queue_all"])
                self.switch(suited, None)
                self.drop_others()

    def _is_empty(self, metric: Metric) -> bool:
        """Whether nothing is summarised yet."""
        row = self._connection.execute(statement("is_summary_empty", metric)).fetchone()
        return row is not None and bool(row[0])

    def _drop_outdated_base(self) -> None:
        """Drop minutes that lack a metric, and all that is made of them; also what is, and does not say so.

        The summaries stay as they are; the live views show them until the aggregates are there again.
        """
        wanted = {f"{metric.name}_{part}" for metric in self.configured for part in BASE_PARTS}
        columns = {row[0] for row in self._connection.execute(SQL["list_columns"], {"table": BASE})}
        built = {row[0] for row in self._connection.execute(SQL["built_on"], {"base": BASE})} & self._ours()
        if not columns or (wanted <= columns and all(name.endswith(OF_MINUTES) for name in built)):
            return
        with self._lease.transaction():
            for metric in stored_metrics(self._connection).values():
                if metric.aggregate in built:
                    self._connection.execute(statement("show_summary_live", metric))
            for aggregate in (*built, BASE):
                self._drop(aggregate)

    def wanted(self) -> tuple[Metric, ...]:
        """The configured metrics, made of what suits the newest readings."""
        of_minutes = minutes_pay(self._rate(), have_paid=any(metric.of_minutes for metric in self.current.values()))
        return tuple(replace(metric, of_minutes=of_minutes) for metric in self.configured)

    def _rate(self) -> float | None:
        """How many readings per minute each sensor sends."""
        (since,) = self._connection.execute(SQL["newest_chunks"]).fetchone() or (None,)
        row = self._connection.execute(SQL["rate"], {"since": since}).fetchone()
        return None if row is None else row[0]

    def show_live(self) -> Iterator[None]:
        """Point each live view at its aggregate. Until then it shows the summary: somebody may be reading it."""
        for metric in self.current.values():
            row = self._connection.execute(statement("live_view_shows", metric)).fetchone()
            if row is not None and not row[0]:
                with self._lease.transaction():
                    self._connection.execute(statement("replace_live_view", metric))
                yield

    def build(self, metric: Metric) -> None:
        """Create an aggregate that is about to take over; one that was begun and given up has missed readings."""
        self.building.pop(metric.name, None)
        with self._lease.transaction():
            for aggregate in self._unused():
                self._drop(aggregate)
            self._create(metric)
        self.building[metric.name] = metric

    def switch(self, metric: Metric, edge: str | None) -> int:
        """Let the new aggregate feed the summary, in one transaction; returns how many of the summary's rows are new.

        They are from ``edge`` on. Without one the width is the same, and so are the rows.

        The view comes last, since whoever wants to read it waits from then on; whether it can be had is tried before.
        """
        with self._lease.transaction():
            self._connection.execute(statement("probe_live_view", metric))
        with self._lease.transaction():
            filled = 0
            if edge is not None:
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
        """Drop what feeds no summary and is not about to: aggregates of other widths or sources, unused minutes."""
        for aggregate in self._unused():
            with self._lease.transaction():
                self._drop(aggregate)

    def _unused(self) -> list[str]:
        """The aggregates that are not refreshed; what is made of others comes before them."""
        refreshed = self.all_refreshed()
        unused = sorted(self._ours() - {metric.aggregate for metric in refreshed})
        has_base = BASE in self.materialized()
        return [*unused, BASE] if has_base and not self.are_minutes_refreshed() else unused

    def all_refreshed(self) -> tuple[Metric, ...]:
        """Every aggregate that must follow the readings: the current ones and those being built."""
        return (*self.current.values(), *self.building.values())

    def are_minutes_refreshed(self) -> bool:
        """Whether one of them is made of minutes."""
        return any(metric.of_minutes for metric in self.all_refreshed())

    def materialized(self) -> dict[str, sql.Identifier]:
        """The aggregates that exist, each with the table of what was refreshed."""
        rows = self._connection.execute(SQL["list_aggregates"])
        return {name: sql.Identifier(schema, table) for name, schema, table in rows}

    def _create(self, metric: Metric) -> None:
        """Unless it exists: migrations that were taken back and forth. Below it the minutes, if it is made of them."""
        existing = self.materialized()
        if metric.aggregate in existing:
            return
        self._connection.execute(SQL["as_owner"])
        if metric.of_minutes and BASE not in existing:
            columns = sql.SQL(",\n       ").join(statement("base_columns", each) for each in self.configured)
            self._connection.execute(SQL["create_base"].format(base=sql.Identifier(BASE), columns=columns))
            self._note_created(BASE)
        self._connection.execute(statement("create_of_minutes" if metric.of_minutes else "create_of_readings", metric))
        self._note_created(metric.aggregate)

    def _note_created(self, aggregate: str) -> None:
        self._connection.execute(SQL["vacuum_often"].format(materialized=self.materialized()[aggregate]))
        log.info("aggregate_created", extra=fields(aggregate=aggregate))

    def _ours(self) -> set[str]:
        """The aggregates of the metrics, of whatever width and source."""
        names = "|".join({metric.name for metric in self.configured} | stored_metrics(self._connection).keys())
        pattern = re.compile(f"({names})_[0-9]+min({OF_MINUTES})?")
        return {aggregate for aggregate in self.materialized() if pattern.fullmatch(aggregate)}

    def _drop(self, aggregate: str) -> None:
        self._connection.execute(SQL["drop_aggregate"].format(aggregate=sql.Identifier(aggregate)))
        log.info("aggregate_dropped", extra=fields(aggregate=aggregate))
