"""What the pipeline must hold, in plain Python: the stored readings, the summaries, and how far back both may change.

It shares no code with the pipeline on purpose: an error there must not hide here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from services.local.check import Key, Row, floor, summarised

NEVER = datetime.min.replace(tzinfo=UTC)  # PostgreSQL's -infinity
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)  # where a hypertable counts its chunks from
CHUNK = timedelta(days=7)
METRICS = ("temperature", "humidity")

Values = tuple[float | None, float | None]
Rows = dict[Key, Row]


def ceil(time: datetime, minutes: int) -> datetime:
    """The first start of an interval that is not before ``time``."""
    start = floor(time, minutes)
    return start if start == time else start + timedelta(minutes=minutes)


def chunk_of(time: datetime) -> datetime:
    """The start of the chunk that holds ``time``."""
    return EPOCH + (time - EPOCH) // CHUNK * CHUNK


def minute_of(time: datetime) -> datetime:
    """``time`` without its seconds."""
    return floor(time, 1)


@dataclass(frozen=True, slots=True)
class Stage:
    """One state of a metric on the way of an etl run: its width, and how far back it is closed and frozen."""

    minutes: int | None
    closed: datetime = NEVER
    frozen: datetime = NEVER


@dataclass(slots=True)
class Summary:
    """One summary table. ``kept`` are the rows of frozen intervals: they never change again."""

    minutes: int | None = None
    closed: datetime = NEVER
    frozen: datetime = NEVER
    kept: Rows = field(default_factory=dict)
    suspect: set[Key] = field(default_factory=set)  # changed by hand, not yet known to be repaired

    @property
    def stage(self) -> Stage:
        """The state now."""
        return Stage(self.minutes, self.closed, self.frozen)


@dataclass(slots=True)
class Model:
    """All of it."""

    rows: dict[Key, Values] = field(default_factory=dict)
    summaries: dict[str, Summary] = field(default_factory=lambda: {metric: Summary() for metric in METRICS})
    refreshed_to: datetime = NEVER  # no refresh has gone beyond the interval that holds it

    def store(self, sensor: str, time: datetime, temperature: float | None, humidity: float | None) -> str:
        """Store one reading; whether it was new, changed or the same."""
        before = self.rows.get((sensor, time))
        stored = before or (None, None)
        after = (
            stored[0] if temperature is None else temperature,
            stored[1] if humidity is None else humidity,
        )
        self.rows[sensor, time] = after
        return "inserted" if before is None else "unchanged" if before == after else "updated"

    def recomputed(self, metric: str) -> Rows:
        """The summary's rows from its first interval that is not frozen, from the stored readings."""
        state = self.summaries[metric]
        if state.minutes is None:
            return {}
        rows = summarised(self.rows, METRICS.index(metric), state.minutes)
        return {key: row for key, row in rows.items() if key[1] >= state.frozen}

    def expected(self, metric: str) -> Rows:
        """The whole summary as it must be once nothing is queued."""
        return self.summaries[metric].kept | self.recomputed(metric)

    def freeze(self, metric: str, edge: datetime, rows: Rows | None = None) -> None:
        """Intervals that begin before ``edge`` stay as ``rows`` are, or as they must be now."""
        state = self.summaries[metric]
        if edge > state.frozen:
            rows = self.expected(metric) if rows is None else rows
            state.kept |= {key: row for key, row in rows.items() if state.frozen <= key[1] < edge}
            state.frozen = edge

    def advance(self, metric: str, found: Stage, edge: datetime) -> None:
        """Follow etl to a stage that it was found in; ``edge`` is where a new width takes over."""
        state = self.summaries[metric]
        if found.minutes != state.minutes and state.minutes is not None:
            self.freeze(metric, edge)
            state.suspect = {key for key in state.suspect if key[1] < edge}
        state.minutes = found.minutes
        self.freeze(metric, found.frozen)
        state.closed = found.closed

    def forget(self, chunks: Iterable[datetime]) -> None:
        """The raw readings of these chunks are gone."""
        gone = set(chunks)
        self.rows = {key: values for key, values in self.rows.items() if chunk_of(key[1]) not in gone}

    def width_after(self, metric: str, target: int, limit: datetime) -> int:
        """The width after an etl run that is asked for ``target``: history is closed up to ``limit`` at most."""
        state = self.summaries[metric]
        return target if state.minutes is None or self.edge(metric, target) <= limit else state.minutes

    def stages(self, metric: str, target: int, expired: Iterable[datetime]) -> list[Stage]:
        """What an etl run goes through: see what was dropped, change the width, drop the ``expired`` chunks."""
        state = self.summaries[metric]
        minutes, closed, frozen = state.minutes or target, max(state.closed, state.frozen), state.frozen
        found = [state.stage, Stage(minutes, state.closed, frozen), Stage(minutes, closed, frozen)]
        if minutes != target:
            if closed != NEVER:
                closed = ceil(closed, math.lcm(minutes, target))
                found.append(Stage(minutes, closed, frozen))
            minutes, frozen = target, closed
            found.append(Stage(minutes, closed, frozen))
        ends = [start + CHUNK for start in expired]
        if ends:
            closed = max(closed, ceil(max(ends), minutes))
            found += [Stage(minutes, closed, frozen), Stage(minutes, closed, closed)]
        return found

    def edge(self, metric: str, target: int) -> datetime:
        """Where the width ``target`` takes over from the one of now."""
        state = self.summaries[metric]
        closed = max(state.closed, state.frozen)
        return NEVER if closed == NEVER else ceil(closed, math.lcm(state.minutes or target, target))
