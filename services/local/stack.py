"""Both servers together: what ``make demo``, the tests and the command line use.

with Stack(directory, settings) as stack:      # up(); the servers die with this process
    stack.timescaledb.kill()                   # chaos
    stack.timescaledb.start()
    stack.timescaledb.wait_ready()
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Self

from services.core.config import Settings
from services.local.kafka import KafkaProcess
from services.local.security import Security
from services.local.servers import Server
from services.local.timescaledb import TimescaleDB


class Stack:
    """A Kafka and a TimescaleDB at the ports of the settings, on 127.0.0.1, with all that they write in one directory.

    Stacks with directories and ports of their own coexist.
    """

    def __init__(
        self,
        directory: Path,
        settings: Settings,
        security: Security | None = None,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.directory = directory.resolve()
        self._report = report
        self.kafka = KafkaProcess(self.directory, settings.kafka_port, security=security)
        self.timescaledb = TimescaleDB(
            self.directory,
            settings.postgre_port,
            settings.postgre_user,
            settings.secret("postgre_password"),
            settings.postgre_dbname,
            security=security,
        )
        self.servers: tuple[Server, ...] = (self.kafka, self.timescaledb)

    def up(self, *, detach: bool) -> None:
        """Start what is not running and wait until it answers; with ``detach`` it outlives this process.

        Raises ConfigurationError when a port is taken (then nothing was started), PermanentError when a server dies
        while starting (then the others that were started here are stopped again).
        """
        missing = []
        for server in self.servers:
            if server.running:
                self._report(f"{server.name} is already running (pid {server.pid}, port {server.port})")
            else:
                server.check_port()
                missing.append(server)
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

    def down(self) -> None:
        """Stop both gracefully, whoever started them."""
        running = [server for server in self.servers if server.running]
        with ThreadPoolExecutor(len(self.servers)) as pool:
            list(pool.map(Server.stop, self.servers))
        for server in running:
            self._report(f"{server.name} is stopped")

    def __enter__(self) -> Self:
        self.up(detach=False)
        return self

    def __exit__(self, *_: object) -> None:
        self.down()


def _start_all(servers: list[Server]) -> None:
    """Start at the same time; the first failure ends the waiting for the others."""

    def start(server: Server) -> None:
        server.start()
        server.wait_ready()

    with ThreadPoolExecutor() as pool:
        starts = [pool.submit(start, server) for server in servers]
        try:
            for each in as_completed(starts):
                each.result()
        except BaseException:
            for server in servers:
                server.stop()
            raise
