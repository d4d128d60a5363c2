"""A long load of history by several consumers, half of it repeats, with etl refreshing all the while.

Consumers that share minutes commit them at the same time as etl computes them. If any reading were missed, etl's own
check or a reconcile would find it. It takes a while: ``make load ROWS=20000000``, on native servers.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from confluent_kafka.admin import AdminClient

from services.core.config import Settings
from services.core.database import connect
from services.core.kafka import client_settings
from services.core.offsets import group_lag
from services.core.shutdown import Shutdown
from services.producer.generate import Plan, generate
from tests.chaos.slow_commits import slow_commits
from tests.fix_services import Service, StartService, run_cli, wait_until
from tests.measured import MEASUREMENTS

ROWS = int(os.environ.get("LOAD_ROWS", "0"))
SLICES = 10
SENSORS = 200
INTERVAL_S = 10
CONSUMERS = 4
START = datetime(2024, 1, 1, tzinfo=UTC)
LEAST_ROWS_S = 4_000
LOGS = ("hypertable", "materialization")


@dataclass(frozen=True)
class History:
    """Files that are sent in this order, and what is stored in the end."""

    rows: int
    sums: dict[str, float]


def write_history(settings: Settings, directory: Path) -> History:
    """Slices of history, each sent twice: the second time with the same values, or, each other slice, with others."""
    steps = ROWS // 2 // SLICES // SENSORS
    span = timedelta(seconds=steps * INTERVAL_S)
    days = (steps + 0.5) * INTERVAL_S / 86_400
    rows, sums = 0, dict.fromkeys((settings.column_of("temperature"), settings.column_of("humidity")), 0.0)
    for number in range(SLICES):
        for seed in (1, 1 + number % 2):
            written = directory / "part"
            generate(settings, Plan(SENSORS, days, INTERVAL_S, seed, START + number * span), written, Shutdown())
            first, again = (directory / f"{number:02d}-{copy}.parquet" for copy in range(2))
            if not first.exists():
                written.rename(first)
        table = pq.read_table(written)
        pq.write_table(table, again, compression="lz4")  # other contents: the producer sends nothing twice unasked
        written.unlink()
        rows += table.num_rows
        for name in sums:
            sums[name] += pc.sum(table[name]).as_py()
    return History(rows, sums)


@contextmanager
def measured(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Note how long the block takes."""
    started = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - started, 1)


@pytest.mark.slow
@pytest.mark.skipif(not ROWS, reason="takes long: make load ROWS=20000000")
@pytest.mark.usefixtures("native")
def test_no_reading_is_missed_under_load(
    settings: Settings,
    start: StartService,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    settings = settings.model_copy(
        update={
            "parquet_url": str(tmp_path / "history"),
            "kafka_partitions": 8,
            "kafka_topic": f"{settings.kafka_topic}_load",
            "consumer_batch_rows": 5_000,
            "consumer_batch_seconds": 0.5,
            "etl_poll_seconds": 0.1,
            "etl_check_seconds": 1.0,
        }
    )
    seconds: dict[str, float] = {}
    (tmp_path / "history").mkdir()
    with measured("generate", seconds):
        history = write_history(settings, tmp_path / "history")
    with measured("produce", seconds):
        assert start("produce", settings=settings).wait(timeout_s=60 + ROWS / LEAST_ROWS_S) == 0
    try:
        with slow_commits(settings) as of_consumers:
            with measured("consume", seconds):
                services = [start("consume", settings=of_consumers) for _ in range(CONSUMERS)]
                services.append(start("etl", settings=settings))
                wait_until(lambda: is_read(settings, services), "all is stored", 60 + ROWS / LEAST_ROWS_S)
            with measured("summarise", seconds):
                wait_until(lambda: is_summarised(settings), "nothing is queued", 60 + ROWS / LEAST_ROWS_S)
            codes = [service.stop() for service in services]
    finally:
        delete_topics(settings)
    with connect(settings) as connection:
        stored = connection.execute("SELECT count(*), sum(temperature), sum(humidity) FROM sensor_data").fetchone()
        summarised = connection.execute(
            "SELECT (SELECT sum(reading_count) FROM temperature_summary),"
            " (SELECT sum(reading_count) FROM humidity_summary)"
        ).fetchone()
        checks = connection.execute("SELECT sum(differences)::int FROM summary_check").fetchone()
        logs = [
            connection.execute(
                f"SELECT count(*) FROM _timescaledb_catalog.continuous_aggs_{log}_invalidation_log"
            ).fetchone()
            for log in LOGS
        ]
    with measured("reconcile", seconds):
        reconciled = run_cli(settings, "etl", "--reconcile")
    merged = sum(line["path"] == "merge" for service in services[:-1] for line in service.events("batch_written"))
    batches = sum(len(service.events("batch_written")) for service in services[:-1])
    record_property(
        "summary",
        f"{ROWS} messages, {history.rows} readings, {seconds}; {batches} batches, {merged} of them merged; "
        f"{len(services[-1].events('summaries_refreshed'))} refreshes; "
        f"commits {'as they are' if of_consumers is settings else 'slowed down'}; differences found by etl {checks}; "
        f"rows of TimescaleDB's logs of changes {dict(zip(LOGS, logs, strict=True))}; {reconciled.stdout}",
    )
    assert codes == [0] * len(services)
    assert stored is not None
    assert stored[0] == history.rows
    assert all(math.isclose(found, wanted) for found, wanted in zip(stored[1:], history.sums.values(), strict=True))
    assert summarised == (history.rows, history.rows)
    assert checks == (0,)
    assert set(reconciled.stdout.splitlines()) == {f"{name}_summary: 0 rows differed" for name in MEASUREMENTS}


def is_read(settings: Settings, services: list[Service]) -> bool:
    """Whether the group is at the topic's end; fails if a service has ended."""
    assert all(service.process.poll() is None for service in services)
    return group_lag(settings) == 0


def is_summarised(settings: Settings) -> bool:
    """Whether the queue is empty."""
    with connect(settings) as connection:
        return connection.execute("SELECT count(*) FROM summary_refresh_queue").fetchone() == (0,)


def delete_topics(settings: Settings) -> None:
    """What the load has left in Kafka is large."""
    admin = AdminClient(client_settings(settings, "test"))
    for deleted in admin.delete_topics([settings.kafka_topic, settings.dead_letter_topic]).values():
        deleted.result()
