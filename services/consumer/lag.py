"""How far the group is behind in the partitions of this consumer, for the metrics."""

from __future__ import annotations

import time
from collections.abc import Container, Iterable, Mapping
from contextlib import suppress

from confluent_kafka import Consumer, KafkaException, TopicPartition

from services.consumer.instruments import LAG

LOOK_EVERY_S = 1.0
ASK_EVERY_S, ANSWER_WITHIN_S = 5.0, 1.0


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
                    LAG.labels(partition).set(max(0, ends[1] - committed))
        except KafkaException:  # it stays what it was
            return

    def forget(self, partitions: Iterable[int]) -> None:
        """The partitions are not ours any more; who has them reports their lag."""
        for partition in self._committed.keys() & set(partitions):
            del self._committed[partition]
            with suppress(KeyError):
                LAG.remove(str(partition))
