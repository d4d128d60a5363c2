"""Retries: exponential back-off with jitter, and an end for what no waiting may fix.

After "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015): clients that lost the same server
must not come back at the same moment.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from services.core.config import Settings
from services.core.errors import PermanentError, StoppedError, TransientError
from services.core.logs import fields
from services.core.shutdown import Shutdown

T = TypeVar("T")

# With the pauses below most of a minute.
MAX_LIMITED_TRIES = 12
NOTE_AFTER_S = 1.5


def pauses(first_s: float = 0.1, max_s: float = 10.0) -> Iterator[float]:
    """Yield pauses in seconds without end: between half and all of 0.1, 0.2, 0.4 ... up to ``max_s``."""
    ceiling = first_s
    while True:
        yield ceiling * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, no secret
        ceiling = min(ceiling * 2, max_s)


def retry_until(
    deadline: float, shutdown: Shutdown, step: Callable[[], T], note: Callable[[TransientError, float], None]
) -> T:
    """Try a step until ``deadline`` (of time.monotonic()), then raise its last TransientError.

    ``note`` is called with each error and the seconds until the next try. Raises StoppedError on shutdown.
    """
    tries = pauses()
    while True:
        try:
            return step()
        except TransientError as error:
            pause = next(tries)
            if time.monotonic() + pause > deadline:
                raise
            note(error, pause)
            if shutdown.wait(pause):
                raise StoppedError(f"stopped while waiting: {error}") from error


def at_start(
    step: Callable[[], T],
    settings: Settings,
    shutdown: Shutdown,
    server: tuple[str, str, str],
    give_up: Callable[[TransientError], Exception],
) -> T:
    """Try a step while a server is still starting, up to STARTUP_TIMEOUT_SECONDS; then raise what ``give_up`` makes.

    ``server``: its logger, its name and its address. Logs once that it is waited for; raises StoppedError on shutdown.
    """
    logger, name, address = server
    began, noted = time.monotonic(), False

    def note(_error: TransientError, _pause: float) -> None:
        nonlocal noted
        if not noted and time.monotonic() - began > NOTE_AFTER_S:
            noted = True
            logging.getLogger(logger).info("waiting_for_%s", logger, extra=fields(address=address))

    try:
        return retry_until(began + settings.startup_timeout_seconds, shutdown, step, note)
    except StoppedError as error:
        raise StoppedError(f"stopped while {name} did not answer at {address}") from error
    except TransientError as error:
        raise give_up(error) from error


class Retries:
    """The tries of one step. Most transient errors go away in time; retry-limited ones are given up."""

    def __init__(self) -> None:
        self._pauses = pauses()
        self._limited = 0

    def pause_after(self, error: TransientError) -> float:
        """Seconds to wait before the next try. Raises PermanentError when a retry-limited error keeps coming back."""
        self._limited = self._limited + 1 if error.retry_limited else 0
        if self._limited >= MAX_LIMITED_TRIES:
            raise PermanentError(f"{error} (the same {self._limited} times in a row)") from error
        return next(self._pauses)
