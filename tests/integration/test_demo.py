"""The demo as a user runs it: the whole pipeline over the real readings, and its own check."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from services.core.database import connect
from services.local.report import fetch
from services.local.security import secure
from services.local.stack import Stack
from services.local.supervisor import PidFile
from tests.fix_services import wait_until
from tests.fix_stack import ROOT, free_port
from tests.measured import ALL_SETTINGS, make_settings

READINGS = "26,114"  # of 26,115 rows, one of which has neither value


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A directory like a fresh clone, but with what was downloaded already."""
    for name in ("services", "migrations", "data", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".local").mkdir()
    (ROOT / ".local" / "runtime").mkdir(parents=True, exist_ok=True)
    (tmp_path / ".local" / "runtime").symlink_to(ROOT / ".local" / "runtime")
    return tmp_path


@pytest.fixture
def demo(workspace: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[bytes]]:
    """A demo that has just been started, with options if there are; its output goes to ``demo.log``."""
    environment = {name: value for name, value in os.environ.items() if name.lower() not in ALL_SETTINGS.model_fields}
    environment |= {"KAFKA_PORT": str(free_port()), "POSTGRE_PORT": str(free_port())}
    environment["KAFKA_SESSION_TIMEOUT_MS"] = "6000"  # a killed consumer is missed so much sooner
    command = [sys.executable, "-m", "services.cli", "demo", *getattr(request, "param", ())]
    with (workspace / "demo.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=workspace, env=environment, stdout=log, stderr=subprocess.STDOUT)
    yield process
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        process.wait(30)
    left = [found.pid for found in psutil.process_iter(["cwd"]) if found.info["cwd"] == str(workspace)]
    assert left == [], "the demo left processes behind"


def output(workspace: Path) -> str:
    return (workspace / "demo.log").read_text(encoding="utf-8")


def test_the_demo_ends_with_every_row_right_even_if_the_consumer_is_killed(
    workspace: Path, demo: subprocess.Popen[bytes]
) -> None:
    wait_until(lambda: "readings stored" in output(workspace), "the first readings", timeout_s=60)
    refused(workspace, f"another demo is running in {workspace}/.local: wait until it ends")
    consumer = PidFile.read(workspace / ".local" / "demo" / "consumer.pid")
    assert consumer is not None
    os.kill(consumer.server.pid, signal.SIGKILL)
    assert demo.wait(150) == 0, output(workspace)
    lines = output(workspace).splitlines()
    assert "consumer was killed by SIGKILL; restarting it" in lines
    assert_right(lines)


def refused(workspace: Path, line: str, *options: str) -> None:
    """Another demo ends with this line, and has done nothing."""
    command = [sys.executable, "-m", "services.cli", "demo", *options]
    done = subprocess.run(command, cwd=workspace, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith(f"error: {line}")


def test_elsewhere_the_demo_says_at_once_that_it_lacks_its_file(tmp_path: Path) -> None:
    (tmp_path / "services").symlink_to(ROOT / "services")
    refused(tmp_path, f"PARQUET_URL=data/measurements.parquet: there is no such file in {tmp_path}")
    assert not (tmp_path / ".local" / "runtime").exists()


@pytest.mark.slow
@pytest.mark.parametrize("demo", [("--tls", "--keep")], indirect=True)
def test_the_demo_with_tls_and_sasl_is_kept_and_looked_at_while_its_database_dies(
    workspace: Path, demo: subprocess.Popen[bytes], stop_kept: None
) -> None:
    assert demo.wait(150) == 0, output(workspace)
    lines = output(workspace).splitlines()
    assert "starting Kafka and TimescaleDB with TLS" in lines
    assert_right(lines)
    directory = workspace / ".local" / "demo"
    assert "PLAINTEXT" not in (directory / "kafka" / "server.properties").read_text(encoding="utf-8")

    (psql,) = [line for line in lines if line.startswith("  PostgreSQL ")]
    assert "PGPASSFILE=.local/demo/pgpass psql " in psql
    assert (directory / "pgpass").stat().st_mode & 0o777 == 0o600
    assert (directory / "pgpass").read_text(encoding="utf-8") == "*:*:*:*:postgres\n"
    for option in ((), ("--tls",)):
        refused(workspace, "a demo was left running, and a new one would erase its data: stop it first", *option)

    kept = Kept(directory, lines)
    kept.assert_all_agree()
    database = PidFile.read(directory / "timescaledb.pid")
    assert database is not None
    os.kill(database.server.pid, signal.SIGKILL)
    wait_until(lambda: kept.ready("consumer") == kept.ready("etl") == 503, "two services that are not ready", 10)
    code, state = kept.status()
    assert code == 1
    assert "does not answer" in state["database"]["error"]
    assert state["kafka"]["lag"] == 0
    kept.stack.up(detach=True)
    wait_until(lambda: kept.ready("consumer") == kept.ready("etl") == 200, "two services that are ready again", 10)
    kept.assert_all_agree()
    kept.stack.down()


@pytest.fixture
def stop_kept(workspace: Path, demo: subprocess.Popen[bytes]) -> Iterator[None]:
    """Stops a demo that was left running, in the end."""
    yield
    demo.wait(150)
    command = [sys.executable, "-m", "services.cli", "demo", "--down"]
    subprocess.run(command, cwd=workspace, check=True, capture_output=True)


class Kept:
    """A demo that is left running, as its last lines say how to look at it."""

    def __init__(self, directory: Path, lines: list[str]) -> None:
        pairs = (line.split("=", 1) for line in (directory / "client.env").read_text(encoding="utf-8").splitlines())
        self.environment = {name: shlex.split(value)[0] for name, value in pairs}
        self._urls = {
            words[2].strip("()"): words[1] for line in lines if (words := line.split()) and words[0] == "metrics"
        }
        values: dict[str, Any] = {name.lower(): value for name, value in self.environment.items()}
        self.settings = make_settings(**values)
        security = secure(directory / "tls", self.settings)
        self.stack = Stack(directory, self.settings, security)

    def status(self) -> tuple[int, dict[str, Any]]:
        """Exit code and what ``status --json`` prints."""
        command = [sys.executable, "-m", "services.cli", "status", "--json"]
        done = subprocess.run(command, env=os.environ | self.environment, capture_output=True, check=False)
        return done.returncode, json.loads(done.stdout)

    def ready(self, service: str) -> int:
        """HTTP status of /readyz."""
        try:
            url = self._urls[service].replace("/metrics", "/readyz")
            with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - ours
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    def metrics(self, service: str) -> dict[str, float]:
        """Each sample by name and labels."""
        with urllib.request.urlopen(self._urls[service], timeout=5) as answer:  # noqa: S310 - ours
            lines = answer.read().decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    def assert_all_agree(self) -> None:
        """The command status and both services' metrics say what the database says."""
        with connect(self.settings) as connection:
            stored, temperature, humidity, queued = (
                fetch(connection, table)
                for table in ("sensor_data", "temperature_summary", "humidity_summary", "summary_refresh_queue")
            )
        code, state = self.status()
        assert (code, state["problems"]) == (0, [])
        tables = state["database"]["tables"]
        assert tables["readings"]["rows"] == {"count": stored, "exact": True}
        assert [summary["rows"]["count"] for summary in tables["summaries"]] == [temperature, humidity]
        assert tables["queue_rows"] == queued == 0
        consumer, etl = self.metrics("consumer"), self.metrics("etl")
        assert sum(consumer[f'sensor_consumer_lag_messages{{partition="{number}"}}'] for number in range(6)) == 0
        assert consumer['sensor_readings_stored_total{result="inserted"}'] == stored
        assert etl["sensor_refresh_queue_rows"] == etl["sensor_freshness_seconds"] == 0
        assert state["kafka"]["lag"] == tables["freshness_seconds"] == 0


def assert_right(lines: list[str]) -> None:
    assert ["sensor_data", READINGS, "rows"] in [line.split() for line in lines]
    assert [line for line in lines if line.startswith("check: ")] == [
        "check: every row is right (recomputed from data/measurements.parquet without our SQL)"
    ]
