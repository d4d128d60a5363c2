"""Sums over the progress of files."""

from __future__ import annotations

from collections import Counter

from services.producer.job import Tally
from services.producer.progress import Progress


def test_the_difference_of_two_tallies_is_what_was_done_between() -> None:
    before = Tally.of([Progress(url="a", rows=10, sent=8, skipped={"no_time": 2}), Progress(url="b")])
    now = Tally.of(
        [
            Progress(url="a", rows=30, sent=25, skipped={"no_time": 4, "bad_time": 1}, doubtful={"ambiguous": 3}),
            Progress(url="b", rows=5, sent=5, done=True),
        ]
    )
    assert now - before == Tally(25, 22, 1, Counter(no_time=2, bad_time=1), Counter(ambiguous=3))
    assert now - now == Tally.of([])
