"""Messages go to the topic in transactions that carry the progress too.

The order that makes each row appear exactly once to read_committed consumers:

1. ``start``: init_transactions. Kafka aborts what an earlier producer on the same source left open, and fences it.
2. Only then is the committed progress read: nothing of an older producer can be committed after it.
3. ``send`` messages, then ``commit``: the progress records join the transaction, then it is committed.
   What fails before that is aborted, and the caller goes back to the progress of the last commit.
"""

from __future__ import annotations

import hashlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import repeat as endlessly
from typing import Any, NoReturn

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from services.core.backoff import pauses
from services.core.config import Settings
from services.core.errors import (
    ConfigurationError,
    PermanentError,
    PipelineError,
    StoppedError,
    TransactionAbortedError,
    TransactionExpiredError,
)
from services.core.kafka import (
    ARROW,
    FENCED,
    FORMAT_HEADER,
    NEVER_TAKEN,
    PARTITIONER,
    PURGED,
    REPEAT_HEADER,
    client_settings,
)
from services.core.logs import fields
from services.core.shutdown import Shutdown
from services.producer.encoding import Readings, to_blocks, to_json
from services.producer.progress import Progress, encode_progress, progress_topic, read_progress

log = logging.getLogger("producer")

METADATA_TIMEOUT_S = 2.0
POLL_S = 0.1  # a longer poll, like a flush, runs more callbacks after one of them has raised a fatal error
CALL_TIMEOUT_S = 1.0  # of one transactional call; a call that timed out is repeated and continues where it was
STOP_TIMEOUT_S = 5.0  # how long a commit or abort may take after shutdown was requested
NOTE_AFTER_S, NOTE_INTERVAL_S = 5.0, 10.0
QUEUE_KBYTES = 64 * 1024
QUEUE_MESSAGES = 500_000

# Clients lost to fatal errors in a row, with nothing committed between, before it is called permanent. One such error
# is INVALID_TXN_STATE, which a broker may answer that was killed in the middle of a transaction.
MAX_LOSSES = 5


class Publisher:
    """One transactional producer for one source; at most one such producer lives, the newest."""

    def __init__(self, settings: Settings, source_url: str, shutdown: Shutdown) -> None:
        self._settings = settings
        self._shutdown = shutdown
        self._source_url = source_url
        self._topic = settings.kafka_topic
        self._progress_topic = progress_topic(settings).topic
        self._timeout_s = float(settings.producer_transaction_timeout_seconds)
        self._producer: Producer | None = None
        self._is_current = False  # the producer has not failed since start()
        self._open_since: float | None = None
        self._opened_at = 0.0  # by the wall clock
        self._partitions = 0  # of the topic, when the open transaction began
        self._last_note = 0.0
        self._failure: KafkaError | None = None
        self._losses = 0
        self.run = uuid.uuid4().hex  # in progress records
        self.pending = 0  # readings in the open transaction

    def start(self) -> dict[str, Progress]:
        """Become the one producer of this source; return all committed progress, by record key.

        Call it again after TransactionAbortedError; else it only reads, or it would fence one that has taken over.
        Raises ConfigurationError when Kafka does not start transactions within STARTUP_TIMEOUT_SECONDS (the first time;
        later it waits), PermanentError when it refuses them, StoppedError on shutdown.
        """
        if not self._is_current:
            deadline = None if self._producer else time.monotonic() + self._settings.startup_timeout_seconds
            self._discard()
            self._producer = Producer(self._producer_settings())
            try:
                self._complete(self._producer.init_transactions, deadline)
            except KafkaException as error:
                raise PermanentError(f"Kafka refuses transactions: {error.args[0].str()}") from error
            self._is_current = True
        return read_progress(self._settings, self._shutdown)

    def send(self, readings: Readings, repeat: str = "") -> None:
        """Add ``readings`` to the open transaction, or to a new one; ``repeat``: the value of their REPEAT_HEADER.

        Waits while the queue is full. Raises TransactionAbortedError, PermanentError or StoppedError.
        """
        producer = self._begin()
        produce: Callable[..., None] = producer.produce
        self.pending += readings.sent
        try:
            for arguments in self._arguments(producer, readings, repeat):
                try:
                    produce(*arguments)
                except BufferError:
                    self._produce_waiting(producer, partial(produce, *arguments))
            producer.poll(0)
        except KafkaException as error:
            self._abort(producer, error)

    def _arguments(self, producer: Producer, readings: Readings, repeat: str) -> Iterator[tuple[Any, ...]]:
        """The arguments of produce() for each message, by position, which is faster than by name.

        Topic, value, key; then partition, callback, on_delivery and timestamp, each as by default; then the headers.
        """
        mark = [(REPEAT_HEADER, repeat.encode())] if repeat else []
        if self._settings.producer_format == "arrow":
            headers = [(FORMAT_HEADER, ARROW), *mark]
            for partition, _, value in to_blocks(readings, self._count_partitions(producer)):
                yield self._topic, value, None, partition, None, None, 0, headers
            return
        keys = map(readings.keys.__getitem__, readings.sensor.to_pylist())
        messages = zip(endlessly(self._topic), to_json(readings), keys, strict=False)
        yield from ((*message, -1, None, None, 0, mark) for message in messages) if mark else messages

    def _count_partitions(self, producer: Producer) -> int:
        """Partitions of the topic, asked once per transaction, since they may be added while we run."""
        if not self._partitions:
            topic = producer.list_topics(self._topic, METADATA_TIMEOUT_S).topics[self._topic]
            if topic.error is not None:
                raise KafkaException(topic.error)
            self._partitions = len(topic.partitions)
        return self._partitions

    def commit(self, progress: Mapping[str, Progress]) -> None:
        """Commit the open transaction, or a new one, together with ``progress`` (by record key): all is visible then.

        Raises TransactionAbortedError, PermanentError or StoppedError; only the next start reads whether Kafka took
        the commit before the latter.
        """
        producer = self._begin()
        try:
            for key, record in progress.items():
                value = encode_progress(record)
                self._produce_waiting(producer, partial(producer.produce, self._progress_topic, value, key.encode()))
            self._complete(producer.commit_transaction)
        except KafkaException as error:
            self._abort(producer, error)
        self._close_books()
        self._losses = 0

    @property
    def age_s(self) -> float:
        """Age of the open transaction in seconds, 0 when none is open."""
        return 0.0 if self._open_since is None else time.monotonic() - self._open_since

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *_: object) -> None:
        """Abort what is open, if Kafka answers within a second: readers would wait for it."""
        if self._producer is not None and self._open_since is not None:
            try:
                self._producer.abort_transaction(CALL_TIMEOUT_S)
            except KafkaException as failure:
                log.warning("transaction_left_open", extra=fields(error=failure.args[0].str()))
        self._discard()

    def _producer_settings(self) -> dict[str, Any]:
        source = hashlib.sha256(self._source_url.encode()).hexdigest()[:16]
        return client_settings(self._settings, "producer") | {
            "transactional.id": f"{self._topic}-producer-{source}",
            "transaction.timeout.ms": int(self._timeout_s * 1000),
            "acks": "all",
            "compression.type": self._settings.kafka_compression,  # the topic's, or the broker would do it again
            "partitioner": PARTITIONER,
            "linger.ms": 50,
            "batch.size": 1_000_000,
            "queue.buffering.max.kbytes": QUEUE_KBYTES,
            "queue.buffering.max.messages": QUEUE_MESSAGES,
            # What is delivered shows when the transaction commits; only failures are reported one by one.
            "delivery.report.only.error": True,
            "on_delivery": self._note_failure,
        }

    def _note_failure(self, error: KafkaError | None, _message: Message) -> None:
        if error is not None and error.code() not in PURGED:
            self._failure = error

    def _begin(self) -> Producer:
        """The producer, in a transaction."""
        assert self._producer is not None, "start() comes first"
        if self._open_since is None:
            try:
                self._producer.begin_transaction()
            except KafkaException as error:
                self._abort(self._producer, error)
            self._open_since, self._opened_at = time.monotonic(), time.time()
        return self._producer

    def _produce_waiting(self, producer: Producer, produce: Callable[[], None]) -> None:
        """Produce one message as soon as the queue has room."""
        for pause in self._waits(0.01, POLL_S):
            try:
                produce()
                return
            except BufferError:
                producer.poll(pause)

    def _complete(self, call: Callable[[float], None], deadline: float | None = None) -> None:
        """Repeat a transactional call until it is done: librdkafka continues a call that timed out."""
        for pause in self._waits(0.05, 1.0):
            try:
                call(CALL_TIMEOUT_S)
                return
            except KafkaException as error:
                cause: KafkaError = error.args[0]
                if not cause.retriable() or cause.txn_requires_abort():
                    raise
                if deadline is not None and time.monotonic() > deadline:
                    raise ConfigurationError(
                        f"Kafka at {self._settings.bootstrap_servers} cannot start transactions "
                        f"({cause.str()}): check the broker's transaction.state.log.replication.factor"
                    ) from error
                time.sleep(pause)

    def _waits(self, first_s: float, max_s: float) -> Iterator[float]:
        """Pauses in seconds while Kafka does not answer, logged now and then. Raises StoppedError after shutdown."""
        since = time.monotonic()
        for pause in pauses(first_s, max_s):
            yield pause
            waited = time.monotonic() - since
            if self._shutdown.requested and waited > STOP_TIMEOUT_S:
                raise StoppedError("Kafka did not answer")
            if waited > NOTE_AFTER_S and time.monotonic() - self._last_note > NOTE_INTERVAL_S:
                self._last_note = time.monotonic()
                log.warning("waiting_for_kafka", extra=fields(seconds=round(waited), pending=self.pending))

    def _abort(self, producer: Producer, error: KafkaException) -> NoReturn:
        """Abort the open transaction because of ``error``, and raise what it means for the caller."""
        cause = self._failure or error.args[0]
        cause = self._end(producer, error.args[0]) or cause
        # While a machine is suspended only the wall clock runs.
        meaning = self.error_after(cause, max(self.age_s, time.time() - self._opened_at))
        self._close_books()
        self._is_current = False
        raise meaning from error

    def error_after(self, cause: KafkaError, age_s: float) -> PipelineError:
        """What to raise when the open transaction fails after ``age_s``; counts clients lost.

        Kafka ends one that is too old with the same errors as that of a producer that was replaced.
        """
        if cause.code() in FENCED:
            if age_s >= self._timeout_s:
                return TransactionExpiredError(f"the transaction took longer than {self._timeout_s:g} s")
            return PermanentError(f"fenced: another producer has taken over {self._source_url}; this one stops")
        self._losses += cause.fatal()
        if cause.code() in NEVER_TAKEN or self._losses > MAX_LOSSES:
            return PermanentError(f"{self.pending} readings were not delivered: {cause.str()}")
        return TransactionAbortedError(cause.str())

    def _end(self, producer: Producer, cause: KafkaError) -> KafkaError | None:
        """Abort; return the error that made the client unusable, if one did."""
        try:
            if cause.code() == KafkaError._FATAL:  # any transactional call names the cause
                producer.commit_transaction(CALL_TIMEOUT_S)
            elif not cause.fatal():
                self._complete(producer.abort_transaction)
        except KafkaException as failure:
            return failure.args[0]  # type: ignore[no-any-return]
        return cause if cause.fatal() else None

    def _close_books(self) -> None:
        self._open_since, self._failure = None, None
        self.pending = self._partitions = 0

    def _discard(self) -> None:
        """Give the client up, after waiting up to a second for answers to what it has sent.

        librdkafka 2.16 damages its memory when the answer that a producer was fenced reaches a client that is ending.
        """
        if self._producer is not None:
            self._producer.purge(in_flight=False)
            deadline = time.monotonic() + CALL_TIMEOUT_S
            while len(self._producer) and time.monotonic() < deadline:
                with suppress(KafkaException):  # that it was fenced
                    self._producer.poll(POLL_S)
            self._producer.purge()
        self._producer = None
