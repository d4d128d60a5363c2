"""Which windows etl refreshes in one step: little at once, the newest first, and in the end all that was touched.

And what the intervals are made of.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.etl.rollup import minutes_pay
from services.etl.summaries import MAX_WINDOWS, NEAR, Window, join_near, take_newest

START = datetime(2024, 3, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


@st.composite
def disjoint_windows(draw: st.DrawFn) -> list[Window]:
    """Windows by time with gaps between them."""
    steps = draw(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 60)), max_size=60))
    windows: list[Window] = []
    at = START
    for gap, length in steps:
        begin = at + gap * MINUTE
        at = begin + length * MINUTE
        windows.append((begin, at))
    return windows


def minutes_of(windows: list[Window]) -> set[datetime]:
    return {start + at * MINUTE for start, end in windows for at in range((end - start) // MINUTE)}


@given(disjoint_windows())
def test_joined_windows_cover_the_given_ones_and_close_no_wide_gap(windows: list[Window]) -> None:
    joined = join_near(windows)
    assert minutes_of(windows) <= minutes_of(joined)
    assert all(after[0] - before[1] > NEAR for before, after in pairwise(joined))
    gaps = [(before[1], after[0]) for before, after in pairwise(windows)]
    assert minutes_of(joined) - minutes_of(windows) == minutes_of([gap for gap in gaps if gap[1] - gap[0] <= NEAR])


@given(disjoint_windows(), st.integers(1, 2000))
def test_step_by_step_all_is_taken_from_the_newest_to_the_oldest(windows: list[Window], most: int) -> None:
    left, steps = windows, 0
    while left:
        step = take_newest(left, most * MINUTE)
        cut = step.cut or START
        assert 0 < len(step.windows) <= MAX_WINDOWS
        assert sum((end - start for start, end in step.windows), timedelta(0)) <= most * MINUTE
        assert minutes_of(left) - minutes_of(step.windows) == {minute for minute in minutes_of(left) if minute < cut}
        left = [(start, min(end, cut)) for start, end in left if start < cut]
        assert step.rest_end == (left[-1][1] if left else None)
        steps += 1
    assert steps <= len(windows) + sum((end - start) // MINUTE for start, end in join_near(windows)) // most


def test_nothing_is_nothing() -> None:
    assert take_newest([], MINUTE).windows == []


def test_an_hour_of_little_is_joined_where_there_are_many_windows() -> None:
    """A week of readings once an hour is one refresh and not a hundred; a few late ones stay apart."""
    hourly = [(START + at * 60 * MINUTE, START + (at * 60 + 1) * MINUTE) for at in range(7 * 24)]
    assert len(take_newest(hourly, timedelta(days=7)).windows) == 1
    assert len(take_newest(hourly[:10], timedelta(days=7)).windows) == 10


@pytest.mark.parametrize(
    ("rate", "have_paid", "pay"),
    [(60.0, False, True), (5.0, False, False), (5.0, True, True), (1.0, True, False), (None, True, True)],
)
def test_minutes_pay_where_readings_are_dense_and_no_change_is_made_for_little(
    rate: float | None, have_paid: bool, pay: bool
) -> None:
    assert minutes_pay(rate, have_paid=have_paid) == pay
