"""The writer thread: claims partitions and stores batches, one job at a time, and never touches the consumer.

librdkafka's consumer belongs to the thread that polls it (a commit from another thread waits while that thread
polls), so the writer only reports; the worker commits the offsets.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from confluent_kafka import Message

from services.consumer.dead_letter import DeadLetter, DeadLetterTopic
from services.consumer.instruments import BATCH_READINGS, BATCH_WRITE_SECONDS, DEAD_LETTERS, MESSAGES_LEFT
from services.consumer.sink import PartitionsLostError, Sink, WriteResult
from services.core.backoff import Retries
from services.core.config import Settings
from services.core.errors import MalformedMessage, TransientError
from services.core.kafka import place_of
from services.core.logs import fields
from services.core.monitoring import DATABASE, KAFKA, Server
from services.core.reading import Decoder, Reading

log = logging.getLogger("consumer")

T = TypeVar("T")


@dataclass(slots=True)
class Batch:
    """Messages of one transaction: decoded, or dead letters, and where each partition goes on."""

    term: int = 0  # in which assignment of partitions it was polled
    readings: list[Reading] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)  # of the readings, same positions
    dead_letters: list[DeadLetter] = field(default_factory=list)
    first_offsets: dict[int, int] = field(default_factory=dict)
    next_offsets: dict[int, int] = field(default_factory=dict)
    size_bytes: int = 0
    opened_at: float = field(default_factory=time.monotonic)

    def __len__(self) -> int:
        return len(self.readings) + len(self.dead_letters)

    def add(self, messages: Sequence[Message], decoder: Decoder) -> None:
        """Decode messages, in the order they came.

        Runs for each message, so it asks for an offset only where the messages change from one partition to another.
        """
        decode, readings, kept = decoder.decode, self.readings, self.messages
        before = messages[0]
        partition = self._begin(before)
        for message in messages:
            value = message.value()
            try:
                readings.append(decode(value))
            except MalformedMessage as error:
                self.dead_letters.append(DeadLetter(message, error.reason, str(error)))
            else:
                kept.append(message)
            if value:
                self.size_bytes += len(value)
            if message.partition() != partition:
                self._end(before)
                partition = self._begin(message)
            before = message
        self._end(before)

    def _begin(self, message: Message) -> int:
        """Note where the batch begins in the message's partition, which is returned."""
        partition, offset = place_of(message)
        self.first_offsets.setdefault(partition, offset)
        return partition

    def _end(self, message: Message) -> None:
        """Note where the message's partition goes on after this batch."""
        partition, offset = place_of(message)
        self.next_offsets[partition] = offset + 1


@dataclass(frozen=True, slots=True)
class Claim:
    """Become the only consumer that may write readings of these partitions."""

    partitions: frozenset[int]


@dataclass(frozen=True, slots=True)
class Claimed:
    """The claim is in the database."""


@dataclass(frozen=True, slots=True)
class Stored:
    """The batch is committed in PostgreSQL and its dead letters are with Kafka: its offsets may be committed."""

    batch: Batch
    result: WriteResult
    letters: Sequence[DeadLetter]


@dataclass(frozen=True, slots=True)
class Lost:
    """The batch was not written: another consumer has claimed a partition of it since we did."""

    batch: Batch


@dataclass(frozen=True, slots=True)
class Abandoned:
    """The job was given up on request; what it had done so far is harmless to repeat."""


Outcome = Claimed | Stored | Lost | Abandoned


class Writer:
    """Runs one job at a time in a thread of its own; back-pressure is that it takes no second one."""

    def __init__(self, settings: Settings) -> None:
        self._sink = Sink(settings)
        self._dead_letters = DeadLetterTopic(settings)
        self._condition = threading.Condition()
        self._job: Claim | Batch | None = None
        self._outcome: Outcome | None = None
        self._failure: BaseException | None = None
        self._stopping = False
        self._abandon = threading.Event()
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def submit(self, job: Claim | Batch) -> None:
        """Start a job; only when idle."""
        with self._condition:
            if self._job is not None:
                raise AssertionError("the writer is busy")
            self._abandon.clear()
            self._job = job
            self._condition.notify_all()

    @property
    def busy(self) -> bool:
        """Whether a job is running. Raises what ended the writer."""
        with self._condition:
            if self._failure is not None:
                raise self._failure
            return self._job is not None

    def wait(self, timeout_s: float) -> Outcome | None:
        """The outcome of the job, once; None if it still runs after ``timeout_s``. Raises what ended the writer."""
        with self._condition:
            self._condition.wait_for(lambda: self._outcome or self._failure or self._job is None, timeout_s)
            if self._failure is not None:
                raise self._failure
            outcome, self._outcome = self._outcome, None
            return outcome

    def abandon(self) -> None:
        """Give the job up at the next pause between two tries."""
        self._abandon.set()

    def stop(self) -> None:
        """End the thread; a job that still runs is given up."""
        self._abandon.set()
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
        self._thread.join(timeout=1)

    def _run(self) -> None:
        try:
            while (job := self._next_job()) is not None:
                outcome = self._claim(job) if isinstance(job, Claim) else self._store(job)
                with self._condition:
                    self._outcome, self._job = outcome, None
                    self._condition.notify_all()
                del job, outcome  # a batch that is done shall not stay in memory during the next one
        except BaseException as error:  # noqa: BLE001 - raised again by wait and busy, in the worker's thread
            with self._condition:
                self._failure = error
                self._condition.notify_all()
        finally:
            self._sink.close()

    def _next_job(self) -> Claim | Batch | None:
        with self._condition:
            self._condition.wait_for(lambda: self._job is not None or self._stopping)
            return None if self._stopping else self._job

    def _claim(self, claim: Claim) -> Outcome:
        done = self._retry(DATABASE, lambda: self._sink.claim(claim.partitions))
        return Abandoned() if done is None else Claimed()

    def _store(self, batch: Batch) -> Outcome:
        """Commit the readings and the ranges they touch, then send the dead letters and wait for the broker."""
        started = time.monotonic()
        try:
            result = self._retry(DATABASE, lambda: self._sink.write(batch.readings, batch.next_offsets))
        except PartitionsLostError as error:
            log.warning("partitions_lost", extra=fields(detail=error))
            return Lost(batch)
        if result is None:
            MESSAGES_LEFT.inc(len(batch))
            return Abandoned()
        letters = batch.dead_letters + [
            DeadLetter(batch.messages[row.index], row.reason, row.detail) for row in result.refused
        ]
        path = "merge" if result.merged else "copy"
        BATCH_READINGS.observe(len(batch.readings))
        BATCH_WRITE_SECONDS.labels(path).observe(time.monotonic() - started)
        if self._retry(KAFKA, lambda: self._dead_letters.send(letters)) is None:
            MESSAGES_LEFT.inc(len(letters))
            return Abandoned()
        for letter in letters:
            DEAD_LETTERS.labels(letter.reason).inc()
        log.info(
            "batch_written",
            extra=fields(
                readings=len(batch.readings),
                inserted=result.inserted,
                updated=result.updated,
                unchanged=result.unchanged,
                dead_letters=len(letters),
                path=path,
                seconds=round(time.monotonic() - started, 4),
            ),
        )
        return Stored(batch, result, letters)

    def _retry(self, server: Server, step: Callable[[], T]) -> T | None:
        """Run a step until the server is back; None if the job was abandoned in between."""
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
                server.note_given_up()
                return None
