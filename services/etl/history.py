"""History: what of it is closed, frozen and dropped. Nothing else moves these boundaries, or drops raw readings.

Each measurement has two boundaries, both at the start of one of its intervals (table summary_state):

    closed_before   the consumer stores no reading of an earlier time: it becomes a dead letter, too_late
    frozen_before   neither refresh nor mirror touches an earlier interval: its raw readings may be gone

closed >= frozen, always (the table checks it), and neither ever moves back. So history has four states, by age:

    open      readings are stored, summaries follow them
    closed    no reading is stored any more, summaries follow those that were
    frozen    the summary's rows stay as they are
    dropped   and the raw readings are gone

| from   | to      | method       | who            | when                                                             |
|--------|---------|--------------|----------------|------------------------------------------------------------------|
| open   | closed  | close        | drop_expired   | a chunk has expired: each of its intervals, at every width,      |
|        |         |              |                | ended before what is kept begins                                 |
| open   | closed  | close        | IntervalChange | up to where a new width takes over, if nothing of that is kept:  |
|        |         |              |                | from what is frozen to there nothing feeds the summary           |
| closed | frozen  | freeze       | drop_expired   | the queue is drained: nothing before closed_before waits         |
| closed | frozen  | switch       | Aggregates     | in the transaction that replaces the rows from there on          |
| any    | frozen  | note_dropped | SummaryMirror, | each round: somebody else has dropped a chunk. As far as nothing |
|        |         |              | self_check     | of that is kept; the rest stays open                             |
| frozen | dropped | drop_expired | a duty of etl  | the chunk is frozen for every measurement                        |

Each of them is one transaction, under the lock of the lease, and decides on what it has read under that lock. A crash
in between leaves one of these states, from which the next run continues. A retention policy of TimescaleDB could not do
this: it would drop a chunk before its last readings are in the summaries.

Closing and dropping need locks that others may hold for long (a dump, an open transaction): they wait two seconds for
them, then etl does its other work and tries again later.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from psycopg import Connection

from services.core.database import one, queries
from services.core.errors import ChunkDroppedError
from services.core.logs import fields
from services.etl.lease import Lease
from services.etl.metrics import CHUNKS_DROPPED
from services.etl.rollup import BASE, START, bucket_ceil, bucket_floor

SQL = queries("services.etl")

log = logging.getLogger("etl")


@dataclass(frozen=True, slots=True)
class Boundaries:
    """Those of one measurement, whose intervals have this width. START: nothing is closed, or frozen."""

    width: timedelta
    closed: datetime = START
    frozen: datetime = START

    def __post_init__(self) -> None:
        if self.closed < self.frozen:
            raise ValueError(f"frozen before {self.frozen} and closed before {self.closed} only")

    def close(self, boundary: datetime, kept_since: datetime) -> Boundaries:
        """Closed up to the boundary, unless some of that is kept."""
        return replace(self, closed=max(self.closed, boundary)) if boundary <= kept_since else self

    def freeze(self) -> Boundaries:
        """All that is closed is frozen."""
        return replace(self, frozen=self.closed)

    def switch(self, boundary: datetime) -> Boundaries:
        """Another width begins at the boundary."""
        return replace(self, closed=max(self.closed, boundary), frozen=max(self.frozen, boundary))

    def lose(self, lost: Lost, kept_since: datetime) -> Boundaries:
        """Intervals that are not all there are frozen, except for what is kept."""
        incomplete = max(bucket_ceil(self.width, lost.ended), bucket_floor(self.width, lost.unfinished))
        return self.switch(max(self.frozen, min(incomplete, bucket_floor(self.width, kept_since))))


@dataclass(frozen=True, slots=True)
class Lost:
    """The chunks of readings that somebody has dropped."""

    ended: datetime = START  # the end of the newest of those that had ended by then
    unfinished: datetime = START  # when the last of the others was dropped: what came afterwards is there


def expired_before(ends: Iterable[datetime], widths: Sequence[timedelta], kept_since: datetime) -> datetime:
    """The end of the newest chunk of which nothing is kept, not even the rest of an interval; START: of none."""
    gone = (end for end in ends if all(bucket_ceil(width, end) <= kept_since for width in widths))
    return max(gone, default=START)


class History:
    """The boundaries as they were last read, and their transitions. ``keep``: RAW_RETENTION_DAYS."""

    def __init__(self, connection: Connection, lease: Lease, keep: timedelta) -> None:
        self._connection = connection
        self._lease = lease
        self._keep = keep
        self._lost = Lost()
        self.kept_since = START
        self.boundaries: dict[str, Boundaries] = {}  # by measurement

    def read(self) -> None:
        """Read what the database says now."""
        rows = self._connection.execute(SQL["read_boundaries"], {"start": START, "keep": self._keep}).fetchall()
        self.boundaries = {name: Boundaries(width, closed, frozen) for name, width, closed, frozen, *_ in rows}
        if rows:
            *_, ended, unfinished, self.kept_since = rows[0]
            self._lost = Lost(ended, unfinished)

    def note_dropped(self) -> None:
        """Note chunks that are gone, and freeze their intervals: every time, for an etl may have died in between."""
        with self._lease.transaction():
            self._connection.execute(SQL["note_chunks"])
            self.read()
            self._move({name: each.lose(self._lost, self.kept_since) for name, each in self.boundaries.items()})

    def close(self, boundaries: Mapping[str, datetime]) -> None:
        """Close the history of each measurement: no transaction that ends later stores what is older.

        Waits, in turn, for those that are storing readings now. Raises LockNotAvailable after two seconds.
        """
        self.read()
        if all(boundary <= self.boundaries[name].closed for name, boundary in boundaries.items()):
            return
        with self._lease.transaction():
            self._connection.execute(SQL["hold_readings"])
            self.read()
            self._move({name: self.boundaries[name].close(at, self.kept_since) for name, at in boundaries.items()})

    def freeze(self) -> bool:
        """Freeze what is closed; False while some of it waits for its summaries."""
        with self._lease.transaction():
            self.read()
            frozen = {name: each.freeze() for name, each in self.boundaries.items()}
            if frozen != self.boundaries and self.is_queued_before(max(each.closed for each in frozen.values())):
                return False
            self._move(frozen)
        return True

    def switch(self, measurement: str, boundary: datetime) -> None:
        """In the caller's transaction, which lets another width feed the summary from the boundary on.

        Raises ChunkDroppedError if the readings from there on are no longer complete.
        """
        self.check_chunks()
        self.read()
        if self.boundaries[measurement].frozen > boundary:
            raise ChunkDroppedError(f"raw readings after {boundary} were dropped while an interval was changed")
        self._move({measurement: self.boundaries[measurement].switch(boundary)})

    def check_chunks(self) -> None:
        """In the caller's transaction. Raises ChunkDroppedError if a chunk is gone that was not noted yet."""
        if one(self._connection, SQL["is_chunk_missing"])[0]:
            raise ChunkDroppedError("a chunk was dropped and not noted yet")

    def is_queued_before(self, boundary: datetime) -> bool:
        """Whether something of before the boundary waits for its summaries."""
        return bool(one(self._connection, SQL["is_queued_before"], {"boundary": boundary})[0])

    def drop_expired(self) -> Iterator[None]:
        """Close, freeze and drop what has expired, step by step; in between the queue is worked off."""
        expired = self._expired() if self._keep else {}
        if not expired:
            return
        self.close(expired)
        while not self.freeze():
            yield
        chunks = self._connection.execute(SQL["frozen_chunks"], {"keep": self._keep}).fetchall()
        for start, end in chunks:
            with self._lease.transaction():
                self._connection.execute(SQL["drop_chunk"], {"start": start, "end": end})
            CHUNKS_DROPPED.inc()
            log.info("chunk_dropped", extra=fields(start=start, end=end))
            yield
        if chunks:
            with self._lease.transaction():  # nothing reads the minutes of frozen intervals again
                self._connection.execute(SQL["drop_frozen_minutes"], {"base": BASE})

    def _expired(self) -> dict[str, datetime]:
        """Where the whole intervals of each measurement begin behind what has expired; empty: nothing has."""
        self.read()
        ends = [end for (end,) in self._connection.execute(SQL["expired_chunks"], {"start": START, "keep": self._keep})]
        before = expired_before(ends, [each.width for each in self.boundaries.values()], self.kept_since)
        if before == START:
            return {}
        return {name: bucket_ceil(each.width, before) for name, each in self.boundaries.items()}

    def _move(self, moved: dict[str, Boundaries]) -> None:
        for name, to in moved.items():
            if to != self.boundaries[name]:
                closed, frozen = (None if at == START else at for at in (to.closed, to.frozen))
                arguments = {"measurement": name, "closed": closed, "frozen": frozen}
                self._connection.execute(SQL["move_boundaries"], arguments)
        self.boundaries |= moved
