"""The etl service: one instance leads, looks at the queue, refreshes and mirrors; the others stand by."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from psycopg import Connection

from services.core.backoff import pauses
from services.core.config import Settings
from services.core.database import connect, connect_at_start, queries, translated
from services.core.errors import PermanentError, TransientError
from services.core.logs import fields
from services.core.shutdown import Shutdown
from services.etl.aggregates import Aggregates
from services.etl.metrics import configured_metrics
from services.etl.summaries import Summaries

SQL = queries("services.etl")
LEADER_LOCK = 0x5E_50_11  # any number of ours; session level, so that it ends with the leader's connection

log = logging.getLogger("etl")


def run(settings: Settings, shutdown: Shutdown, *, once: bool = False) -> int:
    """Keep the summaries equal to the readings until a signal; ``once``: until the queue is empty."""
    connect_at_start(settings, shutdown).close()
    if once:
        run_once(settings)
        return 0
    while not shutdown.requested:
        waits = pauses()
        try:
            with leading(settings, shutdown) as connection:
                lead(connection, settings, shutdown)
        except TransientError as error:
            pause = next(waits)
            log.warning("database_unavailable", extra=fields(detail=error, retry_s=round(pause, 1)))
            shutdown.wait(pause)
    log.info("stopped")
    return 0


def run_once(settings: Settings) -> None:
    """Do all that is queued, then end. Raises PermanentError if another instance leads."""
    with translated(), connect(settings) as connection:
        if not try_lead(connection):
            raise PermanentError("another etl instance leads and refreshes the summaries; stop it first")
        aggregates = Aggregates(connection, configured_metrics(settings))
        aggregates.prepare()
        summaries = Summaries(connection, aggregates)
        while summaries.refresh_queued():
            pass
        finish_building(aggregates, summaries)


@contextmanager
def leading(settings: Settings, shutdown: Shutdown) -> Iterator[Connection]:
    """A connection that holds the leader's lock; waits for it as long as another instance leads."""
    with translated(), connect(settings) as connection:
        announced = False
        while not shutdown.requested and not try_lead(connection):
            if not announced:
                log.info("standing_by")
                announced = True
            shutdown.wait(settings.etl_poll_seconds)
        log.info("leading")
        yield connection


def try_lead(connection: Connection) -> bool:
    """Take the leader's lock if nobody has it."""
    row = connection.execute(SQL["try_lead"], {"key": LEADER_LOCK}).fetchone()
    return row is not None and bool(row[0])


def lead(connection: Connection, settings: Settings, shutdown: Shutdown) -> None:
    """Look at the queue again and again; the pause comes only when it was empty."""
    if shutdown.requested:
        return
    aggregates = Aggregates(connection, configured_metrics(settings))
    aggregates.prepare()
    summaries = Summaries(connection, aggregates)
    while not shutdown.requested:
        if not summaries.refresh_queued():
            finish_building(aggregates, summaries)
        shutdown.wait(settings.etl_poll_seconds)


def finish_building(aggregates: Aggregates, summaries: Summaries) -> None:
    """Let the aggregates of changed intervals take over."""
    for metric in tuple(aggregates.building.values()):
        aggregates.build(metric, summaries.refresh)
