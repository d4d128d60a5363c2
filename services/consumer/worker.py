"""The consumer: poll, decode, write, commit.

The order is the guarantee:

1. ask the database where each partition continues (positions.py), and fetch from there (partitions.py),
2. store the readings, and the ranges they touch, in one database transaction (sink.py),
3. send the dead letters and wait for the broker (dead_letter.py),
4. advance the positions, if they are still where the batch began: in the transaction of step 2 where there are no
   dead letters, else in one of its own,
5. commit the offsets to Kafka, so that everybody can see the lag. Nothing depends on them.

A crash between two steps repeats the earlier ones, and those change nothing the second time. A consumer that has lost
its partitions, and does not know it yet, fails at step 4.

This thread polls and decodes the next batches while writers (writer.py) store the ones before. When a writer is stuck,
its partitions are paused and polling continues, so the group never takes us for dead.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import groupby
from queue import Empty, SimpleQueue

from confluent_kafka import Consumer, KafkaError, Message, TopicPartition

from services.consumer.lag import Commits
from services.consumer.lane import Lane
from services.consumer.metrics import MESSAGES_READ
from services.consumer.partitions import Partitions
from services.consumer.positions import Located, Positions
from services.consumer.writer import Outcome, Stored
from services.core.config import Settings
from services.core.errors import AbandonedError, OutOfPlaceError, PermanentError, ProtocolNotOfferedError
from services.core.kafka import NOT_ALLOWED, ClientSettings, client_settings, position_of
from services.core.logs import fields
from services.core.monitoring import RETRIES
from services.core.reading import Decoder
from services.core.shutdown import Shutdown

log = logging.getLogger("consumer")

POLL_AT_ONCE = 4000  # consume() returns after this many messages, or at the timeout; what is decoded together
MAX_POLL_BYTES = 2 * 1024 * 1024  # of large messages fewer
POLL_S = 0.1
WRITER_POLL_S = 0.01  # between two checks of the writers while something waits for one
PAUSE_AFTER_S = 2.0  # pausing discards what was fetched ahead, so wait before doing it
FINISH_TIMEOUT_S = 3.0  # twice that and leaving the group fit into the 10 s a service has to end
HAND_OVER_TIMEOUT_S = 20.0  # well inside the group's session timeout
CHECK_INTERVAL_S = 5.0


class Worker:
    """The polling thread: membership, polling, decoding, back-pressure, offsets.

    ``protocol`` is the group protocol: "consumer", or "classic" with cooperative rebalancing. In both, a member keeps
    working on the partitions that it keeps in a rebalance.
    """

    def __init__(self, settings: Settings, shutdown: Shutdown, *, until_caught_up: bool, protocol: str) -> None:
        self.totals = Counter(inserted=0, updated=0, unchanged=0, dead_letters=0)  # since the start
        self._settings = settings
        self._shutdown = shutdown
        self._until_caught_up = until_caught_up
        days = settings.raw_retention_days
        self._decoder = Decoder(
            settings.measurements,
            max_bytes=settings.max_message_bytes,
            max_future=timedelta(seconds=settings.max_future_seconds),
            max_past=timedelta(days=settings.max_past_days),
            max_age=timedelta(days=days) if days else None,
        )
        self._positions = Positions(settings, shutdown)
        self._protocol = protocol
        self._consumer = Consumer(
            consumer_settings(settings, protocol) | {"on_commit": lambda *answer: self._commits.note_answer(*answer)}
        )
        self._outcomes: SimpleQueue[tuple[Lane, Outcome]] = SimpleQueue()
        self._lanes = [Lane(settings, self._positions, self._outcomes) for _ in range(settings.consumer_writers)]
        self._commits: Commits = Commits(self._consumer, settings.kafka_topic)
        self._partitions = Partitions(self._consumer, settings.kafka_topic, self._lanes, self._commits)
        self._poll_at_once = 10  # until we know how large messages are
        self._rows_each = 1  # of the newest messages, on average
        self._clock_lead = timedelta(0)
        self._closing = False

    def run(self) -> Counter[str]:
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
            for lane in self._lanes:
                lane.writer.stop()
            for lane in self._lanes:
                lane.writer.join()
            self._consumer.close()
        return self.totals

    def _poll(self) -> None:
        """Fill the batches. While one is full, and its lane not paused, wait for its writer a moment at a time."""
        lanes = [lane for lane in self._lanes if lane.partitions and not lane.paused]
        if any(lane.is_full for lane in lanes):
            self._settle_all(POLL_S / 2)
            return
        room = min((lane.room for lane in lanes), default=1)
        rebalances = self._partitions.rebalances
        messages = self._consumer.consume(
            max(1, min(room // self._rows_each, self._poll_at_once)), timeout=self._poll_timeout()
        )
        failed = [message for message in messages if message.error() is not None]
        readable = [message for message in messages if message.error() is None] if failed else messages
        if readable and rebalances != self._partitions.rebalances:  # some may be of partitions that moved meanwhile
            self._partitions.go_back(self._lanes)
        elif readable:
            self._fill(readable)
        for message in failed:
            self._note_error(message)

    def _fill(self, messages: list[Message]) -> None:
        MESSAGES_READ.inc(len(messages))
        self._decoder.set_clock(datetime.now(UTC) - self._clock_lead)
        rows = size = 0
        for lane, those in self._by_lane(messages):
            before = len(lane.filling), lane.filling.size_bytes
            try:
                lane.filling.add(those, self._decoder, self._partitions.next)
            except OutOfPlaceError as error:
                log.warning("messages_out_of_place", extra=fields(detail=error))
                self._partitions.go_back([lane])
                continue
            rows += len(lane.filling) - before[0]
            size += lane.filling.size_bytes - before[1]
        self._rows_each = max(1, rows // len(messages))
        self._poll_at_once = max(1, min(POLL_AT_ONCE, MAX_POLL_BYTES // max(1, size // len(messages))))
        self._partitions.note_polled()

    def _by_lane(self, messages: list[Message]) -> list[tuple[Lane, list[Message]]]:
        """The messages of each lane, in the order they came."""
        found: dict[Lane, list[Message]] = {}
        for partition, run in groupby(messages, Message.partition):
            found.setdefault(self._partitions.lane_of.get(partition or 0, self._lanes[0]), []).extend(run)
        return list(found.items())

    def _poll_timeout(self) -> float:
        if not self._partitions.next:
            return WRITER_POLL_S  # partitions may be assigned at any moment, and then located
        working = [lane for lane in self._lanes if not lane.paused]
        if any(lane.ready is not None for lane in working):
            return WRITER_POLL_S
        return min([POLL_S, *(lane.left_s() for lane in working if not lane.filling.is_empty)])

    def _note_error(self, message: Message) -> None:
        error = message.error()
        assert error is not None
        code = error.code()
        if code == KafkaError._PARTITION_EOF:
            self._partitions.note_end(*position_of(message))
        elif code == KafkaError._AUTO_OFFSET_RESET:
            self._partitions.leave_missing(message.partition())
        elif code in NOT_ALLOWED:
            raise PermanentError(f"Kafka does not allow reading {self._settings.kafka_topic}: {error.str()}")
        elif code == KafkaError._FATAL and self._protocol == "consumer" and not self._partitions.rebalances:
            raise ProtocolNotOfferedError(error.str())  # librdkafka does not report the code behind it
        elif code == KafkaError._FATAL:
            raise PermanentError(f"Kafka ends our membership of group {self._settings.kafka_group}: {error.str()}")
        else:
            RETRIES.labels("kafka").inc()
            log.warning("kafka_unavailable", extra=fields(detail=error.str()))

    def _advance(self) -> None:
        """Take the writers' outcomes, then give them what comes next."""
        self._settle_all()
        self._commits.sample(paused=any(lane.paused for lane in self._lanes))
        if self._partitions.next and self._positions.topic_was_replaced(self._partitions.topic.topic_id):
            self._partitions.go_back(self._lanes)
        for lane in self._lanes:
            self._advance_lane(lane)

    def _advance_lane(self, lane: Lane) -> None:
        lane.close_batch(self._partitions.new_batch(), at_end=self._is_at_end())
        if lane.writer.busy:
            if lane.blocked_s() > PAUSE_AFTER_S and not lane.paused:
                self._partitions.pause(lane, paused=True)
                log.warning("paused", extra=fields(waiting=lane.waiting))
            return
        if unknown := self._partitions.unknown(lane):
            lane.writer.submit(unknown)
            return
        if lane.paused:
            self._partitions.pause(lane, paused=False)
            log.info("resumed")
        if lane.ready is not None:
            lane.submit_ready()
        else:
            self._partitions.step_over_ends(lane)
            self._check_positions(lane)

    def _settle_all(self, timeout_s: float = 0.0) -> None:
        """Take the outcomes that are there; wait that long for the first one."""
        with suppress(Empty):
            self._settle(*self._outcomes.get(timeout=timeout_s or None, block=timeout_s > 0))
            while True:
                self._settle(*self._outcomes.get_nowait())

    def _settle(self, lane: Lane, outcome: Outcome) -> None:
        was_storing = lane.writer.is_storing
        lane.writer.take(outcome)
        self._clock_lead = lane.writer.clock_lead or self._clock_lead  # 0: this writer has not stored anything yet
        match outcome:
            case Located():
                self._partitions.locate(lane, outcome)
            case Stored(batch, result, letters) if len(batch):
                reasons = Counter(f"dead_{letter.reason}" for letter in letters)
                self.totals.update(reasons, **result.counts(), dead_letters=len(letters))
                self._commits.commit({each: end for each, end in batch.end.items() if each in self._partitions.next})
            case AbandonedError() if was_storing:
                self._partitions.go_back([lane])

    def _check_positions(self, lane: Lane) -> None:
        """While nothing comes, check whether the database was emptied or restored, or its positions changed."""
        now = time.monotonic()
        if not lane.partitions or not lane.filling.is_empty or now - lane.checked_at < CHECK_INTERVAL_S:
            return
        lane.checked_at = now
        self._commits.retry_refused()
        check = self._partitions.new_batch()
        check.start = check.end = {partition: self._partitions.next[partition] for partition in lane.partitions}
        lane.writer.submit(check)

    def _on_assign(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        self._partitions.assign(sorted(each.partition for each in partitions))

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Partitions go to another consumer: finish what is being stored first, so that none of it is repeated."""
        if not self._closing:
            gone = {each.partition for each in partitions}
            self._finish_jobs([lane for lane in self._lanes if lane.partitions & gone], HAND_OVER_TIMEOUT_S)
        self._on_lost(consumer, partitions)

    def _on_lost(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        self._partitions.lose({each.partition for each in partitions})

    def _finish_jobs(self, lanes: Sequence[Lane], timeout_s: float) -> None:
        """Wait for what is being stored. Abandon it when it takes too long, and wait a moment for that."""
        for wait_s in (timeout_s, POLL_S):
            deadline = time.monotonic() + wait_s
            while any(lane.writer.is_storing for lane in lanes) and (left_s := deadline - time.monotonic()) > 0:
                self._settle_all(left_s)
            for lane in lanes:
                lane.writer.abandon()

    def _is_at_end(self) -> bool:
        return self._until_caught_up and self._partitions.are_all_at_end

    def _caught_up(self) -> bool:
        return (
            self._is_at_end()
            and all(lane.is_empty for lane in self._lanes)
            and self._commits.are_answered(self._partitions.ends)
        )

    def _finish(self) -> None:
        """Store what is ready if that is quick; else the group's next member polls it again."""
        self._finish_jobs(self._lanes, FINISH_TIMEOUT_S)
        for lane in self._lanes:
            if not lane.writer.busy:
                lane.submit_ready()
        self._finish_jobs(self._lanes, FINISH_TIMEOUT_S)


def consumer_settings(settings: Settings, protocol: str) -> ClientSettings:
    """librdkafka settings of the consumer: offsets only by us, read committed, bounded read-ahead."""
    found = client_settings(settings, "consumer") | {
        "group.id": settings.kafka_group,
        "group.protocol": protocol,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "error",  # what is missing must not be skipped silently
        "isolation.level": "read_committed",
        "max.poll.interval.ms": max(300_000, settings.kafka_session_timeout_ms),
        "enable.partition.eof": True,
        # Read-ahead for a few batches; a small message costs several times its size in librdkafka's queue.
        "queued.min.messages": 10_000,
        "queued.max.messages.kbytes": 32_768,
        "fetch.message.max.bytes": 262_144,
        "fetch.queue.backoff.ms": 10,
    }
    if protocol == "classic":
        found |= {
            "partition.assignment.strategy": "cooperative-sticky",
            "session.timeout.ms": settings.kafka_session_timeout_ms,
            "heartbeat.interval.ms": min(3000, settings.kafka_session_timeout_ms // 3),
        }
    return found
