"""Etl's metrics: the leader's work, and the queue, which every instance samples beside its work."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from psycopg import Connection

from services.core.database import one, queries

SQL = queries("services.etl")
FRESH_FOR_S = 5.0  # a sample of the queue holds for this long; there is one every second

LEADING = Gauge("sensor_etl_leading", "1 while this instance refreshes the summaries, 0 while it stands by.")
REFRESH_SECONDS = Histogram(
    "sensor_refresh_seconds",
    "Time of one refresh of a continuous aggregate.",
    ["aggregate"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800),
)
MIRROR_SECONDS = Histogram(
    "sensor_mirror_seconds",
    "Time of one transaction that brings the summaries up to date with the aggregates.",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
INTERVALS_REFRESHED = Counter(
    "sensor_intervals_refreshed_total",
    "Intervals that were brought up to date because readings changed.",
    ["aggregate"],
)
SUMMARY_ROWS_CHANGED = Counter(
    "sensor_summary_rows_changed_total", "Summary rows that were inserted, updated or deleted.", ["measurement"]
)
QUEUE_ROWS_DONE = Counter("sensor_refresh_queue_rows_done_total", "Rows of the refresh queue that were worked off.")
CHUNKS_DROPPED = Counter("sensor_chunks_dropped_total", "Chunks of raw readings dropped by RAW_RETENTION_DAYS.")
CHUNKS_COMPRESSED = Counter(
    "sensor_chunks_compressed_total", "Chunks of raw readings compressed by COMPRESS_AFTER_DAYS."
)
SUMMARY_DIFFERENCES = Counter(
    "sensor_summary_differences_total",
    "Summary rows that differed from the raw readings although no refresh was pending; they are repaired. "
    "Should stay 0.",
    ["measurement"],
)
DUTY_FAILURES = Counter(
    "sensor_etl_duty_failures_total",
    "Failed attempts of etl's duties other than the refresh; each is retried.",
    ["duty"],
)


class QueueCollector(Collector):
    """The refresh queue as it was last sampled.

    Its depth is reported while that is known. Freshness is reported always: while the queue cannot be sampled, it grows
    with the time since the last sample, as readings may be waiting since then.
    """

    def __init__(self) -> None:
        self._last: tuple[int, float, float] | None = None  # rows, age of the oldest, time.monotonic()

    def sample(self, connection: Connection) -> None:
        """Ask how deep the queue is, and how old."""
        rows, oldest_s = one(connection, SQL["queue_state"])
        self._last = rows, oldest_s, time.monotonic()

    def describe(self) -> list[Metric]:
        """The metrics without a value."""
        return [
            GaugeMetricFamily("sensor_refresh_queue_rows", "Rows of the refresh queue."),
            GaugeMetricFamily("sensor_refresh_queue_age_seconds", "Age of the queue's oldest row; 0: it is empty."),
            GaugeMetricFamily(
                "sensor_freshness_seconds", "Age of the oldest reading that is stored and not yet summarised; 0: none."
            ),
        ]

    def collect(self) -> Iterator[Metric]:
        """What is known now."""
        if self._last is None:
            return
        rows, oldest_s, at = self._last
        since_s = time.monotonic() - at
        is_known = since_s <= FRESH_FOR_S
        values = [rows, oldest_s, oldest_s + since_s if rows or not is_known else 0.0]
        for metric, value in list(zip(self.describe(), values, strict=True))[0 if is_known else -1 :]:
            metric.add_sample(metric.name, {}, value)
            yield metric


QUEUE = QueueCollector()
REGISTRY.register(QUEUE)
