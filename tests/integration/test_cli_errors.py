"""What a user sees when something is wrong: one line, and the exit code that says whose turn it is."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from services.core.config import Settings
from tests.fix_services import run_cli
from tests.fix_stack import ROOT, free_port

MISTAKE = 2
PERMANENT = 1


def error_line(done: subprocess.CompletedProcess[str], exit_code: int) -> str:
    """The one line; nothing is on stdout, and no traceback anywhere."""
    assert done.returncode == exit_code, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if not line.startswith('{"time"')]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


def run(settings: Settings, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_cli(settings, *arguments, **({"STARTUP_TIMEOUT_SECONDS": "1", "LOG_LEVEL": "WARNING"} | environment))


@pytest.mark.parametrize("command", ["produce", "consume", "etl", "status", "demo"])
def test_a_wrong_setting_says_what_is_allowed(settings: Settings, command: str) -> None:
    line = error_line(run(settings, command, TEMPERATURE_INTERVAL="abc"), MISTAKE)
    what = "width of a temperature interval in whole minutes: 1 to 527040"
    assert line == f"TEMPERATURE_INTERVAL=abc is not allowed ({what})"


def test_several_wrong_settings_are_one_line(settings: Settings) -> None:
    line = error_line(run(settings, "etl", POSTGRE_PORT="70000", KAFKA_PORT="x"), MISTAKE)
    assert line.startswith("POSTGRE_PORT=70000 is not allowed (port of PostgreSQL: 1 to 65535); KAFKA_PORT=x is not")


@pytest.mark.parametrize("command", ["consume", "etl"])
def test_a_wrong_password_names_the_setting_and_is_not_shown(settings: Settings, command: str) -> None:
    line = error_line(run(settings, command, POSTGRE_PASSWORD="hunter2"), MISTAKE)
    assert line.startswith(f"PostgreSQL at {settings.postgre_host}:{settings.postgre_port}/")
    assert "POSTGRE_PASSWORD" in line
    assert "hunter2" not in line


@pytest.mark.parametrize("command", ["produce", "consume"])
def test_a_kafka_that_does_not_answer_is_one_line(settings: Settings, command: str) -> None:
    port = free_port()
    line = error_line(run(settings, command, KAFKA_PORT=str(port)), MISTAKE)
    assert line == (
        f"Kafka does not answer at {settings.kafka_host}:{port} (KAFKA_HOST, KAFKA_PORT): "
        "start it, or correct the address"
    )


@pytest.mark.parametrize("command", ["consume", "etl"])
def test_a_postgresql_that_does_not_answer_is_one_line(settings: Settings, command: str) -> None:
    port = free_port()
    line = error_line(run(settings, command, POSTGRE_PORT=str(port)), MISTAKE)
    assert line == (
        f"PostgreSQL does not answer at {settings.postgre_host}:{port}/{settings.postgre_dbname} "
        "(POSTGRE_HOST, POSTGRE_PORT): start it, or correct the address"
    )


@pytest.mark.parametrize("command", ["produce", "consume", "etl"])
def test_a_metrics_port_that_is_taken_is_one_line(settings: Settings, command: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = error_line(run(settings, command, METRICS_PORT=str(port)), MISTAKE)
    assert line == (
        f"METRICS_HOST=127.0.0.1, METRICS_PORT={port}: cannot listen there: Address already in use "
        "(0 turns the metrics off)"
    )


def test_a_metrics_host_that_does_not_exist_is_one_line(settings: Settings) -> None:
    line = error_line(run(settings, "etl", METRICS_HOST="nowhere.invalid", METRICS_PORT="8000"), MISTAKE)
    assert line.startswith("METRICS_HOST=nowhere.invalid, METRICS_PORT=8000: cannot listen there: ")


def test_tls_that_postgresql_does_not_speak_is_one_line(settings: Settings) -> None:
    line = error_line(run(settings, "etl", POSTGRE_SSLMODE="require"), MISTAKE)
    assert "server does not support SSL, but SSL was required (check POSTGRE_SSLMODE, " in line


def test_a_wrong_speed_says_how_to_write_it(settings: Settings) -> None:
    line = error_line(run(settings, "produce", "--speed", "60"), MISTAKE)
    assert line.startswith("--speed=60 is not allowed (how many times faster than the readings' own times")


def test_settings_that_exclude_each_other_are_refused(settings: Settings) -> None:
    line = error_line(run(settings, "produce", "--speed", "60x", PRODUCER_RATE="100"), MISTAKE)
    assert (
        line == "PRODUCER_RATE=100 and --speed cannot be combined: remove one of them (PRODUCER_RATE=0 means no limit)"
    )
    line = error_line(run(settings, "produce", "--resend", PRODUCER_WATCH_SECONDS="5"), MISTAKE)
    assert line.startswith("PRODUCER_WATCH_SECONDS=5 and --resend cannot be combined")


def test_a_watched_directory_must_exist(settings: Settings) -> None:
    line = error_line(run(settings, "produce", PARQUET_URL="/no/such", PRODUCER_WATCH_SECONDS="5"), MISTAKE)
    assert line.startswith("PARQUET_URL=/no/such: there is no such file or directory")


def test_a_host_that_does_not_exist_is_one_line(settings: Settings) -> None:
    line = error_line(run(settings, "etl", POSTGRE_HOST="nowhere.invalid"), MISTAKE)
    assert line.startswith("PostgreSQL does not answer at nowhere.invalid:")
    assert line.endswith(": there is no host with this name")
    line = error_line(run(settings, "produce", KAFKA_HOST="nowhere.invalid"), MISTAKE)
    assert line.startswith("Kafka does not answer at nowhere.invalid:")
    assert line.endswith(": there is no host with this name")


def test_another_service_on_the_port_is_recognised(settings: Settings) -> None:
    line = error_line(run(settings, "etl", POSTGRE_PORT=str(settings.kafka_port)), MISTAKE)
    assert line.startswith("PostgreSQL does not answer at ")


def test_a_database_that_does_not_exist_is_named(settings: Settings) -> None:
    line = error_line(run(settings, "etl", POSTGRE_DBNAME="nothing_here"), MISTAKE)
    assert "nothing_here" in line
    assert "POSTGRE_DBNAME" in line


@pytest.mark.usefixtures("no_tables")
@pytest.mark.parametrize("arguments", [["consume"], ["consume", "--until-caught-up"], ["etl"], ["etl", "--once"]])
def test_missing_tables_are_permanent(settings: Settings, arguments: list[str]) -> None:
    """Before any message comes."""
    line = error_line(run(settings, *arguments), PERMANENT)
    assert line == (
        f"the database {settings.postgre_host}:{settings.postgre_port}/{settings.postgre_dbname} does not have the "
        "tables yet: run sensor-pipeline migrate (or alembic upgrade head) as a role that may"
    )


def test_a_command_that_does_not_exist_is_a_mistake() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "services.cli", "consum"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == MISTAKE
    assert "invalid choice: 'consum'" in done.stderr
