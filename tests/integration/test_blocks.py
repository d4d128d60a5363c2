"""Blocks from file to table: the same readings, the same guarantees, whatever is in between."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from confluent_kafka import Producer

from services.core.block import block_schema, encode_block
from services.core.config import Settings
from services.core.kafka import ARROW, FORMAT_HEADER, REPEAT_HEADER, REPEATED, client_settings, headers_of
from services.core.measurements import DEFAULT
from tests.fix_services import (
    PATIENCE_S,
    StartService,
    message,
    minutes,
    publish,
    read_topic,
    run_cli,
    wait_until,
)
from tests.integration.test_producer import FORMATS, MANY, changed, source, write

BLOCK_SCHEMA = block_schema(DEFAULT)

Row = tuple[str | None, datetime | int | None, float | None, float | None]
Headers = list[tuple[str, str | bytes | None]]


def block(*rows: Row) -> bytes:
    """The message value of these readings, good or bad."""
    columns = [pa.array([row[at] for row in rows], field.type) for at, field in enumerate(BLOCK_SCHEMA)]
    return encode_block(pa.record_batch(columns, schema=BLOCK_SCHEMA))


def send(settings: Settings, *values: bytes, headers: Headers | None = None) -> None:
    """Blocks, in order, to partition 0."""
    producer = Producer(client_settings(settings, "test") | {"enable.idempotence": True})
    for value in values:
        headers_of_all: Headers = [(FORMAT_HEADER, ARROW), *(headers or [])]
        producer.produce(settings.kafka_topic, value, partition=0, headers=headers_of_all)
    assert producer.flush(PATIENCE_S) == 0


def consume(settings: Settings, **environment: str) -> None:
    done = run_cli(settings, "consume", "--until-caught-up", **environment)
    assert done.returncode == 0, done.stderr


def stored(connection: psycopg.Connection) -> list[tuple[object, ...]]:
    return connection.execute(
        "SELECT sensor_id, time, temperature, humidity FROM sensor_data ORDER BY sensor_id, time"
    ).fetchall()


def letters(settings: Settings) -> list[tuple[bytes | None, bytes | None, dict[str, bytes | None]]]:
    """Key, value and headers of each dead letter."""
    found = read_topic(settings, settings.dead_letter_topic)
    return [(letter.key(), letter.value(), dict(headers_of(letter))) for letter in found]


@FORMATS
def test_a_file_is_in_the_table_as_it_is(
    settings: Settings, connection: psycopg.Connection, start: StartService, tmp_path: Path, form: str
) -> None:
    """Numbers to their last bit, times to the microsecond, ids of any script."""
    chance = random.Random(1)  # noqa: S311 - readings, no secrets
    rows: list[tuple[str, datetime, float | None, float | None]] = [
        (
            chance.choice(["attic", "Küche", "東京", "x" * 255]),
            minutes(number).replace(microsecond=chance.randrange(10**6)),
            chance.choice([None, chance.uniform(-1e100, 1e100), 0.1 + 0.2]),
            chance.uniform(-1e-300, 1e-300),
        )
        for number in range(5000)
    ]
    columns = dict(zip(("origin", "time_hour", "temp", "humid"), zip(*rows, strict=True), strict=True))
    pq.write_table(pa.table({name: list(column) for name, column in columns.items()}), tmp_path / "a.parquet")
    assert start("produce", settings=source(settings, tmp_path / "a.parquet", producer_format=form)).wait() == 0
    consume(settings)
    assert stored(connection) == sorted(rows, key=lambda row: (row[0].encode(), row[1]))


def test_of_blocks_and_json_in_one_partition_the_later_value_wins(
    settings: Settings, connection: psycopg.Connection
) -> None:
    for number in range(4):
        send(settings, block(("s1", minutes(0), float(number), None), ("s1", minutes(1), 1.0, float(number))))
        publish(settings, [message(time=minutes(number % 2), temperature=10.0 + number)], partition=0)
    consume(settings)
    assert stored(connection) == [("s1", minutes(0), 3.0, None), ("s1", minutes(1), 13.0, 3.0)]


def test_within_a_block_the_last_value_of_each_field_wins(settings: Settings, connection: psycopg.Connection) -> None:
    send(settings, block(("s1", minutes(0), 1.0, 5.0), ("s1", minutes(0), 2.0, None), ("s1", minutes(0), None, 6.0)))
    consume(settings)
    assert stored(connection) == [("s1", minutes(0), 2.0, 6.0)]


@pytest.mark.slow
def test_a_consumer_that_is_killed_again_and_again_loses_and_doubles_nothing(
    settings: Settings, connection: psycopg.Connection, start: StartService, tmp_path: Path
) -> None:
    """While a producer sends, half in blocks and half in JSON; corrections in the other format come last."""
    path = write(tmp_path / "a.parquet", MANY)
    small = changed(settings, consumer_batch_rows=2_000)
    first = source(settings, path, producer_transaction_rows=20_000, producer_format="arrow")
    producer = start("produce", settings=first)
    producer.wait_for("transaction_committed", count=5)
    moments = random.Random(7)  # noqa: S311 - a seed, so that a failure can be had again
    for round_ in range(4):
        consumer = start("consume", settings=small)
        consumer.wait_for("batch_written", count=1 + moments.randrange(4))
        consumer.kill()
        if round_ == 1:
            producer.kill()
            producer = start("produce", settings=changed(first, producer_format="json"))
    assert producer.wait() == 0
    consume(settings)
    counts = connection.execute(
        "SELECT count(*), count(DISTINCT temperature), min(temperature), max(temperature) FROM sensor_data"
    ).fetchone()
    assert counts == (MANY, MANY, 0, MANY - 1)


@pytest.mark.parametrize("value", [b"", b"rubbish", block(("s1", minutes(0), 1.0, None))[:-50]])
def test_what_is_no_block_is_one_dead_letter_and_its_neighbours_are_stored(
    settings: Settings, connection: psycopg.Connection, value: bytes
) -> None:
    around = [block(("s1", minutes(number), 1.0, None)) for number in range(2)]
    send(settings, around[0], value, around[1])
    consume(settings)
    assert [row[1] for row in stored(connection)] == [minutes(0), minutes(1)]
    ((key, found, headers),) = letters(settings)
    assert (key, found or b"") == (None, value)
    assert headers["sensor_pipeline.reason"] == (b"invalid_block" if value else b"empty")
    assert headers["__connect.errors.offset"] == b"1"
    assert headers[FORMAT_HEADER] == ARROW


def test_an_unknown_format_is_a_dead_letter_and_json_may_be_named(
    settings: Settings, connection: psycopg.Connection
) -> None:
    producer = Producer(client_settings(settings, "test"))
    for number, form in enumerate((b"avro", b"json", None)):
        value = message(time=minutes(number), temperature=1.0)
        producer.produce(settings.kafka_topic, value, partition=0, headers=[(FORMAT_HEADER, form)])
    assert producer.flush(PATIENCE_S) == 0
    consume(settings)
    assert [row[1] for row in stored(connection)] == [minutes(1)]
    assert [headers["sensor_pipeline.reason"] for _, _, headers in letters(settings)] == [b"unknown_format"] * 2


def test_a_refused_row_is_a_json_dead_letter(settings: Settings, connection: psycopg.Connection) -> None:
    """In the middle of a block of a thousand, whose others are stored at once."""
    rows: list[Row] = [("s1", minutes(number), float(number), None) for number in range(1000)]
    rows[500] = ("s1", minutes(500), 5.0, 1e101)
    rows[501] = ("", minutes(501), 5.0, 1.0)
    rows[502] = ("s1", 2**62, 5.0, 1.0)
    rows[503] = ("s1", minutes(503), float("nan"), 1.0)
    rows[504] = (None, minutes(504), 5.0, 1.0)
    rows[505] = ("s1", minutes(505), None, None)
    send(settings, block(("s2", minutes(0), 1.0, None)), block(*rows), headers=[("own", b"kept")])
    publish(settings, [message("s3", temperature=1.0)], partition=0)
    consume(settings)
    assert len(stored(connection)) == 996
    found = letters(settings)
    assert [headers["sensor_pipeline.reason"] for _, _, headers in found] == [
        b"invalid_reading",
        b"invalid_reading",
        b"invalid_reading",
        b"invalid_json",
        b"invalid_reading",
        b"no_measurement",
    ]
    for key, value, headers in found:
        assert (headers["own"], headers["__connect.errors.offset"]) == (b"kept", b"1")
        assert FORMAT_HEADER not in headers
        assert key == (json.loads(value or b"")["sensor_id"] or "").encode() or key is None
    first = {"sensor_id": "s1", "time": minutes(500).isoformat(), "temperature": 5.0, "humidity": 1e101}
    assert json.loads(found[0][1] or b"") == first

    done = run_cli(settings, "dead-letters", "replay")
    assert done.stdout.splitlines() == [
        f"0 dead letters sent to {settings.kafka_topic}",
        "6 (4 invalid_reading, 1 invalid_json, 1 no_measurement) not sent: they can never be stored",
    ]
    consume(settings)
    assert len(stored(connection)) == 996
    assert len(letters(settings)) == 6


def test_a_row_of_the_future_is_stored_when_it_is_replayed_later(
    settings: Settings, connection: psycopg.Connection
) -> None:
    late = minutes(60 * 24 * 365 * 30)
    send(settings, block(("s1", minutes(0), 1.0, None), ("s1", late, 2.0, 3.0), ("s1", minutes(1), 1.0, None)))
    consume(settings)
    assert [row[1] for row in stored(connection)] == [minutes(0), minutes(1)]
    assert run_cli(settings, "dead-letters", "replay").returncode == 0
    consume(settings, MAX_FUTURE_SECONDS="1000000000")
    assert stored(connection)[-1] == ("s1", late, 2.0, 3.0)


def test_a_row_that_the_database_refuses_is_a_json_dead_letter(
    settings: Settings, connection: psycopg.Connection
) -> None:
    connection.execute("ALTER TABLE sensor_data ADD CONSTRAINT odd CHECK (temperature <> 7)")
    try:
        send(settings, block(*(("s1", minutes(number), float(number), None) for number in range(20))))
        consume(settings)
    finally:
        connection.execute("ALTER TABLE sensor_data DROP CONSTRAINT odd")
    assert [row[2] for row in stored(connection)] == [float(number) for number in range(20) if number != 7]
    ((key, _, headers),) = letters(settings)
    assert (key, headers["sensor_pipeline.reason"]) == (b"s1", b"refused_by_database")
    assert FORMAT_HEADER not in headers
    assert run_cli(settings, "dead-letters", "replay").returncode == 0
    consume(settings)
    assert stored(connection)[7] == ("s1", minutes(7), 7.0, None)


def test_a_block_that_is_repeated_fills_gaps_only(settings: Settings, connection: psycopg.Connection) -> None:
    publish(settings, [message(time=minutes(0), temperature=7.0)], partition=0)
    consume(settings)
    repeated = block(("s1", minutes(0), 5.0, 50.0), ("s1", minutes(1), 5.0, None))
    send(settings, repeated, headers=[(REPEAT_HEADER, REPEATED)])
    consume(settings)
    assert stored(connection) == [("s1", minutes(0), 7.0, 50.0), ("s1", minutes(1), 5.0, None)]
    send(settings, repeated)
    consume(settings)
    assert stored(connection)[0] == ("s1", minutes(0), 5.0, 50.0)


def test_what_a_file_sends_again_in_blocks_leaves_corrections(
    settings: Settings, connection: psycopg.Connection, start: StartService, tmp_path: Path
) -> None:
    settings = source(settings, write(tmp_path / "a.parquet", 100), producer_format="arrow")
    assert start("produce", settings=settings).wait() == 0
    consume(settings)
    sensor, time, old, _ = stored(connection)[0]
    assert isinstance(time, datetime)
    publish(settings, [message(str(sensor), time, temperature=-1.0)], key=str(sensor))
    consume(settings)
    for arguments, temperature in (((), -1.0), (("--overwrite",), old)):
        assert start("produce", "--resend", *arguments, settings=settings).wait() == 0
        consume(settings)
        assert stored(connection)[0] == (sensor, time, temperature, None)


@pytest.mark.slow
def test_a_flood_of_blocks_takes_little_memory(
    settings: Settings, connection: psycopg.Connection, start: StartService
) -> None:
    """Blocks as large as a broker takes by default."""
    ids = pa.array([f"s{number}" for number in range(28_000)])
    times = pa.array([minutes(0)] * len(ids), BLOCK_SCHEMA.field("time").type)
    nulls, ones = pa.nulls(len(ids), pa.float64()), pa.array([1.0] * len(ids))
    value = encode_block(pa.record_batch([ids, times, ones, nulls], schema=BLOCK_SCHEMA))
    assert 900_000 < len(value) < 1_000_000
    for _ in range(30):
        send(settings, value)
    consumer = start("consume", "--until-caught-up")
    peak = Path(f"/proc/{consumer.process.pid}/status")
    most = 0

    def has_ended() -> bool:
        nonlocal most
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            found = [line for line in peak.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM")]
            most = max([most, *(int(line.split()[1]) for line in found)])
        return consumer.process.poll() is not None

    wait_until(has_ended, "the topic's end", timeout_s=120)
    assert len(stored(connection)) == len(ids)
    assert 0 < most < 400_000, f"{most} kB"
