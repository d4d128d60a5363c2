"""The partitions that are ours: which lane stores each, and where each of them is.

    state       what it means                                      leaves for
    assigned    ours, and paused: the database is asked where it   located, when it answers
                continues (``unknown``)
    located     fetched from there; ``next`` is its position once  at its end, when all there is was polled
                all that was polled is stored                      assigned, when its lane abandons a batch, a message
                                                                   is out of place, or the topic was replaced
    at its end  located, and in ``ends``                           located, when more comes; assigned, as above

From any state a partition is lost when the group revokes it. What was polled and not stored is forgotten then, and
where a partition goes back to assigned; it is fetched again. Belongs to the thread that polls.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence

from confluent_kafka import Consumer, KafkaException, TopicPartition

from services.consumer.batch import Batch
from services.consumer.lag import Commits
from services.consumer.lane import Lane
from services.consumer.metrics import MESSAGES_EXPIRED
from services.consumer.positions import Located
from services.core.logs import fields

log = logging.getLogger("consumer")

WATERMARKS_TIMEOUT_S = 5.0


class Partitions:
    """Assigned and lost as the group says, located as the database says."""

    def __init__(self, consumer: Consumer, name: str, lanes: Sequence[Lane], commits: Commits) -> None:
        self.lane_of: dict[int, Lane] = {}
        self.next: dict[int, int] = {}
        self.ends: dict[int, int] = {}
        self.topic = Located()  # the newest answer of the database
        self.rebalances = 0
        self._consumer = consumer
        self._name = name
        self._lanes = lanes
        self._commits = commits

    @property
    def are_all_at_end(self) -> bool:
        """Whether all there is was polled, of at least one partition."""
        return bool(self.lane_of) and self.ends.keys() >= self.lane_of.keys()

    def unknown(self, lane: Lane) -> frozenset[int]:
        """Those of the lane that are not located yet."""
        return frozenset(lane.partitions - self.next.keys())

    def new_batch(self) -> Batch:
        """An empty batch of the topic that we read."""
        return Batch(self.topic.topic_id, self.topic.fills_gaps)

    def assign(self, added: Sequence[int]) -> None:
        """More partitions are ours from now on. They wait for the database to say where to begin."""
        self.rebalances += 1
        for partition in added:
            lane = self.lane_of[partition] = min(self._lanes, key=lambda lane: len(lane.partitions))
            lane.partitions.add(partition)
        self._consumer.incremental_assign(self._at(added))
        if added:
            self._consumer.pause(self._at(added))
        log.info("partitions_assigned", extra=fields(partitions=added))

    def lose(self, gone: Collection[int]) -> None:
        """Partitions are another consumer's already: forget what we hold of them."""
        self.rebalances += 1
        log.info("partitions_revoked", extra=fields(partitions=sorted(gone)))
        if gone:
            self._consumer.resume(self._at(gone))  # librdkafka would keep a pause until the partition comes back
        for partition in gone:
            for each in (self.lane_of, self.next, self.ends):
                each.pop(partition, None)
        for lane in self._lanes:
            lane.lose(gone)
        self._commits.forget(gone)

    def locate(self, lane: Lane, answer: Located) -> None:
        """The database's answer: fetch from there, unless a partition is another consumer's by now."""
        if self.topic.topic_id not in ("", answer.topic_id):
            log.warning("topic_replaced", extra=fields(topic=self._name))
            self.go_back(self._lanes)
        self.topic = answer
        for each in self._lanes:
            if each.filling.is_empty:
                each.filling = self.new_batch()
        found = {partition: at for partition, at in answer.positions.items() if partition in lane.partitions}
        self.next |= found
        self._commits.committed |= found
        self._fetch(lane, found)

    def go_back(self, lanes: Iterable[Lane]) -> None:
        """Forget what is not stored; nothing is fetched until the database has said where to continue."""
        for lane in lanes:
            lane.forget(self.new_batch())
            for partition in lane.partitions:
                self.ends.pop(partition, None)
                self.next.pop(partition, None)
            if lane.partitions:
                self._consumer.pause(self._at(lane.partitions))

    def pause(self, lane: Lane, *, paused: bool) -> None:
        """Stop fetching for a lane, or fetch again."""
        lane.paused = paused
        (self._consumer.pause if paused else self._consumer.resume)(self._at(lane.partitions))

    def note_end(self, partition: int, offset: int) -> None:
        """All that there is before ``offset`` was polled."""
        if partition in self.next:
            self.ends[partition] = offset

    def note_polled(self) -> None:
        """Messages were polled: the end is no longer the end where there were more."""
        self.ends = {partition: end for partition, end in self.ends.items() if self.next[partition] <= end}

    def step_over_ends(self, lane: Lane) -> None:
        """When all that was polled is stored, step over what is not a message (a transaction's end marker).

        Otherwise a lag would remain that nobody could tell from a real one.
        """
        if lane.filling.is_empty:
            ends = {partition: self.ends[partition] for partition in lane.partitions & self.ends.keys()}
            for partition, end in ends.items():
                if end > self.next[partition]:
                    lane.filling.move(partition, end, self.next)
            if lane.filling.is_empty:
                self._commits.commit(ends)

    def leave_missing(self, partition: int | None) -> None:
        """Kafka has nothing at our position: what was there has expired, or a broker has lost the end of its log."""
        if partition is None or partition not in self.next:
            return
        position = self.next[partition]
        try:
            (at,) = self._at([partition])
            first, end = self._consumer.get_watermark_offsets(at, timeout=WATERMARKS_TIMEOUT_S)
        except KafkaException as error:
            log.warning("kafka_unavailable", extra=fields(detail=error.args[0].str()))
            first, end = position, position  # try again from there
        if position < first:
            MESSAGES_EXPIRED.inc(first - position)
            detail = "Kafka deleted messages that were never stored: the topic's retention is too short"
            log.error("messages_expired", extra=fields(partition=partition, messages=first - position, detail=detail))
        elif position > end:
            detail = "a broker has lost messages that were stored here; continuing at the end of the topic"
            log.error("topic_is_shorter", extra=fields(partition=partition, position=position, end=end, detail=detail))
        if not first <= position <= end:
            self.lane_of[partition].filling.move(partition, min(max(position, first), end), self.next)
        self._fetch(self.lane_of[partition], [partition])

    def _at(self, partitions: Iterable[int]) -> list[TopicPartition]:
        """Where the partitions are; 0 for those that are not located, and paused.

        Never a logical offset: librdkafka asks the broker what it is, and when a partition was assigned elsewhere
        before the answer came, it asks once more half a second later, and goes there.
        """
        return [TopicPartition(self._name, partition, self.next.get(partition, 0)) for partition in partitions]

    def _fetch(self, lane: Lane, partitions: Iterable[int]) -> None:
        """Fetch from where these partitions are. A seek would be refused while one has no valid position."""
        if positions := self._at(partitions):
            self._consumer.incremental_unassign(positions)
            self._consumer.incremental_assign(positions)
            (self._consumer.pause if lane.paused else self._consumer.resume)(positions)
