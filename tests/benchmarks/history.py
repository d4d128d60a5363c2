"""The readings that the benchmarks work on: as rows, as a Parquet file, or as the bytes that COPY takes."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq

from services.core.reading import EPOCH

SENSORS = 200
START = datetime(2024, 1, 1, tzinfo=UTC)
BATCH = 10_000  # rows of a commit of the floors
LOADED = 50_000  # rows of a commit of what is loaded: as many as the consumer's
MICROSECOND, MINUTE_US = timedelta(microseconds=1), 60_000_000

SCHEMA = pa.schema(
    [
        ("time", pa.timestamp("us", "UTC")),
        ("sensor", pa.string()),
        ("temperature", pa.float64()),
        ("humidity", pa.float64()),
    ]
)

Row = tuple[datetime, str, float, float]
Numbers = tuple[int, int, float, float]  # microseconds since 1970, the sensor's number, temperature, humidity

# PostgreSQL's binary COPY: a header, then for each row the number of its columns, and each with its length before it.
COPY = "COPY sensor_data (sensor_id, time, temperature, humidity) FROM STDIN (FORMAT binary)"
COPY_HEADER, COPY_TRAILER = b"PGCOPY\n\xff\r\n\0" + bytes(8), b"\xff\xff"
COPY_ROW = struct.Struct(">hi5siqidid")
POSTGRES_EPOCH_US = 946_684_800_000_000  # 2000-01-01


@dataclass(frozen=True, slots=True)
class History:
    """``count`` readings of ``sensors`` sensors, each of which reports every ``every_s`` seconds, in order of time."""

    count: int
    every_s: float = 1.0
    start: datetime = START
    sensors: int = SENSORS

    def _numbers(self, first: int, size: int) -> Iterator[Numbers]:
        began, step = (self.start - EPOCH) // MICROSECOND, round(self.every_s * 1e6)
        for number in range(first, min(first + size, self.count)):
            turn, sensor = divmod(number, self.sensors)
            yield began + turn * step, sensor, 20.0 + number % 100 / 10, 50.0 + number % 37 / 10

    def rows(self) -> list[Row]:
        """As psycopg takes them."""
        return [
            (EPOCH + timedelta(microseconds=time), f"s{sensor:04d}", temperature, humidity)
            for time, sensor, temperature, humidity in self._numbers(0, self.count)
        ]

    def encoded(self, size: int = BATCH) -> Iterator[bytes]:
        """As the bytes that COPY takes, ``size`` rows at a time."""
        for first in range(0, self.count, size):
            yield encode(self._numbers(first, size))

    def write_parquet(self, path: Path, size: int = 500_000) -> None:
        """As a file that the producer reads."""
        names = pa.array([f"s{number:04d}" for number in range(self.sensors)])
        with pq.ParquetWriter(path, SCHEMA) as writer:
            for first in range(0, self.count, size):
                time, sensor, *values = zip(*self._numbers(first, size), strict=True)
                columns = [pa.array(time).cast(SCHEMA.field("time").type), names.take(pa.array(sensor))]
                writer.write_table(pa.table([*columns, *map(pa.array, values)], schema=SCHEMA))

    def load(self, connection: psycopg.Connection) -> None:
        """Into the table, and on the queue of what is to be summarised, in transactions like the consumer's."""
        for first in range(0, self.count, LOADED):
            numbers = list(self._numbers(first, LOADED))
            minutes = sorted({number[0] // MINUTE_US for number in numbers})
            with connection.transaction(), connection.cursor() as cursor:
                with cursor.copy(COPY) as into:
                    into.write(encode(numbers))
                cursor.execute(
                    "INSERT INTO summary_refresh_queue (touched) SELECT range_agg(tstzrange(minute, minute + '1 min'))"
                    " FROM (SELECT to_timestamp(unnest(%s::bigint[]) * 60) AS minute) AS minutes",
                    [minutes],
                )


def encode(numbers: Iterable[Numbers]) -> bytes:
    """The rows as COPY takes them."""
    rows = [
        COPY_ROW.pack(4, 5, b"s%04d" % sensor, 8, time - POSTGRES_EPOCH_US, 8, temperature, 8, humidity)
        for time, sensor, temperature, humidity in numbers
    ]
    return b"".join((COPY_HEADER, *rows, COPY_TRAILER))
