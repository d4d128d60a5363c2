"""Messages, topics and rights that could stop the line: each ends in a row, a dead letter, or one clear line."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    NewTopic,
    ResourcePatternType,
    ResourceType,
)

from services.core.config import Settings
from services.core.kafka import client_settings, create_topics, headers_of
from services.core.shutdown import Shutdown
from services.local.kafka import KafkaProcess
from tests.expected import committed_offsets, member_ids
from tests.fix_services import PATIENCE_S, StartService, message, minutes, publish, read_topic, wait_until
from tests.fix_stack import free_port, is_native

Headers = list[tuple[str, str | bytes | None]]


class OwnKafka(KafkaProcess):
    """A broker with settings of its own."""

    more = ""

    def _write_configuration(self) -> Path:
        path = super()._write_configuration()
        with path.open("a", encoding="utf-8") as configuration:
            configuration.write(self.more)
        return path


def with_topics(settings: Settings, name: str, limit: int, letters_limit: int | None = None) -> Settings:
    """Settings of a topic whose messages may have ``limit`` bytes, and of dead letters with another limit."""
    own = settings.model_copy(update={"kafka_topic": f"{settings.kafka_topic}-{name}"})
    topics = [NewTopic(own.kafka_topic, 3, 1, config={"max.message.bytes": str(limit)})]
    if letters_limit:
        topics.append(NewTopic(own.dead_letter_topic, 1, 1, config={"max.message.bytes": str(letters_limit)}))
    admin = AdminClient(client_settings(own, "test"))
    for created in admin.create_topics(topics).values():
        created.result()
    create_topics(admin, own, shutdown=Shutdown())
    return own


def send(settings: Settings, value: bytes, headers: Headers | None = None) -> None:
    producer = Producer(client_settings(settings, "test") | {"message.max.bytes": 8_000_000})
    producer.produce(settings.kafka_topic, value, b"s1", partition=0, headers=headers or [])
    assert producer.flush(PATIENCE_S) == 0


def consume(settings: Settings, start: StartService) -> list[tuple[bytes | None, dict[str, bytes | None]]]:
    """Consume all; the dead letters' values and headers."""
    assert start("consume", "--until-caught-up", settings=settings).wait() == 0
    return [(letter.value(), dict(headers_of(letter))) for letter in read_topic(settings, settings.dead_letter_topic)]


def count(connection: psycopg.Connection) -> int:
    row = connection.execute("SELECT count(*) FROM sensor_data").fetchone()
    assert row is not None
    return int(row[0])


def surrounded(settings: Settings, value: bytes, headers: Headers | None = None) -> None:
    """Send a hard message between two readings of its partition."""
    publish(settings, [message(time=minutes(0), temperature=1.0)], partition=0)
    send(settings, value, headers)
    publish(settings, [message(time=minutes(1), temperature=1.0)], partition=0)


def test_a_message_of_three_megabytes_stops_nothing(
    settings: Settings, connection: psycopg.Connection, start: StartService
) -> None:
    own = with_topics(settings, "large", 6_000_000)
    large = b"x" * 3_000_000
    surrounded(own, large)
    ((value, headers),) = consume(own, start)
    assert value == large[: 64 * 1024]
    assert headers["sensor_pipeline.original_bytes"] == b"3000000"
    assert headers["sensor_pipeline.reason"] == b"too_large"
    assert count(connection) == 2
    assert committed_offsets(own)[0] == 3


def test_headers_of_more_than_two_megabytes_stop_nothing(
    settings: Settings, connection: psycopg.Connection, start: StartService
) -> None:
    own = with_topics(settings, "headers", 6_000_000)
    surrounded(own, b"not json", [("theirs", b"x" * 2_500_000)])
    ((value, headers),) = consume(own, start)
    assert value == b"not json"
    assert "theirs" not in headers
    assert headers["sensor_pipeline.reason"] == b"invalid_json"
    assert count(connection) == 2


def test_a_topic_of_dead_letters_that_takes_less_than_ours_gets_every_letter(
    settings: Settings, connection: psycopg.Connection, start: StartService
) -> None:
    """Made by somebody else, with a limit that is one of a whole request."""
    own = with_topics(settings, "small", 1_000_000, letters_limit=20_000)
    values: list[bytes | None] = [b"x" * 500_000, *(b"y" * 5000 + bytes(str(at), "ascii") for at in range(20))]
    publish(own, values, partition=0)
    publish(own, [message(time=minutes(1), temperature=1.0)], partition=0)
    letters = consume(own, start)
    offsets = sorted(int(headers["__connect.errors.offset"] or 0) for _, headers in letters)
    assert offsets == list(range(21))
    whole = {value for value, _ in letters}
    assert whole >= set(values[1:])
    assert count(connection) == 1


def test_a_lost_topic_of_dead_letters_is_one_line(settings: Settings, start: StartService) -> None:
    publish(settings, [message(time=minutes(0), temperature=1.0)], partition=0)
    consumer = start("consume")
    consumer.wait_for("batch_written")
    admin = AdminClient(client_settings(settings, "test"))
    for deleted in admin.delete_topics([settings.dead_letter_topic]).values():
        deleted.result()
    publish(settings, [b"not json"], partition=0)
    assert consumer.wait(60) == 1
    last = consumer.log_path.read_text(encoding="utf-8").splitlines()[-1]
    assert last.startswith(f"error: Kafka topic {settings.dead_letter_topic} refuses dead letters: ")
    assert committed_offsets(settings)[0] == 1
    create_topics(admin, settings, shutdown=Shutdown())
    letters = consume(settings, start)
    assert [value for value, _ in letters] == [b"not json"]


def test_a_batch_over_thousands_of_weeks_is_stored(
    settings: Settings, connection: psycopg.Connection, start: StartService
) -> None:
    """Back to the year 1835: rows as far back as the settings allow, dead letters beyond."""
    days = 7305 if is_native() else 1400  # each week is a chunk, and the embedded database takes its time
    own = settings.model_copy(update={"max_past_days": days})
    now = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    publish(own, [message(time=now - timedelta(weeks=at), temperature=1.0) for at in range(10_000)], partition=0)
    publish(own, [message(time="0001-01-05T00:00:00Z", temperature=1.0)], partition=0)
    assert start("consume", "--until-caught-up", settings=own).wait(120) == 0
    letters = read_topic(own, own.dead_letter_topic)
    reasons = {dict(headers_of(letter))["sensor_pipeline.reason"] for letter in letters}
    assert reasons == {b"time_out_of_range"}
    assert count(connection) + len(letters) == 10_001
    assert count(connection) == days // 7 + (days % 7 > 0)


@pytest.fixture
def own_kafka(tmp_path: Path, servers: Settings, request: pytest.FixtureRequest) -> Iterator[Settings]:
    """Settings with a broker that has the properties of the test's parameter."""
    broker = OwnKafka(tmp_path, free_port())
    broker.more = request.param
    broker.start()
    try:
        broker.wait_ready()
        yield servers.model_copy(update={"kafka_host": "127.0.0.1", "kafka_port": broker.port})
    finally:
        broker.kill()


@pytest.mark.slow
@pytest.mark.parametrize("own_kafka", ["group.coordinator.rebalance.protocols=classic\n"], indirect=True)
def test_a_broker_without_the_new_group_protocol_is_used_with_the_classic_one(
    settings: Settings, own_kafka: Settings, connection: psycopg.Connection, start: StartService
) -> None:
    own = settings.model_copy(update={"kafka_host": own_kafka.kafka_host, "kafka_port": own_kafka.kafka_port})
    create_topics(AdminClient(client_settings(own, "test")), own, shutdown=Shutdown())
    publish(own, [message(time=minutes(0), temperature=1.0)], partition=0)
    consumers = [start("consume", settings=own) for _ in range(2)]
    wait_until(lambda: count(connection) == 1, "the reading is stored")
    consumers[0].wait_for("group_protocol_not_offered")
    wait_until(lambda: sorted(map(len, member_ids(own).values())) == [1, 2], "both have partitions")
    refused = start("consume", settings=own.model_copy(update={"kafka_group_protocol": "consumer"}))
    assert refused.wait() == 2
    assert "error: KAFKA_GROUP_PROTOCOL=consumer: " in refused.log_path.read_text(encoding="utf-8")


AUTHORIZER = (
    "authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer\n"
    "allow.everyone.if.no.acl.found=true\n"
)


@pytest.mark.parametrize("own_kafka", [AUTHORIZER], indirect=True)
def test_without_the_right_to_send_dead_letters_one_line_says_so(
    settings: Settings, own_kafka: Settings, start: StartService
) -> None:
    own = settings.model_copy(update={"kafka_host": own_kafka.kafka_host, "kafka_port": own_kafka.kafka_port})
    admin = AdminClient(client_settings(own, "test"))
    create_topics(admin, own, shutdown=Shutdown())
    deny = AclBinding(
        ResourceType.TOPIC,
        own.dead_letter_topic,
        ResourcePatternType.LITERAL,
        "User:ANONYMOUS",
        "*",
        AclOperation.WRITE,
        AclPermissionType.DENY,
    )
    for created in admin.create_acls([deny]).values():
        created.result()
    publish(own, [message(time=minutes(0), temperature=1.0), b"not json"], partition=0)
    consumer = start("consume", settings=own)
    assert consumer.wait(60) == 1
    last = consumer.log_path.read_text(encoding="utf-8").splitlines()[-1]
    assert last.startswith(f"error: Kafka topic {own.dead_letter_topic} refuses dead letters: ")
    assert "uthorization" in last
