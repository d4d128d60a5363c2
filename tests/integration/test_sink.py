"""The one transaction that stores readings, against a real database."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import datetime, timedelta, tzinfo

import psycopg
import pytest

from services.consumer.batch import Move
from services.consumer.columns import MAX_TRANSACTIONS, columns_of, encode
from services.consumer.sink import SESSION_NAME, Sink, statement
from services.core.config import Settings
from services.core.database import connect
from services.core.errors import PartitionsMovedError, PermanentError, TransientError
from services.core.reading import Reading
from tests.fix_proxy import Moment, Proxy
from tests.fix_services import NOWHERE, minutes, wait_until
from tests.measured import MEASUREMENTS, reading_of, write_to

pytestmark = pytest.mark.without_topics

Row = tuple[str, datetime, float | None, float | None]


@pytest.fixture
def sink(settings: Settings) -> Iterator[Sink]:
    """A sink whose writes are of no partition, unless a test names one."""
    sink = Sink(settings)
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
    result = write_to(sink, readings, NOWHERE)
    assert not result.refused
    return result.inserted, result.updated, result.unchanged


def test_repeated_readings_change_nothing(sink: Sink, connection: psycopg.Connection) -> None:
    readings = [reading_of("s1", minutes(at), float(at), 50.0) for at in range(100)]
    assert counts(sink, *readings) == (100, 0, 0)
    assert len(take_queue(connection)) == 100
    before = versions(connection)
    for _ in range(3):
        assert counts(sink, *readings) == (0, 0, 100)
    assert versions(connection) == before
    assert connection.execute("SELECT count(*) FROM summary_refresh_queue").fetchone() == (0,)


def test_corrections_replace_and_only_their_minutes_are_queued(sink: Sink, connection: psycopg.Connection) -> None:
    readings = [reading_of("s1", minutes(at), 20.0, 50.0) for at in range(10)]
    counts(sink, *readings)
    take_queue(connection)
    readings[7] = reading_of("s1", minutes(7), 21.0, 50.0)
    assert counts(sink, *readings) == (0, 1, 9)
    assert stored(connection)[7] == ("s1", minutes(7), 21.0, 50.0)
    assert take_queue(connection) == {minutes(7)}


@pytest.mark.parametrize("together", [True, False])
def test_temperature_and_humidity_sent_apart_end_in_one_row(
    sink: Sink, connection: psycopg.Connection, together: bool
) -> None:
    temperature, humidity = reading_of("s1", minutes(0), 20.0, None), reading_of("s1", minutes(0), None, 50.0)
    if together:
        assert counts(sink, temperature, humidity) == (1, 0, 1)
    else:
        assert counts(sink, temperature) == (1, 0, 0)
        assert counts(sink, humidity) == (0, 1, 0)
    assert stored(connection) == [("s1", minutes(0), 20.0, 50.0)]


def test_a_null_keeps_what_is_stored(sink: Sink, connection: psycopg.Connection) -> None:
    counts(sink, reading_of("s1", minutes(0), 20.0, 50.0))
    assert counts(sink, reading_of("s1", minutes(0), None, 50.0)) == (0, 0, 1)
    assert counts(sink, reading_of("s1", minutes(0), 0.0, None)) == (0, 1, 0)
    assert stored(connection) == [("s1", minutes(0), 0.0, 50.0)]


def test_the_last_of_a_batch_wins(sink: Sink, connection: psycopg.Connection) -> None:
    """A key that is twice in one batch is a conflict that no retry would ever get rid of."""
    batch = [reading_of("s1", minutes(0), float(value), None) for value in (1, 3, 2)]
    batch.insert(1, reading_of("s1", minutes(0), None, 9.0))
    assert counts(sink, *batch) == (1, 0, 3)
    assert stored(connection) == [("s1", minutes(0), 2.0, 9.0)]


def test_a_batch_that_jumps_in_time_is_several_transactions(sink: Sink, connection: psycopg.Connection) -> None:
    """One transaction would have TimescaleDB recompute all that lies between."""
    near, far = minutes(0), minutes(0) - timedelta(days=300)
    batch = [
        reading_of("s1", near, 1.0),
        reading_of("s1", far, 2.0),
        reading_of("s2", near, 3.0),
        reading_of("s2", far, 4.0),
    ]
    assert counts(sink, *batch) == (4, 0, 0)
    groups = connection.execute("SELECT array_agg(DISTINCT time) FROM sensor_data GROUP BY xmin::text").fetchall()
    assert sorted(groups) == [([far],), ([near],)]
    assert connection.execute("SELECT count(*) FROM summary_refresh_queue").fetchone() == (2,)
    assert take_queue(connection) == {near, far}


def test_many_jumps_are_few_transactions(sink: Sink, connection: psycopg.Connection) -> None:
    counts(sink, *(reading_of("s1", minutes(at * 600), 1.0) for at in range(50)))
    assert connection.execute("SELECT count(DISTINCT xmin::text) FROM sensor_data").fetchone() == (MAX_TRANSACTIONS,)
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
        counts(sink, reading_of("s1", minutes(0), None, 1.0))
    bad = {3: "a\0b", 500: "s1", 501: "s1", 502: "a\0b", 999: "s1"}
    batch = [
        reading_of(bad.get(at, "s1"), minutes(at), None, 101.0 if bad.get(at) == "s1" else 50.0) for at in range(1000)
    ]
    result = write_to(sink, batch, NOWHERE)
    assert (result.inserted, result.updated) == ((995, 0) if path == "copy" else (994, 1))
    assert {refused.reason for refused in result.refused} == {"refused_by_database"}
    times = columns_of(batch, MEASUREMENTS)["time"].to_pylist()
    details = {times.index(refused.row["time"][0].as_py()): refused.detail for refused in result.refused}
    assert set(details) == set(bad)
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
            write_to(sink, [reading_of("s1", minutes(0), 1.0)], NOWHERE)
    finally:
        connection.execute("ALTER TABLE away RENAME TO summary_refresh_queue")
    assert stored(connection) == []
    assert counts(sink, reading_of("s1", minutes(0), 1.0)) == (1, 0, 0)


def positions(connection: psycopg.Connection, **places: int) -> None:
    """Put partitions of a topic "t" somewhere: ``p0=5``."""
    for name, offset in places.items():
        connection.execute(
            "INSERT INTO partition_progress VALUES (%s, %s, %s)"
            " ON CONFLICT (topic_id, partition) DO UPDATE SET next_offset = excluded.next_offset",
            ["t", int(name[1:]), offset],
        )


def where(connection: psycopg.Connection) -> dict[int, int]:
    return dict(connection.execute("SELECT partition, next_offset FROM partition_progress").fetchall())


def test_the_partitions_advance_in_the_transaction_of_the_readings(sink: Sink, connection: psycopg.Connection) -> None:
    positions(connection, p0=5, p1=7)
    result = write_to(sink, [reading_of("s1", minutes(0), 1.0)], Move("t", {0: 5, 1: 7}, {0: 9, 1: 8}))
    assert result.advanced
    assert where(connection) == {0: 9, 1: 8}
    (row,) = connection.execute(
        "SELECT count(DISTINCT xmin::text) FROM (SELECT xmin FROM sensor_data UNION ALL SELECT xmin"
        " FROM partition_progress UNION ALL SELECT xmin FROM summary_refresh_queue) AS all_rows"
    ).fetchall()
    assert row == (1,)


@pytest.mark.parametrize("path", ["copy", "merge", "fill", "several parts"])
def test_a_consumer_whose_partition_is_elsewhere_stores_nothing(
    sink: Sink, connection: psycopg.Connection, path: str
) -> None:
    positions(connection, p0=6, p1=7)
    if path == "merge":
        counts(sink, reading_of("s1", minutes(0), 0.0))
    before, queued = stored(connection), take_queue(connection)
    batch = [reading_of("s1", minutes(0), 1.0)]
    if path == "several parts":
        batch.append(reading_of("s1", minutes(1000), 1.0))
    first_time, repeated = ([], batch) if path == "fill" else (batch, [])
    with pytest.raises(PartitionsMovedError):
        write_to(sink, first_time, Move("t", {0: 5, 1: 7}, {0: 9, 1: 8}), repeated=repeated)
    assert stored(connection) == before
    assert queued is not None
    assert take_queue(connection) == set()
    assert where(connection) == {0: 6, 1: 7}
    with pytest.raises(PartitionsMovedError):
        sink.advance(Move("t", {0: 5}, {0: 9}))
    with pytest.raises(PartitionsMovedError):  # a topic that the database has never heard of
        sink.advance(Move("another", {0: 6}, {0: 9}))
    assert where(connection) == {0: 6, 1: 7}


def test_a_batch_of_several_transactions_checks_in_each_and_advances_at_the_end(
    sink: Sink, connection: psycopg.Connection
) -> None:
    positions(connection, p0=5)
    move = Move("t", {0: 5}, {0: 9})
    result = write_to(sink, [reading_of("s1", minutes(0), 1.0), reading_of("s1", minutes(1000), 1.0)], move)
    assert (result.inserted, result.advanced) == (2, False)
    assert where(connection) == {0: 5}
    sink.advance(move)
    assert where(connection) == {0: 9}


def test_with_dead_letters_to_send_nothing_advances_before(sink: Sink, connection: psycopg.Connection) -> None:
    positions(connection, p0=5)
    assert not write_to(sink, [reading_of("s1", minutes(0), 1.0)], Move("t", {0: 5}, {0: 9}), advance=False).advanced
    assert where(connection) == {0: 5}


@pytest.mark.usefixtures("humidity_check")
def test_with_a_refused_row_nothing_advances(sink: Sink, connection: psycopg.Connection) -> None:
    positions(connection, p0=5)
    batch = [reading_of("s1", minutes(at), None, 101.0 if at == 3 else 1.0) for at in range(20)]
    result = write_to(sink, batch, Move("t", {0: 5}, {0: 9}))
    assert (result.inserted, len(result.refused), result.advanced) == (19, 1, False)
    assert where(connection) == {0: 5}


@pytest.mark.usefixtures("humidity_check")
def test_when_every_row_is_refused_for_one_reason_the_rows_are_not_to_blame(
    sink: Sink, connection: psycopg.Connection
) -> None:
    batch = [reading_of("s1", minutes(at), None, 101.0) for at in range(50)]
    with pytest.raises(PermanentError, match=r"refuses all 50 readings .* \"plausible\""):
        write_to(sink, batch, NOWHERE)
    assert stored(connection) == []
    assert len(write_to(sink, batch[:5], NOWHERE).refused) == 5  # too few to tell
    assert write_to(sink, [*batch, reading_of("s1", minutes(99), None, 1.0)], NOWHERE).inserted == 1


def test_a_conflict_in_a_table_of_ours_is_no_duplicate_reading(sink: Sink, connection: psycopg.Connection) -> None:
    """After a move by logical replication, which does not carry sequences, ids of the queue are taken already."""
    connection.execute("INSERT INTO summary_refresh_queue (touched) VALUES ('{[2024-01-01, 2024-01-02)}')")
    connection.execute("UPDATE summary_refresh_queue SET id = DEFAULT")
    connection.execute(
        "SELECT setval(pg_get_serial_sequence('summary_refresh_queue', 'id'), max(id), false)"
        " FROM summary_refresh_queue"
    )
    with pytest.raises(PermanentError, match="summary_refresh_queue_pkey"):
        write_to(sink, [reading_of("s1", minutes(0), 1.0)], NOWHERE)
    assert stored(connection) == []


def test_repeated_readings_fill_gaps_and_overwrite_nothing(sink: Sink, connection: psycopg.Connection) -> None:
    counts(sink, reading_of("s1", minutes(0), 7.0, None))
    again = [reading_of("s1", minutes(0), 5.0, 50.0), reading_of("s1", minutes(1), 5.0, None)]
    result = write_to(sink, [reading_of("s1", minutes(1), 8.0, None)], NOWHERE, repeated=again)
    assert (result.inserted, result.updated, result.unchanged) == (1, 1, 1)
    assert stored(connection) == [("s1", minutes(0), 7.0, 50.0), ("s1", minutes(1), 8.0, None)]
    assert write_to(sink, [], NOWHERE, repeated=again).unchanged == 2


def test_corrections_for_many_sensors_enter_compressed_history(sink: Sink, connection: psycopg.Connection) -> None:
    """Each decompresses a thousand rows; the server's default limit is a hundred thousand in a transaction."""
    sensors = [f"s{number:03d}" for number in range(150)]
    counts(sink, *(reading_of(sensor, minutes(at / 2), 1.0) for at in range(1000) for sensor in sensors))
    connection.execute("SELECT compress_chunk(chunk) FROM show_chunks('sensor_data') AS chunk")
    assert counts(sink, *(reading_of(sensor, minutes(7), 2.0) for sensor in sensors)) == (0, 150, 0)
    assert connection.execute("SELECT count(*), sum(temperature) FROM sensor_data").fetchone() == (150_000, 150_150)


def test_the_clock_is_the_databases(
    sink: Sink, connection: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A consumer whose clock is an hour fast must not call readings too late an hour too soon."""

    class Fast(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(hours=1)

    monkeypatch.setattr("services.consumer.sink.datetime", Fast)
    counts(sink, reading_of("s1", minutes(0), 1.0))
    assert abs(sink.clock_lead - timedelta(hours=1)) < timedelta(seconds=30)


def test_thousands_of_weeks_are_stored_a_hundred_at_a_time(sink: Sink, connection: psycopg.Connection) -> None:
    """Each is a chunk to create, and all locks of a transaction have to fit into the server's table of locks."""
    weeks = [reading_of("s1", minutes(0) - at * timedelta(days=7), 1.0) for at in range(300)]
    assert counts(sink, *weeks) == (300, 0, 0)
    largest = "SELECT max(count) FROM (SELECT count(*) FROM sensor_data GROUP BY xmin::text) AS transactions"
    assert connection.execute(largest).fetchone() == (100,)


@pytest.mark.usefixtures("native")
def test_a_writer_that_stands_still_inside_copy_is_ended_by_who_waits_for_it(
    settings: Settings, connection: psycopg.Connection
) -> None:
    """No time limit of PostgreSQL ends a session that waits for COPY's data."""
    batch = [reading_of(f"s{number}", minutes(0), 1.0) for number in range(5000)]  # more than the server holds back
    heir = Sink(settings)
    frozen, bystander = connect(settings, SESSION_NAME), connect(settings)
    try:
        bystander.execute("BEGIN")
        cursor = frozen.cursor()
        rows = columns_of(batch, MEASUREMENTS)
        encoded = b"".join(encode(rows))
        cursor.execute("BEGIN")
        copying = cursor.copy(statement("copy_readings", rows))
        copying.__enter__().write(encoded[:-2])
        wait_until(lambda: is_written(connection, frozen.info.backend_pid), "rows are in the index")
        wait_until(lambda: writes(heir, batch), "it waits, ends the other, and writes", timeout_s=10)
        with pytest.raises(psycopg.OperationalError):
            copying.__exit__(None, None, None)
        bystander.execute("COMMIT")  # of others nobody is ended
    finally:
        frozen.close()
        bystander.close()
    assert len(stored(connection)) == len(batch)
    heir.close()


def writes(sink: Sink, batch: list[Reading]) -> bool:
    try:
        return write_to(sink, batch, NOWHERE).inserted == len(batch)
    except TransientError:
        return False


def is_written(connection: psycopg.Connection, pid: int) -> bool:
    """Whether the backend has begun to write."""
    row = connection.execute("SELECT backend_xid IS NOT NULL FROM pg_stat_activity WHERE pid = %s", [pid]).fetchone()
    return row == (True,)


@pytest.mark.parametrize("pattern", [b"transaction_timeout", b"max_tuples_decompressed", b"LOCK TABLE"])
def test_a_connection_that_is_cut_as_it_opens_blames_no_row(proxied: Settings, proxy: Proxy, pattern: bytes) -> None:
    sink = Sink(proxied)
    cut = proxy.cut_at(pattern, Moment.ANSWERED)
    with pytest.raises(TransientError):
        write_to(sink, [reading_of("s1", minutes(0), 1.0)], NOWHERE)
    assert cut.done.is_set()
    assert write_to(sink, [reading_of("s1", minutes(0), 1.0)], NOWHERE).inserted == 1
    sink.close()


@pytest.mark.usefixtures("native")
def test_time_limits_of_the_server_do_not_hold_for_us(settings: Settings, connection: psycopg.Connection) -> None:
    """As managed servers set them for a role."""
    limits = ("statement_timeout", "transaction_timeout", "idle_in_transaction_session_timeout", "lock_timeout")
    known = {
        name for (name,) in connection.execute("SELECT name FROM pg_settings WHERE name = ANY(%s)", [list(limits)])
    }
    for name in known:
        connection.execute(f"ALTER ROLE CURRENT_USER SET {name} = '200ms'")
    try:
        sink = Sink(settings)
        batch = [reading_of(f"s{number}", minutes(at), 1.0) for number in range(200) for at in range(1000)]
        assert counts(sink, *batch) == (200_000, 0, 0)
        assert counts(sink, *batch) == (0, 0, 200_000)
        sink.close()
    finally:
        for name in known:
            connection.execute(f"ALTER ROLE CURRENT_USER RESET {name}")


@pytest.mark.parametrize("seed", range(3))
def test_any_sequence_of_batches_is_as_if_stored_one_by_one(
    sink: Sink, connection: psycopg.Connection, seed: int
) -> None:
    source = random.Random(seed)  # noqa: S311
    model: dict[tuple[datetime, str], list[float | None]] = {}
    for _ in range(25):
        batch = [
            reading_of(
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
