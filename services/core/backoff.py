"""Growing pauses between tries, with full jitter, and an end for what no waiting may mend.

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
MAX_DOUBTFUL_TRIES = 12
NOTE_AFTER_S = 1.5


def pauses(first_s: float = 0.1, max_s: float = 10.0) -> Iterator[float]:
    """Yield pauses in seconds without end: between half and all of 0.1, 0.2, 0.4 ... up to ``max_s``."""
    ceiling = first_s
    while True:
        yield ceiling * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, no secret
        ceiling = min(ceiling * 2, max_s)


def at_start(
    step: Callable[[], T],
    settings: Settings,
    shutdown: Shutdown,
    server: tuple[str, str, str],
    give_up: Callable[[TransientError], Exception],
) -> T:
    """Try a step while a server is still starting, up to STARTUP_TIMEOUT_SECONDS; then raise what ``give_up`` makes.

    ``server``: its logger, its name and its address. Says once that it is waited for; StoppedError ends that too.
    """
    logger, name, address = server
    noted_at, deadline = time.monotonic() + NOTE_AFTER_S, time.monotonic() + settings.startup_timeout_seconds
    tries = pauses()
    while True:
        try:
            return step()
        except TransientError as error:
            pause, now = next(tries), time.monotonic()
            if now + pause > deadline:
                raise give_up(error) from error
            if now > noted_at:
                noted_at = deadline
                logging.getLogger(logger).info("waiting_for_%s", logger, extra=fields(address=address))
            if shutdown.wait(pause):
                raise StoppedError(f"stopped while {name} did not answer at {address}") from error


class Retries:
    """The tries of one step. Time mends transient errors; doubtful ones only so often in a row."""

    def __init__(self) -> None:
        self._pauses = pauses()
        self._doubtful = 0

    def pause_after(self, error: TransientError) -> float:
        """Seconds to wait before the next try. Raises PermanentError when a doubtful error keeps coming back."""
        self._doubtful = self._doubtful + 1 if error.doubtful else 0
        if self._doubtful >= MAX_DOUBTFUL_TRIES:
            raise PermanentError(f"{error} (the same {self._doubtful} times in a row)") from error
        return next(self._pauses)
