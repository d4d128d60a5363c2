"""The etl service: one instance leads, looks at the queue, refreshes and mirrors; the others stand by."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from datetime import timedelta
from functools import partial

import psycopg
from psycopg import Connection

from services.core.backoff import Retries
from services.core.config import Settings
from services.core.database import connect_at_start, connect_for_work, cut, translated
from services.core.errors import LeaseLostError, PermanentError, PipelineError, TransientError
from services.core.logs import fields
from services.core.monitoring import DATABASE, database_probe, monitored
from services.core.shutdown import Shutdown
from services.etl.aggregates import Aggregates
from services.etl.duties import Duty, next_due
from services.etl.interval_change import IntervalChange
from services.etl.lease import Lease, renewal
from services.etl.metrics import LEADING, QUEUE
from services.etl.reconcile import SelfCheck, reconcile
from services.etl.retention import Retention, compress, compression
from services.etl.rollup import configured_rollups
from services.etl.summaries import SummaryMirror

SETTLING_POLL_S = 0.2  # while history is loaded: its end should be seen soon
SHORT_STEP_S = 0.02
TAKE_INTERVAL_S = 0.2
DUTIES_INTERVAL_S = 600.0
CHANGE_INTERVAL_S = 10.0  # readings may have become dense
CANCEL_AFTER_S = 4.0  # a service has 10 s to end
CUT_AFTER_S = 1.0
HUNG_AFTER_S = 3600.0  # one step: a refresh of a day, or of one long interval

log = logging.getLogger("etl")


def run(settings: Settings, shutdown: Shutdown, *, once: bool = False) -> int:
    """Keep the summaries equal to the readings until a signal; ``once``: until the queue is empty."""
    if once:
        run_once(settings, shutdown)
        return 0
    probe = partial(database_probe, settings, QUEUE.look)
    with monitored(settings, shutdown, "etl", probe, hung_after_s=HUNG_AFTER_S):
        connect_at_start(settings, shutdown, tables=True).close()
        lead_or_stand_by(settings, shutdown)
    log.info("stopped")
    return 0


def lead_or_stand_by(settings: Settings, shutdown: Shutdown) -> None:
    """Until a signal comes; from the beginning whenever the database is unavailable."""
    retries = Retries()
    open_now: list[Connection] = []
    threading.Thread(target=cut_when_late, args=(shutdown, open_now), daemon=True).start()
    while not shutdown.requested:
        leader = None
        try:
            with translated(), connect_for_work(settings) as connection:
                open_now[:] = [connection]
                if wait_to_lead(connection, settings, shutdown):
                    with renewal(settings, connection), compression(settings):
                        LEADING.set(1)
                        leader = Leader(connection, settings)
                        leader.run(shutdown)
        except LeaseLostError as error:
            log.warning("lead_lost", extra=fields(detail=error))
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
    """After a signal give the statement in hand a moment, then cancel it, then cut the connection.

    The work is repeated one day. Without this a long refresh, or a server that does not answer, would hold us up.
    """
    shutdown.wait_until_requested()
    threading.Event().wait(CANCEL_AFTER_S)
    for connection in connections:
        with suppress(psycopg.Error):
            connection.cancel_safe(timeout=CUT_AFTER_S)
    threading.Event().wait(CUT_AFTER_S)
    for connection in connections:
        cut(connection)


def run_once(settings: Settings, shutdown: Shutdown) -> None:
    """All that is queued, then all that the settings ask for. Raises PermanentError if another instance works."""
    connect_at_start(settings, shutdown, tables=True).close()
    with translated(), connect_for_work(settings) as connection:
        lease = Lease(connection)
        seen = ""
        while not lease.try_take():
            seen = seen or lease.expires_at
            if lease.expires_at != seen:  # it was renewed
                raise PermanentError("another etl instance leads and refreshes the summaries; stop it first")
            if shutdown.wait(TAKE_INTERVAL_S):
                raise PermanentError("stopped while another etl instance held the lead")
        with renewal(settings, connection):
            Leader(connection, settings).run_once()


def run_reconcile(settings: Settings, shutdown: Shutdown) -> dict[str, int]:
    """Compare the summaries with the raw readings and repair them; the number of rows that differed.

    If another instance leads, it does the repair, for as long as it lives.
    """
    connect_at_start(settings, shutdown, tables=True).close()
    with translated(), connect_for_work(settings) as connection, renewal(settings, connection):
        lease = Lease(connection)
        leaders: list[Leader] = []

        def take_over() -> SummaryMirror | None:
            if not leaders and lease.try_take():
                leaders.append(Leader(connection, settings))
            return leaders[0].take_over() if leaders else None

        if take_over() is not None:
            leaders[0].run_once()
        return reconcile(connection, settings.measurements, take_over, shutdown)


def wait_to_lead(connection: Connection, settings: Settings, shutdown: Shutdown) -> bool:
    """Stand by as long as another instance leads; False if a signal came first."""
    lease = Lease(connection)
    announced = False
    while not shutdown.requested:
        if lease.try_take():
            log.info("leading")
            return True
        DATABASE.note_success()
        if not announced:
            log.info("standing_by")
            announced = True
        shutdown.wait(settings.etl_poll_seconds)
    return False


class Leader:
    """The one instance that works, over one connection, as long as that one's lease lasts."""

    def __init__(self, connection: Connection, settings: Settings) -> None:
        self.has_worked = False
        self._connection = connection
        self._settings = settings
        keep = timedelta(days=settings.raw_retention_days)
        lease = Lease(connection)
        if not lease.try_take():
            raise LeaseLostError("another etl instance leads")
        self._aggregates = Aggregates(connection, lease, configured_rollups(settings))
        self._aggregates.prepare()
        self.summaries = SummaryMirror(connection, self._aggregates, lease, keep)
        self._lease = lease
        self.change = IntervalChange(connection, lease, self._aggregates, self.summaries, keep)
        self._duties = [
            Duty("live_views", self._aggregates.show_live, DUTIES_INTERVAL_S),
            Duty("catch_up", self.summaries.catch_up, DUTIES_INTERVAL_S),
            Duty("interval_change", self.change.steps, CHANGE_INTERVAL_S),
            Duty("retention", Retention(connection, lease, keep).steps, DUTIES_INTERVAL_S),
        ]

    def run(self, shutdown: Shutdown) -> None:
        """Look at the queue again and again. On a busy stream it is never empty, so nothing waits for that."""
        duties = list(self._duties)
        if self._settings.etl_check_seconds:
            check = SelfCheck(self._connection, self._lease, self._aggregates, self.summaries)
            duties.append(Duty("self_check", check.steps, self._settings.etl_check_seconds))
        while not shutdown.requested:
            has_refreshed = self._work(settled=True)
            self.has_worked = True
            pause = self._settings.etl_poll_seconds
            duty = next_due(duties)
            if duty is not None:
                took_s = duty.step(self._connection)
                pause = max(0.0, SHORT_STEP_S - took_s)  # it may be waiting for the queue
            if not has_refreshed:
                self._pause(shutdown, pause)

    def _pause(self, shutdown: Shutdown, seconds: float) -> None:
        """Until the next look is due, or some of the history that is being loaded has settled."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if not self.summaries.are_unsettled:
                shutdown.wait(left)
                return
            if shutdown.wait(min(left, SETTLING_POLL_S)) or self.summaries.have_settled():
                return

    def take_over(self) -> SummaryMirror | None:
        """What does the work, if nobody else leads."""
        return self.summaries if self._lease.try_take() else None

    def run_once(self) -> None:
        """Do all that is queued, then what the settings ask for: other widths, retention, compression."""
        if not self._lease.try_take():
            raise LeaseLostError("another etl instance leads")
        self._work_off()
        failure = None
        for duty in self._duties:
            try:
                with translated():
                    for _ in duty.finish():
                        self._work_off()
            except PipelineError as error:
                if self._connection.closed:
                    raise
                failure = failure or error
        try:
            if self._settings.compress_after_days:
                with translated(), connect_for_work(self._settings) as own:
                    for _ in compress(own, timedelta(days=self._settings.compress_after_days)):
                        pass
        except PipelineError as error:
            failure = failure or error
        self._lease.release()
        if failure is not None:
            raise failure

    def _work_off(self) -> None:
        """Until a look at the queue finds nothing."""
        while self._work(settled=False):
            pass

    def _work(self, *, settled: bool) -> bool:
        self._aggregates.suit_first_readings()
        return self.summaries.refresh_queued(settled=settled)
