"""A rollup: one measurement, one interval width, and what its aggregate is made of."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from psycopg import sql

from services.core.config import Settings
from services.core.measurements import Measurement, measurement

# Between dense readings and all intervals: sums, least, greatest and counts of each minute, since an interval is made
# of whole minutes. A reading that comes into an open interval of a day makes us read again its minute, not the day.
# Measurements that were added later have minutes of their own beside it (sensor_data_minute_co2): what there is of the
# others stays as it is.
BASE = "sensor_data_minute"
BASE_WIDTH = timedelta(minutes=1)
BASE_PARTS = ("sum", "min", "max", "count")  # its columns of each measurement
OF_MINUTES = "_of_minutes"  # how the aggregates end that are made of it and not of the readings
# Readings per minute of each sensor: from the first number on minutes pay, below the second they no longer do.
DENSE, SPARSE = 8.0, 2.0

START = datetime.min.replace(tzinfo=UTC)  # of all time: what is -infinity in the database, which Python does not have
ORIGIN = datetime(2000, 1, 3, tzinfo=UTC)  # where TimescaleDB's time_bucket begins to count


@dataclass(frozen=True, slots=True)
class Rollup:
    """A measurement at one interval width; two widths, or sources, of one can exist side by side."""

    measurement: Measurement
    minutes: int
    of_minutes: bool = False  # made of the aggregate of minutes; else of the readings

    @property
    def name(self) -> str:
        """The name of the measurement."""
        return self.measurement.name

    @property
    def width(self) -> timedelta:
        """Length of an interval."""
        return timedelta(minutes=self.minutes)

    @property
    def aggregate(self) -> str:
        """Name of the continuous aggregate: co2_10min, co2_10min_of_minutes."""
        return f"{self.name}_{self.minutes}min" + (OF_MINUTES if self.of_minutes else "")

    def identifiers(self) -> dict[str, sql.Composable]:
        """What the statements of queries.sql have in braces."""
        return {
            **self.measurement.identifiers(),
            "aggregate": sql.Identifier(self.aggregate),
            "aggregate_name": sql.Literal(rf"\m{self.aggregate}\M"),
            **{f"base_{part}": sql.Identifier(f"{self.name}_{part}") for part in BASE_PARTS},
            "width": sql.SQL("interval {}").format(sql.Literal(f"{self.minutes} minutes")),
        }


def configured_rollups(settings: Settings) -> tuple[Rollup, ...]:
    """The measurements and the widths that the settings ask for."""
    return tuple(Rollup(measurement(name), settings.interval_of(name)) for name in settings.measurements)


def minutes_pay(rate: float | None, *, have_paid: bool) -> bool:
    """Whether to make the intervals of minutes; ``rate``: readings per minute of each sensor, None if unknown."""
    return have_paid if rate is None else rate >= (SPARSE if have_paid else DENSE)


def bucket_floor(width: timedelta, at: datetime) -> datetime:
    """Where the interval begins that holds this time: TimescaleDB's time_bucket."""
    return at if at == START else at - (at - ORIGIN) % width


def bucket_ceil(width: timedelta, at: datetime) -> datetime:
    """Where the first interval begins that begins at this time or later."""
    return at if at == START else at + (ORIGIN - at) % width
