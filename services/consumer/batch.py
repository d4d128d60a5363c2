"""A batch: messages decoded, or dead letters, and how far they move each partition."""

from __future__ import annotations

import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

from confluent_kafka import Message
from psycopg import sql

from services.consumer.dead_letter import DeadLetter
from services.core.errors import MalformedMessage
from services.core.kafka import REPEAT_HEADER, REPEATED, REPEATED_IF_MOVED, headers_of, place_of
from services.core.reading import Decoder, Reading


class OutOfPlaceError(Exception):
    """A message that was fetched before its partition moved: the database has to be asked where to go on."""


@dataclass(frozen=True, slots=True)
class Move:
    """Where the partitions of a topic must be (``expected``), and where they are afterwards (``next``)."""

    topic_id: str
    expected: Mapping[int, int]
    next: Mapping[int, int]

    @property
    def advances(self) -> bool:
        """Whether it is more than a check."""
        return self.next != self.expected

    def standing_still(self) -> Move:
        """Only the check, for a transaction that does not finish its batch."""
        return Move(self.topic_id, self.expected, self.expected)

    def literals(self) -> dict[str, sql.Composable]:
        """What the statement ``advance`` has in braces."""
        partitions = sorted(self.expected)
        return {
            "topic": sql.Literal(self.topic_id),
            "partitions": sql.Literal(partitions),
            "expected": sql.Literal([self.expected[partition] for partition in partitions]),
            "next": sql.Literal([self.next[partition] for partition in partitions]),
        }


@dataclass(slots=True)
class Batch:
    """Messages that are stored together.

    ``start`` and ``end`` are positions, by partition: where the database must be, and where it is afterwards. Offsets
    between two messages may be missing (aborted transactions, markers), so a position is no offset of a message.
    """

    topic_id: str = ""
    fills_gaps: bool = False  # what REPEATED_IF_MOVED marks may have been stored before
    readings: list[Reading] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)  # of the readings, same places
    dead_letters: list[DeadLetter] = field(default_factory=list)
    start: dict[int, int] = field(default_factory=dict)
    end: dict[int, int] = field(default_factory=dict)
    size_bytes: int = 0
    opened_at: float = field(default_factory=time.monotonic)

    def __len__(self) -> int:
        return len(self.readings) + len(self.dead_letters)

    @property
    def is_empty(self) -> bool:
        """Whether storing it would change nothing."""
        return not self.start

    @property
    def positions(self) -> Move:
        """How far the batch moves its partitions."""
        return Move(self.topic_id, self.start, self.end)

    def split_repeated(self) -> tuple[list[int], list[int]]:
        """The places of the readings that overwrite, and of those that may have been stored before and fill gaps."""
        marks = {REPEATED, REPEATED_IF_MOVED} if self.fills_gaps else {REPEATED}
        repeated = [at for at, message in enumerate(self.messages) if message.headers() and mark(message) in marks]
        if not repeated:
            return list(range(len(self.readings))), []
        others = set(repeated)
        return [at for at in range(len(self.readings)) if at not in others], repeated

    def add(self, messages: Sequence[Message], decoder: Decoder, positions: dict[int, int]) -> None:
        """Decode messages, in the order they came; ``positions`` is where each partition is, and follows.

        Runs for each message, so it asks for an offset only where the messages change from one partition to another.
        """
        decode, readings, kept = decoder.decode, self.readings, self.messages
        before = messages[0]
        partition = self._check_place(before, positions)
        for message in messages:
            value = message.value()
            try:
                readings.append(decode(value))
            except MalformedMessage as error:
                self.dead_letters.append(DeadLetter(message, error.reason, str(error)))
            else:
                kept.append(message)
            if value:
                self.size_bytes += len(value)
            if message.partition() != partition:
                self._move_behind(before, positions)
                partition = self._check_place(message, positions)
            before = message
        self._move_behind(before, positions)

    def _check_place(self, message: Message, positions: dict[int, int]) -> int:
        """The message's partition, which must be ours and not be further on."""
        partition, offset = place_of(message)
        if offset < positions.get(partition, offset + 1):
            raise OutOfPlaceError(f"a message of partition {partition} at {offset}")
        return partition

    def _move_behind(self, message: Message, positions: dict[int, int]) -> None:
        partition, offset = place_of(message)
        self.move(partition, offset + 1, positions)

    def move(self, partition: int, position: int, positions: dict[int, int]) -> None:
        """The partition is at ``position`` once the batch is stored."""
        if not self.start:
            self.opened_at = time.monotonic()
        self.start.setdefault(partition, positions[partition])
        self.end[partition] = positions[partition] = position

    def without(self, partitions: Container[int]) -> Batch:
        """What is left when these partitions are another consumer's."""
        stay = [at for at, message in enumerate(self.messages) if message.partition() not in partitions]
        return Batch(
            topic_id=self.topic_id,
            fills_gaps=self.fills_gaps,
            readings=[self.readings[at] for at in stay],
            messages=[self.messages[at] for at in stay],
            dead_letters=[letter for letter in self.dead_letters if letter.message.partition() not in partitions],
            start={partition: position for partition, position in self.start.items() if partition not in partitions},
            end={partition: position for partition, position in self.end.items() if partition not in partitions},
            size_bytes=self.size_bytes,
            opened_at=self.opened_at,
        )


def mark(message: Message) -> bytes | None:
    """What the message says of having been stored before; of several marks the last."""
    marks = [value for name, value in headers_of(message) if name == REPEAT_HEADER]
    return marks[-1] if marks else None
