"""Work beside the leader's own: in a thread, over a connection of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import TracebackType

from psycopg import Connection

from services.core.config import Settings
from services.core.database import connect_for_work, cut, translated
from services.core.errors import PipelineError
from services.core.logs import fields

END_TIMEOUT_S = 1.0

log = logging.getLogger("etl")


class Beside:
    """Does ``work`` again and again while the block runs; the event tells it to return. A failure is only logged."""

    def __init__(
        self, settings: Settings, name: str, work: Callable[[Connection, threading.Event], None], every_s: float
    ) -> None:
        self._settings = settings
        self._name = name
        self._work = work
        self._every_s = every_s
        self._end = threading.Event()
        self._connection: Connection | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join(END_TIMEOUT_S)
        if self._thread.is_alive() and self._connection is not None:
            cut(self._connection)

    def _run(self) -> None:
        while not self._end.is_set():
            try:
                with translated(), connect_for_work(self._settings) as self._connection:
                    self._work(self._connection, self._end)
            except PipelineError as error:
                if not self._end.is_set():
                    log.warning("disturbed", extra=fields(work=self._name, detail=error))
            self._end.wait(self._every_s)
