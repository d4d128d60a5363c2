"""How far we are, as Kafka is told, and how far behind, as the metrics say."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, OffsetSpec, ResourceType

from services.consumer.metrics import EXPIRING, LAG
from services.core.errors import PermanentError
from services.core.kafka import NOT_ALLOWED
from services.core.logs import fields

log = logging.getLogger("consumer")

SAMPLE_INTERVAL_S = 1.0
ASK_INTERVAL_S, ANSWER_TIMEOUT_S = 5.0, 1.0
EXPIRY_INTERVAL_S, EXPIRY_TIMEOUT_S = 30.0, 5.0
SAFE_SHARE = 0.25  # of the topic's retention: a message that has waited longer than this is reported


class Expiry:
    """Counts what waits for so long that Kafka will delete it; to be called from a thread that may block."""

    def __init__(self) -> None:
        self.waiting: dict[int, tuple[int, int]] = {}  # by partition: the first offset not committed, and the end
        self._next_look = 0.0

    def look(self, topic: str, admin: AdminClient) -> None:
        """Set the metric, if that was not done just now. Without an answer it stays what it was."""
        if time.monotonic() < self._next_look:
            return
        waiting = dict(self.waiting)
        with suppress(KafkaException):
            EXPIRING.set(self._count(topic, admin, waiting) if waiting else 0)
            self._next_look = time.monotonic() + (EXPIRY_INTERVAL_S if waiting else 0)

    def _count(self, topic: str, admin: AdminClient, waiting: Mapping[int, tuple[int, int]]) -> int:
        resource = ConfigResource(ResourceType.TOPIC, topic)
        settings = admin.describe_configs([resource], request_timeout=EXPIRY_TIMEOUT_S)[resource].result()
        retention_ms = int(settings["retention.ms"].value)
        if retention_ms < 0:
            return 0
        since = OffsetSpec.for_timestamp(int(time.time() * 1000 - retention_ms * SAFE_SHARE))
        answers = admin.list_offsets(
            {TopicPartition(topic, partition): since for partition in waiting}, request_timeout=EXPIRY_TIMEOUT_S
        )
        count = 0
        for place, answer in answers.items():
            committed, end = waiting[place.partition]
            first_safe = answer.result().offset
            count += max(0, (end if first_safe < 0 else first_safe) - committed)  # below 0: all are older
        return count


EXPIRY = Expiry()


class Commits:
    """Tells Kafka how far we are, and the metrics how far behind: for people, since nothing depends on either.

    Every fetch tells where a partition ends. While partitions are paused there is none, so the broker is asked, less
    often. Belongs to the thread that polls.
    """

    def __init__(self, consumer: Consumer, topic: str) -> None:
        self._consumer = consumer
        self._topic = topic
        self._told: dict[int, int] = {}
        self._unanswered = 0
        self._refused = False  # there may never be a next one
        self._committed: dict[int, int] = {}
        self._next_look = 0.0

    def begin(self, offsets: Mapping[int, int]) -> None:
        """Where partitions that are ours now begin."""
        self._committed |= offsets

    def tell(self, offsets: Mapping[int, int]) -> None:
        """Commit what was not told yet; the answer comes while polling."""
        new = dict(offsets.items() - self._told.items())
        if not new:
            return
        self._told |= new
        try:
            self._consumer.commit(
                offsets=[TopicPartition(self._topic, *each) for each in new.items()], asynchronous=True
            )
            self._unanswered += 1
        except KafkaException as error:
            self._note_refused(error.args[0])

    def note_answer(self, error: KafkaError | None, places: list[TopicPartition]) -> None:
        """The broker's answer to a commit."""
        self._unanswered -= 1
        problem = error or next((place.error for place in places if place.error is not None), None)
        if problem is None:
            self._committed |= {place.partition: place.offset for place in places if place.partition in self._told}
        else:
            self._note_refused(problem)

    def _note_refused(self, error: KafkaError) -> None:
        if error.code() in NOT_ALLOWED:
            raise PermanentError(f"Kafka refuses to commit offsets: {error.str()}")
        log.warning("offsets_not_committed", extra=fields(detail=error.str()))
        self._refused = True

    def tell_again(self) -> None:
        """Let what Kafka has refused be told again."""
        if self._refused:
            self._refused = False
            self._told.clear()

    def are_answered(self, offsets: Mapping[int, int]) -> bool:
        """Whether these were told, and nothing waits for an answer."""
        return offsets.items() <= self._told.items() and not self._unanswered

    def look(self, *, paused: bool) -> None:
        """Set the metric, if that was not done just now."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + (ASK_INTERVAL_S if paused else SAMPLE_INTERVAL_S)
        with suppress(KafkaException):  # it stays what it was
            for partition, committed in self._committed.items():
                place = TopicPartition(self._topic, partition)
                ends = self._consumer.get_watermark_offsets(place, timeout=ANSWER_TIMEOUT_S, cached=not paused)
                if ends is not None and ends[1] >= 0:
                    self._note(partition, committed, ends[1])

    def _note(self, partition: int, committed: int, end: int) -> None:
        LAG.labels(partition).set(max(0, end - committed))
        if committed < end:
            EXPIRY.waiting[partition] = committed, end
        else:
            EXPIRY.waiting.pop(partition, None)

    def forget(self, partitions: Iterable[int]) -> None:
        """The partitions are not ours any more; who has them reports their lag."""
        for partition in partitions:
            for each in (self._told, self._committed, EXPIRY.waiting):
                each.pop(partition, None)
            with suppress(KeyError):
                LAG.remove(str(partition))
