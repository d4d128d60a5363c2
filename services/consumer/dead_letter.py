"""Dead letters: the original key and value, and headers that say why.

The headers are named as Kafka Connect names them (KIP-298), so that tools which read its dead letters read
ours; ``sensor_pipeline.reason`` adds a stable word to filter by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from services.core.config import Settings
from services.core.errors import TransientError
from services.core.kafka import DEAD_LETTER_MAX_BYTES, REASON_HEADER, client_settings, headers_of, place_of

FLUSH_TIMEOUT_S = 10
SEND_AT_ONCE = 1000  # times the largest message: what the producer may hold
PUT_REASONS = frozenset({"refused_by_database", "too_late"})
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
OUR_HEADERS = frozenset({REASON_HEADER, *(f"__connect.errors.{name}" for name in CONNECT_HEADERS)})


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that was not stored: a stable reason, and what was found."""

    message: Message
    reason: str
    detail: str

    def headers(self, group: str) -> list[tuple[str, str | bytes | None]]:
        """The message's own headers, then ours."""
        stage = "TASK_PUT" if self.reason in PUT_REASONS else "VALUE_CONVERTER"
        partition, offset = place_of(self.message)
        values = (self.message.topic(), partition, offset, group, 0, stage, self.reason, self.detail)
        connect = {f"__connect.errors.{name}": value for name, value in zip(CONNECT_HEADERS, values, strict=True)}
        # A letter that was replayed and refused again carries the last reason only.
        theirs = [header for header in headers_of(self.message) if header[0] not in OUR_HEADERS]
        ours = connect | {REASON_HEADER: self.reason}
        return [*theirs, *((name, str(value).encode()) for name, value in ours.items())]


class DeadLetterTopic:
    """Sends dead letters and waits until the broker has them."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._producer = self._create_producer()

    def _create_producer(self) -> Producer:
        return Producer(
            client_settings(self._settings, "dead-letters")
            | {"enable.idempotence": True, "message.max.bytes": DEAD_LETTER_MAX_BYTES, "linger.ms": 5}
        )

    def send(self, letters: Sequence[DeadLetter]) -> bool:
        """Send them all and wait for the broker. Raises TransientError when it does not take them in time.

        After an error the same letters are sent again: a dead letter may appear twice (the headers with topic,
        partition and offset tell), it is never missing.
        """
        try:
            for start in range(0, len(letters), SEND_AT_ONCE):
                self._send_and_wait(letters[start : start + SEND_AT_ONCE])
            return True
        except (BufferError, KafkaException, TransientError) as error:
            # What an idempotent producer still holds must not go out later, between other letters.
            self._producer.purge()
            self._producer = self._create_producer()
            raise TransientError(f"dead letters could not be sent: {error}") from error

    def _send_and_wait(self, letters: Sequence[DeadLetter]) -> None:
        failed: list[KafkaError] = []

        def note_failure(error: KafkaError | None, _message: Message) -> None:
            if error is not None:
                failed.append(error)

        for letter in letters:
            self._producer.produce(
                self._settings.dead_letter_topic,
                key=letter.message.key(),
                value=letter.message.value(),
                headers=letter.headers(self._settings.kafka_group),
                on_delivery=note_failure,
            )
        waiting = self._producer.flush(FLUSH_TIMEOUT_S)
        if failed:
            raise TransientError(failed[0].str())
        if waiting:
            raise TransientError(f"Kafka does not answer, {waiting} wait")
