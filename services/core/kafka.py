"""Kafka: client settings, what errors mean, topics, reading and sending without a group or a transaction."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, cast

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from services.core.backoff import at_start
from services.core.config import Settings
from services.core.credentials import check_files
from services.core.errors import ConfigurationError, PermanentError, TransientError
from services.core.handshake import find_mismatch
from services.core.logs import OnceInAWhile, fields
from services.core.shutdown import Shutdown

log = logging.getLogger("kafka")

DEAD_LETTER_MAX_BYTES = 2 * 1024 * 1024  # more than the topic of readings takes: letters have headers of their own

# The header of a dead letter with a stable word for why; the others are Kafka Connect's.
REASON_HEADER = "sensor_pipeline.reason"

# The header of a message that may have been stored before: it fills gaps and overwrites nothing.
REPEAT_HEADER = "sensor_pipeline.repeat"
REPEATED = b"yes"
REPEATED_IF_MOVED = b"maybe"  # if the database has stored readings of another topic before

# The header with the format of a message; without it, one reading in JSON.
FORMAT_HEADER = "sensor_pipeline.format"
JSON = b"json"
ARROW = b"arrow"  # a block of readings (block.py)

# Sensors go to the partitions that Java's clients choose, so that one sensor has one partition whoever sends.
PARTITIONER = "murmur2_random"

# What a topic calls none. The broker then stores without compression what others send compressed, and so refuses what
# is too large without it, before any consumer has to take it apart.
COMPRESSION = {"none": "uncompressed"}

DAY_MS = 24 * 60 * 60 * 1000
CREATE_TIMEOUT_S = 5.0
SILENCE_S, POLL_S = 10.0, 2.0

# What Kafka's errors mean. We lack a right, or the broker does not know us:
NOT_ALLOWED = frozenset(
    {
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
        KafkaError.SASL_AUTHENTICATION_FAILED,
        KafkaError._AUTHENTICATION,
    }
)
NOT_FOUND = frozenset({KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION})
# The message, the topic or the transaction is at fault: sending again fails again.
NEVER_TAKEN = (
    NOT_ALLOWED
    | NOT_FOUND
    | {
        KafkaError.TOPIC_EXCEPTION,
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.INVALID_TRANSACTION_TIMEOUT,
        KafkaError._UNSUPPORTED_FEATURE,
    }
)
NO_ANSWER = frozenset(
    {
        KafkaError._TRANSPORT,
        KafkaError._TIMED_OUT,
        KafkaError._TIMED_OUT_QUEUE,
        KafkaError._ALL_BROKERS_DOWN,
        KafkaError.REQUEST_TIMED_OUT,
        KafkaError.NOT_CONTROLLER,
    }
)
COORDINATOR_MOVING = frozenset(
    {KafkaError.NOT_COORDINATOR, KafkaError.COORDINATOR_NOT_AVAILABLE, KafkaError.COORDINATOR_LOAD_IN_PROGRESS}
)
# Another producer with our transactional id has taken over, or our transaction grew too old.
FENCED = frozenset({KafkaError._FENCED, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH})
PURGED = frozenset({KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT})

ClientSettings = dict[str, Any]
READER: ClientSettings = {
    "group.id": "not-used",
    "enable.auto.commit": False,
    "auto.offset.reset": "earliest",
    "enable.partition.eof": True,
    "log_level": 0,
}
Position = tuple[int, int]  # partition and offset
Header = tuple[str, str | bytes | None]
Outgoing = tuple[str | bytes | None, str | bytes | None, list[Header]]  # key, value, headers


def client_settings(settings: Settings, role: str) -> ClientSettings:
    """librdkafka settings that every client shares: address, security, a name for the broker's logs."""
    library_log = logging.getLogger(f"librdkafka.{role}")
    if not library_log.filters:
        library_log.addFilter(OnceInAWhile())
    shared: ClientSettings = {
        "bootstrap.servers": settings.bootstrap_servers,
        "client.id": f"sensor-pipeline-{role}",
        "security.protocol": settings.kafka_security_protocol,
        # librdkafka tries IPv6 first on many systems; both families are fine.
        "broker.address.family": "any",
        "reconnect.backoff.ms": 250,
        "reconnect.backoff.max.ms": 2000,
        "logger": library_log,
    }
    if settings.kafka_security_protocol.startswith("SASL"):
        shared["sasl.mechanism"] = settings.kafka_sasl_mechanism
        shared["sasl.username"] = settings.kafka_sasl_username
        shared["sasl.password"] = settings.secret("kafka_sasl_password")
    if settings.kafka_security_protocol.endswith("SSL"):
        password = settings.kafka_ssl_key_password.get_secret_value()
        files = ("kafka_ssl_ca_location", "kafka_ssl_certificate_location", "kafka_ssl_key_location")
        check_files(settings, *files, password)
        tls = {
            "ssl.ca.location": settings.kafka_ssl_ca_location,
            "ssl.certificate.location": settings.kafka_ssl_certificate_location,
            "ssl.key.location": settings.kafka_ssl_key_location,
            "ssl.key.password": password,
        }
        shared |= {name: value for name, value in tls.items() if value}
    return shared


def connect_admin(settings: Settings, shutdown: Shutdown) -> AdminClient:
    """An admin client of a cluster that answers.

    Raises ConfigurationError after STARTUP_TIMEOUT_SECONDS, or at once when the listener refuses us, or speaks another
    protocol than ours.
    """
    if settings.kafka_security_protocol == "SASL_PLAINTEXT" and settings.kafka_sasl_mechanism == "PLAIN":
        advice = "set KAFKA_SECURITY_PROTOCOL=SASL_SSL, or KAFKA_SASL_MECHANISM=SCRAM-SHA-512"
        log.warning("password_in_clear_text", extra=fields(kafka=settings.bootstrap_servers, detail=advice))
    errors: list[KafkaError] = []  # that librdkafka reports meanwhile
    admin = AdminClient(client_settings(settings, "admin") | {"log_level": 0, "error_cb": errors.append})

    def ask() -> None:
        try:
            admin.list_topics(timeout=max(1.0, min(5.0, settings.startup_timeout_seconds)))
        except KafkaException as error:
            admin.poll(0)  # which calls error_cb
            raise_if_refused(errors, settings, last=False)
            raise TransientError(error.args[0].str()) from error

    wait_for_kafka(ask, settings, shutdown, errors)
    return admin


def wait_for_kafka(
    step: Callable[[], None], settings: Settings, shutdown: Shutdown, errors: Sequence[KafkaError] = ()
) -> None:
    """Try a step up to STARTUP_TIMEOUT_SECONDS; ``errors`` are those of a client's ``error_cb`` meanwhile."""

    def give_up(_: TransientError) -> ConfigurationError:
        raise_if_refused(errors, settings, last=True)
        unknown = any(each.code() == KafkaError._RESOLVE for each in errors)
        remedy = "there is no host with this name" if unknown else "start it, or correct the address"
        return ConfigurationError(f"Kafka does not answer at {address} (KAFKA_HOST, KAFKA_PORT): {remedy}")

    address = settings.bootstrap_servers
    at_start(step, settings, shutdown, ("kafka", "Kafka", address), give_up)


def raise_if_refused(errors: Sequence[KafkaError], settings: Settings, *, last: bool) -> None:
    """Raise ConfigurationError if waiting cannot help, or, after the ``last`` try, if it probably cannot."""
    where = f"Kafka at {settings.bootstrap_servers}"
    for error in errors:
        if error.code() == KafkaError._AUTHENTICATION:
            said = error.str().split(": ", 1)[-1].rsplit(" (after", 1)[0]
            raise ConfigurationError(
                f"{where}: it refuses user {settings.kafka_sasl_username}: {said} "
                "(check KAFKA_SASL_USERNAME, KAFKA_SASL_PASSWORD and KAFKA_SASL_MECHANISM)"
            )
    mismatch = find_mismatch(settings)
    if mismatch is not None and (mismatch.certain or last):
        raise ConfigurationError(f"{where}: {mismatch.text}")


def new_topic(settings: Settings, name: str, partitions: int, **config: str) -> NewTopic:
    """A topic with the copies that the settings ask for, and other topic settings with "_" for "."."""
    if settings.kafka_min_insync_replicas:
        config["min_insync_replicas"] = str(settings.kafka_min_insync_replicas)
    options = {option.replace("_", "."): value for option, value in config.items()}
    return NewTopic(name, partitions, settings.kafka_replication_factor, config=options)


def create_topics(admin: AdminClient, settings: Settings, *topics: NewTopic, shutdown: Shutdown) -> None:
    """Create the topic of readings, its dead letters, and ``topics``, where they do not exist.

    Where they all exist, nobody needs the right to create them. Raises ConfigurationError when no broker answers
    within STARTUP_TIMEOUT_SECONDS, PermanentError when Kafka refuses.
    """
    compression = COMPRESSION.get(settings.kafka_compression, settings.kafka_compression)
    wanted = [
        new_topic(settings, settings.kafka_topic, settings.kafka_partitions, compression_type=compression),
        new_topic(
            settings,
            settings.dead_letter_topic,
            1,
            max_message_bytes=str(DEAD_LETTER_MAX_BYTES),
            retention_ms=str(settings.dead_letter_retention_days * DAY_MS or -1),
            retention_bytes=str(settings.dead_letter_retention_mb * 1024 * 1024 or -1),
        ),
        *topics,
    ]
    wait_for_kafka(partial(_create, admin, wanted), settings, shutdown)


def _create(admin: AdminClient, topics: list[NewTopic]) -> None:
    """Create those topics that do not exist. Raises TransientError when no broker answers for one."""
    with translated_kafka("topics cannot be listed"):
        existing = admin.list_topics(timeout=CREATE_TIMEOUT_S).topics
    missing = [topic for topic in topics if topic.topic not in existing]
    futures = admin.create_topics(missing, request_timeout=CREATE_TIMEOUT_S) if missing else {}
    unanswered: TransientError | None = None
    for topic in missing:
        try:
            futures[topic.topic].result()
            log.info("topic_created", extra=fields(topic=topic.topic))
        except KafkaException as error:
            cause: KafkaError = error.args[0]
            text = f"Kafka topic {topic.topic} cannot be created: {cause.str()}"
            if cause.code() in NO_ANSWER:
                unanswered = TransientError(text)
            elif cause.code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise PermanentError(text) from error
    if unanswered is not None:
        raise unanswered


def topic_id(admin: AdminClient, settings: Settings) -> str:
    """The id that Kafka gave the topic of readings: once deleted and created again, it has another one."""
    topic = settings.kafka_topic
    with translated_kafka(f"Kafka topic {topic} cannot be described"):
        futures = admin.describe_topics(TopicCollection([topic]), request_timeout=CREATE_TIMEOUT_S)
        return str(futures[topic].result().topic_id)


@contextmanager
def translated_kafka(what: str) -> Iterator[None]:
    """Turn Kafka's errors into PermanentError where we lack a right, else into TransientError."""
    try:
        yield
    except KafkaException as error:
        cause: KafkaError = error.args[0]
        kind = PermanentError if cause.code() in NOT_ALLOWED else TransientError
        raise kind(f"{what}: {cause.str()}") from error


def read_topic(
    settings: Settings,
    topic: str,
    partition: int,
    first: int,
    end: int,
    deadline: float = math.inf,
    *,
    on_silence: Callable[[], None] | None = None,
) -> Iterator[Message]:
    """The committed messages of a partition from offset ``first`` up to before ``end``, without a consumer group.

    Ends early at ``deadline``, and where the partition does, or a transaction is open. With ``on_silence`` it waits for
    open transactions instead, and calls that every two seconds. Raises TransientError when Kafka does not answer.
    """
    with (
        closing(Consumer(client_settings(settings, "reader") | READER)) as consumer,
        translated_kafka(f"Kafka topic {topic} cannot be read"),
    ):
        consumer.assign([TopicPartition(topic, partition, first)])
        heard_at = time.monotonic()
        while first < end and (left_s := deadline - time.monotonic()) > 0:
            message = consumer.poll(min(left_s, POLL_S))
            if message is None:
                if on_silence is not None:
                    on_silence()
                elif time.monotonic() - heard_at >= SILENCE_S:
                    raise TransientError(f"Kafka topic {topic} cannot be read: no broker answers")
                continue
            heard_at, error = time.monotonic(), message.error()
            if error is None:
                first = position_of(message)[1] + 1
                if first <= end:
                    yield message
            elif error.code() == KafkaError._PARTITION_EOF:
                if on_silence is None or (message.offset() or 0) >= end:
                    return
            # The library looks for the group's coordinator, which is not needed here.
            elif error.code() != KafkaError.GROUP_AUTHORIZATION_FAILED:
                raise KafkaException(error)


def deliver(
    producer: Producer, topic: str, messages: Iterable[Outgoing], timeout_s: float
) -> list[Position | KafkaError]:
    """Send messages and wait for the broker, ``timeout_s`` after the last: where each is now, or why it is not there.

    Raises TransientError when the queue is full and the broker answers nothing.
    """
    found: dict[int, Position | KafkaError] = {}

    def note(at: int, error: KafkaError | None, message: Message) -> None:
        found[at] = position_of(message) if error is None else error

    at = -1
    for at, (key, value, headers) in enumerate(messages):
        while True:
            try:
                producer.produce(topic, key=key, value=value, headers=headers, on_delivery=partial(note, at))
                producer.poll(0)
                break
            except BufferError as error:
                if not producer.poll(timeout_s):
                    raise TransientError("Kafka does not answer, and the queue to it is full") from error
            except KafkaException as error:  # too large, for example
                found[at] = error.args[0]
                break
    producer.flush(timeout_s)
    return [found.get(number, KafkaError(KafkaError._TIMED_OUT)) for number in range(at + 1)]


def format_of(message: Message) -> bytes | None:
    """The format of a message; of several such headers the last counts."""
    forms = [value for name, value in headers_of(message) if name == FORMAT_HEADER]
    return forms[-1] if forms else JSON


def position_of(message: Message) -> Position:
    """Partition and offset of a message that came from a broker."""
    partition, offset = message.partition(), message.offset()
    assert partition is not None
    assert offset is not None
    return partition, offset


def headers_of(message: Message) -> list[tuple[str, bytes | None]]:
    """The headers of a message that came from a broker, in their order."""
    return cast("list[tuple[str, bytes | None]]", message.headers() or [])
