"""One source on its way into the topic: what was committed, what is next, and what is reported about it."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter, sub
from typing import NamedTuple

import msgspec

from services.core.backoff import pauses
from services.core.config import Settings
from services.core.errors import (
    PermanentError,
    StoppedError,
    TransactionAbortedError,
    TransactionExpiredError,
    UnreadableFileError,
)
from services.core.logs import fields
from services.core.monitoring import KAFKA
from services.core.shutdown import Shutdown
from services.producer import metrics
from services.producer.encoding import Digest, Example, Readings
from services.producer.pacing import Pacing
from services.producer.progress import History, Progress, read_progress
from services.producer.publisher import Publisher
from services.producer.source import Source, SourceFile

log = logging.getLogger("producer")

FEW = 0.01  # of the rows of a file: if no more could be sent, something is wrong with it, or with a setting
LONG_WAIT_S = 60.0  # for the next reading: logged


class Tally(NamedTuple):
    """Sums over the progress of several files."""

    rows: int
    sent: int
    files: int  # that are done
    skipped: Counter[str]
    doubtful: Counter[str]

    @classmethod
    def of(cls, progress: Collection[Progress]) -> Tally:
        """The sums of these."""
        rows, sent, files = (sum(map(attrgetter(name), progress)) for name in ("rows", "sent", "done"))
        skipped, doubtful = Counter[str](), Counter[str]()
        for each in progress:
            skipped.update(each.skipped)
            doubtful.update(each.doubtful)
        return cls(rows, sent, files, skipped, doubtful)

    def __sub__(self, other: Tally) -> Tally:
        return Tally(*map(sub, self, other))


@dataclass(slots=True)
class Job:
    """One source on its way into the topic.

    ``unreadable`` is called with a file that cannot be read to its end; the others are sent. ``resend``: the mark with
    which all of it is sent again (None: only what was not sent before).
    """

    settings: Settings
    publisher: Publisher
    shutdown: Shutdown
    topic_id: str
    pacing: Pacing
    source: Source
    show: Callable[[int], None]
    unreadable: Callable[[SourceFile, UnreadableFileError], None]
    resend: str | None = None
    committed: dict[str, Progress] = field(default_factory=dict)
    before: dict[str, Progress] = field(default_factory=dict)
    waiting: dict[str, Progress] = field(default_factory=dict)  # for the next commit
    new: dict[str, tuple[int, set[str]]] = field(default_factory=dict)  # by URL: History.max_rows of unknown contents
    examples: dict[str, dict[str, Example]] = field(default_factory=dict)  # by key and reason: rows that were skipped
    began: float = field(default_factory=time.monotonic)
    rows: int = 0  # read until now, in this run and in those before it, committed or not
    retries: Iterator[float] = field(default_factory=pauses)

    def run(self) -> None:
        """Continue from the last commit until all is sent, as often as it takes."""
        expired = False
        while True:
            try:
                if expired:
                    self._check_not_replaced()
                self._start()
                self._send_files()
                return
            except TransactionAbortedError as error:
                KAFKA.note_failure()
                metrics.TRANSACTIONS_ABORTED.inc()
                expired = isinstance(error, TransactionExpiredError)
                pause = next(self.retries)
                log.warning("transaction_aborted", extra=fields(error=str(error), retry_s=round(pause, 2)))
                if self.shutdown.wait(pause):
                    return
            except StoppedError as error:
                log.warning("stopped", extra=fields(reason=str(error)))
                return

    def _start(self) -> None:
        """Take over the source and learn what is committed; with ``resend`` begin at the first row again, once."""
        known = self.publisher.start()
        topic, run, files = self.topic_id, self.publisher.run, self._by_key()
        records = {} if topic in known else {topic: Progress(url=self.settings.kafka_topic, began=time.time())}
        if self.resend is not None:
            records |= {key: Progress(url=file.url, repeat=self.resend, run=run) for key, file in files}
        if records:
            self.publisher.commit(records)
        self.resend = None
        history = History.of(known | records, topic)
        self.new = {file.url: history.max_rows(file) for key, file in files if key not in history.files}
        self.committed = {
            key: history.files.get(key) or Progress(url=file.url, repeat=history.mark(file), run=run)
            for key, file in files
        }
        self._count(sum(progress.rows for progress in self.committed.values()) - self.rows)
        if not self.before:
            self.before = dict(self.committed)
            self.began = time.monotonic()  # connecting has taken its time

    def _count(self, rows: int) -> None:
        self.rows += rows
        self.show(self.rows)

    def _check_not_replaced(self) -> None:
        """Raise PermanentError where another producer took over: starting again would fence that one, the newer."""
        known = read_progress(self.settings, self.shutdown)
        for key, ours in self.committed.items():
            theirs = known.get(key, ours)
            if theirs.rows != ours.rows and theirs.run != self.publisher.run:
                raise PermanentError(f"fenced: another producer has taken over {self.source.url}; this one stops")

    def _by_key(self) -> list[tuple[str, SourceFile]]:
        return [(f"{self.topic_id}/{file.fingerprint}", file) for file in self.source.files]

    def _send_files(self) -> None:
        """Send what is not sent yet, committing as it goes; ends early on shutdown."""
        self.waiting.clear()
        self.pacing.begin()
        for key, file in self._by_key():
            progress = self.waiting.get(key, self.committed[key])
            if progress.done or self.shutdown.requested:
                continue
            try:
                self._send_file(key, file, progress)
            except UnreadableFileError as error:
                self.unreadable(file, error)
        if self.waiting:
            self._commit()

    def _send_file(self, key: str, file: SourceFile, progress: Progress) -> None:
        """Send the rest of ``file``, unless ``shutdown`` is requested meanwhile."""
        progress, digest = self._begin(key, file, progress)
        for readings in file.readings(progress.rows, self.pacing.parts):
            self._wait_until(self.pacing.due(readings.sent))
            if self.shutdown.requested:
                return
            for reason, (row, text) in readings.examples.items():
                self.examples.setdefault(key, {}).setdefault(reason, (progress.rows + row, text))
            self.publisher.send(readings, progress.repeat)
            digest.add(readings)
            progress = self.waiting[key] = _advance(progress, readings, digest, self.publisher.run)
            self._count(readings.rows)
            if self._is_due():
                self._commit()
        self.waiting[key] = msgspec.structs.replace(progress, done=True, run=self.publisher.run)

    def _begin(self, key: str, file: SourceFile, progress: Progress) -> tuple[Progress, Digest]:
        """Where to continue in ``file``, and the digest of what comes before that.

        Behind rows that were sent from a file of its name: somebody added rows to it, and sending the older ones again
        would undo what has been corrected since.
        """
        rows, digests = self.new.pop(file.url, (0, set()))
        digest = file.digest(progress.rows or rows)
        if progress.rows or not rows:
            return progress, digest
        if digest.hexdigest() not in digests:
            return progress, file.digest(0)
        progress = msgspec.structs.replace(progress, rows=rows, digest=digest.hexdigest())
        self.committed[key] = self.before[key] = progress
        self._count(rows)
        log.info("rows_added", extra=fields(file=file.url, known=rows, new=file.rows - rows))
        return progress, digest

    def _wait_until(self, due: float) -> None:
        """Wait until ``due``; what would be kept from readers for too long is committed first."""
        pause = due - time.monotonic()
        if pause <= 0:
            return
        if self.waiting and self.publisher.age_s + pause > self.pacing.transaction_s:
            self._commit()
        if pause > LONG_WAIT_S:
            log.info("waiting_for_next_reading", extra=fields(seconds=round(pause)))
        self.shutdown.wait(due - time.monotonic())

    def _is_due(self) -> bool:
        settings = self.settings
        return self.publisher.pending >= settings.producer_transaction_rows or self.publisher.age_s >= min(
            self.pacing.transaction_s, settings.producer_transaction_timeout_seconds / 3
        )

    def _commit(self) -> None:
        age_s, waiting = self.publisher.age_s, self.waiting
        self.publisher.commit(waiting)
        KAFKA.note_success()
        _measure(Tally.of(waiting.values()) - Tally.of([self.committed[key] for key in waiting]), age_s)
        for key, progress in waiting.items():
            if progress.done and not self.committed[key].done:
                _note_skipped(progress, self.examples.get(key, {}))
        self.committed.update(waiting)
        self.retries = pauses()
        log.debug("transaction_committed", extra=fields(rows=self.rows, files=len(waiting)))
        waiting.clear()

    def sent_files(self) -> list[SourceFile]:
        """The files of which every row was committed, in this run or before."""
        return [file for key, file in self._by_key() if key in self.committed and self.committed[key].done]

    def report(self) -> str:
        """Log what this run did and where the source stands, if that was learnt.

        Returns why nothing was sent, where it read rows and none of them could be.
        """
        if not self.committed:
            return ""
        seconds = time.monotonic() - self.began
        total, before = Tally.of(self.committed.values()), Tally.of(self.before.values())
        run, files, done = total - before, len(self.source.files), len(self.sent_files())
        if done == files and all(progress.done for progress in self.before.values()):
            log.info("nothing_to_send", extra=fields(url=self.source.url, files=done, rows=self.source.rows))
            return ""
        stopped = self.shutdown.requested
        if not run.rows and done < files and not stopped:  # a file that stays unreadable was reported
            return ""
        nothing = done == files and total.skipped.total() == total.rows
        reasons = ", ".join(f"{rows:,} x {reason}" for reason, rows in run.skipped.most_common()) if nothing else ""
        log.log(
            logging.WARNING if reasons or run.doubtful else logging.INFO,
            "all_sent" if done == files else "stopped_early" if stopped else "sent_in_part",
            extra=fields(
                url=self.source.files[0].url if files == 1 else self.source.url,
                rows=run.rows,
                sent=run.sent,
                skipped=run.skipped.total(),
                **{f"skipped_{reason}": rows for reason, rows in sorted(run.skipped.items())},
                **{f"{kind}_times": rows for kind, rows in sorted(run.doubtful.items())},
                files=f"{done}/{files}",
                rows_left=self.source.rows - total.rows,
                seconds=round(seconds, 1),
                rows_per_second=round(run.rows / seconds) if seconds else 0,
            ),
        )
        return reasons


def _advance(progress: Progress, readings: Readings, digest: Digest, run: str) -> Progress:
    return msgspec.structs.replace(
        progress,
        rows=progress.rows + readings.rows,
        sent=progress.sent + readings.sent,
        skipped=dict(Counter(progress.skipped) + Counter(readings.skipped)),
        doubtful=dict(Counter(progress.doubtful) + Counter(readings.doubtful)),
        digest=digest.hexdigest(),
        run=run,
    )


def _measure(done: Tally, age_s: float) -> None:
    """Add what was committed to the metrics."""
    metrics.ROWS_READ.inc(done.rows)
    metrics.READINGS_SENT.inc(done.sent)
    metrics.FILES_SENT.inc(done.files)
    for counter, counts in ((metrics.ROWS_SKIPPED, done.skipped), (metrics.TIMES_DOUBTFUL, done.doubtful)):
        for label, rows in counts.items():
            counter.labels(label).inc(rows)
    metrics.TRANSACTION_READINGS.observe(done.sent)
    metrics.TRANSACTION_SECONDS.observe(age_s)


def _note_skipped(progress: Progress, examples: dict[str, Example]) -> None:
    """Log why nothing, or nearly nothing, of a file that is done could be sent."""
    skipped = sum(progress.skipped.values())
    sent = progress.rows - skipped  # by this run or by others, if it has grown
    if sent < FEW * progress.rows:
        reason, rows = max(progress.skipped.items(), key=itemgetter(1))
        example = dict(zip(("row", "example"), examples.get(reason, ()), strict=False))
        log.warning(
            "hardly_any_row_sent",
            extra=fields(file=progress.url, sent=sent, skipped=skipped, reason=reason, rows=rows, **example),
        )
