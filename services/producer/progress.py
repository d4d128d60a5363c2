"""How far each file was sent, kept in Kafka beside the messages.

A compacted topic, ``<topic>.progress``, holds one record for each file: key = the id of the topic of readings and the
file's fingerprint, value = the JSON of a Progress; and one for each such topic, with its id alone as the key. A
record is written in the same transaction as the messages it counts, so a reader (isolation level read_committed) sees
both or neither. This is how Kafka Connect's sources got exactly-once (KIP-618, "Exactly-Once Support for Source
Connectors").
"""

from __future__ import annotations

import logging
import time
from functools import partial

import msgspec
from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec

from services.core import kafka
from services.core.backoff import at_start, pauses
from services.core.config import Settings
from services.core.errors import PermanentError, TransientError
from services.core.kafka import client_settings, new_topic
from services.core.logs import fields
from services.core.shutdown import Shutdown

log = logging.getLogger("producer")

REQUEST_TIMEOUT_S = 5.0
NOTE_AFTER_S = 2.0  # without an answer


class Stopped(TransientError):  # noqa: N818 - no error at all
    """The service shall end and Kafka did not answer in time; the next start ends the open transaction."""


class Progress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """How far one file was sent.

    The next row to read is row number ``rows``; of those before it ``sent`` became messages, the others were
    skipped, counted by reason. ``doubtful`` counts local times that came twice or never. ``run`` names the run
    of the producer that wrote this. ``digest`` (hex) stands for the messages of the first ``rows`` rows, ``repeat``
    is the value of their REPEAT_HEADER ("": none).

    The record of a topic has only ``began``: when the first run was about to fill it, in seconds since 1970.
    """

    url: str
    began: float = 0.0
    repeat: str = ""
    digest: str = ""
    rows: int = 0
    sent: int = 0
    skipped: dict[str, int] = {}
    doubtful: dict[str, int] = {}
    done: bool = False
    run: str = ""


_decoder = msgspec.json.Decoder(Progress)
_encoder = msgspec.json.Encoder()


def progress_topic(settings: Settings) -> NewTopic:
    """The topic that progress is kept in."""
    return new_topic(settings, f"{settings.kafka_topic}.progress", 1, cleanup_policy="compact")


def topic_id(admin: AdminClient, settings: Settings, shutdown: Shutdown) -> str:
    """The id that Kafka gave the topic of readings: once deleted and created again, it has another one.

    It is part of a record's key, so that a new topic is filled from the start.
    """
    # A new topic is not known to all brokers at once.
    where = ("kafka", "Kafka", settings.bootstrap_servers)
    ask = partial(kafka.topic_id, admin, settings)
    return at_start(ask, settings, shutdown, where, lambda error: PermanentError(str(error)))


def encode_progress(progress: Progress) -> bytes:
    """The record's value."""
    return _encoder.encode(progress)


def read_progress(settings: Settings, shutdown: Shutdown) -> dict[str, Progress]:
    """All that was committed to the progress topic before this call, by fingerprint.

    Waits while Kafka is away, and for transactions of other producers that are open on this topic (they are
    short, and Kafka ends those of the dead). Raises Stopped when ``shutdown`` was requested meanwhile.
    """
    topic = progress_topic(settings).topic
    for pause in pauses():
        try:
            return _read(settings, topic, shutdown)
        except KafkaException as error:
            cause: KafkaError = error.args[0]
            if cause.code() in (KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED):
                raise PermanentError(f"Kafka topic {topic} cannot be read: {cause.str()}") from error
            log.warning("progress_unreadable", extra=fields(topic=topic, error=cause.str(), retry_s=pause))
            if shutdown.wait(pause):
                break
    raise Stopped("the progress was not read")


def _read(settings: Settings, topic: str, shutdown: Shutdown) -> dict[str, Progress]:
    end = _end(settings, topic)
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
                if time.monotonic() - silent_since > NOTE_AFTER_S:
                    log.warning("waiting_for_progress", extra=fields(topic=topic, end=end))
                    silent_since = time.monotonic()
                continue
            silent_since = time.monotonic()
            failure = message.error()
            if failure is None:
                _take(found, topic, message)
            elif failure.code() != KafkaError._PARTITION_EOF:
                raise KafkaException(failure)
            elif (message.offset() or 0) >= end:
                return found
    finally:
        consumer.close()
    raise Stopped("the progress was not read")


def _end(settings: Settings, topic: str) -> int:
    """The offset after the last record, committed or not.

    The last stable offset will not do: another producer's open transaction holds it back, and records of ours
    that were committed after its first one would be missed. The client is a new one each time: to a client
    that saw an earlier start of the broker, list_offsets answers FENCED_LEADER_EPOCH for ever.
    """
    partition = TopicPartition(topic, 0)
    admin = AdminClient(client_settings(settings, "admin") | {"log_level": 0})
    futures = admin.list_offsets(
        {partition: OffsetSpec.latest()},
        isolation_level=IsolationLevel.READ_UNCOMMITTED,
        request_timeout=REQUEST_TIMEOUT_S,
    )
    return int(futures[partition].result().offset)


def _take(found: dict[str, Progress], topic: str, message: Message) -> None:
    """Add a record to ``found``; one with no value takes its key away, as in any compacted topic."""
    key, value = str(message.key() or b"", "ascii", "replace"), message.value()
    if value is None:
        found.pop(key, None)
        return
    try:
        found[key] = _decoder.decode(value)
    except ValueError as error:  # msgspec's errors are ValueErrors
        raise PermanentError(
            f"Kafka topic {topic} holds a record that is not a producer's progress: {error}"
        ) from error
