"""Readings as columns, and what the sink computes from them before its transaction begins.

Columns are an Arrow record batch, with numbers instead of objects: a reading costs 50 bytes, and sorting, comparing and
encoding tens of thousands of them takes milliseconds, most of it without Python's lock.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import cache, partial
from itertools import pairwise
from operator import attrgetter

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
from psycopg.types.multirange import Multirange
from psycopg.types.range import Range

from services.core.reading import EPOCH, Reading

MICROSECOND, MINUTE, WEEK = timedelta(microseconds=1), timedelta(minutes=1), timedelta(weeks=1)
SHIFT = 200_000 * (WEEK // MICROSECOND)  # with them no time is negative, and dividing rounds down

# Where a message was, and whether it may have been stored before (it then fills gaps only).
ORIGIN = (("partition", pa.int32()), ("offset", pa.int64()), ("repeated", pa.bool_()))
KEY = (("sensor_id", pa.string()), ("time", pa.int64()))  # microseconds since 1970
BESIDE = frozenset(name for name, _ in (*KEY, *ORIGIN))

sensor_of, time_of = map(attrgetter, Reading.__struct_fields__)

pa.set_memory_pool(pa.system_memory_pool())  # Arrow's own keeps what batches have left: 50 MB

pack = msgspec.msgpack.Encoder().encode

# TimescaleDB keeps one range of changed times per transaction: with old and new rows it invalidates everything between
# them. So a batch is split where its times jump, but not into so many transactions that late readings slow the others.
JUMP = timedelta(hours=1)
MAX_TRANSACTIONS = 4
# Each week may be a chunk to create, and a transaction locks all its chunks in a table of limited size.
MAX_WEEKS = 100

# COPY's binary form: https://www.postgresql.org/docs/current/sql-copy.html#SQL-COPY-FILE-FORMATS
COPY_HEADER, COPY_TRAILER = b"PGCOPY\n\xff\r\n\0" + bytes(8), b"\xff\xff"
MILLION = pa.scalar(1_000_000, pa.int64())  # of a bare int Arrow would look for its type, in each call
EIGHT_BYTES, NULL = (8).to_bytes(4, "big"), b"\xff\xff\xff\xff"  # the lengths that fields begin with
POSTGRES_EPOCH_US = 946_684_800_000_000  # 2000
# The last argument goes between the others.
join = partial(pc.binary_join_element_wise, null_handling="replace", null_replacement=NULL)


@cache
def schema_of(measurements: tuple[str, ...]) -> pa.Schema:
    """Columns of readings: key, measurements (what is missing is null, never NaN), and where they came from."""
    return pa.schema([*KEY, *((name, pa.float64()) for name in measurements), *ORIGIN])


def measured(rows: pa.RecordBatch) -> tuple[str, ...]:
    """The measurements that columns hold."""
    return tuple(name for name in rows.schema.names if name not in BESIDE)


def columns_of(readings: Sequence[Reading], measurements: tuple[str, ...]) -> pa.RecordBatch:
    """Readings without where they came from."""
    times = microseconds_of(list(map(time_of, readings)))
    sensors = pa.array(list(map(sensor_of, readings)), pa.string())
    values = [pa.array(list(map(attrgetter(name), readings)), pa.float64()) for name in measurements]
    return pa.RecordBatch.from_arrays([sensors, times, *values], [*dict(KEY), *measurements])


def microseconds_of(times: list[datetime]) -> pa.Array:
    """Since 1970. Where all are whole seconds, MessagePack writes each as d6 ff and four bytes: three times as fast."""
    count = len(times)
    packed = pack(times)
    head = 1 if count < 16 else 3 if count < 65_536 else 5  # of a list
    if len(packed) != head + 6 * count:
        return pa.array(times, pa.timestamp("us", "UTC")).view(pa.int64())
    seconds = bytearray(8 * count)
    for byte in range(4):
        seconds[byte::8] = packed[head + 5 - byte :: 6]
    return pc.multiply(pa.Array.from_buffers(pa.int64(), count, [None, pa.py_buffer(seconds)]), MILLION)


def joined(chunks: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    """Several columns as one."""
    return pa.concat_batches(chunks) if chunks else pa.RecordBatch.from_pylist([], schema_of(()))


def microseconds(moment: datetime) -> int:
    """Since 1970."""
    return (moment - EPOCH) // MICROSECOND


def encode(rows: pa.RecordBatch) -> Sequence[bytes | memoryview]:
    """Readings as COPY takes them in binary form, in pieces: sensor, time, measurements."""
    measurements = measured(rows)
    names = rows["sensor_id"].dictionary_encode()
    sensors, fields = map(str.encode, names.dictionary.to_pylist()), 2 + len(measurements)
    starts = [struct.pack(">hi", fields, len(sensor)) + sensor for sensor in sensors]  # of rows
    pieces = [[pa.array(starts, pa.binary()).take(names.indices)]]  # EIGHT_BYTES go between two lists
    for numbers in (pc.subtract(rows["time"], POSTGRES_EPOCH_US), *(rows[name] for name in measurements)):
        if numbers.null_count:
            pieces[-1].append(big_endian(numbers, EIGHT_BYTES))
        else:
            pieces.append([big_endian(numbers)])
    encoded = join(*(join(*each, b"") if len(each) > 1 else each[0] for each in pieces), EIGHT_BYTES)
    return COPY_HEADER, memoryview(encoded.buffers()[2]), COPY_TRAILER


def big_endian(numbers: pa.Array, before: bytes = b"") -> pa.Array:
    """The eight bytes of each of these int64 or float64, most significant first, with some ``before`` them."""
    valid, values = numbers.buffers()
    count, width = numbers.offset + len(numbers), len(before) + 8
    found = array("Q", values.slice(0, count * 8).to_pybytes())
    found.byteswap()
    if before:
        swapped = found.tobytes()
        found = bytearray(before + bytes(8)) * count
        for byte in range(8):
            found[len(before) + byte :: width] = swapped[byte::8]
    buffers = [valid, pa.py_buffer(found)]
    return pa.Array.from_buffers(pa.binary(width), len(numbers), buffers, offset=numbers.offset).cast(pa.binary())


def last_values(rows: pa.RecordBatch) -> pa.RecordBatch:
    """One row for each (sensor, time), with the last value of each measurement that is not null.

    They are in the order of time and sensor, the same for every consumer, so that two never deadlock.
    """
    grouped = pa.Table.from_batches([rows]).group_by(list(dict(KEY)), use_threads=False)
    names = measured(rows)
    latest = grouped.aggregate([(name, "last") for name in names]).rename_columns([*dict(KEY), *names])
    return joined(latest.sort_by([("time", "ascending"), ("sensor_id", "ascending")]).to_batches())


def periods(times: pa.Array, width: timedelta) -> pa.Array:
    """The number of the period of this width that each time lies in, counted from 1970."""
    unit = width // MICROSECOND
    return pc.subtract(pc.divide(pc.add(times, SHIFT), unit), SHIFT // unit)


def touched_ranges(times: pa.Array) -> Multirange[datetime]:
    """The minutes that hold readings, as ranges [start, end), adjacent ones merged; the times are in order."""
    minutes = pc.unique(periods(times, MINUTE)).to_pylist()
    edges = [0, *(at for at in range(1, len(minutes)) if minutes[at] != minutes[at - 1] + 1), len(minutes)]
    return Multirange(
        Range(EPOCH + minutes[start] * MINUTE, EPOCH + (minutes[end - 1] + 1) * MINUTE, bounds="[)")
        for start, end in pairwise(edges)
    )


def split_at_jumps(times: pa.Array) -> list[pa.Array]:
    """Positions of the readings by time, in parts whose times do not jump; equal times keep their order.

    At most MAX_TRANSACTIONS parts, split at the widest jumps; more only where a part has more than MAX_WEEKS weeks.
    """
    if not len(times):
        return []
    order = pc.sort_indices(times)
    times = times.take(order)
    if times[-1].as_py() - times[0].as_py() <= JUMP // MICROSECOND:
        return [order]
    gaps = pc.subtract(times[1:], times[:-1])
    jumps = pc.indices_nonzero(pc.greater(gaps, JUMP // MICROSECOND)).to_pylist()
    widest = sorted(jumps, key=lambda at: gaps[at].as_py(), reverse=True)[: MAX_TRANSACTIONS - 1]
    edges = [0, *sorted(at + 1 for at in widest), len(order)]
    return [
        order[start:end]
        for part in pairwise(edges)
        for start, end in pairwise(split_by_weeks(times[slice(*part)], *part))
    ]


def split_by_weeks(times: pa.Array, start: int, end: int) -> list[int]:
    """Where to split the times (in order) from ``start`` to ``end``: no part has more than MAX_WEEKS weeks."""
    weeks = periods(times, WEEK)
    changes = pc.indices_nonzero(pc.not_equal(weeks[1:], weeks[:-1])).to_pylist()
    return [start, *(start + at + 1 for at in changes[MAX_WEEKS - 1 :: MAX_WEEKS]), end]
