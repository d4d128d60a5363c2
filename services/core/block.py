"""A message that holds a block of readings: an Arrow IPC stream of one record batch.

Its header FORMAT_HEADER is ARROW. The columns are the fields of a reading (reading.py), by name and in any order; a
measurement may be missing, and other columns are ignored. Nothing in it is compressed or dictionary-encoded, so a block
takes no more memory than the broker lets through as a message.
"""

from __future__ import annotations

import struct
from functools import cache

import pyarrow as pa

from services.core.errors import MalformedMessageError, Reason
from services.core.kafka import ARROW, FORMAT_HEADER, JSON

KEY = (("sensor_id", pa.string()), ("time", pa.timestamp("us", "UTC")))

_END = struct.pack("<Ii", 0xFFFF_FFFF, 0)  # Arrow's end of a stream

# Where the fields are in the metadata of a message (Message.fbs in Arrow's sources), by number.
_HEADER, _COMPRESSION = 2, 3


@cache
def block_schema(measurements: tuple[str, ...]) -> pa.Schema:
    """The columns of a block."""
    return pa.schema([*KEY, *((name, pa.float64()) for name in measurements)])


def encode_block(batch: pa.RecordBatch) -> bytes:
    """The message value of readings, a record batch with the columns of a block."""
    return b"".join((batch.schema.serialize(), batch.serialize(), _END))


def decode_block(value: bytes | None, measurements: tuple[str, ...], form: bytes | None = ARROW) -> pa.RecordBatch:
    """The key and these measurements of the record batch in ``value``: valid Arrow, but its rows may not be readings.

    ``form`` is what its header says. Raises MalformedMessageError, nothing else, whatever the bytes.
    """
    if form != ARROW:
        raise MalformedMessageError(
            Reason.UNKNOWN_FORMAT, f"{FORMAT_HEADER} is {form!r}, neither {JSON!r} nor {ARROW!r}"
        )
    if not value:
        raise MalformedMessageError(Reason.EMPTY, "the message has no value")
    try:
        schema = block_schema(measurements)
        batch = _read(value, schema)
        batch.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, OverflowError, struct.error) as error:
        raise MalformedMessageError(
            Reason.INVALID_BLOCK, f"not a block of readings: {' '.join(str(error).split())}"
        ) from error
    if batch.schema == schema:  # as our own producer sends it
        return batch
    names = batch.schema.names
    columns = [batch[each.name] if each.name in names else pa.nulls(batch.num_rows, each.type) for each in schema]
    return pa.record_batch(columns, schema=schema)


def _read(value: bytes, wanted: pa.Schema) -> pa.RecordBatch:
    source = pa.BufferReader(value)
    messages = list(pa.ipc.MessageReader.open_stream(source))
    if [message.type for message in messages] != ["schema", "record batch"]:
        raise ValueError(f"it holds {', '.join(message.type for message in messages[:10]) or 'nothing'}")
    if source.tell() != len(value):
        raise ValueError("it continues behind its end")
    schema = pa.ipc.read_schema(messages[0])
    if schema != wanted:
        _check_schema(schema, wanted)
    if _is_compressed(messages[1].metadata.to_pybytes()):
        raise ValueError("its body is compressed")
    return pa.ipc.read_record_batch(messages[1], schema)


def _check_schema(schema: pa.Schema, wanted: pa.Schema) -> None:
    names = schema.names
    if len(set(names)) < len(names) or not set(dict(KEY)) <= set(names):
        raise ValueError(f"its columns are {', '.join(names)[:1000]}; they should be {', '.join(wanted.names)}")
    for field in wanted:
        found = field.type if field.name not in names else schema.field(field.name).type
        if found != field.type:
            raise ValueError(f"its column {field.name} is {found}; it should be {field.type}")


def _is_compressed(metadata: bytes) -> bool:
    """Whether the metadata, a FlatBuffers table that holds one of a record batch, has a field for compression."""
    table = struct.unpack_from("<I", metadata, 0)[0]
    header = _field(metadata, table, _HEADER)
    if header is None:
        raise ValueError("it has no header")
    batch = header + struct.unpack_from("<I", metadata, header)[0]
    return _field(metadata, batch, _COMPRESSION) is not None


def _field(metadata: bytes, table: int, number: int) -> int | None:
    """Where a field of a FlatBuffers table is; None if the table does not have it."""
    fields = table - struct.unpack_from("<i", metadata, table)[0]
    entry = 4 + 2 * number
    if entry >= struct.unpack_from("<H", metadata, fields)[0]:
        return None
    offset = struct.unpack_from("<H", metadata, fields + entry)[0]
    return table + offset if offset else None
