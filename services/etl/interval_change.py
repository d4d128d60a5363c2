"""Changing an interval's width, or what it is made of: no lost history, no moment without a summary.

It is made of minutes where readings are dense, and of the readings where they are not. A restart repeats these steps
safely:

1. create the new aggregate beside the old one, which goes on feeding the summary (aggregates.py); from now on what the
   queue names is refreshed in both,
2. refresh the new one over all the raw history there is, going on with the queue in between,
3. in one transaction replace the summary's rows, the state and the live view (at the same width the rows are the same,
   and stay),
4. drop the old aggregate, and the minutes if nothing else is made of them.

Readers see the old intervals until the transaction of step 3 commits, and then the new ones. History whose raw
readings are gone stays at its old width; where that ends is a boundary of both widths, so no two rows overlap. If that
boundary is younger than what is kept, the change would close the present: the old width stays.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta

from psycopg import Connection

from services.core.database import queries
from services.core.logs import fields
from services.etl.aggregates import Aggregates, statement
from services.etl.lease import Lease
from services.etl.retention import close
from services.etl.rollup import Rollup
from services.etl.summaries import SummaryMirror

SQL = queries("services.etl")
WHOLE_HISTORY = "-infinity"

log = logging.getLogger("etl")


class IntervalChange:
    """Brings the aggregates to the widths that the settings ask for, and to what the readings ask for."""

    def __init__(
        self, connection: Connection, lease: Lease, aggregates: Aggregates, summaries: SummaryMirror, keep: timedelta
    ) -> None:
        self._connection = connection
        self._lease = lease
        self._aggregates = aggregates
        self._summaries = summaries
        self._keep = keep
        self._refused: set[Rollup] = set()  # and said so

    def steps(self) -> Iterator[None]:
        """All that is left to change, piece by piece; in between the queue is worked off."""
        for rollup in self._aggregates.wanted():
            old = self._aggregates.current[rollup.name]
            edge = None if rollup.minutes == old.minutes else self._common_edge(old, rollup)
            new = rollup if edge is not None else replace(rollup, minutes=old.minutes)
            if new == old:
                self._aggregates.building.pop(rollup.name, None)
            else:
                yield from self._change(old, new, edge)
        self._aggregates.drop_others()

    def _change(self, old: Rollup, rollup: Rollup, edge: str | None) -> Iterator[None]:
        if self._aggregates.building.get(rollup.name) != rollup:
            self._aggregates.build(rollup)
            log.info("interval_change_begun", extra=fields(old=old.aggregate, new=rollup.aggregate))
            yield
        if edge not in (None, WHOLE_HISTORY):
            # Between what is frozen and the edge nothing will feed the summary; let the last readings through.
            close(self._connection, self._lease, {rollup.name: edge}, self._keep)
            while self._summaries.is_queued_before(edge):
                yield
        start, end = self._history(rollup, edge)
        while start is not None and end is not None and start < end:
            began = time.monotonic()
            stop = min(start + max(self._summaries.step // rollup.width, 1) * rollup.width, end)
            self._summaries.refresh_all(rollup, start, stop)  # what was changed by hand is in no queue row
            start = stop
            self._summaries.pace(time.monotonic() - began)
            yield
        rows = self._aggregates.switch(rollup, edge)
        log.info("interval_changed", extra=fields(old=old.aggregate, new=rollup.aggregate, summary_rows=rows))

    def _common_edge(self, old: Rollup, new: Rollup) -> str | None:
        """Where the new width takes over: -infinity, or the first boundary of both that is not closed; None: nowhere.

        That would have to be later than now minus what is kept.
        """
        common = Rollup(new.measurement, math.lcm(old.minutes, new.minutes))
        arguments = {"measurement": new.name, "common": common.width, "keep": self._keep}
        row = self._connection.execute(SQL["common_edge"], arguments).fetchone()
        assert row is not None
        edge, is_possible = row
        if is_possible:
            return str(edge)
        if new not in self._refused:
            self._refused.add(new)
            log.warning(
                "interval_change_refused",
                extra=fields(
                    setting=new.measurement.interval_setting.upper(),
                    old=old.minutes,
                    new=new.minutes,
                    detail=f"intervals of both widths begin together at {edge} for the first time, and closing history "
                    "up to there would refuse readings of now; the old width stays",
                ),
            )
        return None

    def _history(self, rollup: Rollup, edge: str | None) -> tuple[datetime | None, datetime | None]:
        """From the first interval after the edge to the end of the last one; None without readings."""
        row = self._connection.execute(statement("history", rollup), {"edge": edge}).fetchone()
        assert row is not None
        return row[0], row[1]
