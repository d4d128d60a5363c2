"""Topics are created as the settings say, and left alone when they are there."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException, Producer
from confluent_kafka.admin import AdminClient, ConfigEntry, ConfigResource, ConfigSource, NewTopic

from services.core.config import Settings
from services.core.errors import ConfigurationError
from services.core.kafka import client_settings, create_topics
from services.core.shutdown import Shutdown
from services.local.stack import Stack
from services.producer.progress import progress_topic
from tests.fix_services import read_topic, wait_until


def changed(admin: AdminClient, topic: str) -> dict[str, str]:
    """The settings of a topic that are its own, not the brokers' defaults."""
    found: dict[str, ConfigEntry] = {}

    def described() -> bool:
        (future,) = admin.describe_configs([ConfigResource("topic", topic)]).values()
        with suppress(KafkaException):
            found.update(future.result())
        return bool(found)

    wait_until(described, f"the broker knows the new topic {topic}")
    own = ConfigSource.DYNAMIC_TOPIC_CONFIG
    return {name: str(entry.value) for name, entry in found.items() if ConfigSource(entry.source) == own}


def test_topics_have_what_the_settings_say(settings: Settings) -> None:
    admin = AdminClient(client_settings(settings, "test"))
    own = settings.model_copy(
        update={
            "kafka_topic": f"{settings.kafka_topic}.own",
            "kafka_min_insync_replicas": 1,
            "dead_letter_retention_days": 7,
            "dead_letter_retention_mb": 0,
        }
    )
    topics = (own.kafka_topic, own.dead_letter_topic, progress_topic(own).topic)
    create_topics(admin, own, progress_topic(own), shutdown=Shutdown())
    in_step = {"min.insync.replicas": "1"}
    readings = in_step | {"compression.type": "uncompressed"}
    assert [changed(admin, topic) for topic in topics] == [
        readings,
        in_step | {"max.message.bytes": "2097152", "retention.ms": "604800000", "retention.bytes": "-1"},
        in_step | {"cleanup.policy": "compact"},
    ]
    partitions = admin.list_topics(timeout=10).topics
    assert [len(partitions[topic].partitions) for topic in topics] == [own.kafka_partitions, 1, 1]

    create_topics(
        admin, own.model_copy(update={"kafka_min_insync_replicas": 0, "kafka_partitions": 9}), shutdown=Shutdown()
    )
    assert changed(admin, own.kafka_topic) == readings
    assert changed(admin, settings.kafka_topic) == {"compression.type": "uncompressed"}  # the brokers' defaults

    compressed = settings.model_copy(update={"kafka_topic": f"{settings.kafka_topic}.lz4", "kafka_compression": "lz4"})
    create_topics(admin, compressed, shutdown=Shutdown())
    assert changed(admin, compressed.kafka_topic) == {"compression.type": "lz4"}


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
@pytest.mark.parametrize("messages", [1, 50_000])
def test_a_decompression_bomb_is_refused_before_a_consumer_meets_it(
    settings: Settings, codec: str, messages: int
) -> None:
    """100 MB of spaces, in one message or in many, are a batch of less than a megabyte."""
    refused: list[KafkaError | None] = []
    producer = Producer(
        client_settings(settings, "test")
        | {"compression.type": codec, "linger.ms": 500, "message.max.bytes": 10**9, "batch.size": 10**9}
        | {"batch.num.messages": messages, "queue.buffering.max.kbytes": 2**20, "retries": 0}
    )
    for _ in range(messages):
        value = b" " * (100 * 1024 * 1024 // messages)
        producer.produce(settings.kafka_topic, value, b"s1", on_delivery=lambda error, _: refused.append(error))
    assert producer.flush(60) == 0
    assert len(refused) == messages
    assert {error and error.name() for error in refused} <= {"MSG_SIZE_TOO_LARGE"}
    assert read_topic(settings, settings.kafka_topic) == []


@pytest.mark.slow
def test_a_broker_that_goes_away_meanwhile_is_waited_for(own_stack: Stack, settings: Settings) -> None:
    admin = AdminClient(client_settings(settings, "test") | {"log_level": 0})
    late = settings.model_copy(update={"kafka_topic": f"{settings.kafka_topic}.late", "startup_timeout_seconds": 60})
    waiting = threading.Thread(target=create_topics, args=(admin, late))
    own_stack.kafka.kill()
    try:
        with pytest.raises(ConfigurationError, match="Kafka does not answer"):
            create_topics(admin, late.model_copy(update={"startup_timeout_seconds": 0}), shutdown=Shutdown())
        waiting.start()
    finally:
        own_stack.kafka.start()
        own_stack.kafka.wait_ready()
    waiting.join(60)
    wait_until(lambda: late.kafka_topic in admin.list_topics(timeout=10).topics, "the topic")


class Watched(AdminClient):
    """An admin client that notes which topics it is asked to create."""

    asked: frozenset[str] = frozenset()

    def create_topics(  # type: ignore[override]
        self, new_topics: list[NewTopic], **options: Any
    ) -> Any:
        """As the client does."""
        self.asked = frozenset(topic.topic for topic in new_topics)
        return super().create_topics(new_topics, **options)


def test_topics_that_exist_are_not_asked_for(settings: Settings) -> None:
    """Where an operator has made them, services do without the right to create topics."""
    admin = Watched(client_settings(settings, "test"))
    create_topics(admin, settings, shutdown=Shutdown())
    assert not admin.asked
    other = settings.model_copy(update={"kafka_topic": f"{settings.kafka_topic}_other"})
    create_topics(admin, other, shutdown=Shutdown())
    assert admin.asked == {other.kafka_topic, other.dead_letter_topic}
