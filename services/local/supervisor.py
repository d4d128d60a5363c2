"""A tiny process that keeps one server, and takes it along when it goes.

    starter --lifeline (stdin)--> supervisor --> server

The starter's first line on the lifeline says what to run (JSON, see `Order`); the supervisor answers with
a line once the server's process is there and its pid file is written. From then on the end of the
lifeline means that the starter is gone, and the server is stopped. A line `detach` ends that bond: the
server then lives until the supervisor gets SIGTERM. When the supervisor itself is killed, the kernel kills
the server (Linux; elsewhere a server that watches its stdin notices).

Run by file name, so it imports nothing of this project.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import selectors
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

EXIT_LOCKED = 75
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Order:
    """What to run, and where its traces go."""

    name: str
    command: list[str]
    environment: dict[str, str]
    port: int
    log_path: str
    pid_path: str
    lock_path: str
    stop_timeout_s: float


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """A process that a recycled pid cannot be mistaken for."""

    pid: int
    created: float

    @classmethod
    def of(cls, pid: int) -> ProcessRecord:
        return cls(pid, psutil.Process(pid).create_time())

    def alive(self) -> psutil.Process | None:
        """The process, while it is there and no zombie."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created) < 0.02
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


@dataclass(frozen=True, slots=True)
class PidFile:
    """What a pid file holds: the supervisor, its server and the server's port."""

    supervisor: ProcessRecord
    server: ProcessRecord
    port: int

    @classmethod
    def read(cls, path: Path) -> PidFile | None:
        """The file's content; None when there is no file, or one that was cut short."""
        try:
            content: dict[str, Any] = json.loads(path.read_text())
            return cls(ProcessRecord(**content["supervisor"]), ProcessRecord(**content["server"]), content["port"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def write(self, path: Path) -> None:
        staging = path.with_suffix(".pid.new")
        staging.write_text(json.dumps(asdict(self)))
        staging.rename(path)


def main() -> int:
    """Run the server that the lifeline orders; returns 0 after a stop that was asked for."""
    order = Order(**json.loads(_read_line(0)))
    # The server inherits the lock, so that it outlives a killed supervisor for as long as data is open.
    lock = os.open(order.lock_path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return EXIT_LOCKED
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    asked_to_stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: asked_to_stop.append(number))
    signal.signal(signal.SIGCHLD, lambda *_: None)  # it wakes the selector

    server = _start(order, lock)
    record = PidFile(ProcessRecord.of(os.getpid()), ProcessRecord.of(server.pid), order.port)
    record.write(Path(order.pid_path))
    with os.fdopen(1, "wb") as started:
        started.write(b"started\n")
    _wait_for_an_end(server, woken, asked_to_stop)
    if server.poll() is not None:
        return 1  # It ended by itself: the pid file stays, and says "crashed".
    _stop(server, order.stop_timeout_s)
    Path(order.pid_path).unlink(missing_ok=True)
    return 0


def _read_line(descriptor: int) -> bytes:
    """One line, and not a byte more: what follows is for the selector."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(descriptor, 1)
        if not byte:
            raise SystemExit(0)
        line += byte
    return line


def _start(order: Order, lock: int) -> subprocess.Popen[bytes]:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    supervisor = os.getpid()

    def die_with_supervisor() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != supervisor:
                os._exit(1)

    with Path(order.log_path).open("ab") as log:
        return subprocess.Popen(  # noqa: S603 - our own command
            order.command,
            env=order.environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=(lock,),
            preexec_fn=die_with_supervisor,  # safe: no thread runs yet
            start_new_session=True,
        )


def _wait_for_an_end(server: subprocess.Popen[bytes], woken: int, asked_to_stop: list[int]) -> None:
    """Return when the lifeline ends, a signal asks to stop, or the server ended."""
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        selector.register(woken, selectors.EVENT_READ)
        while server.poll() is None and not asked_to_stop:
            for key, _ in selector.select():
                data = os.read(key.fd, 64)
                if key.fd == woken:
                    continue
                if b"detach" in data:
                    selector.unregister(0)
                elif not data:
                    return


def _stop(server: subprocess.Popen[bytes], timeout_s: float) -> None:
    if server.stdin is not None:
        server.stdin.close()
    server.terminate()
    try:
        server.wait(timeout_s)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


if __name__ == "__main__":
    sys.exit(main())
