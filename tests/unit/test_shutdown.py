"""A main loop is heard of whenever it looks at its Shutdown, and expected back when a pause of its own ends."""

from __future__ import annotations

import threading

import pytest

from services.core.shutdown import Shutdown


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

    def oversleep(seconds: float) -> bool:
        for passed in (seconds - 1, 6):
            clock[0] += passed
            seen.append(shutdown.silent_s)
        return False

    monkeypatch.setattr(shutdown._event, "wait", oversleep)
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
