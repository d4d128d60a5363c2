"""The writer thread: asks where partitions go on, and stores batches; one job at a time.

It waits for the servers, so that the polling thread never does: a member that does not poll holds the group up.

librdkafka's consumer belongs to the thread that polls it, so the writer only reports.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from queue import SimpleQueue

import pyarrow as pa

from services.consumer.batch import Batch
from services.consumer.blocks import alone
from services.consumer.columns import joined
from services.consumer.dead_letter import DeadLetter, DeadLetterTopic
from services.consumer.instruments import BATCH_READINGS, BATCH_WRITE_SECONDS, DEAD_LETTERS, MESSAGES_LEFT
from services.consumer.patience import keep_trying
from services.consumer.positions import Places, Positions
from services.consumer.sink import PartitionsMovedError, Refused, Sink, WriteResult
from services.core.config import Settings
from services.core.logs import fields
from services.core.monitoring import DATABASE, KAFKA

log = logging.getLogger("consumer")


@dataclass(frozen=True, slots=True)
class Locate:
    """Find out where these partitions go on. The outcome is Places."""

    partitions: frozenset[int]


@dataclass(frozen=True, slots=True)
class Stored:
    """All of the batch is in PostgreSQL, or with the dead letters, and its partitions have advanced."""

    batch: Batch
    result: WriteResult
    letters: Sequence[DeadLetter]


@dataclass(frozen=True, slots=True)
class NotStored:
    """The batch was given up: its partitions are not where it began, or giving up was asked for.

    What of it is stored all the same is harmless to repeat. The database knows where to go on.
    """


@dataclass(frozen=True, slots=True)
class NotLocated:
    """Giving up was asked for."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The writer is no more, and why."""

    error: BaseException


Outcome = Places | Stored | NotStored | NotLocated | Ended


class Writer:
    """Does one job at a time in a thread of its own, and reports the outcome; back-pressure is that it takes no second.

    ``report`` is called in that thread. All else belongs to the thread that polls.
    """

    def __init__(self, settings: Settings, positions: Positions, report: Callable[[Outcome], None]) -> None:
        self._positions = positions
        self._report = report
        self._sink = Sink(settings)
        self._dead_letters = DeadLetterTopic(settings)
        self._job: Batch | Locate | None = None
        self._jobs: SimpleQueue[Batch | Locate | None] = SimpleQueue()
        self._abandon = threading.Event()
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    @property
    def clock_lead(self) -> timedelta:
        """How far this machine's clock is ahead of the database's."""
        return self._sink.clock_lead

    @property
    def busy(self) -> bool:
        """Whether there is a job whose outcome was not taken yet."""
        return self._job is not None

    @property
    def is_storing(self) -> bool:
        """Whether that job is a batch, which others would have to repeat."""
        return isinstance(self._job, Batch)

    def submit(self, job: Batch | Locate) -> None:
        """Start a job; only when idle."""
        if self._job is not None:
            raise AssertionError("the writer is busy")
        self._abandon.clear()
        self._job = job
        self._jobs.put(job)

    def take(self, outcome: Outcome) -> None:
        """The outcome has arrived, so the writer is idle. Raises what ended the writer."""
        self._job = None
        if isinstance(outcome, Ended):
            raise outcome.error

    def abandon(self) -> None:
        """Give the job up at the next pause between two tries."""
        self._abandon.set()

    def stop(self) -> None:
        """End the thread soon; a job that still runs is given up."""
        self._abandon.set()
        self._jobs.put(None)

    def join(self) -> None:
        """Wait a moment for the thread to end."""
        self._thread.join(timeout=1)

    def _run(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                self._report(self._locate(job) if isinstance(job, Locate) else self._store(job))
                del job  # a batch that is done must not stay in memory during the next one
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that polls
            self._report(Ended(error))
        finally:
            self._sink.close()

    def _locate(self, locate: Locate) -> Outcome:
        topic = keep_trying(KAFKA, self._positions.topic_id, self._abandon.wait)
        if topic is None:
            return NotLocated()
        return (
            keep_trying(DATABASE, lambda: self._positions.read(topic, locate.partitions), self._abandon.wait)
            or NotLocated()
        )

    def _store(self, batch: Batch) -> Outcome:
        """Commit the readings; what was refused goes to the dead letters before the commit that steps over it."""
        started = time.monotonic()
        readings, repeated = batch.split_repeated()
        move, advance = batch.positions, not batch.dead_letters
        try:
            result = keep_trying(
                DATABASE,
                lambda: self._sink.write(readings, move, repeated=repeated, advance=advance),
                self._abandon.wait,
            )
            if result is None:
                return self._left(batch)
            refused = self._letters_of(result.refused, [readings, repeated])
            if refused is None:
                return self._left(batch)
            letters = batch.dead_letters + refused
            if letters and keep_trying(KAFKA, lambda: self._dead_letters.send(letters), self._abandon.wait) is None:
                return self._left(batch)
            if (
                not result.advanced
                and keep_trying(DATABASE, lambda: self._sink.advance(move), self._abandon.wait) is None
            ):
                return self._left(batch)
        except PartitionsMovedError as error:
            log.warning("partitions_moved", extra=fields(detail=error))
            return self._left(batch)
        if len(batch):
            self._count(batch, result, letters, time.monotonic() - started)
        return Stored(batch, result, letters)

    def _letters_of(self, refused: Sequence[Refused], readings: Sequence[pa.RecordBatch]) -> list[DeadLetter] | None:
        """Dead letters for what was refused; None if that was given up, or if Kafka has dropped a message meanwhile."""
        if not refused:
            return []
        rows = joined(readings).take(pa.array([row.index for row in refused], pa.int64()))
        places = list(zip(rows["partition"].to_pylist(), rows["offset"].to_pylist(), strict=True))
        messages = keep_trying(KAFKA, lambda: self._dead_letters.read_again(places), self._abandon.wait)
        if messages is None or len(messages) < len(set(places)):
            return None
        return [
            DeadLetter(alone(messages[place], rows.slice(at, 1)), row.reason, row.detail)
            for at, (place, row) in enumerate(zip(places, refused, strict=True))
        ]

    def _left(self, batch: Batch) -> NotStored:
        MESSAGES_LEFT.inc(len(batch))
        return NotStored()

    def _count(self, batch: Batch, result: WriteResult, letters: Sequence[DeadLetter], seconds: float) -> None:
        path = "merge" if result.merged else "copy"
        readings = len(batch) - len(batch.dead_letters)
        BATCH_READINGS.observe(readings)
        BATCH_WRITE_SECONDS.labels(path).observe(seconds)
        for letter in letters:
            DEAD_LETTERS.labels(letter.reason).inc()
        log.info(
            "batch_written",
            extra=fields(
                readings=readings,
                inserted=result.inserted,
                updated=result.updated,
                unchanged=result.unchanged,
                dead_letters=len(letters),
                path=path,
                seconds=round(seconds, 4),
            ),
        )
