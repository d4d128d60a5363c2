"""What the page shows live: asked in the background, kept while a server is unavailable.

The page's callbacks read what is here and wait for no server.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from services.core.config import Settings
from services.core.errors import PipelineError
from services.core.logs import fields
from services.core.offsets import Offsets
from services.core.shutdown import Shutdown
from services.dashboard.series import SummaryReader

SAMPLE_INTERVAL_S = 2.0
RATE_OVER_S = 10.0  # a sample may fall between two batches
KEPT_SAMPLES = 300  # ten minutes
SENSORS_EVERY = 5  # samples

log = logging.getLogger("dashboard")


@dataclass(frozen=True, slots=True)
class TopicSample:
    """One sample of Kafka; offsets are sums over the partitions."""

    at: datetime
    end: int
    committed: int
    lag: int
    dead_letters: int


@dataclass(frozen=True, slots=True)
class QueueSample:
    """One sample of the refresh queue; ``freshness_s`` is the age of its oldest row."""

    at: datetime
    rows: int
    freshness_s: float


class Monitor:
    """Samples both servers, each in a thread of its own, until the end of the process."""

    def __init__(self, settings: Settings, summaries: SummaryReader) -> None:
        self.topics: deque[TopicSample] = deque(maxlen=KEPT_SAMPLES)
        self.queues: deque[QueueSample] = deque(maxlen=KEPT_SAMPLES)
        self.sensors: list[str] | None = None
        self.kafka_problem = ""
        self.database_problem = ""
        self._settings = settings
        self._summaries = summaries
        self._samples = 0

    def start(self, shutdown: Shutdown) -> None:
        """Begin to sample."""
        for target in (self._watch_kafka, self._watch_database):
            threading.Thread(target=target, args=(shutdown,), daemon=True).start()

    def _watch_kafka(self, shutdown: Shutdown) -> None:
        with Offsets(self._settings) as offsets:
            while not shutdown.requested:
                self.kafka_problem = attempt(lambda: self.sample_kafka(offsets), "kafka", self.kafka_problem)
                shutdown.wait(SAMPLE_INTERVAL_S)

    def _watch_database(self, shutdown: Shutdown) -> None:
        while not shutdown.requested:
            self.watch_database_once()
            shutdown.wait(SAMPLE_INTERVAL_S)

    def watch_database_once(self) -> None:
        """Sample, and know what is wrong if that fails."""
        self.database_problem = attempt(self.sample_database, "database", self.database_problem)

    def sample_kafka(self, offsets: Offsets) -> None:
        """Add one sample to ``topics``; none while the topic does not exist."""
        topics = offsets.partitions()
        if self._settings.kafka_topic not in topics:
            return
        readings = offsets.of(self._settings.kafka_topic, topics[self._settings.kafka_topic])
        letters = offsets.of(self._settings.dead_letter_topic, topics.get(self._settings.dead_letter_topic, []))
        end, lag = sum(each.end for each in readings), sum(each.lag for each in readings)
        dead_letters = sum(each.end - each.first for each in letters)
        self.topics.append(TopicSample(datetime.now(UTC), end, end - lag, lag, dead_letters))

    def sample_database(self) -> None:
        """Add one sample to ``queues``, and now and then list the sensors again."""
        self.queues.append(QueueSample(datetime.now(UTC), *self._summaries.queue()))
        if not self.sensors or self._samples % SENSORS_EVERY == 0:
            self.sensors = self._summaries.sensors()
        self._samples += 1


def attempt(sample: Callable[[], None], server: str, problem: str) -> str:
    """Sample once; returns what is wrong, or nothing. A server that goes or comes is one line in the log."""
    try:
        sample()
    except PipelineError as error:
        if not problem:
            log.warning("server_unavailable", extra=fields(server=server, detail=error))
        return str(error)
    if problem:
        log.info("server_available", extra=fields(server=server))
    return ""


def rates(topics: list[TopicSample]) -> list[tuple[datetime, float, float]]:
    """For each sample but the first, the messages per second that were published and stored, over RATE_OVER_S."""
    found = []
    first = 0
    for at, topic in enumerate(topics[1:], start=1):
        while first < at - 1 and (topic.at - topics[first].at).total_seconds() > RATE_OVER_S:
            first += 1
        before = topics[first]
        seconds = max((topic.at - before.at).total_seconds(), 1e-3)
        found.append(
            (topic.at, max(0, topic.end - before.end) / seconds, max(0, topic.committed - before.committed) / seconds)
        )
    return found
