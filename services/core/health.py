"""/metrics, /livez and /readyz over HTTP, in threads beside the service."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, Self
from urllib.parse import urlsplit

from services.core.config import Settings
from services.core.errors import ConfigurationError

REQUEST_TIMEOUT_S = 5.0
MAX_REQUESTS = 16  # requests; a probe and a scraper need one each
PLAIN = "text/plain; charset=utf-8"

log = logging.getLogger("health")


@dataclass(frozen=True, slots=True)
class Page:
    """One answer."""

    body: bytes
    status: HTTPStatus = HTTPStatus.OK
    content_type: str = PLAIN


Pages = Mapping[str, Callable[[], Page]]


class HealthServer(ThreadingMixIn, TCPServer):
    """Answers GET with the page of the path: it listens as soon as it exists, and answers inside ``with``.

    Slow clients are cut off, and of many at once some. Raises ConfigurationError when it cannot listen.
    """

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 16

    def __init__(self, settings: Settings, pages: Pages) -> None:
        self.pages = pages
        self._free = threading.BoundedSemaphore(MAX_REQUESTS)
        host, port = settings.metrics_host, settings.metrics_port
        self.is_for_this_machine = is_loopback(host)
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            self.address_family = found[0][0]
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise ConfigurationError(
                f"METRICS_HOST={host}, METRICS_PORT={port}: cannot listen there: {error.strerror or error} "
                "(0 turns the metrics off)"
            ) from error

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, name="health", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, unless there are too many."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer for REQUEST_TIMEOUT_S at most: a time-out of the socket would begin again with each byte."""
        end = threading.Timer(REQUEST_TIMEOUT_S, cut, [request])
        end.daemon = True
        end.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            end.cancel()
            self._free.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """Carry on after a client that went away, or a fault of ours."""
        log.debug("request_failed", exc_info=True)


def cut(connection: socket.socket) -> None:
    """End a connection that another thread may be using."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    return host == "localhost" or host.startswith("127.") or host == "::1"


def is_ours(host: str | None) -> bool:
    """Whether a request's Host header names this machine: a page elsewhere may have led a browser here by its own."""
    name = urlsplit(f"//{host}").hostname if host else "localhost"
    return name is not None and is_loopback(name)


class _Handler(BaseHTTPRequestHandler):
    server: HealthServer
    server_version, sys_version = "sensor-pipeline", ""

    def do_GET(self) -> None:
        if self.server.is_for_this_machine and not is_ours(self.headers.get("Host")):
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        page = self.server.pages.get(self.path.partition("?")[0], _not_found)()
        self.send_response(page.status)
        self.send_header("Content-Type", page.content_type)
        self.send_header("Content-Length", str(len(page.body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(page.body)

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - the name is the library's
        """Log nothing: probes come every few seconds."""


def _not_found() -> Page:
    return Page(b"/metrics, /livez, /readyz\n", HTTPStatus.NOT_FOUND)
