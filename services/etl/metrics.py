"""What is summarised: one metric, one interval width, and the names that follow from both."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from psycopg import sql

from services.core.config import Settings


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric at one interval width; two widths of one metric can exist side by side."""

    name: str  # the column of sensor_data
    minutes: int

    @property
    def width(self) -> timedelta:
        """Length of an interval."""
        return timedelta(minutes=self.minutes)

    @property
    def aggregate(self) -> str:
        """Name of the continuous aggregate."""
        return f"{self.name}_{self.minutes}min"

    def identifiers(self) -> dict[str, sql.Composable]:
        """What the statements of queries.sql have in braces."""
        return {
            "metric": sql.Identifier(self.name),
            "metric_name": sql.Literal(self.name),
            "aggregate": sql.Identifier(self.aggregate),
            "summary": sql.Identifier(f"{self.name}_summary"),
            "live": sql.Identifier(f"{self.name}_summary_live"),
            "avg": sql.Identifier(f"avg_{self.name}"),
            "min": sql.Identifier(f"min_{self.name}"),
            "max": sql.Identifier(f"max_{self.name}"),
            "width": sql.SQL("interval {}").format(sql.Literal(f"{self.minutes} minutes")),
        }


def configured_metrics(settings: Settings) -> tuple[Metric, ...]:
    """The metrics and the widths that the settings ask for."""
    return (
        Metric("temperature", settings.temperature_interval),
        Metric("humidity", settings.humidity_interval),
    )
