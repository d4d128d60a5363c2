"""What is sent once more undoes nothing: values that arrived later survive, whatever is repeated and by whom."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from services.core.config import Settings
from tests.fix_services import message, minutes, publish, run_cli
from tests.integration.test_producer import changed

OLD, NEW, OTHER = 5.0, 7.0, 9.0

Table = list[tuple[float | None, float | None]]


def run(settings: Settings, *arguments: str, **environment: str) -> None:
    done = run_cli(settings, *arguments, **environment)
    assert done.returncode == 0, done.stderr


def consume(settings: Settings, **environment: str) -> None:
    run(settings, "consume", "--until-caught-up", **environment)


def produce(settings: Settings, path: Path, *arguments: str) -> None:
    """Send the file, and store what was sent."""
    run(changed(settings, parquet_url=str(path)), "produce", *arguments)
    consume(settings)


def correct(settings: Settings, temperature: float = NEW, minute: int = 0) -> None:
    """A device sends another value for the reading of that minute."""
    publish(settings, [message(time=minutes(minute), temperature=temperature)])
    consume(settings)


def write(path: Path, *temperatures: float, humidity: float | None = None, minute: int | None = None) -> Path:
    """Readings of sensor s1 with these temperatures, a minute apart; with ``minute`` all of that one."""
    rows = len(temperatures)
    table = {
        "time_hour": pa.array(
            [minutes(number if minute is None else minute) for number in range(rows)], pa.timestamp("us", "UTC")
        ),
        "origin": pa.array(["s1"] * rows),
        "temp": pa.array(temperatures, pa.float64()),
        "humid": pa.array([humidity] * rows, pa.float64()),
    }
    pq.write_table(pa.table(table), path)
    return path


def stored(connection: psycopg.Connection) -> Table:
    """Temperature and humidity of each reading, in the order of time."""
    return connection.execute("SELECT temperature, humidity FROM sensor_data ORDER BY time").fetchall()


@pytest.mark.slow
def test_a_dead_letter_that_is_replayed_twice_leaves_a_correction(
    settings: Settings, connection: psycopg.Connection
) -> None:
    letter = message(time=minutes(0), temperature=OLD, humidity=50.0)[:-1] + b', "note": "' + b"x" * 300 + b'"}'
    publish(settings, [letter])
    consume(settings, MAX_MESSAGE_BYTES="256")
    run(settings, "dead-letters", "replay")
    consume(settings)
    assert stored(connection) == [(OLD, 50.0)]
    correct(settings)
    run(settings, "dead-letters", "replay")
    consume(settings)
    assert stored(connection) == [(NEW, 50.0)]
    run(settings, "dead-letters", "replay", "--overwrite")
    consume(settings)
    assert stored(connection) == [(OLD, 50.0)]


def test_a_file_that_is_sent_again_fills_gaps_and_leaves_a_correction(
    settings: Settings, connection: psycopg.Connection, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.parquet", OLD, OLD, OLD, humidity=50.0)
    produce(settings, path)
    correct(settings)
    connection.execute("DELETE FROM sensor_data WHERE time = %s", [minutes(1)])
    connection.execute("UPDATE sensor_data SET humidity = NULL WHERE time = %s", [minutes(2)])
    produce(settings, path, "--resend")
    assert stored(connection) == [(NEW, 50.0), (OLD, 50.0), (OLD, 50.0)]
    produce(settings, path, "--resend", "--overwrite")
    assert stored(connection) == [(OLD, 50.0)] * 3


def test_a_file_that_is_renamed_leaves_a_correction(
    settings: Settings, connection: psycopg.Connection, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.parquet", OLD, OLD)
    produce(settings, path)
    correct(settings)
    produce(settings, path.rename(tmp_path / "b.parquet"))
    assert stored(connection) == [(NEW, None), (OLD, None)]


@pytest.mark.slow
def test_rows_that_are_added_to_a_file_leave_a_correction_and_other_contents_are_one(
    settings: Settings, connection: psycopg.Connection, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.parquet", OLD, OLD)
    produce(settings, path)
    correct(settings)
    produce(settings, write(path, OLD, OLD, OLD))
    assert stored(connection) == [(NEW, None), (OLD, None), (OLD, None)]
    produce(settings, write(path, OTHER, OLD, OLD))
    assert stored(connection) == [(OTHER, None), (OLD, None), (OLD, None)]


@pytest.mark.slow
def test_a_new_topic_that_is_filled_with_old_files_leaves_a_correction(
    settings: Settings, connection: psycopg.Connection, tmp_path: Path
) -> None:
    """As after a move to another cluster. A file that comes later is new there."""
    path = write(tmp_path / "a.parquet", OLD, OLD)
    produce(settings, path)
    correct(settings)
    moved = changed(settings, kafka_topic=f"{settings.kafka_topic}_moved", kafka_group=f"{settings.kafka_group}_moved")
    produce(moved, path)
    assert stored(connection) == [(NEW, None), (OLD, None)]
    produce(moved, write(tmp_path / "b.parquet", OTHER))
    assert stored(connection) == [(OTHER, None), (OLD, None)]


def test_the_first_load_of_old_files_lets_the_last_value_win(
    settings: Settings, connection: psycopg.Connection, tmp_path: Path
) -> None:
    """There is nothing that could be undone, and files correct themselves and each other."""
    first = write(tmp_path / "a.parquet", OLD, OTHER, minute=0)
    second = write(tmp_path / "b.parquet", NEW, minute=0)
    produce(settings, first)
    assert stored(connection) == [(OTHER, None)]
    produce(settings, second)
    assert stored(connection) == [(NEW, None)]
