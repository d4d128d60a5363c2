"""The refresh and the mirror: exactly the intervals that changed, whatever dies in between.

The queue drives the work, not the clock: an interval is recomputed because a reading in it was committed, so a
quiet stream gets its last interval and a reading of last year gets its own. What the queue names is recomputed by
force: TimescaleDB's own notes of what is out of date can miss a transaction that commits while a refresh begins.

The work is done in steps, each with its own mirror, so that a year of backlog is neither one statement nor lost when
something dies. The newest part goes first: the present does not wait for the past.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta

from psycopg import Connection, sql
from psycopg.errors import InsufficientPrivilege, LockNotAvailable, UndefinedColumn, UndefinedTable

from services.core.database import one, queries
from services.core.errors import ChunkDroppedError
from services.core.logs import fields
from services.core.monitoring import DATABASE
from services.etl import metrics
from services.etl.aggregates import Aggregates, statement
from services.etl.history import History
from services.etl.lease import Lease
from services.etl.rollup import BASE_WIDTH, START, Rollup, bucket_ceil, bucket_floor

SQL = queries("services.etl")

# A step: this much time, in this many windows; less where a step takes long, and more where one is quick.
STEP = timedelta(days=1)
MAX_TIME = timedelta(days=7)
MAX_WINDOWS = 32
SLOW_S, QUICK_S = 20.0, 2.0
PIECE = timedelta(days=1)  # this much is compared or caught up with at once, or one interval if that is longer
# A refresh of what lies between two windows that are this near costs less than another call.
NEAR = timedelta(minutes=5)
# Where there are more windows than one step takes, sensors report seldom, and there is little between.
NEAR_OF_MANY = timedelta(hours=1)
# All at once would write an hour's minutes to as many pages as there are rows; ten at a time, TimescaleDB's own choice,
# makes a day without readings cost 0.1 s.
BATCHES = ", options => '{\"buckets_per_batch\": 60}'"

log = logging.getLogger("etl")

Window = tuple[datetime, datetime]


@dataclass(frozen=True, slots=True)
class Step:
    """The part of the queue that is worked off at once: all from ``cut`` on, None for all."""

    windows: list[Window]  # of minutes
    cut: datetime | None = None
    rest_end: datetime | None = None  # the end of what remains before the cut


class SummaryMirror:
    """Keeps the summary tables equal to the readings."""

    def __init__(self, connection: Connection, lease: Lease, aggregates: Aggregates, history: History) -> None:
        self._connection = connection
        self._lease = lease
        self._aggregates = aggregates
        self._history = history
        self._options = ""
        self.step = STEP
        self.are_unsettled = False  # whether the last poll of the queue let something settle

    def prepare(self) -> None:
        """Set the session up for refresh and mirror."""
        self._connection.execute(SQL["prefer_hashing"])
        (has_options,) = one(self._connection, SQL["refresh_has_options"])
        self._options = BATCHES if has_options else ""

    def refresh_queued(self, *, settled: bool = False) -> bool:
        """Bring the summaries up to the newest part of what is queued now; False when nothing is.

        ``settled`` leaves out what is of the past and still being loaded. A crash at any point leaves the queue rows
        of this step in place, and the work is repeated.
        """
        started = time.monotonic()
        queued = self._read_queue(settled=settled)
        self._history.note_dropped()  # when nothing is queued too: what comes next relies on it
        DATABASE.note_success()
        if queued is None:
            return False
        ids, touched, oldest_s = queued
        frozen = min((each.frozen for each in self._history.boundaries.values()), default=START)
        step = take_newest(whole_intervals(touched, BASE_WIDTH, frozen), self.step)
        intervals = self._refresh_step(step)
        refreshed = time.monotonic()
        try:
            changed, done = self._mirror_step(intervals, ids, step.cut)
        except ChunkDroppedError:
            return True  # the next round sees that it is gone
        mirrored = time.monotonic()
        self.pace(mirrored - started)
        count(intervals, changed, done, mirrored - refreshed)
        log.info(
            "summaries_refreshed",
            extra=fields(
                queue_rows=done,
                windows=len(step.windows),
                intervals=sum(number_of(windows, rollup) for rollup, windows in intervals.items()),
                summary_rows_changed=sum(changed.values()),
                oldest_s=round(oldest_s, 2),
                refresh_s=round(refreshed - started, 3),
                mirror_s=round(mirrored - refreshed, 3),
                **({} if step.cut is None else {"left_before": step.cut}),
            ),
        )
        return True

    def have_settled(self) -> bool:
        """Whether a refresh of what has settled would find any of it."""
        return self._read_queue(settled=True) is not None

    def refresh(self, aggregate: str, start: datetime, end: datetime, *, force: bool = False) -> None:
        """Refresh the whole intervals from ``start`` up to ``end``; outside a transaction, as it must be.

        ``force`` recomputes them even where TimescaleDB does not know of a change.
        """
        started = time.monotonic()
        refresh = SQL["refresh"].format(
            aggregate=sql.Literal(aggregate),
            start=sql.Literal(start),
            end=sql.Literal(end),
            force=sql.Literal(force),
            options=sql.SQL(self._options),
        )
        try:
            self._connection.execute(refresh)
        except LockNotAvailable:
            self._end_mistaken_sessions()
            raise
        metrics.REFRESH_SECONDS.labels(aggregate).observe(time.monotonic() - started)

    def refresh_all(self, rollup: Rollup, start: datetime, end: datetime, *, force: bool = False) -> None:
        """Refresh an aggregate, and before it of what it is made of what TimescaleDB knows to be out of date."""
        if rollup.of_minutes:
            self.refresh(self._aggregates.base_of(rollup), start, end)
        self.refresh(rollup.aggregate, start, end, force=force)

    def catch_up(self) -> Iterator[None]:
        """Bring up the summary of what is new or was off the list, piece by piece, the newest first.

        What was stored meanwhile is in no queue any more. How far it has come is kept: we may die in between. Until the
        end the live view shows the summary.
        """
        for rollup in tuple(self._aggregates.current.values()):
            while (row := self._connection.execute(statement("read_behind", rollup)).fetchone()) is not None:
                piece = piece_before(self._connection, rollup, row[0])
                if piece is not None:
                    self.refresh_all(rollup, *piece, force=True)
                with suppress(ChunkDroppedError), self._mirroring() as materialized:
                    if piece is not None:
                        self._mirror(rollup, materialized[rollup.aggregate], [piece])
                    self._connection.execute(statement("write_behind", rollup), {"before": piece and piece[0]})
                yield
                self._history.note_dropped()
        yield from self._aggregates.show_live()

    def _end_mistaken_sessions(self) -> None:
        """Those that TimescaleDB takes for a refresh that a crash has ended, as far as we may: they connect again."""
        with suppress(UndefinedTable, UndefinedColumn, InsufficientPrivilege):  # other versions; others' sessions
            for (pid,) in self._connection.execute(SQL["end_mistaken_sessions"]):
                reason = "it has the pid of a refresh from before a crash"
                log.warning("session_ended", extra=fields(pid=pid, reason=reason))

    def pace(self, took_s: float) -> None:
        """A step of history took this long: take less at once where it is slow, so that other work gets its turn."""
        if took_s > SLOW_S:
            self.step = max(self.step / 2, BASE_WIDTH)
        elif took_s < QUICK_S:
            self.step = min(self.step * 2, MAX_TIME)

    def _read_queue(self, *, settled: bool) -> tuple[list[int], list[Window], float] | None:
        """The rows, their merged ranges, and how many seconds the oldest has waited; None without any."""
        row = one(self._connection, SQL["read_queue"], {"all": not settled})
        ids, touched, oldest_s, self.are_unsettled = row
        return None if ids is None else (ids, [(each.lower, each.upper) for each in touched], oldest_s)

    def _refresh_step(self, step: Step) -> dict[Rollup, list[Window]]:
        """Refresh the minutes first, then the intervals that hold them; returns these."""
        for base in self._aggregates.bases_refreshed():
            for start, end in step.windows:
                self.refresh(base, start, end, force=True)
        intervals = {}
        for rollup in self._aggregates.all_refreshed():
            # The raw history may begin to be whole in the middle of an interval whose width is about to take over.
            frozen = self._history.boundaries[rollup.name].frozen
            since = bucket_ceil(rollup.width, max(frozen, step.rest_end or START))
            intervals[rollup] = whole_intervals(step.windows, rollup.width, since)
            for start, end in intervals[rollup]:
                self.refresh(rollup.aggregate, start, end, force=True)
        return intervals

    def _mirror_step(
        self, intervals: dict[Rollup, list[Window]], ids: list[int], cut: datetime | None
    ) -> tuple[dict[str, int], int]:
        """The one transaction that ends a step: the summaries' rows, and what remains of the queue.

        Returns how many rows of each summary changed, and how many queue rows are done.
        """
        with self._mirroring() as materialized:
            changed = {
                rollup.name: self._mirror(rollup, materialized[rollup.aggregate], intervals[rollup])
                for rollup in self._aggregates.current.values()
            }
            arguments = {"ids": ids, "cut": "-infinity" if cut is None else cut}
            done = self._connection.execute(SQL["delete_queued"], arguments).rowcount
            if cut is not None:
                self._connection.execute(SQL["keep_rest"], arguments)
        return changed, done

    @contextmanager
    def _mirroring(self) -> Iterator[dict[str, sql.Identifier]]:
        """A transaction that changes summaries; the tables of the aggregates."""
        with self._lease.transaction():
            self._history.check_chunks()
            self._connection.execute(SQL["never_compare_all_pairs"])
            yield self._aggregates.materialized()

    def _mirror(self, rollup: Rollup, materialized: sql.Identifier, windows: Sequence[Window]) -> int:
        """Make the summary's rows in the windows equal to those of the table; returns how many changed."""
        changed = 0
        for start, end in windows:
            for name in ("merge_summary", "delete_vanished"):
                window = {"start": start, "end": end}
                mirror = statement(name, rollup, materialized=materialized)
                changed += self._connection.execute(mirror, window).rowcount
        return changed


def count(intervals: dict[Rollup, list[Window]], changed: dict[str, int], queue_rows: int, mirror_s: float) -> None:
    """Count in the metrics what was committed."""
    for rollup, windows in intervals.items():
        metrics.INTERVALS_REFRESHED.labels(rollup.aggregate).inc(number_of(windows, rollup))
    for name, rows in changed.items():
        metrics.SUMMARY_ROWS_CHANGED.labels(name).inc(rows)
    metrics.QUEUE_ROWS_DONE.inc(queue_rows)
    metrics.MIRROR_SECONDS.observe(mirror_s)


def number_of(windows: list[Window], rollup: Rollup) -> int:
    """How many of the rollup's intervals these are."""
    return sum((end - start) // rollup.width for start, end in windows)


def whole_intervals(windows: Iterable[Window], width: timedelta, since: datetime) -> list[Window]:
    """The intervals that hold any part of the windows (by time); of what is before ``since`` nothing."""
    widened = [(bucket_floor(width, start), bucket_ceil(width, end)) for start, end in windows]
    return join_near([(max(start, since), end) for start, end in widened if end > since], timedelta(0))


def join_near(windows: list[Window], near: timedelta = NEAR) -> list[Window]:
    """Windows that cover the given ones (by time); those with no more than ``near`` between them are one."""
    joined: list[Window] = []
    for start, end in windows:
        if joined and start - joined[-1][1] <= near:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def take_newest(minutes: list[Window], max_time: timedelta) -> Step:
    """As much as makes one step, the newest first; the rest ends before the step's cut."""
    taken: list[Window] = []
    left = max_time
    windows = join_near(minutes)
    if len(windows) > MAX_WINDOWS:
        windows = join_near(minutes, NEAR_OF_MANY)
    while windows and left and len(taken) < MAX_WINDOWS:
        start, end = windows.pop()
        cut = max(start, end - left // BASE_WIDTH * BASE_WIDTH)
        taken.insert(0, (cut, end))
        left -= end - cut
        if cut > start:
            windows.append((start, cut))
    if not windows:
        return Step(taken)
    cut = taken[0][0]
    return Step(taken, cut, max(min(end, cut) for start, end in minutes if start < cut))


def piece_before(
    connection: Connection, rollup: Rollup, before: datetime | str | None, length: timedelta = PIECE
) -> Window | None:
    """The newest piece that holds readings or summary rows of before this time, as whole intervals; None: none does."""
    arguments = {"before": before, "length": max(length // rollup.width, 1) * rollup.width}
    row = connection.execute(statement("piece_before", rollup), arguments).fetchone()
    return None if row is None else (row[0], row[1])
