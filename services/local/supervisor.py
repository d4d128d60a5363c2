"""A tiny process that keeps one server, and takes it along when it goes.

    starter --lifeline (stdin)--> supervisor --> server

The starter's first line on the lifeline says what to run (JSON, see ``Order``); the supervisor answers with a line once
the server's process is there and its pid file is written. From then on the end of the lifeline means that the starter
is gone, and the server is stopped. A line ``detach`` ends that bond: the server then lives until the supervisor gets
SIGTERM. When the supervisor itself is killed, the kernel kills the server (Linux; elsewhere a server that watches its
stdin notices). It is run by file name, so it imports nothing of this project.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

EXIT_LOCKED = 75
EXIT_BY_SIGNAL = 128  # and the signal's number, as shells have it
AWAITED = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Order:
    """What to run, and where its traces go."""

    command: list[str]
    environment: dict[str, str]
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
    """What a pid file holds: the supervisor and its server."""

    supervisor: ProcessRecord
    server: ProcessRecord

    @classmethod
    def read(cls, path: Path) -> PidFile | None:
        """The file's content; None when there is no file, or one that was cut short."""
        try:
            content: dict[str, Any] = json.loads(path.read_text())
            return cls(ProcessRecord(**content["supervisor"]), ProcessRecord(**content["server"]))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def write(self, path: Path) -> None:
        staging = path.with_suffix(".pid.new")
        staging.write_text(json.dumps(asdict(self)))
        staging.rename(path)


def main() -> int:
    """Run the server that the lifeline orders; returns its exit code, or 0 after a stop that was asked for."""
    line = sys.stdin.buffer.readline()  # takes no more than that: the starter writes nothing else before the answer
    if not line.endswith(b"\n"):
        return 0  # the starter is gone
    order = Order(**json.loads(line))
    # The server inherits the lock, so that it outlives a killed supervisor for as long as data is open.
    lock = os.open(order.lock_path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return EXIT_LOCKED
    signal.signal(signal.SIGCHLD, lambda *_: None)  # by default it may be discarded
    signal.pthread_sigmask(signal.SIG_BLOCK, AWAITED)  # until sigwait
    server = _start(order, lock)
    PidFile(ProcessRecord.of(os.getpid()), ProcessRecord.of(server.pid)).write(Path(order.pid_path))
    with os.fdopen(1, "wb") as started:
        started.write(b"started\n")
    threading.Thread(target=_stop_with_starter, daemon=True).start()
    while (code := server.poll()) is None:
        if signal.sigwait(AWAITED) != signal.SIGCHLD and server.poll() is None:
            _stop(server, order.stop_timeout_s)
            Path(order.pid_path).unlink(missing_ok=True)
            return 0
    return code if code >= 0 else EXIT_BY_SIGNAL - code  # the pid file stays, and says "crashed"


def _stop_with_starter() -> None:
    """Ask for a stop when the lifeline ends, unless it has been detached."""
    while data := os.read(0, 64):
        if b"detach" in data:
            return
    os.kill(os.getpid(), signal.SIGTERM)


def _start(order: Order, lock: int) -> subprocess.Popen[bytes]:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    supervisor = os.getpid()

    def before_it_runs() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, AWAITED)
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
            preexec_fn=before_it_runs,  # safe: no thread runs yet
            start_new_session=True,
        )


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
