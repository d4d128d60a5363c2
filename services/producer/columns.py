"""Which columns of a Parquet file make up a reading, as DATA_FEATURE_* maps them."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from textwrap import shorten

import pyarrow as pa

from services.core.config import Settings
from services.core.errors import ConfigurationError
from services.core.measurements import DEFAULT, measurement
from services.producer.times import TimeFormat, is_number, is_text

MAX_LIST_LENGTH = 1000  # characters of the names of a file's columns


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the Parquet columns that make up a reading; an empty ``sensor``: there is none.

    Readings older than ``max_past`` (None: any) are not sent, since no consumer takes them.
    """

    time: str
    measurements: tuple[tuple[str, str], ...]  # name and column of each that has one
    sensor: str
    max_past: timedelta | None = None
    times: TimeFormat = field(default_factory=TimeFormat)

    @classmethod
    def of(cls, settings: Settings) -> Columns:
        """The mapping in the settings. Raises ConfigurationError where no measurement has a column."""
        measurements = tuple((name, column) for name in settings.measurements if (column := settings.column_of(name)))
        if not measurements:
            names = (measurement(name).column_setting.upper() for name in settings.measurements)
            raise ConfigurationError(f"no measurement has a column of the Parquet files: set {' or '.join(names)}")
        return cls(
            settings.data_feature_date,
            measurements,
            settings.data_feature_sensor,
            timedelta(days=settings.max_past_days),
            TimeFormat(settings.data_feature_timezone, settings.data_feature_date_unit),
        )

    @property
    def names(self) -> list[str]:
        """Each column to read, once."""
        return list(dict.fromkeys(filter(None, (self.time, *dict(self.measurements).values(), self.sensor))))

    def identity(self, schema: pa.Schema) -> list[str]:
        """What stands for the mapping of a file in its fingerprint. A measurement without a column does not count."""
        named = dict(self.measurements)
        defaults = [named.pop(name, "") for name in DEFAULT]
        others = [f"{name}={column}" for name, column in sorted(named.items())]
        times = self.times.identity(_plain(schema.field(self.time).type))
        return [self.time, *defaults, *others, self.sensor, *times]

    def check(self, schema: pa.Schema, url: str) -> None:
        """Raise ConfigurationError unless ``schema`` has all the columns with types that fit."""
        for setting, name, fits, wanted in (
            ("DATA_FEATURE_DATE", self.time, self.times.fits, "a timestamp, a date or ISO 8601 text"),
            *(
                (measurement(name).column_setting.upper(), column, is_number, "a number")
                for name, column in self.measurements
            ),
            ("DATA_FEATURE_SENSOR", self.sensor, _is_identifier, "text or an integer"),
        ):
            if not name:
                continue
            found = schema.get_all_field_indices(name)
            if len(found) != 1:
                there = shorten(", ".join(schema.names), MAX_LIST_LENGTH, placeholder=" ...")
                problem = "no column" if not found else f"{len(found)} columns"
                raise ConfigurationError(
                    f"{setting}={name}: {url} has {problem} of this name; its columns are: {there}"
                )
            kind = schema.field(name).type
            if not (fits(_plain(kind)) or pa.types.is_null(kind)):  # null: a file with no value here
                is_count = setting == "DATA_FEATURE_DATE" and is_number(_plain(kind))
                hint = " (numbers since 1970: set DATA_FEATURE_DATE_UNIT to s, ms, us or ns)" if is_count else ""
                raise ConfigurationError(f"{setting}={name}: this column of {url} is {kind}, not {wanted}{hint}")


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type of the values, dictionary-encoded or not."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def decoded(column: pa.Array) -> pa.Array:
    """The values, dictionary-encoded or not."""
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _is_identifier(kind: pa.DataType) -> bool:
    return bool(is_text(kind) or pa.types.is_integer(kind))
