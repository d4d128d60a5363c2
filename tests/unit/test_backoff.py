"""A step is tried again for as long as that can help."""

from __future__ import annotations

import math
import time

import pytest

from services.core.backoff import MAX_LIMITED_TRIES, Retries, retry_until
from services.core.errors import PermanentError, StoppedError, TransientError
from services.core.shutdown import Shutdown


class Step:
    """Fails some times, then answers."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.notes: list[str] = []

    def __call__(self) -> str:
        if len(self.notes) < self.failures:
            raise TransientError(f"failure {len(self.notes)}")
        return "done"

    def note(self, error: TransientError, pause: float) -> None:
        assert pause > 0
        self.notes.append(str(error))


def test_transient_errors_are_retried_and_each_is_noted() -> None:
    step = Step(2)
    assert retry_until(math.inf, Shutdown(), step, step.note) == "done"
    assert step.notes == ["failure 0", "failure 1"]


def test_an_error_is_raised_when_the_next_try_would_be_too_late() -> None:
    step = Step(1)
    with pytest.raises(TransientError, match="failure 0"):
        retry_until(time.monotonic(), Shutdown(), step, step.note)
    assert step.notes == []


def test_shutdown_ends_the_wait_and_not_a_step_that_succeeds() -> None:
    shutdown = Shutdown()
    shutdown.request()
    assert retry_until(math.inf, shutdown, Step(0), Step(0).note) == "done"
    with pytest.raises(StoppedError, match="failure 0"):
        retry_until(math.inf, shutdown, Step(1), Step(1).note)


def test_other_errors_are_not_retried() -> None:
    step = Step(0)

    def fail() -> None:
        raise PermanentError("no retry can help")

    with pytest.raises(PermanentError):
        retry_until(math.inf, Shutdown(), fail, step.note)
    assert step.notes == []


def test_only_retry_limited_errors_in_a_row_are_given_up() -> None:
    retries, limited = Retries(), TransientError("disk full", retry_limited=True)
    for _ in range(2):
        retries.pause_after(TransientError("server is starting"))
        for _ in range(MAX_LIMITED_TRIES - 1):
            retries.pause_after(limited)
    with pytest.raises(PermanentError, match=r"disk full \(the same 12 times in a row\)"):
        retries.pause_after(limited)
