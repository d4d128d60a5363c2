"""Real service processes, real messages, and waiting for conditions instead of sleeping."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, Message, Producer, TopicPartition
from psycopg.types.multirange import Multirange

from services.consumer import columns
from services.consumer.batch import Move
from services.consumer.sink import Sink, WriteResult
from services.core.block import decode_block
from services.core.config import Settings
from services.core.kafka import ARROW, FORMAT_HEADER, PARTITIONER, client_settings, headers_of
from services.core.reading import Reading
from services.etl import aggregates
from tests.measured import MEASUREMENTS, write_to
from tests.processes import Forked, Fresh

PATIENCE_S = 30.0
NOWHERE = Move("", {}, {})  # of no partition
START = datetime(2024, 3, 1, tzinfo=UTC)


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Wait for a condition that another process brings about; fails with ``what`` after ``timeout_s``."""
    pause = threading.Event()
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        pause.wait(0.05)


class Service:
    """One ``sensor-pipeline`` process with its log lines; ``module`` may be one that wraps the command line.

    ``begin`` makes the process: ``Fresh`` does it as a user does, for who measures it.
    """

    def __init__(
        self,
        settings: Settings,
        *arguments: str,
        log_path: Path,
        module: str = "services.cli",
        begin: type[Forked | Fresh] = Forked,
    ) -> None:
        self.log_path = log_path
        log_path.touch()
        self.process = begin(module, arguments, os.environ | settings.as_environment(), log_path, log_path)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log lines of one event so far."""
        lines = self.log_path.read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        return [line for line in found if line["event"] == name]

    def wait_for(self, event: str, count: int = 1, timeout_s: float = PATIENCE_S) -> dict[str, Any]:
        """Wait for the ``count``-th log line of an event and return it."""

        def seen() -> bool:
            if self.process.poll() not in (None, 0):
                raise AssertionError(f"the service ended: {self.log_path.read_text(encoding='utf-8')[-2000:]}")
            return len(self.events(event)) >= count

        wait_until(seen, f"{count} x {event} in {self.log_path.name}", timeout_s)
        return self.events(event)[count - 1]

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Wait for the end; the exit code."""
        return self.process.wait(timeout_s)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def stop(self) -> int:
        """SIGTERM, and wait for the end; the exit code."""
        self.process.terminate()
        return self.wait()


StartService = Callable[..., Service]


@pytest.fixture
def in_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """An etl in this process takes all readings for dense; others leave it at that while there are few."""
    monkeypatch.setattr(aggregates, "minutes_pay", lambda _, **__: True)


@pytest.fixture
def start(tmp_path: Path, settings: Settings) -> Iterator[StartService]:
    """Starts services of this test; all are killed at its end. ``start("consume", settings=...)``."""
    services: list[Service] = []

    def start_one(*arguments: str, settings: Settings = settings, module: str = "services.cli") -> Service:
        log_path = tmp_path / f"{module.rpartition('.')[2]}-{arguments[-1].lstrip('-')}-{len(services)}.log"
        services.append(Service(settings, *arguments, log_path=log_path, module=module))
        return services[-1]

    yield start_one
    for service in services:
        if service.process.poll() is None:
            service.kill()


def run_cli(settings: Settings, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    with TemporaryDirectory() as directory:
        out, err = Path(directory) / "out", Path(directory) / "err"
        process = Forked("services.cli", arguments, os.environ | settings.as_environment() | environment, out, err)
        try:
            code = process.wait(120)
        finally:
            process.kill()
        written = (path.read_text(encoding="utf-8") for path in (out, err))
        return subprocess.CompletedProcess(arguments, code, *written)


def store(settings: Settings, *readings: Reading, repeated: Sequence[Reading] = ()) -> WriteResult:
    """Store readings as the consumer does, of a partition that nobody else consumes."""
    sink = Sink(settings)
    try:
        return write_to(sink, readings, NOWHERE, repeated=repeated)
    finally:
        sink.close()


def touched_ranges(readings: Sequence[Reading]) -> Multirange[datetime]:
    """What the consumer queues for readings that it has stored; they are in order of time."""
    return columns.touched_ranges(columns.columns_of(readings, MEASUREMENTS)["time"])


def message(
    sensor: str = "s1",
    time: datetime | str = START,
    temperature: float | None = None,
    humidity: float | None = None,
) -> bytes:
    """A message value by the contract; fields that are None are left out."""
    fields: dict[str, object] = {
        "sensor_id": sensor,
        "time": time if isinstance(time, str) else time.isoformat(),
    }
    if temperature is not None:
        fields["temperature"] = temperature
    if humidity is not None:
        fields["humidity"] = humidity
    return json.dumps(fields).encode()


def minutes(count: float) -> datetime:
    """``count`` minutes after START."""
    return START + timedelta(minutes=count)


def publish(settings: Settings, values: Iterable[bytes | None], key: str = "s1", partition: int = -1) -> None:
    """Send messages in order and wait until the broker has them."""
    producer = Producer(client_settings(settings, "test") | {"enable.idempotence": True, "partitioner": PARTITIONER})
    for value in values:
        while True:
            try:
                producer.produce(settings.kafka_topic, key=key, value=value, partition=partition)
                break
            except BufferError:
                producer.poll(0.1)
    assert producer.flush(PATIENCE_S) == 0


def rows_of(message: Message) -> list[dict[str, Any]]:
    """The readings of a message, in either format, with the names of the contract."""
    if dict(headers_of(message)).get(FORMAT_HEADER) == ARROW:
        rows: list[dict[str, Any]] = decode_block(message.value(), MEASUREMENTS).to_pylist()
        return rows
    return [json.loads(message.value() or b"")]


def read_topic(settings: Settings, topic: str) -> list[Message]:
    """All committed messages of a topic, partition by partition."""
    consumer = Consumer(
        client_settings(settings, "test")
        | {
            "group.id": "reads-without-a-group",
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
            "enable.partition.eof": True,
        }
    )
    partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
    consumer.assign([TopicPartition(topic, number, 0) for number in partitions])
    found: list[Message] = []
    at_end = 0
    deadline = time.monotonic() + PATIENCE_S
    while at_end < len(partitions):
        assert time.monotonic() < deadline, f"the end of {topic} was not reached"
        received = consumer.poll(1)
        if received is None:
            continue
        error = received.error()
        if error is None:
            found.append(received)
        else:
            assert error.code() == KafkaError._PARTITION_EOF, error.str()
            at_end += 1
    consumer.close()
    return sorted(found, key=lambda item: (item.partition() or 0, item.offset() or 0))
