"""Dead letters: the original key and value, and headers that say why.

The headers are named as Kafka Connect names them (KIP-298), so that tools which read its dead letters read
ours; ``sensor_pipeline.reason`` adds a stable word to filter by.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
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
    ClientSettings,
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
CONNECT_NAMES = "topic partition offset connector.name task.id stage exception.class.name exception.message"
CONNECT_HEADERS = tuple(f"__connect.errors.{name}" for name in CONNECT_NAMES.split())
OUR_HEADERS = frozenset({REASON_HEADER, ORIGINAL_BYTES_HEADER, *CONNECT_HEADERS})

# A letter that is too large for its topic is cut to this many bytes of its value, without the message's own headers.
TRUNCATED_BYTES = (64 * 1024, 0)

PRODUCER_SETTINGS: ClientSettings = {
    "acks": "all",
    "message.max.bytes": DEAD_LETTER_MAX_BYTES,
    "compression.type": "zstd",
    "topic.metadata.propagation.max.ms": 5000,  # then a topic that is gone is an error
    "linger.ms": 5,
    "partitioner": PARTITIONER,
}


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that was not stored: a stable reason, and what was found."""

    message: Message
    reason: Reason
    detail: str

    def outgoing(self, group: str, at_most: int | None) -> Outgoing:
        """Key, value and headers as they are, and our headers; or the first ``at_most`` bytes of the value."""
        stage = "TASK_PUT" if self.reason in PUT_REASONS else "VALUE_CONVERTER"
        origin = (self.message.topic(), *position_of(self.message))
        values = (*origin, group, 0, stage, self.reason, self.detail, self.reason)
        named = zip((*CONNECT_HEADERS, REASON_HEADER), values, strict=True)
        ours: list[Header] = [(name, str(value).encode()) for name, value in named]
        if at_most is not None:
            key, value = self.message.key() or b"", self.message.value() or b""
            return key[:MAX_KEY_BYTES], value[:at_most], [*ours, (ORIGINAL_BYTES_HEADER, str(len(value)).encode())]
        # Of a letter that was replayed and refused again, only the last reason.
        theirs = [header for header in headers_of(self.message) if header[0] not in OUR_HEADERS]
        return self.message.key(), self.message.value(), [*theirs, *ours]


class DeadLetterTopic:
    """Sends dead letters and waits until the broker has them; reads again what the database has refused."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._producer: Producer | None = None  # created when needed: most consumers never have a dead letter

    def read_again(self, positions: Set[Position]) -> dict[Position, Message]:
        """The messages of the topic of readings there, as far as they still exist. Raises TransientError."""
        topic, found = self._settings.kafka_topic, {}
        for partition, group in groupby(sorted(positions), itemgetter(0)):
            offsets = [offset for _, offset in group]
            for message in read_topic(self._settings, topic, partition, offsets[0], offsets[-1] + 1):
                if position_of(message) in positions:
                    found[position_of(message)] = message
        return found

    def send(self, letters: Sequence[DeadLetter]) -> None:
        """Send them all and wait for the broker.

        Raises TransientError when it does not take them in time, PermanentError when it never will. After an error
        the same letters are sent again: one may appear twice (its topic, partition and offset are the same), none is
        ever missing.
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
        """Send the beginning of a message that is too large for the topic, alone: the limit is one of a request."""
        for size in TRUNCATED_BYTES:
            if not self._send_and_wait([letter], at_most=size):
                return
        raise PermanentError(
            f"Kafka topic {self._settings.dead_letter_topic} cannot take a dead letter: "
            "its max.message.bytes is too small"
        )

    def _send_and_wait(self, letters: Sequence[DeadLetter], at_most: int | None = None) -> list[DeadLetter]:
        """Send letters, cut to ``at_most`` bytes of their values; returns those that were too large."""
        if self._producer is None:
            self._producer = Producer(client_settings(self._settings, "dead-letters") | PRODUCER_SETTINGS)
        topic = self._settings.dead_letter_topic
        outgoing = (letter.outgoing(self._settings.kafka_group, at_most) for letter in letters)
        answers = deliver(self._producer, topic, outgoing, FLUSH_TIMEOUT_S)
        failed = [answer for answer in answers if isinstance(answer, KafkaError)]
        for error in failed:
            if error.code() in NOT_ALLOWED | NOT_FOUND:
                raise PermanentError(f"Kafka topic {topic} refuses dead letters: {error.str()}")
            if error.code() != KafkaError.MSG_SIZE_TOO_LARGE:
                raise TransientError(error.str())
        return [letter for letter, answer in zip(letters, answers, strict=True) if isinstance(answer, KafkaError)]
