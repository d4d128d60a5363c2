"""``make bench``: how fast the pipeline is, as ratios to what PostgreSQL itself can do in the same run.

Absolute figures drift from hour to hour, ratios hardly do. Floors and subjects take turns, at least three rounds;
the median counts. Prints one table and writes .local/bench/latest.json. It runs on a local stack, or on native
servers where TEST_POSTGRE_* and TEST_KAFKA_* name them (their database is emptied).
"""

from __future__ import annotations

import json
import logging
import os
import platform
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient

from services.core.config import Settings
from services.core.database import connect
from services.core.kafka import client_settings, create_topics
from services.core.reading import Reading, encode
from services.core.shutdown import Shutdown
from services.etl.worker import Leader
from services.producer.generate import Plan, generate
from tests.fix_services import Service, wait_until
from tests.fix_stack import ROOT, empty, is_native, make_stack, native_settings, stack_settings, upgrade

ROUNDS = 3
ROWS = int(os.environ.get("BENCH_ROWS", "1000000"))
SENSORS = 200
BATCH = 10_000
START = datetime(2024, 1, 1, tzinfo=UTC)
PATIENCE_S = 300.0
OUTPUT = ROOT / ".local" / "bench" / "latest.json"

Row = tuple[datetime, str, float, float]


def readings(count: int, first: int = 0) -> Iterator[Row]:
    """Readings in order of time, each sensor once a second."""
    for number in range(first, first + count):
        yield (
            START + timedelta(seconds=number // SENSORS),
            f"s{number % SENSORS:04d}",
            20.0 + number % 100 / 10,
            50.0 + number % 37 / 10,
        )


@dataclass(slots=True)
class Drained:
    """One consumer process that emptied a topic."""

    rows_s: float
    cpu_s_per_million: float
    rss_mb: float


@dataclass(slots=True)
class Bench:
    """The servers, and what was measured."""

    settings: Settings
    directory: Path
    results: dict[str, float] = field(default_factory=dict)
    _count: int = 0

    # The database ----------------------------------------------------------------------------------------

    def truncate(self) -> None:
        """An empty database without aggregates."""
        with connect(self.settings) as connection:
            empty(connection)

    def copy_floor(self, rows: list[Row]) -> float:
        """Rows a second of a bare binary COPY, BATCH rows a commit, into the same table."""
        self.truncate()
        started = time.monotonic()
        with connect(self.settings) as connection:
            for at in range(0, len(rows), BATCH):
                with connection.transaction(), connection.cursor() as cursor:
                    copy(cursor, "sensor_data", rows[at : at + BATCH])
        return len(rows) / (time.monotonic() - started)

    def upsert_floor(self, rows: list[Row]) -> float:
        """Rows a second of COPY to a temporary table and INSERT ... ON CONFLICT, onto rows that exist."""
        started = time.monotonic()
        with connect(self.settings) as connection:
            for at in range(0, len(rows), BATCH):
                with connection.transaction(), connection.cursor() as cursor:
                    cursor.execute("CREATE TEMPORARY TABLE floor (LIKE sensor_data) ON COMMIT DROP")
                    copy(cursor, "floor", rows[at : at + BATCH])
                    cursor.execute(
                        "INSERT INTO sensor_data AS stored SELECT * FROM floor ON CONFLICT (sensor_id, time) DO UPDATE"
                        " SET temperature = excluded.temperature, humidity = excluded.humidity WHERE"
                        " (stored.temperature, stored.humidity) IS DISTINCT FROM"
                        " (excluded.temperature, excluded.humidity)"
                    )
        return len(rows) / (time.monotonic() - started)

    # Kafka -----------------------------------------------------------------------------------------------

    def new_topic(self, **changes: object) -> Settings:
        """Settings with a topic and a group of their own."""
        self._count += 1
        changed = self.settings.model_copy(
            update={"kafka_topic": f"bench_{os.getpid()}_{self._count}", **changes, "kafka_group": f"g{time.time_ns()}"}
        )
        create_topics(AdminClient(client_settings(changed, "bench")), changed)
        return changed

    def fill(self, settings: Settings, rows: Iterator[Row] | list[Row], every_bad: int = 0) -> None:
        """Put readings on the topic; each ``every_bad``-th message is malformed."""
        producer = Producer(
            client_settings(settings, "bench")
            | {"linger.ms": 50, "compression.type": "lz4", "queue.buffering.max.messages": 1_000_000}
        )
        for number, (moment, sensor, temperature, humidity) in enumerate(rows):
            value = encode(Reading(sensor, moment, temperature, humidity))
            if every_bad and number % every_bad == 0:
                value = value[:-2]
            while True:
                try:
                    producer.produce(settings.kafka_topic, key=sensor, value=value)
                    break
                except BufferError:
                    producer.poll(0.1)
        producer.flush()

    def drain(self, settings: Settings, consumers: int = 1) -> Drained:
        """Consume a filled topic to its end with real processes."""
        group = settings.model_copy(update={"kafka_group": f"g{time.time_ns()}"})
        logs = [self.directory / f"drain-{time.time_ns()}-{number}.log" for number in range(consumers)]
        services = [Service(group, "consume", "--until-caught-up", log_path=log) for log in logs]
        rss = peak_rss(services)
        assigned = [moment_of(event) for service in services for event in service.events("partitions_assigned")]
        written = [moment_of(event) for service in services for event in service.events("batch_written")]
        totals = [service.events("stopped")[0] for service in services]
        handled = sum(int(total[name]) for total in totals for name in ("inserted", "updated", "unchanged"))
        handled += sum(int(total["dead_letters"]) for total in totals)
        cpu = sum(float(total["cpu_s"]) for total in totals)
        seconds = (max(written) - min(assigned)).total_seconds()
        return Drained(handled / seconds, cpu * 1e6 / handled, rss)

    def peer_loop(self, settings: Settings, count: int) -> float:
        """Rows a second of the loop that tutorials show: poll, json.loads, executemany of 1,000, commit."""
        self.truncate()
        consumer = Consumer(
            client_settings(settings, "peer")
            | {"group.id": f"g{time.time_ns()}", "auto.offset.reset": "earliest", "enable.auto.commit": False}
        )
        consumer.subscribe([settings.kafka_topic])
        first = None
        while first is None:
            first = consumer.poll(1.0)
        started = time.monotonic()
        rows = []
        with connect(self.settings) as connection:
            for number in range(count):
                message = first if number == 0 else consumer.poll(1.0)
                assert message is not None
                value = json.loads(message.value() or b"")
                rows.append((value["time"], value["sensor_id"], value["temperature"], value["humidity"]))
                if len(rows) == 1_000:
                    with connection.transaction(), connection.cursor() as cursor:
                        cursor.executemany(
                            "INSERT INTO sensor_data VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING", rows
                        )
                    consumer.commit(asynchronous=False)
                    rows.clear()
        seconds = time.monotonic() - started
        consumer.close()
        return count / seconds


def copy(cursor: psycopg.Cursor, table: str, rows: list[Row]) -> None:
    """Binary COPY as psycopg's users write it."""
    columns = "(time, sensor_id, temperature, humidity)"
    with cursor.copy(f"COPY {table} {columns} FROM STDIN (FORMAT binary)") as into:
        into.set_types(("timestamptz", "text", "float8", "float8"))
        for row in rows:
            into.write_row(row)


def moment_of(event: dict[str, object]) -> datetime:
    """When a log line was written."""
    return datetime.fromisoformat(str(event["time"]))


def peak_rss(services: list[Service]) -> float:
    """Wait for the processes to end, as they should; the largest resident set that one of them had, in MB."""
    peak = 0.0
    watched = [psutil.Process(service.process.pid) for service in services]
    pause = threading.Event()
    while any(service.process.poll() is None for service in services):
        for process in watched:
            try:
                peak = max(peak, process.memory_info().rss / 1e6)
            except psutil.NoSuchProcess:
                continue
        pause.wait(0.05)
    for service in services:
        if service.process.returncode:
            raise AssertionError(service.log_path.read_text(encoding="utf-8")[-2000:])
    return peak


# What is measured ----------------------------------------------------------------------------------------


def measure_drain(bench: Bench) -> None:
    """Drain, merge, malformed, the tutorials' loop, two consumers: all over the floors in turn."""
    rows = list(readings(ROWS))
    topic = bench.new_topic()
    bench.fill(topic, rows)
    dirty = bench.new_topic()
    bench.fill(dirty, rows[: ROWS // 2], every_bad=100)
    series: dict[str, list[float]] = {}

    def note(**values: float) -> None:
        for name, value in values.items():
            series.setdefault(name, []).append(value)

    for number in range(ROUNDS):
        say(f"        round {number + 1} of {ROUNDS}")
        floor = bench.copy_floor(rows)
        upserts = bench.upsert_floor(rows)
        merged = bench.drain(topic)
        bench.truncate()
        drained = bench.drain(topic)
        bench.truncate()
        two = bench.drain(topic, consumers=2)
        bench.truncate()
        malformed = bench.drain(dirty)
        peer = bench.peer_loop(topic, ROWS // 10)
        note(
            copy_floor_rows_s=floor,
            upsert_floor_rows_s=upserts,
            drain_rows_s=drained.rows_s,
            drain_ratio=drained.rows_s / floor,
            drain_cpu_s_per_million=drained.cpu_s_per_million,
            drain_rss_mb=drained.rss_mb,
            merge_ratio=merged.rows_s / upserts,
            two_consumers_ratio=two.rows_s / drained.rows_s,
            malformed_ratio=malformed.rows_s / drained.rows_s,
            peer_loop_ratio=drained.rows_s / peer,
        )
    bench.results |= {name: statistics.median(values) for name, values in series.items()}


def measure_produce(bench: Bench) -> None:
    """A Parquet file of ten times ROWS to the topic, transactions on."""
    path = bench.directory / "readings.parquet"
    topic = bench.new_topic(**source_of(path))
    days = 10 * ROWS / SENSORS / 1440
    generate(topic, Plan(sensors=SENSORS, days=days, interval_s=60, seed=1, start=START), path, Shutdown())
    service = Service(topic, "produce", log_path=bench.directory / "produce.log")
    started = time.monotonic()
    bench.results["produce_rss_mb"] = peak_rss([service])
    bench.results["produce_rows_s"] = 10 * ROWS / (time.monotonic() - started)
    bench.results["produce_over_drain"] = bench.results["produce_rows_s"] / bench.results["drain_rows_s"]
    path.unlink()


def measure_end_to_end(bench: Bench) -> None:
    """From the start of the producer to the last reading in the table and the last interval in both summaries."""
    path = bench.directory / "end_to_end.parquet"
    write_parquet(path, ROWS)
    ratios = []
    for _ in range(ROUNDS):
        floor = bench.copy_floor(list(readings(ROWS)))
        bench.truncate()
        topic = bench.new_topic(**source_of(path))
        with running(bench, topic, "consume", "etl"):
            started = time.monotonic()
            producer = Service(topic, "produce", log_path=bench.directory / f"produce-{time.time_ns()}.log")
            wait_until_complete(bench, ROWS, "the last reading and the last interval")
            ratios.append(ROWS / (time.monotonic() - started) / floor)
            producer.wait()
    bench.results["end_to_end_ratio"] = statistics.median(ratios)
    path.unlink()


def measure_freshness(bench: Bench, rate: int = 20_000) -> None:
    """At a steady rate, at the begin of an interval and at the end of one that is half full of it already."""
    width = timedelta(minutes=20)
    start = datetime.fromtimestamp(0, UTC) + (datetime.now(UTC).timestamp() // width.total_seconds() + 1) * width
    begin = freshness(bench, rate, start)
    full = timedelta(minutes=9)
    bench.truncate()
    load(bench, min(6 * ROWS, int(rate * full.total_seconds()) // 2), start, full)
    end = freshness(bench, rate, start + full)
    ages = begin + end
    bench.results["freshness_p50_s"] = statistics.median(ages)
    bench.results["freshness_p99_s"] = statistics.quantiles(ages, n=100)[98]
    bench.results["freshness_end_over_begin"] = statistics.median(end) / statistics.median(begin)


def freshness(bench: Bench, rate: int, clock: datetime, seconds: int = 20) -> list[float]:
    """From the message's time in Kafka to the summary row that includes it, for a probe each tenth of a second."""
    topic = bench.new_topic()
    seen: list[tuple[float, float]] = []  # (when looked, newest publishing time that is included)
    published: list[float] = []  # when each probe was
    with running(bench, topic, "consume", "etl"), connect(bench.settings) as connection:
        wait_until(lambda: not is_queued(connection), "what was there before", PATIENCE_S)
        ended = threading.Event()
        thread = threading.Thread(target=publish_steadily, args=(topic, rate, seconds, clock, published, ended))
        thread.start()
        while not ended.is_set() or not seen or seen[-1][1] < published[-1]:
            row = connection.execute(
                "SELECT coalesce(sum(reading_count), 0) FROM temperature_summary WHERE sensor_id = 'probe'"
            ).fetchone()
            if row is not None and row[0]:
                seen.append((time.monotonic(), published[int(row[0]) - 1]))
            ended.wait(0.05)
        thread.join()
    ages, at = [], 0
    for moment in published:  # the first look that included it
        while seen[at][1] < moment:
            at += 1
        ages.append(seen[at][0] - moment)
    bench.truncate()
    return ages


def publish_steadily(
    settings: Settings, rate: int, seconds: int, clock: datetime, published: list[float], ended: threading.Event
) -> None:
    """``rate`` readings a second of SENSORS sensors, their times from ``clock`` on, and a probe each tenth."""
    producer = Producer(client_settings(settings, "bench") | {"linger.ms": 5, "compression.type": "lz4"})
    pause = threading.Event()
    began = time.monotonic()
    for tick in range(seconds * 10):
        for number in range(rate // 10):
            moment = clock + timedelta(seconds=tick / 10, microseconds=number * 10)
            value = encode(Reading(f"s{number % SENSORS:04d}", moment, 20.0, 50.0))
            producer.produce(settings.kafka_topic, key=f"s{number % SENSORS:04d}", value=value)
        moment = clock + timedelta(seconds=tick / 10)
        producer.produce(settings.kafka_topic, key="probe", value=encode(Reading("probe", moment, 20.0, 50.0)))
        published.append(time.monotonic())
        producer.poll(0)
        pause.wait(max(0.0, began + (tick + 1) / 10 - time.monotonic()))
    producer.flush()
    ended.set()


def measure_history_cost(bench: Bench) -> None:
    """One refresh and mirror of a small change, with ROWS of history and with ten times as much."""
    costs = []
    for history in (ROWS, 10 * ROWS):
        bench.truncate()
        load(bench, history, START, timedelta(seconds=history // SENSORS))
        with connect(bench.settings) as connection:
            leader = Leader(connection, bench.settings)
            leader.run_once()
            assert leader.take_over() is not None
            samples = []
            for number in range(15):
                moment = START + timedelta(minutes=number)
                connection.execute(
                    "UPDATE sensor_data SET temperature = temperature + 1 WHERE sensor_id = 's0000' AND time = %s",
                    (moment,),
                )
                connection.execute(
                    "INSERT INTO summary_refresh_queue (touched) VALUES (tstzmultirange(tstzrange(%s, %s)))",
                    (moment, moment + timedelta(minutes=1)),
                )
                started = time.monotonic()
                leader.summaries.refresh_queued()
                samples.append(time.monotonic() - started)
            costs.append(statistics.median(samples))
    bench.results["refresh_small_change_s"] = costs[0]
    bench.results["history_cost_ratio"] = costs[1] / costs[0]


def load(bench: Bench, count: int, start: datetime, span: timedelta) -> None:
    """History of ``count`` readings, spread over ``span``, queued as the consumer would."""
    step = span / (count // SENSORS)
    with connect(bench.settings) as connection:
        for first in range(0, count, 100_000):
            rows = [
                (start + number // SENSORS * step, f"s{number % SENSORS:04d}", 20.0 + number % 100 / 10, 50.0)
                for number in range(first, min(first + 100_000, count))
            ]
            with connection.transaction(), connection.cursor() as cursor:
                copy(cursor, "sensor_data", rows)
        connection.execute(
            "INSERT INTO summary_refresh_queue (touched)"
            " SELECT tstzmultirange(tstzrange(min(time), max(time), '[]')) FROM sensor_data"
        )


def measure_backfill(bench: Bench, files: int = 60) -> None:
    """A year of history in random file order: how often each interval is refreshed."""
    bench.truncate()
    source = bench.directory / "year"
    source.mkdir()
    chooser = random.Random(1)  # noqa: S311 - an order, no secret
    order = list(range(files))
    chooser.shuffle(order)
    step, steps = timedelta(hours=3), 365 * 8 // files
    for place, part in enumerate(order):
        first = START + part * steps * step
        count = steps * SENSORS
        table = pa.table(
            {
                "time": [first + number // SENSORS * step for number in range(count)],
                "sensor": [f"s{number % SENSORS:04d}" for number in range(count)],
                "temperature": [20.0 + number % 7 for number in range(count)],
                "humidity": [50.0] * count,
            },
            schema=SCHEMA,
        )
        pq.write_table(table, source / f"{place:03d}.parquet")
    total = files * steps * SENSORS
    topic = bench.new_topic(**source_of(source), temperature_interval=180, humidity_interval=360)
    with running(bench, topic, "consume", "etl") as services:
        producer = Service(topic, "produce", log_path=bench.directory / "produce-year.log")
        producer.wait(PATIENCE_S)
        wait_until_complete(bench, total, "the year")
        refreshed = sum(int(event["intervals"]) for event in services[1].events("summaries_refreshed"))
    existing = files * steps * 3 // 2
    bench.results["backfill_refreshes_per_interval"] = refreshed / existing


SCHEMA = pa.schema(
    [
        ("time", pa.timestamp("us", "UTC")),
        ("sensor", pa.string()),
        ("temperature", pa.float64()),
        ("humidity", pa.float64()),
    ]
)


def write_parquet(path: Path, count: int) -> None:
    """The readings as a Parquet file, written in pieces."""
    with pq.ParquetWriter(path, SCHEMA) as writer:
        for first in range(0, count, 100_000):
            columns = zip(*readings(min(100_000, count - first), first), strict=True)
            writer.write_table(pa.table([list(column) for column in columns], schema=SCHEMA))


def source_of(path: Path) -> dict[str, str]:
    """Settings that make the producer read ``path``."""
    return {
        "parquet_url": str(path),
        "data_feature_date": "time",
        "data_feature_temp": "temperature",
        "data_feature_humid": "humidity",
        "data_feature_sensor": "sensor",
    }


@contextmanager
def running(bench: Bench, settings: Settings, *commands: str) -> Iterator[list[Service]]:
    """Services that run while the block does."""
    services = [
        Service(settings, command, log_path=bench.directory / f"{command}-{time.time_ns()}.log") for command in commands
    ]
    try:
        services[0].wait_for("partitions_assigned")
        if "etl" in commands:
            services[commands.index("etl")].wait_for("leading")
        yield services
    finally:
        for service in services:
            service.stop()


def is_queued(connection: psycopg.Connection) -> bool:
    """Whether etl has something to do."""
    row = connection.execute("SELECT EXISTS (SELECT FROM summary_refresh_queue)").fetchone()
    return row is not None and bool(row[0])


def wait_until_complete(bench: Bench, rows: int, what: str) -> None:
    """Until all readings are stored and summarised, and nothing is queued."""

    def is_complete() -> bool:
        if is_queued(connection):
            return False
        row = connection.execute("SELECT sum(reading_count) FROM humidity_summary").fetchone()
        return row is not None and row[0] == rows

    with connect(bench.settings) as connection:  # one for all looks: to connect takes longer than to look
        wait_until(is_complete, what, PATIENCE_S)


# The table -----------------------------------------------------------------------------------------------

GOALS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "drain_ratio": ("at least 0.85 (native 0.80)", lambda value: value >= (0.80 if is_native() else 0.85)),
    "drain_cpu_s_per_million": ("at most 2.5", lambda value: value <= 2.5),
    "drain_rss_mb": ("at most 300", lambda value: value <= 300),
    "merge_ratio": ("at least 0.80", lambda value: value >= 0.80),
    "produce_over_drain": ("at least 1.2", lambda value: value >= 1.2),
    "produce_rss_mb": ("at most 250", lambda value: value <= 250),
    "end_to_end_ratio": ("at least 0.45", lambda value: value >= 0.45),
    "freshness_p99_s": ("at most 4 (native 2)", lambda value: value <= (2 if is_native() else 4)),
    "freshness_end_over_begin": ("at most 1.3", lambda value: value <= 1.3),
    "history_cost_ratio": ("at most 1.2", lambda value: value <= 1.2),
    "backfill_refreshes_per_interval": ("at most 2", lambda value: value <= 2),
    "peer_loop_ratio": ("at least 6", lambda value: value >= 6),
    "two_consumers_ratio": ("at least 1", lambda value: value >= 1),
    "malformed_ratio": ("at least 0.7", lambda value: value >= 0.7),
}

MEASUREMENTS = {
    "drain": measure_drain,
    "produce": measure_produce,
    "end_to_end": measure_end_to_end,
    "freshness": measure_freshness,
    "history_cost": measure_history_cost,
    "backfill": measure_backfill,
}


def say(line: str) -> None:
    """Tell the person at the terminal."""
    print(line, flush=True)  # noqa: T201


@contextmanager
def servers(directory: Path) -> Iterator[Settings]:
    """A local stack, or the native servers that the environment names; migrated."""
    if is_native():
        settings = native_settings()
        upgrade(settings)
        yield settings
        return
    with make_stack(directory / "stack") as stack:
        settings = stack_settings(stack)
        upgrade(settings)
        yield settings


def main(names: list[str]) -> int:
    """Run all measurements, or those that are named. A goal that is missed is told; it is no failure."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name, servers(Path(name)) as settings:
        logging.disable(logging.INFO)  # of what runs in this process: the table is what counts
        bench = Bench(settings.model_copy(update={"log_format": "json"}), Path(name))
        for measurement in names or MEASUREMENTS:
            say(f"{time.monotonic() - started:4.0f} s  measuring {measurement}")
            MEASUREMENTS[measurement](bench)
    bench.results["took_s"] = time.monotonic() - started
    say("")
    say(f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {platform.machine()}, {ROWS:,} readings")
    for name, value in bench.results.items():
        goal, reached = GOALS.get(name, ("", lambda _: True))
        say(f"  {name:34} {value:>12,.3f}   {goal:28} {'' if reached(value) else 'MISSED'}".rstrip())
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(bench.results, indent=2) + "\n", encoding="utf-8")
    say(f"written to {OUTPUT.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
