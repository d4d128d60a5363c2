"""How far the consumer group is: where each partition begins and ends, and what the group has committed.

Asked with a Consumer that never joins the group. (The admin client's list_consumer_group_offsets can end the
process with a segmentation fault while the group's coordinator is loading, seen with librdkafka 2.16.1.)
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime

from confluent_kafka import Consumer, KafkaException, TopicPartition

from services.core.config import Settings
from services.core.kafka import COORDINATOR_MOVING, ClientSettings, client_settings, translated_kafka

ANSWER_TIMEOUT_S = 5.0
PAUSE_S = 0.1
COORDINATOR_TIMEOUT_S = 15.0  # the first question about a group makes a new cluster create a topic


@dataclass(frozen=True, slots=True)
class PartitionOffsets:
    """One partition: its first offset, the one after its last, and the group's (None: nothing committed)."""

    partition: int
    first: int
    end: int
    committed: int | None

    @property
    def lag(self) -> int:
        """Messages that the group has not committed yet, those of open transactions included."""
        return max(0, self.end - max(self.first, self.committed or 0))


class Offsets:
    """Asks the brokers. Each question is answered within seconds or raises TransientError."""

    def __init__(self, settings: Settings) -> None:
        self._question = f"Kafka at {settings.bootstrap_servers} does not answer"
        reader: ClientSettings = {
            "group.id": settings.kafka_group,
            "enable.auto.commit": False,
            "allow.auto.create.topics": False,
            "isolation.level": "read_uncommitted",  # readings of an open transaction wait as well
            "log_level": 0,
        }
        self._consumer = Consumer(client_settings(settings, "offsets") | reader)

    def __enter__(self) -> Offsets:
        return self

    def __exit__(self, *_: object) -> None:
        self._consumer.close()

    def partitions(self) -> dict[str, list[int]]:
        """The topics there are, and their partitions."""
        with translated_kafka(self._question):
            topics = self._consumer.list_topics(timeout=ANSWER_TIMEOUT_S).topics
        return {name: sorted(topic.partitions) for name, topic in topics.items()}

    def of(self, topic: str, partitions: list[int]) -> list[PartitionOffsets]:
        """The offsets of a topic's partitions. The group's are asked for first, so that no lag is ever missed."""
        if not partitions:
            return []
        found = []
        with translated_kafka(self._question):
            for each in self._committed([TopicPartition(topic, partition) for partition in partitions]):
                first, end = self._consumer.get_watermark_offsets(each, timeout=ANSWER_TIMEOUT_S)
                found.append(PartitionOffsets(each.partition, first, end, each.offset if each.offset >= 0 else None))
        return found

    def since(self, topic: str, partitions: list[int], moment: datetime) -> dict[int, int]:
        """The offset of the first message of ``moment`` or later; without any, the end."""
        milliseconds = int(moment.timestamp() * 1000)
        with translated_kafka(self._question):
            times = [TopicPartition(topic, partition, milliseconds) for partition in partitions]
            found = self._consumer.offsets_for_times(times, timeout=ANSWER_TIMEOUT_S)
        ends = {each.partition: each.end for each in self.of(topic, partitions)}
        return {each.partition: each.offset if each.offset >= 0 else ends[each.partition] for each in found}

    def _committed(self, partitions: list[TopicPartition]) -> list[TopicPartition]:
        """The group's offsets. Asks again while its coordinator is moving, as after the start of a cluster."""
        deadline = time.monotonic() + COORDINATOR_TIMEOUT_S
        while True:
            try:
                found = self._consumer.committed(partitions, timeout=max(PAUSE_S, deadline - time.monotonic()))
                refused = [each.error for each in found if each.error is not None]
                if not refused:
                    return found
                error = refused[0]
            except KafkaException as raised:
                error = raised.args[0]
            if error.code() not in COORDINATOR_MOVING or time.monotonic() > deadline:
                raise KafkaException(error)
            self._consumer.poll(PAUSE_S)


def group_lag(settings: Settings) -> int:
    """Messages of the topic of readings that the consumer group has not committed yet."""
    with Offsets(settings) as offsets:
        return sum(each.lag for each in offsets.of(settings.kafka_topic, list(range(settings.kafka_partitions))))
