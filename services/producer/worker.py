"""The producer: every row of a source into the topic, once."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgspec

from services.core.backoff import pauses
from services.core.config import Settings
from services.core.errors import PermanentError
from services.core.kafka import connect_admin, create_topics
from services.core.logs import fields
from services.core.shutdown import Shutdown
from services.producer.display import show_rows
from services.producer.encoding import Messages
from services.producer.progress import Progress, Stopped, progress_topic, topic_id
from services.producer.publisher import Publisher, TransactionAborted, TransactionExpired
from services.producer.source import Source, SourceFile, open_source

log = logging.getLogger("producer")

TRANSACTION_SECONDS = 5.0  # a slow broker gets smaller transactions, so that none grows too old


def run(settings: Settings, shutdown: Shutdown, *, resend: bool = False) -> int:
    """Send what PARQUET_URL names and was not sent before; with ``resend`` all of it again.

    Returns 0 when all is sent, and also when ``shutdown`` was requested: what was committed until then stays,
    and the next run goes on from there. Raises ConfigurationError before anything is sent, PermanentError
    when no retry can help.
    """
    source = open_source(settings)
    log.info("source_opened", extra=fields(url=source.url, files=len(source.files), rows=source.rows))
    admin = connect_admin(settings, shutdown)
    create_topics(admin, settings, progress_topic(settings))
    topic = topic_id(admin, settings)
    with Publisher(settings, source.url, shutdown) as publisher, show_rows(source.rows) as show:
        job = _Job(settings, source, publisher, shutdown, topic, show)
        job.run(resend=resend)
    job.report()
    return 0


@dataclass(slots=True)
class _Job:
    """One run of the producer over one source."""

    settings: Settings
    source: Source
    publisher: Publisher
    shutdown: Shutdown
    topic_id: str
    show: Callable[[int], None]
    committed: dict[str, Progress] = field(default_factory=dict)
    before: dict[str, Progress] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    rows: int = 0  # read until now, in this run and in those before it, committed or not
    retries: Iterator[float] = field(default_factory=pauses)

    def run(self, *, resend: bool) -> None:
        """Go on from the last commit until all is sent, as often as it takes."""
        expired = False
        while True:
            try:
                if expired:
                    self._check_not_replaced()
                self._start(resend=resend)
                resend = False
                self._send_files()
            except TransactionAborted as error:
                expired = isinstance(error, TransactionExpired)
                pause = next(self.retries)
                log.warning("transaction_aborted", extra=fields(error=str(error), retry_s=round(pause, 2)))
                if self.shutdown.wait(pause):
                    return
            except Stopped as error:
                log.warning("stopped", extra=fields(reason=str(error)))
                return
            else:
                return

    def _start(self, *, resend: bool) -> None:
        """Take over the source and learn what is committed; with ``resend`` begin at the first row again."""
        known = self.publisher.start()
        fresh = {self._key(file): Progress(url=file.url, run=self.publisher.run) for file in self.source.files}
        if resend:
            self.publisher.commit(fresh)
            known = {}
        self.committed = {key: known.get(key, progress) for key, progress in fresh.items()}
        self.rows = sum(progress.rows for progress in self.committed.values())
        self.show(self.rows)
        if not self.before:
            self.before = dict(self.committed)

    def _check_not_replaced(self) -> None:
        """Give way where another producer went on with this source while this one was cut off.

        Starting again would fence that one, the newer.
        """
        known = self.publisher.read_progress()
        for key, ours in self.committed.items():
            theirs = known.get(key, ours)
            if theirs.rows != ours.rows and theirs.run != self.publisher.run:
                raise PermanentError(f"fenced: another producer has taken over {self.source.url}; this one stops")

    def _key(self, file: SourceFile) -> str:
        return f"{self.topic_id}/{file.fingerprint}"

    def _send_files(self) -> None:
        """Send what is not sent yet, committing as it goes; ends early when the service shall end."""
        waiting: dict[str, Progress] = {}
        for file in self.source.files:
            key = self._key(file)
            progress = self.committed[key]
            if progress.done:
                continue
            for messages in file.messages(progress.rows):
                self.publisher.send(messages)
                progress = waiting[key] = _advance(progress, messages, self.publisher.run)
                self.rows += messages.rows
                self.show(self.rows)
                if self.shutdown.requested:
                    self._commit(waiting)
                    return
                if self._is_due():
                    self._commit(waiting)
            waiting[key] = msgspec.structs.replace(progress, done=True, run=self.publisher.run)
        if waiting:
            self._commit(waiting)

    def _is_due(self) -> bool:
        return self.publisher.pending >= self.settings.producer_transaction_rows or self.publisher.age_s >= min(
            TRANSACTION_SECONDS, self.settings.producer_transaction_timeout_seconds / 3
        )

    def _commit(self, waiting: dict[str, Progress]) -> None:
        self.publisher.commit(waiting)
        self.committed.update(waiting)
        self.retries = pauses()
        log.debug("transaction_committed", extra=fields(rows=self.rows, files=len(waiting)))
        waiting.clear()

    def report(self) -> None:
        """Say what this run did and where the source stands, if that was learnt."""
        if not self.committed:
            return
        seconds = time.monotonic() - self.started
        now, before = list(self.committed.values()), list(self.before.values())
        rows = sum(p.rows for p in now) - sum(p.rows for p in before)
        sent = sum(p.sent for p in now) - sum(p.sent for p in before)
        skipped = _skipped(now) - _skipped(before)
        done = sum(p.done for p in now)
        whole = done == len(now)
        if whole and all(p.done for p in before):
            log.info("nothing_to_send", extra=fields(url=self.source.url, files=len(now), rows=self.source.rows))
            return
        log.info(
            "all_sent" if whole else "stopped_early",
            extra=fields(
                rows=rows,
                sent=sent,
                skipped=sum(skipped.values()),
                **{f"skipped_{reason}": count for reason, count in sorted(skipped.items())},
                files=f"{done}/{len(now)}",
                rows_left=self.source.rows - sum(p.rows for p in now),
                seconds=round(seconds, 1),
                rows_per_second=round(rows / seconds) if seconds else 0,
            ),
        )


def _advance(progress: Progress, messages: Messages, run: str) -> Progress:
    return msgspec.structs.replace(
        progress,
        rows=progress.rows + messages.rows,
        sent=progress.sent + len(messages.keys),
        skipped=dict(Counter(progress.skipped) + Counter(messages.skipped)),
        run=run,
    )


def _skipped(progress: list[Progress]) -> Counter[str]:
    return sum((Counter(p.skipped) for p in progress), Counter())
