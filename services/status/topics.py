"""What Kafka says: topics, the group's lag and members, the newest dead letters by reason."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, replace

from confluent_kafka import ConsumerGroupState, KafkaError
from confluent_kafka.admin import AdminClient

from services.core.config import Settings
from services.core.errors import TransientError
from services.core.kafka import client_settings, raise_if_refused, read_topic, topic_id, translated_kafka
from services.core.letters import name_of, reason_of, replaced_by
from services.core.offsets import ANSWER_TIMEOUT_S, COORDINATOR_TIMEOUT_S, Offsets, PartitionOffsets

MAX_LETTERS = 10_000
READ_LETTERS_FOR_S = 3.0
REBALANCING = frozenset({ConsumerGroupState.PREPARING_REBALANCING, ConsumerGroupState.COMPLETING_REBALANCING})


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition of the topic of readings."""

    partition: int
    first_offset: int
    end_offset: int
    committed_offset: int | None
    lag: int  # messages that are not stored; without an answer of the database, that the group has not committed
    consumer: str | None  # client id and host
    stored_offset: int | None = None  # from where the database continues


@dataclass(frozen=True, slots=True)
class DeadLetters:
    """How many there are, and of the newest ``looked_at`` how many for each reason."""

    count: int
    looked_at: int
    reasons: dict[str, int]


@dataclass(frozen=True, slots=True)
class KafkaStatus:
    """The cluster and our topics; None where a topic does not exist."""

    address: str
    brokers: int
    topic: str
    topic_id: str | None
    partitions: list[Partition] | None
    lag: int
    group: str
    is_rebalancing: bool
    dead_letter_topic: str
    dead_letters: DeadLetters | None

    def compared_with(self, positions: dict[str, dict[int, int]]) -> KafkaStatus:
        """With what the database has stored of each topic (by id): it knows, the offsets of the group do not."""
        if self.partitions is None or self.topic_id is None:
            return self
        stored = positions.get(self.topic_id, {})
        partitions = []
        for each in self.partitions:
            at = stored.get(each.partition, 0)
            done = max(each.first_offset, min(at, each.committed_offset or 0))
            partitions.append(replace(each, stored_offset=at, lag=max(0, each.end_offset - done)))
        return replace(self, partitions=partitions, lag=sum(each.lag for each in partitions))


def read_kafka(settings: Settings) -> KafkaStatus:
    """Ask everything.

    Raises TransientError when an answer does not come in time, ConfigurationError when Kafka refuses us.
    """
    errors: list[KafkaError] = []
    admin = AdminClient(client_settings(settings, "status") | {"log_level": 0, "error_cb": errors.append})
    try:
        return _read(admin, settings)
    except TransientError:
        admin.poll(0)  # which calls error_cb
        raise_if_refused(errors, settings, last=False)
        raise


def _read(admin: AdminClient, settings: Settings) -> KafkaStatus:
    with Offsets(settings) as offsets:
        topics = offsets.partitions()
        brokers, owners, is_rebalancing = _ask_admin(admin, settings)
        partitions, identity, letters = None, None, None
        if settings.kafka_topic in topics:
            partitions = [
                Partition(each.partition, each.first, each.end, each.committed, each.lag, owners.get(each.partition))
                for each in offsets.of(settings.kafka_topic, topics[settings.kafka_topic])
            ]
            identity = topic_id(admin, settings)
        if settings.dead_letter_topic in topics:
            dead = offsets.of(settings.dead_letter_topic, topics[settings.dead_letter_topic])
            letters = _read_letters(settings, dead)
    return KafkaStatus(
        address=settings.bootstrap_servers,
        brokers=brokers,
        topic=settings.kafka_topic,
        topic_id=identity,
        partitions=partitions,
        lag=sum(each.lag for each in partitions or ()),
        group=settings.kafka_group,
        is_rebalancing=is_rebalancing,
        dead_letter_topic=settings.dead_letter_topic,
        dead_letters=letters,
    )


def _ask_admin(admin: AdminClient, settings: Settings) -> tuple[int, dict[int, str], bool]:
    """The number of brokers, who consumes which partition, and whether the group is rebalancing."""
    cluster = admin.describe_cluster(request_timeout=ANSWER_TIMEOUT_S)
    (group,) = admin.describe_consumer_groups([settings.kafka_group], request_timeout=COORDINATOR_TIMEOUT_S).values()
    with translated_kafka(f"Kafka at {settings.bootstrap_servers} does not answer"):
        described = group.result()
        brokers = len(cluster.result().nodes)
    owners = {
        each.partition: f"{member.client_id} at {member.host.removeprefix('/')}"
        for member in described.members
        for each in member.assignment.topic_partitions
        if each.topic == settings.kafka_topic
    }
    return brokers, owners, described.state in REBALANCING


def _read_letters(settings: Settings, partitions: list[PartitionOffsets]) -> DeadLetters:
    """Read the newest letters of each partition, for a few seconds at most."""
    share = MAX_LETTERS // len(partitions)
    deadline = time.monotonic() + READ_LETTERS_FOR_S
    reasons: dict[bytes, str] = {}  # by the letter's name
    older: set[bytes | None] = set()
    for each in partitions:
        start = max(each.first, each.end - share)
        for letter in read_topic(settings, settings.dead_letter_topic, each.partition, start, each.end, deadline):
            reasons[name_of(letter)] = reason_of(letter)
            older.add(replaced_by(letter))
    count = sum(each.end - each.first for each in partitions) - len(reasons.keys() & older)
    by_reason = Counter(reason for name, reason in reasons.items() if name not in older)
    return DeadLetters(count, by_reason.total(), dict(by_reason.most_common()))
