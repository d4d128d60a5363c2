"""What a run sends: files for the producer, messages of devices, messages that are no readings; and what it sent.

Times are relative to now, because retention and compression are. From old to new:

    expiring    two chunks that retention drops in the course of the run; nothing of them is sent afterwards but
                ``racers``: one reading each, of a sensor that has no other
    mid         compressed in the course of the run; late readings and corrections go on arriving
    load        history that is loaded by the files, some hours each
    now         what the devices send
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from confluent_kafka import Producer

from services.core.config import Settings
from services.core.kafka import PARTITIONER, client_settings
from tests.fix_services import PATIENCE_S, message
from tests.model import CHUNK, chunk_of

COLUMNS = {  # of the files, by setting
    "data_feature_date": "time",
    "data_feature_sensor": "sensor",
    "data_feature_temp": "temperature",
    "data_feature_humid": "humidity",
}
ROWS_A_FILE = 2_500
SENSORS = 25
DEVICES = 8
POISON_KEY = "poison"
MINUTE, DAY = timedelta(minutes=1), timedelta(days=1)
COMPRESS_AFTER_DAYS = 20
FIRST_KEEP_DAYS = 40
LOAD_FROM = 12 * DAY
MINUTES_A_FILE, MINUTES_OF_A_FILE = 200, 260

Sample = tuple[datetime, float | None, float | None]  # time, temperature, humidity
SCHEMA = pa.schema(
    [
        ("time", pa.timestamp("us", "UTC")),
        ("sensor", pa.string()),
        ("temperature", pa.float64()),
        ("humidity", pa.float64()),
    ]
)


def days_to_keep(now: datetime) -> int:
    """A retention with which the oldest chunk that is kept has days to go, whatever the day of the week is."""
    return next(
        days for days in range(FIRST_KEEP_DAYS, FIRST_KEEP_DAYS + 7) if 2 * DAY < cut_off(now, days) % CHUNK < 5 * DAY
    )


def cut_off(now: datetime, days: int) -> timedelta:
    """How far ``days`` ago is from where chunks are counted."""
    return now - days * DAY - datetime(1970, 1, 1, tzinfo=UTC)


@dataclass
class Traffic:
    """Sends, and remembers: ``sent`` by sensor in their order, ``racers`` likewise, the reasons of what is poison."""

    settings: Settings
    random: random.Random
    source: Path
    now: datetime = field(default_factory=lambda: datetime.now(UTC).replace(second=0, microsecond=0))
    sent: dict[str, list[Sample]] = field(default_factory=dict)
    racers: set[str] = field(default_factory=set)
    poison: dict[bytes, str] = field(default_factory=dict)
    files: int = 0
    old_is_sent: bool = True  # whether files hold readings of chunks that will be dropped

    def __post_init__(self) -> None:
        self.keep_days = days_to_keep(self.now)
        self.kept_from = chunk_of(self.now - self.keep_days * DAY)  # the first chunk that retention keeps
        self._producer = Producer(
            client_settings(self.settings, "devices") | {"enable.idempotence": True, "partitioner": PARTITIONER}
        )

    # Files -----------------------------------------------------------------------------------------------

    def add_file(self) -> None:
        """A file of readings: mostly new, some repeated, some corrected, some late, some incomplete."""
        rows: list[tuple[datetime, str, float | None, float | None]] = []
        for _ in range(ROWS_A_FILE):
            if rows and self.random.random() < 0.15:
                rows.append(self._again(*rows[-self.random.randrange(1, min(len(rows), 600) + 1)]))
            else:
                sensor = f"s{self.random.randrange(SENSORS):02d}"
                rows.append((self._time(), sensor, self._value(20), self._value(50)))
        table = pa.table(dict(zip(SCHEMA.names, zip(*rows, strict=True), strict=True)), schema=SCHEMA)
        path = self.source / f"{self.files:03d}.parquet"
        hidden = self.source / f".{path.name}"
        pq.write_table(table, hidden, row_group_size=500)
        hidden.rename(path)
        self.files += 1
        for time, sensor, temperature, humidity in rows:
            if temperature is not None or humidity is not None:
                self.sent.setdefault(sensor, []).append((time, temperature, humidity))

    def _again(
        self, time: datetime, sensor: str, temperature: float | None, humidity: float | None
    ) -> tuple[datetime, str, float | None, float | None]:
        """The same row, or a correction of it."""
        if self.random.random() < 0.4:
            return time, sensor, temperature, humidity
        return time, sensor, self._value(20), self._value(50)

    def _time(self) -> datetime:
        kind = self.random.random()
        if kind < 0.08:
            return self._mid()
        if kind < 0.16 and self.old_is_sent:
            return self.kept_from - self.random.randrange(1, 14 * 24) * timedelta(hours=1)
        minute = self.random.randrange(self.files * MINUTES_A_FILE, self.files * MINUTES_A_FILE + MINUTES_OF_A_FILE)
        if kind < 0.2:
            minute = self.random.randrange(self.files * MINUTES_A_FILE + 1)
        return self.now - LOAD_FROM + minute * MINUTE

    def _mid(self) -> datetime:
        """Of few minutes, so that many of them come again."""
        return self.kept_from + DAY + self.random.randrange(3) * CHUNK + self.random.randrange(10) * 7 * MINUTE

    def _value(self, middle: float) -> float | None:
        return round(self.random.gauss(middle, 5), 2) if self.random.random() < 0.9 else None

    # Devices ---------------------------------------------------------------------------------------------

    def send_from_devices(self, count: int = 40) -> None:
        """Readings of now, corrections of earlier ones, and late ones; some messages are no readings."""
        for _ in range(count):
            kind = self.random.random()
            if kind < 0.03:
                self._send_poison()
                continue
            sensor = f"d{self.random.randrange(DEVICES):02d}"
            before = self.sent.get(sensor, [])
            time = datetime.now(UTC)
            if before and kind < 0.3:
                time = before[-self.random.randrange(1, min(len(before), 30) + 1)][0]
            elif kind < 0.4:
                time = self._mid()
            self._send_reading(sensor, (time, round(self.random.gauss(20, 5), 2), self._value(50)))
        self._flush()

    def send_racers(self, count: int = 10) -> None:
        """Readings of chunks that are being closed and dropped: each is stored, or a dead letter."""
        for _ in range(count):
            sensor = f"race-{len(self.racers):04d}"
            self.racers.add(sensor)
            time = self.kept_from - self.random.randrange(1, 14 * 24 * 60) * MINUTE
            self._send_reading(sensor, (time, round(self.random.gauss(20, 5), 2), None))
        self._flush()

    def _send_reading(self, sensor: str, sample: Sample) -> None:
        self._send(sensor, message(sensor, *sample))
        self.sent.setdefault(sensor, []).append(sample)

    def _send_poison(self) -> None:
        number = len(self.poison)
        future = (datetime.now(UTC) + 3 * DAY).isoformat()
        value, reason = self.random.choice(
            [
                (f"no JSON {number}", "invalid_json"),
                (f'{{"sensor_id": "p", "number": {number}}}', "invalid_reading"),
                (f'{{"sensor_id": "a\\u0000{number}", "time": "{future}", "humidity": 1}}', "invalid_reading"),
                (f'{{"sensor_id": "p{number}", "time": "{future}"}}', "no_measurement"),
                (f'{{"sensor_id": "p{number}", "time": "{future}", "humidity": 1}}', "future_time"),
                (f'{{"sensor_id": "p{number}", "time": "1950-01-01T00:00:00Z", "humidity": 1}}', "time_out_of_range"),
                (f"{number}" + "x" * 70_000, "too_large"),
            ]
        )
        self.poison[value.encode()] = reason
        self._send(POISON_KEY, value.encode())

    def _send(self, key: str, value: bytes) -> None:
        self._producer.produce(self.settings.kafka_topic, key=key, value=value)

    def _flush(self) -> None:
        assert self._producer.flush(PATIENCE_S) == 0
