"""What PostgreSQL says: readings, chunks, summaries, the refresh queue, versions."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from datetime import datetime

import psycopg
from psycopg import Connection, sql

from services.core.config import Settings
from services.core.database import connect, cut, missing_measurements, one, queries, translated
from services.core.measurements import measurement
from services.core.schema import newest_revision

SQL = queries("services.status")

EXACT_BELOW_BYTES = 256 * 1024 * 1024  # counting this much takes a second or two
STATEMENT_TIMEOUT = "5s"
ANSWER_TIMEOUT_S = 15.0


@dataclass(frozen=True, slots=True)
class Rows:
    """How many rows a table has; counted, or from the server's statistics."""

    count: int
    exact: bool


@dataclass(frozen=True, slots=True)
class Readings:
    """The hypertable sensor_data."""

    rows: Rows
    oldest: datetime | None
    newest: datetime | None
    chunks: int
    compressed_chunks: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Check:
    """etl's own comparison with the readings: how long ago, how many rows ever differed, and when the last did."""

    age_seconds: float
    differences: int
    differed_at: datetime | None


@dataclass(frozen=True, slots=True)
class Summary:
    """One measurement's summary, and the width of its intervals: None before etl's first run."""

    measurement: str
    rows: Rows
    aggregate: str | None
    minutes: int | None
    check: Check | None  # None: etl has not compared it yet


@dataclass(frozen=True, slots=True)
class Tables:
    """All that exists once the migrations have run."""

    readings: Readings
    summaries: list[Summary]
    aggregates: list[str]
    queue_rows: int
    freshness_seconds: float  # age of the oldest reading that is stored and not yet summarised; 0: none waits
    etl_leads: bool
    missing: list[str]  # measurements that are configured and not in the database
    positions: dict[str, dict[int, int]]  # by topic id and partition: from where the consumers continue


@dataclass(frozen=True, slots=True)
class Database:
    """The server and the schema; no tables unless the schema is this version's."""

    address: str
    postgresql: str
    timescaledb: str | None
    revision: str | None
    newest_revision: str
    tables: Tables | None


def read_database(settings: Settings, where: str) -> Database:
    """Ask everything on one connection. Raises TransientError when the answers do not come in time."""
    with translated(), connect(settings) as connection:
        timer = threading.Timer(ANSWER_TIMEOUT_S, cut, [connection])
        timer.start()
        try:
            connection.execute(sql.SQL("SET statement_timeout = {}").format(STATEMENT_TIMEOUT))
            postgresql, timescaledb, is_migrated = one(connection, SQL["versions"])
            revision = one(connection, SQL["revision"])[0] if is_migrated else None
            newest = newest_revision()
            tables = _read_tables(connection, settings) if revision == newest else None
            return Database(where, postgresql, timescaledb, revision, newest, tables)
        finally:
            timer.cancel()


def _read_tables(connection: Connection, settings: Settings) -> Tables:
    oldest, newest, chunks, compressed, size = one(connection, SQL["readings"])
    missing = missing_measurements(connection, settings)
    queue_rows, age_s, is_led = one(connection, SQL["etl"])
    positions: dict[str, dict[int, int]] = {}
    for topic, partition, offset in connection.execute(SQL["positions"]):
        positions.setdefault(topic, {})[partition] = offset
    return Tables(
        readings=Readings(_count(connection, "sensor_data", size), oldest, newest, chunks, compressed, size),
        summaries=[_read_summary(connection, name) for name in settings.measurements if name not in missing],
        aggregates=[name for (name,) in connection.execute(SQL["aggregates"])],
        queue_rows=queue_rows,
        freshness_seconds=round(age_s, 3),
        etl_leads=is_led,
        missing=missing,
        positions=positions,
    )


def _read_summary(connection: Connection, name: str) -> Summary:
    table = measurement(name).summary
    arguments = {"measurement": name, "table": table}
    size, aggregate, minutes, age_s, differences, differed_at = one(connection, SQL["summary"], arguments)
    check = None if age_s is None else Check(round(age_s, 1), differences, differed_at)
    return Summary(name, _count(connection, table, size), aggregate, minutes, check)


def _count(connection: Connection, table: str, size_bytes: int) -> Rows:
    """Exact when the table is small, or when the server has no statistics of it and can count in time."""
    (about,) = one(connection, SQL["count_about"], {"table": table})
    if size_bytes >= EXACT_BELOW_BYTES and about > 0:
        return Rows(about, exact=False)
    try:
        return Rows(one(connection, SQL["count_exactly"].format(table=sql.Identifier(table)))[0], exact=True)
    except psycopg.errors.QueryCanceled:
        return Rows(max(about, 0), exact=False)
