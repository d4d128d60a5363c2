"""Growing pauses between tries, with full jitter, and an end for what no waiting may mend.

After "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015): clients that lost the same server
must not come back at the same moment.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

from services.core.config import Settings
from services.core.errors import PermanentError, TransientError

# With the pauses below most of a minute.
MOST_DOUBTFUL_TRIES = 12
NOTE_AFTER_S = 1.5


def pauses(first_s: float = 0.1, most_s: float = 10.0) -> Iterator[float]:
    """Yield pauses in seconds without end: between half and all of 0.1, 0.2, 0.4 ... up to ``most_s``."""
    ceiling = first_s
    while True:
        yield ceiling * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, no secret
        ceiling = min(ceiling * 2, most_s)


def note_and_deadline(settings: Settings) -> tuple[float, float]:
    """When to say that a server is waited for at the start, and until when it is; by the monotonic clock."""
    now = time.monotonic()
    return now + NOTE_AFTER_S, now + settings.startup_timeout_seconds


class Retries:
    """The tries of one step. Time mends transient errors; doubtful ones only so often in a row."""

    def __init__(self) -> None:
        self._pauses = pauses()
        self._doubtful = 0

    def pause_after(self, error: TransientError) -> float:
        """Seconds to wait before the next try. Raises PermanentError when a doubtful error keeps coming back."""
        self._doubtful = self._doubtful + 1 if error.doubtful else 0
        if self._doubtful >= MOST_DOUBTFUL_TRIES:
            raise PermanentError(f"{error} (the same {self._doubtful} times in a row)") from error
        return next(self._pauses)
