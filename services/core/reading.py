"""The message contract: one reading per message, JSON, keyed by sensor.

    {"sensor_id": "s0042", "time": "2024-01-01T00:00:00.000Z", "co2": 412.5}

``time`` is RFC 3339 with an offset. A field for each measurement (MEASUREMENTS) may be null or absent, but not all of
them. Other fields are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING, Annotated, cast

import msgspec

from services.core.errors import MalformedMessageError, Reason

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
EARLIEST = datetime(1900, 1, 1, tzinfo=UTC)  # the interval of a much earlier time would begin before the year 1
LATEST = datetime(9999, 12, 30, tzinfo=UTC)
MAX_SENSOR_ID = 255
MAX_VALUE = 1e100  # PostgreSQL's avg() fails if its sum of squares overflows

SensorId = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_SENSOR_ID)]
Value = Annotated[float, msgspec.Meta(ge=-MAX_VALUE, le=MAX_VALUE)]


class Reading(msgspec.Struct, frozen=True, gc=False):
    """One reading: the sensor and an aware time; ``reading_type`` adds the measurements, as the sensor gives them."""

    sensor_id: SensorId
    time: Annotated[datetime, msgspec.Meta(tz=True)]

    if TYPE_CHECKING:

        def __getattr__(self, measurement: str) -> float | None: ...


@cache
def reading_type(measurements: tuple[str, ...]) -> type[Reading]:
    """Readings with a field for each of these, a float or None."""
    fields = [(name, Value | None, None) for name in measurements]
    return cast("type[Reading]", msgspec.defstruct("Reading", fields, bases=(Reading,), frozen=True, gc=False))


Decoded = tuple[list[Reading], dict[int, tuple[Reason, str]]]


def _ago(now: datetime, age: timedelta | None) -> datetime:
    return EARLIEST if age is None or now - EARLIEST < age else now - age


class Decoder:
    """Turns message values into readings of ``measurements``, or says why a value is not one.

    ``max_bytes`` bounds a message. ``max_future`` and ``max_past`` (None: any) bound how far from now a reading may
    be: one device with a wrong clock must not create chunks in the year 2999, nor one for each week since the year 1.
    Raw readings older than ``max_age`` are not kept.
    """

    def __init__(
        self,
        measurements: tuple[str, ...],
        *,
        max_bytes: int,
        max_future: timedelta,
        max_past: timedelta | None = None,
        max_age: timedelta | None = None,
    ) -> None:
        self.measurements = measurements
        self._decode = msgspec.json.Decoder(reading_type(measurements)).decode
        self.max_bytes = max_bytes
        self._max_future = max_future
        self._max_past = max_past
        self._max_age = max_age
        self.set_clock(datetime.now(UTC))

    def set_clock(self, now: datetime) -> None:
        """Set the time (aware) that a reading's ``earliest`` and ``latest`` time are measured from."""
        self.latest = min(now, LATEST - self._max_future) + self._max_future
        self._past = _ago(now, self._max_past)
        self.earliest = max(self._past, _ago(now, self._max_age))

    def decode_all(self, values: Sequence[bytes | None]) -> Decoded:
        """As ``decode_each``, but much faster, because it leaves checks of the readings to the caller.

        These are ``max_bytes``, the bounds of the time, whether an id is printable, and whether there is a measurement.
        """
        readings: list[Reading] = []
        refused: dict[int, tuple[Reason, str]] = {}
        rest = iter(values)
        while len(readings) + len(refused) < len(values):
            try:
                readings.extend(map(self._decode, rest))  # type: ignore[arg-type]  # of None: TypeError
            except (TypeError, ValueError, RecursionError):  # what came before it has been added
                number = len(readings) + len(refused)
                found, why = self.decode_each(values[number : number + 1])  # deeply nested JSON may be a reading now
                readings += found
                if why:
                    refused[number] = why[0]
        return readings, refused

    def decode_each(self, values: Sequence[bytes | None]) -> Decoded:
        """The readings in ``values``, and for the others reason and detail, by their numbers."""
        readings: list[Reading] = []
        refused: dict[int, tuple[Reason, str]] = {}
        for number, value in enumerate(values):
            try:
                readings.append(self.decode(value))
            except MalformedMessageError as error:  # not kept: its traceback would refer to this frame
                refused[number] = error.reason, str(error)
        return readings, refused

    def decode(self, value: bytes | None) -> Reading:
        """The reading in ``value``. Raises MalformedMessageError, nothing else, whatever the bytes."""
        if not value:
            raise MalformedMessageError(Reason.EMPTY, "the message has no value")
        if len(value) > self.max_bytes:
            raise MalformedMessageError(
                Reason.TOO_LARGE, f"{len(value)} bytes; MAX_MESSAGE_BYTES allows {self.max_bytes}"
            )
        try:
            reading = self._decode(value)
        except msgspec.ValidationError as error:
            raise MalformedMessageError(Reason.INVALID_READING, str(error)) from error
        except (ValueError, RecursionError) as error:  # DecodeError and UnicodeDecodeError are ValueErrors
            raise MalformedMessageError(Reason.INVALID_JSON, str(error)) from error
        if not reading.sensor_id.isprintable():
            raise MalformedMessageError(Reason.INVALID_READING, "sensor_id has characters that cannot be printed")
        if all(getattr(reading, name) is None for name in self.measurements):
            raise MalformedMessageError(Reason.NO_MEASUREMENT, f"{' and '.join(self.measurements)} missing or null")
        if reading.time > self.latest:
            raise MalformedMessageError(Reason.FUTURE_TIME, f"{reading.time} is later than MAX_FUTURE_SECONDS allows")
        if reading.time < self._past:
            raise MalformedMessageError(Reason.TIME_OUT_OF_RANGE, f"{reading.time} is older than MAX_PAST_DAYS allows")
        if reading.time < self.earliest:
            raise MalformedMessageError(Reason.TOO_LATE, f"{reading.time} is older than RAW_RETENTION_DAYS keeps")
        return reading
