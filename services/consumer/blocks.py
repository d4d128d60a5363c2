"""Blocks (core/block.py): their rows as columns, those that are not readings as dead letters of their own.

Columns are checked as a whole. Only a row with something unusual goes through the decoder, as the JSON that it would
be, so that a reading is one by the same rules in either format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from confluent_kafka import Message

from services.consumer.columns import ORIGIN, joined, measured, microseconds, schema_of
from services.consumer.dead_letter import DeadLetter
from services.core.block import decode_block
from services.core.errors import MalformedMessageError
from services.core.kafka import FORMAT_HEADER, JSON, Position, format_of, headers_of, position_of
from services.core.reading import EPOCH, MAX_SENSOR_ID, MAX_VALUE, Decoder

Decoded = tuple[list[pa.RecordBatch], list[DeadLetter]]


def decode_blocks(messages: Sequence[Message], repeated: Sequence[bool], decoder: Decoder) -> Decoded:
    """Many readings from each message, of those that are blocks."""
    chunks: list[pa.RecordBatch] = []
    letters: list[DeadLetter] = []
    schema = schema_of(decoder.measurements)
    for message, is_repeated in zip(messages, repeated, strict=True):
        try:
            rows = decode_block(message.value(), decoder.measurements, format_of(message))
        except MalformedMessageError as error:
            letters.append(DeadLetter(message, error.reason, str(error)))
            continue
        origin = zip((*position_of(message), is_repeated), ORIGIN, strict=True)
        origins = [pa.repeat(pa.scalar(value, kind), len(rows)) for value, (_, kind) in origin]
        sensor, time, *numbers = rows.columns
        chunks.append(pa.RecordBatch.from_arrays([sensor, time.view(pa.int64()), *numbers, *origins], schema=schema))
    if chunks:
        rows, more = split_refused(joined(chunks), {position_of(message): message for message in messages}, decoder)
        return [rows], letters + more
    return [], letters


def split_refused(
    rows: pa.RecordBatch, blocks: Mapping[Position, Message], decoder: Decoder
) -> tuple[pa.RecordBatch, list[DeadLetter]]:
    """The rows that are readings, in their order, and dead letters for the others."""
    refused: set[int] = set()
    letters = []
    for number in pc.indices_nonzero(unusual(rows, decoder)).to_pylist():
        row = rows.slice(number, 1)
        message = alone(blocks[origin_of(row)], row)
        try:
            decoder.decode(message.value())
        except MalformedMessageError as error:
            refused.add(number)
            letters.append(DeadLetter(message, error.reason, str(error)))
    if refused:
        rows = rows.filter(pa.array([number not in refused for number in range(len(rows))], pa.bool_()))
    return rows, letters


def unusual(rows: pa.RecordBatch, decoder: Decoder) -> pa.Array:
    """Which rows may not be readings."""
    earliest, latest = microseconds(decoder.earliest), microseconds(decoder.latest)
    in_time = pc.and_(pc.greater_equal(rows["time"], earliest), pc.less_equal(rows["time"], latest))
    numbers = [rows[name] for name in measured(rows)]
    checks = [are_ids(rows["sensor_id"]), pc.fill_null(in_time, False)]
    if not pc.all(pc.less_equal(pc.abs(pa.chunked_array(numbers)), MAX_VALUE)).as_py():  # not NaN
        checks += [pc.fill_null(pc.less_equal(pc.abs(number), MAX_VALUE), True) for number in numbers]
    if all(number.null_count for number in numbers):
        checks.append(reduce(pc.or_, (number.is_valid() for number in numbers)))
    return pc.invert(reduce(pc.and_, checks))


def are_ids(column: pa.Array) -> pa.Array:
    """Which are sensors' ids. What is not ASCII is left to Python, as in a JSON message, each distinct id once."""
    length = pc.binary_length(column)
    plain = pc.and_(pc.ascii_is_printable(column), pc.and_(pc.greater(length, 0), pc.less(length, MAX_SENSOR_ID + 1)))
    plain = pc.fill_null(plain, False)
    if plain.true_count == len(plain):
        return plain
    others = column.filter(pc.invert(plain)).unique().to_pylist()
    good = [text for text in others if text and len(text) <= MAX_SENSOR_ID and text.isprintable()]
    return pc.or_(plain, pc.is_in(column, value_set=pa.array(good, pa.string())))


def origin_of(row: pa.RecordBatch) -> Position:
    """Partition and offset of the message that the row came in."""
    return row["partition"][0].as_py(), row["offset"][0].as_py()


def alone(message: Message, row: pa.RecordBatch) -> Message:
    """The message of one reading: that which it came in or, of a block, would have come in without the others."""
    if format_of(message) == JSON:
        return message
    sensor = row["sensor_id"][0].as_py()
    return Message(
        topic=message.topic(),
        partition=message.partition(),
        offset=message.offset(),
        key=None if sensor is None else sensor.encode(),
        value=as_json(row),
        headers=[header for header in headers_of(message) if header[0] != FORMAT_HEADER],
    )


def as_json(row: pa.RecordBatch) -> bytes:
    """The message value of one row; NaN and infinity as Python writes them, which no decoder takes."""
    fields: dict[str, Any] = {name: row[name][0].as_py() for name in ("sensor_id", "time")}
    if fields["time"] is not None:
        with suppress(OverflowError):  # a time that has no text is a number
            fields["time"] = (EPOCH + timedelta(microseconds=fields["time"])).isoformat()
    fields |= {name: row[name][0].as_py() for name in measured(row) if row[name][0].is_valid}
    return json.dumps(fields, ensure_ascii=False).encode()
