"""How far each file was sent, kept in Kafka beside the messages.

A compacted topic, ``<topic>.progress``, holds one record for each file: key = the file's fingerprint, value =
the JSON of a Progress. A record is written in the same transaction as the messages it counts, so a reader
(isolation level read_committed) sees both or neither. This is how Kafka Connect's sources got exactly-once
(KIP-618, "Exactly-Once Support for Source Connectors").
"""

from __future__ import annotations

import logging
import time

import msgspec
from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec

from services.core.backoff import pauses
from services.core.config import Settings
from services.core.errors import PermanentError, TransientError
from services.core.kafka import client_settings
from services.core.logs import fields
from services.core.shutdown import Shutdown

log = logging.getLogger("producer")

REQUEST_TIMEOUT_S = 5.0


class Progress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """How far one file was sent.

    The next row to read is row number ``rows``; of those before it ``sent`` became messages, the others were
    skipped, counted by reason. ``run`` names the run of the producer that wrote this.
    """

    url: str
    rows: int = 0
    sent: int = 0
    skipped: dict[str, int] = {}
    done: bool = False
    run: str = ""


_decoder = msgspec.json.Decoder(Progress)
_encoder = msgspec.json.Encoder()


def progress_topic(settings: Settings) -> NewTopic:
    """The topic that progress is kept in."""
    return NewTopic(
        f"{settings.kafka_topic}.progress",
        1,
        settings.kafka_replication_factor,
        config={"cleanup.policy": "compact"},
    )


def topic_id(admin: AdminClient, topic: str) -> str:
    """The id that Kafka gave ``topic``: a topic that is deleted and created again has another one.

    It is part of a record's key, so that an emptied topic is filled again.
    """
    futures = admin.describe_topics(TopicCollection([topic]), request_timeout=REQUEST_TIMEOUT_S)
    try:
        return str(futures[topic].result().topic_id)
    except KafkaException as error:
        raise PermanentError(f"Kafka topic {topic} cannot be described: {error.args[0].str()}") from error


def encode_progress(progress: Progress) -> bytes:
    """The record's value."""
    return _encoder.encode(progress)


def read_progress(settings: Settings, admin: AdminClient, shutdown: Shutdown) -> dict[str, Progress]:
    """All that was committed to the progress topic before this call, by fingerprint.

    Waits while Kafka is away, and for transactions of other producers that are open on this topic (they are
    short, and Kafka ends those of the dead). Raises TransientError when ``shutdown`` was requested meanwhile.
    """
    topic = progress_topic(settings).topic
    for pause in pauses():
        try:
            return _read(settings, admin, topic, shutdown)
        except KafkaException as error:
            cause: KafkaError = error.args[0]
            if cause.code() in (KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED):
                raise PermanentError(f"Kafka topic {topic} cannot be read: {cause.str()}") from error
            log.warning("progress_unreadable", extra=fields(topic=topic, error=cause.str(), retry_s=pause))
            if shutdown.wait(pause):
                break
    raise TransientError("stopped before the progress was read")


def _read(settings: Settings, admin: AdminClient, topic: str, shutdown: Shutdown) -> dict[str, Progress]:
    end = _end(admin, topic)
    found: dict[str, Progress] = {}
    if not end:
        return found
    consumer = Consumer(
        client_settings(settings, "progress")
        | {
            "group.id": f"{topic}.reader",  # librdkafka wants one; nothing is committed under it
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "enable.partition.eof": True,
        }
    )
    try:
        consumer.assign([TopicPartition(topic, 0, OFFSET_BEGINNING)])
        silent_since = time.monotonic()
        while not shutdown.requested:
            message = consumer.poll(0.5)
            if message is None:
                if time.monotonic() - silent_since > REQUEST_TIMEOUT_S:
                    log.warning("waiting_for_progress", extra=fields(topic=topic, end=end))
                    silent_since = time.monotonic()
                continue
            silent_since = time.monotonic()
            failure = message.error()
            if failure is None:
                found[str(message.key() or b"", "ascii", "replace")] = _decode(topic, message.value())
            elif failure.code() != KafkaError._PARTITION_EOF:
                raise KafkaException(failure)
            elif (message.offset() or 0) >= end:
                return found
    finally:
        consumer.close()
    raise TransientError("stopped while the progress was read")


def _end(admin: AdminClient, topic: str) -> int:
    """The offset after the last record, committed or not.

    The last stable offset will not do: another producer's open transaction holds it back, and records of ours
    that were committed after its first one would be missed.
    """
    partition = TopicPartition(topic, 0)
    futures = admin.list_offsets(
        {partition: OffsetSpec.latest()},
        isolation_level=IsolationLevel.READ_UNCOMMITTED,
        request_timeout=REQUEST_TIMEOUT_S,
    )
    return int(futures[partition].result().offset)


def _decode(topic: str, value: bytes | None) -> Progress:
    try:
        return _decoder.decode(value or b"")
    except (msgspec.ValidationError, ValueError) as error:
        raise PermanentError(
            f"Kafka topic {topic} holds a record that is no progress of a producer: {error}"
        ) from error
