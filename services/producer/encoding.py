"""Record batches become readings, a whole column at a time, and these become messages: JSON, or blocks of readings."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, reduce
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from services.core.block import KEY, block_schema, encode_block
from services.core.murmur2 import partition_of
from services.core.reading import MAX_SENSOR_ID, MAX_VALUE
from services.producer.columns import Columns, decoded
from services.producer.times import Times, nowhere

MAX_EXAMPLE_LENGTH = 100  # characters of an example
DEFAULT_SENSOR = "default"
BLOCK_ROWS = 1000
BLOCK_BYTES = 500_000  # half of what a broker takes by default; only very long ids make a thousand rows reach it
NAN = pa.scalar(float("nan"), pa.float64())

Example = tuple[int, str]  # the number of a row in its batch, from 0, and what is in it

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """The readings among ``rows`` rows of a source, in columns and in their order."""

    rows: int
    keys: list[bytes]  # sensor ids
    sensor: pa.Array  # where in these the id of each reading is
    time: pa.Array  # timestamp("us") in UTC, without a zone
    numbers: dict[str, pa.Array]  # doubles by measurement, null where there is none
    skipped: dict[str, int] = field(default_factory=dict)  # rows by reason
    examples: dict[str, Example] = field(default_factory=dict)  # the first row of each reason
    doubtful: dict[str, int] = field(default_factory=dict)  # readings whose local time came twice or never, by kind
    # The bytes of each column, with what is only too old by now: they depend on the rows and on nothing else.
    content: list[pa.Buffer] = field(default_factory=list)

    @property
    def sent(self) -> int:
        """How many readings there are."""
        return len(self.time)


class Digest:
    """Stands for readings, however they are cut into batches and whatever their format: each column has its own."""

    def __init__(self, columns: Columns) -> None:
        self._columns = [hashlib.sha256() for _ in range(3 + len(columns.measurements))]

    def add(self, readings: Readings) -> None:
        """Let it stand for these too."""
        for digest, part in zip(self._columns, readings.content, strict=True):
            digest.update(part)

    def hexdigest(self) -> str:
        """What was added until now, as text."""
        return hashlib.sha256(b"".join(digest.digest() for digest in self._columns)).hexdigest()


def choose(batch: pa.RecordBatch, columns: Columns) -> Readings:
    """The readings of ``batch``; null and NaN are null. A row is skipped for the first reason that applies."""
    times = columns.times.read(decoded(batch.column(columns.time)))
    numbers = {name: _numbers(decoded(batch.column(column))) for name, column in columns.measurements}
    keys, sensor, no_sensor, bad_sensor = _sensors(batch, columns.sensor)
    choice = _Choice(batch.num_rows)
    choice.skip("bad_time", times.bad)  # text that is not an ISO 8601 time
    choice.skip("time_out_of_range", times.far)  # not in the years 1900 to 9999, or, below, too old
    choice.skip("no_time", times.instants.is_null())
    choice.skip("no_sensor", no_sensor)
    choice.skip("bad_sensor", bad_sensor)  # too long, not UTF-8, or with characters that cannot be printed
    choice.skip("value_out_of_range", reduce(pc.or_, (far for _, far in numbers.values())))  # beyond 1e100
    choice.skip("no_measurement", reduce(pc.and_, (number.is_null() for number, _ in numbers.values())))
    read = [sensor, times.instants, *(number for number, _ in numbers.values())]
    content = _content(keys, *map(choice.filter, read))
    if columns.max_past is not None:
        earliest = datetime.now(UTC).replace(tzinfo=None) - columns.max_past
        choice.skip("time_out_of_range", pc.less(times.instants, pa.scalar(earliest, pa.timestamp("us"))))
    sensor, time, *found = map(choice.filter, read)
    doubtful = {kind: choice.filter(mask).true_count for kind, mask in times.doubtful.items()}
    return Readings(
        rows=batch.num_rows,
        keys=keys,
        sensor=sensor,
        time=time,
        numbers=dict(zip(numbers, found, strict=True)),
        skipped=choice.skipped,
        examples={reason: _example(batch, columns, reason, row, times) for reason, row in choice.first.items()},
        doubtful={kind: count for kind, count in doubtful.items() if count},
        content=content,
    )


def to_json(readings: Readings) -> list[bytes]:
    """The message of each reading, as services/core/reading.py defines it; a null field is left out."""
    names = [key.decode(errors="replace") for key in readings.keys]  # a bad id is never used
    times = pc.binary_replace_slice(readings.time.cast(pa.string()), 10, 11, "T")
    columns = (
        map(names.__getitem__, readings.sensor.to_pylist()),
        pc.binary_join_element_wise(times, "Z", "").to_pylist(),
        *(number.to_pylist() for number in readings.numbers.values()),
    )
    return list(map(_encode, map(_message_type(tuple(readings.numbers)), *columns)))


@cache
def _message_type(measurements: tuple[str, ...]) -> type[msgspec.Struct]:
    fields: list[Any] = [("sensor_id", str), ("time", str), *((name, float | None, None) for name in measurements)]
    return msgspec.defstruct("Message", fields, omit_defaults=True, gc=False)


def to_blocks(readings: Readings, partitions: int) -> Iterator[tuple[int, int, bytes]]:
    """For each block (core/block.py) its partition, the number of its readings, and the message's value.

    A reading is in the partition that librdkafka and Java give its id as a key; those of one partition keep their
    order. The blocks of a partition are of equal size, or differ by one reading.
    """
    if not readings.sent:
        return
    partition = pa.array([partition_of(key, partitions) for key in readings.keys], pa.int32()).take(readings.sensor)
    order = pc.sort_indices(partition)  # which is stable
    names = pa.array(readings.keys, pa.binary()).cast(pa.string(), safe=False).take(readings.sensor.take(order))
    times = readings.time.cast(dict(KEY)["time"])
    columns = [names, *(column.take(order) for column in (times, *readings.numbers.values()))]
    batch = pa.record_batch(columns, schema=block_schema(tuple(readings.numbers)))
    row_bytes = 4 + pc.max(pc.binary_length(names)).as_py() + 8 + 9 * len(readings.numbers)
    max_rows = min(BLOCK_ROWS, BLOCK_BYTES // row_bytes)
    sizes = {count["values"]: count["counts"] for count in pc.value_counts(partition).to_pylist()}
    first = 0
    for number, size in sorted(sizes.items()):
        pieces = -(-size // max_rows)
        for piece in range(pieces):
            rows = (piece + 1) * size // pieces - piece * size // pieces
            yield number, rows, encode_block(batch.slice(first, rows))
            first += rows


class _Choice:
    """Which rows are skipped, and why: of several reasons the first counts."""

    def __init__(self, rows: int) -> None:
        self._out = nowhere(rows)
        self.skipped: dict[str, int] = {}
        self.first: dict[str, int] = {}

    def skip(self, reason: str, mask: pa.Array) -> None:
        """Skip the rows in ``mask``, where null is false."""
        fresh = pc.fill_null(pc.and_not(mask, self._out), False)
        if fresh.true_count:
            self.skipped[reason] = self.skipped.get(reason, 0) + fresh.true_count
            self.first.setdefault(reason, fresh.index(True).as_py())
            self._out = pc.or_(self._out, fresh)

    def filter(self, column: pa.Array) -> pa.Array:
        """What of ``column`` is not skipped until now."""
        return column.filter(pc.invert(self._out)) if self._out.true_count else column


def _content(keys: list[bytes], sensor: pa.Array, time: pa.Array, *numbers: pa.Array) -> list[pa.Buffer]:
    """The bytes of each column: lengths of the ids, ids, times, numbers."""
    ids = pa.array(keys, pa.binary()).take(sensor)
    lengths = pc.binary_length(ids)
    text = (ids.buffers()[2] or pa.py_buffer(b"")).slice(0, pc.sum(lengths, min_count=0).as_py())
    columns = [time.cast(pa.int64()), *(pc.fill_null(number, NAN) for number in numbers)]
    return [_bytes(lengths), text, *map(_bytes, columns)]


def _bytes(column: pa.Array) -> pa.Buffer:
    """The values of a column of numbers without nulls."""
    width = column.type.bit_width // 8
    return column.buffers()[1].slice(column.offset * width, len(column) * width)


def _example(batch: pa.RecordBatch, columns: Columns, reason: str, row: int, times: Times) -> Example:
    """The row's number, and what it has in the columns that ``reason`` is about."""
    others = [columns.sensor] if "sensor" in reason else [column for _, column in columns.measurements]
    names = [columns.time] if "time" in reason else dict.fromkeys(others)
    text = " ".join(f"{name}={_shown(batch.column(name), row)}" for name in names)
    if reason == "time_out_of_range" and times.instants[row].is_valid:  # it is too old
        text += f" (read as {_shown(times.instants, row)} UTC)"
    return row, text


def _shown(column: pa.Array, row: int) -> str:
    """A value as text."""
    cell = decoded(column.slice(row, 1))
    if pa.types.is_timestamp(cell.type):
        cell = cell.cast(pa.timestamp(cell.type.unit))  # a zone is not part of the instant
    text = cell.cast(pa.string()).cast(pa.binary())[0].as_py()
    shown = "null" if text is None else text.decode(errors="replace")
    return shown if len(shown) <= MAX_EXAMPLE_LENGTH else f"{shown[:MAX_EXAMPLE_LENGTH]} ..."


def event_times(batch: pa.RecordBatch, columns: Columns) -> pa.Array:
    """The time of each row in microseconds since 1970, UTC; null where it has none that can be sent."""
    return columns.times.read(decoded(batch.column(columns.time))).instants.cast(pa.int64())


def _numbers(column: pa.Array) -> tuple[pa.Array, pa.Array]:
    """The nearest doubles (null for null and NaN), and where one is further from 0 than is allowed."""
    if pa.types.is_decimal(column.type):
        column = column.cast(pa.string())  # to double at once is not always the nearest
    doubles = column.cast(pa.float64(), safe=False)
    far = pc.fill_null(pc.greater(pc.abs(doubles), MAX_VALUE), False)
    nan = pc.fill_null(pc.is_nan(doubles), False)
    return (pc.if_else(nan, None, doubles) if nan.true_count else doubles), far


def _sensors(batch: pa.RecordBatch, name: str) -> tuple[list[bytes], pa.Array, pa.Array, pa.Array]:
    """Each distinct sensor id; where in these that of each row is; which rows have none; and which have a bad one."""
    column = decoded(batch.column(name)) if name else pa.repeat(pa.scalar(DEFAULT_SENSOR), batch.num_rows)
    distinct = column.cast(pa.string()).dictionary_encode()
    keys: list[bytes] = distinct.dictionary.cast(pa.binary()).to_pylist()
    empty = pa.array([not key for key in keys], pa.bool_()).take(distinct.indices)
    bad = pa.array([bool(key) and not _is_id(key) for key in keys], pa.bool_()).take(distinct.indices)
    return keys, distinct.indices, pc.fill_null(empty, True), bad


def _is_id(key: bytes) -> bool:
    sensor = key.decode(errors="surrogateescape")  # so that what is not UTF-8 cannot be printed
    return len(sensor) <= MAX_SENSOR_ID and sensor.isprintable()
