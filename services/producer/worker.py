"""The producer: every row of a source into the topic, once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial

from services.core.config import Settings
from services.core.errors import STOPPED, ConfigurationError, PermanentError, PipelineError
from services.core.kafka import REPEATED, connect_admin, create_topics
from services.core.logs import fields
from services.core.monitoring import kafka_probe, monitored
from services.core.shutdown import Shutdown
from services.producer.display import show_rows
from services.producer.job import Job
from services.producer.metrics import FILES_UNREADABLE
from services.producer.pacing import choose_pacing
from services.producer.progress import progress_topic, topic_id
from services.producer.publisher import Publisher
from services.producer.source import Source, SourceFile, open_source
from services.producer.watch import Watch

log = logging.getLogger("producer")

HUNG_AFTER_S = 300.0  # an object store that does not answer is waited for


class Once:
    """The files that are there at the start; Watch has the same methods for those that arrive until shutdown."""

    def __init__(self, settings: Settings, shutdown: Shutdown) -> None:
        self._source = open_source(settings, shutdown)
        self._failures: list[PipelineError] = []
        self.url = self._source.url
        self.exit_code = STOPPED
        log.info("source_opened", extra=fields(url=self.url, files=len(self._source.files), rows=self._source.rows))

    def sources(self) -> Iterator[Source]:
        """One source."""
        for error in self._source.unreadable:
            self.note_unreadable(None, error)
        yield self._source

    def note_unreadable(self, _file: SourceFile | None, error: PipelineError) -> None:
        """It turned out to be damaged, or has changed or gone; the other files are sent nevertheless."""
        FILES_UNREADABLE.inc()
        log.warning("unreadable", extra=fields(error=str(error)))
        self._failures.append(error)

    def settle(self, sent: list[SourceFile], nothing_sent: str) -> None:
        """Raise PermanentError where a file was not sent to its end, or nothing could be sent."""
        failures, files = self._failures, len(self._source.files)
        if failures:
            found = files + len(self._source.unreadable)
            raise PermanentError(f"{len(failures)} of {found} files were not sent to their end: {failures[0]}")
        if nothing_sent:
            raise PermanentError(f"no row of {self.url} could be sent: {nothing_sent}")
        if len(sent) == files:
            self.exit_code = 0


def run(
    settings: Settings,
    shutdown: Shutdown,
    *,
    resend: bool = False,
    overwrite: bool = False,
    speed: float | None = None,
) -> int:
    """Send what PARQUET_URL names and was not sent before, replayed at ``speed`` times the readings' own if it is set.

    ``resend``: send all of it again, marked as repeated, so that it overwrites nothing unless ``overwrite`` is set.

    Returns 0 when all is sent, STOPPED when ``shutdown`` was requested before: what was committed until then stays,
    and the next run continues from there. Raises ConfigurationError before anything is sent, PermanentError
    when no retry can help, or when there are rows and none of them can be sent.
    """
    pacing = choose_pacing(settings, speed)
    _check_options(settings, resend=resend, overwrite=overwrite)
    mark = ("" if overwrite else REPEATED.decode()) if resend else None
    with monitored(settings, shutdown, "producer", partial(kafka_probe, settings), hung_after_s=HUNG_AFTER_S):
        feed: Watch | Once = Watch(settings, shutdown) if settings.producer_watch_seconds else Once(settings, shutdown)
        admin = connect_admin(settings, shutdown)
        create_topics(admin, settings, progress_topic(settings), shutdown=shutdown)
        topic = topic_id(admin, settings, shutdown)
        with Publisher(settings, feed.url, shutdown) as publisher:
            for source in feed.sources():
                with show_rows(source.rows) as show:
                    job = Job(settings, publisher, shutdown, topic, pacing, source, show, feed.note_unreadable, mark)
                    job.run()
                feed.settle(job.sent_files(), job.report())
    return feed.exit_code


def _check_options(settings: Settings, *, resend: bool, overwrite: bool) -> None:
    period_s = settings.producer_watch_seconds
    if period_s and resend:
        raise ConfigurationError(
            f"PRODUCER_WATCH_SECONDS={period_s:g} and --resend cannot be combined: "
            "set PRODUCER_WATCH_SECONDS=0 to resend"
        )
    if overwrite and not resend:
        raise ConfigurationError("--overwrite is only for --resend: it makes rows that are sent again overwrite")
