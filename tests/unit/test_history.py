"""Where history is closed and frozen: each transition, and that none of them breaks what must always hold."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.etl.history import Boundaries, Lost, expired_before
from services.etl.rollup import ORIGIN, START, bucket_ceil, bucket_floor
from services.etl.summaries import whole_intervals
from tests.fix_stack import ROOT

DAY = timedelta(days=1)
WEEK = timedelta(days=7)
HOUR = timedelta(hours=1)
TEN = timedelta(minutes=10)
NOON = datetime(2026, 3, 4, 12, tzinfo=UTC)  # a Wednesday
MONDAY = datetime(2026, 3, 2, tzinfo=UTC)

widths = st.sampled_from([timedelta(minutes=minutes) for minutes in (1, 7, 10, 60, 1440, 7 * 1440, 366 * 1440)])
times = st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - see timezones
moments = st.one_of(st.just(START), times)


@st.composite
def boundaries(draw: st.DrawFn) -> Boundaries:
    width = draw(widths)
    frozen, closed = sorted(bucket_floor(width, draw(moments)) for _ in range(2))
    return Boundaries(width, closed, frozen)


@given(widths, times)
def test_a_time_lies_between_the_start_of_its_interval_and_the_next(width: timedelta, at: datetime) -> None:
    floor, ceil = bucket_floor(width, at), bucket_ceil(width, at)
    assert floor <= at <= ceil
    assert ceil - floor == (timedelta(0) if floor == at else width)
    assert (floor - ORIGIN) % width == timedelta(0)


def test_a_week_begins_on_monday_and_the_start_of_all_time_stays() -> None:
    assert bucket_floor(WEEK, NOON) == MONDAY
    assert bucket_ceil(WEEK, NOON) == MONDAY + WEEK
    assert bucket_ceil(WEEK, MONDAY) == MONDAY
    assert bucket_floor(WEEK, START) == bucket_ceil(WEEK, START) == START


def test_nothing_is_frozen_that_is_not_closed() -> None:
    with pytest.raises(ValueError, match="frozen before"):
        Boundaries(HOUR, closed=NOON, frozen=NOON + HOUR)


def test_history_is_closed_up_to_the_boundary_and_no_further_back() -> None:
    assert Boundaries(HOUR).close(NOON, NOON) == Boundaries(HOUR, closed=NOON)
    assert Boundaries(HOUR, closed=NOON).close(NOON - HOUR, NOON) == Boundaries(HOUR, closed=NOON)


def test_what_is_kept_is_never_closed() -> None:
    assert Boundaries(HOUR).close(NOON, NOON - timedelta.resolution) == Boundaries(HOUR)


def test_what_is_closed_is_frozen_and_nothing_else() -> None:
    assert Boundaries(HOUR, closed=NOON, frozen=MONDAY).freeze() == Boundaries(HOUR, NOON, NOON)
    assert Boundaries(HOUR).freeze() == Boundaries(HOUR)


def test_where_another_width_takes_over_all_before_is_closed_and_frozen() -> None:
    assert Boundaries(HOUR, closed=NOON).switch(NOON + HOUR) == Boundaries(HOUR, NOON + HOUR, NOON + HOUR)
    assert Boundaries(HOUR).switch(START) == Boundaries(HOUR)


@pytest.mark.parametrize(
    ("lost", "kept_since", "frozen"),
    [
        pytest.param(Lost(), NOON, START, id="nothing was dropped"),
        pytest.param(Lost(ended=MONDAY + TEN), NOON, MONDAY + HOUR, id="to the end of the interval it ended in"),
        pytest.param(Lost(ended=MONDAY), NOON, MONDAY, id="or to its end, where an interval begins there"),
        pytest.param(Lost(unfinished=MONDAY + TEN), NOON, MONDAY, id="what came after the drop stays open"),
        pytest.param(Lost(MONDAY + HOUR, MONDAY), NOON, MONDAY + HOUR, id="the later of both"),
        pytest.param(Lost(ended=NOON + DAY), MONDAY + TEN, MONDAY, id="whole intervals of what is kept stay open"),
    ],
)
def test_a_chunk_that_somebody_dropped_freezes_the_intervals_it_was_part_of(
    lost: Lost, kept_since: datetime, frozen: datetime
) -> None:
    assert Boundaries(HOUR).lose(lost, kept_since) == Boundaries(HOUR, frozen, frozen)


def test_a_chunk_that_was_dropped_long_ago_moves_nothing() -> None:
    now = Boundaries(HOUR, closed=NOON, frozen=MONDAY)
    assert now.lose(Lost(ended=MONDAY - DAY), NOON) == now


@given(boundaries(), times, moments, moments, times)
def test_no_transition_reopens_anything_and_each_leaves_boundaries_of_intervals(
    before: Boundaries, to: datetime, ended: datetime, unfinished: datetime, kept_since: datetime
) -> None:
    boundary = bucket_floor(before.width, to)
    for after in (
        before.close(boundary, kept_since),
        before.freeze(),
        before.switch(boundary),
        before.lose(Lost(ended, unfinished), kept_since),
    ):
        assert after.closed >= before.closed
        assert after.frozen >= before.frozen
        assert after.closed >= after.frozen
        for at in (after.closed, after.frozen):
            assert at == bucket_floor(before.width, at)
    for after in (before.close(boundary, kept_since), before.lose(Lost(ended, unfinished), kept_since)):
        assert after.closed <= max(before.closed, kept_since)


def test_a_chunk_has_expired_when_each_of_its_intervals_has_at_every_width() -> None:
    ends = [MONDAY, MONDAY + DAY, MONDAY + 2 * DAY]
    assert expired_before(ends, [HOUR, DAY], MONDAY + DAY) == MONDAY + DAY
    assert expired_before(ends, [HOUR, DAY], MONDAY + DAY - timedelta.resolution) == MONDAY
    assert expired_before(ends, [HOUR, WEEK], MONDAY + 2 * DAY) == MONDAY
    assert expired_before(ends[1:], [HOUR, WEEK], MONDAY + WEEK - HOUR) == START
    assert expired_before([], [HOUR], NOON) == START


def test_no_statement_elsewhere_moves_a_boundary() -> None:
    moves = re.compile(r"\b(closed|frozen)_before\s*=(?!=)")
    found = [path.name for path in (ROOT / "services").rglob("*.sql") if moves.search(path.read_text(encoding="utf-8"))]
    assert found == ["history.sql"]


def test_windows_are_widened_to_whole_intervals_that_are_not_frozen() -> None:
    minute = timedelta(minutes=1)
    windows = [(NOON + start * minute, NOON + end * minute) for start, end in ((1, 2), (9, 10), (12, 31), (50, 51))]
    found = whole_intervals(windows, TEN, START)
    assert found == [(NOON, NOON + 4 * TEN), (NOON + 5 * TEN, NOON + 6 * TEN)]
    assert whole_intervals(windows, TEN, NOON + 2 * TEN) == [(NOON + 2 * TEN, NOON + 4 * TEN), found[1]]
    assert whole_intervals(windows, TEN, NOON + 6 * TEN) == []
