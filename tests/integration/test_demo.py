"""The demo as a user runs it: the whole pipeline over the real readings, and its own check."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from services.core.config import Settings
from tests.fix_services import wait_until
from tests.fix_stack import ROOT, free_port

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
    environment = {name: value for name, value in os.environ.items() if name.lower() not in Settings.model_fields}
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
    wait_until(lambda: "readings stored" in output(workspace), "the first readings", within_s=60)
    pid = int((workspace / ".local" / "demo" / "consumer.pid").read_text(encoding="utf-8").split()[0])
    os.kill(pid, signal.SIGKILL)
    assert demo.wait(150) == 0, output(workspace)
    lines = output(workspace).splitlines()
    assert "consumer was killed by SIGKILL; starting it again" in lines
    assert_right(lines)


@pytest.mark.parametrize("demo", [("--tls",)], indirect=True)
def test_the_demo_with_tls_and_sasl(workspace: Path, demo: subprocess.Popen[bytes]) -> None:
    assert demo.wait(150) == 0, output(workspace)
    lines = output(workspace).splitlines()
    assert "starting Kafka and TimescaleDB with TLS" in lines
    assert_right(lines)
    properties = (workspace / ".local" / "demo" / "kafka" / "server.properties").read_text(encoding="utf-8")
    assert "PLAINTEXT" not in properties


def assert_right(lines: list[str]) -> None:
    assert ["sensor_data", READINGS, "rows"] in [line.split() for line in lines]
    assert [line for line in lines if line.startswith("check: ")] == [
        "check: every row is right (recomputed from data/measurements.parquet without our SQL)"
    ]
