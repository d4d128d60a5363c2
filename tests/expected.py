"""What was sent, and what must therefore be stored: computed here, not by the code under test."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from confluent_kafka.admin import AdminClient

from services.core.config import Settings
from services.core.database import connect
from services.core.errors import TransientError
from services.core.kafka import client_settings
from services.core.measurements import DEFAULT
from services.core.offsets import Offsets, group_lag
from services.local.check import Key, Values, differences_in_readings, differences_in_summary
from tests.fix_services import PATIENCE_S, message, minutes, publish, read_topic, wait_until

Sample = tuple[float, float | None, float | None]  # minute, temperature, humidity


class Expected:
    """Sends readings and knows what the tables must hold; each partition has a sensor of its own.

    ``sensors`` begins the sensors' names. Several in one database, with topics of their own, share ``rows``.
    """

    def __init__(self, settings: Settings, sensors: str = "p", rows: dict[Key, Values] | None = None) -> None:
        self.settings = settings
        self.sensors = sensors
        self.rows: dict[Key, Values] = {} if rows is None else rows

    def send(self, samples: Iterable[Sample], partition: int = 0) -> None:
        """Send readings of one partition's sensor, in their order."""
        publish(self.settings, self.values(samples, partition), key=f"{self.sensors}{partition}", partition=partition)

    def values(self, samples: Iterable[Sample], partition: int) -> list[bytes | None]:
        """The messages of readings that somebody sends now."""
        sensor = f"{self.sensors}{partition}"
        values: list[bytes | None] = []
        for minute, temperature, humidity in samples:
            key: tuple[str, datetime] = (sensor, minutes(minute))
            before = self.rows.get(key, (None, None))
            self.rows[key] = (
                before[0] if temperature is None else temperature,
                before[1] if humidity is None else humidity,
            )
            values.append(message(sensor, minutes(minute), temperature, humidity))
        return values

    def wait_until_read(self, timeout_s: float = PATIENCE_S) -> None:
        """Wait for the group to have committed the topic's end."""
        wait_until(lambda: group_lag(self.settings) == 0, f"{self.sensors}: the group is at the end", timeout_s)

    def wait_until_stored(self, timeout_s: float = PATIENCE_S, dead_letters: int | None = 0) -> None:
        """Wait for the group to be at the topic's end; then every row is exact, and so many are dead letters."""
        self.wait_until_read(timeout_s)
        with connect(self.settings) as connection:
            assert differences_in_readings(connection, self.rows, DEFAULT) == []
        if dead_letters is not None:
            assert len(read_topic(self.settings, self.settings.dead_letter_topic)) == dead_letters

    @staticmethod
    def count(settings: Settings) -> int:
        """The number of rows in ``sensor_data``."""
        with connect(settings) as connection:
            row = connection.execute("SELECT count(*) FROM sensor_data").fetchone()
        assert row is not None
        return int(row[0])

    def wait_until_summarised(self, timeout_s: float = PATIENCE_S) -> None:
        """Wait for an empty queue; then every summary row is exact."""
        wait_until(self._is_queue_empty, "the queue is empty", timeout_s)
        settings = self.settings
        with connect(settings) as connection:
            for at, name in enumerate(DEFAULT):
                assert differences_in_summary(connection, self.rows, at, name, settings.interval_of(name)) == []

    def _is_queue_empty(self) -> bool:
        try:
            with connect(self.settings) as connection:
                row = connection.execute("SELECT count(*) FROM summary_refresh_queue").fetchone()
        except TransientError:
            return False
        return row == (0,)


def samples(count: int, start: float = 0, step: float = 1) -> list[Sample]:
    """``count`` new readings of both metrics, one each ``step`` minutes."""
    return [(start + at * step, float(at), 100.0 - at) for at in range(count)]


def committed_offsets(settings: Settings) -> dict[int, int]:
    """What the group has committed, by partition; 0 where nothing."""
    with Offsets(settings) as offsets:
        found = offsets.of(settings.kafka_topic, list(range(settings.kafka_partitions)))
    return {each.partition: each.committed or 0 for each in found}


def member_ids(settings: Settings) -> dict[str, set[int]]:
    """The members of the consumer group, and the partitions of each."""
    admin = AdminClient(client_settings(settings, "test"))
    (group,) = admin.describe_consumer_groups([settings.kafka_group]).values()
    return {
        member.member_id: {place.partition for place in member.assignment.topic_partitions}
        for member in group.result().members
    }
