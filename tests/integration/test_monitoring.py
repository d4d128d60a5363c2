"""/metrics, /livez and /readyz say what is so: compared with the tables and the topics, on servers that go away."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from confluent_kafka import Producer
from prometheus_client.parser import text_string_to_metric_families

from services.consumer.lag import Expiry
from services.consumer.metrics import EXPIRING
from services.consumer.sink import Sink
from services.core.config import Settings
from services.core.kafka import REASON_HEADER, client_settings, connect_admin, create_topics
from services.core.letters import read_headers
from services.core.offsets import group_lag
from services.core.shutdown import Shutdown
from services.local.stack import Stack
from tests.expected import Expected, samples
from tests.fix_proxy import Proxy
from tests.fix_services import NOWHERE, StartService, message, minutes, publish, read_topic, wait_until
from tests.fix_stack import free_port
from tests.measured import of_default, reading_of, write_to

RUNNER = "tests.crash_runner"
UP_S = 60.0


class Pages:
    """The pages of one service."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings.model_copy(update={"metrics_port": free_port()})

    def get(self, path: str) -> tuple[int, str]:
        """Status and body; status 0 while nobody listens."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.settings.metrics_port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except urllib.error.URLError:
            return 0, ""

    def values(self, metric: str) -> dict[str, float]:
        """The samples of a metric by the value of its label, "" where it has none."""
        return {
            next(iter(sample.labels.values()), ""): sample.value
            for family in text_string_to_metric_families(self.get("/metrics")[1])
            for sample in family.samples
            if sample.name == metric
        }

    def value(self, metric: str, label: str = "") -> float | None:
        return self.values(metric).get(label)

    def wait_for(self, path: str, status: int, timeout_s: float = 30.0) -> str:
        """Wait for this status; the body."""
        wait_until(lambda: self.get(path)[0] == status, f"{path} is {status}", timeout_s)
        return self.get(path)[1]


def count(connection: psycopg.Connection, table: str) -> int:
    row = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
    assert row is not None
    return int(row[0])


def test_counts_agree_with_the_tables(settings: Settings, connection: psycopg.Connection, start: StartService) -> None:
    consumer, etl, standby = Pages(settings), Pages(settings), Pages(settings)
    start("consume", settings=consumer.settings)
    leading = start("etl", settings=etl.settings)
    leading.wait_for("leading")
    start("etl", settings=standby.settings).wait_for("standing_by")
    expected = Expected(settings)
    expected.send(samples(40))
    expected.wait_until_stored()
    expected.send([(5, 5.0, 95.0), (6, 6.0, None)])  # unchanged
    expected.send([(7, 70.0, None), (8, None, 80.0), (9, 90.0, 90.0)])  # corrected
    expected.send([(0.5, 1.0, None), (20.5, 1.0, None)])  # new, but of an interval that is over
    expected.wait_until_stored()
    publish(settings, [b"{", b"", message(), message(time="yesterday", temperature=1.0)], "p1", 1)
    expected.wait_until_stored(dead_letters=4)
    expected.wait_until_summarised()

    assert consumer.values("sensor_readings_stored_total") == {
        "inserted": count(connection, "sensor_data"),
        "updated": 3,
        "unchanged": 2,
    }
    letters = Counter(
        read_headers(letter)[REASON_HEADER] for letter in read_topic(settings, settings.dead_letter_topic)
    )
    assert {reason: n for reason, n in consumer.values("sensor_dead_letters_total").items() if n} == letters
    assert consumer.value("sensor_messages_read_total") == 40 + 7 + 4
    assert consumer.value("sensor_messages_abandoned_total") == 0
    assert consumer.value("sensor_readings_late_total") == 7
    assert consumer.value("sensor_batch_readings_sum") == 47
    written = consumer.values("sensor_batch_write_seconds_count")
    assert written["copy"] > 0
    assert written["merge"] > 0
    wait_until(lambda: set(consumer.values("sensor_consumer_lag_messages").values()) == {0.0}, "no lag")

    done = leading.events("summaries_refreshed")
    assert etl.value("sensor_refresh_queue_rows_done_total") == sum(line["queue_rows"] for line in done)
    refreshed = etl.values("sensor_intervals_refreshed_total")
    assert sum(refreshed.values()) == sum(line["intervals"] for line in done)
    assert of_default(refreshed) == {"temperature_10min", "humidity_20min"}
    changed = etl.values("sensor_summary_rows_changed_total")
    assert changed["temperature"] >= count(connection, "temperature_summary")
    assert changed["humidity"] >= count(connection, "humidity_summary")
    assert set(etl.values("sensor_refresh_seconds_count")) == set(refreshed)
    wait_until(lambda: etl.value("sensor_freshness_seconds") == 0, "all is fresh")
    assert etl.value("sensor_refresh_queue_rows") == etl.value("sensor_refresh_queue_age_seconds") == 0
    assert (etl.value("sensor_etl_leading"), standby.value("sensor_etl_leading")) == (1, 0)
    for pages in (consumer, etl, standby):
        assert pages.get("/livez") == (200, "alive\n")
        assert pages.get("/readyz") == (200, "ready\n")
        assert pages.value("sensor_ready") == 1
        assert set(pages.values("sensor_outages_total").values()) == {0}
        assert pages.get("/secrets")[0] == 404


def test_a_database_that_is_away_ends_readiness_and_not_liveness(
    settings: Settings, proxied: Settings, proxy: Proxy, start: StartService, connection: psycopg.Connection
) -> None:
    consumer, etl = Pages(proxied.model_copy(update={"consumer_batch_rows": 10})), Pages(proxied)
    plan = json.dumps({"hand_over_timeout_s": 0.2})
    service = start(plan, "consume", settings=consumer.settings, module=RUNNER)
    start("etl", settings=etl.settings)
    expected = Expected(settings)
    expected.send(samples(10))
    expected.wait_until_stored()
    expected.wait_until_summarised()
    for pages in (consumer, etl):
        pages.wait_for("/readyz", 200)
    wait_until(lambda: etl.value("sensor_freshness_seconds") == 0, "all is fresh")

    proxy.refuse()
    for pages in (consumer, etl):
        assert pages.wait_for("/readyz", 503) == "database is not connected\n"
        assert pages.get("/livez")[0] == 200
        assert pages.value("sensor_server_connected", "database") == 0
        assert pages.value("sensor_outages_total", "database") == 1
    assert consumer.value("sensor_server_connected", "kafka") == 1
    expected.send(samples(50, start=20))
    service.wait_for("paused")
    expected.send(samples(25, start=80))  # nobody fetches these
    wait_until(lambda: consumer.value("sensor_consumer_lag_messages", "0") == 75, "the lag is seen")
    wait_until(lambda: consumer.value("sensor_consumer_expiring_messages") == 0, "it is known to be young")
    assert group_lag(settings) == 75
    # Whether something waits for etl cannot be seen now, and soon that is told as if something did.
    wait_until(lambda: (etl.value("sensor_freshness_seconds") or 0) > 5, "freshness grows")
    assert etl.value("sensor_refresh_queue_rows") is None
    assert (consumer.value("sensor_retries_total", "database") or 0) > 0

    # One that reaches the database joins: what the first holds is left to the next owners, whoever that is.
    other = Pages(settings)
    start("consume", settings=other.settings).wait_for("partitions_assigned")
    proxy.listen()
    for pages in (consumer, etl):
        pages.wait_for("/readyz", 200)
    expected.wait_until_stored()
    expected.wait_until_summarised()
    wait_until(lambda: etl.value("sensor_freshness_seconds") == 0, "all is fresh")
    both = (consumer, other)
    wait_until(lambda: [p.value("sensor_consumer_lag_messages", "0") for p in both].count(0.0) == 1, "no lag")
    stored = [pages.values("sensor_readings_stored_total") for pages in both]
    assert sum(results["inserted"] for results in stored) == count(connection, "sensor_data")
    left = [pages.value("sensor_messages_abandoned_total") or 0 for pages in both]
    assert left[0] > 0
    read = [pages.value("sensor_messages_read_total") or 0 for pages in both]
    assert sum(read) - sum(left) == sum(sum(results.values()) for results in stored)
    for pages in (consumer, etl):
        assert pages.value("sensor_outages_total", "database") == 1


def test_an_etl_that_hangs_is_not_alive_and_what_waits_for_it_ages(
    settings: Settings, start: StartService, tmp_path: Path
) -> None:
    etl = Pages(settings)
    go_on = tmp_path / "go-on"
    plan = {"step": "round", "call": 3, "until": str(go_on), "hung_after_s": 2.0}
    start(json.dumps(plan), "etl", settings=etl.settings, module=RUNNER)
    wait_until(Path(f"{go_on}.awaited").exists, "etl hangs")
    sink = Sink(settings)
    write_to(sink, [reading_of("s1", minutes(1), 20.0, 50.0)], NOWHERE)
    sink.close()
    stored = datetime.now(UTC)
    wait_until(lambda: (etl.value("sensor_freshness_seconds") or 0) > 2.5, "freshness grows")
    elapsed = (datetime.now(UTC) - stored).total_seconds()
    assert etl.value("sensor_freshness_seconds") == pytest.approx(elapsed, abs=1.0)
    assert etl.value("sensor_refresh_queue_rows") == 1
    assert etl.wait_for("/livez", 503).startswith("the main loop has been busy for ")
    assert etl.get("/readyz")[0] == 503
    assert (etl.value("sensor_main_loop_silent_seconds") or 0) > 2
    assert etl.value("sensor_ready") == 0
    go_on.touch()
    wait_until(lambda: etl.value("sensor_freshness_seconds") == 0, "all is fresh")
    assert etl.get("/livez")[0] == etl.get("/readyz")[0] == 200


def test_a_consumer_that_hangs_is_not_alive(settings: Settings, start: StartService, tmp_path: Path) -> None:
    consumer = Pages(settings)
    go_on = tmp_path / "go-on"
    plan = {"step": "offsets", "until": str(go_on), "hung_after_s": 1.0}
    start(json.dumps(plan), "consume", settings=consumer.settings, module=RUNNER)
    consumer.wait_for("/readyz", 200)
    publish(settings, [message(temperature=1.0)])
    assert consumer.wait_for("/livez", 503).startswith("the main loop has been busy for ")
    go_on.touch()
    consumer.wait_for("/livez", 200)


def test_the_lag_of_a_partition_is_told_by_its_owner(settings: Settings, start: StartService) -> None:
    first, second = Pages(settings), Pages(settings)
    start("consume", settings=first.settings)
    for partition in range(3):
        publish(settings, [message(temperature=1.0)], partition=partition)

    def owned() -> tuple[set[str], set[str]]:
        return set(first.values("sensor_consumer_lag_messages")), set(second.values("sensor_consumer_lag_messages"))

    wait_until(lambda: owned()[0] == {"0", "1", "2"}, "the first consumer has all partitions")
    joined = start("consume", settings=second.settings)
    wait_until(lambda: owned() in [({"0", "1"}, {"2"}), ({"2"}, {"0", "1"})], "each has its own")
    joined.stop()
    wait_until(lambda: owned() == ({"0", "1", "2"}, set()), "the first consumer has them again")


def test_messages_are_expiring_after_a_quarter_of_the_retention(settings: Settings) -> None:
    """Asked of the broker; the offsets are those of a consumer that stores nothing."""
    admin = connect_admin(settings, Shutdown())
    create_topics(admin, settings, shutdown=Shutdown())
    week_ms = 7 * 24 * 3600 * 1000
    now_ms = int(time.time() * 1000)
    producer = Producer(client_settings(settings, "test"))
    for partition, ages in {0: (0.3, 0.26, 0.2, 0.0), 1: (0.2, 0.0), 2: (0.5, 0.4)}.items():
        for age in ages:
            sent_at = now_ms - int(age * week_ms)
            producer.produce(settings.kafka_topic, message(), partition=partition, timestamp=sent_at)
    assert producer.flush(30) == 0

    def expiring(waiting: dict[int, tuple[int, int]]) -> float:
        expiry = Expiry()
        expiry.waiting = waiting
        expiry.sample(settings.kafka_topic, admin)
        return float(next(iter(EXPIRING.collect())).samples[0].value)

    assert expiring({0: (0, 4), 1: (0, 2), 2: (0, 2)}) == 2 + 0 + 2
    assert expiring({0: (1, 4), 2: (1, 2)}) == 1 + 1
    assert expiring({1: (0, 2)}) == 0
    assert expiring({}) == 0


SOURCE = pa.table(
    {
        "time_hour": pa.array([minutes(at) for at in range(10)] + [None, minutes(11), minutes(12)]),
        "temp": pa.array([1.0] * 11 + [None, 1.0]),
        "humid": pa.array([1.0] * 11 + [None, 1.0]),
        "origin": pa.array(["s1"] * 12 + [None]),
    }
)


@pytest.mark.slow
def test_metrics_count_what_was_sent_and_readiness_ends_with_the_broker(
    own_stack: Stack, settings: Settings, start: StartService, tmp_path: Path
) -> None:
    pq.write_table(SOURCE, tmp_path / "readings.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    feed = {"parquet_url": str(tmp_path), "producer_watch_seconds": 0.1}
    producer, consumer, etl = Pages(settings.model_copy(update=feed)), Pages(settings), Pages(settings)
    start("produce", settings=producer.settings).wait_for("all_sent")
    start("consume", settings=consumer.settings)
    start("etl", settings=etl.settings)
    assert producer.value("sensor_producer_watching") == 1
    assert producer.value("sensor_rows_read_total") == SOURCE.num_rows
    assert producer.value("sensor_readings_sent_total") == len(read_topic(settings, settings.kafka_topic)) == 10
    skipped = {reason: n for reason, n in producer.values("sensor_rows_skipped_total").items() if n}
    assert skipped == {"no_time": 1, "no_measurement": 1, "no_sensor": 1}
    assert producer.value("sensor_transaction_readings_sum") == 10
    assert producer.value("sensor_files_sent_total") == producer.value("sensor_files_unreadable_total") == 1
    for pages in (producer, consumer, etl):
        pages.wait_for("/readyz", 200)

    own_stack.kafka.kill()
    try:
        for pages in (producer, consumer):
            assert pages.wait_for("/readyz", 503) == "kafka is not connected\n"
            assert pages.get("/livez")[0] == 200
            assert pages.value("sensor_outages_total", "kafka") == 1
        assert etl.get("/readyz")[0] == 200
    finally:
        own_stack.kafka.start()
        own_stack.kafka.wait_ready()
    for pages in (producer, consumer):
        pages.wait_for("/readyz", 200, timeout_s=UP_S)
