"""Readings become blocks: messages that hold up to a thousand readings of one partition (core/block.py)."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from services.core.block import KEY, block_schema, encode_block
from services.core.murmur2 import partition_of
from services.producer.encoding import Readings

BLOCK_ROWS = 1000
BLOCK_BYTES = 500_000  # half of what a broker takes by default; only very long ids make a thousand rows reach it


def to_blocks(readings: Readings, partitions: int) -> Iterator[tuple[int, int, bytes]]:
    """For each block its partition, the number of its readings, and the message's value.

    A reading is in the partition that librdkafka and Java give its id as a key; those of one partition keep their
    order. The blocks of a partition are of equal size, or differ by one reading.
    """
    if not readings.sent:
        return
    partition = pa.array([partition_of(key, partitions) for key in readings.keys], pa.int32()).take(readings.sensor)
    order = pc.sort_indices(partition)  # which is stable
    names = pa.array(readings.keys, pa.binary()).cast(pa.string(), safe=False).take(readings.sensor.take(order))
    times = readings.time.cast(dict(KEY)["time"])
    columns = [names, *(column.take(order) for column in (times, *readings.numbers.values()))]
    batch = pa.record_batch(columns, schema=block_schema(tuple(readings.numbers)))
    row_bytes = 4 + pc.max(pc.binary_length(names)).as_py() + 8 + 9 * len(readings.numbers)
    max_rows = min(BLOCK_ROWS, BLOCK_BYTES // row_bytes)
    sizes = {count["values"]: count["counts"] for count in pc.value_counts(partition).to_pylist()}
    first = 0
    for number, size in sorted(sizes.items()):
        pieces = -(-size // max_rows)
        for piece in range(pieces):
            rows = (piece + 1) * size // pieces - piece * size // pieces
            yield number, rows, encode_block(batch.slice(first, rows))
            first += rows
