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

EXACT_BELOW_BYTES = 256 * 1024 * 1024  # counting so much takes a second or two
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
    positions: dict[str, dict[int, int]]  # by topic id and partition: where the consumers go on


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
            return _read(connection, settings, where)
        finally:
            timer.cancel()


def _read(connection: Connection, settings: Settings, where: str) -> Database:
    connection.execute(sql.SQL("SET statement_timeout = {}").format(STATEMENT_TIMEOUT))
    postgresql, timescaledb, migrated = one(connection, SQL["versions"])
    revision = one(connection, SQL["revision"])[0] if migrated else None
    newest = newest_revision()
    tables = _read_tables(connection, settings) if revision == newest else None
    return Database(where, postgresql, timescaledb, revision, newest, tables)


def _read_tables(connection: Connection, settings: Settings) -> Tables:
    chunks, compressed, size = one(connection, SQL["chunks"])
    oldest, newest = one(connection, SQL["time_range"])
    readings = Readings(_count(connection, "sensor_data", size), oldest, newest, chunks, compressed, size)
    widths = {name: (aggregate, minutes) for name, aggregate, minutes in connection.execute(SQL["widths"])}
    checks = {row[0]: Check(round(row[1], 1), *row[2:]) for row in connection.execute(SQL["checks"])}
    summaries = []
    missing = missing_measurements(connection, settings)
    for name in settings.measurements:
        if name in missing:
            continue
        table = measurement(name).summary
        (size,) = one(connection, SQL["table_size"].format(table=sql.Literal(table)))
        rows = _count(connection, table, size)
        summaries.append(Summary(name, rows, *widths.get(name, (None, None)), checks.get(name)))
    queue_rows, age_s = one(connection, SQL["queue"])
    return Tables(
        readings,
        summaries,
        [name for (name,) in connection.execute(SQL["aggregates"])],
        queue_rows,
        round(age_s, 3),
        one(connection, SQL["is_led"])[0],
        missing,
        _read_positions(connection),
    )


def _read_positions(connection: Connection) -> dict[str, dict[int, int]]:
    positions: dict[str, dict[int, int]] = {}
    for topic, partition, offset in connection.execute(SQL["positions"]):
        positions.setdefault(topic, {})[partition] = offset
    return positions


def _count(connection: Connection, table: str, size_bytes: int) -> Rows:
    """Exact when the table is small, or when the server has no statistics of it and can count in time."""
    (about,) = one(connection, SQL["count_about"].format(table=sql.Literal(table)))
    if size_bytes >= EXACT_BELOW_BYTES and about > 0:
        return Rows(about, exact=False)
    try:
        return Rows(one(connection, SQL["count_exactly"].format(table=sql.Identifier(table)))[0], exact=True)
    except psycopg.errors.QueryCanceled:
        return Rows(max(about, 0), exact=False)
