"""The column of times becomes instants: microseconds since 1970, in UTC, whatever form a file has them in.

A timestamp with a zone, a text with an offset and a number are instants already. Everything else is what the clocks of
one zone showed (DATA_FEATURE_TIMEZONE). Where these were set back, a time comes twice, and the earlier one is taken;
where they were set forward, some times never come, and such a time is moved forward by as much as was skipped. Python
(fold=0) and Java have the same rule. Both are counted.

The zones are Python's. Arrow's own kernel knows no change of the clocks after the last one that a zone's file lists,
which in small ("slim") files is decades ago: https://github.com/apache/arrow/issues/42157.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.compute as pc

from services.core.reading import EARLIEST, EPOCH, LATEST

UNITS_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
FINER = re.compile(r"[.,]\d{6}[5-9]", re.ASCII)  # what fromisoformat() cuts off is half a microsecond or more
AMBIGUOUS, NONEXISTENT = DOUBTS = ("ambiguous", "nonexistent")

DAY = timedelta(days=1)
MICROSECOND = timedelta(microseconds=1)
START = EPOCH.replace(tzinfo=None)
LAST = datetime(9999, 12, 31, 23, 59)  # noqa: DTZ001 - of any zone


@dataclass(frozen=True, slots=True)
class Times:
    """What is in a column of times; all but ``instants`` are masks."""

    instants: pa.Array  # timestamp("us") in UTC, without a zone, null where there is none
    bad: pa.Array  # text that is not a time
    far: pa.Array  # beyond the years 1900 to 9999
    doubtful: dict[str, pa.Array]  # local times that came twice or never, where there are any


@dataclass(frozen=True, slots=True)
class TimeFormat:
    """How to read a column: local times as those of ``zone``, numbers as ``unit`` since 1970 ("": not at all)."""

    zone: str = "UTC"
    unit: str = ""

    def fits(self, kind: pa.DataType) -> bool:
        """Whether a column of this type can be read."""
        is_count = bool(self.unit) and is_number(kind)
        return bool(pa.types.is_timestamp(kind) or pa.types.is_date(kind) or is_text(kind) or is_count)

    def identity(self, kind: pa.DataType) -> list[str]:
        """What of this makes a difference to a column of this type, beyond the defaults."""
        if is_number(kind):
            return [f"unit {self.unit}"]
        is_instant = pa.types.is_timestamp(kind) and kind.tz is not None
        return [] if is_instant or self.zone == "UTC" else [f"zone {self.zone}"]

    def read(self, column: pa.Array) -> Times:
        """The times in ``column``, which has a type that fits and is not dictionary-encoded.

        Finer ones are rounded to the nearest microsecond, the later one of two, as a consumer rounds a message's.
        """
        bad = far = nowhere(len(column))
        is_instant = is_number(column.type) or bool(getattr(column.type, "tz", None))
        local = pa.repeat(pa.scalar(not is_instant), len(column))
        if is_text(column.type):
            column, local, bad = _parse(column.cast(pa.string()))
        elif is_number(column.type):
            column, far = _counted(column, self.unit)
        elif not pa.types.is_timestamp(column.type):
            column = column.cast(pa.timestamp("ms"))  # a date, or nothing at all
        if column.type.unit == "ns":
            column = _rounded(column.cast(pa.int64()))
        column, out_of_reach = _bounded(column, DAY)
        # The zone goes first: an instant with a zone is printed 30 times slower, and is the same in UTC.
        instants = column.cast(pa.timestamp(column.type.unit)).cast(pa.timestamp("us"))
        doubtful: dict[str, pa.Array] = {}
        if self.zone != "UTC" and local.true_count:
            moved, doubtful = _to_utc(pc.if_else(local, instants, None), self.zone)
            instants = pc.if_else(local, moved, instants)
        instants, out = _bounded(instants, timedelta(0))
        return Times(instants, bad, pc.or_(far, pc.or_(out_of_reach, out)), doubtful)


def is_text(kind: pa.DataType) -> bool:
    """Whether values of this type are text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_number(kind: pa.DataType) -> bool:
    """Whether values of this type are integers, floats or decimals."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def nowhere(rows: int) -> pa.Array:
    """False for each row."""
    return pa.repeat(pa.scalar(False), rows)


def _bounded(column: pa.Array, slack: timedelta) -> tuple[pa.Array, pa.Array]:
    """The timestamps, null where they are more than ``slack`` out of range; and where they are."""
    numbers = column.cast(pa.int64())
    low, high = _count(EARLIEST - slack, column.type.unit), _count(LATEST + slack, column.type.unit)
    far = pc.fill_null(pc.or_(pc.less(numbers, low), pc.greater(numbers, high)), False)
    return (pc.if_else(far, pa.scalar(None, column.type), column) if far.true_count else column), far


def _count(moment: datetime, unit: str) -> int:
    elapsed = moment - EPOCH
    return (elapsed.days * 86_400 + elapsed.seconds) * UNITS_PER_SECOND[unit]


def _rounded(nanoseconds: pa.Array) -> pa.Array:
    """The nearest microsecond, the later one of two."""
    whole = pc.divide(nanoseconds, 1000)  # towards 1970
    rest = pc.subtract(nanoseconds, pc.multiply(whole, 1000))
    up, down = (pc.cast(found, pa.int64()) for found in (pc.greater_equal(rest, 500), pc.less(rest, -500)))
    return pc.subtract(pc.add(whole, up), down).cast(pa.timestamp("us"))


def _parse(text: pa.Array) -> tuple[pa.Array, pa.Array, pa.Array]:
    """A timestamp("us") for each ISO 8601 text, in UTC if it has an offset; which have none; and which are no times."""
    for zone in ("UTC", None):  # all with an offset, or all without: Arrow reads them at once
        try:
            times = text.cast(pa.timestamp("us", zone)).cast(pa.timestamp("us"))
        except pa.ArrowInvalid:
            continue
        return times, pa.repeat(pa.scalar(zone is None), len(text)), nowhere(len(text))
    distinct = text.dictionary_encode()
    parsed = [_microseconds(value) for value in distinct.dictionary.cast(pa.binary()).to_pylist()]
    numbers = pa.array([number for number, _ in parsed], pa.int64()).take(distinct.indices)
    local = pa.array([is_local for _, is_local in parsed], pa.bool_()).take(distinct.indices)
    return numbers.cast(pa.timestamp("us")), local, pc.and_(numbers.is_null(), text.is_valid())


def _microseconds(text: bytes) -> tuple[int | None, bool]:
    try:
        iso = text.decode().strip()
        moment = datetime.fromisoformat(iso)
        elapsed = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - EPOCH
    except ValueError:
        return None, False
    up = FINER.search(iso) is not None
    return elapsed // MICROSECOND + up, moment.tzinfo is None


def _counted(numbers: pa.Array, unit: str) -> tuple[pa.Array, pa.Array]:
    """Timestamps for numbers of units since 1970, null for null and NaN; and where one is out of range."""
    kind = numbers.type
    if pa.types.is_integer(kind) and not pa.types.is_uint64(kind):
        return numbers.cast(pa.int64()).cast(pa.timestamp(unit)), nowhere(len(numbers))
    doubles = numbers.cast(pa.float64(), safe=False)
    # What is left fits into 64 bits of microseconds, whichever of its digits a double has lost.
    low, high = (float(_count(moment, unit)) for moment in (EARLIEST - DAY, LATEST + DAY))
    far = pc.fill_null(pc.or_(pc.less(doubles, low), pc.greater(doubles, high)), False)
    none = pc.or_(far, pc.fill_null(pc.is_nan(doubles), False))
    kept = pc.if_else(none, None, doubles if pa.types.is_floating(kind) else numbers).dictionary_encode()
    # In Python, since Arrow divides some decimals of 256 bits wrongly.
    microseconds = pa.array([_nearest(number, unit) for number in kept.dictionary.to_pylist()], pa.int64())
    return microseconds.take(kept.indices).cast(pa.timestamp("us")), far


def _nearest(number: float | Decimal, unit: str) -> int:
    """The nearest whole microsecond, the later one of two, exactly."""
    units, parts = number.as_integer_ratio()
    parts *= UNITS_PER_SECOND[unit]
    return (2 * units * UNITS_PER_SECOND["us"] + parts) // (2 * parts)


def _to_utc(shown: pa.Array, zone: str) -> tuple[pa.Array, dict[str, pa.Array]]:
    """The instants at which clocks showed these times; and which of them came twice, or never.

    Most days have one offset; only on a day when the clocks are set does each time get its own.
    """
    days = shown.cast(pa.date32(), safe=False).dictionary_encode()
    by_day = [_offset_of_day(zone, day) for day in days.dictionary.cast(pa.int32()).to_pylist()]
    offsets = pa.array(by_day, pa.int64()).take(days.indices)
    if offsets.null_count == shown.null_count:
        return _shifted(shown, offsets), {}
    changing = pc.and_(offsets.is_null(), shown.is_valid())
    times = shown.filter(changing).dictionary_encode()
    found = [_offset(zone, time) for time in times.dictionary.to_pylist()]
    exact = pa.array([offset for offset, _ in found], pa.int64()).take(times.indices)
    doubts = pa.array([doubt for _, doubt in found], pa.string()).take(times.indices)
    doubts = pc.replace_with_mask(pa.nulls(len(shown), pa.string()), changing, doubts)
    masks = {kind: pc.fill_null(pc.equal(doubts, kind), False) for kind in DOUBTS}
    instants = _shifted(shown, pc.replace_with_mask(offsets, changing, exact))
    return instants, {kind: mask for kind, mask in masks.items() if mask.true_count}


def _shifted(shown: pa.Array, offsets: pa.Array) -> pa.Array:
    return pc.subtract(shown.cast(pa.int64()), offsets).cast(pa.timestamp("us"))


@lru_cache(maxsize=100_000)
def _offset_of_day(zone: str, day: int) -> int | None:
    """The offset in microseconds during a local day, by its number since 1970; None where it changes."""
    start = START + day * DAY
    end = start + min(DAY, LAST - start)
    (offset, doubt), after = (_offset(zone, time) for time in (start, end))
    return offset if after == (offset, None) == (offset, doubt) else None


def _offset(zone: str, shown: datetime) -> tuple[int, str | None]:
    """The offset in microseconds of what clocks showed, and whether they showed it twice or never."""
    first, second = (ZoneInfo(zone).utcoffset(shown.replace(fold=fold)) for fold in (0, 1))
    assert first is not None
    assert second is not None
    doubt = None if first == second else AMBIGUOUS if first > second else NONEXISTENT
    return first // MICROSECOND, doubt
