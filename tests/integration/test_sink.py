"""The one transaction that stores readings, against a real database."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import datetime, timedelta

import psycopg
import pytest

from services.consumer.sink import MOST_TRANSACTIONS, PartitionsLostError, Sink
from services.core.config import Settings
from services.core.errors import PermanentError
from services.core.reading import Reading
from tests.fix_services import minutes

Row = tuple[str, datetime, float | None, float | None]


@pytest.fixture
def sink(settings: Settings) -> Iterator[Sink]:
    """A sink that owns partition 0."""
    sink = Sink(settings)
    sink.claim([0])
    yield sink
    sink.close()


def stored(connection: psycopg.Connection) -> list[Row]:
    return connection.execute(
        "SELECT sensor_id, time, temperature, humidity FROM sensor_data ORDER BY time, sensor_id"
    ).fetchall()


def versions(connection: psycopg.Connection) -> list[tuple[str, ...]]:
    """What changes whenever a row is written again, even to the same values."""
    return connection.execute("SELECT xmin::text, ctid::text FROM sensor_data ORDER BY time, sensor_id").fetchall()


def take_queue(connection: psycopg.Connection) -> set[datetime]:
    """Empty the queue; the minutes that were in it."""
    rows = connection.execute(
        "WITH taken AS (DELETE FROM summary_refresh_queue RETURNING touched)"
        " SELECT lower(piece), upper(piece) FROM taken, unnest(touched) AS piece"
    ).fetchall()
    return {
        start + at * timedelta(minutes=1) for start, end in rows for at in range((end - start) // timedelta(minutes=1))
    }


def counts(sink: Sink, *readings: Reading) -> tuple[int, int, int]:
    result = sink.write(readings, [0])
    assert not result.refused
    return result.inserted, result.updated, result.unchanged


def test_repeated_readings_change_nothing(sink: Sink, connection: psycopg.Connection) -> None:
    readings = [Reading("s1", minutes(at), float(at), 50.0) for at in range(100)]
    assert counts(sink, *readings) == (100, 0, 0)
    assert len(take_queue(connection)) == 100
    before = versions(connection)
    for _ in range(3):
        assert counts(sink, *readings) == (0, 0, 100)
    assert versions(connection) == before
    assert connection.execute("SELECT count(*) FROM summary_refresh_queue").fetchone() == (0,)


def test_corrections_replace_and_only_their_minutes_are_queued(sink: Sink, connection: psycopg.Connection) -> None:
    readings = [Reading("s1", minutes(at), 20.0, 50.0) for at in range(10)]
    counts(sink, *readings)
    take_queue(connection)
    readings[7] = Reading("s1", minutes(7), 21.0, 50.0)
    assert counts(sink, *readings) == (0, 1, 9)
    assert stored(connection)[7] == ("s1", minutes(7), 21.0, 50.0)
    assert take_queue(connection) == {minutes(7)}


@pytest.mark.parametrize("together", [True, False])
def test_temperature_and_humidity_sent_apart_end_in_one_row(
    sink: Sink, connection: psycopg.Connection, together: bool
) -> None:
    temperature, humidity = Reading("s1", minutes(0), 20.0, None), Reading("s1", minutes(0), None, 50.0)
    if together:
        assert counts(sink, temperature, humidity) == (1, 0, 1)
    else:
        assert counts(sink, temperature) == (1, 0, 0)
        assert counts(sink, humidity) == (0, 1, 0)
    assert stored(connection) == [("s1", minutes(0), 20.0, 50.0)]


def test_a_null_keeps_what_is_stored(sink: Sink, connection: psycopg.Connection) -> None:
    counts(sink, Reading("s1", minutes(0), 20.0, 50.0))
    assert counts(sink, Reading("s1", minutes(0), None, 50.0)) == (0, 0, 1)
    assert counts(sink, Reading("s1", minutes(0), 0.0, None)) == (0, 1, 0)
    assert stored(connection) == [("s1", minutes(0), 0.0, 50.0)]


def test_the_last_of_a_batch_wins(sink: Sink, connection: psycopg.Connection) -> None:
    """A key that is twice in one batch is a conflict that no retry would ever get rid of."""
    batch = [Reading("s1", minutes(0), float(value), None) for value in (1, 3, 2)]
    batch.insert(1, Reading("s1", minutes(0), None, 9.0))
    assert counts(sink, *batch) == (1, 0, 3)
    assert stored(connection) == [("s1", minutes(0), 2.0, 9.0)]


def test_a_batch_that_jumps_in_time_is_several_transactions(sink: Sink, connection: psycopg.Connection) -> None:
    """One transaction would have TimescaleDB recompute all that lies between."""
    near, far = minutes(0), minutes(0) - timedelta(days=300)
    batch = [Reading("s1", near, 1.0), Reading("s1", far, 2.0), Reading("s2", near, 3.0), Reading("s2", far, 4.0)]
    assert counts(sink, *batch) == (4, 0, 0)
    groups = connection.execute("SELECT array_agg(DISTINCT time) FROM sensor_data GROUP BY xmin::text").fetchall()
    assert sorted(groups) == [([far],), ([near],)]
    assert connection.execute("SELECT count(*) FROM summary_refresh_queue").fetchone() == (2,)
    assert take_queue(connection) == {near, far}


def test_many_jumps_are_few_transactions(sink: Sink, connection: psycopg.Connection) -> None:
    counts(sink, *(Reading("s1", minutes(at * 600), 1.0) for at in range(50)))
    assert connection.execute("SELECT count(DISTINCT xmin::text) FROM sensor_data").fetchone() == (MOST_TRANSACTIONS,)
    assert len(take_queue(connection)) == 50


@pytest.fixture
def humidity_check(connection: psycopg.Connection) -> Iterator[None]:
    """A rule of the database that a reading can break."""
    connection.execute("ALTER TABLE sensor_data ADD CONSTRAINT plausible CHECK (humidity <= 100)")
    yield
    connection.execute("ALTER TABLE sensor_data DROP CONSTRAINT plausible")


@pytest.mark.usefixtures("humidity_check")
@pytest.mark.parametrize("path", ["copy", "merge"])
def test_one_bad_row_does_not_poison_its_batch(sink: Sink, connection: psycopg.Connection, path: str) -> None:
    if path == "merge":
        counts(sink, Reading("s1", minutes(0), None, 1.0))
    bad = {3: "a\0b", 500: "s1", 501: "s1", 502: "a\0b", 999: "s1"}
    batch = [
        Reading(bad.get(at, "s1"), minutes(at), None, 101.0 if bad.get(at) == "s1" else 50.0) for at in range(1000)
    ]
    result = sink.write(batch, [0])
    assert (result.inserted, result.updated) == ((995, 0) if path == "copy" else (994, 1))
    assert {refused.index for refused in result.refused} == set(bad)
    assert {refused.reason for refused in result.refused} == {"refused_by_database"}
    details = {refused.index: refused.detail for refused in result.refused}
    assert 'violates check constraint "' in details[500]
    assert "invalid byte sequence" in details[3]
    good = [at for at in range(1000) if at not in bad]
    assert stored(connection) == [("s1", minutes(at), None, 50.0) for at in good]
    assert take_queue(connection) == {minutes(at) for at in good}


def test_readings_and_their_queue_row_are_stored_together_or_not_at_all(
    sink: Sink, connection: psycopg.Connection
) -> None:
    connection.execute("ALTER TABLE summary_refresh_queue RENAME TO away")
    try:
        with pytest.raises(PermanentError, match="summary_refresh_queue"):
            sink.write([Reading("s1", minutes(0), 1.0)], [0])
    finally:
        connection.execute("ALTER TABLE away RENAME TO summary_refresh_queue")
    assert stored(connection) == []
    assert counts(sink, Reading("s1", minutes(0), 1.0)) == (1, 0, 0)


def test_a_consumer_whose_partition_was_claimed_by_another_stores_nothing(
    sink: Sink, settings: Settings, connection: psycopg.Connection
) -> None:
    other = Sink(settings)
    other.claim([0, 1])
    with pytest.raises(PartitionsLostError):
        sink.write([Reading("s1", minutes(0), 1.0)], [0])
    assert stored(connection) == []
    assert counts(other, Reading("s1", minutes(0), 2.0)) == (1, 0, 0)
    sink.claim([0])
    with pytest.raises(PartitionsLostError):
        other.write([Reading("s1", minutes(0), 3.0)], [0, 1])
    assert other.write([Reading("s1", minutes(1), 3.0)], [1]).inserted == 1
    other.close()


@pytest.mark.parametrize("seed", range(3))
def test_any_sequence_of_batches_is_as_if_stored_one_by_one(
    sink: Sink, connection: psycopg.Connection, seed: int
) -> None:
    source = random.Random(seed)  # noqa: S311
    model: dict[tuple[datetime, str], list[float | None]] = {}
    for _ in range(25):
        batch = [
            Reading(
                source.choice("ab"),
                minutes(source.choice([0, 0, 500_000]) + source.randrange(12) / 2),
                source.choice([None, 0.0, 1.0, 2.0]),
                source.choice([None, 0.0, 1.0]),
            )
            for _ in range(source.randint(1, 12))
        ]
        before = {key: tuple(values) for key, values in model.items()}
        for reading in batch:
            row = model.setdefault((reading.time, reading.sensor_id), [None, None])
            row[:] = [
                row[0] if reading.temperature is None else reading.temperature,
                row[1] if reading.humidity is None else reading.humidity,
            ]
        inserted, updated, unchanged = counts(sink, *batch)
        changed = {key for key, values in model.items() if before.get(key) != tuple(values)}
        assert inserted == len(model) - len(before)
        assert updated == len(changed) - inserted
        assert unchanged == len(batch) - len(changed)
        assert take_queue(connection) == {time.replace(second=0) for time, _ in changed}
    assert stored(connection) == [(sensor, time, *values) for (time, sensor), values in sorted(model.items())]
