"""``sensor-pipeline dead-letters list | replay | delete``: look at dead letters, send them once more, forget them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from confluent_kafka import KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from services.consumer.dead_letter import OUR_HEADERS
from services.core.config import Settings
from services.core.errors import ConfigurationError, PermanentError
from services.core.kafka import (
    DEAD_LETTER_MAX_BYTES,
    PARTITIONER,
    REASON_HEADER,
    REPEAT_HEADER,
    REPEATED,
    client_settings,
    connect_admin,
    headers_of,
    place_of,
    read_range,
)
from services.core.offsets import Offsets
from services.core.shutdown import Shutdown

POLL_S = 1.0
FLUSH_TIMEOUT_S = 60.0
SHOWN_VALUE_BYTES = 200

Header = tuple[str, str | bytes | None]


@dataclass(frozen=True, slots=True)
class Entry:
    """One dead letter as it is listed."""

    offset: int
    time: str
    reason: str
    topic: str
    partition: str
    source_offset: str
    detail: str
    value: str

    @staticmethod
    def of(letter: Message) -> Entry:
        """What a person wants to know of a dead letter."""
        headers = read_headers(letter)
        value = letter.value() or b""
        return Entry(
            offset=place_of(letter)[1],
            time=datetime.fromtimestamp(letter.timestamp()[1] / 1000, UTC).isoformat(timespec="seconds"),
            reason=headers.get(REASON_HEADER, "unknown"),
            topic=headers.get("__connect.errors.topic", ""),
            partition=headers.get("__connect.errors.partition", ""),
            source_offset=headers.get("__connect.errors.offset", ""),
            detail=headers.get("__connect.errors.exception.message", ""),
            value=value[:SHOWN_VALUE_BYTES].decode("utf-8", "replace") + ("..." if value[SHOWN_VALUE_BYTES:] else ""),
        )


def read_headers(letter: Message) -> dict[str, str]:
    """The headers as text; of two with one name the last."""
    return {name: value.decode("utf-8", "replace") if value is not None else "" for name, value in headers_of(letter)}


def list_letters(settings: Settings, shutdown: Shutdown, *, reason: str | None, as_json: bool) -> Iterator[str]:
    """One line for each dead letter there is now, oldest first."""
    for letter in read_letters(settings, shutdown, reason):
        entry = Entry.of(letter)
        if as_json:
            yield json.dumps(asdict(entry))
        else:
            source = f"{entry.topic}[{entry.partition}]@{entry.source_offset}"
            yield f"{entry.offset:>6}  {entry.time}  {entry.reason:20} {source}  {entry.detail}  {entry.value!r}"


def replay(settings: Settings, shutdown: Shutdown, *, reason: str | None, overwrite: bool = False) -> int:
    """Send the original key, value and headers of the dead letters there are now to the topic of readings.

    Returns how many were sent; raises PermanentError with the count if some could not be. They are marked as repeated,
    so sending one twice is harmless: it fills a gap, but overwrites nothing that has been stored since; one that is
    still refused is a dead letter again. With ``overwrite`` they count as new.
    """
    mark: list[Header] = [] if overwrite else [(REPEAT_HEADER, REPEATED)]
    failed: list[KafkaError] = []

    def note_failure(error: KafkaError | None, _message: Message) -> None:
        if error is not None:
            failed.append(error)

    producer = Producer(
        client_settings(settings, "replay")
        | {"enable.idempotence": True, "message.max.bytes": DEAD_LETTER_MAX_BYTES, "partitioner": PARTITIONER}
    )
    sent = 0
    for letter in read_letters(settings, shutdown, reason):
        headers: list[Header] = [
            (name, value) for name, value in headers_of(letter) if name not in OUR_HEADERS and name != REPEAT_HEADER
        ]
        while True:
            try:
                producer.produce(
                    settings.kafka_topic,
                    key=letter.key(),
                    value=letter.value(),
                    headers=headers + mark,
                    on_delivery=note_failure,
                )
                break
            except BufferError:
                producer.poll(POLL_S)
        producer.poll(0)
        sent += 1
    waiting = producer.flush(FLUSH_TIMEOUT_S)
    if failed or waiting:
        cause = failed[0].str() if failed else "Kafka does not answer"
        raise PermanentError(f"{len(failed) + waiting} of {sent} dead letters were not sent: {cause}")
    return sent


def delete(settings: Settings, shutdown: Shutdown, *, up_to: int) -> int:
    """Delete the letters up to the one at offset ``up_to``; returns how many. Later ones, not yet seen, stay."""
    topic = settings.dead_letter_topic
    admin = connect_admin(settings, shutdown)
    if letter_partitions(admin, topic) != [0]:
        raise ConfigurationError(
            f"{topic} has several partitions, so an offset names no letter: use Kafka's kafka-delete-records.sh"
        )
    with Offsets(settings) as offsets:
        (found,) = offsets.of(topic, [0])
    if not found.first <= up_to < found.end:
        there_are = f"there are {found.first} to {found.end - 1}" if found.first < found.end else "there is none"
        raise ConfigurationError(f"--up-to={up_to} is not the offset of a dead letter ({there_are})")
    (deleted,) = admin.delete_records([TopicPartition(topic, 0, up_to + 1)]).values()
    try:
        return int(deleted.result().low_watermark) - found.first
    except KafkaException as error:
        raise PermanentError(f"the dead letters were not deleted: {error.args[0].str()}") from error


def letter_partitions(admin: AdminClient, topic: str) -> list[int]:
    """The partitions of the topic of dead letters."""
    topics = admin.list_topics(timeout=10).topics
    if topic not in topics:
        raise ConfigurationError(f"there is no topic {topic} (KAFKA_TOPIC); has a consumer run yet?")
    return sorted(topics[topic].partitions)


def read_letters(settings: Settings, shutdown: Shutdown, reason: str | None) -> Iterator[Message]:
    """The dead letters that exist at the time of the call, in the order of the topic."""
    topic = settings.dead_letter_topic
    partitions = letter_partitions(connect_admin(settings, shutdown), topic)
    with Offsets(settings) as offsets:
        found = offsets.of(topic, partitions)
    for each in found:
        for letter in read_range(settings, topic, each.partition, each.first, each.end):
            if shutdown.requested:
                return
            if reason is None or read_headers(letter).get(REASON_HEADER) == reason:
                yield letter
