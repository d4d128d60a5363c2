"""Record batches become messages, a whole column at a time: one for each row, in JSON, or blocks of rows.

JSON is joined together by Arrow's string kernels: 2.3 million messages a second on one core, where the best
encoder of one object after the other reached 1.8. Two facts that this rests on, both tested: Arrow prints
a double as the shortest text that reads back as the same double, and that text is a JSON number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import reduce
from textwrap import shorten
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from services.core.config import Settings
from services.core.errors import ConfigurationError
from services.core.measurements import DEFAULT, measurement
from services.core.reading import EARLIEST, EPOCH, LARGEST_VALUE, LATEST, LONGEST_SENSOR_ID

LONGEST_LIST = 1000  # characters of the names of a file's columns
DEFAULT_SENSOR = "default"
FINER = re.compile(r"[.,]\d{6}[5-9]", re.ASCII)  # what fromisoformat() cuts off is half a microsecond or more
UNITS_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


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

    def check(self, schema: pa.Schema, url: str) -> None:
        """Raise ConfigurationError, one line, unless ``schema`` has all the columns with types that fit."""
        for setting, name, fits, wanted in (
            ("DATA_FEATURE_DATE", self.time, _is_time, "a timestamp, a date or ISO 8601 text"),
            *(
                (measurement(name).column_setting.upper(), column, _is_number, "a number")
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
                seconds = fits is _is_time and pa.types.is_integer(_plain(kind))
                hint = " (seconds since 1970 have to become timestamps first)" if seconds else ""
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

    @property
    def sent(self) -> int:
        """How many readings there are."""
        return len(self.keys)


@dataclass(frozen=True, slots=True)
class Chosen:
    """The rows of a batch that are readings, in columns.

    ``sensor``: where in ``keys`` the id of each is; ``time``: timestamps without a zone; ``numbers``: those of each
    measurement that has a column, as they were but for NaN, which is null. ``young``: which are not too old (None:
    all).
    """

    rows: int
    skipped: dict[str, int]
    keys: list[bytes]
    sensor: pa.Array
    time: pa.Array
    numbers: dict[str, pa.Array]
    young: pa.Array | None


def choose(batch: pa.RecordBatch, columns: Columns) -> Chosen:
    """The readings of ``batch``, in its order.

    Null and NaN are null. A row is skipped for the first reason that applies:
    ``bad_time`` (text that is no ISO 8601 time), ``time_out_of_range`` (not in the years 1900 to 9999),
    ``no_time``, ``no_sensor``, ``bad_sensor`` (longer than 255 characters, not UTF-8, or with characters that cannot be
    printed), ``value_out_of_range`` (beyond 1e100 or infinite), ``no_measurement`` (no value at all); and
    ``time_out_of_range`` again, for what is too old.
    """
    time, bad_time, far_time = _times(_decoded(batch.column(columns.time)))
    numbers = {name: _numbers(_decoded(batch.column(column))) for name, column in columns.measurements}
    sensor = _Sensors.of(_decoded(batch.column(columns.sensor)) if columns.sensor else None, batch.num_rows)
    rows, skipped = _choose(
        ("bad_time", bad_time),
        ("time_out_of_range", far_time),
        ("no_time", time.is_null()),
        ("no_sensor", sensor.missing),
        ("bad_sensor", sensor.bad),
        ("value_out_of_range", reduce(pc.or_, (far for _, far in numbers.values()))),
        ("no_measurement", reduce(pc.and_, (number.is_null() for number, _ in numbers.values()))),
    )
    index, found = sensor.index, [number for number, _ in numbers.values()]
    if rows is not None:
        index, time, *found = (column.filter(rows) for column in (index, time, *found))
    young = _young(time, columns.max_past)
    if young is not None:
        skipped["time_out_of_range"] = skipped.get("time_out_of_range", 0) + len(young) - young.true_count
    return Chosen(batch.num_rows, skipped, sensor.keys, index, time, dict(zip(numbers, found, strict=True)), young)


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
    return Messages(found.rows, keys, texts, found.skipped, content)


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


def _choose(*reasons: tuple[str, pa.Array]) -> tuple[pa.Array | None, dict[str, int]]:
    """Which rows no reason excludes (None: all), and how many each excludes: the first to apply counts."""
    out: pa.Array | None = None
    skipped: dict[str, int] = {}
    for reason, mask in reasons:
        if not mask.true_count:
            continue
        fresh = mask if out is None else pc.and_not(mask, out)
        if fresh.true_count:
            skipped[reason] = fresh.true_count
        out = mask if out is None else pc.or_(out, mask)
    return (None if out is None else pc.invert(out)), skipped


def event_times(column: pa.Array) -> pa.Array:
    """The time of each row in microseconds since 1970, UTC; null where it has none that can be sent."""
    return _times(_decoded(column))[0].cast(pa.int64())


# --- types -------------------------------------------------------------------------------------------------


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type of the values, dictionary-encoded or not."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _decoded(column: pa.Array) -> pa.Array:
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_time(kind: pa.DataType) -> bool:
    return bool(pa.types.is_timestamp(kind) or pa.types.is_date(kind) or _is_text(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _is_identifier(kind: pa.DataType) -> bool:
    return bool(_is_text(kind) or pa.types.is_integer(kind))


def _mask(rows: int) -> pa.Array:
    return pa.repeat(pa.scalar(False), rows)


# --- numbers -----------------------------------------------------------------------------------------------


def _numbers(column: pa.Array) -> tuple[pa.Array, pa.Array]:
    """The numbers (null for null and NaN), and where one is further from 0 than is allowed.

    Integers and decimals keep all their digits, and cannot be too large. Floats of any width become doubles
    first, so that the text says the value that is stored and not a shorter one that only a float of that width
    would read back.
    """
    if not pa.types.is_floating(column.type):
        return column, _mask(len(column))
    doubles = column.cast(pa.float64())
    far = pc.fill_null(pc.greater(pc.abs(doubles), LARGEST_VALUE), False)
    nan = pc.fill_null(pc.is_nan(doubles), False)
    if nan.true_count:
        doubles = pc.if_else(nan, pa.scalar(None, pa.float64()), doubles)
    return doubles, far


# --- times -------------------------------------------------------------------------------------------------


def _times(column: pa.Array) -> tuple[pa.Array, pa.Array, pa.Array]:
    """A timestamp("us") in UTC for each time, null where there is none; bad and far ones."""
    bad = _mask(len(column))
    if pa.types.is_null(column.type):
        column = column.cast(pa.timestamp("us"))
    if _is_text(column.type):
        column, bad = _parse(column.cast(pa.string()))
    if pa.types.is_date64(column.type):
        column = column.cast(pa.timestamp("ms"))
    if pa.types.is_timestamp(column.type) and column.type.unit == "ns":
        column = _rounded(column.cast(pa.int64()))
    if pa.types.is_date32(column.type):
        per_second, unit = 0, "s"
        numbers = column.cast(pa.int32())
        low, high = (EARLIEST - EPOCH).days, (LATEST - EPOCH).days
    else:
        unit = column.type.unit
        per_second = UNITS_PER_SECOND[unit]
        numbers = column.cast(pa.int64())
        low, high = (_seconds(moment) * per_second for moment in (EARLIEST, LATEST))
    far = pc.fill_null(pc.or_(pc.less(numbers, low), pc.greater(numbers, high)), False)
    if far.true_count:
        column = pc.if_else(far, pa.scalar(None, column.type), column)
    # The zone goes first: an instant with a zone is printed 30 times slower, and is the same in UTC.
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp(unit))
    return column.cast(pa.timestamp("us")), bad, far


def _rounded(nanoseconds: pa.Array) -> pa.Array:
    """The nearest microsecond, the later one of two, which is what a consumer makes of a message's time."""
    whole = pc.divide(nanoseconds, 1000)  # towards 1970
    rest = pc.subtract(nanoseconds, pc.multiply(whole, 1000))
    up, down = (pc.cast(found, pa.int64()) for found in (pc.greater_equal(rest, 500), pc.less(rest, -500)))
    return pc.subtract(pc.add(whole, up), down).cast(pa.timestamp("us"))


def _seconds(moment: datetime) -> int:
    elapsed = moment - EPOCH
    return elapsed.days * 86_400 + elapsed.seconds


def _parse(text: pa.Array) -> tuple[pa.Array, pa.Array]:
    """UTC microseconds for each ISO 8601 text, null for what is none; and where it is none.

    A text with no offset is UTC. A fraction is rounded to microseconds, as a consumer does.
    """
    for zone in ("UTC", None):  # all with an offset, or all without: Arrow reads them at once
        try:
            return text.cast(pa.timestamp("us", zone)).cast(pa.timestamp("us")), _mask(len(text))
        except pa.ArrowInvalid:
            continue
    distinct = text.dictionary_encode()
    parsed = [_microseconds(value) for value in distinct.dictionary.cast(pa.binary()).to_pylist()]
    instants = pa.array(parsed, pa.int64()).cast(pa.timestamp("us")).take(distinct.indices)
    return instants, pc.and_(instants.is_null(), text.is_valid())


def _microseconds(text: bytes) -> int | None:
    try:
        iso = text.decode().strip()
        moment = datetime.fromisoformat(iso)
        elapsed = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - EPOCH
    except ValueError:
        return None
    up = FINER.search(iso) is not None
    return (elapsed.days * 86_400 + elapsed.seconds) * 1_000_000 + elapsed.microseconds + up


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
