"""Both servers together: what `make demo`, the tests and the command line use.

with Stack(options) as stack:      # up(); the servers die with this process
    stack.timescaledb.kill()       # chaos
    stack.timescaledb.start()
    stack.timescaledb.wait_ready()
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from services.local.kafka import KafkaProcess
from services.local.runtime import RUNTIME_DIRECTORY, Runtime, install
from services.local.security import Security
from services.local.servers import Server
from services.local.timescaledb import TimescaleDB


@dataclass(frozen=True, slots=True)
class StackOptions:
    """Where a stack lives and how it is reached; stacks with directories and ports of their own coexist."""

    directory: Path
    kafka_port: int
    postgre_port: int
    postgre_user: str
    postgre_password: str = field(repr=False)
    postgre_dbname: str
    runtime_directory: Path = RUNTIME_DIRECTORY
    security: Security | None = None


class Stack:
    """A Kafka and a TimescaleDB on 127.0.0.1, with everything they write below one directory."""

    def __init__(self, options: StackOptions, report: Callable[[str], None] = lambda line: None) -> None:
        directory = options.directory.resolve()
        self._options = options
        self._report = report
        self.kafka = KafkaProcess(directory, options.kafka_port, security=options.security)
        self.timescaledb = TimescaleDB(
            directory,
            options.postgre_port,
            options.postgre_user,
            options.postgre_password,
            options.postgre_dbname,
            security=options.security,
        )

    @property
    def servers(self) -> tuple[Server, ...]:
        """Both, as they are now."""
        return (self.kafka, self.timescaledb)

    def install(self) -> Runtime:
        """Download what is missing."""
        runtime = install(self._report, self._options.runtime_directory)
        for server in self.servers:
            server.runtime = runtime
        return runtime

    def up(self, *, detach: bool) -> None:
        """Start what is not running and wait until it answers; with `detach` it outlives this process.

        Raises `ConfigurationError` when a port is taken (then nothing was started), `PermanentError` when a
        server dies while starting (then the others that were started here are stopped again).
        """
        missing = [server for server in self.servers if not server.running]
        for server in self.servers:
            if server not in missing:
                self._report(f"{server.name} is already running (pid {server.pid}, port {server.port})")
        if not missing:
            return
        for server in missing:
            server.check_port()
        self.install()
        try:
            _start_all(missing)
        except BaseException:
            for server in missing:  # one that was about to start may have missed the first stop
                server.stop()
            raise
        for server in missing:
            if detach:
                server.detach()
            self._report(f"{server.name} is running (pid {server.pid}, port {server.port})")

    def detach(self) -> None:
        """Let both servers outlive this process, which started them."""
        for server in self.servers:
            server.detach()

    def down(self) -> None:
        """Stop both gracefully, whoever started them."""
        running = [server for server in self.servers if server.running]
        with ThreadPoolExecutor(len(self.servers)) as pool:
            list(pool.map(lambda server: server.stop(), self.servers))
        for server in running:
            self._report(f"{server.name} is stopped")

    def __enter__(self) -> Self:
        self.up(detach=False)
        return self

    def __exit__(self, *_: object) -> None:
        self.down()


def _start_all(servers: list[Server]) -> None:
    """Start at the same time; the first failure ends the waiting for the others."""
    with ThreadPoolExecutor(len(servers)) as pool:
        starts = [pool.submit(_start_and_wait, server) for server in servers]
        try:
            for start in as_completed(starts):
                start.result()
        except BaseException:
            for server in servers:
                server.stop()
            raise


def _start_and_wait(server: Server) -> None:
    server.start()
    server.wait_ready()
