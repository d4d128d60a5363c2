"""The etl service: one instance leads, looks at the queue, refreshes and mirrors; the others stand by."""

from __future__ import annotations

import logging
import threading
import time
from functools import partial

from psycopg import Connection

from services.core.backoff import Retries
from services.core.config import Settings
from services.core.database import LEADER_LOCK, connect, connect_at_start, cut, queries, translated
from services.core.errors import PermanentError, TransientError
from services.core.logs import fields
from services.core.monitoring import DATABASE, Monitoring, database_probe
from services.core.shutdown import Shutdown
from services.etl.aggregates import Aggregates
from services.etl.instruments import LEADING, QUEUE
from services.etl.interval_change import change_intervals
from services.etl.metrics import configured_metrics
from services.etl.reconcile import reconcile
from services.etl.retention import Retention
from services.etl.summaries import Summaries

SQL = queries("services.etl")
SETTLING_POLL_S = 0.2  # while history is loaded: its end shall be seen soon
FINISH_WITHIN_S = 5.0  # a service has 10 s to end
HUNG_AFTER_S = 3600.0  # a refresh of long history is one statement

log = logging.getLogger("etl")


def run(settings: Settings, shutdown: Shutdown, *, once: bool = False) -> int:
    """Keep the summaries equal to the readings until a signal; ``once``: until the queue is empty."""
    if once:
        connect_at_start(settings, shutdown).close()
        with translated(), connect(settings) as connection:
            if not try_lead(connection):
                raise PermanentError("another etl instance leads and refreshes the summaries; stop it first")
            Leader(connection, settings).run_once()
        return 0
    probe = partial(database_probe, settings, QUEUE.look)
    with Monitoring(settings, shutdown, "etl", probe, hung_after_s=HUNG_AFTER_S):
        connect_at_start(settings, shutdown).close()
        lead_or_stand_by(settings, shutdown)
    log.info("stopped")
    return 0


def lead_or_stand_by(settings: Settings, shutdown: Shutdown) -> None:
    """Until a signal comes; from the beginning whenever the database is away."""
    retries = Retries()
    open_now: list[Connection] = []
    threading.Thread(target=cut_when_late, args=(shutdown, open_now), daemon=True).start()
    while not shutdown.requested:
        leader = None
        try:
            with translated(), connect(settings) as connection:
                open_now[:] = [connection]
                if wait_to_lead(connection, settings, shutdown):
                    LEADING.set(1)
                    leader = Leader(connection, settings)
                    leader.run(shutdown)
        except TransientError as error:
            DATABASE.note_failure()
            if leader is not None and leader.has_worked:
                retries = Retries()
            pause = retries.pause_after(error)
            log.warning("database_unavailable", extra=fields(detail=error, retry_s=round(pause, 1)))
            shutdown.wait(pause)
        finally:
            LEADING.set(0)


def cut_when_late(shutdown: Shutdown, connections: list[Connection]) -> None:
    """After a signal give the statement in hand a moment, then cut the connection: the work is repeated one day.

    Without this a long refresh, or a server that does not answer, would hold the service up.
    """
    shutdown.wait_until_requested()
    threading.Event().wait(FINISH_WITHIN_S)
    for connection in connections:
        cut(connection)


def run_reconcile(settings: Settings, shutdown: Shutdown) -> dict[str, int]:
    """Compare the summaries with the raw readings and repair them; the number of rows that differed.

    If another instance leads, it does the repair.
    """
    connect_at_start(settings, shutdown).close()
    with translated(), connect(settings) as connection:
        leader = Leader(connection, settings) if try_lead(connection) else None
        if leader is not None:
            leader.run_once()
        return reconcile(connection, leader.summaries if leader is not None else None, shutdown)


def try_lead(connection: Connection) -> bool:
    """Take the leader's lock if nobody has it; it ends with the connection."""
    row = connection.execute(SQL["try_lead"], {"key": LEADER_LOCK}).fetchone()
    return row is not None and bool(row[0])


def wait_to_lead(connection: Connection, settings: Settings, shutdown: Shutdown) -> bool:
    """Stand by as long as another instance leads; False if a signal came first."""
    announced = False
    while not shutdown.requested:
        if try_lead(connection):
            log.info("leading")
            return True
        DATABASE.note_success()
        if not announced:
            log.info("standing_by")
            announced = True
        shutdown.wait(settings.etl_poll_seconds)
    return False


class Leader:
    """The one instance that works. Its connection holds the lock, so losing one is losing both."""

    def __init__(self, connection: Connection, settings: Settings) -> None:
        self.has_worked = False
        self._connection = connection
        self._settings = settings
        self._aggregates = Aggregates(connection, configured_metrics(settings))
        self._aggregates.prepare()
        self.summaries = Summaries(connection, self._aggregates)
        self._retention = Retention(connection, settings, self._aggregates, self.summaries)
        self._retention.apply()

    def run(self, shutdown: Shutdown) -> None:
        """Look at the queue again and again. On a busy stream it is never empty, so nothing waits for that."""
        while not shutdown.requested:
            self._work(settled=True)
            self.has_worked = True
            self._pause(shutdown)

    def _pause(self, shutdown: Shutdown) -> None:
        """Until the next look is due, or some of the history that is being loaded has settled."""
        until = time.monotonic() + self._settings.etl_poll_seconds
        while (left := until - time.monotonic()) > 0:
            if not self.summaries.are_unsettled:
                shutdown.wait(left)
                return
            if shutdown.wait(min(left, SETTLING_POLL_S)) or self.summaries.have_settled():
                return

    def run_once(self) -> None:
        """Do all that is queued, then what the settings ask for: other widths, retention."""
        self._work(settled=False)

    def _work(self, *, settled: bool) -> None:
        self.summaries.refresh_queued(settled=settled)
        change_intervals(self._connection, self._aggregates, self.summaries)
        self._retention.run_when_due()
