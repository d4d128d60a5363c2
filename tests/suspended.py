"""The real command line on a machine that is suspended whenever this process is stopped (SIGSTOP).

The clock of the publisher that counts seconds stands still then, as it does on a machine that sleeps.
"""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

from services import cli
from services.producer import publisher

MAX_STEP_S = 0.5
_clock = {"real": time.monotonic(), "shown": time.monotonic()}


def monotonic() -> float:
    """Seconds during which the process ran."""
    now = time.monotonic()
    _clock["shown"] += min(now - _clock["real"], MAX_STEP_S)
    _clock["real"] = now
    return _clock["shown"]


if __name__ == "__main__":
    clock: Any = SimpleNamespace(monotonic=monotonic, time=time.time, sleep=time.sleep)
    vars(publisher)["time"] = clock
    sys.exit(cli.main())
