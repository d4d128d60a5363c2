"""What is measured, with the goal of each figure, and how it is shown: one table for the code and for docs/speed.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Range = tuple[float, float]  # the least and the most that are allowed
Goal = Range | None


def at_least(value: float) -> Range:
    """The goal of a figure that should be large."""
    return value, float("inf")


def at_most(value: float) -> Range:
    """The goal of a figure that should be small."""
    return 0.0, value


@dataclass(frozen=True, slots=True)
class Key:
    """One figure: what docs/speed.md calls it, how it is written, and its goals on both kinds of servers."""

    name: str
    what: str
    form: str
    native: Goal = None
    embedded: Goal = None

    def goal(self, kind: str) -> Goal:
        """The goal on this kind of servers."""
        return self.native if kind == "native" else self.embedded

    def judge(self, kind: str, value: float) -> str:
        """``missed`` or nothing, for the figure as it is shown."""
        least, most = self.goal(kind) or at_least(0)
        return "" if least <= round(value, 2) <= most else "missed"

    def show(self, value: float) -> str:
        """The figure as docs/speed.md has it."""
        return self.form.format(value)

    def show_goal(self, kind: str) -> str:
        """The goal likewise, or nothing."""
        goal = self.goal(kind)
        if goal is None:
            return ""
        least, most = goal
        return f"≥ {self.show(least)}" if least else f"≤ {self.show(most)}"


RATE, RATIO, TIMES, SECONDS, MB = "{:,.0f}/s", "{:.2f}", "{:.0f} times", "{:.2f} s", "{:.0f} MB"


def _density(name: str, native: float, embedded: float | None = None) -> tuple[Key, ...]:
    return (
        Key(f"{name}_summarising_s", f"a reading every {name}: summarising a million", SECONDS,
            at_most(native), None if embedded is None else at_most(embedded)),
        Key(f"{name}_raw_mb", "— disk of a million raw readings", MB),
        Key(f"{name}_aggregates_mb", "— of the aggregates", MB),
        Key(f"{name}_summaries_mb", "— of the summaries", MB),
        Key(f"{name}_disk_ratio", "— aggregates and summaries over raw", RATIO,
            at_most(0.5) if name == "minute" else None),
    )  # fmt: skip


# By what measures them.
GROUPS: dict[str, tuple[Key, ...]] = {
    "drain": (
        Key("copy_floor", "binary COPY of psycopg's rows, 10,000 per commit: **the floor**", RATE),
        Key("encoded_floor", "COPY of bytes that were encoded before, one connection", RATE),
        Key("encoded_two_floor", "COPY of bytes that were encoded before, two connections", RATE),
        Key("upsert_floor", "COPY to a temporary table and `ON CONFLICT`, onto rows that exist", RATE),
        Key("drain_rows_s", "one consumer drains a topic, JSON", RATE),
        Key("drain_ratio", "— over the floor", RATIO, at_least(0.85), at_least(0.75)),
        Key("drain_over_encoded", "— over the encoded bytes, one connection", RATIO),
        Key("drain_over_encoded_two", "— over the encoded bytes, two connections", RATIO),
        Key("drain_cpu_s_per_million", "— its CPU per million, start included", SECONDS, at_most(1.6), at_most(2.8)),
        Key("drain_rss_mb", "— its memory", MB, at_most(200), at_most(207)),
        Key("drain_blocks_rows_s", "one consumer drains a topic, Arrow blocks", RATE),
        Key("drain_blocks_ratio", "— over the floor", RATIO, at_least(1.2)),
        Key("drain_blocks_cpu_s_per_million", "— its CPU per million, start included", SECONDS),
        Key("drain_blocks_rss_mb", "— its memory", MB),
        Key("merge_ratio", "a full replay, over the upsert", RATIO, at_least(1), at_least(1)),
        Key("two_consumers_ratio", "two consumers over one", RATIO, at_least(1), at_least(0.97)),
        Key("malformed_ratio", "1 % malformed messages, over a clean topic", RATIO, at_least(0.7), at_least(0.7)),
        Key("peer_loop_ratio", "over the loop of the tutorials (`poll`, `json.loads`, `executemany`)", TIMES,
            at_least(6), at_least(6)),
    ),
    "produce": (
        Key("produce_rows_s", "producer, transactions on, JSON", RATE),
        Key("produce_over_drain", "— over the consumer", RATIO, at_least(1.2), at_least(1.2)),
        Key("produce_rss_mb", "— its memory, 10 million rows", MB, at_most(250), at_most(250)),
    ),
    "produce_blocks": (
        Key("produce_blocks_rows_s", "producer, transactions on, Arrow blocks", RATE),
        Key("produce_blocks_rss_mb", "— its memory, 10 million rows", MB, at_most(250), at_most(250)),
    ),
    "end_to_end": (
        Key("end_to_end_ratio", "Parquet to both summaries, all services at once, over the floor, JSON", RATIO,
            at_least(0.45), at_least(0.38)),
        Key("end_to_end_rss_mb", "— memory of the consumer", MB, at_most(200), at_most(207)),
    ),
    "end_to_end_blocks": (
        Key("end_to_end_blocks_ratio", "the same, Arrow blocks", RATIO, at_least(0.70)),
        Key("end_to_end_blocks_rss_mb", "— memory of the consumer", MB),
    ),
    "end_to_end_minute": (
        Key("end_to_end_minute_ratio", "the same, JSON, each sensor reports once a minute", RATIO, at_least(0.35)),
        Key("end_to_end_minute_rss_mb", "— memory of the consumer", MB),
    ),
    "freshness": (
        Key("freshness_p50_s", "from publishing to the summary at 20,000/s, 200 sensors: median", SECONDS),
        Key("freshness_p99_s", "— 99 of 100", SECONDS, at_most(1.5), at_most(2.4)),
        Key("freshness_growth", "— median of the last third of the time over that of the first", RATIO, at_most(1.2)),
        Key("freshness_end_over_begin", "— at the end of an interval over its beginning", RATIO,
            at_most(1.3), at_most(1.3)),
    ),
    "freshness_of_many": (
        Key("freshness_of_many_p99_s", "the same, 10,000 sensors: 99 of 100", SECONDS, at_most(2.5)),
        Key("freshness_of_many_growth", "— median of the last third of the time over that of the first", RATIO,
            at_most(1.2)),
    ),
    "history_cost": (
        Key("refresh_small_change_s", "one small change, a million readings of history", "{:.3f} s"),
        Key("history_cost_ratio", "— with ten times the history, over that", RATIO, at_most(1.2), at_most(1.05)),
    ),
    "backfill": (
        Key("backfill_refreshes_per_interval", "a year in random order: refreshes of each interval", RATIO,
            at_most(1.3), at_most(1.3)),
    ),
    "second": _density("second", 0.6, 0.8),
    "minute": _density("minute", 2, 6.8),  # embedded: half of what it was before
    "hour": _density("hour", 10),
    "wide": (
        Key("wide_floor_ratio", "binary COPY of rows with ten measurements, over that of two", RATIO),
        Key("wide_drain_ratio", "one consumer drains readings with ten, over two, JSON", RATIO),
        Key("wide_ratio", "— over what it costs COPY", RATIO, at_least(1)),
        Key("wide_drain_blocks_ratio", "the same, Arrow blocks", RATIO),
        Key("wide_blocks_ratio", "— over what it costs COPY", RATIO, at_least(1)),
    ),
}  # fmt: skip

KEYS = {key.name: key for keys in GROUPS.values() for key in keys}


def chosen(names: Iterable[str]) -> frozenset[str]:
    """The figures that are named, or whose group is. Raises ValueError where a name is neither."""
    found: set[str] = set()
    for name in names:
        if name not in KEYS and name not in GROUPS:
            raise ValueError(f"no such figure: {name}; groups: {', '.join(GROUPS)}; figures: {', '.join(KEYS)}")
        found |= {key.name for key in GROUPS[name]} if name in GROUPS else {name}
    return frozenset(found)


@dataclass(frozen=True, slots=True)
class Run:
    """One run: ``kind`` is native or embedded, ``where`` names machine, servers and date."""

    kind: str
    where: str
    results: Mapping[str, float]


def table(run: Run) -> str:
    """What a person at a terminal sees."""
    lines = [run.where]
    for name, value in run.results.items():
        key = KEYS[name]
        judged = f"{key.show_goal(run.kind):12} {key.judge(run.kind, value)}"
        lines.append(f"  {name:34} {key.show(value):>14}   {judged}".rstrip())
    return "\n".join(lines)


def markdown(runs: Sequence[Run]) -> str:
    """The figures of docs/speed.md: the runs side by side, each figure with its goal."""
    head = "".join(f" {run.kind} | goal |" for run in runs)
    lines = [*(f"* {run.kind}: {run.where}" for run in runs), "", f"| |{head}", f"|---|{'---|---|' * len(runs)}"]
    for key in KEYS.values():
        if not any(key.name in run.results for run in runs):
            continue
        cells = []
        for run in runs:
            value = run.results.get(key.name)
            shown = "" if value is None else key.show(value)
            missed = "" if value is None else key.judge(run.kind, value)
            goal = key.show_goal(run.kind) if shown else ""
            cells.append(f" {shown} | {', '.join(filter(None, (goal, missed)))} |")
        lines.append(f"| {key.what} |{''.join(cells)}")
    return "\n".join(lines)
