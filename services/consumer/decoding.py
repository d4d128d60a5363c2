"""From messages to columns: all of a chunk at once while all is well, else one message at a time.

``Decoder.decode`` defines what a reading is. What is decoded at once has to be the same, so a chunk that holds
anything unusual goes through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import pyarrow as pa
import pyarrow.compute as pc
from confluent_kafka import Message

from services.consumer.blocks import Decoded, decode_blocks
from services.consumer.columns import ORIGIN, columns_of, microseconds, schema_of
from services.consumer.dead_letter import DeadLetter
from services.core.kafka import JSON, REPEAT_HEADER, REPEATED, REPEATED_IF_MOVED, format_of, headers_of
from services.core.reading import Decoder, Reading


def decode(messages: Sequence[Message], decoder: Decoder, *, fills_gaps: bool) -> Decoded:
    """The readings in these messages, and dead letters for what is not one.

    ``fills_gaps``: what is marked REPEATED_IF_MOVED may have been stored before.
    """
    if not any(map(Message.headers, messages)):
        return decode_readings(messages, [False] * len(messages), decoder)
    marks = {REPEATED, REPEATED_IF_MOVED} if fills_gaps else {REPEATED}
    chunks: list[pa.RecordBatch] = []
    letters: list[DeadLetter] = []
    for form, run in groupby(messages, format_of):
        those = list(run)
        repeated = [dict(headers_of(message)).get(REPEAT_HEADER) in marks for message in those]  # of several the last
        decode_run = decode_readings if form == JSON else decode_blocks
        more_chunks, more_letters = decode_run(those, repeated, decoder)
        chunks += more_chunks
        letters += more_letters
    return chunks, letters


def decode_readings(messages: Sequence[Message], repeated: Sequence[bool], decoder: Decoder) -> Decoded:
    """One reading from each message."""
    values = list(map(Message.value, messages))
    readings, refused = decoder.decode_all(values)
    columns = usual_columns(readings, values, decoder)
    if columns is None:
        readings, refused = decoder.decode_each(values)
        columns = columns_of(readings, decoder.measurements)
    letters = [DeadLetter(messages[number], *why) for number, why in refused.items()]
    if refused:
        kept = [number for number in range(len(messages)) if number not in refused]
        messages, repeated = [messages[number] for number in kept], [repeated[number] for number in kept]
    origins = map(Message.partition, messages), map(Message.offset, messages), repeated
    arrays = [pa.array(list(values), kind) for values, (_, kind) in zip(origins, ORIGIN, strict=True)]
    schema = schema_of(decoder.measurements)
    return [pa.RecordBatch.from_arrays([*columns.columns, *arrays], schema=schema)], letters


def usual_columns(
    readings: Sequence[Reading], values: Sequence[bytes | None], decoder: Decoder
) -> pa.RecordBatch | None:
    """The columns of what ``decode_all`` has found in ``values``; None if any of it may not be a reading."""
    too_large = max(map(len, filter(None, values)), default=0) > decoder.max_bytes
    if too_large or not readings or not "".join([reading.sensor_id for reading in readings]).isprintable():
        return None
    try:
        columns = columns_of(readings, decoder.measurements)
    except OverflowError:  # a time that is before the year 1 or after 9999 in UTC
        return None
    ends = pc.min_max(columns["time"])
    if ends["min"].as_py() < microseconds(decoder.earliest) or ends["max"].as_py() > microseconds(decoder.latest):
        return None
    numbers = [columns[name] for name in decoder.measurements]
    lacking = all(number.null_count for number in numbers) and pc.coalesce(*numbers).null_count
    return None if lacking else columns
