"""Etl's duties beside the refresh, each at its own pace. One that fails is tried again and stops nothing else."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

from psycopg import Connection

from services.core.backoff import pauses
from services.core.database import translated
from services.core.errors import LeaseLostError, PipelineError
from services.core.logs import fields
from services.etl.metrics import DUTY_FAILURES

FIRST_RETRY_S = 1.0
MAX_RETRY_S = 60.0

log = logging.getLogger("etl")


class Duty:
    """One of them: its name in log and metrics, the steps of one run, and the pause between two runs."""

    def __init__(self, name: str, steps: Callable[[], Iterator[None]], every_s: float) -> None:
        self.name = name
        self._steps = steps
        self._every_s = every_s
        self._running: Iterator[None] | None = None
        self._next = time.monotonic()
        self._retries = pauses(FIRST_RETRY_S, MAX_RETRY_S)
        DUTY_FAILURES.labels(name)

    @property
    def has_begun(self) -> bool:
        """Whether a run has begun and not ended."""
        return self._running is not None

    @property
    def is_due(self) -> bool:
        """Whether there is a step to do now."""
        return self._running is not None or time.monotonic() >= self._next

    def step(self, connection: Connection) -> float:
        """One step of a run; the seconds that it took.

        Raises only what ends the work of the connection: it is lost, or so is the lead.
        """
        if self._running is None:
            self._running = self._steps()
        started = time.monotonic()
        try:
            with translated():
                next(self._running)
        except StopIteration:
            # One that takes long takes no more than a tenth of the time.
            self._rest(max(self._every_s, 9 * (time.monotonic() - started)))
            self._retries = pauses(FIRST_RETRY_S, MAX_RETRY_S)
        except PipelineError as error:
            self._rest(next(self._retries))
            if connection.closed or isinstance(error, LeaseLostError):
                raise
            DUTY_FAILURES.labels(self.name).inc()
            retry_s = round(self._next - time.monotonic(), 1)
            log.warning("duty_failed", extra=fields(duty=self.name, detail=error, retry_s=retry_s))
        return time.monotonic() - started

    def finish(self) -> Iterator[None]:
        """The rest of the run, or a whole one if it is due; raises what fails."""
        if self.is_due:
            yield from self._running or self._steps()
            self._rest(self._every_s)

    def _rest(self, seconds: float) -> None:
        self._running = None
        self._next = time.monotonic() + seconds


def next_due(duties: list[Duty]) -> Duty | None:
    """The one whose step is next: what has begun is finished before another begins."""
    begun = [duty for duty in duties if duty.has_begun]
    return next((duty for duty in [*begun, *duties] if duty.is_due), None)
