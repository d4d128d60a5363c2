"""The figures of `make bench` and their goals."""

from __future__ import annotations

import pytest

from tests.benchmarks.bench import MEASUREMENTS, NATIVE
from tests.benchmarks.goals import GROUPS, KEYS, Run, chosen, markdown, table

NATIVELY = Run("native", "a machine", {"drain_rows_s": 400_000.4, "drain_ratio": 0.8, "drain_rss_mb": 150.0})
EMBEDDED = Run("embedded", "a laptop", {"drain_rows_s": 200_000.0, "drain_ratio": 0.8, "end_to_end_ratio": 0.1})


def test_each_figure_is_measured_and_has_one_name() -> None:
    assert set(MEASUREMENTS) == set(GROUPS)
    assert set(GROUPS) > NATIVE
    assert len(KEYS) == sum(map(len, GROUPS.values()))


def test_figures_are_chosen_by_their_names_and_those_of_their_groups() -> None:
    assert chosen([]) == frozenset()
    assert chosen(["merge_ratio", "backfill"]) == {"merge_ratio", "backfill_refreshes_per_interval"}
    with pytest.raises(ValueError, match=r"^no such figure: speed; groups: drain, "):
        chosen(["speed"])


@pytest.mark.parametrize(
    ("name", "kind", "value", "judged"),
    [
        ("drain_ratio", "native", 0.85, ""),
        ("drain_ratio", "native", 0.8496, ""),  # as it is shown
        ("drain_ratio", "native", 0.84, "missed"),
        ("drain_ratio", "embedded", 0.84, ""),
        ("drain_rss_mb", "native", 201, "missed"),
        ("drain_rss_mb", "native", 200, ""),
        ("drain_rows_s", "native", 1, ""),
    ],
)
def test_a_goal_is_judged_by_the_figure_that_is_shown(name: str, kind: str, value: float, judged: str) -> None:
    assert KEYS[name].judge(kind, value) == judged


def test_the_table_names_what_is_missed() -> None:
    assert [line.split() for line in table(NATIVELY).splitlines()] == [
        ["a", "machine"],
        ["drain_rows_s", "400,000/s"],
        ["drain_ratio", "0.80", "≥", "0.85", "missed"],
        ["drain_rss_mb", "150", "MB", "≤", "200", "MB"],
    ]


def test_readme_shows_the_runs_side_by_side() -> None:
    assert markdown([NATIVELY, EMBEDDED]).splitlines() == [
        "* native: a machine",
        "* embedded: a laptop",
        "",
        "| | native | goal | embedded | goal |",
        "|---|---|---|---|---|",
        "| one consumer drains a topic, JSON | 400,000/s |  | 200,000/s |  |",
        "| — over the floor | 0.80 | ≥ 0.85, missed | 0.80 | ≥ 0.75 |",
        "| — its memory | 150 MB | ≤ 200 MB |  |  |",
        "| Parquet to both summaries, all services at once, over the floor, JSON |  |  | 0.10 | ≥ 0.38, missed |",
    ]
