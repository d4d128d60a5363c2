"""The producer's metrics. What is sent counts when its transaction is committed."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from services.producer.times import DOUBTS

REASONS = (
    "bad_time",
    "time_out_of_range",
    "no_time",
    "no_sensor",
    "bad_sensor",
    "value_out_of_range",
    "no_measurement",
)

WATCHING = Gauge("sensor_producer_watching", "1 in a producer that keeps watching for files, else 0.")
ROWS_READ = Counter("sensor_rows_read_total", "Rows read from the files; each was sent or skipped.")
READINGS_SENT = Counter("sensor_readings_sent_total", "Readings sent to the topic.")
ROWS_SKIPPED = Counter("sensor_rows_skipped_total", "Rows that are not readings, by reason.", ["reason"])
TIMES_DOUBTFUL = Counter(
    "sensor_times_doubtful_total",
    "Readings sent whose local time occurred twice (ambiguous) or never (nonexistent).",
    ["kind"],
)
FILES_SENT = Counter("sensor_files_sent_total", "Files of which every row was sent or skipped.")
FILES_UNREADABLE = Counter(
    "sensor_files_unreadable_total", "Files found that could not be read; each counts until it changes."
)
TRANSACTIONS_ABORTED = Counter(
    "sensor_transactions_aborted_total", "Transactions that failed; their messages are sent again."
)
TRANSACTION_READINGS = Histogram(
    "sensor_transaction_readings",
    "Readings per committed transaction.",
    buckets=(1, 10, 100, 1000, 10_000, 50_000, 100_000, 200_000, 500_000, 1_000_000, 10_000_000),
)
TRANSACTION_SECONDS = Histogram(
    "sensor_transaction_seconds",
    "Age of a transaction when it was committed.",
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 60, 300, 900),
)

# A series that begins with its first event would hide that one from rate() and increase().
for _reason in REASONS:
    ROWS_SKIPPED.labels(_reason)
for _kind in DOUBTS:
    TIMES_DOUBTFUL.labels(_kind)
