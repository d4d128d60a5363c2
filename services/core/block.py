"""A message that holds a block of readings: an Arrow IPC stream of one record batch.

Its header FORMAT_HEADER is ARROW. The columns are those of a reading (reading.py), by name and in any order; a metric
may be missing. Nothing in it is compressed or dictionary-encoded, so a block is as large as it looks: it takes no more
memory than the broker lets through as a message.
"""

from __future__ import annotations

import struct
from typing import NoReturn

import pyarrow as pa

from services.core.errors import MalformedMessage
from services.core.kafka import ARROW, FORMAT_HEADER, JSON
from services.core.reading import METRICS

SCHEMA = pa.schema(
    [
        ("sensor_id", pa.string()),
        ("time", pa.timestamp("us", "UTC")),
        *((metric, pa.float64()) for metric in METRICS),
    ]
)
REQUIRED = frozenset({"sensor_id", "time"})

_HEAD = SCHEMA.serialize().to_pybytes()
_END = struct.pack("<Ii", 0xFFFF_FFFF, 0)  # Arrow's end of a stream

# Where the fields are in the metadata of a message (Message.fbs in Arrow's sources), by number.
_HEADER, _COMPRESSION = 2, 3


def encode_block(batch: pa.RecordBatch) -> bytes:
    """The message value of readings, a record batch of SCHEMA."""
    return b"".join((_HEAD, batch.serialize(), _END))


def decode_block(value: bytes | None, form: bytes | None = ARROW) -> pa.RecordBatch:
    """The record batch in ``value``, with the columns of SCHEMA; rows are valid Arrow, but may be no readings.

    ``form`` is what its header says. Raises MalformedMessage, nothing else, whatever the bytes.
    """
    if form != ARROW:
        raise MalformedMessage("unknown_format", f"{FORMAT_HEADER} is {form!r}, neither {JSON!r} nor {ARROW!r}")
    if not value:
        raise MalformedMessage("empty", "the message has no value")
    try:
        batch = _read(value)
        batch.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, OverflowError, struct.error) as error:
        raise MalformedMessage("invalid_block", f"no block of readings: {' '.join(str(error).split())}") from error
    columns = [
        batch.column(field.name) if field.name in batch.schema.names else pa.nulls(batch.num_rows, field.type)
        for field in SCHEMA
    ]
    return pa.record_batch(columns, schema=SCHEMA)


def _read(value: bytes) -> pa.RecordBatch:
    source = pa.BufferReader(value)
    messages = list(pa.ipc.MessageReader.open_stream(source))
    if [message.type for message in messages] != ["schema", "record batch"]:
        _refuse(f"it holds {', '.join(message.type for message in messages[:10]) or 'nothing'}")
    if source.tell() != len(value):
        _refuse("it goes on behind its end")
    schema = pa.ipc.read_schema(messages[0])
    _check_schema(schema)
    if _is_compressed(messages[1].metadata.to_pybytes()):
        _refuse("its body is compressed")
    return pa.ipc.read_record_batch(messages[1], schema)


def _check_schema(schema: pa.Schema) -> None:
    names = schema.names
    if len(set(names)) < len(names) or not REQUIRED <= set(names) <= set(SCHEMA.names):
        _refuse(f"its columns are {', '.join(names)[:1000]}; they should be {', '.join(SCHEMA.names)}")
    for field in schema:
        expected = SCHEMA.field(field.name).type
        if field.type != expected:
            _refuse(f"its column {field.name} is {field.type}; it should be {expected}")


def _is_compressed(metadata: bytes) -> bool:
    """Whether a message says how its body is compressed: a table within a table, where a table names its fields."""
    table = struct.unpack_from("<I", metadata, 0)[0]
    header = _field(metadata, table, _HEADER)
    if header is None:
        _refuse("it has no header")
    batch = header + struct.unpack_from("<I", metadata, header)[0]
    return _field(metadata, batch, _COMPRESSION) is not None


def _field(metadata: bytes, table: int, number: int) -> int | None:
    """Where a field of a FlatBuffers table is; None where it has none."""
    fields = table - struct.unpack_from("<i", metadata, table)[0]
    place = 4 + 2 * number
    if place >= struct.unpack_from("<H", metadata, fields)[0]:
        return None
    offset = struct.unpack_from("<H", metadata, fields + place)[0]
    return table + offset if offset else None


def _refuse(why: str) -> NoReturn:
    raise ValueError(why)
