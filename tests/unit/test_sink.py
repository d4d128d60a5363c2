"""What the sink works out before it meets the database: merged rows, touched minutes, transactions."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg.abc import Buffer
from psycopg.types.datetime import DatetimeBinaryDumper
from psycopg.types.multirange import Multirange
from psycopg.types.numeric import FloatBinaryDumper
from psycopg.types.string import StrBinaryDumper

from services.consumer import columns
from services.consumer.columns import JUMP, MAX_TRANSACTIONS, MAX_WEEKS, columns_of
from services.consumer.sink import WriteResult
from services.core.reading import EARLIEST, EPOCH, LATEST, Reading
from tests.measured import MEASUREMENTS, reading_of

BINARY: dict[type, Callable[[Any], Buffer | None]] = {
    str: StrBinaryDumper(str).dump,
    datetime: DatetimeBinaryDumper(datetime).dump,
    float: FloatBinaryDumper(float).dump,
    type(None): lambda _: None,
}

START = datetime(2024, 3, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)

zones = st.sampled_from([UTC, timezone(timedelta(hours=5, minutes=30)), timezone(timedelta(hours=-12))])
values = st.none() | st.integers(0, 5).map(float)
anywhen = st.datetimes(EARLIEST.replace(tzinfo=None), LATEST.replace(tzinfo=None) - timedelta(days=1), timezones=zones)
nearby = st.integers(0, 4 * 3600).map(lambda seconds: START + timedelta(seconds=seconds))


def batches(times: st.SearchStrategy[datetime] = anywhen | nearby) -> st.SearchStrategy[list[Reading]]:
    """Batches in which sensors and times meet often."""
    return st.lists(st.builds(reading_of, st.sampled_from("abc"), times, values, values), min_size=1, max_size=30)


def last_values(rows: list[Reading]) -> list[Reading]:
    merged = columns.last_values(columns_of(rows, MEASUREMENTS))
    times = [EPOCH + timedelta(microseconds=time) for time in merged["time"].to_pylist()]
    values = [merged[metric].to_pylist() for metric in MEASUREMENTS]
    return [reading_of(*row) for row in zip(merged["sensor_id"].to_pylist(), times, *values, strict=True)]


def split_at_jumps(rows: list[Reading]) -> list[list[int]]:
    return [part.to_pylist() for part in columns.split_at_jumps(columns_of(rows, MEASUREMENTS)["time"])]


def touched_ranges(rows: list[Reading]) -> Multirange[datetime]:
    return columns.touched_ranges(columns_of(rows, MEASUREMENTS)["time"])


def one_by_one(rows: list[Reading]) -> dict[tuple[str, datetime], list[float | None]]:
    """The contract, word by word: for each field the last value that is not null wins."""
    table: dict[tuple[str, datetime], list[float | None]] = {}
    for row in rows:
        stored = table.setdefault((row.sensor_id, row.time), [None, None])
        if row.temperature is not None:
            stored[0] = row.temperature
        if row.humidity is not None:
            stored[1] = row.humidity
    return table


@given(batches(nearby.map(lambda time: time.replace(minute=0, second=0))))
def test_last_values_is_one_row_for_each_key_as_if_stored_one_by_one(rows: list[Reading]) -> None:
    merged = last_values(rows)
    assert {(row.sensor_id, row.time): [row.temperature, row.humidity] for row in merged} == one_by_one(rows)
    keys = [(row.time, row.sensor_id) for row in merged]
    assert keys == sorted(set(keys))


@given(batches())
def test_merging_twice_changes_nothing(rows: list[Reading]) -> None:
    assert last_values(last_values(rows)) == last_values(rows)


def test_the_same_instant_in_another_offset_is_the_same_key() -> None:
    elsewhere = START.astimezone(timezone(timedelta(hours=9)))
    (row,) = last_values([reading_of("a", START, 1.0, None), reading_of("a", elsewhere, None, 2.0)])
    assert (row.time, row.temperature, row.humidity) == (START, 1.0, 2.0)


def test_a_zero_is_a_value() -> None:
    (row,) = last_values([reading_of("a", START, 1.0, 1.0), reading_of("a", START, 0.0, None)])
    assert (row.temperature, row.humidity) == (0.0, 1.0)


@given(batches(), st.integers(0, 5))
def test_copy_gets_the_bytes_that_psycopg_would_send(rows: list[Reading], first: int) -> None:
    """Also of a slice, whose columns begin in the middle of their memory."""
    first = min(first, len(rows) - 1)
    dumped = bytearray(b"PGCOPY\n\xff\r\n\0" + bytes(8))
    for row in rows[first:]:
        fields = [BINARY[type(value)](value) for value in msgspec.structs.astuple(row)]
        dumped += len(fields).to_bytes(2, "big")
        for field in fields:
            dumped += b"\xff" * 4 if field is None else len(field).to_bytes(4, "big") + field
    pieces = columns.encode(columns_of(rows, MEASUREMENTS).slice(first))
    assert b"".join(pieces) == dumped + b"\xff\xff"


@given(batches())
def test_touched_ranges_are_exactly_the_minutes_with_readings(rows: list[Reading]) -> None:
    ranges = list(touched_ranges(sorted(rows, key=lambda row: row.time)))
    minutes = set()
    for touched in ranges:
        assert touched.lower is not None
        assert touched.upper is not None
        assert touched.bounds == "[)"
        count, rest = divmod(touched.upper - touched.lower, MINUTE)
        assert not rest
        minutes |= {touched.lower + at * MINUTE for at in range(count)}
    assert minutes == {row.time.astimezone(UTC).replace(second=0, microsecond=0) for row in rows}


@pytest.mark.parametrize("year", [1, 1969, 2024, 9999])
def test_the_last_microsecond_of_a_minute_touches_that_minute(year: int) -> None:
    """As a float the number of seconds since 1970 would be rounded to the next minute."""
    minute = datetime(year, 6, 1, 12, 0, tzinfo=UTC)
    (touched,) = touched_ranges([reading_of("a", minute + MINUTE - timedelta(microseconds=1), 1.0)])
    assert (touched.lower, touched.upper) == (minute, minute + MINUTE)


@given(batches())
def test_touched_ranges_neither_meet_nor_overlap(rows: list[Reading]) -> None:
    ranges = list(touched_ranges(sorted(rows, key=lambda row: row.time)))
    for before, after in pairwise(ranges):
        assert before.upper is not None
        assert after.lower is not None
        assert before.upper < after.lower


@given(batches())
def test_a_batch_is_split_into_few_parts_that_hold_each_reading_once(rows: list[Reading]) -> None:
    parts = split_at_jumps(rows)
    assert sorted(at for part in parts for at in part) == list(range(len(rows)))
    assert all(parts)
    assert len(parts) <= MAX_TRANSACTIONS


@given(batches())
def test_parts_follow_in_time_with_a_jump_between_and_none_inside_unless_all_are_used(rows: list[Reading]) -> None:
    parts = [[rows[at].time for at in part] for part in split_at_jumps(rows)]
    between = [after[0] - before[-1] for before, after in pairwise(parts)]
    inside = [after - before for part in parts for before, after in pairwise(part)]
    assert all(gap > JUMP for gap in between)
    assert all(gap >= timedelta(0) for gap in inside)
    widest = max(inside, default=timedelta(0))
    assert widest <= (JUMP if len(parts) < MAX_TRANSACTIONS else min(between))


@given(batches(nearby.map(lambda time: time.replace(minute=0, second=0))))
def test_splitting_keeps_the_order_of_a_key(rows: list[Reading]) -> None:
    parts = split_at_jumps(rows)
    assert one_by_one([rows[at] for part in parts for at in part]) == one_by_one(rows)
    keys = [{(rows[at].sensor_id, rows[at].time) for at in part} for part in parts]
    assert sum(map(len, keys)) == len(set().union(*keys))


def test_nothing_is_split_into_nothing() -> None:
    assert split_at_jumps([]) == []


def test_a_jump_is_more_than_an_hour() -> None:
    rows = [reading_of("a", START, 1.0), reading_of("a", START + JUMP, 1.0)]
    assert split_at_jumps(rows) == [[0, 1]]
    rows.append(reading_of("a", START + 2 * JUMP + timedelta(microseconds=1), 1.0))
    assert split_at_jumps(rows) == [[0, 1], [2]]


@pytest.mark.parametrize("first", [EARLIEST, START])
def test_a_part_has_at_most_a_hundred_weeks(first: datetime) -> None:
    """Half a week apart, so that each week is there twice; the widest jumps are the first ones."""
    rows = [reading_of("a", first + at * timedelta(days=3.5), 1.0) for at in range(500)]
    parts = split_at_jumps(rows)
    assert [at for part in parts for at in part] == list(range(500))
    weeks = [{(rows[at].time - EPOCH) // timedelta(weeks=1) for at in part} for part in parts]
    assert max(map(len, weeks)) == MAX_WEEKS
    assert len(parts) <= MAX_TRANSACTIONS + len(set().union(*weeks)) // MAX_WEEKS


def test_counts_of_parts_add_up() -> None:
    whole = WriteResult()
    whole.add(WriteResult(inserted=1, updated=2, unchanged=3))
    whole.add(WriteResult(inserted=10, merged=True))
    whole.add(WriteResult(unchanged=5))
    assert (whole.inserted, whole.updated, whole.unchanged, whole.merged) == (11, 2, 8, True)
