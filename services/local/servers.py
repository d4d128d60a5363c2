"""A process of this machine that is started, awaited, stopped, killed, and started again on the same data.

It keeps its data, log and pid file below the stack's directory, and runs under a supervisor (supervisor.py) that stops
it when its starter dies. What runs is in kafka.py, timescaledb.py and demo.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar, Literal

import psutil

from services.core.config import Settings
from services.core.errors import ConfigurationError, PermanentError
from services.local import supervisor
from services.local.supervisor import Order, PidFile

HOST = "127.0.0.1"
PROBE_INTERVAL_S = 0.05
MIN_FREE_BYTES = 16 * 1024 * 1024
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|CREDENTIAL|(_|^)KEY(_|$)", re.IGNORECASE)

State = Literal["running", "stopped", "crashed"]


class Server(ABC):
    """One process. Subclasses say what to run and how to tell that it is ready."""

    name: str
    port_setting: ClassVar[str]
    stop_timeout_s: ClassVar[float] = 20.0

    def __init__(self, directory: Path, port: int) -> None:
        self.port = port
        self.data_path = directory / self.name
        self.log_path = directory / "logs" / f"{self.name}.log"
        self._pid_path = directory / f"{self.name}.pid"
        self._supervisor: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The running server's process id."""
        process = self._process()
        return process.pid if process else None

    @property
    def running(self) -> bool:
        return self._process() is not None

    @property
    def state(self) -> State:
        """Crashed: it ended without being asked to."""
        return "running" if self.running else "crashed" if self._pid_path.exists() else "stopped"

    @property
    def exit_code(self) -> int | None:
        """What a server that this object started ended with by itself: below 0 it is the number of a signal."""
        code = self._supervisor.poll() if self._supervisor is not None else None
        return code if code is None or code <= supervisor.EXIT_BY_SIGNAL else supervisor.EXIT_BY_SIGNAL - code

    def _process(self) -> psutil.Process | None:
        record = PidFile.read(self._pid_path)
        return record.server.alive() if record else None

    def _keeper(self) -> psutil.Process | None:
        record = PidFile.read(self._pid_path)
        return record.supervisor.alive() if record else None

    def check_port(self) -> None:
        """Raise ConfigurationError when another program has the port."""
        if problem := port_problem(self.port):
            raise ConfigurationError(
                f"{self.port_setting}: port {self.port} of {HOST} cannot be used ({problem}); "
                f"stop the program that has it, or set {self.port_setting} to a free port"
            )

    def start(self) -> None:
        """Start the server on its data; returns when its process is there, ``wait_ready`` waits for more.

        What it needs is downloaded if it is missing. Raises ConfigurationError when the port is taken, PermanentError
        when it is running already.
        """
        if self.running:
            raise PermanentError(f"{self.name} is already running (pid {self.pid})")
        self._end_supervisor()
        self.check_port()
        for path in (self.data_path, self.log_path.parent):
            path.mkdir(parents=True, exist_ok=True)
        order = Order(
            command=self._command(),
            environment=without_secrets(os.environ) | self._environment(),
            log_path=str(self.log_path),
            pid_path=str(self._pid_path),
            lock_path=str(self._pid_path.with_suffix(".lock")),
            stop_timeout_s=self.stop_timeout_s,
        )
        self._pid_path.unlink(missing_ok=True)
        self._supervisor = _spawn(order)
        if not self._pid_path.exists():
            code = self._supervisor.wait()
            self._end_supervisor()
            if code == supervisor.EXIT_LOCKED:
                raise PermanentError(f"{self.name}: another process is using its data ({self.data_path})")
            raise PermanentError(f"{self.name} could not be started{self._log_tail()}")

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return when the server answers a real request; PermanentError when it died or is too slow."""
        deadline = time.monotonic() + timeout_s
        while not self._answers():
            process = self._process()
            if process is None or psutil.wait_procs([process], timeout=PROBE_INTERVAL_S)[0]:
                raise PermanentError(f"{self.name} is not running (any more){self._log_tail()}")
            if time.monotonic() > deadline:
                raise PermanentError(f"{self.name} did not answer within {timeout_s:g} s{self._log_tail()}")

    def detach(self) -> None:
        """Let the server outlive this process."""
        if self._supervisor is not None and self._supervisor.stdin is not None:
            with suppress(BrokenPipeError):
                self._supervisor.stdin.write(b"detach\n")
                self._supervisor.stdin.close()
            self._supervisor.stdin = None

    def stop(self) -> None:
        """Stop gracefully, whoever started it; nothing happens when it is not running."""
        if keeper := self._keeper():
            with suppress(psutil.NoSuchProcess):
                keeper.terminate()
        self._end_supervisor()
        self.kill()  # a server whose supervisor is gone, where the kernel did not take it along
        self._pid_path.unlink(missing_ok=True)

    def kill(self) -> None:
        """SIGKILL, as an out-of-memory killer would; returns when the process is gone."""
        if process := self._process():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
            psutil.wait_procs([process], timeout=10)
            self._end_supervisor()

    def _end_supervisor(self) -> None:
        """Wait for the supervisor's end; one that this process started loses its lifeline."""
        if self._supervisor is not None:
            if self._supervisor.stdin is not None:
                self._supervisor.stdin.close()
            self._supervisor.wait()
            self._supervisor = None
        if keeper := self._keeper():
            psutil.wait_procs([keeper], timeout=self.stop_timeout_s + 5)

    def _log_tail(self) -> str:
        tail = self.log_lines()[-8:]
        if shutil.disk_usage(self.log_path.parent).free < MIN_FREE_BYTES:
            tail.append("the disk is full")
        return "".join(f"\n    {line}" for line in [f"see {self.log_path}", *tail])

    def log_lines(self) -> list[str]:
        """What it has logged, since its directory was made."""
        try:
            return self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []

    @abstractmethod
    def _command(self) -> list[str]:
        """What starts it, with its arguments."""

    def _environment(self) -> dict[str, str]:
        """What it needs of settings and passwords: it gets none of ours."""
        return {}

    def _answers(self) -> bool:
        """Whether it answers a real request, if it takes any."""
        return self.running


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without our settings, and without anybody's passwords."""
    return {
        name: value
        for name, value in environment.items()
        if name.lower() not in Settings.model_fields and not SECRET.search(name)
    }


def free_port() -> int:
    """A port of the loopback address that is free now."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        return int(free.getsockname()[1])


def port_problem(port: int) -> str:
    """Why nothing can listen on the loopback port; empty if something can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            return error.strerror or str(error)
    return ""


def _spawn(order: Order) -> subprocess.Popen[bytes]:
    """Start a supervisor; returns when it has started its server, or has ended."""
    with Path(order.log_path).open("ab") as log:
        process = subprocess.Popen(  # noqa: S603 - our own file
            [sys.executable, supervisor.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
    if process.stdin is not None and process.stdout is not None:
        process.stdin.write(json.dumps(asdict(order)).encode() + b"\n")
        process.stdin.flush()
        with process.stdout as answer:
            answer.read()
    return process
