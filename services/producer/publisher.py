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
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Producer
from confluent_kafka.admin import AdminClient

from services.core.backoff import pauses
from services.core.config import Settings
from services.core.errors import ConfigurationError, PermanentError, TransientError
from services.core.kafka import client_settings
from services.core.logs import fields
from services.core.shutdown import Shutdown
from services.producer.encoding import Messages
from services.producer.progress import Progress, encode_progress, progress_topic, read_progress

log = logging.getLogger("producer")

CALL_TIMEOUT_S = 1.0  # of one transactional call; a call that timed out is repeated and goes on where it was
STOP_WITHIN_S = 5.0  # how long a commit or abort may take once the service shall end
QUEUE_KBYTES = 64 * 1024
QUEUE_MESSAGES = 500_000

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
FENCED = frozenset({KafkaError._FENCED, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH})


class TransactionAborted(TransientError):  # noqa: N818 - Kafka's own word
    """Nothing of the open transaction is visible; send again from the progress of the last commit."""


class Stopped(TransientError):  # noqa: N818 - no error at all
    """The service shall end, and Kafka did not answer in time; the next start ends the open transaction."""


class Publisher:
    """One transactional producer for one source; at most one such producer lives, the newest.

    ``pending`` counts the messages of the open transaction, 0 when none is open.
    """

    def __init__(self, settings: Settings, admin: AdminClient, source_url: str, shutdown: Shutdown) -> None:
        self._settings = settings
        self._admin = admin
        self._shutdown = shutdown
        self._source_url = source_url
        self._topic = settings.kafka_topic
        self._progress_topic = progress_topic(settings).topic
        self._timeout_s = float(settings.producer_transaction_timeout_seconds)
        self._producer: Any = None  # confluent_kafka has no types
        self._open_since: float | None = None
        self._expired = False
        self._last_note = 0.0
        self.run = uuid.uuid4().hex
        self.pending = 0

    def start(self) -> dict[str, Progress]:
        """Become the one producer of this source; return all committed progress, by record key.

        Called again after TransactionAborted. Raises PermanentError where another producer has taken over,
        Stopped when the service shall end.
        """
        first = self._producer is None
        if self._expired:
            self._check_not_replaced()
        self._discard()
        self._producer = Producer(self._producer_settings())
        deadline = time.monotonic() + self._settings.startup_timeout_seconds if first else None
        self._complete(self._producer.init_transactions, deadline)
        return self._read_progress()

    def send(self, messages: Messages) -> None:
        """Add ``messages`` to the open transaction, or to a new one.

        Waits while the queue of 64 MB is full. Raises TransactionAborted, PermanentError or Stopped.
        """
        self._begin()
        topic, produce = self._topic, self._producer.produce
        self.pending += len(messages.keys)
        try:
            for key, value in zip(messages.keys, messages.values, strict=True):
                try:
                    produce(topic, value, key)
                except BufferError:
                    self._send_waiting(topic, value, key)
            self._producer.poll(0)
        except KafkaException as error:
            self._fail(error)

    def commit(self, progress: Mapping[str, Progress]) -> None:
        """Commit the open transaction, or a new one, together with ``progress`` (by record key).

        When it returns, all of it is visible. Raises TransactionAborted, PermanentError or Stopped; after
        Stopped it is open whether Kafka took the commit, and the next start reads which.
        """
        self._begin()
        try:
            for key, record in progress.items():
                self._send_waiting(self._progress_topic, encode_progress(record), key.encode())
            self._complete(self._producer.commit_transaction)
        except KafkaException as error:
            self._fail(error)
        self._open_since = None
        self.pending = 0

    @property
    def age_s(self) -> float:
        """Age of the open transaction in seconds, 0 when none is open."""
        return 0.0 if self._open_since is None else time.monotonic() - self._open_since

    def __enter__(self) -> Publisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Abort what is open, if Kafka answers within a second, so that readers need not wait for it."""
        if self._open_since is not None and not self._expired:
            try:
                self._producer.abort_transaction(CALL_TIMEOUT_S)
            except KafkaException as failure:
                log.info("transaction_left_open", extra=fields(error=failure.args[0].str()))
        self._discard()

    def _producer_settings(self) -> dict[str, Any]:
        source = hashlib.sha256(self._source_url.encode()).hexdigest()[:16]
        return client_settings(self._settings, "producer") | {
            "transactional.id": f"{self._topic}-producer-{source}",
            "transaction.timeout.ms": int(self._timeout_s * 1000),
            "acks": "all",
            "compression.type": "lz4",
            "linger.ms": 50,
            "batch.size": 1_000_000,
            "queue.buffering.max.kbytes": QUEUE_KBYTES,
            "queue.buffering.max.messages": QUEUE_MESSAGES,
            # A failed delivery fails the transaction, which is all that needs to be known.
            "delivery.report.only.error": True,
        }

    def _begin(self) -> None:
        if self._open_since is None:
            try:
                self._producer.begin_transaction()
            except KafkaException as error:
                self._fail(error)
            self._open_since = time.monotonic()

    def _send_waiting(self, topic: str, value: bytes, key: bytes) -> None:
        """Produce one message as soon as the queue has room."""
        waiting_since = time.monotonic()
        for pause in pauses(0.01, 0.5):
            try:
                self._producer.produce(topic, value, key)
            except BufferError:
                self._producer.poll(pause)
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
                self._producer.poll(pause)
            else:
                return

    def _note_wait(self, since: float) -> None:
        """Called while Kafka does not answer: say so now and then, and end the wait when asked to."""
        waited = time.monotonic() - since
        if self._shutdown.requested and waited > STOP_WITHIN_S:
            raise Stopped("Kafka did not answer")
        if waited > 5 and time.monotonic() - self._last_note > 10:
            self._last_note = time.monotonic()
            log.warning("waiting_for_kafka", extra=fields(seconds=round(waited), pending=self.pending))

    def _fail(self, error: KafkaException) -> None:
        """Abort after ``error``, and raise what it means."""
        cause: KafkaError = error.args[0]
        pending = self.pending
        if not cause.fatal() and cause.code() != KafkaError._FATAL:
            try:
                self._complete(self._producer.abort_transaction)
            except KafkaException as failure:
                cause = failure.args[0]
        elif cause.code() == KafkaError._FATAL:
            cause = self._fatal_cause(cause)
        expired = self.age_s >= self._timeout_s
        self._open_since, self.pending = None, 0
        if cause.fatal() or cause.code() in FENCED:
            if cause.code() not in FENCED:
                raise PermanentError(f"Kafka's client gave up: {cause.str()}") from error
            if not expired:
                raise PermanentError(
                    f"fenced: another producer has taken over {self._source_url}; this one stops"
                ) from error
            self._expired = True
        if cause.code() in PERMANENT:
            raise PermanentError(f"{pending} messages were not delivered: {cause.str()}") from error
        raise TransactionAborted(cause.str()) from error

    def _fatal_cause(self, cause: KafkaError) -> KafkaError:
        """What made the client unusable: every transactional call names it."""
        try:
            self._producer.commit_transaction(CALL_TIMEOUT_S)
        except KafkaException as error:
            cause = error.args[0]
        return cause

    def _check_not_replaced(self) -> None:
        """After a transaction that Kafka ended because it was too old: has another producer gone on since?"""

    def _read_progress(self) -> dict[str, Progress]:
        return read_progress(self._settings, self._admin, self._shutdown)

    def _discard(self) -> None:
        if self._producer is not None:
            self._producer.purge()
        self._producer = None
