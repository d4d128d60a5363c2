"""Dead letters: the original key and value, and headers that say why.

The headers are named as Kafka Connect names them (KIP-298), so that tools which read its dead letters read
ours; ``sensor_pipeline.reason`` adds a stable word to filter by.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from services.core.config import Settings
from services.core.errors import PermanentError, Reason, TransientError
from services.core.kafka import (
    DEAD_LETTER_MAX_BYTES,
    NOT_ALLOWED,
    NOT_FOUND,
    PARTITIONER,
    REASON_HEADER,
    Header,
    Outgoing,
    Position,
    client_settings,
    deliver,
    headers_of,
    position_of,
    read_topic,
)

FLUSH_TIMEOUT_S = 10
SEND_AT_ONCE = 1000  # times the largest message: what the producer may hold
MAX_KEY_BYTES = 1024  # of a truncated letter
PUT_REASONS = frozenset({Reason.REFUSED_BY_DATABASE, Reason.TOO_LATE})
ORIGINAL_BYTES_HEADER = "sensor_pipeline.original_bytes"
CONNECT_HEADERS = (
    "topic",
    "partition",
    "offset",
    "connector.name",
    "task.id",
    "stage",
    "exception.class.name",
    "exception.message",
)
OUR_HEADERS = frozenset(
    {REASON_HEADER, ORIGINAL_BYTES_HEADER, *(f"__connect.errors.{name}" for name in CONNECT_HEADERS)}
)

# A letter that is too large for its topic is cut to this many bytes of its value, without foreign headers.
TRUNCATED_BYTES = (64 * 1024, 0)


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that was not stored: a stable reason, and what was found."""

    message: Message
    reason: Reason
    detail: str

    def headers(self, group: str) -> list[Header]:
        """The message's own headers, then ours."""
        # A letter that was replayed and refused again carries the last reason only.
        theirs: list[Header] = [header for header in headers_of(self.message) if header[0] not in OUR_HEADERS]
        return [*theirs, *self.own_headers(group)]

    def own_headers(self, group: str) -> list[Header]:
        """Why it was not stored, and where it was."""
        stage = "TASK_PUT" if self.reason in PUT_REASONS else "VALUE_CONVERTER"
        partition, offset = position_of(self.message)
        values = (self.message.topic(), partition, offset, group, 0, stage, self.reason, self.detail)
        connect = {f"__connect.errors.{name}": value for name, value in zip(CONNECT_HEADERS, values, strict=True)}
        ours = connect | {REASON_HEADER: self.reason}
        return [(name, str(value).encode()) for name, value in ours.items()]


class DeadLetterTopic:
    """Sends dead letters and waits until the broker has them; reads again what the database has refused."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._producer: Producer | None = None  # made when it is needed: most consumers never have a dead letter

    def _create_producer(self) -> Producer:
        return Producer(
            client_settings(self._settings, "dead-letters")
            | {
                "acks": "all",
                "message.max.bytes": DEAD_LETTER_MAX_BYTES,
                "compression.type": "zstd",
                "topic.metadata.propagation.max.ms": 5000,  # then a topic that is gone is an error
                "linger.ms": 5,
                "partitioner": PARTITIONER,
            }
        )

    def read_again(self, places: Collection[Position]) -> dict[Position, Message]:
        """The messages of the topic of readings at these places, as far as they still exist. Raises TransientError."""
        topic, found = self._settings.kafka_topic, {}
        for partition, group in groupby(sorted(places), itemgetter(0)):
            offsets = dict.fromkeys(offset for _, offset in group)
            for message in read_topic(self._settings, topic, partition, min(offsets), max(offsets) + 1):
                if message.offset() in offsets:
                    found[position_of(message)] = message
        return found

    def send(self, letters: Sequence[DeadLetter]) -> None:
        """Send them all and wait for the broker.

        Raises TransientError when it does not take them in time, PermanentError when it never will. After an error
        the same letters are sent again: a dead letter may appear twice (the headers with topic, partition and offset
        tell), it is never missing.
        """
        try:
            for start in range(0, len(letters), SEND_AT_ONCE):
                for letter in self._send_and_wait(letters[start : start + SEND_AT_ONCE]):
                    self._send_truncated(letter)
        except (KafkaException, TransientError) as error:
            # What the producer still holds must not go out later, between other letters.
            producer, self._producer = self._producer, None
            if producer is not None:
                producer.purge()
            raise TransientError(f"dead letters could not be sent: {error}") from error

    def _send_truncated(self, letter: DeadLetter) -> None:
        """Send the beginning of a message that is too large for the topic, alone: a limit is one of a whole request."""
        for size in TRUNCATED_BYTES:
            if not self._send_and_wait([letter], at_most=size):
                return
        raise PermanentError(
            f"Kafka topic {self._settings.dead_letter_topic} takes no dead letter: max.message.bytes is too small"
        )

    def _send_and_wait(self, letters: Sequence[DeadLetter], at_most: int | None = None) -> list[DeadLetter]:
        """Send letters, cut to ``at_most`` bytes of their values; returns those that were too large."""
        producer = self._producer = self._producer or self._create_producer()
        topic = self._settings.dead_letter_topic
        answers = deliver(producer, topic, (self._outgoing(letter, at_most) for letter in letters), FLUSH_TIMEOUT_S)
        failed = [answer for answer in answers if isinstance(answer, KafkaError)]
        for error in failed:
            if error.code() in NOT_ALLOWED | NOT_FOUND:
                raise PermanentError(f"Kafka topic {topic} takes no dead letters: {error.str()}")
            if error.code() != KafkaError.MSG_SIZE_TOO_LARGE:
                raise TransientError(error.str())
        return [letter for letter, answer in zip(letters, answers, strict=True) if isinstance(answer, KafkaError)]

    def _outgoing(self, letter: DeadLetter, at_most: int | None) -> Outgoing:
        message, group = letter.message, self._settings.kafka_group
        if at_most is None:
            return message.key(), message.value(), letter.headers(group)
        value = message.value() or b""
        headers = [*letter.own_headers(group), (ORIGINAL_BYTES_HEADER, str(len(value)).encode())]
        return (message.key() or b"")[:MAX_KEY_BYTES], value[:at_most], headers
