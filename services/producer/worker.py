"""The producer: every row of a source into the topic, once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from services.core.config import Settings
from services.core.errors import STOPPED, ConfigurationError, PermanentError, PipelineError
from services.core.kafka import REPEATED, connect_admin, create_topics
from services.core.logs import fields
from services.core.monitoring import Monitoring, kafka_probe
from services.core.shutdown import Shutdown
from services.producer.display import show_rows
from services.producer.job import Job
from services.producer.metrics import (
    FILES_UNREADABLE,
    WATCHING,
)
from services.producer.pacing import choose_pace
from services.producer.progress import Stopped, progress_topic, topic_id
from services.producer.publisher import Publisher
from services.producer.source import (
    Source,
    SourceFile,
    open_source,
)
from services.producer.watch import Watch

log = logging.getLogger("producer")

HUNG_AFTER_S = 300.0  # an object store that does not answer is waited for


def run(
    settings: Settings,
    shutdown: Shutdown,
    *,
    resend: bool = False,
    overwrite: bool = False,
    speed: float | None = None,
) -> int:
    """Send what PARQUET_URL names and was not sent before; with ``resend`` all of it again.

    What is sent again is marked as repeated, so that it overwrites nothing, unless ``overwrite`` is set.

    ``speed``: replay by the readings' times, with the gaps between them divided by it. With PRODUCER_WATCH_SECONDS the
    files are those that are there or arrive until ``shutdown`` is requested.

    Returns 0 when all is sent, STOPPED when ``shutdown`` was requested before: what was committed until then stays,
    and the next run goes on from there. Raises ConfigurationError before anything is sent, PermanentError
    when no retry can help, or when there are rows and none of them can be sent.
    """
    pace = choose_pace(settings, speed)
    _check_options(settings, resend=resend, overwrite=overwrite)
    period_s, done = settings.producer_watch_seconds, False
    with Monitoring(settings, shutdown, "producer", partial(kafka_probe, settings), hung_after_s=HUNG_AFTER_S):
        try:
            source: Source | Watch
            if period_s:
                source = Watch(settings, shutdown)
                WATCHING.set(1)
                log.info("watching", extra=fields(url=source.url, seconds=period_s))
            else:
                source = open_source(settings, shutdown)
                log.info("source_opened", extra=fields(url=source.url, files=len(source.files), rows=source.rows))
            admin = connect_admin(settings, shutdown)
            create_topics(admin, settings, progress_topic(settings), shutdown=shutdown)
            topic = topic_id(admin, settings, shutdown)
            with Publisher(settings, source.url, shutdown) as publisher:
                make_job = partial(Job, settings, publisher, shutdown, topic, pace)
                if isinstance(source, Watch):
                    _send_arriving(source, make_job, shutdown, period_s)
                else:
                    done = _send(source, make_job, ("" if overwrite else REPEATED.decode()) if resend else None)
        except Stopped as error:
            log.warning("stopped", extra=fields(reason=str(error)))
    return 0 if done or period_s else STOPPED


def _check_options(settings: Settings, *, resend: bool, overwrite: bool) -> None:
    period_s = settings.producer_watch_seconds
    if period_s and resend:
        raise ConfigurationError(
            f"PRODUCER_WATCH_SECONDS={period_s:g} and --resend cannot both hold: resend with PRODUCER_WATCH_SECONDS=0"
        )
    if overwrite and not resend:
        raise ConfigurationError("--overwrite goes with --resend: it lets rows that are sent again overwrite")


def _send(source: Source, make_job: Callable[..., Job], resend: str | None) -> bool:
    """Send what of ``source`` was not sent before; with ``resend`` all of it, marked with that unless it is "".

    Returns whether all is sent now.
    """
    failures: list[PipelineError] = []

    def note_unreadable(_file: SourceFile | None, error: PipelineError) -> None:
        FILES_UNREADABLE.inc()
        log.warning("unreadable", extra=fields(error=str(error)))
        failures.append(error)

    for error in source.unreadable:
        note_unreadable(None, error)
    with show_rows(source.rows) as show:
        job = make_job(source, show, note_unreadable)
        job.run(resend=resend)
    nothing_sent = job.report()
    if failures:
        raise PermanentError(f"{len(failures)} of {source.found} files were not sent to their end: {failures[0]}")
    if nothing_sent:
        raise PermanentError(f"no row of {source.url} could be sent: {nothing_sent}")
    return job.is_whole


def _send_arriving(watch: Watch, make_job: Callable[..., Job], shutdown: Shutdown, period_s: float) -> None:
    """Send the files of each look, until the service shall end.

    The first look finds nothing whole yet: the publisher starts then, and ends what an earlier run left open.
    """
    source, started = watch.look(), False
    while not shutdown.requested:
        if source.files or not started:
            with show_rows(source.rows) as show:
                job = make_job(source, show, watch.note_unreadable, started)
                job.run(resend=None)
            started = True
            for file in job.sent_files():
                watch.note_sent(file)
            job.report()
        if shutdown.wait(period_s):
            return
        source = watch.look()
