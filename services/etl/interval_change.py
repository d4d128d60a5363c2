"""Changing an interval's width, or what it is made of: no lost history, no moment without a summary.

It is made of minutes where readings are dense, and of the readings where they are not. A restart repeats these steps
safely:

1. create the new aggregate beside the old one, which continues to feed the summary (aggregates.py); from now on both
   are refreshed where the queue says,
2. refresh the new one over all the raw history there is; in between the queue is worked off,
3. in one transaction replace the summary's rows, the state and the live view (at the same width the rows are the same,
   and stay),
4. drop the old aggregate, and the minutes if nothing else is made of them.

History whose raw readings are gone keeps its old width. It ends at a boundary of both widths, so no two rows overlap.
If that is younger than what is kept, the change would close the present: the old width stays.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime

from psycopg import Connection

from services.core.logs import fields
from services.etl.aggregates import Aggregates
from services.etl.history import History
from services.etl.rollup import START, Rollup, bucket_ceil
from services.etl.summaries import SummaryMirror, piece_before

log = logging.getLogger("etl")


class IntervalChange:
    """Brings the aggregates to the widths that the settings ask for, and to what the readings ask for."""

    def __init__(
        self, connection: Connection, aggregates: Aggregates, history: History, summaries: SummaryMirror
    ) -> None:
        self._connection = connection
        self._aggregates = aggregates
        self._history = history
        self._summaries = summaries
        self._refused: set[Rollup] = set()  # and said so

    def steps(self) -> Iterator[None]:
        """What remains to be changed, piece by piece; in between the queue is worked off."""
        for rollup in self._aggregates.wanted():
            old = self._aggregates.current[rollup.name]
            boundary = None if rollup.minutes == old.minutes else self._common_boundary(old, rollup)
            new = rollup if boundary is not None else replace(rollup, minutes=old.minutes)
            if new == old:
                self._aggregates.building.pop(rollup.name, None)
            else:
                yield from self._change(old, new, boundary)
        self._aggregates.drop_others()

    def _change(self, old: Rollup, rollup: Rollup, boundary: datetime | None) -> Iterator[None]:
        if self._aggregates.building.get(rollup.name) != rollup:
            self._aggregates.build(rollup)
            log.info("interval_change_begun", extra=fields(old=old.aggregate, new=rollup.aggregate))
            yield
        since = boundary or START
        if since > START:
            # Between what is frozen and the boundary nothing will feed the summary; let the last readings through.
            self._history.close({rollup.name: since})
            while self._history.is_queued_before(since):
                yield
        piece = piece_before(self._connection, rollup, None, self._summaries.step)
        while piece is not None and piece[1] > since:
            began = time.monotonic()
            # What was changed by hand is in no queue row.
            self._summaries.refresh_all(rollup, max(piece[0], since), piece[1])
            self._summaries.pace(time.monotonic() - began)
            yield
            piece = piece_before(self._connection, rollup, piece[0], self._summaries.step)
        rows = self._aggregates.switch(rollup, boundary)
        log.info("interval_changed", extra=fields(old=old.aggregate, new=rollup.aggregate, summary_rows=rows))

    def _common_boundary(self, old: Rollup, new: Rollup) -> datetime | None:
        """Where the new width takes over: START, or the first time that is not closed and begins an interval of both.

        None: nowhere yet, since what is kept begins before it. (A change that was given up may have closed more than is
        frozen.)
        """
        self._history.read()
        common = Rollup(new.measurement, math.lcm(old.minutes, new.minutes)).width
        boundary = bucket_ceil(common, self._history.boundaries[new.name].closed)
        if boundary <= self._history.kept_since:
            return boundary
        if new not in self._refused:
            self._refused.add(new)
            log.warning(
                "interval_change_refused",
                extra=fields(
                    setting=new.measurement.interval_setting.upper(),
                    old=old.minutes,
                    new=new.minutes,
                    detail=f"intervals of both widths first begin together at {boundary}; closing history up to "
                    "there would refuse current readings, so the old width stays",
                ),
            )
        return None
