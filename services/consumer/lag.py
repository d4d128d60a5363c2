"""How far we are, which is committed to Kafka, and how far behind, which the metrics report."""

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
    """Counts what has waited so long that Kafka may delete it; for a thread that may block."""

    def __init__(self) -> None:
        # By partition: the first offset not committed, and the end.
        self.waiting: Mapping[int, tuple[int, int]] = {}
        self._next_sample = 0.0

    def sample(self, topic: str, admin: AdminClient) -> None:
        """Set the metric, once in each interval. Without an answer it stays what it was."""
        if time.monotonic() < self._next_sample:
            return
        waiting = self.waiting
        with suppress(KafkaException):
            EXPIRING.set(self._count(topic, admin, waiting) if waiting else 0)
            self._next_sample = time.monotonic() + (EXPIRY_INTERVAL_S if waiting else 0)

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
        for each, answer in answers.items():
            committed, end = waiting[each.partition]
            first_safe = answer.result().offset
            count += max(0, (end if first_safe < 0 else first_safe) - committed)  # below 0: all are older
        return count


EXPIRY = Expiry()


class Commits:
    """Tells Kafka how far we are, and the metrics how far behind: for people, since nothing depends on either.

    ``committed`` is the position of each partition that is ours, as far as Kafka has confirmed it. Belongs to the
    thread that polls.
    """

    def __init__(self, consumer: Consumer, topic: str) -> None:
        self._consumer = consumer
        self._topic = topic
        self.committed: dict[int, int] = {}
        self._sent: dict[int, int] = {}
        self._unanswered = 0
        self._refused = False  # there may never be a next commit that would repeat it
        self._next_sample = 0.0

    def commit(self, offsets: Mapping[int, int]) -> None:
        """Commit what was not sent yet; the answer comes while polling."""
        new = dict(offsets.items() - self._sent.items())
        if not new:
            return
        self._sent |= new
        try:
            self._consumer.commit(
                offsets=[TopicPartition(self._topic, *each) for each in new.items()], asynchronous=True
            )
            self._unanswered += 1
        except KafkaException as error:
            self._note_refused(error.args[0])

    def note_answer(self, error: KafkaError | None, offsets: list[TopicPartition]) -> None:
        """The broker's answer to a commit."""
        self._unanswered -= 1
        problem = error or next((each.error for each in offsets if each.error is not None), None)
        if problem is None:
            self.committed |= {each.partition: each.offset for each in offsets if each.partition in self._sent}
        else:
            self._note_refused(problem)

    def _note_refused(self, error: KafkaError) -> None:
        if error.code() in NOT_ALLOWED:
            raise PermanentError(f"Kafka refuses to commit offsets: {error.str()}")
        log.warning("offsets_not_committed", extra=fields(detail=error.str()))
        self._refused = True

    def retry_refused(self) -> None:
        """Let what Kafka has refused be sent again."""
        if self._refused:
            self._refused = False
            self._sent.clear()

    def are_answered(self, offsets: Mapping[int, int]) -> bool:
        """Whether these were sent, and nothing waits for an answer."""
        return offsets.items() <= self._sent.items() and not self._unanswered

    def sample(self, *, paused: bool) -> None:
        """Set the metrics, once in each interval. Fetches say where a partition ends; while ``paused``, ask."""
        now = time.monotonic()
        if now < self._next_sample:
            return
        self._next_sample = now + (ASK_INTERVAL_S if paused else SAMPLE_INTERVAL_S)
        waiting = {}
        for partition, committed in self.committed.items():
            at = TopicPartition(self._topic, partition)
            try:
                ends = self._consumer.get_watermark_offsets(at, timeout=ANSWER_TIMEOUT_S, cached=not paused)
            except KafkaException:
                return  # they stay what they were
            if ends is None or ends[1] < 0:
                continue
            LAG.labels(partition).set(max(0, ends[1] - committed))
            if committed < ends[1]:
                waiting[partition] = committed, ends[1]
        EXPIRY.waiting = waiting

    def forget(self, partitions: Iterable[int]) -> None:
        """The partitions are not ours any more; their next owner reports their lag."""
        for partition in partitions:
            self._sent.pop(partition, None)
            self.committed.pop(partition, None)
            with suppress(KeyError):
                LAG.remove(str(partition))
