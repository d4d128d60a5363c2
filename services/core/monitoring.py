"""What every service tells of itself: whether it is alive and ready, and which server is away.

Alive: the main loop goes round. Each look that a loop takes at its Shutdown is the sign of that.
Ready: every server that the service needs is connected now, and the last try to use it did not fail. A probe beside
the service keeps the connection, so that it is known of an idle service too.

The metrics of one service are in its metrics.py; docs/metrics.md lists all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus

import psycopg
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    Counter,
    Gauge,
    Info,
    disable_created_metrics,
    generate_latest,
)
from psycopg import Connection

from services.core.config import Settings
from services.core.database import connect, translated
from services.core.errors import PipelineError
from services.core.health import HealthServer, Page
from services.core.kafka import client_settings
from services.core.shutdown import Shutdown
from services.core.version import version

CHECK_INTERVAL_S = 1.0
KAFKA_TIMEOUT_S = 3.0
STOP_TIMEOUT_S = 1.0

disable_created_metrics()  # type: ignore[no-untyped-call]

BUILD = Info("sensor_build", "The service and its version.")  # Prometheus stores it as sensor_build_info
READY = Gauge("sensor_ready", "1 while /readyz says that the service is ready, else 0.")
SILENT = Gauge("sensor_main_loop_silent_seconds", "Time since the main loop was last seen to go round.")
CONNECTED = Gauge("sensor_server_connected", "1 while the server is connected and works for us, else 0.", ["server"])
OUTAGES = Counter("sensor_outages_total", "Times that a server was lost, by the server.", ["server"])
RETRIES = Counter("sensor_retries_total", "Failed tries that are repeated, by the server that failed.", ["server"])


class Dependency:
    """One of the servers behind us, as this process knows it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._connected = False  # says the probe
        self._failing: set[int] = set()  # threads whose last try to use it failed

    @property
    def is_up(self) -> bool:
        """Whether it is connected and the last try did not fail."""
        return self._connected and not self._failing

    def note_connected(self, connected: bool) -> None:
        """The probe has seen whether it is connected."""
        with self._change():
            self._connected = connected

    def note_failure(self) -> None:
        """A try of this thread to use it failed and will be repeated."""
        RETRIES.labels(self.name).inc()
        with self._change():
            self._failing.add(threading.get_ident())

    def note_success(self) -> None:
        """A try of this thread to use it succeeded, or the one that failed is not repeated."""
        if self._failing:
            with self._change():
                self._failing.discard(threading.get_ident())

    @contextmanager
    def _change(self) -> Iterator[None]:
        with self._lock:
            before = self.is_up
            yield
            if before and not self.is_up:
                OUTAGES.labels(self.name).inc()


KAFKA = Dependency("kafka")
DATABASE = Dependency("database")


@dataclass(frozen=True, slots=True)
class Probe:
    """A server that a service needs, and how to see whether it is connected. ``look`` returns within seconds."""

    server: Dependency
    look: Callable[[], bool]


def kafka_probe(settings: Settings, ask: Callable[[AdminClient], None] | None = None) -> Probe:
    """Kafka is connected when it answers a question about the topic of readings; then it is used to ``ask``."""
    admin = AdminClient(client_settings(settings, "probe") | {"log_level": 0})

    def look() -> bool:
        try:
            admin.list_topics(settings.kafka_topic, timeout=KAFKA_TIMEOUT_S)
            if ask is not None:
                ask(admin)
        except KafkaException:
            return False
        return True

    return Probe(KAFKA, look)


def database_probe(settings: Settings, ask: Callable[[Connection], None] | None = None) -> Probe:
    """PostgreSQL is connected while it keeps a connection that is used for nothing else, except to ``ask``."""
    kept: list[Connection] = []

    def look() -> bool:
        try:
            with translated():
                if not kept:
                    kept.append(connect(settings))
                kept[0].pgconn.consume_input()  # does not wait; an error if the server has ended the connection
                if ask is not None:
                    ask(kept[0])
        except PipelineError:
            while kept:
                with suppress(psycopg.Error):
                    kept.pop().close()
            return False
        return True

    return Probe(DATABASE, look)


class Monitoring:
    """Serves the three pages while the block runs. With METRICS_PORT=0 it does nothing.

    ``hung_after_s``: so long the main loop may be busy with one thing. Raises ConfigurationError when the port
    cannot be had, before the service begins.
    """

    def __init__(
        self, settings: Settings, shutdown: Shutdown, service: str, *probes: Callable[[], Probe], hung_after_s: float
    ) -> None:
        self._shutdown = shutdown
        self._hung_after_s = hung_after_s
        self._end = threading.Event()
        self._server: HealthServer | None = None
        self._probes: list[Probe] = []
        self._threads: list[threading.Thread] = []
        if not settings.metrics_port:
            return
        pages = {
            "/metrics": lambda: Page(generate_latest(REGISTRY), content_type=CONTENT_TYPE_LATEST),
            "/livez": lambda: page("alive", self._hung()),
            "/readyz": lambda: page("ready", self._problems()),
        }
        self._server = HealthServer(settings, pages)
        self._probes = [probe() for probe in probes]
        BUILD.info({"service": service, "version": version()})
        READY.set_function(lambda: not self._problems())
        SILENT.set_function(lambda: self._shutdown.silent_s)
        for server in (probe.server for probe in self._probes):
            CONNECTED.labels(server.name).set_function(partial(getattr, server, "is_up"))
            for counter in (OUTAGES, RETRIES):
                counter.labels(server.name)

    def __enter__(self) -> Monitoring:
        if self._server is not None:
            self._server.start()
            self._threads = [threading.Thread(target=self._watch, args=(each,), daemon=True) for each in self._probes]
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._server is not None:
            self._server.stop()
        for thread in self._threads:
            thread.join(STOP_TIMEOUT_S)

    def _watch(self, probe: Probe) -> None:
        while not self._end.is_set():
            probe.server.note_connected(probe.look())
            self._end.wait(CHECK_INTERVAL_S)

    def _problems(self) -> list[str]:
        """Why the service is not ready."""
        away = [f"{probe.server.name} is not connected" for probe in self._probes if not probe.server.is_up]
        return [*self._hung(), *away]

    def _hung(self) -> list[str]:
        silent_s = self._shutdown.silent_s
        return [f"the main loop has been busy for {silent_s:.0f} s"] if silent_s > self._hung_after_s else []


def page(state: str, problems: list[str]) -> Page:
    """200 and the state, or 503 and what is wrong, one line each."""
    lines = "".join(f"{line}\n" for line in problems or [state])
    return Page(lines.encode(), HTTPStatus.SERVICE_UNAVAILABLE if problems else HTTPStatus.OK)
