"""Changing an interval's width: no lost history, no moment without a summary.

A restart repeats these steps safely:

1. create the new aggregate beside the old one, which goes on feeding the summary (aggregates.py),
2. refresh the new one over all the raw history there is, going on with the queue in between,
3. in one transaction replace the summary's rows, the state and the live view,
4. drop the old aggregate.

Readers see the old intervals until the transaction of step 3 commits, and then the new ones. History whose raw
readings are gone stays at its old width; where that ends is a boundary of both widths, so no two rows overlap.
"""

from __future__ import annotations

import logging
import math
from datetime import datetime, timedelta

from psycopg import Connection

from services.core.database import queries
from services.core.logs import fields
from services.etl.aggregates import Aggregates
from services.etl.metrics import BASE, Metric
from services.etl.summaries import Summaries

SQL = queries("services.etl")
STEP = timedelta(days=7)  # so much history is refreshed before the queue gets its turn
WHOLE_HISTORY = "-infinity"

log = logging.getLogger("etl")


def change_intervals(connection: Connection, aggregates: Aggregates, summaries: Summaries) -> None:
    """Steps 2 to 4 for every metric whose width has to change."""
    for metric in tuple(aggregates.building.values()):
        old = aggregates.current[metric.name]
        edge = common_edge(connection, old, metric)
        if edge != WHOLE_HISTORY:
            # Between what is frozen and the edge nothing will feed the summary; let the last readings through.
            connection.execute(SQL["close_history"], {"metric": metric.name, "edge": edge})
            summaries.refresh_queued()
        start, end = history(connection, metric, edge)
        while start is not None and end is not None and start < end:
            stop = min(start + max(STEP // metric.width, 1) * metric.width, end)
            summaries.refresh(BASE, start, stop)  # what was changed by hand is in no queue row
            summaries.refresh(metric.aggregate, start, stop)
            summaries.refresh_queued()
            start = stop
        rows = aggregates.switch(metric, edge)
        log.info("interval_changed", extra=fields(old=old.aggregate, new=metric.aggregate, summary_rows=rows))


def common_edge(connection: Connection, old: Metric, new: Metric) -> str:
    """Where the new width takes over: -infinity, or the first boundary of both that is not frozen."""
    common = Metric(new.name, math.lcm(old.minutes, new.minutes))
    row = connection.execute(SQL["common_edge"], {"metric": new.name, "common": common.width}).fetchone()
    assert row is not None
    return str(row[0])


def history(connection: Connection, metric: Metric, edge: str) -> tuple[datetime | None, datetime | None]:
    """From the first interval after the edge to the end of the last one; None without readings."""
    row = connection.execute(SQL["history"], {"edge": edge, "width": metric.width}).fetchone()
    assert row is not None
    return row[0], row[1]
