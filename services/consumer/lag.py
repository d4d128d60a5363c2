"""How far the group is behind in the partitions of this consumer, for the metrics."""

from __future__ import annotations

import time
from collections.abc import Container, Iterable, Mapping
from contextlib import suppress

from confluent_kafka import Consumer, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, OffsetSpec, ResourceType

from services.consumer.instruments import EXPIRING, LAG

LOOK_EVERY_S = 1.0
ASK_EVERY_S, ANSWER_WITHIN_S = 5.0, 1.0
EXPIRY_EVERY_S, EXPIRY_WITHIN_S = 30.0, 5.0
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
            self._next_look = time.monotonic() + (EXPIRY_EVERY_S if waiting else 0)

    def _count(self, topic: str, admin: AdminClient, waiting: Mapping[int, tuple[int, int]]) -> int:
        resource = ConfigResource(ResourceType.TOPIC, topic)
        settings = admin.describe_configs([resource], request_timeout=EXPIRY_WITHIN_S)[resource].result()
        retention_ms = int(settings["retention.ms"].value)
        if retention_ms < 0:
            return 0
        since = OffsetSpec.for_timestamp(int(time.time() * 1000 - retention_ms * SAFE_SHARE))
        answers = admin.list_offsets(
            {TopicPartition(topic, partition): since for partition in waiting}, request_timeout=EXPIRY_WITHIN_S
        )
        count = 0
        for place, answer in answers.items():
            committed, end = waiting[place.partition]
            first_safe = answer.result().offset
            count += max(0, (end if first_safe < 0 else first_safe) - committed)  # below 0: all are older
        return count


EXPIRY = Expiry()


class Lag:
    """Looks once a second at where the partitions end; to be called from the thread that polls.

    Every fetch tells the end. While the partitions are paused there is none, so the broker is asked, less often.
    """

    def __init__(self, consumer: Consumer, topic: str) -> None:
        self._consumer = consumer
        self._topic = topic
        self._committed: dict[int, int] = {}
        self._next_look = 0.0

    def begin(self, offsets: Mapping[int, int]) -> None:
        """Where partitions that are ours now begin."""
        self._committed |= offsets

    def note_committed(self, places: Iterable[TopicPartition], assigned: Container[int]) -> None:
        """The broker has confirmed these offsets."""
        for place in places:
            if place.partition in assigned:
                self._committed[place.partition] = place.offset

    def look(self, *, paused: bool) -> None:
        """Set the metric, if that was not done just now."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + (ASK_EVERY_S if paused else LOOK_EVERY_S)
        try:
            for partition, committed in self._committed.items():
                place = TopicPartition(self._topic, partition)
                ends = self._consumer.get_watermark_offsets(place, timeout=ANSWER_WITHIN_S, cached=not paused)
                if ends is not None and ends[1] >= 0:
                    self._note(partition, committed, ends[1])
        except KafkaException:  # it stays what it was
            return

    def _note(self, partition: int, committed: int, end: int) -> None:
        LAG.labels(partition).set(max(0, end - committed))
        if committed < end:
            EXPIRY.waiting[partition] = committed, end
        else:
            EXPIRY.waiting.pop(partition, None)

    def forget(self, partitions: Iterable[int]) -> None:
        """The partitions are not ours any more; who has them reports their lag."""
        for partition in self._committed.keys() & set(partitions):
            del self._committed[partition]
            EXPIRY.waiting.pop(partition, None)
            with suppress(KeyError):
                LAG.remove(str(partition))
