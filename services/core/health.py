"""/metrics, /livez and /readyz over HTTP, in threads beside the service."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

from services.core.config import Settings
from services.core.errors import ConfigurationError

REQUEST_WITHIN_S = 5.0
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
    """Answers GET with the page of the path. It listens as soon as it exists, and answers after ``start``.

    Raises ConfigurationError when it cannot listen.
    """

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 16

    def __init__(self, settings: Settings, pages: Pages) -> None:
        self.pages = pages
        host, port = settings.metrics_host, settings.metrics_port
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            self.address_family = found[0][0]
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise ConfigurationError(
                f"METRICS_HOST={host}, METRICS_PORT={port}: cannot listen there: {error.strerror or error} "
                "(0 turns the metrics off)"
            ) from error

    def start(self) -> None:
        """Answer from now on."""
        threading.Thread(target=self.serve_forever, name="health", daemon=True).start()

    def stop(self) -> None:
        """Stop listening."""
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away, or a fault of ours: no reason to stop."""
        log.debug("request_failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: HealthServer
    timeout = REQUEST_WITHIN_S

    def do_GET(self) -> None:
        page = self.server.pages.get(self.path.partition("?")[0], _not_found)()
        self.send_response(page.status)
        self.send_header("Content-Type", page.content_type)
        self.send_header("Content-Length", str(len(page.body)))
        self.end_headers()
        self.wfile.write(page.body)

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - the name is the library's
        """Probes come every few seconds; nobody wants to read of them."""


def _not_found() -> Page:
    return Page(b"/metrics, /livez, /readyz\n", HTTPStatus.NOT_FOUND)
