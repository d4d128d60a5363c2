"""The consumer's metrics. What is stored or sent counts when the server has confirmed it."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from services.core.errors import Reason

RESULTS = ("inserted", "updated", "unchanged")
PATHS = ("copy", "merge")

MESSAGES_READ = Counter("sensor_messages_read_total", "Messages polled from the topic of readings.")
MESSAGES_ABANDONED = Counter(
    "sensor_messages_abandoned_total", "Messages polled, then abandoned to the next owner of their partition."
)
MESSAGES_EXPIRED = Counter(
    "sensor_messages_expired_total",
    "Messages that Kafka deleted before they were stored: the topic's retention is too short.",
)
READINGS_STORED = Counter("sensor_readings_stored_total", "Readings committed to sensor_data, by result.", ["result"])
READINGS_LATE = Counter(
    "sensor_readings_late_total", "Readings committed to sensor_data of an interval that was over for this consumer."
)
DEAD_LETTERS = Counter("sensor_dead_letters_total", "Messages sent to the dead-letter topic, by reason.", ["reason"])
BATCH_READINGS = Histogram(
    "sensor_batch_readings",
    "Readings per stored batch.",
    buckets=(1, 10, 100, 1000, 5000, 10_000, 25_000, 50_000, 100_000, 1_000_000),
)
BATCH_WRITE_SECONDS = Histogram(
    "sensor_batch_write_seconds",
    "Time until a batch was committed to sensor_data, including waits for the database.",
    ["path"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
LAG = Gauge(
    "sensor_consumer_lag_messages", "Messages of the partition that the group has not committed.", ["partition"]
)
EXPIRING = Gauge(
    "sensor_consumer_expiring_messages",
    "Uncommitted messages that have waited for more than a quarter of the topic's retention; NaN while unknown.",
)
EXPIRING.set(float("nan"))

# A series that begins with its first event would hide that one from rate() and increase().
for _reason in Reason:
    DEAD_LETTERS.labels(_reason)
for _result in RESULTS:
    READINGS_STORED.labels(_result)
for _path in PATHS:
    BATCH_WRITE_SECONDS.labels(_path)
