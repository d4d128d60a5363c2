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
from textwrap import shorten
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from services.core.config import Settings
from services.core.errors import ConfigurationError
from services.core.measurements import DEFAULT, measurement
from services.core.reading import LARGEST_VALUE, LONGEST_SENSOR_ID
from services.producer.times import DEFAULT_TIMES, TimeFormat, Times, is_number, is_text, nowhere

LONGEST_LIST = 1000  # characters of the names of a file's columns
LONGEST_VALUE = 100  # characters of an example
DEFAULT_SENSOR = "default"

Example = tuple[int, str]  # the number of a row in its batch, from 0, and what is in it


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the Parquet columns that make up a reading; an empty ``sensor``: there is none.

    Readings that are older than ``max_past`` (None: any) are not sent, since no consumer takes them. ``blocks``: they
    are sent in blocks (blocks.py).
    """

    time: str
    measurements: tuple[tuple[str, str], ...]  # name and column of each that has one
    sensor: str
    max_past: timedelta | None = None
    blocks: bool = False
    times: TimeFormat = DEFAULT_TIMES

    @classmethod
    def of(cls, settings: Settings) -> Columns:
        """The mapping that DATA_FEATURE_* says. Raises ConfigurationError where no measurement has a column."""
        measurements = tuple((name, column) for name in settings.measurements if (column := settings.column_of(name)))
        if not measurements:
            names = (measurement(name).column_setting.upper() for name in settings.measurements)
            raise ConfigurationError(f"no measurement has a column of the Parquet files: set {' or '.join(names)}")
        return cls(
            settings.data_feature_date,
            measurements,
            settings.data_feature_sensor,
            timedelta(days=settings.max_past_days),
            settings.producer_format == "arrow",
            TimeFormat(settings.data_feature_timezone, settings.data_feature_date_unit),
        )

    @property
    def names(self) -> list[str]:
        """Each column to read, once."""
        return list(dict.fromkeys(filter(None, (self.time, *dict(self.measurements).values(), self.sensor))))

    @property
    def identity(self) -> list[str]:
        """What stands for the mapping in a fingerprint. A measurement that has no column makes no difference."""
        named = dict(self.measurements)
        defaults = [named.pop(name, "") for name in DEFAULT]
        others = [f"{name}={column}" for name, column in sorted(named.items())]
        return [self.time, *defaults, *others, self.sensor]

    def identity_of_times(self, schema: pa.Schema) -> list[str]:
        """What of ``times`` makes a difference to a file, beyond the defaults."""
        return self.times.identity(_plain(schema.field(self.time).type))

    def check(self, schema: pa.Schema, url: str) -> None:
        """Raise ConfigurationError, one line, unless ``schema`` has all the columns with types that fit."""
        for setting, name, fits, wanted in (
            ("DATA_FEATURE_DATE", self.time, self.times.fits, "a timestamp, a date or ISO 8601 text"),
            *(
                (measurement(name).column_setting.upper(), column, is_number, "a number")
                for name, column in self.measurements
            ),
            ("DATA_FEATURE_SENSOR", self.sensor, _is_identifier, "text or an integer"),
        ):
            if not name:
                continue
            found = schema.get_all_field_indices(name)
            if len(found) != 1:
                there = shorten(", ".join(schema.names), LONGEST_LIST, placeholder=" ...")
                problem = "no column" if not found else f"{len(found)} columns"
                raise ConfigurationError(
                    f"{setting}={name}: {url} has {problem} of this name; its columns are: {there}"
                )
            kind = schema.field(name).type
            if not (fits(_plain(kind)) or pa.types.is_null(kind)):  # null: a file with no value here
                is_count = setting == "DATA_FEATURE_DATE" and is_number(_plain(kind))
                hint = " (numbers since 1970: set DATA_FEATURE_DATE_UNIT to s, ms, us or ns)" if is_count else ""
                raise ConfigurationError(f"{setting}={name}: this column of {url} is {kind}, not {wanted}{hint}")


class Encoded(Protocol):
    """What rows of a source became: messages, or rows for blocks."""

    @property
    def rows(self) -> int:
        """How many rows there were: ``sent`` plus the counts in ``skipped``."""

    @property
    def skipped(self) -> dict[str, int]:
        """How many were no readings, by reason."""

    @property
    def doubtful(self) -> dict[str, int]:
        """How many of the readings have a local time that came twice or never, by kind."""

    @property
    def examples(self) -> dict[str, Example]:
        """The first row that was skipped for each reason."""

    @property
    def sent(self) -> int:
        """How many readings there are."""

    @property
    def content(self) -> Any:
        """All readings, with those that are only too old by now: it depends on the rows and on nothing else."""


@dataclass(frozen=True, slots=True)
class Messages:
    """A key and a value for each reading. Equal keys are one object; ``content`` is all values."""

    rows: int
    keys: list[bytes]
    values: list[bytes]
    skipped: dict[str, int]
    content: bytes = b""
    doubtful: dict[str, int] = field(default_factory=dict)
    examples: dict[str, Example] = field(default_factory=dict)

    @property
    def sent(self) -> int:
        """How many readings there are."""
        return len(self.keys)


@dataclass(frozen=True, slots=True)
class Chosen:
    """The rows of a batch that are readings, in columns.

    ``sensor``: where in ``keys`` the id of each is; ``time``: timestamps without a zone; ``numbers``: those of each
    measurement that has a column, as they were but for NaN, which is null. ``young``: which are not too old (None:
    all). ``doubtful`` and ``examples`` as in Encoded.
    """

    rows: int
    skipped: dict[str, int]
    keys: list[bytes]
    sensor: pa.Array
    time: pa.Array
    numbers: dict[str, pa.Array]
    young: pa.Array | None
    doubtful: dict[str, int]
    examples: dict[str, Example]


def choose(batch: pa.RecordBatch, columns: Columns) -> Chosen:
    """The readings of ``batch``, in its order.

    Null and NaN are null. A row is skipped for the first reason that applies:
    ``bad_time`` (text that is no ISO 8601 time), ``time_out_of_range`` (not in the years 1900 to 9999),
    ``no_time``, ``no_sensor``, ``bad_sensor`` (longer than 255 characters, not UTF-8, or with characters that cannot be
    printed), ``value_out_of_range`` (beyond 1e100 or infinite), ``no_measurement`` (no value at all); and
    ``time_out_of_range`` again, for what is too old.
    """
    times = columns.times.read(_decoded(batch.column(columns.time)))
    numbers = {name: _numbers(_decoded(batch.column(column))) for name, column in columns.measurements}
    sensor = _Sensors.of(_decoded(batch.column(columns.sensor)) if columns.sensor else None, batch.num_rows)
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
    return Chosen(batch.num_rows, skipped, sensor.keys, index, time, chosen, young, doubtful, examples)


def encode_batch(batch: pa.RecordBatch, columns: Columns) -> Messages:
    """A message for each reading of ``batch``, as services/core/reading.py defines it; a null field is left out."""
    found = choose(batch, columns)
    prefixes = pa.array([_prefix(key) for key in found.keys], pa.string())
    values = pc.binary_join_element_wise(
        prefixes.take(found.sensor),
        pc.binary_replace_slice(found.time.cast(pa.string()), 10, 11, "T"),
        'Z"',
        *(_member(name, number.cast(pa.string())) for name, number in found.numbers.items()),
        "}",
        "",
    )
    texts = values.cast(pa.binary()).to_pylist()
    content = b"".join(texts)
    sensor = found.sensor
    if found.young is not None:
        sensor, texts = sensor.filter(found.young), values.filter(found.young).cast(pa.binary()).to_pylist()
    keys = [found.keys[i] for i in sensor.to_pylist()]
    return Messages(found.rows, keys, texts, found.skipped, content, found.doubtful, found.examples)


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
    cell = _decoded(column.slice(row, 1))
    if pa.types.is_timestamp(cell.type):
        cell = cell.cast(pa.timestamp(cell.type.unit))  # a zone is no part of the instant
    text = cell.cast(pa.string()).cast(pa.binary())[0].as_py()
    shown = "null" if text is None else text.decode(errors="replace")
    return shown if len(shown) <= LONGEST_VALUE else f"{shown[:LONGEST_VALUE]} ..."


def event_times(batch: pa.RecordBatch, columns: Columns) -> pa.Array:
    """The time of each row in microseconds since 1970, UTC; null where it has none that can be sent."""
    return columns.times.read(_decoded(batch.column(columns.time))).instants.cast(pa.int64())


# --- types -------------------------------------------------------------------------------------------------


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type of the values, dictionary-encoded or not."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _decoded(column: pa.Array) -> pa.Array:
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _is_identifier(kind: pa.DataType) -> bool:
    return bool(is_text(kind) or pa.types.is_integer(kind))


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
    far = pc.fill_null(pc.greater(pc.abs(doubles), LARGEST_VALUE), False)
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
    return 0 < len(sensor) <= LONGEST_SENSOR_ID and sensor.isprintable()


def _prefix(key: bytes) -> str:
    """The start of a message of this sensor; of what is no id it is never used."""
    return f'{{"sensor_id":{json.dumps(key.decode(errors="replace"), ensure_ascii=False)},"time":"'
