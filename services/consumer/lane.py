"""A lane: partitions that are stored one batch after another, by a writer of their own.

The partitions are divided among a few lanes, so that several sessions of PostgreSQL work at once. A partition stays in
its lane while it is ours, so its batches are stored in their order.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from queue import SimpleQueue

from services.consumer.batch import Batch
from services.consumer.metrics import MESSAGES_ABANDONED
from services.consumer.positions import Positions
from services.consumer.writer import Outcome, Writer
from services.core.config import Settings

FIRST_BATCH_ROWS = 5000  # so the database starts soon; each batch may be twice as large as the one before
MAX_BATCH_BYTES = 8 * 1024 * 1024  # of all lanes: three batches, and what is fetched ahead, fit a small container
NEARLY_FULL = 0.9  # no polls for the few messages that would still fit


class Lane:
    """The batch that is filled, the full one that waits, and the one that is being stored. For the polling thread."""

    def __init__(self, settings: Settings, positions: Positions, outcomes: SimpleQueue[tuple[Lane, Outcome]]) -> None:
        self.partitions: set[int] = set()
        self.writer = Writer(settings, positions, lambda outcome: outcomes.put((self, outcome)))
        self.filling = Batch()
        self.ready: Batch | None = None
        self.paused = False
        self.checked_at = time.monotonic()  # when its positions were last compared with the database's
        self._ready_at = 0.0
        self._max_rows = settings.consumer_batch_rows
        self._max_bytes = MAX_BATCH_BYTES // settings.consumer_writers
        self._max_age_s = settings.consumer_batch_seconds
        self._rows = min(FIRST_BATCH_ROWS, self._max_rows)

    @property
    def room(self) -> int:
        """How many more readings the batch may take."""
        return self._rows - len(self.filling) if self.filling.size_bytes < self._max_bytes else 0

    @property
    def is_full(self) -> bool:
        """Whether what is polled has to wait."""
        return self.room <= (1 - NEARLY_FULL) * self._rows

    @property
    def waiting(self) -> int:
        """How many messages are held and not being stored yet."""
        return len(self.filling) + len(self.ready or ())

    @property
    def is_empty(self) -> bool:
        """Whether all that was polled is stored."""
        return self.filling.is_empty and self.ready is None and not self.writer.busy

    def left_s(self) -> float:
        """Seconds until the batch has to be written, however small it is."""
        return max(0.0, self.filling.opened_at + self._max_age_s - time.monotonic())

    def close_batch(self, new: Batch, *, at_end: bool) -> None:
        """If the batch is due, and none is ready, make it ready for the writer, and fill ``new``."""
        batch = self.filling
        if self.ready is not None or batch.is_empty:
            return
        only_positions = not len(batch)  # to correct
        if at_end or only_positions or self.is_full or not self.left_s():
            self.ready, self.filling, self._ready_at = batch, new, time.monotonic()
            self._rows = min(2 * self._rows, self._max_rows)

    def submit_ready(self) -> None:
        """Store the ready batch, if there is one; only when the writer is idle."""
        if self.ready is not None:
            self.writer.submit(self.ready)
            self.ready = None

    def blocked_s(self) -> float:
        """For how long the ready batch has waited for the writer."""
        return 0.0 if self.ready is None else time.monotonic() - self._ready_at

    def forget(self, new: Batch) -> None:
        """Abandon what is not being stored."""
        MESSAGES_ABANDONED.inc(self.waiting)
        self.filling, self.ready, self.paused = new, None, False

    def lose(self, gone: Collection[int]) -> None:
        """These partitions are another consumer's."""
        held = self.waiting
        self.partitions -= set(gone)
        self.filling = self.filling.without(gone)
        self.ready = None if self.ready is None else self.ready.without(gone)
        MESSAGES_ABANDONED.inc(held - self.waiting)
