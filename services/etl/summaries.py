"""The refresh and the mirror: exactly the intervals that changed, whatever dies in between.

The queue drives the work, not the clock: an interval is recomputed because a reading in it was committed, so a
quiet stream gets its last interval and a reading of last year gets its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise

from psycopg import Connection, sql
from psycopg.types.multirange import Multirange

from services.core.database import queries
from services.core.logs import fields
from services.core.monitoring import DATABASE
from services.etl.aggregates import Aggregates, statement
from services.etl.instruments import (
    INTERVALS_REFRESHED,
    MIRROR_SECONDS,
    QUEUE_ROWS_DONE,
    REFRESH_SECONDS,
    SUMMARY_ROWS_CHANGED,
)
from services.etl.metrics import BASE, Metric

SQL = queries("services.etl")

# A refresh of a wide window recomputes only what TimescaleDB knows to be invalid, so joining near ranges costs
# little, and thousands of calls cost much.
MOST_WINDOWS = 32

log = logging.getLogger("etl")

Window = tuple[datetime, datetime]


@dataclass(frozen=True, slots=True)
class Queued:
    """What one look at the queue found: the rows, their merged ranges, and how long the oldest has waited."""

    ids: list[int]
    touched: Multirange[datetime]
    forced: Multirange[datetime]
    age: timedelta


class Summaries:
    """Keeps both summary tables equal to the readings."""

    def __init__(self, connection: Connection, aggregates: Aggregates) -> None:
        self._connection = connection
        self._aggregates = aggregates
        self.are_unsettled = False  # whether the last look at the queue left something to settle
        connection.execute(SQL["prefer_hashing"])
        row = connection.execute(SQL["refresh_has_options"]).fetchone()
        assert row is not None
        # In batches of ten intervals, the default since 2.28, a wide refresh takes many times as long.
        self._options = ", options => '{\"buckets_per_batch\": 0}'" if row[0] else ""

    def refresh_queued(self, *, settled: bool = False) -> int:
        """Bring the summaries up to all that is queued now; returns the number of queue rows that were done.

        ``settled`` leaves out what is of the past and still being loaded. A crash at any point leaves the queue rows
        in place, and the work is repeated.
        """
        started = time.monotonic()
        queued = self._read_queue(settled=settled)
        self._note_dropped_chunks()  # when nothing is queued too: what comes next relies on it
        DATABASE.note_success()
        if queued is None:
            return 0
        intervals = {metric: self._widen(metric, queued.touched) for metric in self._aggregates.all_refreshed()}
        windows = {metric: join_nearest(pieces, MOST_WINDOWS) for metric, pieces in intervals.items()}
        self._refresh_windows(BASE, self._whole_minutes(queued.touched))
        self._refresh_windows(BASE, self._whole_minutes(queued.forced), force=True)
        for metric, wanted in windows.items():
            self._refresh_windows(metric.aggregate, wanted)
            self._refresh_windows(metric.aggregate, self._widen(metric, queued.forced), force=True)
        refreshed = time.monotonic()
        with self._connection.transaction():
            materialized = self._aggregates.materialized()
            changed = {
                metric.name: self._mirror(metric, materialized[metric.aggregate], windows[metric])
                for metric in self._aggregates.current.values()
            }
            self._connection.execute(SQL["delete_queued"], {"ids": queued.ids})
        mirror_s = time.monotonic() - refreshed
        counts = {
            metric: sum((end - start) // metric.width for start, end in pieces) for metric, pieces in intervals.items()
        }
        count(counts, changed, len(queued.ids), mirror_s)
        log.info(
            "summaries_refreshed",
            extra=fields(
                queue_rows=len(queued.ids),
                windows=sum(len(wanted) for wanted in windows.values()),
                intervals=sum(counts.values()),
                summary_rows_changed=sum(changed.values()),
                oldest_s=round(queued.age.total_seconds(), 2),
                refresh_s=round(refreshed - started, 3),
                mirror_s=round(mirror_s, 3),
            ),
        )
        return len(queued.ids)

    def have_settled(self) -> bool:
        """Whether a refresh of what has settled would find any of it."""
        return self._read_queue(settled=True) is not None

    def _refresh_windows(self, aggregate: str, windows: list[Window], *, force: bool = False) -> None:
        for start, end in join_nearest(windows, MOST_WINDOWS):
            self.refresh(aggregate, start, end, force=force)

    def refresh(self, aggregate: str, start: datetime, end: datetime, *, force: bool = False) -> None:
        """Refresh the whole intervals from ``start`` up to ``end``; outside a transaction, as it must be.

        ``force`` recomputes them even where TimescaleDB does not know of a change.
        """
        started = time.monotonic()
        self._connection.execute(
            SQL["refresh"].format(
                aggregate=sql.Literal(aggregate),
                start=sql.Literal(start),
                end=sql.Literal(end),
                force=sql.Literal(force),
                options=sql.SQL(self._options),
            )
        )
        REFRESH_SECONDS.labels(aggregate).observe(time.monotonic() - started)

    def _read_queue(self, *, settled: bool) -> Queued | None:
        row = self._connection.execute(SQL["read_queue"], {"all": not settled}).fetchone()
        assert row is not None
        ids, touched, forced, oldest, now, self.are_unsettled = row
        return None if ids is None else Queued(ids, touched, forced, now - oldest)

    def _note_dropped_chunks(self) -> None:
        """Every time, and not only when a chunk is newly gone: we may have died between the two steps."""
        self._connection.execute(SQL["note_chunks"])
        for metric in self._aggregates.current.values():
            self._connection.execute(SQL["freeze_dropped"], {"metric": metric.name, "width": metric.width})

    def _whole_minutes(self, touched: Multirange[datetime]) -> list[Window]:
        return self._windows("whole_minutes", touched=touched)

    def _widen(self, metric: Metric, touched: Multirange[datetime]) -> list[Window]:
        return self._windows("widen", metric=metric.name, width=metric.width, touched=touched)

    def _windows(self, statement: str, **arguments: object) -> list[Window]:
        row = self._connection.execute(SQL[statement], arguments).fetchone()
        assert row is not None
        return [(piece.lower, piece.upper) for piece in row[0]]

    def _mirror(self, metric: Metric, materialized: sql.Identifier, windows: Sequence[Window]) -> int:
        """Make the summary's rows in the windows equal to those of the table; returns how many changed."""
        changed = 0
        for start, end in windows:
            for name in ("upsert_summary", "delete_vanished"):
                window = {"start": start, "end": end}
                mirror = statement(name, metric, materialized=materialized)
                changed += self._connection.execute(mirror, window).rowcount
        return changed


def count(intervals: dict[Metric, int], changed: dict[str, int], queue_rows: int, mirror_s: float) -> None:
    """Tell the metrics what was committed."""
    for metric, number in intervals.items():
        INTERVALS_REFRESHED.labels(metric.aggregate).inc(number)
    for name, rows in changed.items():
        SUMMARY_ROWS_CHANGED.labels(name).inc(rows)
    QUEUE_ROWS_DONE.inc(queue_rows)
    MIRROR_SECONDS.observe(mirror_s)


def join_nearest(windows: list[Window], most: int) -> list[Window]:
    """At most ``most`` windows (by time, disjoint) that cover the given ones: the narrowest gaps are closed."""
    gaps = sorted(range(1, len(windows)), key=lambda at: windows[at][0] - windows[at - 1][1], reverse=True)
    edges = [0, *sorted(gaps[: most - 1]), len(windows)]
    return [(windows[first][0], windows[last - 1][1]) for first, last in pairwise(edges) if first < last]
