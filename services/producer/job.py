"""One source on its way into the topic: what was committed, what is next, and what is said of it."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter

import msgspec

from services.core.backoff import pauses
from services.core.config import Settings
from services.core.errors import PermanentError
from services.core.logs import fields
from services.core.monitoring import KAFKA
from services.core.shutdown import Shutdown
from services.producer.encoding import Encoded, Example
from services.producer.history import Earlier, History
from services.producer.metrics import (
    FILES_SENT,
    READINGS_SENT,
    ROWS_READ,
    ROWS_SKIPPED,
    TIMES_DOUBTFUL,
    TRANSACTION_READINGS,
    TRANSACTION_SECONDS,
    TRANSACTIONS_ABORTED,
)
from services.producer.pacing import Pacing
from services.producer.progress import Progress, Stopped
from services.producer.publisher import Publisher, TransactionAborted, TransactionExpired
from services.producer.source import (
    Digest,
    Source,
    SourceFile,
    UnreadableFileError,
    add_to_digest,
)

log = logging.getLogger("producer")

FEW = 0.01  # of the rows of a file: if no more could be sent, something is wrong with it, or with a setting
LONG_WAIT_S = 60.0  # for the next reading: said in the log


@dataclass(slots=True)
class Job:
    """One source on its way: what was committed, what is next.

    ``unreadable`` is told of a file that cannot be read to its end; the others are sent. ``started``: the publisher
    lives already.
    """

    settings: Settings
    publisher: Publisher
    shutdown: Shutdown
    topic_id: str
    pace: Pacing
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
        topic, run, files = self.topic_id, self.publisher.run, self._by_key()
        records = {} if topic in known else {topic: Progress(url=self.settings.kafka_topic, began=time.time())}
        if resend is not None:
            records |= {key: Progress(url=file.url, repeat=resend, run=run) for key, file in files}
        if records:
            self.publisher.commit(records)
        history = History.of(known | records, topic)
        self.new = {file.url: history.max_rows(file) for key, file in files if key not in history.files}
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
        return f"{self.topic_id}/{file.fingerprint}"

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
        settings = self.settings
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
