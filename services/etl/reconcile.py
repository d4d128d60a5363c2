"""Self-healing: compare the summaries with the raw readings, and repair what differs.

In any one snapshot a summary row differs from its raw readings only if the queue names its interval: readings
and queue rows are committed together, and so are summary rows and the end of their queue rows. Whatever differs
beyond that (rows that were changed by hand, a bug) is queued to be recomputed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import datetime, timedelta

from psycopg import Connection

from services.core.database import queries
from services.core.logs import fields
from services.core.shutdown import Shutdown
from services.etl.aggregates import statement, stored_metrics
from services.etl.metrics import Metric
from services.etl.summaries import Summaries

SQL = queries("services.etl")
STEP = timedelta(days=7)
LOOK_EVERY_S = 0.5

log = logging.getLogger("etl")


def reconcile(connection: Connection, summaries: Summaries | None, shutdown: Shutdown) -> dict[str, int]:
    """Queue what differs and wait until it is repaired; the number of rows that differed, for each metric.

    ``summaries`` does the repair; None when another instance leads and will do it.
    """
    differing: dict[str, int] = {}
    ids: list[int] = []
    for metric in stored_metrics(connection).values():
        differing[metric.name] = 0
        for start, end in steps(connection, metric):
            if shutdown.requested:
                break
            window = {"start": start, "end": end, "ours": ids}
            row = connection.execute(statement("find_differences", metric), window).fetchone()
            assert row is not None
            rows, touched = row
            if rows:
                differing[metric.name] += rows
                ids += connection.execute(SQL["queue_forced"], {"touched": touched}).fetchone() or ()
                log.warning("summary_differs", extra=fields(metric=metric.name, rows=rows, start=start, end=end))
    if summaries is not None:
        summaries.refresh_queued()
    while is_queued(connection, ids) and not shutdown.wait(LOOK_EVERY_S):
        pass
    return differing


def steps(connection: Connection, metric: Metric) -> Iterator[tuple[datetime, datetime]]:
    """Windows of whole intervals over all raw readings and summary rows that are not frozen."""
    row = connection.execute(statement("compared_range", metric)).fetchone()
    start, end = row if row is not None else (None, None)
    while start is not None and end is not None and start < end:
        stop = min(start + max(STEP // metric.width, 1) * metric.width, end)
        yield start, stop
        start = stop


def is_queued(connection: Connection, ids: list[int]) -> bool:
    """Whether the leader has still to do one of these queue rows."""
    row = connection.execute(SQL["still_queued"], {"ids": ids}).fetchone()
    return row is not None and bool(row[0])
