"""From messages to columns: all of a chunk at once while all is well, else one message at a time.

The way of one message at a time (core/reading.py) is the definition of what a reading is. What is decoded at once has
to be the same, so what cannot be decoded, and all of a chunk that holds anything unusual, goes the slow way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from itertools import groupby

import pyarrow as pa
import pyarrow.compute as pc
from confluent_kafka import Message

from services.consumer.blocks import alone, split_refused
from services.consumer.columns import ORIGIN, columns_of, joined, measured, microseconds, schema_of
from services.consumer.dead_letter import DeadLetter
from services.core.block import decode_block
from services.core.errors import MalformedMessageError, Reason
from services.core.kafka import JSON, REPEAT_HEADER, REPEATED, REPEATED_IF_MOVED, format_of, headers_of, position_of
from services.core.reading import Decoder, Reading

Decoded = tuple[list[pa.RecordBatch], list[DeadLetter], int]


def decode(messages: Sequence[Message], decoder: Decoder, *, fills_gaps: bool) -> Decoded:
    """The readings in these messages, dead letters for what is not one, and the size of all in bytes.

    ``fills_gaps``: what is marked REPEATED_IF_MOVED may have been stored before.
    """
    marks = frozenset({REPEATED, REPEATED_IF_MOVED} if fills_gaps else {REPEATED})
    if not any(map(Message.headers, messages)):
        return decode_readings(messages, decoder, frozenset())
    chunks, letters, size = [], [], 0
    for form, run in groupby(messages, format_of):
        decode_run = decode_readings if form == JSON else decode_blocks
        more_chunks, more_letters, more = decode_run(list(run), decoder, marks)
        chunks += more_chunks
        letters += more_letters
        size += more
    return chunks, letters, size


def decode_readings(messages: Sequence[Message], decoder: Decoder, marks: Set[bytes | None]) -> Decoded:
    """Messages that hold one reading each; no ``marks``: none of them has a header."""
    values = list(map(Message.value, messages))
    at_once = decode_at_once(values, decoder)
    if at_once is not None:
        columns, others = at_once
        readings, refused = decode_each(values, others, decoder)
        if readings:  # deeply nested JSON: how deep it may be depends on who asks
            at_once = None
    if at_once is None:
        readings, refused = decode_each(values, range(len(values)), decoder)
        columns = columns_of(readings, decoder.measurements)
    letters = [DeadLetter(messages[at], *why) for at, why in refused.items()]
    kept = [message for at, message in enumerate(messages) if at not in refused] if refused else messages
    return [with_origin(columns, kept, marks)], letters, sum(map(len, filter(None, values)))


def decode_each(
    values: Sequence[bytes | None], places: Iterable[int], decoder: Decoder
) -> tuple[list[Reading], dict[int, tuple[Reason, str]]]:
    """The readings at these places, and the reason and the detail of why others are none, by their places.

    No exception is kept: its traceback would refer to this frame, a reference cycle that is seldom collected.
    """
    readings: list[Reading] = []
    refused: dict[int, tuple[Reason, str]] = {}
    for at in places:
        try:
            readings.append(decoder.decode(values[at]))
        except MalformedMessageError as error:
            refused[at] = error.reason, str(error)
    return readings, refused


def decode_blocks(messages: Sequence[Message], decoder: Decoder, marks: Set[bytes | None]) -> Decoded:
    """Messages that hold many each, or say that they hold what nobody knows."""
    chunks: list[pa.RecordBatch] = []
    letters: list[DeadLetter] = []
    for message in messages:
        try:
            rows = decode_block(message.value(), decoder.measurements, format_of(message))
        except MalformedMessageError as error:
            letters.append(DeadLetter(message, error.reason, str(error)))
            continue
        origin = (*position_of(message), mark(message) in marks)
        origins = [pa.repeat(pa.scalar(at, kind), len(rows)) for at, (_, kind) in zip(origin, ORIGIN, strict=True)]
        sensor, time, *values = rows.columns
        columns = [sensor, time.view(pa.int64()), *values, *origins]
        chunks.append(pa.RecordBatch.from_arrays(columns, schema=schema_of(decoder.measurements)))
    if not chunks:
        return [], letters, sum(len(message.value() or b"") for message in messages)
    rows = joined(chunks)
    readings, refused = split_refused(rows, decoder)
    blocks = {position_of(message): message for message in messages} if refused else {}
    for number, why in refused.items():
        row = rows.slice(number, 1)
        block = blocks[row["partition"][0].as_py(), row["offset"][0].as_py()]
        letters.append(DeadLetter(alone(block, row), *why))
    return [readings], letters, sum(len(message.value() or b"") for message in messages)


def decode_at_once(values: Sequence[bytes | None], decoder: Decoder) -> tuple[pa.RecordBatch, list[int]] | None:
    """The columns of what is a reading beyond doubt, and the places of what is none at all; None if anything is odd."""
    decoded = decoder.decode_all(values)
    if decoded is None:
        return None
    readings, others = decoded
    if not readings:
        return None
    try:
        columns = columns_of(readings, decoder.measurements)
    except OverflowError:  # a time that is before the year 1 or after 9999 in UTC
        return None
    earliest, latest = map(microseconds, decoder.bounds)
    ends = pc.min_max(columns["time"])
    if ends["min"].as_py() < earliest or ends["max"].as_py() > latest:
        return None
    numbers = [columns[name] for name in decoder.measurements]
    lacking = all(number.null_count for number in numbers) and pc.coalesce(*numbers).null_count
    return None if lacking else (columns, others)


def with_origin(columns: pa.RecordBatch, messages: Sequence[Message], marks: Set[bytes | None]) -> pa.RecordBatch:
    """The columns, and where each reading came from: one from each message."""
    partitions = pa.array(list(map(Message.partition, messages)), pa.int32())
    offsets = pa.array(list(map(Message.offset, messages)), pa.int64())
    repeated = [mark(message) in marks for message in messages] if marks else [False] * len(messages)
    return pa.RecordBatch.from_arrays(
        [*columns.columns, partitions, offsets, pa.array(repeated, pa.bool_())], schema=schema_of(measured(columns))
    )


def mark(message: Message) -> bytes | None:
    """What the message says of having been stored before; of several marks the last."""
    marks = [value for name, value in headers_of(message) if name == REPEAT_HEADER]
    return marks[-1] if marks else None
