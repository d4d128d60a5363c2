"""Raw history comes and goes, summaries stay right."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from services.core.config import Settings
from services.core.kafka import headers_of
from services.etl.metrics import BASE
from tests.fix_services import message, publish, read_topic, run_cli

NOW = datetime.now(UTC).replace(second=0, microsecond=0)
KEEP = {"RAW_RETENTION_DAYS": "30"}


def ago(days: float) -> datetime:
    return NOW - timedelta(days=days)


def run(settings: Settings, *arguments: str, **environment: str) -> str:
    done = run_cli(settings, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def store(settings: Settings, *values: bytes, **environment: str) -> None:
    publish(settings, values)
    run(settings, "consume", "--until-caught-up", **environment)


def count(connection: psycopg.Connection, table: str) -> int:
    row = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
    assert row is not None
    return int(row[0])


def summary(connection: psycopg.Connection) -> list[tuple[object, ...]]:
    return connection.execute(
        "SELECT sensor_id, interval_start, avg_temperature, reading_count FROM temperature_summary ORDER BY 1, 2"
    ).fetchall()


def reasons(settings: Settings) -> list[str]:
    letters = read_topic(settings, settings.dead_letter_topic)
    return [(dict(headers_of(letter))["sensor_pipeline.reason"] or b"").decode() for letter in letters]


@pytest.fixture
def history(settings: Settings, connection: psycopg.Connection) -> list[tuple[object, ...]]:
    """Readings of 40, 20 and 1 days ago, summarised; the summary's rows."""
    store(settings, *(message(time=ago(days), temperature=days) for days in (40, 20, 1)))
    run(settings, "etl", "--once")
    rows = summary(connection)
    assert [row[2] for row in rows] == [40, 20, 1]
    return rows


def test_retention_of_raw_readings_does_not_wipe_the_summary(
    settings: Settings, connection: psycopg.Connection, history: list[tuple[object, ...]]
) -> None:
    run(settings, "etl", "--once", **KEEP)
    assert count(connection, "sensor_data") == 2
    assert summary(connection) == history
    assert count(connection, "temperature_summary_live") == 3

    # A change within the kept history still arrives; the old interval stays as it was.
    store(settings, message(time=ago(20), temperature=21.0))
    run(settings, "etl", "--once", **KEEP)
    assert [row[2] for row in summary(connection)] == [40, 21, 1]
    assert run(settings, "etl", "--reconcile", **KEEP).splitlines() == [
        "humidity_summary: 0 rows differed",
        "temperature_summary: 0 rows differed",
    ]


def test_the_minutes_of_history_that_is_gone_are_dropped_too(
    settings: Settings, connection: psycopg.Connection
) -> None:
    """By whole chunks of minutes, which span ten of the readings' own."""
    store(settings, *(message(time=ago(days), temperature=days) for days in (400, 300, 1)))
    run(settings, "etl", "--once")
    assert count(connection, BASE) == 3
    run(settings, "etl", "--once", **KEEP)
    assert count(connection, BASE) == 2
    assert [row[2] for row in summary(connection)] == [400, 300, 1]


@pytest.mark.parametrize("environment", [KEEP, {}], ids=["by the setting", "by what is dropped"])
def test_a_reading_too_old_for_the_raw_history_is_a_dead_letter_and_overwrites_nothing(
    settings: Settings,
    connection: psycopg.Connection,
    history: list[tuple[object, ...]],
    environment: dict[str, str],
) -> None:
    run(settings, "etl", "--once", **KEEP)
    store(
        settings,
        message(time=ago(1), temperature=2.0),
        message(time=ago(40), temperature=99.0),
        message("s2", time=ago(1), temperature=3.0),
        **environment,
    )
    run(settings, "etl", "--once", **KEEP)
    assert reasons(settings) == ["too_late"]
    assert [row[2] for row in summary(connection)] == [40, 20, 2, 3]


def test_chunks_dropped_by_hand_freeze_their_intervals(
    settings: Settings, connection: psycopg.Connection, history: list[tuple[object, ...]]
) -> None:
    connection.execute("SELECT drop_chunks('sensor_data', older_than => %s)", (ago(30),))
    store(settings, message(time=ago(1), temperature=2.0))
    run(settings, "etl", "--once")
    assert [row[2] for row in summary(connection)] == [40, 20, 2]
    store(settings, message(time=ago(40), temperature=99.0))
    assert reasons(settings) == ["too_late"]


def test_late_and_corrected_readings_into_compressed_history(
    settings: Settings, connection: psycopg.Connection, history: list[tuple[object, ...]]
) -> None:
    run(settings, "etl", "--once", COMPRESS_AFTER_DAYS="10")
    compressed = connection.execute(
        "SELECT count(*) FROM timescaledb_information.chunks WHERE is_compressed"
        " AND hypertable_schema = 'public' AND hypertable_name = 'sensor_data'"
    ).fetchone()
    assert compressed == (2,)
    store(
        settings,
        message(time=ago(40), temperature=41.0),
        message(time=ago(40) + timedelta(seconds=1), temperature=43.0),
        message(time=ago(20), temperature=20.0),
    )
    run(settings, "etl", "--once", COMPRESS_AFTER_DAYS="10")
    assert [row[2:] for row in summary(connection)] == [(42.0, 2), (20.0, 1), (1.0, 1)]


def test_reconcile_repairs_what_no_queue_row_announced(
    settings: Settings, connection: psycopg.Connection, history: list[tuple[object, ...]]
) -> None:
    connection.execute("UPDATE sensor_data SET temperature = 22 WHERE temperature = 20")
    connection.execute("DELETE FROM sensor_data WHERE temperature = 1")
    connection.execute("UPDATE temperature_summary SET max_temperature = 1000 WHERE avg_temperature = 40")
    printed = run(settings, "etl", "--reconcile").splitlines()
    assert printed == [
        "humidity_summary: 0 rows differed",
        "temperature_summary: 3 rows differed and were repaired",
    ]
    assert [row[2] for row in summary(connection)] == [40, 22]
    assert run(settings, "etl", "--reconcile").splitlines() == [
        "humidity_summary: 0 rows differed",
        "temperature_summary: 0 rows differed",
    ]
