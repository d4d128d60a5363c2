"""The consumer as a process, against a real broker and a real database."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import psutil
import psycopg
import pytest
from confluent_kafka import Consumer, Message, TopicPartition

from services.consumer.lane import FIRST_BATCH_ROWS
from services.core.config import Settings
from services.core.database import connect
from services.core.kafka import client_settings, headers_of
from tests.fix_services import Service, StartService, message, minutes, publish, read_topic, wait_until


def rows(connection: psycopg.Connection) -> list[tuple[object, ...]]:
    return connection.execute(
        "SELECT sensor_id, time, temperature, humidity FROM sensor_data ORDER BY sensor_id, time"
    ).fetchall()


def headers(letter: Message) -> dict[str, str]:
    """The headers of a dead letter; all of ours are text."""
    return {name: (value or b"").decode() for name, value in headers_of(letter)}


def test_new_readings_are_copied_and_their_minutes_queued(
    settings: Settings, connection: psycopg.Connection, start: StartService
) -> None:
    publish(settings, [message(time=minutes(at), temperature=float(at)) for at in (0, 1, 2, 90)])
    consumer = start("consume", "--until-caught-up")
    assert consumer.wait() == 0
    assert rows(connection) == [("s1", minutes(at), float(at), None) for at in (0, 1, 2, 90)]
    touched = connection.execute("SELECT range_agg(touched)::text FROM summary_refresh_queue").fetchone()
    assert touched == (
        '{["2024-03-01 00:00:00+00","2024-03-01 00:03:00+00"),["2024-03-01 01:30:00+00","2024-03-01 01:31:00+00")}',
    )
    assert consumer.events("stopped")[0]["inserted"] == 4


def test_malformed_messages_become_dead_letters_and_their_neighbours_are_stored(
    settings: Settings, connection: psycopg.Connection, start: StartService
) -> None:
    malformed = {
        b'{"sensor_id":"x"}': "invalid_reading",
        b"not json": "invalid_json",
        b"": "empty",
        b"x" * 200_000: "too_large",
        b'{"sensor_id":"a\\u0000b","time":"2024-03-01T00:00:00Z","temperature":1}': "invalid_reading",
    }
    values = [message(time=minutes(0), temperature=0.0)]
    for at, value in enumerate(malformed, start=1):
        values += [value, message(time=minutes(at), temperature=float(at))]
    publish(settings, values)
    consumer = start("consume", "--until-caught-up")
    assert consumer.wait() == 0
    assert [row[2] for row in rows(connection)] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    letters = read_topic(settings, settings.dead_letter_topic)
    found = {letter.value() or b"": headers(letter) for letter in letters}
    assert {value: ours["sensor_pipeline.reason"] for value, ours in found.items()} == malformed
    of_one = found[b"not json"]
    assert of_one["__connect.errors.topic"] == settings.kafka_topic
    assert of_one["__connect.errors.offset"] == "3"
    assert of_one["__connect.errors.exception.message"].startswith("JSON is malformed")
    assert consumer.events("stopped")[0]["dead_letters"] == 5


def test_a_flood_of_large_messages_takes_little_memory(settings: Settings, start: StartService) -> None:
    count, large = 1500, os.urandom(200_000)
    publish(settings, itertools.repeat(large, count))
    consumer = start("consume", "--until-caught-up")
    process = psutil.Process(consumer.process.pid)
    most = 0

    def has_ended() -> bool:
        nonlocal most
        with suppress(psutil.NoSuchProcess):
            most = max(most, process.memory_info().rss)
        return consumer.process.poll() is not None

    wait_until(has_ended, "the topic's end")
    assert consumer.events("stopped")[0]["dead_too_large"] == count
    assert most < 250_000_000, f"{most} bytes for {count * len(large)} of messages"


def lag(settings: Settings) -> int:
    """Messages that the group has not committed."""
    consumer = Consumer(client_settings(settings, "test") | {"group.id": settings.kafka_group})
    places = [TopicPartition(settings.kafka_topic, number) for number in range(settings.kafka_partitions)]
    total = 0
    for place in consumer.committed(places, timeout=10):
        first, end = consumer.get_watermark_offsets(TopicPartition(place.topic, place.partition), timeout=10)
        total += end - max(first, place.offset)
    consumer.close()
    return total


def stopped(service: Service) -> dict[str, int]:
    """The counters that a consumer ends with."""
    fields = service.events("stopped")[0]
    return {name: value for name, value in fields.items() if isinstance(value, int)}


def test_dropped_readings_never_leave_the_counters_at_zero(
    settings: Settings, connection: psycopg.Connection, start: StartService
) -> None:
    """Inserted, updated, unchanged and dead letters add up to the messages sent, each reason has its count."""
    future = datetime.now(UTC) + timedelta(days=2)
    values: list[bytes | None] = [message(time=minutes(at), temperature=1.0) for at in range(200)]
    values += [message(time=minutes(at), temperature=1.0) for at in range(50)]
    values += [message(time=minutes(at), temperature=2.0) for at in range(30)]
    values += [message(time=future, temperature=1.0)] * 3
    values += [message(sensor="a\0b", temperature=1.0), None, b"{", message(), b"[]"]
    publish(settings, values, partition=0)
    consumer = start("consume", "--until-caught-up")
    assert consumer.wait() == 0
    counters = stopped(consumer)
    reasons = {name: count for name, count in counters.items() if name.startswith("dead_") and name != "dead_letters"}
    assert reasons == {
        "dead_empty": 1,
        "dead_future_time": 3,
        "dead_invalid_json": 1,
        "dead_invalid_reading": 2,
        "dead_no_measurement": 1,
    }
    assert counters["dead_letters"] == sum(reasons.values()) == len(read_topic(settings, settings.dead_letter_topic))
    assert counters["inserted"] + counters["updated"] + counters["unchanged"] == 280
    assert sum(counters.values()) - sum(reasons.values()) == len(values)
    assert len(rows(connection)) == 200
    assert rows(connection)[29][2] == 2.0


def test_caught_up_means_no_lag_and_a_second_run_reads_nothing(
    settings: Settings, connection: psycopg.Connection, start: StartService
) -> None:
    for partition in range(settings.kafka_partitions - 1):
        publish(settings, [message(time=minutes(at), temperature=1.0) for at in range(100)], partition=partition)
    assert lag(settings) == 200
    first = start("consume", "--until-caught-up")
    assert first.wait() == 0
    assert lag(settings) == 0
    counters = stopped(first)
    assert (counters["inserted"], counters["inserted"] + counters["unchanged"]) == (100, 200)
    second = start("consume", "--until-caught-up")
    assert second.wait() == 0
    assert set(stopped(second).values()) == {0}
    assert second.events("batch_written") == []


def test_the_last_message_of_a_key_wins_across_batches(
    settings: Settings, connection: psycopg.Connection, start: StartService
) -> None:
    consumer = start("consume")
    for batch in (
        [message(time=minutes(at), temperature=float(at)) for at in range(30)],
        [message(time=minutes(at), humidity=50.0) for at in range(30)],
        [message(time=minutes(at), temperature=float(-at)) for at in range(0, 30, 2)],
    ):
        publish(settings, batch, partition=0)
        wait_until(lambda: lag(settings) == 0, "the batch is stored")
    assert consumer.stop() == 0
    counters = stopped(consumer)
    assert (counters["inserted"], counters["updated"], counters["unchanged"]) == (30, 44, 1)  # -0.0 equals 0.0
    assert rows(connection) == [("s1", minutes(at), float(at if at % 2 else -at), 50.0) for at in range(30)]


def test_sigterm_loses_nothing_and_repeats_little(
    settings: Settings, connection: psycopg.Connection, start: StartService
) -> None:
    count = 30_000
    publish(settings, (message(time=minutes(at), temperature=float(at)) for at in range(count)))
    small = settings.model_copy(update={"consumer_batch_rows": 500})
    first = start("consume", settings=small)
    first.wait_for("batch_written", 3)
    first.signal(signal.SIGTERM)
    assert first.wait(10) == 0
    before = stopped(first)["inserted"]
    assert 0 < before < count, "the signal came too late to test anything"
    assert connection.execute("SELECT count(*) FROM sensor_data").fetchone() == (before,)
    second = start("consume", "--until-caught-up")
    assert second.wait() == 0
    assert stopped(second)["inserted"] == count - before
    assert connection.execute("SELECT count(*), sum(temperature) FROM sensor_data").fetchone() == (
        count,
        count * (count - 1) / 2,
    )
    assert lag(settings) == 0


@pytest.mark.usefixtures("native")
def test_a_partition_that_waits_holds_up_no_other_writer(
    settings: Settings, connection: psycopg.Connection, start: StartService
) -> None:
    """Not even when it has waited for so long that it is paused."""

    def positions() -> list[int]:
        found = connection.execute("SELECT next_offset FROM partition_progress WHERE partition < 2 ORDER BY partition")
        return [position for (position,) in found]

    def send(partition: int) -> None:
        values = [message(f"p{partition}", time=minutes(at), temperature=1.0) for at in range(10)]
        publish(settings, values, partition=partition)

    consumer = start("consume")
    for partition in (0, 1):
        send(partition)
    wait_until(lambda: positions() == [10, 10], "both are stored")
    with connect(settings) as other, other.transaction():
        other.execute("SELECT FROM partition_progress WHERE partition = 0 FOR UPDATE")
        for count in (2, 3, 4):  # one batch is in hand, one waits, one is filled
            send(0)
            send(1)
            wait_until(lambda: positions()[1] == 10 * count, "the other goes on")  # noqa: B023 - called at once
        consumer.wait_for("paused")
        send(1)
        wait_until(lambda: positions() == [10, 50], "the other still goes on")
    wait_until(lambda: positions() == [40, 50], "the lock is gone")
    consumer.wait_for("resumed")
    assert consumer.stop() == 0
    assert stopped(consumer)["inserted"] == 20


class Relay:
    """A TCP relay in front of a server, which can be told to refuse and cut everything."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open = True
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Drop every connection and refuse new ones."""
        with self._lock:
            self._open = False
            for pair in self._pairs:
                for end in pair:
                    hang_up(end)
            self._pairs.clear()

    def mend(self) -> None:
        """Relay again."""
        with self._lock:
            self._open = True

    def close(self) -> None:
        """End for good."""
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if not self._open:
                    client.close()
                    continue
                server = socket.create_connection(self._target)
                self._pairs.append((client, server))
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65_536):
                sink.sendall(data)
        except OSError:
            pass
        hang_up(sink)
        source.close()


def hang_up(end: socket.socket) -> None:
    """End a connection, whoever still reads from it."""
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:
        return


@pytest.fixture
def relay(settings: Settings) -> Iterator[Relay]:
    """A relay in front of the database."""
    relay = Relay(settings.postgre_host, settings.postgre_port)
    yield relay
    relay.close()


def test_a_lost_database_fills_no_dead_letters_and_costs_no_partition(
    settings: Settings, connection: psycopg.Connection, start: StartService, relay: Relay
) -> None:
    through_relay = settings.model_copy(
        update={"postgre_host": "127.0.0.1", "postgre_port": relay.port, "consumer_batch_rows": 100}
    )
    consumer = start("consume", settings=through_relay)
    publish(settings, [message(time=minutes(at), temperature=1.0) for at in range(100)])
    consumer.wait_for("batch_written")
    relay.cut()
    publish(settings, [message(time=minutes(at), temperature=2.0) for at in range(50, 1050)])
    consumer.wait_for("database_unavailable", 2)
    consumer.wait_for("paused")
    assert len(rows(connection)) == 100
    relay.mend()
    wait_until(lambda: len(rows(connection)) == 1050, "all readings stored")
    wait_until(lambda: lag(settings) == 0, "all offsets committed")
    assert consumer.stop() == 0
    assert len(consumer.events("partitions_revoked")) <= 1  # the one at its end
    assert len(consumer.events("partitions_assigned")) == 1
    assert all(batch["readings"] <= 100 for batch in consumer.events("batch_written")), "it read on while paused"
    assert stopped(consumer)["dead_letters"] == 0
    assert read_topic(settings, settings.dead_letter_topic) == []
    assert [row[2] for row in rows(connection)] == [1.0] * 50 + [2.0] * 1000


def test_offsets_follow_the_readings_and_never_lead(
    settings: Settings, connection: psycopg.Connection, start: StartService, relay: Relay
) -> None:
    """Ended while nothing can be stored: every message is read again, and the end is quick all the same."""
    through_relay = settings.model_copy(update={"postgre_host": "127.0.0.1", "postgre_port": relay.port})
    consumer = start("consume", settings=through_relay)
    publish(settings, [message(time=minutes(0), temperature=1.0)])
    consumer.wait_for("batch_written")
    wait_until(lambda: lag(settings) == 0, "the first offset")
    relay.cut()
    publish(settings, [message(time=minutes(at), temperature=1.0) for at in range(1, 500)] + [b"not json"])
    consumer.wait_for("database_unavailable")
    assert lag(settings) == 500
    consumer.signal(signal.SIGTERM)
    assert consumer.wait(10) == 0
    assert lag(settings) == 500
    again = start("consume", "--until-caught-up")
    assert again.wait() == 0
    assert stopped(again)["inserted"] == 499
    assert [letter.value() for letter in read_topic(settings, settings.dead_letter_topic)] == [b"not json"]


def test_no_batch_is_larger_than_the_setting_says(settings: Settings, start: StartService) -> None:
    publish(settings, [message(time=minutes(at), temperature=float(at)) for at in range(100)])
    consumer = start("consume", "--until-caught-up", settings=settings.model_copy(update={"consumer_batch_rows": 7}))
    assert consumer.wait() == 0
    sizes = [event["readings"] for event in consumer.events("batch_written")]
    assert (sum(sizes), max(sizes)) == (100, 7)


def test_first_batches_are_small_so_that_the_database_begins_to_work_at_once(
    settings: Settings, start: StartService
) -> None:
    publish(settings, (message(time=minutes(at), temperature=float(at)) for at in range(4 * FIRST_BATCH_ROWS)))
    settings = settings.model_copy(update={"consumer_batch_seconds": 30})
    consumer = start("consume", "--until-caught-up", settings=settings)
    assert consumer.wait() == 0
    sizes = [event["readings"] for event in consumer.events("batch_written")]
    assert sizes == [FIRST_BATCH_ROWS, 2 * FIRST_BATCH_ROWS, FIRST_BATCH_ROWS]
