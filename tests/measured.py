"""What the tests measure: MEASUREMENTS of the environment, which may list more than temperature and humidity."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, cast

import msgspec
from pydantic import SecretStr

from services.consumer.batch import Move
from services.consumer.columns import columns_of
from services.consumer.sink import Sink, WriteResult
from services.core.config import Settings, settings_type
from services.core.measurements import DEFAULT, names_of
from services.core.names import with_synonyms
from services.core.reading import Reading, reading_type

# More than these the tests do not send; of the others there must be aggregates and empty summaries, and nothing else.
MEASUREMENTS = names_of(os.environ.get("MEASUREMENTS", ",".join(DEFAULT)))
ALL_SETTINGS = settings_type(MEASUREMENTS)


def make_settings(**given: Any) -> Settings:
    """Settings with these values; the others are those of the environment, without any ``.env``."""
    return ALL_SETTINGS(**with_synonyms(os.environ) | given)


def with_measurement(settings: Settings, name: str) -> Settings:
    """The settings with a measurement more, which files do not have."""
    names = (*settings.measurements, name)
    values: dict[str, Any] = dict(settings) | {"measurements": names}
    return settings_type(names)(**values)


def reading_of(sensor_id: str, time: datetime, *values: float | None, **named: float | None) -> Reading:
    """A reading; ``values`` are of temperature, humidity and so on."""
    made: Reading = cast("Any", reading_type(MEASUREMENTS))(sensor_id, time, *values, **named)
    return made


def write_to(
    sink: Sink, readings: Sequence[Reading], move: Move, *, repeated: Sequence[Reading] = (), advance: bool = True
) -> WriteResult:
    """Store readings as columns."""
    overwriting, filling = (
        columns_of(each, each[0].__struct_fields__[2:] if each else MEASUREMENTS) for each in (readings, repeated)
    )
    return sink.write(overwriting, filling, move, advance=advance)


def encode(reading: Reading) -> bytes:
    """The message value of a reading."""
    return msgspec.json.encode(reading)


def of_default(names: Iterable[str]) -> set[str]:
    """The names of aggregates, or lines about summaries, without those of further measurements."""
    return {name for name in names if not name.startswith(tuple(f"{more}_" for more in MEASUREMENTS[len(DEFAULT) :]))}


def documented_settings() -> list[tuple[str, str, str]]:
    """Name, default and description of each setting there is by default, as the documents have them, in order."""
    found = []
    for name, field in settings_type(DEFAULT).model_fields.items():
        value = field.default.get_secret_value() if isinstance(field.default, SecretStr) else field.default
        text = ",".join(value) if isinstance(value, tuple) else str(value)
        found.append((name.upper(), text, field.description or ""))
    return found
