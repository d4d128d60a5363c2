"""The column of times becomes instants: microseconds since 1970, in UTC, whatever form a file has them in.

A timestamp with a zone, a text with an offset and a number are instants already. Everything else is what the clocks of
one zone showed (DATA_FEATURE_TIMEZONE). Where these were set back, a time comes twice, and the earlier one is taken;
where they were set forward, some never come, and the clocks are taken as not yet set, so such a time is moved forward
by as much as was skipped. Python (fold=0) and Java have the same rule. Both are counted.

The zones are Python's. Arrow's own kernel knows no change of the clocks after the last one that a zone's file lists,
which in small ("slim") files is decades ago: https://github.com/apache/arrow/issues/42157.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.compute as pc

from services.core.reading import EARLIEST, EPOCH, LATEST

UNITS_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
FINER = re.compile(r"[.,]\d{6}[5-9]", re.ASCII)  # what fromisoformat() cuts off is half a microsecond or more
AMBIGUOUS, NONEXISTENT = DOUBTS = ("ambiguous", "nonexistent")

DAY = timedelta(days=1)
SECOND = timedelta(seconds=1)
MICROSECOND = timedelta(microseconds=1)
START = EPOCH.replace(tzinfo=None)
LAST_DAY = datetime(9999, 12, 31)  # noqa: DTZ001 - of any zone
MAX_INT = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Times:
    """What is in a column of times.

    ``instants``: timestamp("us") without a zone, in UTC, null where there is none. ``bad``: text that is no time.
    ``far``: beyond the years 1900 to 9999. ``doubtful``: which local times came twice or never, where there are any.
    """

    instants: pa.Array
    bad: pa.Array
    far: pa.Array
    doubtful: dict[str, pa.Array] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TimeFormat:
    """How to read a column: local times as those of ``zone``, numbers as ``unit`` since 1970 ("": not at all)."""

    zone: str = "UTC"
    unit: str = ""

    def fits(self, kind: pa.DataType) -> bool:
        """Whether a column of this type can be read."""
        return bool(
            pa.types.is_timestamp(kind)
            or pa.types.is_date(kind)
            or is_text(kind)
            or (self.unit and is_number(kind))
            or pa.types.is_null(kind)
        )

    def identity(self, kind: pa.DataType) -> list[str]:
        """What of this makes a difference to a column of this type, beyond the defaults."""
        if is_number(kind):
            return [f"unit {self.unit}"]
        is_instant = pa.types.is_timestamp(kind) and kind.tz is not None
        return [] if is_instant or self.zone == "UTC" else [f"zone {self.zone}"]

    def read(self, column: pa.Array) -> Times:
        """The times in ``column``, which has a type that fits and is no dictionary.

        Finer ones are rounded to the nearest microsecond, the later one of two, as a consumer rounds a message's.
        """
        bad = far = nowhere(len(column))
        local: pa.Array | bool = not (is_number(column.type) or getattr(column.type, "tz", None))
        if is_text(column.type):
            column, local, bad = _parse(column.cast(pa.string()))
        elif is_number(column.type):
            column, far = _counted(column, self.unit)
        elif not pa.types.is_timestamp(column.type):
            column = column.cast(pa.timestamp("ms"))  # a date, or nothing at all
        if column.type.unit == "ns":
            column = _rounded(column.cast(pa.int64()))
        is_shifted = local is not False and self.zone != "UTC"
        column, out = _bounded(column, DAY if is_shifted else timedelta(0))
        far = pc.or_(far, out)
        # The zone goes first: an instant with a zone is printed 30 times slower, and is the same in UTC.
        instants = column.cast(pa.timestamp(column.type.unit)).cast(pa.timestamp("us"))
        if not is_shifted:
            return Times(instants, bad, far)
        shown = instants if local is True else pc.if_else(local, instants, None)
        moved, doubtful = _to_utc(shown, self.zone)
        instants, out = _bounded(moved if local is True else pc.if_else(local, moved, instants), timedelta(0))
        return Times(instants, bad, pc.or_(far, out), doubtful)


DEFAULT_TIMES = TimeFormat()


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
    """The timestamps, null where they are further than ``slack`` beyond the years that there are; and where."""
    numbers = column.cast(pa.int64())
    low, high = _count(EARLIEST - slack, column.type.unit), _count(LATEST + slack, column.type.unit)
    far = pc.fill_null(pc.or_(pc.less(numbers, low), pc.greater(numbers, high)), False)
    return (pc.if_else(far, pa.scalar(None, column.type), column) if far.true_count else column), far


def _count(moment: datetime, unit: str) -> int:
    elapsed = moment - EPOCH
    return (elapsed.days * 86_400 + elapsed.seconds) * UNITS_PER_SECOND[unit]


def _rounded(nanoseconds: pa.Array) -> pa.Array:
    """The nearest microsecond, the later one of two, which is what a consumer makes of a message's time."""
    whole = pc.divide(nanoseconds, 1000)  # towards 1970
    rest = pc.subtract(nanoseconds, pc.multiply(whole, 1000))
    up, down = (pc.cast(found, pa.int64()) for found in (pc.greater_equal(rest, 500), pc.less(rest, -500)))
    return pc.subtract(pc.add(whole, up), down).cast(pa.timestamp("us"))


# --- text --------------------------------------------------------------------------------------------------


def _parse(text: pa.Array) -> tuple[pa.Array, pa.Array | bool, pa.Array]:
    """A timestamp("us") for each ISO 8601 text, null for what is none; which have no offset; and what is none.

    What has an offset is in UTC. A fraction is rounded to microseconds, as a consumer does.
    """
    for zone in ("UTC", None):  # all with an offset, or all without: Arrow reads them at once
        try:
            return text.cast(pa.timestamp("us", zone)).cast(pa.timestamp("us")), zone is None, nowhere(len(text))
        except pa.ArrowInvalid:
            continue
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


# --- numbers -----------------------------------------------------------------------------------------------


def _counted(numbers: pa.Array, unit: str) -> tuple[pa.Array, pa.Array]:
    """Timestamps for numbers of units since 1970, null for null and NaN; and where one is too large to be one."""
    kind = numbers.type
    if pa.types.is_integer(kind) and not pa.types.is_uint64(kind):
        return numbers.cast(pa.int64()).cast(pa.timestamp(unit)), nowhere(len(numbers))
    doubles = numbers.cast(pa.float64(), safe=False)
    # What is left fits into 64 bits, whichever of its digits a double has lost.
    low, high = (_count(moment, unit) for moment in (EARLIEST - DAY, LATEST + DAY))
    if pa.types.is_floating(kind):
        high = min(high, MAX_INT - 1023)  # the largest double below 2^63
    far = pc.fill_null(pc.or_(pc.less(doubles, float(low)), pc.greater(doubles, float(high))), False)
    none = pc.or_(far, pc.fill_null(pc.is_nan(doubles), False))
    if not pa.types.is_floating(kind):
        return _from_decimals(pc.if_else(none, pa.scalar(None, kind), numbers), unit), far
    return _from_doubles(pc.if_else(none, pa.scalar(None, pa.float64()), doubles), unit), far


def _from_doubles(numbers: pa.Array, unit: str) -> pa.Array:
    """Timestamps for numbers of units since 1970; each step is exact, or is the rounding."""
    whole = pc.floor(numbers)
    if unit == "ns":
        return whole.cast(pa.int64()).cast(pa.timestamp("ns"))
    per_unit = UNITS_PER_SECOND["us"] // UNITS_PER_SECOND[unit]
    parts = pc.round(pc.multiply(pc.subtract(numbers, whole), float(per_unit)), 0, "half_up")
    return pc.add(pc.multiply(whole.cast(pa.int64()), per_unit), parts.cast(pa.int64())).cast(pa.timestamp("us"))


def _from_decimals(numbers: pa.Array, unit: str) -> pa.Array:
    """Timestamps for numbers of units since 1970: the point moves, the digits stay."""
    if not pa.types.is_decimal(numbers.type):
        numbers = numbers.cast(pa.decimal128(20, 0))
    scale = numbers.type.scale
    digits = {"s": 6, "ms": 3, "us": 0, "ns": -3}[unit]
    microseconds = numbers.cast(pa.decimal256(76, scale)).view(pa.decimal256(76, scale - digits))
    return pc.round(microseconds, 0, "half_up").cast(pa.int64()).cast(pa.timestamp("us"))


# --- zones -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Change:
    """The clocks of a zone are set: from the local time ``at`` until the end of its day ``offset`` holds.

    Local times from ``doubtful`` until ``at`` come twice or never, which ``doubt`` says. Times are microseconds since
    1970, the offset is in microseconds.
    """

    doubtful: int
    at: int
    end: int
    offset: int
    doubt: str


def _to_utc(shown: pa.Array, zone: str) -> tuple[pa.Array, dict[str, pa.Array]]:
    """The instants at which clocks showed these times; and which of them came twice, or never."""
    days = shown.cast(pa.date32(), safe=False).dictionary_encode()
    offsets, changes = [], set[Change]()
    for day in days.dictionary.cast(pa.int32()).to_pylist():
        offset, found = _day(zone, day)
        offsets.append(offset)
        changes.update(found)
    clock = shown.cast(pa.int64())
    offset = pa.array(offsets, pa.int64()).take(days.indices)
    doubtful: dict[str, pa.Array] = {}
    for change in changes:
        after = pc.and_(pc.greater_equal(clock, change.at), pc.less(clock, change.end))
        offset = pc.if_else(after, change.offset, offset)
        found = pc.and_(pc.greater_equal(clock, change.doubtful), pc.less(clock, change.at)).fill_null(False)
        if found.true_count:
            doubtful[change.doubt] = pc.or_(found, doubtful.get(change.doubt, found))
    return pc.subtract(clock, offset).cast(pa.timestamp("us")), doubtful


@lru_cache(maxsize=100_000)
def _day(zone: str, day: int) -> tuple[int, list[Change]]:
    """For a local day, by its number since 1970: the offset that it begins with, and the changes that bear on it."""
    start = START + day * DAY
    changes = [_change(zone, start), _change(zone, start + DAY) if start < LAST_DAY else None]
    end = (day + 1) * (DAY // MICROSECOND)
    return _offset(zone, start) // MICROSECOND, [change for change in changes if change and change.doubtful < end]


def _change(zone: str, start: datetime) -> Change | None:
    """The change after the beginning of a day, at the beginning of the next one at the latest: there is no second."""
    if start >= LAST_DAY:
        return None
    before, after = _offset(zone, start), _offset(zone, start + DAY)
    if before == after:
        return None
    low, high = start, start + DAY
    while high - low > SECOND:
        middle = low + (high - low) // 2 // SECOND * SECOND
        low, high = (low, middle) if _offset(zone, middle) == after else (middle, high)
    at, end = ((moment - START) // MICROSECOND for moment in (high, start + DAY))
    skipped = (after - before) // MICROSECOND
    return Change(at - abs(skipped), at, end, after // MICROSECOND, NONEXISTENT if skipped > 0 else AMBIGUOUS)


def _offset(zone: str, shown: datetime) -> timedelta:
    offset = ZoneInfo(zone).utcoffset(shown)  # of fold=0
    assert offset is not None
    return offset
