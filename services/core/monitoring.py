"""What every service reports about itself: whether it is alive and ready, and which server is unavailable.

Alive: the main loop is iterating; each check of its Shutdown is a heartbeat.
Ready: every server that the service needs is connected now, and the last try to use it did not fail. A probe in a
thread beside the service keeps a connection, so that this is known of an idle service too.

The metrics of one service are in its metrics.py; docs/metrics.md lists all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus

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
from services.core.database import Reconnecting, connect
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
SILENT = Gauge("sensor_main_loop_silent_seconds", "Time since the main loop was last seen to iterate.")
CONNECTED = Gauge("sensor_server_connected", "1 while the server is connected and works for us, else 0.", ["server"])
OUTAGES = Counter("sensor_outages_total", "Times that the connection to a server was lost, by server.", ["server"])
RETRIES = Counter("sensor_retries_total", "Failed attempts that are repeated, by server.", ["server"])


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
    """A server that a service needs, and how to see whether it is connected. ``check`` returns within seconds."""

    server: Dependency
    check: Callable[[], bool]


def kafka_probe(settings: Settings, ask: Callable[[AdminClient], None] | None = None) -> Probe:
    """Kafka is connected when it answers a question about the topic of readings; then it is used to ``ask``."""
    admin = AdminClient(client_settings(settings, "probe") | {"log_level": 0})

    def check() -> bool:
        try:
            admin.list_topics(settings.kafka_topic, timeout=KAFKA_TIMEOUT_S)
            if ask is not None:
                ask(admin)
        except KafkaException:
            return False
        return True

    return Probe(KAFKA, check)


def database_probe(settings: Settings, ask: Callable[[Connection], None] | None = None) -> Probe:
    """PostgreSQL is connected while it keeps a connection that is used for nothing else, except to ``ask``."""
    database = Reconnecting(partial(connect, settings))

    def check() -> bool:
        try:
            with database.connected() as connection:
                connection.pgconn.consume_input()  # does not wait; an error if the server has ended the connection
                if ask is not None:
                    ask(connection)
        except PipelineError:
            return False
        return True

    return Probe(DATABASE, check)


@contextmanager
def monitored(
    settings: Settings, shutdown: Shutdown, service: str, *make_probes: Callable[[], Probe], hung_after_s: float
) -> Iterator[None]:
    """Serve the three pages while the block runs; with METRICS_PORT=0 do nothing.

    The main loop hangs when it has been busy with one thing for ``hung_after_s``. Raises ConfigurationError when the
    port cannot be had, before the service begins.
    """
    if not settings.metrics_port:
        yield
        return

    def hung() -> list[str]:
        silent_s = shutdown.silent_s
        return [f"the main loop has been busy for {silent_s:.0f} s"] if silent_s > hung_after_s else []

    def problems() -> list[str]:
        return hung() + [f"{probe.server.name} is not connected" for probe in probes if not probe.server.is_up]

    pages = {
        "/metrics": lambda: Page(generate_latest(REGISTRY), content_type=CONTENT_TYPE_LATEST),
        "/livez": lambda: page("alive", hung()),
        "/readyz": lambda: page("ready", problems()),
    }
    server = HealthServer(settings, pages)
    probes = [make_probe() for make_probe in make_probes]
    BUILD.info({"service": service, "version": version()})
    READY.set_function(lambda: not problems())
    SILENT.set_function(lambda: shutdown.silent_s)
    with server, _watched(probes):
        yield


@contextmanager
def _watched(probes: Sequence[Probe]) -> Iterator[None]:
    """Each probe is checked once a second while the block runs."""
    end = threading.Event()

    def watch(probe: Probe) -> None:
        while not end.is_set():
            probe.server.note_connected(probe.check())
            end.wait(CHECK_INTERVAL_S)

    threads = [threading.Thread(target=watch, args=(probe,), daemon=True) for probe in probes]
    for probe, thread in zip(probes, threads, strict=True):
        CONNECTED.labels(probe.server.name).set_function(partial(getattr, probe.server, "is_up"))
        for counter in (OUTAGES, RETRIES):
            counter.labels(probe.server.name)
        thread.start()
    try:
        yield
    finally:
        end.set()
        for thread in threads:
            thread.join(STOP_TIMEOUT_S)


def page(state: str, problems: list[str]) -> Page:
    """200 and the state, or 503 and what is wrong, one line each."""
    lines = "".join(f"{line}\n" for line in problems or [state])
    return Page(lines.encode(), HTTPStatus.SERVICE_UNAVAILABLE if problems else HTTPStatus.OK)
