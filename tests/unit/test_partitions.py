"""Which partitions are ours, and where each is: every transition, with a client of Kafka that reaches no broker."""

from __future__ import annotations

from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any, cast

import pytest
from confluent_kafka import Consumer, KafkaError, TopicPartition

from services.consumer.lag import Commits
from services.consumer.lane import MAX_BATCH_BYTES, Lane
from services.consumer.partitions import Partitions
from services.consumer.positions import Located, Positions
from services.core.errors import PermanentError
from tests.measured import make_settings

TOPIC = "readings"


@pytest.fixture
def lanes() -> Iterator[list[Lane]]:
    settings = make_settings()
    made = [Lane(settings, cast("Positions", None), SimpleQueue()) for _ in range(2)]
    yield made
    for lane in made:
        lane.writer.stop()
        lane.writer.join()


class Silent:
    """Takes what is committed, and does not answer."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []

    def commit(self, *, offsets: list[TopicPartition], asynchronous: bool) -> None:
        """What Kafka is told, by partition."""
        assert asynchronous
        self.told += [(place.partition, place.offset) for place in offsets]


@pytest.fixture
def kafka() -> Silent:
    return Silent()


@pytest.fixture
def commits(kafka: Silent) -> Commits:
    return Commits(cast("Any", kafka), TOPIC)


@pytest.fixture
def partitions(lanes: list[Lane], commits: Commits) -> Iterator[Partitions]:
    consumer = Consumer({"bootstrap.servers": "127.0.0.1:1", "group.id": "nobody", "log_level": 0})
    yield Partitions(consumer, TOPIC, lanes, commits)
    consumer.close()


def located(partitions: Partitions, **at: int) -> None:
    """Assign partitions 0 and on, and say where they go on."""
    positions = {int(name[1:]): offset for name, offset in at.items()}
    partitions.assign(sorted(positions))
    for lane in {partitions.lane_of[partition] for partition in positions}:
        partitions.locate(lane, Located("one", fills_gaps=False, positions=positions))


def test_assigned_partitions_are_shared_out_and_wait_for_the_database(
    partitions: Partitions, lanes: list[Lane]
) -> None:
    partitions.assign([0, 1, 2, 3])
    assert [len(lane.partitions) for lane in lanes] == [2, 2]
    assert [partitions.unknown(lane) for lane in lanes] == [lane.partitions for lane in lanes]
    assert partitions.next == {}
    assert not partitions.are_all_at_end


def test_a_located_partition_is_where_the_database_says(partitions: Partitions, lanes: list[Lane]) -> None:
    located(partitions, p0=7, p1=0)
    assert partitions.next == {0: 7, 1: 0}
    assert not any(map(partitions.unknown, lanes))


def test_what_the_database_says_of_anothers_partition_is_ignored(partitions: Partitions, lanes: list[Lane]) -> None:
    partitions.assign([0])
    partitions.lose({0})
    partitions.locate(lanes[0], Located("one", fills_gaps=False, positions={0: 7}))
    assert partitions.next == {}


def test_all_are_at_their_end_until_more_comes(partitions: Partitions) -> None:
    located(partitions, p0=7, p1=5)
    found = []
    for partition, end in ((0, 7), (1, 5)):
        partitions.note_end(partition, end)
        found.append(partitions.are_all_at_end)
    assert found == [False, True]
    partitions.next[1] = 6
    partitions.note_polled()
    assert partitions.ends == {0: 7}


def test_nothing_is_at_its_end_before_it_is_located(partitions: Partitions) -> None:
    partitions.assign([0])
    partitions.note_end(0, 7)
    assert partitions.ends == {}


def test_going_back_forgets_what_is_not_stored_of_one_lane(partitions: Partitions) -> None:
    located(partitions, p0=7, p1=5)
    mine, other = partitions.lane_of[0], partitions.lane_of[1]
    mine.filling.move(0, 9, partitions.next)
    partitions.note_end(0, 9)
    partitions.go_back([mine])
    assert mine.filling.is_empty
    assert (partitions.next, partitions.ends) == ({1: 5}, {})
    assert [partitions.unknown(lane) for lane in (mine, other)] == [{0}, set()]


def test_a_lost_partition_is_forgotten_and_its_lane_keeps_the_others(partitions: Partitions) -> None:
    located(partitions, p0=7, p1=5, p2=3)
    lane = partitions.lane_of[0]
    for partition in (0, 2):
        lane.filling.move(partition, 10, partitions.next)
        partitions.note_end(partition, 10)
    partitions.lose({0})
    assert lane.partitions == {2}
    assert lane.filling.end == {2: 10}
    assert (partitions.next, partitions.ends) == ({1: 5, 2: 10}, {2: 10})


def test_each_rebalance_counts(partitions: Partitions) -> None:
    located(partitions, p0=7)
    partitions.lose({0})
    assert partitions.rebalances == 2


def test_a_topic_that_was_replaced_begins_anew_in_all_lanes(partitions: Partitions) -> None:
    located(partitions, p0=7, p1=5)
    partitions.locate(partitions.lane_of[0], Located("another", fills_gaps=True, positions={0: 0}))
    assert partitions.next == {0: 0}
    assert partitions.unknown(partitions.lane_of[1]) == {1}
    batch = partitions.new_batch()
    assert (batch.topic_id, batch.fills_gaps) == ("another", True)


def test_a_marker_at_the_end_is_stepped_over_and_then_kafka_is_told_once(
    partitions: Partitions, commits: Commits, kafka: Silent
) -> None:
    located(partitions, p0=7)
    lane = partitions.lane_of[0]
    partitions.note_end(0, 8)
    partitions.step_over_ends(lane)
    assert (lane.filling.start, lane.filling.end) == ({0: 7}, {0: 8})
    partitions.step_over_ends(lane)  # it is not stored yet
    assert kafka.told == []
    lane.filling = partitions.new_batch()
    for _ in range(2):
        partitions.step_over_ends(lane)
    assert kafka.told == [(0, 8)]
    assert not commits.are_answered({0: 8})
    commits.note_answer(None, [TopicPartition(TOPIC, 0, 8)])
    assert commits.are_answered({0: 8})


def test_what_kafka_has_refused_is_told_again_when_it_is_time(commits: Commits, kafka: Silent) -> None:
    commits.commit({0: 8})
    commits.note_answer(KafkaError(KafkaError.REQUEST_TIMED_OUT), [])
    commits.commit({0: 8})
    assert kafka.told == [(0, 8)]
    commits.retry_refused()
    commits.commit({0: 8})
    assert kafka.told == [(0, 8), (0, 8)]


def test_a_partition_that_comes_back_is_told_of_again(commits: Commits, kafka: Silent) -> None:
    commits.commit({0: 8, 1: 3})
    commits.forget([0])
    commits.commit({0: 8, 1: 3})
    assert kafka.told == [(0, 8), (1, 3), (0, 8)]


def test_kafka_that_does_not_allow_commits_ends_the_consumer(commits: Commits) -> None:
    commits.commit({0: 8})
    with pytest.raises(PermanentError, match="Kafka refuses to commit offsets"):
        commits.note_answer(KafkaError(KafkaError.GROUP_AUTHORIZATION_FAILED), [])


def test_a_lane_takes_more_after_the_whole_of_a_full_batch_was_lost(partitions: Partitions, lanes: list[Lane]) -> None:
    """An empty batch is not stored, so one that stays full would never be replaced."""
    located(partitions, p0=7, p1=0, p2=0)
    (lane,) = [lane for lane in lanes if 0 in lane.partitions]
    assert lane.partitions == {0, 2}
    lane.filling.move(0, 9, partitions.next)
    lane.filling.size_bytes = MAX_BATCH_BYTES
    assert lane.is_full
    partitions.lose([0])
    assert lane.filling.is_empty
    assert not lane.is_full
