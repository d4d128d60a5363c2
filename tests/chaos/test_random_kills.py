"""Kill everything at random moments; afterwards every row and every summary row is right.

A run is decided by its seed: the readings, which process dies and when. ``make chaos RUNS=5 SEED=7`` runs more.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from services.core.config import Settings
from services.core.database import connect
from services.core.errors import TransientError
from services.core.offsets import group_lag
from services.local.check import Columns, differences_in_readings, differences_in_summary, read_rows
from services.local.stack import Stack
from tests.fix_services import PATIENCE_S, read_topic, wait_until
from tests.fix_stack import ROOT, as_environment, make_stack, stack_settings, upgrade

KILLS = 24
FILES = 12
ROWS_A_FILE = 2_500
SENSORS = 25
COLUMNS = Columns("time", "temperature", "humidity", "sensor")
# A server takes seconds to come back, so the services are killed more often.
TARGETS = {"consumer-0": 6, "consumer-1": 4, "etl-0": 5, "etl-1": 3, "producer": 5, "timescaledb": 4, "kafka": 2}
COMMANDS = {"consumer": "consume", "etl": "etl", "producer": "produce"}
RUNS = int(os.environ.get("CHAOS_RUNS", "1"))
# Every worker of a parallel run collects the same tests, so they must draw the same seed.
SEED = int(os.environ.get("CHAOS_SEED", "0")) or random.Random(  # noqa: S311 - a seed, no secret
    os.environ.get("PYTEST_XDIST_TESTRUNUID") or os.urandom(8)
).randrange(1, 10**6)


class Chaos:
    """The services of one run, each started again whenever it ends, as a service manager would."""

    def __init__(self, settings: Settings, stack: Stack, directory: Path, seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311 - reproducible, not secret
        self.settings = settings
        self.stack = stack
        self.directory = directory
        self.source = directory / "source"
        self.kills: Counter[str] = Counter()
        self.files: list[Path] = []
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._pause = threading.Event()
        self._start_time = datetime(2024, 1, 1, tzinfo=UTC)

    def add_file(self) -> None:
        """A file of readings: mostly new, some repeated, some corrected, some late, some incomplete."""
        number = len(self.files)
        times, sensors, temperatures, humidities = [], [], [], []
        for _ in range(ROWS_A_FILE):
            minute = self.random.randrange(number * 200, number * 200 + 260)
            if self.random.random() < 0.03:
                minute = self.random.randrange(0, max(1, number * 200))
            times.append(self._start_time + timedelta(minutes=minute))
            sensors.append(f"s{self.random.randrange(SENSORS):02d}")
            temperatures.append(round(self.random.gauss(20, 5), 2) if self.random.random() < 0.9 else None)
            humidities.append(round(self.random.gauss(50, 9), 2) if self.random.random() < 0.9 else None)
        table = pa.table(
            {"time": times, "sensor": sensors, "temperature": temperatures, "humidity": humidities},
            schema=pa.schema(
                [
                    ("time", pa.timestamp("us", "UTC")),
                    ("sensor", pa.string()),
                    ("temperature", pa.float64()),
                    ("humidity", pa.float64()),
                ]
            ),
        )
        path = self.source / f"{number:03d}.parquet"
        hidden = self.source / f".{path.name}"
        pq.write_table(table, hidden, row_group_size=500)
        hidden.rename(path)
        self.files.append(path)

    def revive(self) -> None:
        """Start every service that is not running."""
        for name in TARGETS:
            service = name.split("-")[0]
            if service not in COMMANDS:
                continue
            process = self.processes.get(name)
            if process is None or process.poll() is not None:
                with (self.directory / f"{name}.log").open("ab") as log:
                    self.processes[name] = subprocess.Popen(
                        [sys.executable, "-m", "services.cli", COMMANDS[service]],
                        cwd=ROOT,
                        env=os.environ | as_environment(self.settings),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                    )

    def kill(self, name: str) -> None:
        """SIGKILL a service, or a server, which is then started again."""
        self.kills[name] += 1
        if name in ("kafka", "timescaledb"):
            server = getattr(self.stack, name)
            server.kill()
            self.pause(0.0, 1.0)
            server.start()
            server.wait_ready()
        else:
            process = self.processes[name]
            process.kill()
            process.wait(PATIENCE_S)

    def pause(self, least_s: float, most_s: float) -> None:
        """Let the run go on for a random time."""
        self._pause.wait(self.random.uniform(least_s, most_s))

    def wait_until_done(self) -> None:
        """Until all files are sent, the group has no lag and nothing is queued."""

        def is_done() -> bool:
            self.revive()
            try:
                with connect(self.settings) as connection:
                    return self._is_done(connection)
            except TransientError:
                return False

        wait_until(is_done, "the pipeline caught up", within_s=90)

    def _is_done(self, connection: psycopg.Connection) -> bool:
        keys = len(read_rows(self.files, COLUMNS))
        row = connection.execute(
            "SELECT (SELECT count(*) FROM sensor_data), (SELECT count(*) FROM summary_refresh_queue)"
        ).fetchone()
        if row != (keys, 0):
            return False
        # All keys are there; the last corrections are only when the group has committed the topic's end.
        probe = subprocess.run(
            [sys.executable, "-m", "services.cli", "produce"],
            cwd=ROOT,
            env=os.environ | as_environment(self.settings) | {"LOG_FORMAT": "json"},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        return probe.returncode == 0 and group_lag(self.settings) == 0

    def stop(self) -> None:
        """End every service."""
        for process in self.processes.values():
            process.kill()
            process.wait(PATIENCE_S)


@pytest.mark.parametrize("seed", [SEED + run for run in range(RUNS)])
def test_nothing_is_lost_or_doubled_whatever_dies(
    seed: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    with make_stack(tmp_path / "stack") as stack:
        settings = stack_settings(stack).model_copy(
            update={
                "parquet_url": str(tmp_path / "source"),
                # Each killed consumer keeps its partitions for so long, and a broker killed meanwhile starts it anew.
                "kafka_session_timeout_ms": 10_000,
                "data_feature_date": COLUMNS.time,
                "data_feature_temp": COLUMNS.temperature,
                "data_feature_humid": COLUMNS.humidity,
                "data_feature_sensor": COLUMNS.sensor,
                "consumer_batch_rows": 400,
                "consumer_batch_seconds": 0.2,
                "etl_poll_seconds": 0.2,
                "kafka_partitions": 4,
                "producer_transaction_rows": 1_000,
            }
        )
        upgrade(settings)
        chaos = Chaos(settings, stack, tmp_path, seed)
        chaos.source.mkdir()
        chaos.add_file()
        chaos.revive()
        try:
            for kill in range(KILLS):
                chaos.pause(0.3, 2.0)
                chaos.revive()
                if kill * FILES >= len(chaos.files) * KILLS:
                    chaos.add_file()
                chaos.pause(0.0, 0.5)
                chaos.kill(chaos.random.choices(list(TARGETS), list(TARGETS.values()))[0])
            while len(chaos.files) < FILES:
                chaos.add_file()
            chaos.wait_until_done()
        finally:
            chaos.stop()
        rows = read_rows(chaos.files, COLUMNS)
        messages = read_topic(settings, settings.kafka_topic)
        with connect(settings) as connection:
            found = [
                *differences_in_readings(connection, rows),
                *differences_in_summary(connection, rows, "temperature", settings.temperature_interval),
                *differences_in_summary(connection, rows, "humidity", settings.humidity_interval),
            ]
        sent = sum(
            temperature is not None or humidity is not None
            for file in chaos.files
            for temperature, humidity in zip(
                *(pq.read_table(file)[name].to_pylist() for name in ("temperature", "humidity")), strict=True
            )
        )
        record_property(
            "summary",
            f"seed {seed}: {chaos.kills.total()} kills {dict(sorted(chaos.kills.items()))}, "
            f"{len(messages)} messages of {sent} rows, {len(rows)} readings, {len(found)} differences",
        )
        assert len(messages) == sent, f"seed {seed}: the topic holds rows twice or not at all"
        assert not found, f"seed {seed}: {found[:5]}"
