"""How far each file was sent, kept in Kafka beside the messages.

A compacted topic, ``<topic>.progress``, holds one record for each file: key = the id of the topic of readings and the
file's fingerprint, value = the JSON of a Progress; and one for each such topic, with its id alone as the key. A record
is written in the transaction of the messages it counts, so a reader sees both or neither. This is how Kafka Connect's
sources got exactly-once (KIP-618).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import msgspec
from confluent_kafka import IsolationLevel, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec

from services.core import kafka
from services.core.backoff import at_start, retry_until
from services.core.config import Settings
from services.core.errors import PermanentError, StoppedError, TransientError
from services.core.kafka import REPEATED_IF_MOVED, client_settings, new_topic, read_topic, translated_kafka
from services.core.logs import fields
from services.core.shutdown import Shutdown
from services.producer.source import SourceFile

log = logging.getLogger("producer")

REQUEST_TIMEOUT_S = 5.0


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far one file was sent. The record of a topic has only ``url`` (its name) and ``began``."""

    url: str
    began: float = 0.0  # when the first run was about to fill the topic, in seconds since 1970
    repeat: str = ""  # the value of the messages' REPEAT_HEADER ("": none)
    digest: str = ""  # of the readings in the first ``rows`` rows
    rows: int = 0  # the next row to read
    sent: int = 0  # of those before it
    skipped: dict[str, int] = {}  # by reason
    doubtful: dict[str, int] = {}  # local times that came twice or never
    done: bool = False
    run: str = ""  # of the producer that wrote this


_decoder = msgspec.json.Decoder(Progress)
encode_progress = msgspec.json.Encoder().encode


def progress_topic(settings: Settings) -> NewTopic:
    """The topic that progress is kept in."""
    return new_topic(settings, f"{settings.kafka_topic}.progress", 1, cleanup_policy="compact")


def topic_id(admin: AdminClient, settings: Settings, shutdown: Shutdown) -> str:
    """The topic's id, part of a record's key: one that was deleted and created again is filled from the start.

    Waits, since not all brokers know a new topic at once.
    """
    where = ("kafka", "Kafka", settings.bootstrap_servers)
    ask = partial(kafka.topic_id, admin, settings)
    return at_start(ask, settings, shutdown, where, lambda error: PermanentError(str(error)))


def read_progress(settings: Settings, shutdown: Shutdown) -> dict[str, Progress]:
    """All that was committed to the progress topic before this call, by record key.

    Waits while Kafka is unavailable, and for open transactions of other producers, which are short, or ended by Kafka.
    Raises StoppedError on shutdown.
    """
    topic = progress_topic(settings).topic

    def note(error: TransientError, pause: float) -> None:
        log.warning("progress_unreadable", extra=fields(topic=topic, error=str(error), retry_s=round(pause, 2)))

    return retry_until(math.inf, shutdown, partial(_read, settings, topic, shutdown), note)


def _read(settings: Settings, topic: str, shutdown: Shutdown) -> dict[str, Progress]:
    end = _end(settings, topic)

    def wait() -> None:
        if shutdown.requested:
            raise StoppedError("the progress was not read")
        log.warning("waiting_for_progress", extra=fields(topic=topic, end=end))

    found: dict[str, Progress] = {}
    try:
        for message in read_topic(settings, topic, 0, 0, end, on_silence=wait):
            key, value = str(message.key() or b"", "ascii", "replace"), message.value()
            found.pop(key, None)
            if value is not None:  # else it deletes the key, as in any compacted topic
                found[key] = _decoder.decode(value)
    except ValueError as error:  # msgspec's errors are ValueErrors
        text = f"Kafka topic {topic} holds a record that is not a producer's progress: {error}"
        raise PermanentError(text) from error
    return found


def _end(settings: Settings, topic: str) -> int:
    """The offset after the last record, committed or not.

    Not the last stable offset: another producer's open transaction holds it back, and hides records of ours that were
    committed since. The client is new each time: to one that saw an earlier start of the broker, list_offsets answers
    FENCED_LEADER_EPOCH forever.
    """
    partition = TopicPartition(topic, 0)
    admin = AdminClient(client_settings(settings, "admin") | {"log_level": 0})
    with translated_kafka(f"Kafka topic {topic} cannot be read"):
        futures = admin.list_offsets(
            {partition: OffsetSpec.latest()},
            isolation_level=IsolationLevel.READ_UNCOMMITTED,
            request_timeout=REQUEST_TIMEOUT_S,
        )
        return int(futures[partition].result().offset)


@dataclass(frozen=True, slots=True)
class History:
    """All records of the progress topic, as they bear on one topic of readings."""

    files: Mapping[str, Progress]
    began: float
    contents: set[str]
    versions: Mapping[str, Mapping[int, set[str]]]  # by URL and rows: digests

    @classmethod
    def of(cls, known: Mapping[str, Progress], topic_id: str) -> History:
        """``known``: the records by key, that of the topic among them."""
        versions: dict[str, dict[int, set[str]]] = {}
        for key, progress in known.items():
            if key.startswith(f"{topic_id}/"):
                versions.setdefault(progress.url, {}).setdefault(progress.rows, set()).add(progress.digest)
        return cls(known, known[topic_id].began, {key.rpartition("/")[2] for key in known}, versions)

    def max_rows(self, file: SourceFile) -> tuple[int, set[str]]:
        """How many rows, at most those of ``file``, were sent from other contents under its name; and their digests."""
        earlier = {rows: digests for rows, digests in self.versions.get(file.url, {}).items() if rows <= file.rows}
        return max(earlier.items(), default=(0, set()))

    def mark(self, file: SourceFile) -> str:
        """The mark of a file that the topic has not seen, which the database may have stored from another topic.

        It may if the file is older than what is known of this topic, or if its contents were sent to another one.
        """
        is_known = file.fingerprint in self.contents or file.state.mtime_ns < self.began * 1e9
        return REPEATED_IF_MOVED.decode() if is_known else ""
