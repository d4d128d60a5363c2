"""Rows of blocks (core/block.py): which are readings, and the others as messages of their own."""

from __future__ import annotations

import json
from datetime import timedelta
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from confluent_kafka import Message

from services.consumer.columns import measured, microseconds
from services.core.errors import MalformedMessageError, Reason
from services.core.kafka import FORMAT_HEADER, JSON, format_of, headers_of
from services.core.reading import EPOCH, MAX_SENSOR_ID, MAX_VALUE, Decoder


def split_refused(rows: pa.RecordBatch, decoder: Decoder) -> tuple[pa.RecordBatch, dict[int, tuple[Reason, str]]]:
    """The rows that are readings, in their order; reason and detail of why others are not, by their numbers.

    Columns are looked at as a whole. Only a row with something unusual goes through ``decoder``, as the JSON that it
    would be, so that a reading is one by the same rules in either format.
    """
    refused: dict[int, tuple[Reason, str]] = {}
    for number in pc.indices_nonzero(_unusual(rows, decoder)).to_pylist():
        try:
            decoder.decode(as_json(rows.slice(number, 1)))
        except MalformedMessageError as error:
            refused[number] = error.reason, str(error)
    if refused:
        rows = rows.filter(pa.array([number not in refused for number in range(len(rows))], pa.bool_()))
    return rows, refused


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
    fields: dict[str, Any] = {"sensor_id": row["sensor_id"][0].as_py(), "time": _time_text(row["time"][0].as_py())}
    fields |= {name: row[name][0].as_py() for name in measured(row) if row[name][0].is_valid}
    return json.dumps(fields, ensure_ascii=False).encode()


def _time_text(time: int | None) -> str | int | None:
    """As in any message; a time that has no text is a number."""
    if time is None:
        return None
    try:
        return (EPOCH + timedelta(microseconds=time)).isoformat()
    except OverflowError:
        return time


def _unusual(rows: pa.RecordBatch, decoder: Decoder) -> pa.Array:
    """Which rows may not be readings."""
    earliest, latest = map(microseconds, decoder.bounds)
    in_time = pc.and_(pc.greater_equal(rows["time"], earliest), pc.less_equal(rows["time"], latest))
    numbers = [rows[name] for name in measured(rows)]
    in_range = [pc.fill_null(pc.less_equal(pc.abs(number), MAX_VALUE), True) for number in numbers]  # not NaN
    has_any = reduce(pc.or_, (number.is_valid() for number in numbers))
    usual = reduce(pc.and_, (_are_ids(rows["sensor_id"]), pc.fill_null(in_time, False), has_any, *in_range))
    return pc.invert(usual)


def _are_ids(column: pa.Array) -> pa.Array:
    """Which are sensors' ids. What is not ASCII is left to Python, as in a JSON message, each distinct id once."""
    length = pc.binary_length(column)
    plain = pc.and_(pc.ascii_is_printable(column), pc.and_(pc.greater(length, 0), pc.less(length, MAX_SENSOR_ID + 1)))
    plain = pc.fill_null(plain, False)
    if plain.true_count == len(plain):
        return plain
    others = column.filter(pc.invert(plain)).unique().to_pylist()
    good = [text for text in others if text and len(text) <= MAX_SENSOR_ID and text.isprintable()]
    return pc.or_(plain, pc.is_in(column, value_set=pa.array(good, pa.string())))
