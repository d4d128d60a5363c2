"""Trying again until a server is back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from services.core.backoff import Retries
from services.core.errors import TransientError
from services.core.logs import fields
from services.core.monitoring import Server

log = logging.getLogger("consumer")

T = TypeVar("T")


def keep_trying(server: Server, step: Callable[[], T], wait: Callable[[float], bool]) -> T | None:
    """Run a step until it succeeds; None if ``wait``, which pauses that many seconds, says to give up.

    Raises what is no TransientError, and PermanentError when a doubtful one keeps coming back.
    """
    event = f"{server.name}_unavailable"
    retries = Retries()
    while True:
        try:
            done = step()
        except TransientError as error:
            server.note_failure()
            pause = retries.pause_after(error)
            log.warning(event, extra=fields(detail=error, retry_s=round(pause, 1)))
        else:
            server.note_success()
            return done
        if wait(pause):
            server.note_given_up()
            return None
