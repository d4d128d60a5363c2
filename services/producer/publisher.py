"""Messages go to the topic in transactions that carry the progress too.

The order that makes each row appear exactly once to read_committed consumers:

1. ``start``: init_transactions. Kafka ends what an earlier producer on the same source left open, and fences
   that producer if it still lives.
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
from services.core.errors import ConfigurationError, PermanentError, TransientError
from services.core.kafka import ARROW, FORMAT_HEADER, PARTITIONER, REPEAT_HEADER, client_settings
from services.core.logs import fields
from services.core.shutdown import Shutdown
from services.producer.blocks import Rows
from services.producer.encoding import Messages
from services.producer.progress import Progress, Stopped, encode_progress, progress_topic, read_progress

log = logging.getLogger("producer")

METADATA_TIMEOUT_S = 2.0
POLL_S = 0.1  # a longer poll, as a flush, goes on with callbacks after one of them has raised a fatal error
CALL_TIMEOUT_S = 1.0  # of one transactional call; a call that timed out is repeated and goes on where it was
STOP_TIMEOUT_S = 5.0  # how long a commit or abort may take once the service shall end
NOTE_AFTER_S, NOTE_INTERVAL_S = 5.0, 10.0
QUEUE_KBYTES = 64 * 1024
QUEUE_MESSAGES = 500_000

# After some errors a client can do nothing more, and a new one has to take its place. librdkafka counts the
# answer INVALID_TXN_STATE among them, which a broker may give that was killed in the middle of a transaction.
MAX_LOSSES = 5  # clients lost in a row, with nothing committed between, before it is called permanent

# Errors that the next try would meet again.
PERMANENT = frozenset(
    {
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
        KafkaError.SASL_AUTHENTICATION_FAILED,
        KafkaError.INVALID_TRANSACTION_TIMEOUT,
        KafkaError.TOPIC_EXCEPTION,
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError._UNKNOWN_TOPIC,
        KafkaError._UNKNOWN_PARTITION,
        KafkaError._AUTHENTICATION,
        KafkaError._UNSUPPORTED_FEATURE,
    }
)
PURGED = frozenset({KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT})
FENCED = frozenset({KafkaError._FENCED, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH})


class TransactionAborted(TransientError):  # noqa: N818 - Kafka's own word
    """Nothing of the open transaction is visible; send again from the progress of the last commit."""


class TransactionExpired(TransactionAborted):
    """Kafka ended the transaction because it was open for too long; another producer may have gone on."""


class Publisher:
    """One transactional producer for one source; at most one such producer lives, the newest.

    ``run`` names this run in progress records. ``pending`` counts the readings of the open transaction.
    """

    def __init__(self, settings: Settings, source_url: str, shutdown: Shutdown) -> None:
        self._settings = settings
        self._shutdown = shutdown
        self._source_url = source_url
        self._topic = settings.kafka_topic
        self._progress_topic = progress_topic(settings).topic
        self._timeout_s = float(settings.producer_transaction_timeout_seconds)
        self._producer: Producer | None = None
        self._open_since: float | None = None
        self._opened_at = 0.0  # by the clock on the wall
        self._partitions = 0  # of the topic, when the open transaction began
        self._last_note = 0.0
        self._failure: KafkaError | None = None
        self._losses = 0
        self.run = uuid.uuid4().hex
        self.pending = 0

    def start(self) -> dict[str, Progress]:
        """Become the one producer of this source; return all committed progress, by record key.

        To be called again after TransactionAborted. Raises ConfigurationError when Kafka does not start
        transactions within STARTUP_TIMEOUT_SECONDS (the first time; later it waits), PermanentError when it
        refuses them, Stopped when the service shall end.
        """
        first = self._producer is None
        self._discard()
        self._producer = Producer(self._producer_settings())
        deadline = time.monotonic() + self._settings.startup_timeout_seconds if first else None
        try:
            self._complete(self._producer.init_transactions, deadline)
        except KafkaException as error:
            raise PermanentError(f"Kafka refuses transactions: {error.args[0].str()}") from error
        return self.read_progress()

    def read_progress(self) -> dict[str, Progress]:
        """All committed progress, by record key. Raises Stopped when the service shall end."""
        return read_progress(self._settings, self._shutdown)

    def send(self, messages: Messages | Rows, repeat: str = "") -> None:
        """Add ``messages``, or blocks of rows, to the open transaction, or to a new one.

        ``repeat`` is the value of their REPEAT_HEADER. Waits while the queue of 64 MB is full. Raises
        TransactionAborted, PermanentError or Stopped.
        """
        producer = self._begin()
        produce: Callable[..., None] = producer.produce
        self.pending += messages.sent
        try:
            for arguments in self._arguments(producer, messages, repeat):
                try:
                    produce(*arguments)
                except BufferError:
                    self._produce_waiting(producer, partial(produce, *arguments))
            producer.poll(0)
        except KafkaException as error:
            self._abort(producer, error)

    def _arguments(self, producer: Producer, messages: Messages | Rows, repeat: str) -> Iterator[tuple[Any, ...]]:
        """The arguments of produce() for each message: by position, since by name takes longer.

        Topic, value, key; then partition, callback, on_delivery and timestamp, each as by default; then the headers.
        """
        mark = [(REPEAT_HEADER, repeat.encode())] if repeat else []
        if isinstance(messages, Rows):
            headers = [(FORMAT_HEADER, ARROW), *mark]
            for partition, _, value in messages.blocks(self._count_partitions(producer)):
                yield self._topic, value, None, partition, None, None, 0, headers
        elif mark:
            for key, value in zip(messages.keys, messages.values, strict=True):
                yield self._topic, value, key, -1, None, None, 0, mark
        else:
            yield from zip(endlessly(self._topic), messages.values, messages.keys, strict=False)

    def _count_partitions(self, producer: Producer) -> int:
        """Partitions of the topic, asked once in a transaction: somebody may add some while we run."""
        if not self._partitions:
            topic = producer.list_topics(self._topic, METADATA_TIMEOUT_S).topics[self._topic]
            if topic.error is not None:
                raise KafkaException(topic.error)
            self._partitions = len(topic.partitions)
        return self._partitions

    def commit(self, progress: Mapping[str, Progress]) -> None:
        """Commit the open transaction, or a new one, together with ``progress`` (by record key).

        When it returns, all of it is visible. Raises TransactionAborted, PermanentError or Stopped; after
        Stopped it is unknown whether Kafka took the commit, and the next start reads which.
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
        """Abort what is open, if Kafka answers within a second, so that readers need not wait for it."""
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
        if self._producer is None:
            raise AssertionError("start() comes first")
        if self._open_since is None:
            try:
                self._producer.begin_transaction()
            except KafkaException as error:
                self._abort(self._producer, error)
            self._open_since, self._opened_at = time.monotonic(), time.time()
        return self._producer

    def _produce_waiting(self, producer: Producer, produce: Callable[[], None]) -> None:
        """Produce one message as soon as the queue has room."""
        waiting_since = time.monotonic()
        for pause in pauses(0.01, POLL_S):
            try:
                produce()
            except BufferError:
                producer.poll(pause)
                self._note_wait(waiting_since)
            else:
                return

    def _complete(self, call: Callable[[float], None], deadline: float | None = None) -> None:
        """Repeat a transactional call until it is done: librdkafka goes on with a call that timed out."""
        waiting_since = time.monotonic()
        for pause in pauses(0.05, 1.0):
            try:
                call(CALL_TIMEOUT_S)
            except KafkaException as error:
                cause: KafkaError = error.args[0]
                if not cause.retriable() or cause.txn_requires_abort():
                    raise
                if deadline is not None and time.monotonic() > deadline:
                    raise ConfigurationError(
                        f"Kafka at {self._settings.bootstrap_servers} does not start transactions "
                        f"({cause.str()}): see transaction.state.log.replication.factor of the broker"
                    ) from error
                self._note_wait(waiting_since)
                time.sleep(pause)
            else:
                return

    def _note_wait(self, since: float) -> None:
        """Called while Kafka does not answer: say so now and then, and end the wait when asked to."""
        waited = time.monotonic() - since
        if self._shutdown.requested and waited > STOP_TIMEOUT_S:
            raise Stopped("Kafka did not answer")
        if waited > NOTE_AFTER_S and time.monotonic() - self._last_note > NOTE_INTERVAL_S:
            self._last_note = time.monotonic()
            log.warning("waiting_for_kafka", extra=fields(seconds=round(waited), pending=self.pending))

    def _abort(self, producer: Producer, error: KafkaException) -> NoReturn:
        """Abort the open transaction because of ``error``, and raise what it means for the caller."""
        cause = self._failure or error.args[0]
        cause = self._end(producer, error.args[0]) or cause
        # While a machine is suspended only the clock on the wall goes on.
        pending, expired = self.pending, max(self.age_s, time.time() - self._opened_at) >= self._timeout_s
        self._close_books()
        if cause.code() in FENCED and not expired:
            raise PermanentError(
                f"fenced: another producer has taken over {self._source_url}; this one stops"
            ) from error
        if cause.code() in FENCED:
            # Kafka ends a transaction that is too old in the same way as one of a producer that was replaced.
            raise TransactionExpired(f"the transaction grew older than {self._timeout_s:g} s") from error
        self._losses += cause.fatal()
        if cause.code() in PERMANENT or self._losses > MAX_LOSSES:
            raise PermanentError(f"{pending} readings were not delivered: {cause.str()}") from error
        raise TransactionAborted(cause.str()) from error

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
        """Give the client up; what it has sent is answered first, if Kafka does so within a second.

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
