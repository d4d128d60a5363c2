"""Work in the background: in a thread, over a connection of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from psycopg import Connection

from services.core.config import Settings
from services.core.database import connect_for_work, cut, translated
from services.core.errors import PipelineError
from services.core.logs import fields

END_TIMEOUT_S = 1.0

log = logging.getLogger("etl")


@contextmanager
def in_background(
    settings: Settings, name: str, work: Callable[[Connection, threading.Event], None], every_s: float
) -> Iterator[None]:
    """Call ``work`` again and again while the block runs; the event tells it to return. A failure is only logged."""
    end = threading.Event()
    open_now: list[Connection] = []

    def run() -> None:
        while not end.is_set():
            try:
                with translated(), connect_for_work(settings) as connection:
                    open_now[:] = [connection]
                    work(connection, end)
            except PipelineError as error:
                if not end.is_set():
                    log.warning("disturbed", extra=fields(work=name, detail=error))
            end.wait(every_s)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(END_TIMEOUT_S)
        if thread.is_alive():
            for connection in open_now:
                cut(connection)
