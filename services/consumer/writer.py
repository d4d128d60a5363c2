"""The writer thread: asks where partitions continue, and stores batches; one job at a time.

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
from typing import TypeVar

from services.consumer.batch import Batch, Move
from services.consumer.blocks import alone, origin_of
from services.consumer.dead_letter import DeadLetter, DeadLetterTopic
from services.consumer.metrics import BATCH_READINGS, BATCH_WRITE_SECONDS, DEAD_LETTERS, MESSAGES_ABANDONED
from services.consumer.positions import Located, Positions
from services.consumer.sink import Refused, Sink, WriteResult
from services.core.backoff import Retries
from services.core.config import Settings
from services.core.errors import AbandonedError, PartitionsMovedError, TransientError
from services.core.logs import fields
from services.core.monitoring import DATABASE, KAFKA, Dependency

log = logging.getLogger("consumer")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Stored:
    """All of the batch is in PostgreSQL, or with the dead letters, and its partitions have advanced."""

    batch: Batch
    result: WriteResult
    letters: Sequence[DeadLetter]


Job = Batch | frozenset[int]  # to be stored; or partitions to be located
Outcome = Located | Stored | BaseException  # AbandonedError: only the job has ended; any other has ended the writer


class Writer:
    """Calls ``report`` with the outcome of each job, in its own thread; all else belongs to the thread that polls."""

    def __init__(self, settings: Settings, positions: Positions, report: Callable[[Outcome], None]) -> None:
        self._positions = positions
        self._report = report
        self._sink = Sink(settings)
        self._dead_letters = DeadLetterTopic(settings)
        self._job: Job | None = None
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
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

    def submit(self, job: Job) -> None:
        """Start a job; only when idle."""
        if self._job is not None:
            raise AssertionError("the writer is busy")
        self._abandon.clear()
        self._job = job
        self._jobs.put(job)

    def take(self, outcome: Outcome) -> None:
        """The outcome has arrived, so the writer is idle. Raises what ended the writer."""
        self._job = None
        if isinstance(outcome, BaseException) and not isinstance(outcome, AbandonedError):
            raise outcome

    def abandon(self) -> None:
        """Abandon the job at the next pause between two tries."""
        self._abandon.set()

    def stop(self) -> None:
        """End the thread soon; a job that still runs is abandoned."""
        self._abandon.set()
        self._jobs.put(None)

    def join(self) -> None:
        """Wait a moment for the thread to end."""
        self._thread.join(timeout=1)

    def _run(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                self._report(self._outcome_of(job))
                del job  # a batch that is done must not stay in memory during the next one
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that polls
            self._report(error)
        finally:
            self._sink.close()

    def _outcome_of(self, job: Job) -> Outcome:
        try:
            return self._store(job) if isinstance(job, Batch) else self._locate(job)
        except AbandonedError as error:
            if isinstance(error, PartitionsMovedError):
                log.warning("partitions_moved", extra=fields(detail=error))
            if isinstance(job, Batch):
                MESSAGES_ABANDONED.inc(len(job))
            return type(error)(*error.args)  # without the traceback, which holds the batch

    def _locate(self, partitions: frozenset[int]) -> Located:
        topic = self._keep_trying(KAFKA, self._positions.topic_id)
        return self._keep_trying(DATABASE, lambda: self._positions.read(topic, partitions))

    def _store(self, batch: Batch) -> Stored:
        """Commit the readings; what was refused goes to the dead letters before the commit that steps over it."""
        started = time.monotonic()
        readings, repeated = batch.split_repeated()
        move, advance = Move(batch.topic_id, batch.start, batch.end), not batch.dead_letters
        result = self._keep_trying(DATABASE, lambda: self._sink.write(readings, repeated, move, advance=advance))
        letters = batch.dead_letters + (self._letters_of(result.refused) if result.refused else [])
        if letters:
            self._keep_trying(KAFKA, lambda: self._dead_letters.send(letters))
        if not result.advanced:
            self._keep_trying(DATABASE, lambda: self._sink.advance(move))
        if len(batch):
            self._count(batch, result, letters, time.monotonic() - started)
        return Stored(batch, result, letters)

    def _letters_of(self, refused: Sequence[Refused]) -> list[DeadLetter]:
        """Dead letters for what was refused. Raises AbandonedError if Kafka has dropped a message meanwhile."""
        positions = {origin_of(each.row) for each in refused}
        messages = self._keep_trying(KAFKA, lambda: self._dead_letters.read_again(positions))
        if messages.keys() < positions:
            raise AbandonedError("Kafka no longer has all messages of the batch")
        return [
            DeadLetter(alone(messages[origin_of(each.row)], each.row), each.reason, each.detail) for each in refused
        ]

    def _keep_trying(self, server: Dependency, step: Callable[[], T]) -> T:
        """Run a step until it succeeds. Raises AbandonedError once the job is to be abandoned.

        Raises also what is not a TransientError, and PermanentError when a retry-limited one keeps coming back.
        """
        event = f"{server.name}_unavailable"
        retries = Retries()
        while True:
            try:
                done = step()
            except TransientError as error:
                server.note_failure()
                pause = retries.pause_after(error)
                log.warning(event, extra=fields(detail=error, retry_s=round(pause, 1)))
            else:
                server.note_success()
                return done
            if self._abandon.wait(pause):
                server.note_success()
                raise AbandonedError("abandoned while a server was unavailable")

    def _count(self, batch: Batch, result: WriteResult, letters: Sequence[DeadLetter], seconds: float) -> None:
        path = "merge" if result.merged else "copy"
        readings = len(batch) - len(batch.dead_letters)
        BATCH_READINGS.observe(readings)
        BATCH_WRITE_SECONDS.labels(path).observe(seconds)
        for letter in letters:
            DEAD_LETTERS.labels(letter.reason).inc()
        counts = {"readings": readings, **result.counts(), "dead_letters": len(letters)}
        log.info("batch_written", extra=fields(**counts, path=path, seconds=round(seconds, 4)))
