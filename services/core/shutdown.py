"""SIGTERM and SIGINT become one event that every loop waits on; by that each loop also shows that it is iterating."""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from queue import Empty, SimpleQueue
from types import FrameType


class Shutdown:
    """Set once, never cleared. ``wait`` replaces every sleep of a service."""

    def __init__(self) -> None:
        # Not an Event: a thread that waits for one holds its lock at times, and a signal handler in it would deadlock.
        self._requests: SimpleQueue[None] = SimpleQueue()
        self._is_requested = False
        self._expected = time.monotonic()  # when the main loop must check again, or last did

    def listen(self) -> Shutdown:
        """Turn SIGTERM and SIGINT into ``request``; a second signal ends the process at once."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        self.request()

    def request(self) -> None:
        """Ask every loop to end."""
        self._is_requested = True
        self._requests.put(None)

    @property
    def requested(self) -> bool:
        """Whether the service must end."""
        self._expected = time.monotonic()
        return self._is_requested

    def wait(self, seconds: float) -> bool:
        """Pause for ``seconds`` at most; True as soon as the service must end."""
        self._expected = time.monotonic() + seconds
        self._wait(max(0.0, seconds))
        return self.requested

    def wait_until_requested(self) -> None:
        """Wait in a thread beside the main loop: this is not a sign that the loop is iterating."""
        self._wait(None)

    def _wait(self, seconds: float | None) -> None:
        with suppress(Empty):
            self._requests.put(self._requests.get(timeout=seconds))  # it is for all who wait

    @property
    def silent_s(self) -> float:
        """Seconds since the main loop last checked; 0 while it pauses."""
        return max(0.0, time.monotonic() - self._expected)
