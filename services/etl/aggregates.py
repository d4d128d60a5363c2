"""The life of the continuous aggregates: one of each rollup at the configured width, made of the readings.

Where readings are dense it is made of an aggregate of minutes instead, which is there for as long as one is made of it.

They belong to etl and not to the migrations because their bucket width is configuration. How one takes over from
another: interval_change.py.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import datetime

from psycopg import Connection, sql

from services.core.database import one, queries
from services.core.logs import fields
from services.core.measurements import measurement
from services.etl.history import History
from services.etl.lease import Lease
from services.etl.rollup import BASE, OF_MINUTES, Rollup, minutes_pay

SQL = queries("services.etl")

log = logging.getLogger("etl")


def statement(name: str, rollup: Rollup, **more: sql.Composable) -> sql.Composed:
    """A statement of queries.sql with the rollup's names filled in."""
    return SQL[name].format(**rollup.identifiers(), **more)


def stored_rollups(connection: Connection) -> dict[str, Rollup]:
    """The rollups by name, at the width that their summaries have now, and made of what they are made of."""
    return {
        name: Rollup(measurement(name), minutes, aggregate.endswith(OF_MINUTES))
        for name, minutes, aggregate in connection.execute(SQL["read_state"])
    }


class Aggregates:
    """The aggregates that exist, and which of them feeds each summary."""

    def __init__(self, connection: Connection, lease: Lease, history: History, configured: tuple[Rollup, ...]) -> None:
        self._connection = connection
        self._lease = lease
        self._history = history
        self.configured = configured
        self.current: dict[str, Rollup] = {}
        self.building: dict[str, Rollup] = {}
        self._base_of: dict[str, str] = {}  # by measurement
        self.is_new = True  # as far as we know, nothing is summarised yet

    def prepare(self) -> None:
        """Create what the summaries cannot do without, and note which fall behind because they are not configured.

        One that is new beside others is behind as well; it catches up later (summaries.py).
        """
        self._read_bases()
        self.building.clear()
        stored = stored_rollups(self._connection)
        with self._lease.transaction():
            for rollup in self._set_aside():
                self._connection.execute(statement("write_behind", rollup), {"before": "infinity"})
        for rollup in self.configured:
            with self._lease.transaction():
                current = stored.get(rollup.name, rollup)
                if current.aggregate not in self.materialized():
                    have_paid = any(each.of_minutes for each in self.current.values())
                    current = replace(current, of_minutes=minutes_pay(self._rate(), have_paid=have_paid))
                    self._create(current)
                    self._write_state(current, "infinity" if stored else "-infinity")
                    self._connection.execute(statement("queue_all", current))
            self.current[rollup.name] = current

    def _set_aside(self) -> list[Rollup]:
        """What is stored and no longer configured."""
        names = {rollup.name for rollup in self.configured}
        return [rollup for name, rollup in stored_rollups(self._connection).items() if name not in names]

    def suit_first_readings(self) -> None:
        """As long as nothing is summarised, what the summaries are made of can change at once."""
        if not self.is_new or self.building:
            return
        self.is_new = all(
            one(self._connection, statement("is_summary_empty", rollup))[0] for rollup in self.current.values()
        )
        for wanted in self.wanted() if self.is_new else ():
            current = self.current[wanted.name]
            suited = replace(current, of_minutes=wanted.of_minutes)
            if suited != current:
                self.build(suited)
                with self._lease.transaction():
                    self._connection.execute(statement("queue_all", suited))
                self.switch(suited, None)
                self.drop_others()

    def wanted(self) -> tuple[Rollup, ...]:
        """The configured rollups, made of what suits the newest readings."""
        of_minutes = minutes_pay(self._rate(), have_paid=any(rollup.of_minutes for rollup in self.current.values()))
        return tuple(replace(rollup, of_minutes=of_minutes) for rollup in self.configured)

    def _rate(self) -> float | None:
        """How many readings per minute each sensor sends."""
        (since,) = one(self._connection, SQL["newest_chunks"])
        row = self._connection.execute(SQL["rate"], {"since": since}).fetchone()
        return None if row is None else row[0]

    def show_live(self) -> Iterator[None]:
        """Point each live view at its aggregate. Until then it shows the summary: somebody may be reading it.

        That of a measurement that is no longer configured shows it again, and its aggregates are dropped: TimescaleDB
        would note each change for them.
        """
        for rollup in self._set_aside():
            for aggregate in self._of([rollup.name]):
                with self._lease.transaction():
                    self._connection.execute(statement("show_summary_live", rollup))
                    self._drop(aggregate)
                yield
        for rollup in self.current.values():
            if not one(self._connection, statement("live_view_shows", rollup))[0]:
                with self._lease.transaction():
                    self._connection.execute(statement("replace_live_view", rollup))
                yield

    def build(self, rollup: Rollup) -> None:
        """Create an aggregate that is about to take over; one that was begun and given up has missed readings."""
        self.building.pop(rollup.name, None)
        with self._lease.transaction():
            for aggregate in self._unused():
                self._drop(aggregate)
            self._create(rollup)
        self.building[rollup.name] = rollup

    def switch(self, rollup: Rollup, boundary: datetime | None) -> int:
        """Let the new aggregate feed the summary, in one transaction; returns how many of the summary's rows are new.

        They are from ``boundary`` on. Without one the width is the same, and so are the rows. Raises ChunkDroppedError
        if the readings from there on are no longer complete: the change must begin again, at a later boundary.

        The view comes last, since its readers wait from then on; whether its lock can be had is tried before.
        """
        with self._lease.transaction():
            self._connection.execute(statement("probe_live_view", rollup))
        with self._lease.transaction():
            filled = 0
            if boundary is not None:
                self._history.switch(rollup.name, boundary)
                self._connection.execute(statement("delete_from", rollup), {"boundary": boundary})
                fill = statement("fill_from", rollup, materialized=self.materialized()[rollup.aggregate])
                filled = self._connection.execute(fill, {"boundary": boundary}).rowcount
            self._write_state(rollup)
            self._connection.execute(statement("replace_live_view", rollup))
        self.current[rollup.name] = rollup
        del self.building[rollup.name]
        return filled

    def _write_state(self, rollup: Rollup, behind: str = "-infinity") -> None:
        """The rollup feeds its summary; ``behind`` is for one that is new."""
        state = {"measurement": rollup.name, "aggregate": rollup.aggregate, "width": rollup.width, "behind": behind}
        self._connection.execute(SQL["write_state"], state)

    def drop_others(self) -> None:
        """Drop what feeds no summary and is not about to: aggregates of other widths or sources, unused minutes."""
        for aggregate in self._unused():
            with self._lease.transaction():
                self._drop(aggregate)

    def _unused(self) -> list[str]:
        """The aggregates that are not refreshed; what is made of others comes before them."""
        ours = self._of([rollup.name for rollup in self.configured])
        unused = ours - {rollup.aggregate for rollup in self.all_refreshed()}
        return [*sorted(unused), *sorted(set(self._base_of.values()) - set(self.bases_refreshed()))]

    def all_refreshed(self) -> tuple[Rollup, ...]:
        """Every aggregate that must follow the readings: the current ones and those being built."""
        return (*self.current.values(), *self.building.values())

    def bases_refreshed(self) -> list[str]:
        """The aggregates of minutes that they are made of."""
        return sorted({self.base_of(rollup) for rollup in self.all_refreshed() if rollup.of_minutes})

    def base_of(self, rollup: Rollup) -> str:
        """The aggregate of minutes with this measurement."""
        return self._base_of[rollup.name]

    def _read_bases(self) -> None:
        rows = self._connection.execute(SQL["list_bases"], {"base": BASE})
        self._base_of = {name: base for base, names in rows for name in names}

    def materialized(self) -> dict[str, sql.Identifier]:
        """The aggregates that exist, each with the table of what was refreshed."""
        rows = self._connection.execute(SQL["list_aggregates"])
        return {name: sql.Identifier(schema, table) for name, schema, table in rows}

    def _create(self, rollup: Rollup) -> None:
        """Unless it exists: migrations that were taken back and forth. Below it the minutes, if it is made of them."""
        if rollup.aggregate in self.materialized():
            return
        self._connection.execute(SQL["as_owner"])
        if rollup.of_minutes:
            self._create_base(rollup)
            source = sql.Identifier(self.base_of(rollup))
            self._connection.execute(statement("create_of_minutes", rollup, base=source))
        else:
            self._connection.execute(statement("create_of_readings", rollup))
        self._note_created(rollup.aggregate)

    def _create_base(self, rollup: Rollup) -> None:
        """Unless there is one with this measurement: of all that have none."""
        if rollup.name in self._base_of:
            return
        base = f"{BASE}_{rollup.name}" if BASE in self._base_of.values() else BASE
        lacking = [each for each in self.configured if each.name not in self._base_of]
        columns = sql.SQL(", ").join(statement("base_columns", each) for each in lacking)
        self._connection.execute(SQL["create_base"].format(base=sql.Identifier(base), columns=columns))
        self._note_created(base)
        self._read_bases()

    def _note_created(self, aggregate: str) -> None:
        self._connection.execute(SQL["vacuum_often"].format(materialized=self.materialized()[aggregate]))
        log.info("aggregate_created", extra=fields(aggregate=aggregate))

    def _of(self, names: Iterable[str]) -> set[str]:
        """The aggregates of these measurements, of whatever width and source."""
        pattern = re.compile(f"({'|'.join(names)})_[0-9]+min({OF_MINUTES})?")
        return {aggregate for aggregate in self.materialized() if pattern.fullmatch(aggregate)}

    def _drop(self, aggregate: str) -> None:
        self._connection.execute(SQL["drop_aggregate"].format(aggregate=sql.Identifier(aggregate)))
        self._read_bases()
        log.info("aggregate_dropped", extra=fields(aggregate=aggregate))
