"""Where each partition of the topic continues: the database decides, not the offsets of the group.

The positions are kept by the topic's id, so a topic that was deleted and created again begins at its beginning, and a
database that was emptied, restored or moved to another group continues exactly where its own data ends.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime

from confluent_kafka import TopicCollection
from confluent_kafka.admin import TopicDescription

from services.core.config import Settings
from services.core.database import connect, one, queries, translated
from services.core.errors import ConfigurationError
from services.core.kafka import connect_admin, topic_id
from services.core.offsets import Offsets
from services.core.shutdown import Shutdown

SQL = queries("services.consumer")
CHECK_INTERVAL_S, CHECK_TIMEOUT_S = 10.0, 5.0


@dataclass(frozen=True, slots=True)
class Located:
    """Where partitions of a topic continue; ``fills_gaps``: old files may have been stored from another topic."""

    topic_id: str = ""
    fills_gaps: bool = False
    positions: Mapping[int, int] = field(default_factory=dict)


class Positions:
    """Asks both servers, each once: the caller tries again."""

    def __init__(self, settings: Settings, shutdown: Shutdown) -> None:
        self._settings = settings
        self._admin = connect_admin(settings, shutdown)
        self._check: Future[TopicDescription] | None = None
        self._next_check = time.monotonic() + CHECK_INTERVAL_S

    def topic_id(self) -> str:
        """The topic's id now: it is another topic once it was deleted and created again. Raises as core.kafka does."""
        return topic_id(self._admin, self._settings)

    def read(self, topic: str, partitions: Iterable[int]) -> Located:
        """The positions of the partitions of the topic with this id. Raises TransientError or PermanentError."""
        arguments = {"topic": topic, "partitions": sorted(partitions)}
        with translated(), connect(self._settings) as connection:
            (fills_gaps,) = one(connection, SQL["knows_another_topic"], {"topic": topic})
            connection.execute(SQL["add_partitions"], arguments)
            positions: dict[int, int] = dict(connection.execute(SQL["read_positions"], arguments).fetchall())
        return Located(topic, fills_gaps, positions)

    def topic_was_replaced(self, topic: str) -> bool:
        """Whether the topic has another id by now. Asks once in each interval, and never waits for the answer."""
        name, now = self._settings.kafka_topic, time.monotonic()
        if self._check is None and now >= self._next_check:
            checks = self._admin.describe_topics(TopicCollection([name]), request_timeout=CHECK_TIMEOUT_S)
            self._check, self._next_check = checks[name], now + CHECK_INTERVAL_S
        if self._check is None or not self._check.done():
            return False
        check, self._check = self._check, None
        return check.exception() is None and str(check.result().topic_id) != topic


@dataclass(frozen=True, slots=True)
class Rewound:
    """One partition: where it was, and where it continues now."""

    partition: int
    before: int
    after: int


def rewind(
    settings: Settings, shutdown: Shutdown, *, moment: datetime | None, offset: int | None, partition: int | None
) -> list[Rewound]:
    """Let the consumers continue from earlier positions; they follow within seconds, running or not.

    These are the first message of ``moment`` or later (None: the beginning of the topic), of one partition or of all;
    or exactly ``offset`` of one partition, which may also be later, to skip messages.

    Raises ConfigurationError for a position that the topic does not have.
    """
    topic = topic_id(connect_admin(settings, shutdown), settings)
    with Offsets(settings) as offsets, translated(), connect(settings) as connection:
        numbers = offsets.partitions()[settings.kafka_topic]
        if partition is not None and partition not in numbers:
            raise ConfigurationError(f"--partition={partition}: {settings.kafka_topic} has 0 to {numbers[-1]}")
        chosen = numbers if partition is None else [partition]
        found = {each.partition: each for each in offsets.of(settings.kafka_topic, chosen)}
        starts = offsets.since(settings.kafka_topic, chosen, moment) if moment is not None else {}
        arguments = {"topic": topic, "partitions": chosen}
        connection.execute(SQL["add_partitions"], arguments)
        moved = []
        for number, before in connection.execute(SQL["read_positions"], arguments).fetchall():
            first, end = found[number].first, found[number].end
            if offset is not None and not first <= offset <= end:
                raise ConfigurationError(f"--to-offset={offset}: partition {number} has {first} to {end}")
            after = offset if offset is not None else min(before, starts.get(number, first))
            if after != before:
                connection.execute(SQL["set_position"], {"topic": topic, "partition": number, "offset": after})
                moved.append(Rewound(number, before, after))
        return moved
