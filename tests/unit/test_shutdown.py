"""A main loop is heard of whenever it looks at its Shutdown, and expected back when a pause of its own ends."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from services.core.shutdown import Shutdown
from tests import ROOT
from tests.examples import examples

SIGNALS = """
import os, signal, threading
from services.core.shutdown import Shutdown
for _ in range({rounds}):
    shutdown = Shutdown().listen()
    threading.Timer(0.001, os.kill, (os.getpid(), signal.SIGTERM)).start()
    while not shutdown.wait(0.0):
        pass
    assert shutdown.requested
    assert shutdown.wait(60)
    shutdown.wait_until_requested()
"""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as the only item."""
    now = [1000.0]
    monkeypatch.setattr("services.core.shutdown.time.monotonic", lambda: now[0])
    return now


def test_silence_counts_from_the_last_look(clock: list[float]) -> None:
    shutdown = Shutdown()
    clock[0] += 70
    assert shutdown.silent_s == 70
    assert not shutdown.requested
    assert shutdown.silent_s == 0


def test_a_pause_is_no_silence_until_it_should_have_ended(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    shutdown = Shutdown()
    seen = []

    def oversleep(seconds: float) -> None:
        for passed in (seconds - 1, 6):
            clock[0] += passed
            seen.append(shutdown.silent_s)

    monkeypatch.setattr(shutdown, "_wait", oversleep)
    assert not shutdown.wait(60)
    assert seen == [0, 5]
    assert shutdown.silent_s == 0


def test_a_thread_beside_the_loop_does_not_speak_for_it(clock: list[float]) -> None:
    shutdown = Shutdown()
    beside = threading.Thread(target=shutdown.wait_until_requested, daemon=True)
    beside.start()
    clock[0] += 70
    assert shutdown.silent_s == 70
    shutdown.request()
    beside.join()
    assert shutdown.silent_s == 70


def test_no_moment_is_a_bad_one_for_a_signal() -> None:
    script = SIGNALS.format(rounds=examples(3))
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=30, check=False)
    assert done.returncode == 0
