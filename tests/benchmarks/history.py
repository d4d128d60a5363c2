"""The readings that the benchmarks work on: made as arrays, taken as rows, as a Parquet file or as COPY's bytes."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq

from services.core.reading import EPOCH

SENSORS = 200
START = datetime(2024, 1, 1, tzinfo=UTC)
BATCH = 10_000  # rows of a commit of the floors
LOADED = 50_000  # rows of a commit of what is loaded: as many as the consumer's
PARQUET_BATCH = 1_000_000

SCHEMA = pa.schema(
    [
        ("time", pa.timestamp("us", "UTC")),
        ("sensor", pa.string()),
        ("temperature", pa.float64()),
        ("humidity", pa.float64()),
    ]
)

Row = tuple[datetime, str, float, float]

# PostgreSQL's binary COPY: a header, then for each row the number of its columns, and each with its length before it.
COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
COPY_TRAILER = b"\xff\xff"
COPY_ROW = np.dtype(
    [
        ("columns", ">i2"),
        ("sensor_length", ">i4"),
        ("sensor", "S5"),
        ("time_length", ">i4"),
        ("time", ">i8"),
        ("temperature_length", ">i4"),
        ("temperature", ">f8"),
        ("humidity_length", ">i4"),
        ("humidity", ">f8"),
    ]
)
COPY = "COPY sensor_data (sensor_id, time, temperature, humidity) FROM STDIN (FORMAT binary)"
POSTGRES_EPOCH_US = 946_684_800_000_000  # 2000-01-01
MINUTE_US = 60_000_000


@dataclass(frozen=True, slots=True)
class History:
    """``count`` readings of ``sensors`` sensors, each of which reports every ``every_s`` seconds, in order of time."""

    count: int
    every_s: float = 1.0
    start: datetime = START
    sensors: int = SENSORS

    def _columns(self, first: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Microseconds since 1970, the sensors' numbers, temperatures and humidities."""
        number = np.arange(first, min(first + size, self.count))
        began = (self.start - EPOCH) // timedelta(microseconds=1)
        time = began + (number // self.sensors * (self.every_s * 1e6)).astype(np.int64)
        return time, number % self.sensors, 20.0 + number % 100 / 10, 50.0 + number % 37 / 10

    @property
    def _names(self) -> list[str]:
        return [f"s{number:04d}" for number in range(self.sensors)]

    def rows(self) -> list[Row]:
        """As psycopg takes them."""
        times, sensors, *values = (column.tolist() for column in self._columns(0, self.count))
        names = self._names
        moments = [EPOCH + timedelta(microseconds=time) for time in times]
        return list(zip(moments, [names[sensor] for sensor in sensors], *values, strict=True))

    def encoded(self, size: int = BATCH) -> Iterator[bytes]:
        """As the bytes that COPY takes, ``size`` rows at a time."""
        for first in range(0, self.count, size):
            yield self._encode(*self._columns(first, size))

    def _encode(self, time: np.ndarray, sensor: np.ndarray, temperature: np.ndarray, humidity: np.ndarray) -> bytes:
        rows = np.empty(len(time), COPY_ROW)
        rows["columns"] = 4
        rows["sensor_length"] = 5
        rows["time_length"] = rows["temperature_length"] = rows["humidity_length"] = 8
        rows["sensor"] = np.array(self._names, "S5")[sensor]
        rows["time"] = time - POSTGRES_EPOCH_US
        rows["temperature"], rows["humidity"] = temperature, humidity
        return b"".join((COPY_HEADER, rows.tobytes(), COPY_TRAILER))

    def write_parquet(self, path: Path) -> None:
        """As a file that the producer reads."""
        names = pa.array(self._names)
        with pq.ParquetWriter(path, SCHEMA) as writer:
            for first in range(0, self.count, PARQUET_BATCH):
                time, sensor, temperature, humidity = self._columns(first, PARQUET_BATCH)
                columns = [
                    pa.array(time).cast(pa.timestamp("us")).cast(SCHEMA.field("time").type),
                    names.take(pa.array(sensor)),
                    pa.array(temperature),
                    pa.array(humidity),
                ]
                writer.write_table(pa.table(columns, schema=SCHEMA))

    def load(self, connection: psycopg.Connection) -> None:
        """Into the table, and on the queue of what is to be summarised, in the consumer's transactions."""
        for first in range(0, self.count, LOADED):
            columns = self._columns(first, LOADED)
            with connection.transaction(), connection.cursor() as cursor:
                with cursor.copy(COPY) as into:
                    into.write(self._encode(*columns))
                minutes = np.unique(columns[0] // MINUTE_US).tolist()
                cursor.execute(
                    "INSERT INTO summary_refresh_queue (touched) SELECT range_agg(tstzrange(minute, minute + '1 min'))"
                    " FROM (SELECT to_timestamp(unnest(%s::bigint[]) * 60) AS minute) AS minutes",
                    [minutes],
                )
