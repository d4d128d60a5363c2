"""The consumer: poll, decode, write, commit.

The commit order is the guarantee:

1. claim the partitions in the database, and have the broker confirm that we are still a member: from then on
   nobody with older messages of these partitions can write after us,
2. commit the readings and the ranges they touch, in one database transaction (sink.py),
3. send the dead letters and wait for the broker (dead_letter.py),
4. commit the offsets, if the partitions have not moved since the batch was polled: an owner in between may be
   repeating what lies before these offsets, and Kafka takes them from any member of the group.

A crash between two steps repeats the earlier ones, and those change nothing the second time.

Two threads: this one polls and decodes the next batch while the writer stores the one before. Each holds one
batch, so memory is bounded whatever the database does. When the writer is stuck, the partitions are paused and
polling goes on: the group never takes us for dead.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from functools import partial

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from services.consumer.dead_letter import DeadLetter
from services.consumer.instruments import MESSAGES_LEFT, MESSAGES_READ
from services.consumer.lag import Lag
from services.consumer.sink import WriteResult
from services.consumer.writer import Batch, Claim, Claimed, Lost, Outcome, Stored, Writer
from services.core.config import Settings
from services.core.database import connect_at_start
from services.core.errors import PermanentError
from services.core.kafka import ClientSettings, client_settings, connect_admin, create_topics, place_of
from services.core.logs import fields
from services.core.monitoring import RETRIES, Monitoring, database_probe, kafka_probe
from services.core.reading import Decoder
from services.core.shutdown import Shutdown

log = logging.getLogger("consumer")

POLL_AT_ONCE = 500  # librdkafka waits until it has so many, or the time is over
MOST_POLL_BYTES = 2 * 1024 * 1024  # of large messages fewer
POLL_S = 0.1
WRITER_LOOK_S = 0.01  # between two looks at the writer while a batch waits for it
MOST_BATCH_BYTES = 8 * 1024 * 1024  # three batches, and what is fetched ahead, have to fit into a small container
PAUSE_AFTER_S = 2.0  # a pause throws away what was fetched ahead, so not for every busy moment
CONFIRM_WITHIN_S = 10.0
FINISH_WITHIN_S = 3.0  # twice that and leaving the group fit into the 10 s a service has to end
HAND_OVER_WITHIN_S = 20.0  # well inside the group's session timeout
HUNG_AFTER_S = 60.0

NOT_ALLOWED = frozenset(
    {
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.SASL_AUTHENTICATION_FAILED,
        KafkaError._AUTHENTICATION,
    }
)


@dataclass(slots=True)
class Totals:
    """Exact counts since the start of this process."""

    inserted: int = 0
    updated: int = 0
    unchanged: int = 0
    dead_letters: Counter[str] = field(default_factory=Counter)

    def add(self, result: WriteResult, letters: Sequence[DeadLetter]) -> None:
        """Count one stored batch."""
        self.inserted += result.inserted
        self.updated += result.updated
        self.unchanged += result.unchanged
        self.dead_letters.update(letter.reason for letter in letters)

    def as_fields(self) -> dict[str, object]:
        """For a log line."""
        counts: dict[str, object] = {
            "inserted": self.inserted,
            "updated": self.updated,
            "unchanged": self.unchanged,
            "dead_letters": self.dead_letters.total(),
        }
        return counts | {f"dead_{reason}": count for reason, count in sorted(self.dead_letters.items())}


class Ownership(Enum):
    """How far step 1 is for the partitions of this assignment."""

    NONE = "none"
    CLAIMING = "claiming"
    CONFIRMING = "confirming"
    OWNED = "owned"


@dataclass(frozen=True, slots=True)
class Commit:
    """An offset commit under way; ``confirms`` is the term that it shall confirm."""

    confirms: int | None


class Worker:
    """Membership, polling, decoding, back-pressure, offsets."""

    def __init__(self, settings: Settings, shutdown: Shutdown, *, until_caught_up: bool) -> None:
        self.totals = Totals()
        self._settings = settings
        self._shutdown = shutdown
        self._until_caught_up = until_caught_up
        days = settings.raw_retention_days
        self._decoder = Decoder(
            max_bytes=settings.max_message_bytes,
            max_future=timedelta(seconds=settings.max_future_seconds),
            max_age=timedelta(days=days) if days else None,
        )
        self._consumer = Consumer(consumer_settings(settings) | {"on_commit": self._on_commit})
        self._writer = Writer(settings)
        self._lag = Lag(self._consumer, settings.kafka_topic)
        self._filling = Batch()
        self._poll_at_once = 10  # until we know how large messages are
        self._ready: Batch | None = None  # waits for the claim or for the writer
        self._ownership = Ownership.NONE
        self._term = 0  # one for each assignment of partitions, and for the time without any
        self._commits: deque[Commit] = deque()
        self._confirm_deadline = 0.0
        self._assigned: set[int] = set()
        self._ends: dict[int, int] = {}  # where a partition ended, until more comes
        self._ends_committed: dict[int, int] = {}
        self._blocked_since: float | None = None
        self._paused = False
        self._closing = False

    def run(self) -> Totals:
        """Consume until a signal or, if asked so, until the topic's end."""
        self._consumer.subscribe(
            [self._settings.kafka_topic],
            on_assign=self._on_assign,
            on_revoke=self._on_revoke,
            on_lost=self._on_revoke,
        )
        try:
            while not self._shutdown.requested and not self._caught_up():
                self._poll()
                self._advance()
            self._finish()
        finally:
            self._closing = True
            self._writer.stop()
            self._consumer.close()
        return self.totals

    # Polling ---------------------------------------------------------------------------------------------

    def _poll(self) -> None:
        """Fill the batch. A full one waits for the writer a moment at a time, and polls on when paused."""
        room = self._settings.consumer_batch_rows - len(self._filling)
        full = room <= 0 or self._filling.size_bytes >= MOST_BATCH_BYTES
        if full and not self._paused:
            if self._writer.busy:
                self._settle(self._writer.wait(POLL_S / 2))
                return
            self._pause()  # the group's answer to our claim comes by polling, and no more readings shall
        messages = self._consumer.consume(max(1, min(room, self._poll_at_once)), timeout=self._poll_timeout())
        readable = [message for message in messages if message.error() is None]
        if len(readable) < len(messages):
            for message in messages:
                self._note_error(message)
        if readable:
            MESSAGES_READ.inc(len(readable))
            if not len(self._filling):
                self._filling.opened_at = time.monotonic()
            self._decoder.set_clock(datetime.now(UTC))
            before = self._filling.size_bytes
            self._filling.add(readable, self._decoder)
            average = max(1, (self._filling.size_bytes - before) // len(readable))
            self._poll_at_once = max(1, min(POLL_AT_ONCE, MOST_POLL_BYTES // average))
            self._lag.begin(self._filling.first_offsets)
            for partition, end in tuple(self._ends.items()):
                if self._filling.next_offsets.get(partition, end) > end:
                    del self._ends[partition]

    def _poll_timeout(self) -> float:
        if not len(self._filling) or self._paused:
            return POLL_S
        if self._ready is not None:
            return WRITER_LOOK_S
        age = time.monotonic() - self._filling.opened_at
        return min(POLL_S, max(0.0, self._settings.consumer_batch_seconds - age))

    def _note_error(self, message: Message) -> None:
        error = message.error()
        if error is None:
            return
        if error.code() == KafkaError._PARTITION_EOF:
            partition, offset = place_of(message)
            self._ends[partition] = offset
            self._lag.begin({partition: offset})
        elif error.code() in NOT_ALLOWED:
            raise PermanentError(f"Kafka refuses to let us read {self._settings.kafka_topic}: {error.str()}")
        else:
            RETRIES.labels("kafka").inc()
            log.warning("kafka_unavailable", extra=fields(detail=error.str()))

    # Handing batches to the writer -----------------------------------------------------------------------

    def _advance(self) -> None:
        """Take the writer's outcome, then start what comes next: a claim, or the batch that is ready."""
        self._settle(self._writer.wait(0))
        self._lag.look(paused=self._paused)
        if self._ready is None and self._is_due():
            self._ready, self._filling = self._filling, Batch(self._term)
        if self._ready is None:
            self._blocked_since = None
            self._commit_ends()
        elif self._writer.busy or self._ownership in (Ownership.CLAIMING, Ownership.CONFIRMING):
            self._note_blocked()
        elif self._ownership is Ownership.NONE:
            self._ownership = Ownership.CLAIMING
            self._writer.submit(Claim(frozenset(self._assigned)))
        else:
            batch, self._ready = self._ready, None
            self._writer.submit(batch)
            self._unblock()

    def _is_due(self) -> bool:
        batch = self._filling
        return len(batch) > 0 and (
            len(batch) >= self._settings.consumer_batch_rows
            or batch.size_bytes >= MOST_BATCH_BYTES
            or time.monotonic() - batch.opened_at >= self._settings.consumer_batch_seconds
            or self._all_at_end()
        )

    def _settle(self, outcome: Outcome | None) -> None:
        match outcome:
            case Claimed():
                self._confirm_claim()
            case Stored(batch, result, letters):
                self.totals.add(result, letters)
                if batch.term == self._term:
                    self._commit(batch.next_offsets, Commit(confirms=None))
                else:  # the next owner may be between these offsets, and has to come to their end itself
                    log.info("offsets_left_to_the_next_owner")
            case Lost(batch) if batch.term == self._term:  # else its next owner polls it again
                self._ownership = Ownership.NONE
                if self._ready is not None:
                    batch = joined(batch, self._ready)
                self._ready = batch
            case Lost(batch):
                MESSAGES_LEFT.inc(len(batch))
            case _:
                if self._ownership is Ownership.CONFIRMING and time.monotonic() > self._confirm_deadline:
                    self._confirm_claim()

    def _confirm_claim(self) -> None:
        """Ask the broker whether we are still a member: commit the offsets where the next batch begins.

        That changes nothing, but is refused if the group has moved on; then our claim came too late.
        """
        if self._ready is None:
            self._ownership = Ownership.NONE
            return
        self._ownership = Ownership.CONFIRMING
        self._confirm_deadline = time.monotonic() + CONFIRM_WITHIN_S
        self._commit(self._ready.first_offsets, Commit(confirms=self._term))

    def _commit_ends(self) -> None:
        """When all that was polled is stored, step over what is not a message (a transaction's end marker).

        Otherwise the group would show a lag for ever, and nobody could tell it from a real one.
        """
        if len(self._filling) or self._writer.busy or self._ends == self._ends_committed:
            return
        self._ends_committed = dict(self._ends)
        if self._ends:
            self._commit(self._ends, Commit(confirms=None))

    def _commit(self, offsets: dict[int, int], commit: Commit) -> None:
        topic = self._settings.kafka_topic
        try:
            self._consumer.commit(
                offsets=[TopicPartition(topic, partition, offset) for partition, offset in offsets.items()],
                asynchronous=True,
            )
        except KafkaException as error:
            self._note_commit(error.args[0], commit)
        else:
            self._commits.append(commit)

    def _on_commit(self, error: KafkaError | None, places: list[TopicPartition]) -> None:
        """The broker's answer, served while polling; answers come in the order of the commits."""
        if not self._commits:
            return
        refused = [place.error for place in places if place.error is not None]
        problem = error or (refused[0] if refused else None)
        if problem is None:
            self._lag.note_committed(places, self._assigned)
        self._note_commit(problem, self._commits.popleft())

    def _note_commit(self, error: KafkaError | None, commit: Commit) -> None:
        if error is not None and error.code() in NOT_ALLOWED:
            raise PermanentError(f"Kafka refuses to commit offsets: {error.str()}")
        if error is not None:  # the next commit covers this one; after a crash the batch is merged again
            log.warning("offsets_not_committed", extra=fields(detail=error.str()))
        if self._ownership is Ownership.CONFIRMING and commit.confirms == self._term:
            if error is None:
                self._ownership = Ownership.OWNED
            else:  # ask again, until the group says yes or takes the partitions away
                self._confirm_deadline = time.monotonic() + POLL_S

    # Back-pressure ---------------------------------------------------------------------------------------

    def _note_blocked(self) -> None:
        now = time.monotonic()
        self._blocked_since = self._blocked_since or now
        if not self._paused and now - self._blocked_since > PAUSE_AFTER_S:
            self._pause()
            log.warning("paused", extra=fields(waiting=len(self._ready or ()) + len(self._filling)))

    def _pause(self) -> None:
        self._paused = True
        self._consumer.pause(self._consumer.assignment())

    def _unblock(self) -> None:
        self._blocked_since = None
        if self._paused:
            self._paused = False
            self._consumer.resume(self._consumer.assignment())
            log.info("resumed")

    # Membership ------------------------------------------------------------------------------------------

    def _on_assign(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._assigned = {place.partition for place in partitions}
        self._start_over()
        log.info("partitions_assigned", extra=fields(partitions=sorted(self._assigned)))

    def _on_revoke(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Let the batch in hand finish, drop what waits: its next owner polls it again."""
        log.info("partitions_revoked", extra=fields(partitions=sorted(place.partition for place in partitions)))
        self._assigned.clear()
        self._unblock()  # librdkafka keeps a pause for the day the partition comes back
        if not self._closing:
            self._drain_writer(HAND_OVER_WITHIN_S)
        self._start_over()

    def _start_over(self) -> None:
        MESSAGES_LEFT.inc(len(self._filling) + len(self._ready or ()))
        self._lag.forget()
        self._ownership = Ownership.NONE
        self._term += 1
        self._filling = Batch(self._term)
        self._ready = None
        self._ends.clear()
        self._ends_committed.clear()
        self._blocked_since = None
        self._paused = False

    def _drain_writer(self, within_s: float) -> None:
        """Wait for the job in hand; abandon it when it takes too long."""
        self._settle(self._writer.wait(within_s))
        if self._writer.busy:
            self._writer.abandon()
            self._settle(self._writer.wait(POLL_S))

    # The end ---------------------------------------------------------------------------------------------

    def _all_at_end(self) -> bool:
        return self._until_caught_up and bool(self._assigned) and self._ends.keys() >= self._assigned

    def _caught_up(self) -> bool:
        if not self._all_at_end() or len(self._filling) or self._ready is not None:
            return False
        self._settle(self._writer.wait(0))
        return not self._writer.busy and self._ends == self._ends_committed and not self._commits

    def _finish(self) -> None:
        """Store what is ready if that is quick; else the group's next member polls it again."""
        self._drain_writer(FINISH_WITHIN_S)
        if self._ownership is Ownership.OWNED and self._ready is not None and not self._writer.busy:
            self._writer.submit(self._ready)
            self._drain_writer(FINISH_WITHIN_S)


def joined(first: Batch, second: Batch) -> Batch:
    """Two batches in a row as one."""
    return Batch(
        term=first.term,
        readings=first.readings + second.readings,
        messages=first.messages + second.messages,
        dead_letters=first.dead_letters + second.dead_letters,
        first_offsets=second.first_offsets | first.first_offsets,
        next_offsets=first.next_offsets | second.next_offsets,
        size_bytes=first.size_bytes + second.size_bytes,
        opened_at=first.opened_at,
    )


def consumer_settings(settings: Settings) -> ClientSettings:
    """librdkafka settings of the consumer: offsets only by us, read committed, bounded read-ahead."""
    return client_settings(settings, "consumer") | {
        "group.id": settings.kafka_group,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "earliest",
        "isolation.level": "read_committed",
        "session.timeout.ms": settings.kafka_session_timeout_ms,
        "heartbeat.interval.ms": min(3000, settings.kafka_session_timeout_ms // 3),
        "max.poll.interval.ms": max(300_000, settings.kafka_session_timeout_ms),
        "enable.partition.eof": True,
        # Read-ahead for a few batches; a small message costs several times its size in librdkafka's queue.
        "queued.min.messages": 30_000,
        "queued.max.messages.kbytes": 32_768,
        "fetch.message.max.bytes": 262_144,
        "fetch.queue.backoff.ms": 10,
        "partition.assignment.strategy": "range",
    }


def collect_garbage_seldom() -> None:
    """A batch is tens of thousands of objects, none of them in a cycle.

    By default each 700 new ones start a garbage collection, which took a quarter of this process's time.
    """
    gc.freeze()
    gc.set_threshold(100_000)


def run(settings: Settings, shutdown: Shutdown, *, until_caught_up: bool = False) -> int:
    """Consume the topic into ``sensor_data``. Returns the exit code."""
    collect_garbage_seldom()
    probes = partial(kafka_probe, settings), partial(database_probe, settings)
    with Monitoring(settings, shutdown, "consumer", *probes, hung_after_s=HUNG_AFTER_S):
        create_topics(connect_admin(settings, shutdown), settings, shutdown=shutdown)
        connect_at_start(settings, shutdown).close()
        totals = Worker(settings, shutdown, until_caught_up=until_caught_up).run()
    log.info("stopped", extra=fields(**totals.as_fields(), cpu_s=round(time.process_time(), 2)))
    return 0
