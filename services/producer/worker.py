"""The producer: every row of a source into the topic, once."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter

import msgspec

from services.core.backoff import pauses
from services.core.config import Settings
from services.core.errors import STOPPED, ConfigurationError, PermanentError, PipelineError
from services.core.kafka import REPEATED, connect_admin, create_topics
from services.core.logs import fields
from services.core.monitoring import KAFKA, Monitoring, kafka_probe
from services.core.shutdown import Shutdown
from services.producer.display import show_rows
from services.producer.encoding import Encoded, Example
from services.producer.history import Earlier, History
from services.producer.instruments import (
    FILES_SENT,
    FILES_UNREADABLE,
    READINGS_SENT,
    ROWS_READ,
    ROWS_SKIPPED,
    TIMES_DOUBTFUL,
    TRANSACTION_READINGS,
    TRANSACTION_SECONDS,
    TRANSACTIONS_ABORTED,
    WATCHING,
)
from services.producer.pace import Pace, choose_pace
from services.producer.progress import Progress, Stopped, progress_topic, topic_id
from services.producer.publisher import Publisher, TransactionAborted, TransactionExpired
from services.producer.source import (
    Digest,
    Source,
    SourceFile,
    UnreadableFileError,
    add_to_digest,
    open_source,
)
from services.producer.watch import Watch

log = logging.getLogger("producer")

FEW = 0.01  # of the rows of a file: if no more could be sent, something is wrong with it, or with a setting
LONG_WAIT_S = 60.0  # for the next reading: said in the log
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
    period_s = settings.producer_watch_seconds
    if period_s and resend:
        raise ConfigurationError(
            f"PRODUCER_WATCH_SECONDS={period_s:g} and --resend cannot both hold: resend with PRODUCER_WATCH_SECONDS=0"
        )
    if overwrite and not resend:
        raise ConfigurationError("--overwrite goes with --resend: it lets rows that are sent again overwrite")
    done = False
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
            topic = topic_id(admin, settings)
            with Publisher(settings, source.url, shutdown) as publisher:
                sender = _Sender(settings, publisher, shutdown, topic, pace)
                if isinstance(source, Watch):
                    sender.send_arriving(source)
                else:
                    done = sender.send(source, resend=("" if overwrite else REPEATED.decode()) if resend else None)
        except Stopped as error:
            log.warning("stopped", extra=fields(reason=str(error)))
    return 0 if done or period_s else STOPPED


@dataclass(frozen=True, slots=True)
class _Sender:
    """What every source of this run is sent with."""

    settings: Settings
    publisher: Publisher
    shutdown: Shutdown
    topic_id: str
    pace: Pace

    def send(self, source: Source, *, resend: str | None) -> bool:
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
            job = _Job(self, source, show, note_unreadable)
            job.run(resend=resend)
        nothing_sent = job.report()
        if failures:
            raise PermanentError(f"{len(failures)} of {source.found} files were not sent to their end: {failures[0]}")
        if nothing_sent:
            raise PermanentError(f"no row of {source.url} could be sent: {nothing_sent}")
        return job.is_whole

    def send_arriving(self, watch: Watch) -> None:
        """Send the files of each look, until the service shall end.

        The first look finds nothing whole yet: the publisher starts then, and ends what an earlier run left open.
        """
        source, started = watch.look(), False
        while not self.shutdown.requested:
            if source.files or not started:
                with show_rows(source.rows) as show:
                    job = _Job(self, source, show, watch.note_unreadable, started=started)
                    job.run(resend=None)
                started = True
                for file in job.sent_files():
                    watch.note_sent(file)
                job.report()
            if self.shutdown.wait(self.settings.producer_watch_seconds):
                return
            source = watch.look()


@dataclass(slots=True)
class _Job:
    """One source on its way: what was committed, what is next.

    ``unreadable`` is told of a file that cannot be read to its end; the others are sent. ``started``: the publisher
    lives already.
    """

    sender: _Sender
    source: Source
    show: Callable[[int], None]
    unreadable: Callable[[SourceFile, UnreadableFileError], None]
    started: bool = False
    committed: dict[str, Progress] = field(default_factory=dict)
    before: dict[str, Progress] = field(default_factory=dict)
    new: dict[str, Earlier] = field(default_factory=dict)  # by URL: files whose contents the topic has not seen
    examples: dict[str, dict[str, Example]] = field(default_factory=dict)  # by key and reason: rows that were skipped
    began: float = field(default_factory=time.monotonic)
    rows: int = 0  # read until now, in this run and in those before it, committed or not
    retries: Iterator[float] = field(default_factory=pauses)

    @property
    def publisher(self) -> Publisher:
        return self.sender.publisher

    @property
    def shutdown(self) -> Shutdown:
        return self.sender.shutdown

    @property
    def pace(self) -> Pace:
        return self.sender.pace

    def run(self, *, resend: str | None) -> None:
        """Go on from the last commit until all is sent, as often as it takes."""
        expired = False
        while True:
            try:
                if expired:
                    self._check_not_replaced()
                self._start(resend=resend)
                resend = None
                self._send_files()
            except TransactionAborted as error:
                KAFKA.note_failure()
                TRANSACTIONS_ABORTED.inc()
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

    def _start(self, *, resend: str | None) -> None:
        """Take over the source and learn what is committed; with ``resend`` begin at the first row again.

        A publisher that lives is not started again, or it would fence one that has taken over meanwhile.
        """
        known = self.publisher.read_progress() if self.started else self.publisher.start()
        self.started = False
        topic, run, files = self.sender.topic_id, self.publisher.run, self._by_key()
        records = {} if topic in known else {topic: Progress(url=self.sender.settings.kafka_topic, began=time.time())}
        if resend is not None:
            records |= {key: Progress(url=file.url, repeat=resend, run=run) for key, file in files}
        if records:
            self.publisher.commit(records)
        history = History.of(known | records, topic)
        self.new = {file.url: history.most_rows(file) for key, file in files if key not in history.files}
        self.committed = {
            key: history.files.get(key) or Progress(url=file.url, repeat=history.doubt(file), run=run)
            for key, file in files
        }
        self.rows = sum(progress.rows for progress in self.committed.values())
        self.show(self.rows)
        if not self.before:
            self.before = dict(self.committed)
            self.began = time.monotonic()  # connecting has taken its time

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
        return f"{self.sender.topic_id}/{file.fingerprint}"

    def _by_key(self) -> list[tuple[str, SourceFile]]:
        return [(self._key(file), file) for file in self.source.files]

    def _send_files(self) -> None:
        """Send what is not sent yet, committing as it goes; ends early when the service shall end."""
        waiting: dict[str, Progress] = {}
        self.pace.begin()
        for key, file in self._by_key():
            progress = waiting.get(key, self.committed[key])
            if progress.done:
                continue
            try:
                if not self._send_file(file, progress, waiting):
                    break
            except UnreadableFileError as error:
                self.unreadable(file, error)
        if waiting:
            self._commit(waiting)

    def _send_file(self, file: SourceFile, progress: Progress, waiting: dict[str, Progress]) -> bool:
        """Send the rest of ``file``; False as soon as the service shall end."""
        key = self._key(file)
        progress, digest = self._begin(file, progress)
        for messages in file.messages(progress.rows, self.pace.parts):
            self._wait_until(self.pace.due(messages), waiting)
            if self.shutdown.requested:
                return False
            for reason, (row, text) in messages.examples.items():
                self.examples.setdefault(key, {}).setdefault(reason, (progress.rows + row, text))
            self.publisher.send(messages, progress.repeat)
            add_to_digest(digest, messages)
            progress = waiting[key] = _advance(progress, messages, digest, self.publisher.run)
            self.rows += messages.rows
            self.show(self.rows)
            if self._is_due():
                self._commit(waiting)
        waiting[key] = msgspec.structs.replace(progress, done=True, run=self.publisher.run)
        return True

    def _begin(self, file: SourceFile, progress: Progress) -> tuple[Progress, Digest]:
        """Where to go on in ``file``, and the digest of what comes before that.

        A file that begins with the very rows that were sent from one of its name goes on behind them: somebody added
        rows to it, and sent again the older ones would undo what has been corrected since.
        """
        rows, digests = self.new.pop(file.url, (0, set()))
        if progress.rows or not file.begins_with(rows, digests):
            return progress, file.digest(progress.rows)
        digest = file.digest(rows)
        progress = msgspec.structs.replace(progress, rows=rows, digest=digest.hexdigest())
        self.committed[self._key(file)] = self.before[self._key(file)] = progress
        self.rows += rows
        self.show(self.rows)
        log.info("rows_added", extra=fields(file=file.url, known=rows, new=file.rows - rows))
        return progress, digest

    def _wait_until(self, due: float, waiting: dict[str, Progress]) -> None:
        """Wait until ``due``; what would be kept from readers for too long is committed first."""
        pause = due - time.monotonic()
        if pause <= 0:
            return
        if waiting and self.publisher.age_s + pause > self.pace.transaction_s:
            self._commit(waiting)
        if pause > LONG_WAIT_S:
            log.info("waiting_for_next_reading", extra=fields(seconds=round(pause)))
        self.shutdown.wait(due - time.monotonic())

    def _is_due(self) -> bool:
        settings = self.sender.settings
        return self.publisher.pending >= settings.producer_transaction_rows or self.publisher.age_s >= min(
            self.pace.transaction_s, settings.producer_transaction_timeout_seconds / 3
        )

    def _commit(self, waiting: dict[str, Progress]) -> None:
        age_s = self.publisher.age_s
        self.publisher.commit(waiting)
        KAFKA.note_success()
        _count([self.committed[key] for key in waiting], list(waiting.values()), age_s)
        for key, progress in waiting.items():
            if progress.done and not self.committed[key].done:
                _note_skipped(progress, self.examples.get(key, {}))
        self.committed.update(waiting)
        self.retries = pauses()
        log.debug("transaction_committed", extra=fields(rows=self.rows, files=len(waiting)))
        waiting.clear()

    def sent_files(self) -> list[SourceFile]:
        """The files of which every row was committed, in this run or before."""
        return [file for file in self.source.files if (found := self.committed.get(self._key(file))) and found.done]

    @property
    def is_whole(self) -> bool:
        """Whether every row of every file was committed, in this run or before."""
        return len(self.sent_files()) == len(self.source.files)

    def report(self) -> str:
        """Say what this run did and where the source stands, if that was learnt.

        Returns why nothing was sent, where it read rows and none of them could be.
        """
        if not self.committed:
            return ""
        seconds = time.monotonic() - self.began
        now, before = list(self.committed.values()), list(self.before.values())
        rows = sum(p.rows for p in now) - sum(p.rows for p in before)
        sent = sum(p.sent for p in now) - sum(p.sent for p in before)
        skipped = _total(now, "skipped") - _total(before, "skipped")
        doubtful = _total(now, "doubtful") - _total(before, "doubtful")
        done, whole = len(self.sent_files()), self.is_whole
        if whole and all(p.done for p in before):
            log.info("nothing_to_send", extra=fields(url=self.source.url, files=done, rows=self.source.rows))
            return ""
        if not rows and not whole and not self.shutdown.requested:  # a file that stays unreadable was reported
            return ""
        nothing = whole and all(sum(p.skipped.values()) == p.rows for p in now)
        reasons = ", ".join(f"{count:,} x {reason}" for reason, count in skipped.most_common()) if nothing else ""
        log.log(
            logging.WARNING if reasons or doubtful else logging.INFO,
            "all_sent" if whole else "stopped_early" if self.shutdown.requested else "sent_in_part",
            extra=fields(
                url=self.source.files[0].url if len(self.source.files) == 1 else self.source.url,
                rows=rows,
                sent=sent,
                skipped=sum(skipped.values()),
                **{f"skipped_{reason}": count for reason, count in sorted(skipped.items())},
                **{f"{kind}_times": count for kind, count in sorted(doubtful.items())},
                files=f"{done}/{len(self.source.files)}",
                rows_left=self.source.rows - sum(p.rows for p in now),
                seconds=round(seconds, 1),
                rows_per_second=round(rows / seconds) if seconds else 0,
            ),
        )
        return reasons


def _advance(progress: Progress, messages: Encoded, digest: Digest, run: str) -> Progress:
    return msgspec.structs.replace(
        progress,
        rows=progress.rows + messages.rows,
        sent=progress.sent + messages.sent,
        skipped=dict(Counter(progress.skipped) + Counter(messages.skipped)),
        doubtful=dict(Counter(progress.doubtful) + Counter(messages.doubtful)),
        digest=digest.hexdigest(),
        run=run,
    )


def _count(before: list[Progress], now: list[Progress], age_s: float) -> None:
    """Tell the metrics what was committed."""
    sent = sum(p.sent for p in now) - sum(p.sent for p in before)
    ROWS_READ.inc(sum(p.rows for p in now) - sum(p.rows for p in before))
    READINGS_SENT.inc(sent)
    for name, counter in (("skipped", ROWS_SKIPPED), ("doubtful", TIMES_DOUBTFUL)):
        for label, rows in (_total(now, name) - _total(before, name)).items():
            counter.labels(label).inc(rows)
    FILES_SENT.inc(sum(p.done for p in now) - sum(p.done for p in before))
    TRANSACTION_READINGS.observe(sent)
    TRANSACTION_SECONDS.observe(age_s)


def _total(progress: list[Progress], name: str) -> Counter[str]:
    """The sum of the counts in a field."""
    return sum((Counter(getattr(p, name)) for p in progress), Counter())


def _note_skipped(progress: Progress, examples: dict[str, Example]) -> None:
    """Say why nothing, or nearly nothing, of a file that is done could be sent."""
    skipped = sum(progress.skipped.values())
    sent = progress.rows - skipped  # by this run or by others, if it has grown
    if sent < FEW * progress.rows:
        reason, rows = max(progress.skipped.items(), key=itemgetter(1))
        example = dict(zip(("row", "example"), examples.get(reason, ()), strict=False))
        log.warning(
            "hardly_any_row_sent",
            extra=fields(file=progress.url, sent=sent, skipped=skipped, reason=reason, rows=rows, **example),
        )
