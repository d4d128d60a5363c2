"""``sensor-pipeline dashboard``: serve the page until a signal."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from typing import Any

import waitress
from dash import Dash

from services.core.config import Settings
from services.core.database import connect
from services.core.errors import ConfigurationError, TransientError
from services.core.shutdown import Shutdown
from services.dashboard.monitor import Monitor
from services.dashboard.page import make_page
from services.dashboard.series import SummaryReader

THREADS = 8

log = logging.getLogger("dashboard")


def run(settings: Settings, shutdown: Shutdown, *, host: str, port: int) -> int:
    """Serve on ``host`` and ``port``. A server that is unavailable is not an error: the page reports it and waits."""
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    with suppress(TransientError):
        connect(settings).close()
    with SummaryReader(settings) as live, SummaryReader(settings) as charts:
        monitor = Monitor(settings, live)
        server = listen(make_page(monitor, charts, host), host, port)
        monitor.start(shutdown)
        threading.Thread(target=server.run, daemon=True).start()
        print(f"http://{host}:{port}/ (end with Ctrl-C)", flush=True)  # noqa: T201
        shutdown.wait(threading.TIMEOUT_MAX)
        server.close()
    return 0


def listen(page: Dash, host: str, port: int) -> Any:
    """Waitress, a server for production. Raises ConfigurationError where it cannot listen."""
    try:
        return waitress.create_server(page.server, host=host, port=port, threads=THREADS, ident=None)
    except (OSError, ValueError) as error:  # ValueError: a host that has no address
        reason = error.strerror if isinstance(error, OSError) else "this machine has no such address"
        raise ConfigurationError(f"the dashboard cannot listen on {host}:{port} (--host, --port): {reason}") from error
