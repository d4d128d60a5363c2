"""Recomputes the table and the summaries straight from the Parquet files, with Arrow and without our SQL.

It shares no code with the pipeline on purpose: an error there must not hide here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from fractions import Fraction
from pathlib import Path
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from psycopg import Connection, sql

from services.core.config import Settings

ORIGIN = datetime(2000, 1, 3, tzinfo=UTC)  # where time_bucket counts whole minutes from
TOLERANCE = 1e-9  # of an average: a sum of floats depends on its order in the last digits

Key = tuple[str, datetime]
Values = tuple[float | None, ...]  # of each measurement, in one order everywhere
Row = tuple[datetime, float, float, float, int]  # end, average, minimum, maximum, count


def differences(connection: Connection, settings: Settings) -> list[str]:
    """What differs from what the file of PARQUET_URL says, one line each."""
    rows = read_rows([Path(settings.parquet_url)], settings)
    found = differences_in_readings(connection, rows, settings.measurements)
    for at, name in enumerate(settings.measurements):
        found += differences_in_summary(connection, rows, at, name, settings.interval_of(name))
    return found


def read_rows(files: Iterable[Path], settings: Settings) -> dict[Key, Values]:
    """The rows that ``sensor_data`` must hold: for each sensor and time the last value of each field."""
    rows: dict[Key, Values] = {}
    columns = [settings.column_of(name) for name in settings.measurements]
    for file in files:
        table = pq.read_table(file)
        unit = settings.data_feature_date_unit
        times = instants(table[settings.data_feature_date], settings.data_feature_timezone, unit)
        sensor_column = settings.data_feature_sensor
        sensors = table[sensor_column].to_pylist() if sensor_column else ["default"] * len(times)
        values = [finite(table[name].cast(pa.float64())) if name else [None] * len(times) for name in columns]
        for time, sensor, *measured in zip(times, sensors, *values, strict=True):
            if time is not None and any(value is not None for value in measured):
                before = rows.get((sensor, time), measured)
                rows[sensor, time] = tuple(
                    old if new is None else new for old, new in zip(before, measured, strict=True)
                )
    return rows


def instants(column: pa.ChunkedArray, timezone: str, unit: str) -> list[datetime | None]:
    """The times of a column; None for what is none."""
    zone = ZoneInfo(timezone)
    if pa.types.is_timestamp(column.type):
        zone = ZoneInfo("UTC") if column.type.tz else zone
        unit, column = column.type.unit, column.cast(pa.int64())
    elif unit and not (pa.types.is_date(column.type) or pa.types.is_string(column.type)):
        zone = ZoneInfo("UTC")
    return [None if value is None else instant(value, zone, unit) for value in column.to_pylist()]


def instant(value: object, zone: ZoneInfo, unit: str) -> datetime | None:
    """A text, a date, or a number of units since 1970, as a time; None where it is none."""
    try:
        if isinstance(value, str):
            moment = datetime.fromisoformat(value.strip())
        elif isinstance(value, date):
            moment = datetime(value.year, value.month, value.day)  # noqa: DTZ001
        else:
            microseconds = Fraction(str(value)) * 10**6 / {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
            moment = datetime(1970, 1, 1) + timedelta(microseconds=(microseconds + Fraction(1, 2)) // 1)  # noqa: DTZ001
        return (moment if moment.tzinfo else moment.replace(tzinfo=zone)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def finite(column: pa.ChunkedArray) -> list[float | None]:
    """The numbers of a column; None for NaN and infinity."""
    numbers: list[float | None] = pc.if_else(pc.is_finite(column), column, None).to_pylist()
    return numbers


def differences_in_readings(connection: Connection, rows: dict[Key, Values], names: Sequence[str]) -> list[str]:
    """What differs between ``sensor_data`` and ``rows``, one line each."""
    query = sql.SQL("SELECT sensor_id, time, {} FROM sensor_data").format(
        sql.SQL(", ").join(map(sql.Identifier, names))
    )
    stored: dict[Key, Values] = {(row[0], row[1]): row[2:] for row in connection.execute(query)}
    return [
        f"sensor_data {key}: stored {stored.get(key)}, recomputed {rows.get(key)}"
        for key in sorted(stored.keys() | rows.keys())
        if stored.get(key) != rows.get(key)
    ]


def differences_in_summary(
    connection: Connection, rows: dict[Key, Values], field: int, name: str, minutes: int
) -> list[str]:
    """What differs between a summary table and a recomputation from a field of ``rows``, one line each."""
    query = sql.SQL("SELECT sensor_id, interval_start, interval_end, {}, {}, {}, reading_count FROM {}").format(
        *(sql.Identifier(f"{function}_{name}") for function in ("avg", "min", "max")),
        sql.Identifier(f"{name}_summary"),
    )
    stored = {(row[0], row[1]): row[2:] for row in connection.execute(query)}
    wanted = summarised(rows, field, minutes)
    return [
        f"{name}_summary {key}: stored {stored.get(key)}, recomputed {wanted.get(key)}"
        for key in sorted(differing(stored, wanted))
    ]


def summarised(rows: Mapping[Key, Sequence[float | None]], field: int, minutes: int) -> dict[Key, Row]:
    """The rows of a summary table that a field of ``rows`` gives."""
    groups: dict[Key, list[float]] = {}
    for (sensor, time), values in rows.items():
        value = values[field]
        if value is not None:
            groups.setdefault((sensor, floor(time, minutes)), []).append(value)
    width = timedelta(minutes=minutes)
    return {
        (sensor, start): (start + width, math.fsum(found) / len(found), min(found), max(found), len(found))
        for (sensor, start), found in groups.items()
    }


def floor(time: datetime, minutes: int) -> datetime:
    """The start of the interval that holds ``time``."""
    width = timedelta(minutes=minutes)
    return ORIGIN + (time - ORIGIN) // width * width


def differing(stored: Mapping[Key, Row], wanted: Mapping[Key, Row]) -> set[Key]:
    """The keys whose rows differ or exist on one side only."""
    return {key for key in stored.keys() | wanted.keys() if not same(stored.get(key), wanted.get(key))}


def same(stored: Row | None, wanted: Row | None) -> bool:
    """Equal, with a tolerance for the average only."""
    if stored is None or wanted is None:
        return stored is wanted
    close = math.isclose(stored[1], wanted[1], rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return close and (stored[0], *stored[2:]) == (wanted[0], *wanted[2:])
