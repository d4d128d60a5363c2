"""What is summarised: one metric, one interval width, and the names that follow from both."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from psycopg import sql

from services.core.config import Settings
from services.core.reading import METRICS

# Between dense readings and all intervals: sums, least, greatest and counts of each minute, since an interval is made
# of whole minutes. A reading that comes into an open interval of a day makes us read again its minute, not the day.
BASE = "sensor_data_minute"
BASE_WIDTH = timedelta(minutes=1)
BASE_PARTS = ("sum", "min", "max", "count")  # its columns of each metric
OF_MINUTES = "_of_minutes"  # how the aggregates end that are made of it and not of the readings
# Readings per minute of each sensor: from the first number on minutes pay, below the second they no longer do.
DENSE, SPARSE = 8.0, 2.0


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric at one interval width; two widths, or sources, of one metric can exist side by side."""

    name: str  # the column of sensor_data
    minutes: int
    of_minutes: bool = False  # made of BASE; else of the readings

    @property
    def width(self) -> timedelta:
        """Length of an interval."""
        return timedelta(minutes=self.minutes)

    @property
    def aggregate(self) -> str:
        """Name of the continuous aggregate: temperature_10min, temperature_10min_of_minutes."""
        return f"{self.name}_{self.minutes}min" + (OF_MINUTES if self.of_minutes else "")

    def identifiers(self) -> dict[str, sql.Composable]:
        """What the statements of queries.sql have in braces."""
        return {
            "metric": sql.Identifier(self.name),
            "metric_name": sql.Literal(self.name),
            "aggregate": sql.Identifier(self.aggregate),
            "aggregate_name": sql.Literal(rf"\m{self.aggregate}\M"),
            "summary": sql.Identifier(f"{self.name}_summary"),
            "live": sql.Identifier(f"{self.name}_summary_live"),
            "live_name": sql.Literal(f"{self.name}_summary_live"),
            "avg": sql.Identifier(f"avg_{self.name}"),
            "min": sql.Identifier(f"min_{self.name}"),
            "max": sql.Identifier(f"max_{self.name}"),
            "base": sql.Identifier(BASE),
            **{f"base_{part}": sql.Identifier(f"{self.name}_{part}") for part in BASE_PARTS},
            "width": sql.SQL("interval {}").format(sql.Literal(f"{self.minutes} minutes")),
        }


def configured_metrics(settings: Settings) -> tuple[Metric, ...]:
    """The metrics and the widths that the settings ask for."""
    return tuple(Metric(name, getattr(settings, f"{name}_interval")) for name in METRICS)


def minutes_pay(rate: float | None, *, have_paid: bool) -> bool:
    """Whether to make the intervals of minutes; ``rate``: readings per minute of each sensor, None if unknown."""
    return have_paid if rate is None else rate >= (SPARSE if have_paid else DENSE)
