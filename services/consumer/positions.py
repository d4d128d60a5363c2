"""Where each partition of the topic goes on: the database says so, not the offsets of the group.

The positions are kept by the topic's id, so a topic that was deleted and created again begins at its beginning, and a
database that was emptied, restored or moved to another group goes on exactly where its own data ends.
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
class Places:
    """Where partitions of a topic go on; ``fills_gaps``: old files may have been stored from another topic."""

    topic_id: str = ""
    fills_gaps: bool = False
    positions: Mapping[int, int] = field(default_factory=dict)


class Positions:
    """Asks both servers, each once: whoever calls tries again."""

    def __init__(self, settings: Settings, shutdown: Shutdown) -> None:
        self._settings = settings
        self._admin = connect_admin(settings, shutdown)
        self._look: Future[TopicDescription] | None = None
        self._next_look = time.monotonic() + CHECK_INTERVAL_S

    def topic_id(self) -> str:
        """The topic's id now: it is another topic once it was deleted and created again. Raises as core.kafka does."""
        return topic_id(self._admin, self._settings)

    def read(self, topic: str, partitions: Iterable[int]) -> Places:
        """The positions of the partitions of the topic with this id. Raises TransientError or PermanentError."""
        arguments = {"topic": topic, "partitions": sorted(partitions)}
        with translated(), connect(self._settings) as connection:
            (fills_gaps,) = one(connection, SQL["knows_another_topic"], {"topic": topic})
            connection.execute(SQL["add_partitions"], arguments)
            positions: dict[int, int] = dict(connection.execute(SQL["read_positions"], arguments).fetchall())
        return Places(topic, fills_gaps, positions)

    def topic_was_replaced(self, topic: str) -> bool:
        """Whether the topic has another id by now. Looks now and then, and never waits for the answer."""
        now = time.monotonic()
        if self._look is None:
            if now >= self._next_look:
                name = self._settings.kafka_topic
                looks = self._admin.describe_topics(TopicCollection([name]), request_timeout=CHECK_TIMEOUT_S)
                self._look = looks[name]
            return False
        if not self._look.done():
            return False
        look, self._look = self._look, None
        self._next_look = now + CHECK_INTERVAL_S
        return look.exception() is None and str(look.result().topic_id) != topic


@dataclass(frozen=True, slots=True)
class Rewound:
    """One partition: where it was, and where it goes on now."""

    partition: int
    before: int
    after: int


def rewind(
    settings: Settings, shutdown: Shutdown, *, moment: datetime | None, offset: int | None, partition: int | None
) -> list[Rewound]:
    """Let the consumers go on from an earlier place; they follow within seconds, running or not.

    That is the first message of ``moment`` or later (None: the beginning of the topic), of one partition or of all; or
    exactly ``offset`` of one partition, which may also be a later one, to skip messages. What is read again in its
    order ends with the same values.

    Raises ConfigurationError for a place that the topic does not have.
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
            place = found[number]
            if offset is not None and not place.first <= offset <= place.end:
                raise ConfigurationError(f"--to-offset={offset}: partition {number} has {place.first} to {place.end}")
            after = offset if offset is not None else min(before, starts.get(number, place.first))
            if after != before:
                connection.execute(SQL["set_position"], {"topic": topic, "partition": number, "offset": after})
                moved.append(Rewound(number, before, after))
        return moved
