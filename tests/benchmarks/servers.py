"""The servers that a run measures: floors that PostgreSQL itself sets, topics to drain, services to start."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import psycopg
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient

from services.core.config import Settings
from services.core.database import connect
from services.core.kafka import client_settings, create_topics
from services.core.measurements import DEFAULT
from services.core.reading import reading_type
from services.core.shutdown import Shutdown
from services.local.runtime import KAFKA_VERSION
from tests.benchmarks.goals import KEYS
from tests.benchmarks.history import BATCH, COPY, History, Row
from tests.fix_services import Service, wait_until
from tests.fix_stack import empty, is_native, make_stack, native_settings, stack_settings, upgrade
from tests.measured import MEASUREMENTS, encode
from tests.processes import Fresh

PATIENCE_S = 600.0


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured: what a server of many processes takes, and what the embedded one does in reasonable time.

    ``rows`` of a topic that is drained, ``large`` of a load from end to end, ``history`` for one small change,
    ``fresh_s`` of a steady stream.
    """

    kind: str
    rows: int
    large: int
    history: int
    fresh_s: int
    rounds: int = 3

    @classmethod
    def of_servers(cls) -> Scale:
        """The scale of the servers at hand; BENCH_ROWS and BENCH_HISTORY change it."""
        rows = int(os.environ.get("BENCH_ROWS", "1000000"))
        history = int(os.environ.get("BENCH_HISTORY", 10 * rows))
        if is_native():
            return cls("native", rows, 10 * rows, history, fresh_s=180)
        return cls("embedded", rows, rows, history, fresh_s=20)


@dataclass(slots=True)
class Drained:
    """Consumer processes that emptied a topic; ``rss_mb`` of the largest."""

    rows_s: float
    cpu_s_per_million: float
    rss_mb: float


@dataclass(slots=True)
class Bench:
    """The servers, which figures are wanted (none named: all), and what was measured."""

    settings: Settings
    directory: Path
    scale: Scale
    only: frozenset[str] = frozenset()
    results: dict[str, float] = field(default_factory=dict)
    _topics: int = 0

    def wants(self, *names: str) -> bool:
        """Whether one of these figures is wanted."""
        return not self.only or any(name in self.only for name in names)

    def note(self, **values: float) -> None:
        """Keep the figures that are wanted."""
        assert values.keys() <= KEYS.keys()
        self.results |= {name: value for name, value in values.items() if self.wants(name)}

    # The database ----------------------------------------------------------------------------------------

    def truncate(self) -> None:
        """An empty database without aggregates."""
        with connect(self.settings) as connection:
            empty(connection)

    def copy_floor(self, rows: Sequence[tuple[Any, ...]], measurements: Sequence[str] = DEFAULT) -> float:
        """Rows per second of binary COPY into the same table as psycopg's users write it."""
        self.truncate()
        started = time.monotonic()
        with connect(self.settings) as connection:
            for at in range(0, len(rows), BATCH):
                with connection.transaction(), connection.cursor() as cursor:
                    copy_rows(cursor, "sensor_data", rows[at : at + BATCH], measurements)
        return len(rows) / (time.monotonic() - started)

    def encoded_floor(self, pieces: Sequence[bytes], streams: int = 1) -> float:
        """Rows per second of COPY of bytes that are there already, over this many connections."""
        self.truncate()

        def write(connection: psycopg.Connection, mine: Iterable[bytes]) -> None:
            for piece in mine:
                with connection.transaction(), connection.cursor() as cursor, cursor.copy(COPY) as into:
                    into.write(piece)

        connections = [connect(self.settings) for _ in range(streams)]
        writers = [
            threading.Thread(target=write, args=(connection, pieces[number::streams]))
            for number, connection in enumerate(connections)
        ]
        started = time.monotonic()
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        seconds = time.monotonic() - started
        for connection in connections:
            connection.close()
        return len(pieces) * BATCH / seconds

    def upsert_floor(self, rows: Sequence[Row]) -> float:
        """Rows per second of COPY to a temporary table and INSERT ... ON CONFLICT, onto rows that exist."""
        started = time.monotonic()
        with connect(self.settings) as connection:
            for at in range(0, len(rows), BATCH):
                with connection.transaction(), connection.cursor() as cursor:
                    cursor.execute("CREATE TEMPORARY TABLE floor (LIKE sensor_data) ON COMMIT DROP")
                    copy_rows(cursor, "floor", rows[at : at + BATCH])
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
        self._topics += 1
        names = {"kafka_topic": f"bench_{os.getpid()}_{self._topics}", "kafka_group": f"g{time.time_ns()}"}
        changed = self.settings.model_copy(update={**names, **changes})
        create_topics(AdminClient(client_settings(changed, "bench")), changed, shutdown=Shutdown())
        return changed

    def fill(self, settings: Settings, rows: Iterable[tuple[Any, ...]], every_bad: int = 0) -> None:
        """Put readings on the topic; each ``every_bad``-th message is malformed."""
        producer = Producer(
            client_settings(settings, "bench")
            | {"linger.ms": 50, "compression.type": "lz4", "queue.buffering.max.messages": 1_000_000}
        )
        make: Any = reading_type(settings.measurements)
        for number, (moment, sensor, *values) in enumerate(rows):
            value = encode(make(sensor, moment, *values))
            if every_bad and number % every_bad == 0:
                value = value[:-2]
            while True:
                try:
                    producer.produce(settings.kafka_topic, key=sensor, value=value)
                    break
                except BufferError:
                    producer.poll(0.1)
        producer.flush()

    def start(self, settings: Settings, *arguments: str) -> Service:
        """One of the project's commands as a process."""
        path = self.directory / f"{arguments[0]}-{time.time_ns()}.log"
        return Service(settings, *arguments, log_path=path, begin=Fresh)

    def drain(self, settings: Settings, consumers: int = 1) -> Drained:
        """Consume a filled topic to its end with real processes."""
        group = settings.model_copy(update={"kafka_group": f"g{time.time_ns()}"})
        services = [self.start(group, "consume", "--until-caught-up") for _ in range(consumers)]
        rss = peak_rss(services)
        assigned = [moment_of(event) for service in services for event in service.events("partitions_assigned")]
        written = [moment_of(event) for service in services for event in service.events("batch_written")]
        totals = [service.events("stopped")[0] for service in services]
        handled = sum(
            int(total[name]) for total in totals for name in ("inserted", "updated", "unchanged", "dead_letters")
        )
        cpu = sum(float(total["cpu_s"]) for total in totals)
        seconds = (max(written) - min(assigned)).total_seconds()
        return Drained(handled / seconds, cpu * 1e6 / handled, rss)

    @contextmanager
    def running(self, settings: Settings, *commands: str) -> Iterator[list[Service]]:
        """Services that run while the block does."""
        services = [self.start(settings, command) for command in commands]
        try:
            services[0].wait_for("partitions_assigned")
            if "etl" in commands:
                services[commands.index("etl")].wait_for("leading")
            yield services
        finally:
            for service in services:
                service.stop()

    def wait_until_complete(self, rows: int, what: str) -> None:
        """Until all readings are stored and summarised, and nothing is queued."""

        def is_complete() -> bool:
            if is_queued(connection):
                return False
            row = connection.execute("SELECT sum(reading_count) FROM humidity_summary").fetchone()
            return row is not None and row[0] == rows

        with connect(self.settings) as connection:  # one for all looks: to connect takes longer than to look
            wait_until(is_complete, what, PATIENCE_S)

    def parquet(self, history: History) -> Path:
        """The file of these readings, written once."""
        path = self.directory / f"{history.count}-{history.every_s:g}.parquet"
        if not path.exists():
            history.write_parquet(path)
        return path


def source_of(path: Path) -> dict[str, str]:
    """Settings that make the producer read ``path``."""
    return {
        "parquet_url": str(path),
        "data_feature_date": "time",
        "data_feature_temp": "temperature",
        "data_feature_humid": "humidity",
        "data_feature_sensor": "sensor",
    }


def copy_rows(
    cursor: psycopg.Cursor, table: str, rows: Iterable[tuple[Any, ...]], measurements: Sequence[str] = DEFAULT
) -> None:
    """Binary COPY, row by row."""
    columns = ", ".join(("time", "sensor_id", *measurements))
    with cursor.copy(f"COPY {table} ({columns}) FROM STDIN (FORMAT binary)") as into:
        into.set_types(("timestamptz", "text", *["float8"] * len(measurements)))
        for row in rows:
            into.write_row(row)


def is_queued(connection: psycopg.Connection) -> bool:
    """Whether etl has something to do."""
    row = connection.execute("SELECT EXISTS (SELECT FROM summary_refresh_queue)").fetchone()
    return row is not None and bool(row[0])


def disk_mb(connection: psycopg.Connection) -> dict[str, float]:
    """MB of the raw readings, of the aggregates and of the summaries, indexes included."""
    summaries = " + ".join(f"pg_total_relation_size('{metric}_summary')" for metric in MEASUREMENTS)
    row = connection.execute(
        "SELECT hypertable_size('sensor_data'), (SELECT coalesce(sum(hypertable_size("
        " format('%I.%I', materialization_hypertable_schema, materialization_hypertable_name)::regclass)), 0)"
        f" FROM timescaledb_information.continuous_aggregates), {summaries}"
    ).fetchone()
    assert row is not None
    return dict(zip(("raw", "aggregates", "summaries"), (float(size) / 1e6 for size in row), strict=True))


def moment_of(event: dict[str, object]) -> datetime:
    """When a log line was written."""
    return datetime.fromisoformat(str(event["time"]))


def peak_rss(services: Sequence[Service]) -> float:
    """Wait for the processes to end, as they should; the largest resident set that one of them had, in MB."""
    peak = 0.0
    pause = threading.Event()
    while any(service.process.poll() is None for service in services):
        peak = max(peak, *map(rss_mb, services))
        pause.wait(0.05)
    for service in services:
        if service.process.returncode:
            raise AssertionError(service.log_path.read_text(encoding="utf-8")[-2000:])
    return peak


def rss_mb(service: Service) -> float:
    """The resident set of a process now, 0 when it has ended."""
    try:
        return float(psutil.Process(service.process.pid).memory_info().rss) / 1e6
    except psutil.NoSuchProcess:
        return 0.0


def describe(settings: Settings, scale: Scale) -> str:
    """The date, the machine and the servers, for whoever compares two runs."""
    with connect(settings) as connection:
        row = connection.execute(
            "SELECT current_setting('server_version'), extversion, current_setting('shared_buffers')"
            " FROM pg_extension WHERE extname = 'timescaledb'"
        ).fetchone()
    assert row is not None
    postgresql, timescaledb, buffers = row
    kafka = KAFKA_VERSION if scale.kind == "embedded" else os.environ.get("BENCH_KAFKA", "of yours")
    memory = round(psutil.virtual_memory().total / 1e9)
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {scale.kind} PostgreSQL {postgresql.split()[0]} (shared_buffers {buffers})"
        f" with TimescaleDB {timescaledb}, Kafka {kafka}, Python {platform.python_version()};"
        f" {os.cpu_count()} cores ({platform.machine()}, {memory} GB) for servers and services together;"
        f" {scale.rows:,} readings, end to end {scale.large:,}"
    )


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
