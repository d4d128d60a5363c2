"""The one transaction that stores readings.

    BEGIN; no history is closed until the end
    COPY straight into the hypertable; or, if some of it is stored already, COPY to a temporary table and merge
    queue the time ranges that changed, for etl; advance the partitions; COMMIT

Everything is encoded before it begins, and its last step is one round trip: the transaction never waits for this
process. The partitions advance only from where the batch began (compare and set), so a consumer that has lost them
writes nothing, whatever it believes. A batch that needs several transactions, or has dead letters to send before the
commit that steps over them, checks the partitions in each and advances them in one of its own.

A row that PostgreSQL refuses is found by bisection and returned with the server's own words; the rest is stored.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import psycopg
import pyarrow as pa
import pyarrow.compute as pc
from psycopg import Connection, Cursor, errors, sql

from services.consumer.batch import Move
from services.consumer.columns import (
    MICROSECOND,
    MINUTE,
    encode,
    last_values,
    measured,
    microseconds,
    split_at_jumps,
    touched_ranges,
)
from services.consumer.metrics import READINGS_LATE, READINGS_STORED
from services.core.config import Settings
from services.core.database import connect, connect_for_work, queries, translated
from services.core.errors import HistoryClosedError, PartitionsMovedError, PermanentError, Reason, TransientError
from services.core.logs import fields
from services.core.reading import EPOCH

SQL = queries("services.consumer")
LAST_WINS, FIRST_WINS = "coalesce(excluded.{0}, stored.{0})", "coalesce(stored.{0}, excluded.{0})"

SESSION_NAME = "sensor-pipeline consumer"
MOVED = "KP001"  # raised by advance_partitions
OUR_TABLES = frozenset({"summary_refresh_queue", "partition_progress"})  # no reading is to blame for these

# If PostgreSQL refuses every row of a batch of at least this size for the same reason, the rows are not to blame.
LEAST_ALL_REFUSED = 10

# After a unique violation, merge this many batches before trying COPY again; doubles while violations continue, so
# that a replay costs what merging costs.
FIRST_MERGES, MAX_MERGES = 1, 64

log = logging.getLogger("consumer")


@dataclass(frozen=True, slots=True)
class Refused:
    """A reading that was not stored: its row, why, and what was found."""

    row: pa.RecordBatch
    reason: Reason
    detail: str
    cause: tuple[str | None, str | None] = (None, None)  # SQLSTATE and constraint


@dataclass(slots=True)
class WriteResult:
    """What a batch did to ``sensor_data``; inserted + updated + unchanged + len(refused) = readings."""

    inserted: int = 0
    updated: int = 0
    unchanged: int = 0
    merged: bool = False
    advanced: bool = False  # the partitions as well
    refused: list[Refused] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """How many readings did what."""
        return {"inserted": self.inserted, "updated": self.updated, "unchanged": self.unchanged}

    def add(self, other: WriteResult) -> None:
        """Add the counts of another part of the same batch."""
        self.inserted += other.inserted
        self.updated += other.updated
        self.unchanged += other.unchanged
        self.merged |= other.merged
        self.advanced |= other.advanced
        self.refused += other.refused

    def raise_if_all_refused(self) -> None:
        """Raise PermanentError if it cannot be the data: every row was refused, and for one reason."""
        causes = {refused.cause for refused in self.refused}
        is_one_cause = len(causes) == 1 and causes != {(None, None)}
        if is_one_cause and len(self.refused) >= LEAST_ALL_REFUSED and not any(self.counts().values()):
            raise PermanentError(
                f"PostgreSQL refuses all {len(self.refused)} readings for the same reason, so the cause is not the "
                f"readings: {self.refused[0].detail}"
            )


class Sink:
    """Writes batches over one connection, which it opens when needed and drops when it breaks."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._connection: Connection | None = None
        self._merges_left = 0
        self._merges_next = FIRST_MERGES
        self._shortest_interval = min(map(settings.interval_of, settings.measurements)) * MINUTE
        self._over_before = datetime.min.replace(tzinfo=UTC)
        self.clock_lead = timedelta(0)  # how far this machine's clock is ahead of the database's

    def write(self, readings: pa.RecordBatch, repeated: pa.RecordBatch, move: Move, *, advance: bool) -> WriteResult:
        """Store readings; when it returns they are committed. Those that are ``repeated`` only fill gaps.

        With ``advance`` the partitions advance too, if one transaction is enough and PostgreSQL refuses none;
        ``WriteResult.advanced`` says whether.

        Raises TransientError (nothing is known to be stored: write the same again), PermanentError, or
        PartitionsMovedError (a partition is elsewhere: forget the batch).
        """
        parts = [
            (rows, part, fill)
            for rows, fill in ((readings, False), (repeated, True))
            for part in split_at_jumps(rows["time"])
        ]
        result = WriteResult()
        for rows, part, fill in parts:
            is_all = advance and len(parts) == 1
            result.add(self._write_part(rows.take(part), move if is_all else move.standing_still(), fill=fill))
        result.raise_if_all_refused()
        return result

    def advance(self, move: Move) -> None:
        """Advance the partitions, after all that lies before was stored or sent elsewhere. Raises as ``write``."""
        with self._session() as cursor:
            cursor.execute(SQL["advance"].format(**move.literals()))

    def close(self) -> None:
        """Close the connection; a transaction that is open is rolled back by the server."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _write_part(self, rows: pa.RecordBatch, move: Move, *, fill: bool) -> WriteResult:
        """Write rows, which are in order of time; halve them while PostgreSQL refuses one."""
        result = WriteResult()
        try:
            result = self._merge(rows, move, FIRST_WINS) if fill else self._copy_or_merge(rows, move)
            self._count(rows["time"], result)
            return result
        except HistoryClosedError as error:
            late = count_before(rows["time"], error.closed_before)
            result.refused = [Refused(rows.slice(at, 1), Reason.TOO_LATE, str(error)) for at in range(late)]
            rest = [rows.slice(late)]
        except psycopg.Error as error:  # it blames a row
            if len(rows) == 1:
                detail = " ".join(str(error).split())
                cause = error.sqlstate, error.diag.constraint_name
                return WriteResult(refused=[Refused(rows, Reason.REFUSED_BY_DATABASE, detail, cause)])
            middle = len(rows) // 2
            rest = [rows.slice(0, middle), rows.slice(middle)]
        for part in rest:
            if len(part):
                result.add(self._write_part(part, move.standing_still(), fill=fill))
        return result

    def _count(self, times: pa.Array, result: WriteResult) -> None:
        """Late is what belongs to an interval that had ended, by the newest reading before."""
        for name, count in result.counts().items():
            READINGS_STORED.labels(name).inc(count)
        READINGS_LATE.inc(count_before(times, self._over_before))
        newest = min(EPOCH + times[-1].as_py() * MICROSECOND, datetime.now(UTC))
        self._over_before = max(self._over_before, newest - (newest - EPOCH) % self._shortest_interval)

    def _copy_or_merge(self, rows: pa.RecordBatch, move: Move) -> WriteResult:
        if self._merges_left:
            self._merges_left -= 1
            return self._merge(rows, move, LAST_WINS)
        try:
            result = self._copy(rows, move)
        except errors.UniqueViolation:
            self._merges_left = self._merges_next
            self._merges_next = min(self._merges_next * 2, MAX_MERGES)
            return self._merge(rows, move, LAST_WINS)
        self._merges_next = FIRST_MERGES
        return result

    def _copy(self, rows: pa.RecordBatch, move: Move) -> WriteResult:
        encoded, touched = encode(rows), touched_ranges(rows["time"])
        finish = SQL["queue_and_commit"].format(**move.literals(), touched=sql.Literal(touched))
        with self._session() as cursor:
            self._begin(cursor, rows)
            copy(cursor, statement("copy_readings", rows), encoded)
            self._commit(cursor, finish)
        return WriteResult(inserted=len(rows), advanced=move.advances)

    def _merge(self, rows: pa.RecordBatch, move: Move, value: str) -> WriteResult:
        encoded = encode(last_values(rows))
        finish = SQL["drop_and_commit"].format(**move.literals())
        with self._session() as cursor:
            self._begin(cursor, rows)
            cursor.execute(SQL["create_incoming"])
            copy(cursor, statement("copy_incoming", rows), encoded)
            counts = cursor.execute(statement("merge_incoming", rows, value)).fetchone()
            self._commit(cursor, finish)
        assert counts is not None
        inserted, updated = counts
        unchanged = len(rows) - inserted - updated
        return WriteResult(inserted, updated, unchanged, merged=True, advanced=move.advances)

    def _begin(self, cursor: Cursor, rows: pa.RecordBatch) -> None:
        """Begin the transaction, and keep the history of the rows open until it ends."""
        cursor.execute(SQL["begin"])
        row = cursor.set_result(-1).fetchone()
        assert row is not None
        closed_before, clock = row
        self.clock_lead = datetime.now(UTC) - clock
        if closed_before is not None and count_before(rows["time"], closed_before):
            raise HistoryClosedError(closed_before)

    def _commit(self, cursor: Cursor, finish: sql.Composed) -> None:
        """The last round trip."""
        cursor.execute(finish)

    @contextmanager
    def _session(self) -> Iterator[Cursor]:
        """A cursor whose errors are ours. After any error its transaction is over."""
        if self._connection is None or self._connection.closed:
            self._connection = self._open()
        connection = self._connection
        try:
            with translated(by_row=True), connection.cursor() as cursor, not_about_a_row():
                yield cursor
        except TransientError as error:
            self.close()
            if isinstance(error.__cause__, errors.LockNotAvailable):
                self._end_dead_writers()
            raise
        except BaseException:
            with translated():
                connection.rollback()
            raise

    def _open(self) -> Connection:
        connection = connect_for_work(self._settings, SESSION_NAME)
        try:
            with translated():
                # A correction of compressed history decompresses up to a thousand rows for each sensor.
                connection.execute(SQL["decompress_without_limit"])
        except BaseException:
            connection.close()
            raise
        return connection

    def _end_dead_writers(self) -> None:
        """After waiting too long for a lock: end transactions of consumers that are frozen or gone.

        No time limit of PostgreSQL ends a session in the middle of a COPY whose client has stopped sending.
        """
        with connect(self._settings, SESSION_NAME) as connection, translated():
            for (pid,) in connection.execute(SQL["end_dead_writers"], {"name": SESSION_NAME}):
                log.warning("dead_writer_ended", extra=fields(pid=pid))


@contextmanager
def not_about_a_row() -> Iterator[None]:
    """Tell apart what looks like an error of the data: the partitions have moved, or a table of ours is to blame."""
    try:
        yield
    except psycopg.Error as error:
        text = " ".join(str(error).split())
        if error.sqlstate == MOVED:
            raise PartitionsMovedError(text) from error
        if error.diag.table_name in OUR_TABLES:
            raise PermanentError(text) from error
        raise


def statement(name: str, rows: pa.RecordBatch, value: str = "{0}") -> sql.Composed:
    """A statement with the measurements that ``rows`` hold filled in, and what to make ``value`` of each."""
    names = [sql.Identifier(name) for name in measured(rows)]
    forms = {"measurements": "{0}", "stored": "stored.{0}", "values": value}
    return SQL[name].format(
        **{key: sql.SQL(", ").join(map(sql.SQL(form).format, names)) for key, form in forms.items()}
    )


def count_before(times: pa.Array, moment: datetime) -> int:
    """How many of the times are before a moment."""
    return int(pc.sum(pc.less(times, microseconds(moment))).as_py() or 0)


def copy(cursor: Cursor, statement: sql.Composed, encoded: Sequence[bytes | memoryview]) -> None:
    """COPY readings that are encoded."""
    with cursor.copy(statement) as stream:
        for piece in encoded:
            stream.write(piece)
