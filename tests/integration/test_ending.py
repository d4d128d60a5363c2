"""How commands end in a shell: pipes that are closed, disks that are full, Ctrl-C, faults that nobody foresaw."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fix_stack import ROOT, free_port
from tests.measured import ALL_SETTINGS

# As in a shell: what is printed stays in a buffer for a while.
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
START = "import sys; from services.core.ending import run_to_its_end as run; from services.core.errors import *; "
PRINT_MUCH = START + "sys.exit(run(lambda: [print('x' * 79) for _ in range(10_000)] and 0))"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run(command: list[str] | str, directory: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    plain = {name: value for name, value in BUFFERED.items() if name.lower() not in ALL_SETTINGS.model_fields}
    return subprocess.run(
        command,
        shell=isinstance(command, str),
        cwd=directory,
        env=plain | {"PYTHONPATH": str(ROOT)} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def cli(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "services.cli", *arguments]


@pytest.mark.parametrize("code", [PRINT_MUCH, START + "sys.exit(run(lambda: print('x') or sys.stdin.read() and 0))"])
def test_a_reader_that_has_seen_enough_is_no_fault(code: str) -> None:
    """Whether it goes while something is printed, or before the little that was is flushed."""
    pipe = subprocess.PIPE
    with subprocess.Popen(python(code), cwd=ROOT, env=BUFFERED, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.write(b"go on")
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    "code", [PRINT_MUCH, START + "sys.exit(run(lambda: print('little') or 0))", START + "run(lambda: print('x'))"]
)
def test_a_full_disk_is_one_line(code: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            python(code), cwd=ROOT, env=BUFFERED, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
        assert done.stderr.splitlines() == [
            "error: No space left on device (LOG_LEVEL=DEBUG shows where it comes from)"
        ]
        assert done.returncode == (0 if "exit" not in code else 1)
        silent = subprocess.run(python(code), cwd=ROOT, env=BUFFERED, stdout=full, stderr=full, check=False)
    assert silent.returncode == done.returncode


def test_without_an_output_nothing_is_missed() -> None:
    done = run(f"{sys.executable} -m services.cli demo --down >&-")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        ("KeyError('x')", r"error: KeyError: 'x' (an unforeseen fault in "),
        ("OSError(30, 'Read-only file system', '/a/b')", "error: /a/b: Read-only file system (LOG_LEVEL=DEBUG shows"),
        ("BrokenPipeError(32, 'Broken pipe')", "error: Broken pipe (LOG_LEVEL=DEBUG shows"),  # another one than stdout
        ("PermanentError('a\\n\\x1b[2Jb')", "error: a\\n\\x1b[2Jb"),
        ("PermanentError('\\udcff')", "error: \\udcff"),
    ],
)
def test_a_fault_is_one_line(raised: str, line: str) -> None:
    done = run(python(START + f"\ndef f(): raise {raised}\nsys.exit(run(f))"))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


def test_the_trace_of_a_fault_is_shown_when_asked_for(tmp_path: Path) -> None:
    """Here of a module of ours that is broken."""
    (tmp_path / "broken.py").write_text(
        "import services.producer.generate as it\nfrom services import cli\nimport sys\nit.generate = None\n"
        "sys.exit(cli.main(['generate', 'out.parquet']))",
        encoding="utf-8",
    )
    command = [sys.executable, "broken.py"]
    done = run(command, tmp_path)
    assert done.stderr.startswith(
        "error: TypeError: 'NoneType' object is not callable (an unforeseen fault in cli.py, "
    )
    assert done.stderr.count("\n") == 1
    shown = run(command, tmp_path, LOG_LEVEL="DEBUG").stderr
    assert "Traceback" in shown
    assert "run_generate" in shown


def test_ctrl_c_before_anything_has_begun_ends_in_silence() -> None:
    code = START + "import signal; run(lambda: print('begun', flush=True) or signal.pause())"
    with subprocess.Popen(python(code), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == ""
        assert process.wait(30) == -signal.SIGINT  # which shells call 130


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("command", "server", "port"), [("consume", "Kafka", "KAFKA_PORT"), ("etl", "PostgreSQL", "POSTGRE_PORT")]
)
def test_a_service_that_waits_for_a_server_says_so_and_can_be_stopped(
    command: str, server: str, port: str, number: signal.Signals
) -> None:
    environment = os.environ | {port: str(free_port()), "STARTUP_TIMEOUT_SECONDS": "60", "LOG_FORMAT": "text"}
    with subprocess.Popen(cli(command), cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        waiting = process.stderr.readline()
        assert f" waiting_for_{'kafka' if server == 'Kafka' else 'database'} address=" in waiting
        process.send_signal(number)
        rest = process.stderr.read().splitlines()
        assert process.wait(30) == 130
    assert [line for line in rest if line.startswith("error: ")] == rest[-1:]
    assert rest[-1].startswith(f"error: stopped while {server} did not answer at ")


@pytest.mark.parametrize("arguments", [("demo", "--down"), ("local", "down")])
def test_what_runs_can_be_stopped_with_wrong_settings_too(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / ".env").write_text("KAFKA_PORT=x\nno setting at all\n", encoding="utf-8")
    done = run(cli(*arguments), tmp_path, TEMPERATURE_INTERVAL="0", LOG_LEVEL="loud")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_setting_that_a_command_does_not_need_may_be_wrong(tmp_path: Path) -> None:
    arguments = cli("generate", "a.parquet", "--sensors", "1", "--days", "1")
    done = run(arguments, tmp_path, TEMPERATURE_INTERVAL="0", KAFKA_PORT="x")
    assert (done.returncode, done.stderr) == (0, "")
    done = run(arguments, tmp_path, DATA_FEATURE_DATE="")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_a_misspelt_setting_is_one_warning(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("KAFKA_TOPICS=x\n", encoding="utf-8")
    done = run(cli("generate", "a.parquet", "--days", "1"), tmp_path, TEMPERATUR_INTERVAL="5", LOG_FORMAT="text")
    assert done.returncode == 0
    assert [line.partition(" WARNING settings unknown_setting ")[2] for line in done.stderr.splitlines()] == [
        "name=TEMPERATUR_INTERVAL source=environment did_you_mean=TEMPERATURE_INTERVAL",
        "name=KAFKA_TOPICS source=.env did_you_mean=KAFKA_TOPIC",
    ]


@pytest.mark.parametrize("arguments", [("demo",), ("local", "up"), ("local", "up", "--tls")])
def test_a_directory_that_cannot_be_written_is_one_line(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / ".local").write_text("", encoding="utf-8")
    done = run(cli(*arguments), tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path}/.local cannot be written (")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("consume", "--until"), "unrecognized arguments: --until"),
        (("generate",), "the following arguments are required: OUT"),
        (("local", "sideways"), "argument action: invalid choice: 'sideways'"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments: tuple[str, ...], line: str) -> None:
    done = run(cli(*arguments))
    assert done.returncode == 2
    (said,) = done.stderr.splitlines()
    assert said.startswith(f"error: {line}")
    assert "--help" in said
