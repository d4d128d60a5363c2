"""What the pipeline must hold, in plain Python: the stored readings, the summaries, and how far back both may change.

It shares no code with the pipeline on purpose: an error there must not hide here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from services.local.check import Key, Row, differing, floor, summarised

NEVER = datetime.min.replace(tzinfo=UTC)  # PostgreSQL's -infinity
ALWAYS = datetime.max.replace(tzinfo=UTC)
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
class State:
    """What etl has decided of a summary: its width, and how far back it is closed and frozen."""

    minutes: int | None = None
    closed: datetime = NEVER
    frozen: datetime = NEVER


@dataclass(slots=True)
class Summary:
    """One summary table. ``kept`` are the rows of frozen intervals: they never change again."""

    minutes: int | None = None
    frozen: datetime = NEVER
    kept: Rows = field(default_factory=dict)
    suspect: set[Key] = field(default_factory=set)  # changed by hand, not yet known to be repaired


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

    def at_width(self, metric: str, minutes: int | None, start: datetime, end: datetime = ALWAYS) -> Rows:
        """The rows of the intervals that begin from ``start`` up to ``end``, from the stored readings."""
        if minutes is None:
            return {}
        rows = summarised(self.rows, METRICS.index(metric), minutes)
        return {key: row for key, row in rows.items() if start <= key[1] < end}

    def recomputed(self, metric: str) -> Rows:
        """The summary's rows from its first interval that is not frozen."""
        state = self.summaries[metric]
        return self.at_width(metric, state.minutes, state.frozen)

    def expected(self, metric: str) -> Rows:
        """The whole summary as it must be once nothing is queued."""
        return self.summaries[metric].kept | self.recomputed(metric)

    def freeze(self, metric: str, edge: datetime, stored: Rows) -> None:
        """Intervals that begin before ``edge`` stay as they are stored."""
        state = self.summaries[metric]
        if edge > state.frozen:
            state.kept |= {key: row for key, row in stored.items() if state.frozen <= key[1] < edge}
            state.suspect = {key for key in state.suspect if key[1] >= edge}
            state.frozen = edge

    def follow(self, metric: str, found: State, stored: Rows) -> set[Key]:
        """Etl has decided ``found``; those rows that it froze though they are wrong.

        They must be what the readings give: at the width before and, from where an interval of both begins, at the
        new one.
        """
        state = self.summaries[metric]
        frozen = {key: row for key, row in stored.items() if state.frozen <= key[1] < found.frozen}
        change = found.frozen
        if state.minutes is None:
            change = state.frozen
        elif found.minutes is not None and found.minutes != state.minutes:
            width = timedelta(minutes=found.minutes)
            new = [key[1] for key, row in frozen.items() if key not in state.suspect and row[0] - key[1] == width]
            change = floor(min(new), math.lcm(state.minutes, found.minutes)) if new else change
        wanted = self.at_width(metric, state.minutes, state.frozen, change)
        wanted |= self.at_width(metric, found.minutes, change, found.frozen)
        wrong = differing(frozen, wanted) - state.suspect
        self.freeze(metric, found.frozen, stored)
        state.minutes = found.minutes
        return wrong

    def forget(self, chunks: Iterable[datetime]) -> None:
        """The raw readings of these chunks are gone."""
        gone = set(chunks)
        self.rows = {key: values for key, values in self.rows.items() if chunk_of(key[1]) not in gone}
