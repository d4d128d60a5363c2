"""A batch: the columns of many messages, dead letters, and how far they move each partition."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import pyarrow as pa
import pyarrow.compute as pc
from confluent_kafka import Message
from psycopg import sql

from services.consumer.columns import joined
from services.consumer.dead_letter import DeadLetter
from services.consumer.decoding import decode
from services.core.errors import OutOfPlaceError
from services.core.kafka import position_of
from services.core.reading import Decoder


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
    """Messages that are stored together. Of those that are readings only the columns are kept.

    ``start`` and ``end`` are positions, by partition: where the database must be, and where it is afterwards. Offsets
    between two messages may be missing (aborted transactions, markers), so a position is not a message's offset.
    """

    topic_id: str = ""
    fills_gaps: bool = False  # what REPEATED_IF_MOVED marks may have been stored before
    chunks: list[pa.RecordBatch] = field(default_factory=list)
    dead_letters: list[DeadLetter] = field(default_factory=list)
    start: dict[int, int] = field(default_factory=dict)
    end: dict[int, int] = field(default_factory=dict)
    size_bytes: int = 0
    opened_at: float = field(default_factory=time.monotonic)

    def __len__(self) -> int:
        return sum(map(len, self.chunks)) + len(self.dead_letters)

    @property
    def is_empty(self) -> bool:
        """Whether storing it would change nothing."""
        return not self.start

    def split_repeated(self) -> tuple[pa.RecordBatch, pa.RecordBatch]:
        """The readings that overwrite, and those that may have been stored before and fill gaps."""
        readings = joined(self.chunks)
        return readings.filter(pc.invert(readings["repeated"])), readings.filter(readings["repeated"])

    def add(self, messages: Sequence[Message], decoder: Decoder, positions: dict[int, int]) -> None:
        """Decode messages, in the order they came; ``positions`` is where each partition is, and follows."""
        after = 0
        for _, run in groupby(map(Message.partition, messages)):
            first, after = after, after + len(list(run))
            partition, offset = position_of(messages[first])
            if offset < positions.get(partition, math.inf):
                raise OutOfPlaceError(f"a message of partition {partition} at {offset}")
            self.move(partition, position_of(messages[after - 1])[1] + 1, positions)
        chunks, letters = decode(messages, decoder, fills_gaps=self.fills_gaps)
        self.chunks += chunks
        self.dead_letters += letters
        self.size_bytes += sum(map(len, messages))

    def move(self, partition: int, position: int, positions: dict[int, int]) -> None:
        """The partition is at ``position`` once the batch is stored."""
        if not self.start:
            self.opened_at = time.monotonic()
        self.start.setdefault(partition, positions[partition])
        self.end[partition] = positions[partition] = position

    def without(self, partitions: Collection[int]) -> Batch:
        """What remains when these partitions are another consumer's."""
        gone = pa.array(list(partitions), pa.int32())
        start = {partition: position for partition, position in self.start.items() if partition not in partitions}
        return replace(
            self,
            chunks=[chunk.filter(pc.invert(pc.is_in(chunk["partition"], gone))) for chunk in self.chunks],
            dead_letters=[letter for letter in self.dead_letters if letter.message.partition() not in partitions],
            start=start,
            end={partition: self.end[partition] for partition in start},
            size_bytes=self.size_bytes if start else 0,  # an empty batch is never stored, so it must not be full
        )
