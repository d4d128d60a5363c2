"""Which windows etl refreshes: few, and never less than what was touched."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from services.etl.summaries import Window, join_nearest

START = datetime(2024, 3, 1, tzinfo=UTC)


@st.composite
def disjoint_windows(draw: st.DrawFn) -> list[Window]:
    """Windows by time with gaps between them."""
    steps = draw(st.lists(st.tuples(st.integers(1, 500), st.integers(1, 60)), max_size=60))
    windows: list[Window] = []
    at = START
    for gap, length in steps:
        begin = at + timedelta(minutes=gap)
        at = begin + timedelta(minutes=length)
        windows.append((begin, at))
    return windows


@given(disjoint_windows(), st.integers(1, 40))
def test_joined_windows_cover_the_given_ones_and_are_few(windows: list[Window], most: int) -> None:
    joined = join_nearest(windows, most)
    assert len(joined) == min(most, len(windows))
    for start, end in windows:
        assert sum(first <= start and end <= last for first, last in joined) == 1
    starts, ends = {start for start, _ in windows}, {end for _, end in windows}
    assert all(start in starts and end in ends for start, end in joined)


@given(disjoint_windows(), st.integers(1, 40))
def test_joined_windows_are_disjoint_and_in_order(windows: list[Window], most: int) -> None:
    joined = join_nearest(windows, most)
    assert all(start < end for start, end in joined)
    assert all(before[1] < after[0] for before, after in pairwise(joined))


@given(disjoint_windows(), st.integers(1, 40))
def test_the_gaps_that_are_closed_are_the_narrowest(windows: list[Window], most: int) -> None:
    kept = {after[0] - before[1] for before, after in pairwise(join_nearest(windows, most))}
    gaps = sorted(after[0] - before[1] for before, after in pairwise(windows))
    closed = gaps[: max(0, len(windows) - most)]
    assert not closed or not kept or closed[-1] <= min(kept)


@given(disjoint_windows())
def test_few_windows_stay_as_they_are(windows: list[Window]) -> None:
    assert join_nearest(windows, max(1, len(windows))) == windows
