"""When readings are sent: at once, at a fixed rate, or with the gaps that lie between their own times.

A pacing cuts record batches into parts so small that none is a burst, and knows when each is due.
"""

from __future__ import annotations

import math
import re
import time
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate

import pyarrow as pa

from services.core.config import Settings
from services.core.errors import ConfigurationError
from services.producer.columns import Columns
from services.producer.encoding import event_times

TICK_S = 0.01  # what is due within one tick is sent together: a part costs the same for one row as for hundreds
MAX_BEHIND_S = 1.0  # a fixed rate makes up for this much after a hold-up, and not more, or it would be a burst
MAX_PART_ROWS = 20_000
MAX_SPEED = 1e6
LONG_AGO = -(2**62)
SPEED = re.compile(r"(\d+(?:\.\d+)?)x", re.ASCII)


class Pacing:
    """As fast as Kafka takes them."""

    # Age at which a transaction is committed, so that readers see what was sent. A slow broker gets smaller
    # transactions, so that none grows too old.
    transaction_s = 5.0

    def begin(self) -> None:
        """Called before the first part of a run of files: time that has passed before it is not made up for."""

    def parts(self, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        """``batch`` in parts, in order; ask for each only after sending the one before."""
        yield batch

    def due(self, readings: int) -> float:
        """When to send the newest part, which has this many ``readings``: seconds of time.monotonic()."""
        return -math.inf


class FixedRate(Pacing):
    """``rate`` readings per second, in parts of a hundredth of a second or one row; skipped rows take no time."""

    transaction_s = 0.5

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._part_rows = min(max(1, int(rate * TICK_S)), MAX_PART_ROWS)
        self._next = -math.inf

    def begin(self) -> None:
        self._next = max(self._next, time.monotonic())

    def parts(self, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        for start in range(0, batch.num_rows, self._part_rows):
            yield batch.slice(start, self._part_rows)

    def due(self, readings: int) -> float:
        due = max(self._next, time.monotonic() - MAX_BEHIND_S)
        self._next = due + readings / self._rate
        return due


class Replay(Pacing):
    """The gaps between the readings' times, divided by ``speed``, become the gaps between sending.

    The clock of the replay starts with the first reading and never goes back: a reading that is older than one
    before it is due at once, and the next gap counts from the newest reading until then. A part is a hundredth of a
    second of this clock; it is due at the moment of its first reading.
    """

    transaction_s = 0.5

    def __init__(self, speed: float, columns: Columns) -> None:
        self._speed = speed
        self._columns = columns
        self._tick_us = TICK_S * speed * 1e6
        self._began: tuple[float, int] | None = None  # time.monotonic() and the first reading's microseconds
        self._newest = LONG_AGO
        self._due = -math.inf

    def parts(self, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        times = event_times(batch, self._columns).fill_null(LONG_AGO).to_pylist()
        newest = list(accumulate(times, max, initial=self._newest))[1:]
        start = 0
        while start < len(newest):
            end = bisect_right(newest, newest[start] + self._tick_us, lo=start + 1)
            self._due = self._moment(newest[start])
            self._newest = newest[end - 1]
            yield batch.slice(start, end - start)
            start = end

    def _moment(self, newest: int) -> float:
        if newest == LONG_AGO:  # no row with a time until now
            return -math.inf
        if self._began is None:
            self._began = time.monotonic(), newest
        began, first = self._began
        return began + (newest - first) / 1e6 / self._speed

    def due(self, readings: int) -> float:
        return self._due


def parse_speed(text: str) -> float:
    """``60x`` is 60. Raises ConfigurationError."""
    match = SPEED.fullmatch(text)
    speed = float(match[1]) if match else 0.0
    if not 0 < speed <= MAX_SPEED:
        raise ConfigurationError(
            f"--speed={' '.join(text.splitlines())} is not allowed "
            "(how many times faster than the readings' own times: 1x is real time, 60x, 0.5x; at most 1000000x)"
        )
    return speed


def choose_pacing(settings: Settings, speed: float | None) -> Pacing:
    """The pacing that PRODUCER_RATE or ``--speed`` asks for. Raises ConfigurationError for both."""
    if speed is None:
        return FixedRate(settings.producer_rate) if settings.producer_rate else Pacing()
    if settings.producer_rate:
        raise ConfigurationError(
            f"PRODUCER_RATE={settings.producer_rate:g} and --speed cannot be combined: "
            "remove one of them (PRODUCER_RATE=0 means no limit)"
        )
    return Replay(speed, Columns.of(settings))
