"""Record batches become blocks: messages that hold up to a thousand readings of one partition (core/block.py)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from services.core.block import KEY, block_schema, encode_block
from services.core.murmur2 import partition_of
from services.producer.columns import Columns
from services.producer.encoding import Chosen, Encoded, choose

BLOCK_ROWS = 1000
BLOCK_BYTES = 500_000  # half of what a broker takes by default; only very long ids make a thousand rows reach it

NAN = pa.scalar(float("nan"), pa.float64())


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows(Encoded):
    """Readings that become blocks as soon as it is known how many partitions there are.

    ``content``: the bytes of each column, wherever it was cut.
    """

    keys: list[bytes]
    sensor: pa.Array  # where in ``keys`` the id of each reading is
    measurements: tuple[str, ...]
    columns: list[pa.Array]  # of times and of measurements

    def blocks(self, partitions: int) -> Iterator[tuple[int, int, bytes]]:
        """For each block the partition, the number of its readings, and the message's value.

        A reading is in the partition that librdkafka and Java give its id as a key; those of one are in their order.
        """
        if not self.sent:
            return
        places = pa.array([partition_of(key, partitions) for key in self.keys], pa.int32()).take(self.sensor)
        order = pc.sort_indices(places)  # which is stable
        names = pa.array(self.keys, pa.binary()).cast(pa.string(), safe=False).take(self.sensor.take(order))
        schema = block_schema(self.measurements)
        batch = pa.record_batch([names, *(column.take(order) for column in self.columns)], schema=schema)
        row_bytes = 4 + pc.max(pc.binary_length(names)).as_py() + 8 + 9 * len(self.measurements)
        most = min(BLOCK_ROWS, BLOCK_BYTES // row_bytes)
        sizes = {count["values"]: count["counts"] for count in pc.value_counts(places).to_pylist()}
        first = 0
        for partition in sorted(sizes):
            size = sizes[partition]
            pieces = -(-size // most)
            for number in range(pieces):  # of equal size, or one more
                rows = (number + 1) * size // pieces - number * size // pieces
                yield partition, rows, encode_block(batch.slice(first, rows))
                first += rows


class RowsDigest:
    """Stands for readings in columns, each of which has a digest of its own, so that no cut makes a difference."""

    PREFIX = "arrow "

    def __init__(self, columns: int) -> None:
        self._columns = [hashlib.sha256() for _ in range(columns)]

    def update(self, content: Sequence[pa.Buffer | bytes], /) -> None:
        """Take ``content`` in."""
        for digest, part in zip(self._columns, content, strict=True):
            digest.update(part)

    def hexdigest(self) -> str:
        """What was taken in until now, as text."""
        return self.PREFIX + hashlib.sha256(b"".join(digest.digest() for digest in self._columns)).hexdigest()


def choose_rows(batch: pa.RecordBatch, columns: Columns) -> Rows:
    """The readings of ``batch``, in its order, the same that would be sent as JSON."""
    chosen = choose(batch, columns)
    time = chosen.time.cast(dict(KEY)["time"])
    numbers = [_doubles(number) for number in chosen.numbers.values()]
    sensor, content = chosen.sensor, _content(chosen, time, numbers)
    if chosen.young is not None:
        sensor, time, *numbers = (column.filter(chosen.young) for column in (sensor, time, *numbers))
    names, sent = tuple(chosen.numbers), [time, *numbers]
    return Rows(keys=chosen.keys, sensor=sensor, measurements=names, columns=sent, content=content, **chosen.counts)


def _doubles(numbers: pa.Array) -> pa.Array:
    """Numbers as doubles, the nearest to what their JSON text says."""
    if pa.types.is_decimal(numbers.type):
        numbers = numbers.cast(pa.string())  # to double at once is not always the nearest
    return numbers.cast(pa.float64(), safe=False)


def _content(found: Chosen, time: pa.Array, numbers: list[pa.Array]) -> list[pa.Buffer | bytes]:
    """The bytes of each column: lengths of the ids, ids, times, numbers."""
    names = pa.array(found.keys, pa.binary()).take(found.sensor)
    return [
        _bytes(pc.binary_length(names)),
        b"".join(names.to_pylist()),
        _bytes(time.cast(pa.int64())),
        *(_bytes(pc.fill_null(number, NAN)) for number in numbers),
    ]


def _bytes(column: pa.Array) -> pa.Buffer:
    """The values of a column of numbers without nulls."""
    width = column.type.bit_width // 8
    return column.buffers()[1].slice(column.offset * width, len(column) * width)
