"""How fast a consumer drains a topic, over floors that are measured in turn with it."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass, field

from confluent_kafka import Consumer

from services.core.config import Settings
from services.core.database import connect
from services.core.kafka import client_settings
from tests.benchmarks.history import History, Row
from tests.benchmarks.servers import PATIENCE_S, Bench, source_of


@dataclass(slots=True)
class Round:
    """One turn of floors and subjects over the same readings, and what it found."""

    bench: Bench
    rows: list[Row]
    encoded: list[bytes]
    topic: Settings
    topic_of_blocks: Settings
    found: dict[str, float] = field(default_factory=dict)

    def drain(self) -> None:
        """The floor that users know, and one consumer."""
        floor = self.bench.copy_floor(self.rows)
        self.bench.truncate()
        drained = self.bench.drain(self.topic)
        self.found |= {
            "copy_floor": floor,
            "drain_rows_s": drained.rows_s,
            "drain_ratio": drained.rows_s / floor,
            "drain_cpu_s_per_million": drained.cpu_s_per_million,
            "drain_rss_mb": drained.rss_mb,
        }

    def encoded_floors(self) -> None:
        """The floors of the server alone."""
        for name, streams in (("encoded", 1), ("encoded_two", 2)):
            floor = self.bench.encoded_floor(self.encoded, streams)
            self.found[f"{name}_floor"] = floor
            self.found[f"drain_over_{name}"] = self.found["drain_rows_s"] / floor

    def blocks(self) -> None:
        """The same readings in blocks."""
        self.bench.truncate()
        drained = self.bench.drain(self.topic_of_blocks)
        self.found |= {
            "drain_blocks_rows_s": drained.rows_s,
            "drain_blocks_ratio": drained.rows_s / self.found["copy_floor"],
            "drain_blocks_cpu_s_per_million": drained.cpu_s_per_million,
            "drain_blocks_rss_mb": drained.rss_mb,
        }

    def merge(self) -> None:
        """A replay of what is stored already, and the upsert onto it."""
        self.bench.copy_floor(self.rows)
        floor = self.bench.upsert_floor(self.rows)
        self.found |= {"upsert_floor": floor, "merge_ratio": self.bench.drain(self.topic).rows_s / floor}

    def two_consumers(self) -> None:
        """The partitions divided between two processes."""
        self.bench.truncate()
        both = self.bench.drain(self.topic, consumers=2)
        self.found["two_consumers_ratio"] = both.rows_s / self.found["drain_rows_s"]

    def malformed(self) -> None:
        """The first half of the readings, each hundredth message cut off."""
        dirty = self.bench.new_topic()
        self.bench.fill(dirty, self.rows[: len(self.rows) // 2], every_bad=100)
        self.bench.truncate()
        self.found["malformed_ratio"] = self.bench.drain(dirty).rows_s / self.found["drain_rows_s"]

    def peer_loop(self) -> None:
        """The loop that tutorials show, over a tenth of the readings."""
        peer = peer_loop(self.bench, self.topic, len(self.rows) // 10)
        self.found["peer_loop_ratio"] = self.found["drain_rows_s"] / peer


BLOCKS = ("drain_blocks_rows_s", "drain_blocks_ratio", "drain_blocks_cpu_s_per_million", "drain_blocks_rss_mb")
BESIDE = (
    (
        Round.encoded_floors,
        ("encoded_floor", "drain_over_encoded", "encoded_two_floor", "drain_over_encoded_two"),
    ),
    (Round.blocks, BLOCKS),
    (Round.merge, ("upsert_floor", "merge_ratio")),
    (Round.two_consumers, ("two_consumers_ratio",)),
    (Round.malformed, ("malformed_ratio",)),
    (Round.peer_loop, ("peer_loop_ratio",)),
)


def measure_drain(bench: Bench) -> None:
    """Each round measures the floor and one consumer, and beside them what is wanted."""
    history = History(bench.scale.rows)
    rows, encoded, topic, blocks = history.rows(), list(history.encoded()), bench.new_topic(), bench.new_topic()
    bench.fill(topic, rows)
    if bench.wants(*BLOCKS):
        blocks = fill_with_blocks(bench, history)
    rounds = []
    for _ in range(bench.scale.rounds):
        turn = Round(bench, rows, encoded, topic, blocks)
        turn.drain()
        for measure, names in BESIDE:
            if bench.wants(*names):
                measure(turn)
        rounds.append(turn.found)
    bench.note(**{name: statistics.median(found[name] for found in rounds) for name in rounds[0]})


def fill_with_blocks(bench: Bench, history: History) -> Settings:
    """A topic that the producer has filled."""
    topic = bench.new_topic(**source_of(bench.parquet(history)), producer_format="arrow")
    assert bench.start(topic, "produce").wait(PATIENCE_S) == 0
    return topic


def peer_loop(bench: Bench, settings: Settings, count: int) -> float:
    """Rows per second of poll, json.loads, executemany of 1,000, commit."""
    bench.truncate()
    consumer = Consumer(
        client_settings(settings, "peer")
        | {"group.id": f"g{time.time_ns()}", "auto.offset.reset": "earliest", "enable.auto.commit": False}
    )
    consumer.subscribe([settings.kafka_topic])
    first = None
    while first is None:
        first = consumer.poll(1.0)
    started = time.monotonic()
    rows = []
    with connect(bench.settings) as connection:
        for number in range(count):
            message = first if number == 0 else consumer.poll(1.0)
            assert message is not None
            value = json.loads(message.value() or b"")
            rows.append((value["time"], value["sensor_id"], value["temperature"], value["humidity"]))
            if len(rows) == 1_000:
                with connection.transaction(), connection.cursor() as cursor:
                    cursor.executemany("INSERT INTO sensor_data VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING", rows)
                consumer.commit(asynchronous=False)
                rows.clear()
    seconds = time.monotonic() - started
    consumer.close()
    return count / seconds
