"""Self-healing: compare the summaries with the raw readings, and repair what differs.

In any one snapshot a summary row differs from its raw readings only if the queue names its interval: readings
and queue rows are committed together, and so are summary rows and the end of their queue rows. Whatever differs
beyond that (rows that were changed by hand, a bug) is queued to be recomputed.

The leader compares on its own: the last day each time, and one more piece of what is older, from the newest to the
oldest and again. ``etl --reconcile`` compares all of it at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator

from psycopg import Connection

from services.core.database import one, queries
from services.core.logs import fields
from services.core.shutdown import Shutdown
from services.etl.aggregates import Aggregates, statement, stored_rollups
from services.etl.history import History
from services.etl.lease import Lease
from services.etl.metrics import SUMMARY_DIFFERENCES
from services.etl.rollup import Rollup
from services.etl.summaries import PIECE, SummaryMirror, Window, piece_before

SQL = queries("services.etl")
POLL_INTERVAL_S = 0.5

log = logging.getLogger("etl")


def self_check(connection: Connection, lease: Lease, aggregates: Aggregates, history: History) -> Iterator[None]:
    """Compare the last day of every measurement, and one more piece of what is older.

    The table summary_check says how far this has come and what it found.
    """

    def compare(rollup: Rollup, window: Window) -> int:
        """Queue what differs; the number of rows."""
        if not find_differences(connection, rollup, window, [])[0]:
            return 0
        history.note_dropped()  # somebody may just have dropped a chunk
        return queue_differences(connection, rollup, window, [])

    for rollup in tuple(aggregates.current.values()):
        recent, next_before = one(connection, statement("last_check", rollup))
        newest = piece_before(connection, rollup, None)
        # The open interval of a wide rollup may be a year of readings: it gets its turn with the others.
        has_recent = newest is not None and newest[1] > recent and rollup.width <= PIECE
        differing = compare(rollup, (recent, newest[1])) if newest is not None and has_recent else 0
        yield
        before = recent if has_recent else None
        older = next_before and piece_before(connection, rollup, next_before)
        older = older or piece_before(connection, rollup, before)
        if older is not None:
            differing += compare(rollup, older)
        arguments = {"measurement": rollup.name, "next_before": older and older[0], "differing": differing}
        with lease.transaction():
            connection.execute(SQL["note_check"], arguments)
        SUMMARY_DIFFERENCES.labels(rollup.name).inc(differing)
        yield


def find_differences(connection: Connection, rollup: Rollup, window: Window, ours: list[int]) -> tuple[int, object]:
    """How many rows differ, and their intervals; ``ours`` are queue rows that do not count."""
    arguments = {"start": window[0], "end": window[1], "ours": ours}
    rows, touched = one(connection, statement("find_differences", rollup), arguments)
    return rows, touched


def queue_differences(connection: Connection, rollup: Rollup, window: Window, ours: list[int]) -> int:
    """Queue the intervals that differ, and add the queue row to ``ours``; the number of rows that differ."""
    rows, touched = find_differences(connection, rollup, window, ours)
    if rows:
        ours += one(connection, SQL["queue_again"], {"touched": touched})
        log.warning("summary_differs", extra=fields(measurement=rollup.name, rows=rows, start=window[0], end=window[1]))
    return rows


def reconcile(
    connection: Connection, names: Collection[str], take_over: Callable[[], SummaryMirror | None], shutdown: Shutdown
) -> dict[str, int]:
    """Queue what differs and wait until it is repaired; the number of rows that differed, by measurement.

    ``take_over`` gives what does the repair as soon as we lead; None while another instance does, which repairs it.
    """
    differing: dict[str, int] = {}
    before = [number for (number,) in connection.execute(SQL["queued_ids"])]
    ids: list[int] = []
    for rollup in stored_rollups(connection).values():
        if rollup.name not in names:
            continue
        differing[rollup.name] = 0
        window = piece_before(connection, rollup, None)
        while window is not None and not shutdown.requested:
            differing[rollup.name] += queue_differences(connection, rollup, window, ids)
            window = piece_before(connection, rollup, window[0])
    while one(connection, SQL["still_queued"], {"ids": before + ids})[0]:
        summaries = take_over()
        if summaries is not None and summaries.refresh_queued():
            continue
        if shutdown.wait(POLL_INTERVAL_S):
            break
    return differing
