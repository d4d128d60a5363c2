"""The consumer: poll, decode, write, commit.

The order is the guarantee:

1. ask the database where each partition goes on (positions.py), and fetch from there,
2. store the readings, and the ranges they touch, in one database transaction (sink.py),
3. send the dead letters and wait for the broker (dead_letter.py),
4. advance the positions, if they are still where the batch began: in the transaction of step 2 where there are no
   dead letters, else in one of its own,
5. commit the offsets to Kafka, for everybody who wants to know the lag. Nothing depends on them.

A crash between two steps repeats the earlier ones, and those change nothing the second time. A consumer that has lost
its partitions, and does not know it yet, fails at step 4.

Two threads: this one polls and decodes the next batch while the writer stores the one before. Each holds one
batch, so memory is bounded whatever the database does. When the writer is stuck, the partitions are paused and
polling goes on: the group never takes us for dead.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from services.consumer.batch import Batch, OutOfPlaceError
from services.consumer.dead_letter import DeadLetter
from services.consumer.instruments import MESSAGES_EXPIRED, MESSAGES_LEFT, MESSAGES_READ
from services.consumer.lag import Lag
from services.consumer.positions import Places, Positions
from services.consumer.sink import WriteResult
from services.consumer.writer import Locate, NotStored, Outcome, Stored, Writer
from services.core.config import Settings
from services.core.database import connect_at_start
from services.core.errors import ConfigurationError, PermanentError
from services.core.kafka import (
    NOT_ALLOWED,
    ClientSettings,
    client_settings,
    connect_admin,
    create_topics,
    place_of,
)
from services.core.logs import fields
from services.core.monitoring import RETRIES, Monitoring, database_probe, kafka_probe
from services.core.reading import Decoder
from services.core.shutdown import Shutdown

log = logging.getLogger("consumer")

POLL_AT_ONCE = 4000  # librdkafka waits until it has this many, or the time is over; what is decoded together
MOST_POLL_BYTES = 2 * 1024 * 1024  # of large messages fewer
FIRST_BATCH_ROWS = 5000  # the database begins to work while the rest is fetched; each batch may be twice as large
POLL_S = 0.1
WRITER_LOOK_S = 0.01  # between two looks at the writer while something waits for it
MOST_BATCH_BYTES = 8 * 1024 * 1024  # three batches, and what is fetched ahead, have to fit into a small container
PAUSE_AFTER_S = 2.0  # a pause throws away what was fetched ahead, so not for every busy moment
WATERMARKS_WITHIN_S = 5.0
CHECK_EVERY_S = 5.0
FINISH_WITHIN_S = 3.0  # twice that and leaving the group fit into the 10 s a service has to end
HAND_OVER_WITHIN_S = 20.0  # well inside the group's session timeout
HUNG_AFTER_S = 60.0

PROTOCOLS = {"auto": ("consumer", "classic"), "consumer": ("consumer",), "classic": ("classic",)}


class ProtocolNotOfferedError(Exception):
    """The brokers did not let us into the group by the protocol of Kafka 4."""


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


class Worker:
    """Membership, polling, decoding, back-pressure, offsets.

    ``protocol`` is the group protocol: "consumer", or "classic" with cooperative rebalancing. In both, what a member
    keeps in a rebalance goes on without a pause.
    """

    def __init__(self, settings: Settings, shutdown: Shutdown, *, until_caught_up: bool, protocol: str) -> None:
        self.totals = Totals()
        self._settings = settings
        self._shutdown = shutdown
        self._until_caught_up = until_caught_up
        days = settings.raw_retention_days
        self._decoder = Decoder(
            max_bytes=settings.max_message_bytes,
            max_future=timedelta(seconds=settings.max_future_seconds),
            max_past=timedelta(days=settings.max_past_days),
            max_age=timedelta(days=days) if days else None,
        )
        self._positions = Positions(settings, shutdown)
        self._protocol = protocol
        self._consumer = Consumer(consumer_settings(settings, protocol) | {"on_commit": self._on_commit})
        self._writer = Writer(settings, self._positions)
        self._lag = Lag(self._consumer, settings.kafka_topic)
        self._assigned: set[int] = set()
        self._places = Places()  # of the topic that we read
        self._next: dict[int, int] = {}  # where each partition is once all batches are stored; some are not located yet
        self._filling = Batch()
        self._ready: Batch | None = None  # waits for the writer
        self._batch_rows = min(FIRST_BATCH_ROWS, settings.consumer_batch_rows)
        self._poll_at_once = 10  # until we know how large messages are
        self._rows_each = 1  # of the newest messages, on average
        self._rebalances = 0
        self._next_check = time.monotonic() + CHECK_EVERY_S
        self._unanswered_commits = 0
        self._ends: dict[int, int] = {}  # where a partition ended, until more comes
        self._ends_committed: dict[int, int] = {}
        self._commit_again = False  # Kafka refused one, and there may never be a next one
        self._blocked_since: float | None = None
        self._paused = False
        self._closing = False

    def run(self) -> Totals:
        """Consume until a signal or, if asked so, until the topic's end."""
        self._consumer.subscribe(
            [self._settings.kafka_topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
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
        room = self._batch_rows - len(self._filling)
        if (room <= 0 or self._filling.size_bytes >= MOST_BATCH_BYTES) and not self._paused:
            self._settle(self._writer.wait(POLL_S / 2))
            return
        rebalances = self._rebalances
        messages = self._consumer.consume(
            max(1, min(room // self._rows_each, self._poll_at_once)), timeout=self._poll_timeout()
        )
        readable = [message for message in messages if message.error() is None]
        if readable and rebalances != self._rebalances:  # some may be of partitions that moved meanwhile
            self._go_back()
        elif readable:
            self._fill(readable)
        if len(readable) < len(messages):
            for message in messages:
                self._note_error(message)

    def _fill(self, messages: list[Message]) -> None:
        MESSAGES_READ.inc(len(messages))
        self._decoder.set_clock(datetime.now(UTC) - self._writer.clock_lead)
        before, rows = self._filling.size_bytes, len(self._filling)
        try:
            self._filling.add(messages, self._decoder, self._next)
        except OutOfPlaceError as error:
            log.warning("messages_out_of_place", extra=fields(detail=error))
            self._go_back()
            return
        average = max(1, (self._filling.size_bytes - before) // len(messages))
        self._rows_each = max(1, (len(self._filling) - rows) // len(messages))
        self._poll_at_once = max(1, min(POLL_AT_ONCE, MOST_POLL_BYTES // average))
        for partition, end in tuple(self._ends.items()):
            if self._next.get(partition, end) > end:
                del self._ends[partition]

    def _poll_timeout(self) -> float:
        if not self._next:
            return WRITER_LOOK_S  # partitions may be assigned at any moment, and then located
        if self._filling.is_empty or self._paused:
            return POLL_S
        if self._ready is not None:
            return WRITER_LOOK_S
        age = time.monotonic() - self._filling.opened_at
        return min(POLL_S, max(0.0, self._settings.consumer_batch_seconds - age))

    def _note_error(self, message: Message) -> None:
        error = message.error()
        if error is None:
            return
        code = error.code()
        if code == KafkaError._PARTITION_EOF:
            partition, offset = place_of(message)
            if partition in self._next:
                self._ends[partition] = offset
        elif code == KafkaError._AUTO_OFFSET_RESET:
            self._leave_missing(message.partition())
        elif code in NOT_ALLOWED:
            raise PermanentError(f"Kafka refuses to let us read {self._settings.kafka_topic}: {error.str()}")
        elif code == KafkaError._FATAL and self._protocol == "consumer" and not self._rebalances:
            raise ProtocolNotOfferedError(error.str())  # librdkafka does not tell the code behind it
        elif code == KafkaError._FATAL:
            raise PermanentError(f"Kafka ends our membership of group {self._settings.kafka_group}: {error.str()}")
        else:
            RETRIES.labels("kafka").inc()
            log.warning("kafka_unavailable", extra=fields(detail=error.str()))

    # Where to go on --------------------------------------------------------------------------------------

    def _new_batch(self) -> Batch:
        return Batch(self._places.topic_id, self._places.fills_gaps)

    def _at(self, partitions: Iterable[int]) -> list[TopicPartition]:
        """Where the partitions are; a paused 0 where that is not known yet.

        Never a logical offset: librdkafka asks the broker what it is, and when a partition was assigned elsewhere
        before the answer came, it asks once more half a second later, and goes there.
        """
        topic = self._settings.kafka_topic
        return [TopicPartition(topic, partition, self._next.get(partition, 0)) for partition in partitions]

    def _fetch(self, partitions: Iterable[int]) -> None:
        """Go on where these partitions are. A seek would be refused while one has no position that is valid."""
        places = self._at(partitions)
        if places:
            self._consumer.incremental_unassign(places)
            self._consumer.incremental_assign(places)
            (self._consumer.pause if self._paused else self._consumer.resume)(places)

    def _go_back(self) -> None:
        """Forget what is not stored; nothing is fetched until the database has said where to go on."""
        MESSAGES_LEFT.inc(len(self._filling) + len(self._ready or ()))
        self._blocked_since, self._paused = None, False
        self._ends.clear()
        self._next.clear()
        self._ready, self._filling = None, self._new_batch()
        if self._assigned:
            self._consumer.pause(self._at(self._assigned))

    def _take_places(self, places: Places) -> None:
        """The database's answer: fetch from there, unless a partition is another consumer's by now."""
        if self._places.topic_id not in ("", places.topic_id):
            log.warning("topic_replaced", extra=fields(topic=self._settings.kafka_topic))
            self._go_back()
        self._places = places
        if self._filling.is_empty:
            self._filling = self._new_batch()
        found = {partition: at for partition, at in places.positions.items() if partition in self._assigned}
        self._next |= found
        self._lag.begin(found)
        self._fetch(found)

    def _leave_missing(self, partition: int | None) -> None:
        """Kafka has nothing at our position: what was there has expired, or a broker has lost the end of its log."""
        if partition is None or partition not in self._next:
            return
        position = self._next[partition]
        place = TopicPartition(self._settings.kafka_topic, partition)
        try:
            first, end = self._consumer.get_watermark_offsets(place, timeout=WATERMARKS_WITHIN_S)
        except KafkaException as error:
            log.warning("kafka_unavailable", extra=fields(detail=error.args[0].str()))
            first, end = position, position  # try again from there
        if position < first:
            MESSAGES_EXPIRED.inc(first - position)
            log.error(
                "messages_expired",
                extra=fields(
                    partition=partition,
                    messages=first - position,
                    detail="Kafka deleted messages that were never stored: the topic's retention is too short",
                ),
            )
        elif position > end:
            log.error(
                "topic_is_shorter",
                extra=fields(
                    partition=partition,
                    position=position,
                    end=end,
                    detail="a broker has lost messages that were stored here; going on at the end of the topic",
                ),
            )
        if not first <= position <= end:
            self._filling.move(partition, min(max(position, first), end), self._next)
        self._fetch([partition])

    # Handing batches to the writer -----------------------------------------------------------------------

    def _advance(self) -> None:
        """Take the writer's outcome, then give it what comes next."""
        self._settle(self._writer.wait(0))
        self._lag.look(paused=self._paused)
        if self._next and self._positions.topic_was_replaced(self._places.topic_id):
            self._go_back()
        if self._ready is None and self._is_due():
            self._ready, self._filling = self._filling, self._new_batch()
            self._batch_rows = min(2 * self._batch_rows, self._settings.consumer_batch_rows)
        unknown = self._assigned - self._next.keys()
        if self._writer.busy:
            self._note_blocked(has_more=self._ready is not None)
        elif unknown:
            self._writer.submit(Locate(frozenset(unknown)))
        elif self._ready is not None:
            batch, self._ready = self._ready, None
            self._writer.submit(batch)
            self._unblock()
        else:
            self._unblock()
            self._commit_ends()
            self._check_positions()

    def _settle(self, outcome: Outcome | None) -> None:
        match outcome:
            case Places():
                self._take_places(outcome)
            case Stored(batch, result, letters) if len(batch):
                self.totals.add(result, letters)
                self._commit({each: end for each, end in batch.end.items() if each in self._next})
            case NotStored():
                self._go_back()

    def _check_positions(self) -> None:
        """While nothing comes, look whether the database has been emptied or restored, or told to go back."""
        now = time.monotonic()
        if now < self._next_check or not self._next or not self._filling.is_empty:
            return
        self._next_check = now + CHECK_EVERY_S
        if self._commit_again:
            self._commit_again = False
            self._ends_committed.clear()
        check = self._new_batch()
        check.start = check.end = dict(self._next)
        self._writer.submit(check)

    def _is_due(self) -> bool:
        batch = self._filling
        return not batch.is_empty and (
            not len(batch)  # only a position to correct
            or len(batch) >= self._batch_rows
            or batch.size_bytes >= MOST_BATCH_BYTES
            or time.monotonic() - batch.opened_at >= self._settings.consumer_batch_seconds
            or self._all_at_end()
        )

    def _commit_ends(self) -> None:
        """When all that was polled is stored, step over what is not a message (a transaction's end marker).

        Otherwise there would be a lag for ever, and nobody could tell it from a real one.
        """
        if not self._filling.is_empty or self._ends == self._ends_committed:
            return
        behind = {partition: end for partition, end in self._ends.items() if end > self._next[partition]}
        for partition, end in behind.items():
            self._filling.move(partition, end, self._next)
        if not behind:
            self._ends_committed = dict(self._ends)
            self._commit(self._ends)

    def _commit(self, offsets: Mapping[int, int]) -> None:
        """Tell Kafka how far we are."""
        if not offsets:
            return
        topic = self._settings.kafka_topic
        try:
            self._consumer.commit(
                offsets=[TopicPartition(topic, partition, offset) for partition, offset in offsets.items()],
                asynchronous=True,
            )
        except KafkaException as error:
            self._note_commit(error.args[0])
        else:
            self._unanswered_commits += 1

    def _on_commit(self, error: KafkaError | None, places: list[TopicPartition]) -> None:
        """The broker's answer, served while polling."""
        self._unanswered_commits -= 1
        refused = [place.error for place in places if place.error is not None]
        problem = error or (refused[0] if refused else None)
        if problem is None:
            self._lag.note_committed(places, self._next)
        else:
            self._note_commit(problem)

    def _note_commit(self, error: KafkaError) -> None:
        if error.code() in NOT_ALLOWED:
            raise PermanentError(f"Kafka refuses to commit offsets: {error.str()}")
        log.warning("offsets_not_committed", extra=fields(detail=error.str()))
        self._commit_again = True

    # Back-pressure ---------------------------------------------------------------------------------------

    def _note_blocked(self, *, has_more: bool) -> None:
        now = time.monotonic()
        self._blocked_since = (self._blocked_since or now) if has_more else None
        if self._blocked_since and not self._paused and now - self._blocked_since > PAUSE_AFTER_S:
            self._paused = True
            self._consumer.pause(self._at(self._assigned))
            log.warning("paused", extra=fields(waiting=len(self._ready or ()) + len(self._filling)))

    def _unblock(self) -> None:
        self._blocked_since = None
        if self._paused:
            self._paused = False
            self._consumer.resume(self._at(self._next))
            log.info("resumed")

    # Membership ------------------------------------------------------------------------------------------

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """More partitions are ours from now on. They wait until the database has said where to begin."""
        self._rebalances += 1
        added = {place.partition for place in partitions}
        self._assigned |= added
        consumer.incremental_assign(self._at(added))
        if added:
            consumer.pause(self._at(added))
        log.info("partitions_assigned", extra=fields(partitions=sorted(added)))

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Partitions go to another consumer: let the batch in hand finish first, so that it need not be repeated."""
        if not self._closing and partitions:
            self._drain_writer(HAND_OVER_WITHIN_S if self._writer.is_storing else 0.0)
        self._on_lost(consumer, partitions)

    def _on_lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Partitions are another consumer's already: forget what we hold of them."""
        self._rebalances += 1
        gone = {place.partition for place in partitions}
        log.info("partitions_revoked", extra=fields(partitions=sorted(gone)))
        if gone:
            consumer.resume(partitions)  # librdkafka keeps a pause for the day the partition comes back
        held = len(self._filling) + len(self._ready or ())
        self._assigned -= gone
        for each in (self._next, self._ends, self._ends_committed):
            for partition in gone & each.keys():
                del each[partition]
        self._filling = self._filling.without(gone)
        self._ready = None if self._ready is None else self._ready.without(gone)
        MESSAGES_LEFT.inc(held - len(self._filling) - len(self._ready or ()))
        self._lag.forget(gone)

    def _drain_writer(self, within_s: float) -> None:
        """Wait for the batch in hand; abandon it when it takes too long."""
        self._settle(self._writer.wait(within_s))
        if self._writer.busy:
            self._writer.abandon()
            self._settle(self._writer.wait(POLL_S))

    # The end ---------------------------------------------------------------------------------------------

    def _all_at_end(self) -> bool:
        return self._until_caught_up and bool(self._assigned) and self._ends.keys() >= self._assigned

    def _caught_up(self) -> bool:
        if not self._all_at_end() or not self._filling.is_empty or self._ready is not None:
            return False
        self._settle(self._writer.wait(0))
        return not self._writer.busy and self._ends == self._ends_committed and not self._unanswered_commits

    def _finish(self) -> None:
        """Store what is ready if that is quick; else the group's next member polls it again."""
        self._drain_writer(FINISH_WITHIN_S)
        if self._ready is not None and not self._writer.busy:
            self._writer.submit(self._ready)
            self._drain_writer(FINISH_WITHIN_S)


def consumer_settings(settings: Settings, protocol: str) -> ClientSettings:
    """librdkafka settings of the consumer: offsets only by us, read committed, bounded read-ahead."""
    group: ClientSettings = {"group.protocol": protocol}
    if protocol == "classic":
        group |= {
            "partition.assignment.strategy": "cooperative-sticky",
            "session.timeout.ms": settings.kafka_session_timeout_ms,
            "heartbeat.interval.ms": min(3000, settings.kafka_session_timeout_ms // 3),
        }
    return (
        client_settings(settings, "consumer")
        | group
        | {
            "group.id": settings.kafka_group,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "error",  # what is missing must not be passed over without a word
            "isolation.level": "read_committed",
            "max.poll.interval.ms": max(300_000, settings.kafka_session_timeout_ms),
            "enable.partition.eof": True,
            # Read-ahead for a few batches; a small message costs several times its size in librdkafka's queue.
            "queued.min.messages": 30_000,
            "queued.max.messages.kbytes": 32_768,
            "fetch.message.max.bytes": 262_144,
            "fetch.queue.backoff.ms": 10,
        }
    )


def collect_garbage_seldom() -> None:
    """Messages and readings come in thousands, none of them in a cycle.

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
        totals = consume(settings, shutdown, until_caught_up=until_caught_up)
    log.info("stopped", extra=fields(**totals.as_fields(), cpu_s=round(time.process_time(), 2)))
    return 0


def consume(settings: Settings, shutdown: Shutdown, *, until_caught_up: bool) -> Totals:
    """Work with the newest group protocol that the settings allow and the brokers offer."""
    reason: Exception | None = None
    for protocol in PROTOCOLS[settings.kafka_group_protocol]:
        try:
            return Worker(settings, shutdown, until_caught_up=until_caught_up, protocol=protocol).run()
        except ProtocolNotOfferedError as error:
            log.info("group_protocol_not_offered", extra=fields(protocol=protocol))
            reason = error
    raise ConfigurationError(
        f"KAFKA_GROUP_PROTOCOL={settings.kafka_group_protocol}: the brokers refuse it, older ones than Kafka 4 do; "
        f"use auto ({reason})"
    )
