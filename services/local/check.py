"""Recomputes the table and the summaries straight from the Parquet files, with Arrow and without our SQL.

It shares no code with the pipeline on purpose: an error there must not hide here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from psycopg import Connection, sql

ORIGIN = datetime(2000, 1, 3, tzinfo=UTC)  # where time_bucket counts whole minutes from
TOLERANCE = 1e-9  # of an average: a sum of floats depends on its order in the last digits

Key = tuple[str, datetime]
Values = tuple[float | None, float | None]


@dataclass(frozen=True, slots=True)
class Columns:
    """The Parquet file's column names."""

    time: str
    temperature: str
    humidity: str
    sensor: str


def read_rows(files: Iterable[Path], columns: Columns) -> dict[Key, Values]:
    """The rows that ``sensor_data`` must hold: for each sensor and time the last value of each field."""
    rows: dict[Key, Values] = {}
    for file in files:
        table = pq.read_table(file)
        times = table[columns.time].cast(pa.timestamp("us", "UTC")).to_pylist()
        sensors = table[columns.sensor].to_pylist() if columns.sensor else ["default"] * len(times)
        values = [
            pc.if_else(pc.is_finite(column), column, None).to_pylist()
            for column in (
                table[columns.temperature].cast(pa.float64()),
                table[columns.humidity].cast(pa.float64()),
            )
        ]
        for time, sensor, temperature, humidity in zip(times, sensors, *values, strict=True):
            if time is None or (temperature is None and humidity is None):
                continue
            before = rows.get((sensor, time), (None, None))
            rows[sensor, time] = (
                before[0] if temperature is None else temperature,
                before[1] if humidity is None else humidity,
            )
    return rows


def differences_in_readings(connection: Connection, rows: dict[Key, Values]) -> list[str]:
    """What differs between ``sensor_data`` and ``rows``, one line each."""
    stored = {
        (sensor, time): (temperature, humidity)
        for sensor, time, temperature, humidity in connection.execute(
            "SELECT sensor_id, time, temperature, humidity FROM sensor_data"
        )
    }
    return [
        f"sensor_data {key}: stored {stored.get(key)}, recomputed {rows.get(key)}"
        for key in sorted(stored.keys() | rows.keys())
        if stored.get(key) != rows.get(key)
    ]


def differences_in_summary(connection: Connection, rows: dict[Key, Values], metric: str, minutes: int) -> list[str]:
    """What differs between a summary table and a recomputation from ``rows``, one line each."""
    width = timedelta(minutes=minutes)
    field = ("temperature", "humidity").index(metric)
    groups: dict[Key, list[float]] = {}
    for (sensor, time), values in rows.items():
        value = values[field]
        if value is not None:
            groups.setdefault((sensor, ORIGIN + (time - ORIGIN) // width * width), []).append(value)
    query = sql.SQL(
        "SELECT sensor_id, interval_start, interval_end - interval_start, {}, {}, {}, reading_count FROM {}"
    ).format(
        *(sql.Identifier(f"{function}_{metric}") for function in ("avg", "min", "max")),
        sql.Identifier(f"{metric}_summary"),
    )
    stored = {(row[0], row[1]): row[2:] for row in connection.execute(query)}
    found = []
    for key in sorted(stored.keys() | groups.keys()):
        values_of = groups.get(key, [])
        wanted = (
            (width, math.fsum(values_of) / len(values_of), min(values_of), max(values_of), len(values_of))
            if values_of
            else None
        )
        if not same(stored.get(key), wanted):
            found.append(f"{metric}_summary {key}: stored {stored.get(key)}, recomputed {wanted}")
    return found


def same(stored: tuple[object, ...] | None, wanted: tuple[object, ...] | None) -> bool:
    """Equal, with a tolerance for the average only."""
    if stored is None or wanted is None:
        return stored is wanted
    average, recomputed = stored[1], wanted[1]
    assert isinstance(average, float)
    assert isinstance(recomputed, float)
    close = math.isclose(average, recomputed, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return close and (stored[0], *stored[2:]) == (wanted[0], *wanted[2:])
