"""What the page reads from the summaries: the sensors, and the intervals of one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Self

from psycopg import Connection, sql

from services.core.config import Settings
from services.core.database import Reconnecting, closed_on_error, connect, missing_measurements, one, queries
from services.core.measurements import measurement

SQL = queries("services.dashboard")

MAX_SENSORS = 5000
MAX_POINTS = 1000
STATEMENT_TIMEOUT = "5s"


@dataclass(frozen=True, slots=True)
class Point:
    """One interval of a chart."""

    start: datetime
    average: float
    least: float
    greatest: float
    readings: int


@dataclass(frozen=True, slots=True)
class Series:
    """Intervals of one sensor by time; ``width`` is that of each point, ``stored`` that of the summary's last row."""

    points: list[Point]
    width: timedelta
    stored: timedelta
    end: datetime


class SummaryReader:
    """Reads summaries over one connection, for one thread at a time."""

    def __init__(self, settings: Settings) -> None:
        self.measurements = settings.measurements
        self._settings = settings
        self._lock = threading.Lock()
        self._database = Reconnecting(self._open)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def queue(self) -> tuple[int, float]:
        """Rows of the refresh queue, and the age of the oldest in seconds."""
        with self._connected() as connection:
            rows, age_s = one(connection, SQL["queue"])
        return rows, age_s

    def sensors(self) -> list[str]:
        """The sensors that have a summary, at most MAX_SENSORS."""
        found: set[str] = set()
        with self._connected() as connection:
            for name in self._present(connection):
                query = SQL["sensors"].format(**measurement(name).identifiers())
                found.update(sensor for (sensor,) in connection.execute(query, {"most": MAX_SENSORS}))
        return sorted(found)[:MAX_SENSORS]

    def series(self, name: str, sensor: str, span: timedelta | None) -> Series | None:
        """The last ``span`` of a sensor's intervals, or all, joined to wider ones if they are too many.

        None if the sensor has no intervals of this measurement.
        """
        with self._connected() as connection:
            if name not in self._present(connection):
                return None
            names = measurement(name).identifiers()
            row = connection.execute(SQL["extent"].format(**names), {"sensor": sensor}).fetchone()
            if row is None:
                return None
            first, end, stored = row
            start = first if span is None else max(first, end - span)
            width = stored * max(1, -(-(end - start) // (stored * MAX_POINTS)))
            arguments = {"sensor": sensor, "start": start, "end": end, "width": width}
            points = [Point(*point) for point in connection.execute(SQL["series"].format(**names), arguments)]
            return Series(points, width, stored, end)

    def _present(self, connection: Connection) -> list[str]:
        """Those that a migration has added: one that is still missing must not hide the others."""
        missing = missing_measurements(connection, self._settings)
        return [name for name in self.measurements if name not in missing]

    @contextmanager
    def _connected(self) -> Iterator[Connection]:
        """Raises TransientError while the server is unavailable, PermanentError if it does not let us read."""
        with self._lock, self._database.connected() as connection:
            yield connection

    def _open(self) -> Connection:
        connection = connect(self._settings)
        with closed_on_error(connection):
            connection.execute(sql.SQL("SET statement_timeout = {}").format(STATEMENT_TIMEOUT))
        return connection
