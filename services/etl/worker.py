"""The etl service: one instance leads, polls the queue, refreshes and mirrors; the others stand by."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
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
from services.etl.compression import compress, compression
from services.etl.duties import Duty, next_due
from services.etl.history import History
from services.etl.interval_change import IntervalChange
from services.etl.lease import Lease, renewal
from services.etl.metrics import LEADING, QUEUE
from services.etl.reconcile import reconcile, self_check
from services.etl.rollup import configured_rollups
from services.etl.summaries import SummaryMirror

SETTLING_POLL_S = 0.2  # during a backfill: notice its end quickly
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
    probe = partial(database_probe, settings, QUEUE.sample)
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
                leader = Leader(connection, settings)
                if wait_to_lead(leader.lease, settings, shutdown):
                    with renewal(settings, connection), compression(settings):
                        LEADING.set(1)
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
    """After a signal give the running statement a moment, then cancel it, then cut the connection.

    The next start repeats the work. Without this a long refresh, or a server that does not answer, would hold us up.
    """
    shutdown.wait_until_requested()
    threading.Event().wait(CANCEL_AFTER_S)
    for connection in connections:
        with suppress(psycopg.Error):
            connection.cancel_safe(timeout=CUT_AFTER_S)
    threading.Event().wait(CUT_AFTER_S)
    for connection in connections:
        cut(connection)


def wait_to_lead(lease: Lease, settings: Settings, shutdown: Shutdown) -> bool:
    """Stand by as long as another instance leads; False if a signal came first."""
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


def run_once(settings: Settings, shutdown: Shutdown) -> None:
    """All that is queued, then all that the settings ask for. Raises PermanentError if another instance works."""
    connect_at_start(settings, shutdown, tables=True).close()
    with translated(), connect_for_work(settings) as connection:
        leader = Leader(connection, settings)
        seen = ""
        while not leader.lease.try_take():
            seen = seen or leader.lease.expires_at
            if leader.lease.expires_at != seen:  # it was renewed
                raise PermanentError("another etl instance leads and refreshes the summaries; stop it first")
            if shutdown.wait(TAKE_INTERVAL_S):
                raise PermanentError("stopped while another etl instance held the lead")
        with renewal(settings, connection):
            leader.run_once()


def run_reconcile(settings: Settings, shutdown: Shutdown) -> dict[str, int]:
    """Compare the summaries with the raw readings and repair them; the number of rows that differed.

    If another instance leads, it does the repair, for as long as it lives.
    """
    connect_at_start(settings, shutdown, tables=True).close()
    with translated(), connect_for_work(settings) as connection, renewal(settings, connection):
        leader = Leader(connection, settings)
        if leader.take_over() is not None:
            leader.run_once()
        return reconcile(connection, settings.measurements, leader.take_over, shutdown)


class Leader:
    """The one instance that works, over one connection, as long as that one's lease lasts."""

    def __init__(self, connection: Connection, settings: Settings) -> None:
        self.has_worked = False
        self._is_prepared = False
        self._connection = connection
        self._settings = settings
        self.lease = Lease(connection)
        self.history = History(connection, self.lease, timedelta(days=settings.raw_retention_days))
        self.aggregates = Aggregates(connection, self.lease, self.history, configured_rollups(settings))
        self.summaries = SummaryMirror(connection, self.lease, self.aggregates, self.history)
        self.change = IntervalChange(connection, self.aggregates, self.history, self.summaries)
        self._duties = [
            Duty("live_views", self.aggregates.show_live, DUTIES_INTERVAL_S),
            Duty("catch_up", self.summaries.catch_up, DUTIES_INTERVAL_S),
            Duty("interval_change", self.change.steps, CHANGE_INTERVAL_S),
            Duty("retention", self.history.drop_expired, DUTIES_INTERVAL_S),
        ]

    def take_over(self) -> SummaryMirror | None:
        """What does the work, with all that it needs; None if another instance leads."""
        if not self.lease.try_take():
            self._is_prepared = False  # whoever leads may change what we know
            return None
        if not self._is_prepared:
            self.aggregates.prepare()
            self.summaries.prepare()
            self._is_prepared = True
        return self.summaries

    def run(self, shutdown: Shutdown) -> None:
        """Poll the queue again and again. On a busy stream it is never empty, so nothing waits for that."""
        self._lead()
        duties = list(self._duties)
        if self._settings.etl_check_seconds:
            check = partial(self_check, self._connection, self.lease, self.aggregates, self.history)
            duties.append(Duty("self_check", check, self._settings.etl_check_seconds))
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

    def run_once(self) -> None:
        """Do all that is queued, then what the settings ask for: other widths, retention, compression."""
        self._lead()
        self._work_off()
        failure = None
        for steps in (*(duty.finish for duty in self._duties), self._compress):
            try:
                with translated():
                    for _ in steps():
                        self._work_off()
            except PipelineError as error:
                if self._connection.closed:
                    raise
                failure = failure or error
        self.lease.release()
        self._is_prepared = False
        if failure is not None:
            raise failure

    def _lead(self) -> None:
        if self.take_over() is None:
            raise LeaseLostError("another etl instance leads")

    def _compress(self) -> Iterator[None]:
        if self._settings.compress_after_days:
            with connect_for_work(self._settings) as own:
                yield from compress(own, timedelta(days=self._settings.compress_after_days))

    def _pause(self, shutdown: Shutdown, seconds: float) -> None:
        """Until the next poll is due, or some of the history that is being loaded has settled."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if not self.summaries.are_unsettled:
                shutdown.wait(left)
                return
            if shutdown.wait(min(left, SETTLING_POLL_S)) or self.summaries.have_settled():
                return

    def _work_off(self) -> None:
        """Until the queue is empty."""
        while self._work(settled=False):
            pass

    def _work(self, *, settled: bool) -> bool:
        self.aggregates.suit_first_readings()
        return self.summaries.refresh_queued(settled=settled)
