"""Raw history comes and goes, summaries stay right."""

from __future__ import annotations

import json
import urllib.request
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from services.core.config import Settings
from services.core.kafka import headers_of
from services.core.measurements import DEFAULT
from services.etl.rollup import BASE
from services.etl.worker import Leader
from services.status import command
from services.status.database import read_database
from tests.fix_services import StartService, message, publish, read_topic, run_cli, wait_until
from tests.fix_stack import free_port
from tests.measured import of_default

NOW = datetime.now(UTC).replace(second=0, microsecond=0)
KEEP = {"RAW_RETENTION_DAYS": "30"}


def ago(days: float) -> datetime:
    return NOW - timedelta(days=days)


def run(settings: Settings, *arguments: str, **environment: str) -> str:
    done = run_cli(settings, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return "".join(f"{line}\n" for line in sorted(of_default(done.stdout.splitlines())))


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


@pytest.mark.usefixtures("in_minutes")
def test_the_minutes_of_history_that_is_gone_are_dropped_too(
    settings: Settings, connection: psycopg.Connection
) -> None:
    """By whole chunks of minutes, which span ten of the readings' own."""
    store(settings, *(message(time=ago(days), temperature=days) for days in (400, 300, 1)))
    Leader(connection, settings).run_once()
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


def test_late_and_corrected_readings_enter_compressed_history(
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


# Nothing that is kept is closed --------------------------------------------------------------------------------


def closed_before(connection: psycopg.Connection, metric: str = "temperature") -> datetime | None:
    """None: nothing is closed."""
    row = connection.execute(
        "SELECT CASE WHEN isfinite(closed_before) THEN closed_before END FROM summary_state WHERE measurement = %s",
        [metric],
    ).fetchone()
    assert row is not None
    closed: datetime | None = row[0]
    return closed


def assert_open(settings: Settings, connection: psycopg.Connection, **environment: str) -> None:
    """A reading of now is stored and summarised."""
    store(settings, message("now", time=NOW, temperature=7.0), **environment)
    run(settings, "etl", "--once", **environment)
    assert reasons(settings) == []
    rows = connection.execute("SELECT avg_temperature FROM temperature_summary WHERE sensor_id = 'now'").fetchall()
    assert rows == [(7.0,)]


@pytest.mark.slow
@pytest.mark.parametrize("width", ["10080", "43200", "527040"])
def test_a_chunk_is_kept_as_long_as_the_intervals_that_it_is_part_of(
    settings: Settings, connection: psycopg.Connection, width: str
) -> None:
    changes = {"TEMPERATURE_INTERVAL": width, "RAW_RETENTION_DAYS": "30"}
    days = (1000, 45, 40, 31, 1)
    store(settings, *(message(time=ago(age), temperature=age) for age in days))
    run(settings, "etl", "--once", **changes)
    closed = closed_before(connection)
    assert closed is not None, "the oldest has expired at any width"
    assert closed <= datetime.now(UTC) - timedelta(days=30)
    kept = connection.execute("SELECT temperature FROM sensor_data ORDER BY 1 DESC").fetchall()
    assert (1000.0,) not in kept
    for age in days:
        assert (age,) in kept or ago(age) < closed
    assert_open(settings, connection, **changes)
    assert run(settings, "etl", "--reconcile", **changes).splitlines()[1] == "temperature_summary: 0 rows differed"


def test_a_width_that_would_close_the_present_is_refused(
    settings: Settings, connection: psycopg.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weeks and thirty days begin together every 210 days."""
    old, new = {"TEMPERATURE_INTERVAL": "10080"}, {"TEMPERATURE_INTERVAL": "43200"}
    store(settings, message(time=ago(1), temperature=1.0))
    run(settings, "etl", "--once", **old)
    connection.execute(
        "UPDATE summary_state SET closed_before = closed, frozen_before = closed"
        " FROM (SELECT time_bucket('210 days', now() - interval '7 days', timestamptz '2000-01-03') + interval '7 days'"
        " AS closed) AS week WHERE measurement = 'temperature'"
    )
    closed = closed_before(connection)
    done = run_cli(settings, "etl", "--once", **new)
    assert done.returncode == 0
    (warning,) = [json.loads(line) for line in done.stderr.splitlines() if "interval_change_refused" in line]
    assert (warning["setting"], warning["old"], warning["new"]) == ("TEMPERATURE_INTERVAL", 10080, 43200)
    assert closed_before(connection) == closed
    assert connection.execute("SELECT to_regclass('temperature_43200min')").fetchone() == (None,)
    assert_open(settings, connection, **new)
    command.run(settings.model_copy(update={"temperature_interval": 43200}), as_json=False)
    assert "temperature intervals have 10080 minutes in the database, 43200 in the settings" in capsys.readouterr().out


def test_an_emptied_table_does_not_close_the_present(
    settings: Settings, connection: psycopg.Connection, history: list[tuple[object, ...]]
) -> None:
    connection.execute("TRUNCATE sensor_data")
    run(settings, "etl", "--once")
    closed = closed_before(connection)
    assert closed is not None
    assert closed <= datetime.now(UTC)
    assert summary(connection) == history
    later = datetime.now(UTC) + timedelta(minutes=15)  # of an interval that begins after the table was emptied
    store(settings, message("now", time=later, temperature=7.0))
    run(settings, "etl", "--once")
    assert [row[2] for row in summary(connection) if row[0] == "now"] == [7.0]


def test_a_chunk_of_the_future_that_is_dropped_by_hand_does_not_close_the_present(
    settings: Settings, connection: psycopg.Connection
) -> None:
    fast = NOW + timedelta(days=20)
    far = {"MAX_FUTURE_SECONDS": "2000000"}
    store(settings, message(time=ago(1), temperature=1.0), message(time=fast, temperature=9.0), **far)
    run(settings, "etl", "--once")
    connection.execute("SELECT drop_chunks('sensor_data', newer_than => %s)", [fast - timedelta(days=8)])
    run(settings, "etl", "--once")
    closed = closed_before(connection)
    assert closed is None or closed <= datetime.now(UTC)
    store(settings, message("now", time=datetime.now(UTC), temperature=7.0))
    assert reasons(settings) == []


def test_a_chunk_dropped_by_hand_that_is_younger_than_what_is_kept_closes_nothing(
    settings: Settings, connection: psycopg.Connection, history: list[tuple[object, ...]]
) -> None:
    """Its summary stays until a reading of its time comes."""
    connection.execute("SELECT drop_chunks('sensor_data', older_than => %s)", [ago(12)])
    changes = {"RAW_RETENTION_DAYS": "60"}
    run(settings, "etl", "--once", **changes)
    closed = closed_before(connection)
    assert closed is None or closed <= datetime.now(UTC) - timedelta(days=60)
    assert run(settings, "etl", "--reconcile", **changes).splitlines()[1] == "temperature_summary: 0 rows differed"
    assert summary(connection) == history
    store(settings, message(time=ago(20) + timedelta(seconds=1), temperature=5.0))
    run(settings, "etl", "--once", **changes)
    assert [row[2] for row in summary(connection)] == [40, 5, 1]


def has_procedure(connection: psycopg.Connection, name: str) -> bool:
    return connection.execute("SELECT FROM pg_proc WHERE proname = %s", [name]).fetchone() is not None


@pytest.mark.slow
def test_chunks_that_were_merged_or_split_are_not_gone(settings: Settings, connection: psycopg.Connection) -> None:
    if not has_procedure(connection, "split_chunk"):
        pytest.skip("this TimescaleDB cannot split chunks")

    def chunks() -> list[str]:
        return [str(row[0]) for row in connection.execute("SELECT show_chunks('sensor_data')")]

    days = [60, 53, 46, 1]
    store(settings, *(message(time=ago(age), temperature=age) for age in days))
    run(settings, "etl", "--once")
    first, second, third, _ = chunks()
    connection.execute(f"CALL merge_chunks('{second}', '{first}')")
    run(settings, "etl", "--once")
    connection.execute(f"CALL split_chunk('{third}')")
    run(settings, "etl", "--once")
    connection.execute(f"CALL split_chunk('{chunks()[0]}')")  # what was merged
    store(settings, message(time=ago(53) + timedelta(minutes=1), temperature=55.0))
    run(settings, "etl", "--once")
    assert closed_before(connection) is None
    assert reasons(settings) == []
    assert len(chunks()) == 5
    connection.execute("SELECT drop_chunks('sensor_data', older_than => %s)", [ago(40)])
    run(settings, "etl", "--once")
    closed = closed_before(connection)
    assert closed is not None
    assert ago(46) < closed < ago(35)


# etl looks for itself ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_leader_finds_and_repairs_what_differs(
    settings: Settings, connection: psycopg.Connection, start: StartService, history: list[tuple[object, ...]]
) -> None:
    port = free_port()
    etl = start("etl", settings=settings.model_copy(update={"etl_check_seconds": 0.2, "metrics_port": port}))
    etl.wait_for("leading")

    def checked() -> list[tuple[object, ...]]:
        return connection.execute(
            "SELECT measurement, differences, checked_at FROM summary_check WHERE measurement = ANY(%s) ORDER BY 1",
            [list(DEFAULT)],
        ).fetchall()

    wait_until(lambda: len(checked()) == len(DEFAULT), "a look at both")
    assert [row[:2] for row in checked()] == [("humidity", 0), ("temperature", 0)]
    assert value_of(port, "sensor_summary_differences_total", measurement="temperature") == 0
    connection.execute("UPDATE temperature_summary SET max_temperature = 99 WHERE avg_temperature IN (40, 1)")
    wait_until(lambda: summary_of_all(connection) == [(40, 40), (20, 20), (1, 1)], "both are right again")
    wait_until(lambda: [row[1] for row in checked()] == [0, 2], "both are counted")
    assert value_of(port, "sensor_summary_differences_total", measurement="temperature") == 2
    assert len(etl.events("summary_differs")) == 2
    tables = read_database(settings, "here").tables
    assert tables is not None
    (check,) = [each.check for each in tables.summaries if each.measurement == "temperature"]
    assert check is not None
    assert (check.differences, check.age_seconds < 20, check.differed_at is not None) == (2, True, True)
    assert etl.stop() == 0


def summary_of_all(connection: psycopg.Connection) -> list[tuple[object, ...]]:
    return connection.execute(
        "SELECT avg_temperature, max_temperature FROM temperature_summary ORDER BY 1 DESC"
    ).fetchall()


def value_of(port: int, name: str, **labels: str) -> float:
    """One sample of the service's metrics."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    wanted = name + "{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "}"
    (line,) = [line for line in text.splitlines() if line.startswith(wanted + " ")]
    return float(line.rpartition(" ")[2])
