"""The one transaction that stores readings.

Optimistic: COPY straight into the hypertable. A unique violation means that some of the batch is stored
already; then the same batch is merged. Either way the time ranges that changed are queued for etl in the same
transaction, so a summary can be late but never forgotten.

A row that PostgreSQL refuses is found by bisection and handed back with the server's own words; the rest of
the batch is stored.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from operator import attrgetter

import psycopg
from msgspec.structs import astuple
from psycopg import Connection, Cursor, errors, sql
from psycopg.types.multirange import Multirange
from psycopg.types.range import Range

from services.consumer.instruments import READINGS_LATE, READINGS_STORED
from services.core.config import Settings
from services.core.database import connect, queries, translated
from services.core.errors import TransientError
from services.core.reading import EPOCH, METRICS, Reading


def listed(form: str) -> sql.Composed:
    """``form`` once for each metric, with its column in the braces, and commas between."""
    return sql.SQL(", ").join(sql.SQL(form).format(sql.Identifier(metric)) for metric in METRICS)


SQL = {
    name: statement.format(
        metrics=listed("{0}"), stored=listed("stored.{0}"), latest=listed("coalesce(excluded.{0}, stored.{0})")
    )
    for name, statement in queries("services.consumer").items()
}
COLUMN_TYPES = ("text", "timestamptz", *("float8" for _ in METRICS))  # in the order of a reading's fields
MINUTE = timedelta(minutes=1)

# A transaction that holds old and new rows makes TimescaleDB distrust all that lies between. So a batch is
# split where its times jump, but not into so many transactions that late readings slow the others down.
JUMP = timedelta(hours=1)
MOST_TRANSACTIONS = 4

# After a unique violation, so many batches are merged without trying COPY first; doubled up to the second
# figure while violations go on. A replay then costs what merging costs.
FIRST_MERGES = 1
MOST_MERGES = 64


time_of, sensor_of = attrgetter("time"), attrgetter("sensor_id")


class PartitionsLostError(Exception):
    """Another consumer owns a partition of this batch; it was not written and must not be."""


class HistoryClosedError(Exception):
    """Some readings are of a time whose raw history is not, or soon not, whole; nothing was written."""

    def __init__(self, closed_before: datetime) -> None:
        super().__init__(f"older than {closed_before}, before which raw readings are no longer kept")
        self.closed_before = closed_before


@dataclass(frozen=True, slots=True)
class Refused:
    """A reading that was not stored: its position in the batch, a stable reason, and what was found."""

    index: int
    reason: str
    detail: str


@dataclass(slots=True)
class WriteResult:
    """What a batch did to ``sensor_data``; inserted + updated + unchanged + len(refused) = readings."""

    inserted: int = 0
    updated: int = 0
    unchanged: int = 0
    merged: bool = False
    refused: list[Refused] = field(default_factory=list)

    def add(self, other: WriteResult) -> None:
        """Add the counts of another part of the same batch."""
        self.inserted += other.inserted
        self.updated += other.updated
        self.unchanged += other.unchanged
        self.merged |= other.merged
        self.refused += other.refused


class Sink:
    """Writes batches over one connection, which it opens when needed and drops when it breaks."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._connection: Connection | None = None
        self._epochs: dict[int, int] = {}
        self._merges_left = 0
        self._merges_next = FIRST_MERGES
        self._shorter_interval = min(settings.temperature_interval, settings.humidity_interval) * MINUTE
        self._over_before = datetime.min.replace(tzinfo=UTC)

    def claim(self, partitions: Iterable[int]) -> bool:
        """Become the owner of these partitions: consumers that claimed them before can no longer write."""
        arguments = self._fence_arguments() | {"partitions": sorted(partitions)}
        with self._cursor() as cursor:
            self._epochs = dict(cursor.execute(SQL["claim_partitions"], arguments).fetchall())
        return True

    def write(self, readings: Sequence[Reading], partitions: Iterable[int]) -> WriteResult:
        """Store readings; when it returns they are committed.

        Raises TransientError (nothing is known to be stored: write the same again), PermanentError, or
        PartitionsLostError (nothing was stored: forget the batch).
        """
        fence = {partition: self._epochs.get(partition, 0) for partition in partitions}
        result = WriteResult()
        for part in split_at_jumps(readings):
            result.add(self._write_part(readings, part, fence))
        return result

    def close(self) -> None:
        """Close the connection; a transaction that is open is rolled back by the server."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _write_part(self, readings: Sequence[Reading], part: list[int], fence: Mapping[int, int]) -> WriteResult:
        """Write the readings at the positions ``part``; halve the part while PostgreSQL refuses a row of it."""
        try:
            rows = [readings[index] for index in part]
            result = self._copy_or_merge(rows, fence)
            self._count(rows, result)
            return result
        except HistoryClosedError as error:
            late = [index for index in part if readings[index].time < error.closed_before]
            result = WriteResult(refused=[Refused(index, "too_late", str(error)) for index in late])
            if len(late) < len(part):
                result.add(self._write_part(readings, part[len(late) :], fence))  # the part is in order of time
            return result
        except psycopg.Error as error:  # it blames a row
            if len(part) == 1:
                detail = " ".join(str(error).split())
                return WriteResult(refused=[Refused(part[0], "refused_by_database", detail)])
        middle = len(part) // 2
        result = self._write_part(readings, part[:middle], fence)
        result.add(self._write_part(readings, part[middle:], fence))
        return result

    def _count(self, rows: list[Reading], result: WriteResult) -> None:
        """Tell the metrics what was committed; the rows are in order of time.

        Late is what belongs to an interval that had ended, by the newest reading before.
        """
        for name in ("inserted", "updated", "unchanged"):
            READINGS_STORED.labels(name).inc(getattr(result, name))
        READINGS_LATE.inc(bisect_left(rows, self._over_before, key=time_of))
        newest = min(rows[-1].time, datetime.now(UTC))
        self._over_before = max(self._over_before, newest - (newest - EPOCH) % self._shorter_interval)

    def _copy_or_merge(self, rows: list[Reading], fence: Mapping[int, int]) -> WriteResult:
        if self._merges_left:
            self._merges_left -= 1
            return self._merge(rows, fence)
        try:
            result = self._copy(rows, fence)
        except errors.UniqueViolation:
            self._merges_left = self._merges_next
            self._merges_next = min(self._merges_next * 2, MOST_MERGES)
            return self._merge(rows, fence)
        self._merges_next = FIRST_MERGES
        return result

    def _copy(self, rows: list[Reading], fence: Mapping[int, int]) -> WriteResult:
        with self._cursor() as cursor, cursor.connection.transaction():
            self._hold(cursor, fence, rows)
            copy_rows(cursor, "copy_readings", rows)
            cursor.execute(SQL["queue_ranges"], {"touched": touched_ranges(rows)})
        return WriteResult(inserted=len(rows))

    def _merge(self, rows: list[Reading], fence: Mapping[int, int]) -> WriteResult:
        with self._cursor() as cursor, cursor.connection.transaction():
            self._hold(cursor, fence, rows)
            cursor.execute(SQL["create_incoming"])
            copy_rows(cursor, "copy_incoming", last_values(rows))
            counts = cursor.execute(SQL["merge_incoming"]).fetchone()
        assert counts is not None
        inserted, updated = counts
        return WriteResult(inserted, updated, unchanged=len(rows) - inserted - updated, merged=True)

    def _hold(self, cursor: Cursor, fence: Mapping[int, int], rows: list[Reading]) -> None:
        """Keep the partitions ours, and the history of the rows open, until the transaction ends."""
        arguments = self._fence_arguments() | {
            "partitions": list(fence.keys()),
            "epochs": list(fence.values()),
        }
        row = cursor.execute(SQL["hold"], arguments).fetchone()
        assert row is not None
        held, closed_before = row
        if held != len(fence):
            raise PartitionsLostError(f"partitions {sorted(fence)} are not all ours any more")
        if closed_before is not None and rows[0].time < closed_before:
            raise HistoryClosedError(closed_before)

    def _fence_arguments(self) -> dict[str, object]:
        return {"group": self._settings.kafka_group, "topic": self._settings.kafka_topic}

    def _cursor(self) -> _TranslatedCursor:
        if self._connection is None or self._connection.closed:
            self._connection = connect(self._settings)
        return _TranslatedCursor(self, self._connection)


class _TranslatedCursor:
    """A cursor whose errors are ours, and which drops its connection after a transient one."""

    def __init__(self, sink: Sink, connection: Connection) -> None:
        self._sink = sink
        self._cursor = connection.cursor()
        self._translated = translated(by_row=True)

    def __enter__(self) -> Cursor:
        self._translated.__enter__()
        return self._cursor

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._cursor.close()
        try:
            self._translated.__exit__(kind, error, trace)  # type: ignore[arg-type]
        except TransientError:
            self._sink.close()
            raise


def copy_rows(cursor: Cursor, query: str, rows: Iterable[Reading]) -> None:
    """COPY readings in binary form."""
    with cursor.copy(SQL[query]) as copy:
        copy.set_types(COLUMN_TYPES)
        for row in rows:
            copy.write_row(astuple(row))


def last_values(rows: Iterable[Reading]) -> list[Reading]:
    """One reading for each (sensor, time), by time and sensor: for each field the last value that is not None.

    The order is the same for every consumer, so that two of them never wait for each other in a circle.
    """
    latest: list[Reading] = []
    before: Reading | None = None
    for row in sorted(sorted(rows, key=sensor_of), key=time_of):  # equal keys keep their order
        if before is not None and before.time == row.time and before.sensor_id == row.sensor_id:
            latest.pop()
            row = Reading(
                *(old if new is None else new for old, new in zip(astuple(before), astuple(row), strict=True))
            )
        latest.append(row)
        before = row
    return latest


def touched_ranges(rows: Sequence[Reading]) -> Multirange[datetime]:
    """The minutes that hold readings, as ranges [start, end), adjacent ones merged; the rows are in order of time.

    Jumps from minute to minute by bisection, since most batches hold many readings of few minutes.
    """
    ranges: list[Range[datetime]] = []
    first = last = (rows[0].time - EPOCH) // MINUTE
    at = 0
    while (at := bisect_left(rows, minute_start(last + 1), lo=at, key=time_of)) < len(rows):
        minute = (rows[at].time - EPOCH) // MINUTE
        if minute != last + 1:
            ranges.append(minute_range(first, last))
            first = minute
        last = minute
    ranges.append(minute_range(first, last))
    return Multirange(ranges)


def minute_start(minute: int) -> datetime:
    """The start of a minute that is counted from 1970."""
    return EPOCH + minute * MINUTE


def minute_range(first: int, last: int) -> Range[datetime]:
    """From the start of minute ``first`` to the end of minute ``last``, counted from 1970."""
    return Range(minute_start(first), minute_start(last + 1), bounds="[)")


def split_at_jumps(readings: Sequence[Reading]) -> list[list[int]]:
    """Positions of the readings by time, in parts whose times do not jump; equal times keep their order.

    At most MOST_TRANSACTIONS parts, split at the widest jumps.
    """
    if not readings:
        return []
    times = list(map(time_of, readings))
    order = sorted(range(len(times)), key=times.__getitem__)
    if times[order[-1]] - times[order[0]] <= JUMP:
        return [order]
    times.sort()
    jumps = [at for at in range(1, len(times)) if times[at] - times[at - 1] > JUMP]
    widest = sorted(jumps, key=lambda at: times[at] - times[at - 1], reverse=True)[: MOST_TRANSACTIONS - 1]
    edges = [0, *sorted(widest), len(order)]
    return [order[start:end] for start, end in pairwise(edges)]
