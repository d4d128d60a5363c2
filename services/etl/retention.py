"""Retention and compression of the raw readings, as TimescaleDB policies that etl runs itself.

A policy that TimescaleDB's scheduler ran could drop a chunk before its last readings are in the summaries. So the
policies are not scheduled; etl runs them when the queue is empty. Before a chunk is dropped:

1. close its time: the consumer stores no more readings of it (they become dead letters, too_late),
2. drain the queue: every reading that was stored is in the summaries,
3. freeze its intervals: neither refresh nor mirror touches them again,
4. drop what the policy names, as far as it is frozen.

A crash in between leaves closed or frozen time whose chunk still exists; the next run goes on.
"""

from __future__ import annotations

import logging
import time
from datetime import timedelta

from psycopg import Connection, sql

from services.core.config import Settings
from services.core.database import queries
from services.core.logs import fields
from services.etl.aggregates import Aggregates
from services.etl.instruments import CHUNKS_DROPPED
from services.etl.metrics import BASE
from services.etl.summaries import Summaries

SQL = queries("services.etl")
RUN_EVERY_S = 600.0

log = logging.getLogger("etl")


class Retention:
    """Keeps the policies as the settings want them and runs them when it is safe."""

    def __init__(
        self, connection: Connection, settings: Settings, aggregates: Aggregates, summaries: Summaries
    ) -> None:
        self._connection = connection
        self._aggregates = aggregates
        self._summaries = summaries
        self._keep = timedelta(days=settings.raw_retention_days)
        self._compress = timedelta(days=settings.compress_after_days)
        self._retention_job: int | None = None
        self._compression_job: int | None = None
        self._next_run = time.monotonic()

    def apply(self) -> None:
        """Add, change or remove the two policies."""
        self._retention_job = self._apply("retention", "drop_after", self._keep)
        self._compression_job = self._apply("compression", "compress_after", self._compress)

    def run_when_due(self) -> None:
        """Run the policies if they have not run for a while."""
        if time.monotonic() < self._next_run:
            return
        if self._retention_job is not None:
            self._drop_expired()
        if self._compression_job is not None:
            self._connection.execute(SQL["run_policy"], {"job": self._compression_job})
        self._next_run = time.monotonic() + RUN_EVERY_S

    def _apply(self, policy: str, field: str, age: timedelta) -> int | None:
        found = self._connection.execute(
            SQL["find_policy"], {"procedure": f"policy_{policy}", "field": field, "age": age}
        ).fetchone()
        if found is not None and found[1] and age:
            return int(found[0])
        if found is not None:
            self._connection.execute(SQL[f"remove_{policy}_policy"])
        if not age:
            return None
        with self._connection.transaction():
            row = self._connection.execute(SQL[f"add_{policy}_policy"], {"age": age}).fetchone()
            assert row is not None
            self._connection.execute(SQL["unschedule_policy"], {"job": row[0]})
        log.info("policy_added", extra=fields(policy=policy, days=age.days))
        return int(row[0])

    def _drop_expired(self) -> None:
        closed = False
        for metric in self._aggregates.current.values():
            row = self._connection.execute(SQL["expired_edge"], {"width": metric.width, "age": self._keep}).fetchone()
            if row is not None and row[0] is not None:
                self._connection.execute(SQL["close_history"], {"metric": metric.name, "edge": row[0]})
                closed = True
        if not closed:
            return
        self._summaries.refresh_queued()
        self._connection.execute(SQL["freeze_closed"])
        CHUNKS_DROPPED.inc(self._connection.execute(SQL["drop_expired"], {"age": self._keep}).rowcount)
        self._connection.execute(SQL["drop_frozen_minutes"].format(base=sql.Literal(BASE)))
        log.info("retention_applied", extra=fields(days=self._keep.days))
