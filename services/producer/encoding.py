"""Record batches become messages, a whole column at a time: one for each row, in JSON, or blocks of rows.

JSON is joined together by Arrow's string kernels: 2.3 million messages a second on one core, where the best
encoder of one object after the other reached 1.8. Two facts that this rests on, both tested: Arrow prints
a double as the shortest text that reads back as the same double, and that text is a JSON number.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from services.core.reading import MAX_SENSOR_ID, MAX_VALUE
from services.producer.columns import Columns, decoded
from services.producer.times import Times, nowhere

MAX_EXAMPLE_LENGTH = 100  # characters of an example
DEFAULT_SENSOR = "default"

Example = tuple[int, str]  # the number of a row in its batch, from 0, and what is in it


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """What ``rows`` of a source became: messages, or rows for blocks.

    ``skipped``: how many were no readings, by reason; ``examples``: the first row of each reason. ``doubtful``: of how
    many readings the local time came twice or never, by kind. ``content``: all readings, with those that are only too
    old by now: it depends on the rows and on nothing else.
    """

    rows: int
    skipped: dict[str, int] = field(default_factory=dict)
    doubtful: dict[str, int] = field(default_factory=dict)
    examples: dict[str, Example] = field(default_factory=dict)
    content: Any = b""

    @property
    def sent(self) -> int:
        """How many readings there are."""
        return self.rows - sum(self.skipped.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Messages(Encoded):
    """A key and a value for each reading. Equal keys are one object; ``content`` is all values."""

    keys: list[bytes]
    values: list[bytes]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The rows of a batch that are readings, in columns.

    ``sensor``: where in ``keys`` the id of each is; ``time``: timestamps without a zone; ``numbers``: those of each
    measurement that has a column, as they were but for NaN, which is null. ``young``: which are not too old (None:
    all). ``counts``: of Encoded.
    """

    keys: list[bytes]
    sensor: pa.Array
    time: pa.Array
    numbers: dict[str, pa.Array]
    young: pa.Array | None
    counts: dict[str, Any]


def choose(batch: pa.RecordBatch, columns: Columns) -> Chosen:
    """The readings of ``batch``, in its order.

    Null and NaN are null. A row is skipped for the first reason that applies:
    ``bad_time`` (text that is no ISO 8601 time), ``time_out_of_range`` (not in the years 1900 to 9999),
    ``no_time``, ``no_sensor``, ``bad_sensor`` (longer than 255 characters, not UTF-8, or with characters that cannot be
    printed), ``value_out_of_range`` (beyond 1e100 or infinite), ``no_measurement`` (no value at all); and
    ``time_out_of_range`` again, for what is too old.
    """
    times = columns.times.read(decoded(batch.column(columns.time)))
    numbers = {name: _numbers(decoded(batch.column(column))) for name, column in columns.measurements}
    sensor = _Sensors.of(decoded(batch.column(columns.sensor)) if columns.sensor else None, batch.num_rows)
    rows, skipped, first = _choose(
        ("bad_time", times.bad),
        ("time_out_of_range", times.far),
        ("no_time", times.instants.is_null()),
        ("no_sensor", sensor.missing),
        ("bad_sensor", sensor.bad),
        ("value_out_of_range", reduce(pc.or_, (far for _, far in numbers.values()))),
        ("no_measurement", reduce(pc.and_, (number.is_null() for number, _ in numbers.values()))),
    )
    index, time, found = sensor.index, times.instants, [number for number, _ in numbers.values()]
    if rows is not None:
        index, time, *found = (column.filter(rows) for column in (index, time, *found))
    young = _young(time, columns.max_past)
    if young is not None:
        skipped["time_out_of_range"] = skipped.get("time_out_of_range", 0) + len(young) - young.true_count
        old = young.index(False).as_py()
        first.setdefault("time_out_of_range", old if rows is None else pc.indices_nonzero(rows)[old].as_py())
    examples = {reason: _example(batch, columns, reason, row, times) for reason, row in first.items()}
    doubtful = _count_sent(times.doubtful, rows, young)
    chosen = dict(zip(numbers, found, strict=True))
    counts = {"rows": batch.num_rows, "skipped": skipped, "doubtful": doubtful, "examples": examples}
    return Chosen(sensor.keys, index, time, chosen, young, counts)


def encode_batch(batch: pa.RecordBatch, columns: Columns) -> Messages:
    """A message for each reading of ``batch``, as services/core/reading.py defines it; a null field is left out."""
    chosen = choose(batch, columns)
    prefixes = pa.array([_prefix(key) for key in chosen.keys], pa.string())
    values = pc.binary_join_element_wise(
        prefixes.take(chosen.sensor),
        pc.binary_replace_slice(chosen.time.cast(pa.string()), 10, 11, "T"),
        'Z"',
        *(_member(name, number.cast(pa.string())) for name, number in chosen.numbers.items()),
        "}",
        "",
    )
    texts = values.cast(pa.binary()).to_pylist()
    content = b"".join(texts)
    sensor = chosen.sensor
    if chosen.young is not None:
        sensor, texts = sensor.filter(chosen.young), values.filter(chosen.young).cast(pa.binary()).to_pylist()
    keys = [chosen.keys[i] for i in sensor.to_pylist()]
    return Messages(keys=keys, values=texts, content=content, **chosen.counts)


def _young(time: pa.Array, max_past: timedelta | None) -> pa.Array | None:
    """Which of the times are not too old; None: all."""
    if max_past is None:
        return None
    earliest = datetime.now(UTC).replace(tzinfo=None) - max_past
    young = pc.greater_equal(time, pa.scalar(earliest, pa.timestamp("us")))
    return None if young.true_count == len(young) else young


def _member(name: str, text: pa.Array) -> pa.Array:
    """``,"name":text``, or nothing where ``text`` is null."""
    return pc.fill_null(pc.binary_join_element_wise(f',"{name}":', text, ""), "")


def _choose(*reasons: tuple[str, pa.Array]) -> tuple[pa.Array | None, dict[str, int], dict[str, int]]:
    """Which rows no reason excludes (None: all), how many each excludes, and which first: the first to apply counts."""
    out: pa.Array | None = None
    skipped: dict[str, int] = {}
    first: dict[str, int] = {}
    for reason, mask in reasons:
        if not mask.true_count:
            continue
        fresh = mask if out is None else pc.and_not(mask, out)
        if fresh.true_count:
            skipped[reason] = fresh.true_count
            first[reason] = fresh.index(True).as_py()
        out = mask if out is None else pc.or_(out, mask)
    return (None if out is None else pc.invert(out)), skipped, first


def _count_sent(masks: dict[str, pa.Array], rows: pa.Array | None, young: pa.Array | None) -> dict[str, int]:
    """How many of the rows in each mask are among ``rows``, and ``young`` among those; 0 is left out."""
    counts = {}
    for name, mask in masks.items():
        for chosen in (rows, young):
            mask = mask if chosen is None else mask.filter(chosen)
        counts[name] = mask.true_count
    return {name: count for name, count in counts.items() if count}


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
        cell = cell.cast(pa.timestamp(cell.type.unit))  # a zone is no part of the instant
    text = cell.cast(pa.string()).cast(pa.binary())[0].as_py()
    shown = "null" if text is None else text.decode(errors="replace")
    return shown if len(shown) <= MAX_EXAMPLE_LENGTH else f"{shown[:MAX_EXAMPLE_LENGTH]} ..."


def event_times(batch: pa.RecordBatch, columns: Columns) -> pa.Array:
    """The time of each row in microseconds since 1970, UTC; null where it has none that can be sent."""
    return columns.times.read(decoded(batch.column(columns.time))).instants.cast(pa.int64())


# --- numbers -----------------------------------------------------------------------------------------------


def _numbers(column: pa.Array) -> tuple[pa.Array, pa.Array]:
    """The numbers (null for null and NaN), and where one is further from 0 than is allowed.

    Integers and decimals keep all their digits, and cannot be too large. Floats of any width become doubles
    first, so that the text says the value that is stored and not a shorter one that only a float of that width
    would read back.
    """
    if not pa.types.is_floating(column.type):
        return column, nowhere(len(column))
    doubles = column.cast(pa.float64())
    far = pc.fill_null(pc.greater(pc.abs(doubles), MAX_VALUE), False)
    nan = pc.fill_null(pc.is_nan(doubles), False)
    if nan.true_count:
        doubles = pc.if_else(nan, pa.scalar(None, pa.float64()), doubles)
    return doubles, far


# --- sensors -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Sensors:
    """Sensor ids of a batch: each distinct id is encoded once, rows point to it.

    ``index``: where in ``keys`` a row's id is.
    """

    keys: list[bytes]
    index: pa.Array
    missing: pa.Array
    bad: pa.Array

    @classmethod
    def of(cls, column: pa.Array | None, rows: int) -> _Sensors:
        """The ids in ``column``; with no column all ``rows`` rows are of sensor 'default'."""
        if column is None:
            column = pa.repeat(pa.scalar(DEFAULT_SENSOR), rows)
        distinct = column.cast(pa.string()).dictionary_encode()
        keys: list[bytes] = distinct.dictionary.cast(pa.binary()).to_pylist()
        index = distinct.indices

        def where(test: Callable[[int], bool]) -> pa.Array:
            flags = pa.array([test(i) for i in range(len(keys))], pa.bool_())
            return flags.take(index)

        bad = where(lambda i: bool(keys[i]) and not _is_id(keys[i]))
        empty = where(lambda i: not keys[i])
        return cls(
            keys=keys,
            index=index,
            missing=pc.fill_null(empty, True),
            bad=pc.fill_null(bad, False),
        )


def _is_id(key: bytes) -> bool:
    try:
        sensor = key.decode()
    except UnicodeDecodeError:
        return False
    return 0 < len(sensor) <= MAX_SENSOR_ID and sensor.isprintable()


def _prefix(key: bytes) -> str:
    """The start of a message of this sensor; of what is no id it is never used."""
    return f'{{"sensor_id":{json.dumps(key.decode(errors="replace"), ensure_ascii=False)},"time":"'
