"""Blocks hold the readings that JSON would, in the partitions of their keys; what is no block is refused."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import msgspec
import pyarrow as pa
import pytest
from confluent_kafka import Message
from hypothesis import given
from hypothesis import strategies as st

from services.consumer.blocks import decode_blocks
from services.core.block import block_schema, decode_block, encode_block
from services.core.errors import MalformedMessageError, Reason
from services.core.kafka import ARROW, FORMAT_HEADER
from services.core.measurements import DEFAULT
from services.core.murmur2 import partition_of
from services.core.reading import EPOCH, MAX_VALUE, Decoder, Reading, reading_type
from services.producer.columns import Columns
from services.producer.encoding import BLOCK_BYTES, BLOCK_ROWS, Digest, choose, to_blocks, to_json
from tests.examples import many
from tests.measured import MEASUREMENTS, reading_of

BLOCK_SCHEMA = block_schema(DEFAULT)

COLUMNS = Columns("time", (("temperature", "temp"), ("humidity", "humid")), "sensor")
NOON = datetime(2024, 3, 1, 12, tzinfo=UTC)

ids = st.none() | st.sampled_from(["", "a", "s1", "ä" * 255, "x" * 256, "tab\t", "東京"]) | st.text(max_size=5)
times = st.none() | st.integers(-(6 * 10**15), 253 * 10**15)  # microseconds from 1779 to 9987
doubles = st.none() | st.floats(allow_nan=True, allow_infinity=True)
decimals = st.none() | st.decimals(-(10**15), 10**15, places=5)


def batch(rows: Sequence[tuple[object, ...]], humid: pa.DataType) -> pa.RecordBatch:
    """Rows of a file: time, temperature, humidity, sensor."""
    kinds = (pa.timestamp("us"), pa.float64(), humid, pa.string())
    columns = [pa.array([row[at] for row in rows], kind) for at, kind in enumerate(kinds)]
    return pa.record_batch(columns, ["time", "temp", "humid", "sensor"])


def by_json(values: list[bytes]) -> list[Reading]:
    decoder = msgspec.json.Decoder(reading_type(MEASUREMENTS))
    return [decoder.decode(value) for value in values]


def by_block(value: bytes) -> list[Reading]:
    return [reading_of(**row) for row in decode_block(value, MEASUREMENTS).to_pylist()]


@many(3)
@given(
    st.lists(st.tuples(times, doubles, doubles, ids)).map(lambda rows: batch(rows, pa.float64()))
    | st.lists(st.tuples(times, doubles, decimals, ids)).map(lambda rows: batch(rows, pa.decimal128(38, 5)))
    | st.lists(st.tuples(times, doubles, st.none() | st.integers(-(2**63), 2**63 - 1), ids)).map(
        lambda rows: batch(rows, pa.int64())
    ),
    st.none() | st.just(timedelta(days=7305)),
    st.integers(1, 7),
)
def test_blocks_hold_the_readings_that_json_would_in_the_partitions_of_their_keys(
    rows: pa.RecordBatch, max_past: timedelta | None, partitions: int
) -> None:
    columns = Columns("time", COLUMNS.measurements, "sensor", max_past)
    found = choose(rows, columns)
    expected: dict[int, list[Reading]] = defaultdict(list)
    blocks: dict[int, list[Reading]] = defaultdict(list)
    for at, reading in zip(found.sensor.to_pylist(), by_json(to_json(found)), strict=True):
        expected[partition_of(found.keys[at], partitions)].append(reading)
    for partition, count, value in to_blocks(found, partitions):
        readings = by_block(value)
        assert len(readings) == count
        blocks[partition] += readings
    assert blocks == expected


def test_a_block_has_a_thousand_readings_and_is_never_too_large_for_a_broker() -> None:
    rows = [(NOON, 1.0, None, "s1")] * 2001 + [(NOON, 1.0, None, "ä" * 255)] * 2001
    (plain, wide) = (choose(batch(part, pa.float64()), COLUMNS) for part in (rows[:2001], rows))
    assert [count for _, count, _ in to_blocks(plain, 1)] == [667, 667, 667]
    sizes = [(count, len(value)) for _, count, value in to_blocks(wide, 1)]
    assert sum(count for count, _ in sizes) == 4002
    assert max(count for count, _ in sizes) < BLOCK_ROWS
    assert max(size for _, size in sizes) < BLOCK_BYTES + 1000


def test_an_id_that_is_skipped_makes_no_block_smaller() -> None:
    rows = [(NOON, 1.0, None, "s1")] * 1000 + [(NOON, 1.0, None, "x" * 10**6)]
    found = choose(batch(rows, pa.float64()), COLUMNS)
    assert found.skipped == {"bad_sensor": 1}
    assert [count for _, count, _ in to_blocks(found, 1)] == [1000]


@given(st.lists(st.tuples(times, doubles, doubles, ids)), st.lists(st.integers(0, 20)))
def test_the_digest_is_that_of_the_readings_wherever_they_are_cut(
    rows: list[tuple[object, ...]], cuts: list[int]
) -> None:
    whole, parts = Digest(COLUMNS), Digest(COLUMNS)
    whole.add(choose(batch(rows, pa.float64()), COLUMNS))
    ends = sorted({0, len(rows), *(cut for cut in cuts if cut < len(rows))})
    for first, end in pairwise(ends):
        parts.add(choose(batch(rows, pa.float64()).slice(first, end - first), COLUMNS))
    assert whole.hexdigest() == parts.hexdigest()


@pytest.mark.parametrize("changed", [(NOON, 1.0, None, "s2"), (NOON, None, 1.0, "s1"), (NOON, 2.0, None, "s1")])
def test_the_digest_of_other_readings_is_another_one(changed: tuple[object, ...]) -> None:
    digests = []
    for row in ((NOON, 1.0, None, "s1"), changed):
        digests.append(Digest(COLUMNS))
        digests[-1].add(choose(batch([row], pa.float64()), COLUMNS))
    assert digests[0].hexdigest() != digests[1].hexdigest()


# --- what a consumer takes for a block -----------------------------------------------------------------------

ROWS = pa.record_batch(
    [
        pa.array(["s1", "s2", None]),
        pa.array([1000, None, 3000], BLOCK_SCHEMA.field("time").type),
        pa.array([20.0, None, 3.0]),
        pa.array([1.0, 2.0, None]),
    ],
    schema=BLOCK_SCHEMA,
)


def stream(*batches: pa.RecordBatch, **options: object) -> bytes:
    """As any client of Arrow writes it."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batches[0].schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for each in batches:
            writer.write_batch(each)
    value: bytes = sink.getvalue().to_pybytes()
    return value


def test_a_block_is_a_stream_of_one_record_batch() -> None:
    assert encode_block(ROWS) == stream(ROWS)
    assert decode_block(encode_block(ROWS), DEFAULT).equals(ROWS)


def test_columns_go_by_their_names_and_any_may_be_missing_or_be_more() -> None:
    found = decode_block(stream(ROWS.select(["humidity", "time", "sensor_id"])), DEFAULT)
    assert found.schema == BLOCK_SCHEMA
    assert found["temperature"].null_count == 3
    assert found.drop_columns(["temperature"]).equals(ROWS.drop_columns(["temperature"]))
    assert decode_block(stream(ROWS.select(["time", "sensor_id"])), DEFAULT).schema == BLOCK_SCHEMA
    assert decode_block(stream(ROWS.append_column("wind", ROWS["time"])), DEFAULT).equals(ROWS)  # as in JSON


def replaced(name: str, column: pa.Array) -> bytes:
    return stream(ROWS.set_column(ROWS.schema.get_field_index(name), name, column))


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (b"{}", ""),
        (b"\xff\xff\xff\xff\0\0\0\0", "it holds nothing"),
        (stream(ROWS)[:-100], ""),
        (stream(ROWS) + b"\0", "it continues behind its end"),
        (stream(ROWS) + stream(ROWS), "it continues behind its end"),
        (stream(ROWS, ROWS), "it holds schema, record batch, record batch"),
        (BLOCK_SCHEMA.serialize().to_pybytes(), "it holds schema"),
        (stream(ROWS, compression="lz4"), "its body is compressed"),
        (stream(ROWS, compression="zstd"), "its body is compressed"),
        (replaced("sensor_id", ROWS["sensor_id"].dictionary_encode()), "it holds schema, dictionary, record batch"),
        (replaced("sensor_id", ROWS["sensor_id"].cast(pa.large_string())), "its column sensor_id is large_string"),
        (replaced("time", ROWS["time"].cast(pa.timestamp("us"))), r"its column time is timestamp\[us\]"),
        (replaced("time", ROWS["time"].cast(pa.timestamp("ms", "UTC"))), r"its column time is timestamp\[ms"),
        (replaced("temperature", ROWS["temperature"].cast(pa.float32())), "its column temperature is float"),
        (replaced("temperature", pa.nulls(3)), "its column temperature is null"),
        (stream(ROWS.select(["time", "temperature"])), "its columns are time, temperature; they should be "),
        (stream(ROWS.append_column("time", ROWS["time"])), "its columns are "),
    ],
)
def test_what_is_no_block_is_refused_as_a_whole(value: bytes, why: str) -> None:
    with pytest.raises(MalformedMessageError, match=f"^not a block of readings: {why}") as refused:
        decode_block(value, DEFAULT)
    assert refused.value.reason == "invalid_block"


def test_an_id_that_is_not_utf_8_makes_the_block_invalid() -> None:
    value = stream(ROWS).replace(b"s1s2", b"\xff1s2")
    with pytest.raises(MalformedMessageError, match="UTF8"):
        decode_block(value, DEFAULT)


@pytest.mark.parametrize("value", [None, b""])
def test_no_value_is_empty(value: bytes | None) -> None:
    with pytest.raises(MalformedMessageError) as refused:
        decode_block(value, DEFAULT)
    assert refused.value.reason == "empty"


@many(20)
@given(st.lists(st.tuples(st.integers(0, len(stream(ROWS)) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_whatever_the_bytes_nothing_is_raised_but_malformed(damage: list[tuple[int, int]]) -> None:
    value = bytearray(stream(ROWS))
    for place, byte in damage:
        value[place] = byte
    try:
        found, refused = read(bytes(value))
    except MalformedMessageError:
        return
    assert found.schema == BLOCK_SCHEMA
    assert found.num_rows + len(refused) <= ROWS.num_rows
    assert all(reading_of(**row).time <= CLOCK + timedelta(days=1) for row in found.to_pylist())


@given(st.binary(max_size=200))
def test_noise_is_malformed(value: bytes) -> None:
    for prefix in (b"", stream(ROWS)[:300], struct.pack("<Ii", 0xFFFF_FFFF, len(value))):
        with pytest.raises(MalformedMessageError):
            decode_block(prefix + value, DEFAULT)


# --- which of its rows are readings --------------------------------------------------------------------------

CLOCK = datetime(2026, 1, 1, tzinfo=UTC)
AGES = {"max_past": timedelta(days=7305), "max_age": timedelta(days=30)}
edges = [EPOCH, CLOCK, CLOCK + timedelta(days=1), *(CLOCK - age for age in AGES.values())]
moments = st.builds(
    lambda edge, off: (edge - EPOCH) // timedelta(microseconds=1) + off, st.sampled_from(edges), st.integers(-2, 2)
)
odd_times = st.none() | moments | st.integers(-(2**63), 2**63 - 1)
odd_numbers = st.none() | st.floats() | st.sampled_from([0.1, MAX_VALUE, -MAX_VALUE, MAX_VALUE * 1.0001])
odd_ids = (
    ids
    | st.characters(exclude_categories=["Cs"])
    | st.sampled_from(["é", "x" * 255, "a\x7f", " ", "\u00a0", "\u200b", "東"])
)


def decoder() -> Decoder:
    found = Decoder(DEFAULT, max_bytes=10**6, max_future=timedelta(days=1), **AGES)
    found.set_clock(CLOCK)
    return found


Refused = tuple[str | None, bytes, Reason, str]  # sensor, value, reason and what was found


def read(value: bytes) -> tuple[pa.RecordBatch, list[Refused]]:
    """The readings of a block, with times as in BLOCK_SCHEMA, and the rows that are none."""
    decode_block(value, DEFAULT)  # raises what is wrong with all of it
    whole = Message(topic="t", partition=0, offset=0, value=value, headers=[(FORMAT_HEADER, ARROW)])
    (rows,), letters = decode_blocks([whole], [False], decoder())
    columns = [rows[field.name].view(field.type) for field in BLOCK_SCHEMA]
    refused: list[Refused] = []
    for letter in letters:
        key = letter.message.key()
        sensor = None if key is None else key.decode()
        refused.append((sensor, letter.message.value() or b"", letter.reason, letter.detail))
    return pa.record_batch(columns, schema=BLOCK_SCHEMA), refused


def time_text(microseconds: int | None) -> object:
    try:
        return None if microseconds is None else (EPOCH + timedelta(microseconds=microseconds)).isoformat()
    except OverflowError:
        return microseconds


@many(10)
@given(st.lists(st.tuples(odd_ids, odd_times, odd_numbers, odd_numbers), max_size=8))
def test_a_row_is_a_reading_exactly_if_its_json_is(
    rows: list[tuple[str | None, int | None, float | None, float | None]],
) -> None:
    """The same rows are stored, and the others have the reasons that they would have one by one."""
    columns = [pa.array([row[at] for row in rows], field.type) for at, field in enumerate(BLOCK_SCHEMA)]
    stored, reasons = [], []
    for sensor, time, temperature, humidity in rows:
        fields = {"sensor_id": sensor, "time": time_text(time), "temperature": temperature, "humidity": humidity}
        try:
            stored.append(decoder().decode(json.dumps(fields).encode()))
        except MalformedMessageError as error:
            reasons.append((sensor, error.reason))
    batch, refused = read(encode_block(pa.record_batch(columns, schema=BLOCK_SCHEMA)))
    assert batch.to_pylist() == [msgspec.structs.asdict(reading) for reading in stored]
    assert [(sensor, reason) for sensor, _, reason, _ in refused] == reasons
    for _, value, reason, _ in refused:  # as a message it is refused again, for the same reason
        with pytest.raises(MalformedMessageError) as again:
            decoder().decode(value)
        assert again.value.reason == reason


def test_a_refused_row_says_what_is_wrong_and_is_json() -> None:
    rows = [("s1", CLOCK, 1.0, None), ("", CLOCK, 1.0, None), ("s2", CLOCK + timedelta(days=2), None, 2.5)]
    columns = [pa.array([row[at] for row in rows], field.type) for at, field in enumerate(BLOCK_SCHEMA)]
    batch, refused = read(encode_block(pa.record_batch(columns, schema=BLOCK_SCHEMA)))
    assert batch["sensor_id"].to_pylist() == ["s1"]
    assert [(sensor, reason) for sensor, _, reason, _ in refused] == [("", "invalid_reading"), ("s2", "future_time")]
    assert json.loads(refused[1][1]) == {"sensor_id": "s2", "time": "2026-01-03T00:00:00+00:00", "humidity": 2.5}
    assert refused[1][3] == "2026-01-03 00:00:00+00:00 is later than MAX_FUTURE_SECONDS allows"
