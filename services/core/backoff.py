"""Growing pauses between tries, with full jitter.

After "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015): clients that lost the same server
must not come back at the same moment.
"""

from __future__ import annotations

import random
from collections.abc import Iterator


def pauses(first_s: float = 0.1, most_s: float = 10.0) -> Iterator[float]:
    """Yield pauses in seconds without end: between half and all of 0.1, 0.2, 0.4 ... up to ``most_s``."""
    ceiling = first_s
    while True:
        yield ceiling * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, no secret
        ceiling = min(ceiling * 2, most_s)
