"""What is measured: MEASUREMENTS lists it, and every other name follows from one on that list.

Each is a field of the messages and a column of ``sensor_data``, and has two settings, a summary table with columns of
its own, and a live view. ``add_measurement`` (migrations) creates them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from psycopg import sql

TEMPERATURE, HUMIDITY = "temperature", "humidity"
DEFAULT = (TEMPERATURE, HUMIDITY)

NAME = re.compile(r"[a-z][a-z0-9_]{0,30}", re.ASCII)
# What a reading has beside them, here and on its way to the database; other settings that begin with DATA_FEATURE_.
TAKEN = frozenset({"time", "sensor_id", "partition", "offset", "repeated"})
TAKEN |= {"date", "date_unit", "timezone", "sensor", "temp", "humid"}
# What must be quoted as the name of a column: pg_get_keywords() of PostgreSQL 17, categories R and T.
KEYWORDS = """
    all analyse analyze and any array as asc asymmetric authorization binary both case cast check collate collation
    column concurrently constraint create cross current_catalog current_date current_role current_schema current_time
    current_timestamp current_user default deferrable desc distinct do else end except false fetch for foreign freeze
    from full grant group having ilike in initially inner intersect into is isnull join lateral leading left like
    limit localtime localtimestamp natural not notnull null offset on only or order outer overlaps placing primary
    references returning right select session_user similar some symmetric system_user table tablesample then to
    trailing true union unique user using variadic verbose when where window with
"""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One of them: its name, and the defaults of its settings."""

    name: str
    minutes: int = 10  # the width of an interval
    column: str = ""  # of a Parquet file; empty: files do not have it
    short: str = ""  # the name, as the setting of its column has it

    @property
    def interval_setting(self) -> str:
        """The field of the settings with the width of its intervals."""
        return f"{self.name}_interval"

    @property
    def column_setting(self) -> str:
        """The field of the settings with its column of a Parquet file."""
        return f"data_feature_{self.short or self.name}"

    @property
    def summary(self) -> str:
        """Its summary table."""
        return f"{self.name}_summary"

    @property
    def live(self) -> str:
        """The view of its summary with what has not been mirrored yet."""
        return f"{self.summary}_live"

    def identifiers(self) -> dict[str, sql.Composable]:
        """What statements have in braces: its column, its table and view, and columns of these."""
        return {
            "measurement": sql.Identifier(self.name),
            "measurement_name": sql.Literal(self.name),
            "summary": sql.Identifier(self.summary),
            "live": sql.Identifier(self.live),
            "live_name": sql.Literal(self.live),
            **{part: sql.Identifier(f"{part}_{self.name}") for part in ("avg", "min", "max")},
        }


_OF_DEFAULT = {
    TEMPERATURE: Measurement(TEMPERATURE, 10, "temp", "temp"),
    HUMIDITY: Measurement(HUMIDITY, 20, "humid", "humid"),
}


def measurement(name: str) -> Measurement:
    """The measurement of this name."""
    return _OF_DEFAULT.get(name) or Measurement(name)


def names_of(text: str) -> tuple[str, ...]:
    """The names in ``temperature,humidity``. Raises ValueError, one line, for what cannot be one."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a name: at most 31 of a to z, 0 to 9 and _, starting with a letter")
        if name in TAKEN or name in KEYWORDS.split() or name.startswith("sensor_data"):
            raise ValueError(f"{name} is reserved, here or in SQL: choose another name")
        if names.count(name) > 1:
            raise ValueError(f"{name} appears twice")
    return names
