"""How soon and how cheaply readings are summarised."""

from __future__ import annotations

import random
import statistics
import threading
import time
from datetime import UTC, datetime, timedelta

from confluent_kafka import Producer

from services.core.config import Settings
from services.core.database import connect
from services.core.kafka import client_settings
from services.etl.worker import Leader
from tests.benchmarks.history import SENSORS, START, History
from tests.benchmarks.servers import PATIENCE_S, Bench, disk_mb, is_queued, source_of
from tests.fix_services import wait_until
from tests.measured import encode, reading_of

RATE = 20_000
END_S = 20  # of the stream at the end of an interval


# Freshness -----------------------------------------------------------------------------------------------


def measure_freshness(bench: Bench) -> None:
    """At a steady rate, at the beginning of an interval and at the end of one that is half full of it already."""
    begin, growth = steady(bench, next_interval(), bench.scale.fresh_s)
    bench.note(freshness_growth=growth)
    start, full = next_interval(), timedelta(minutes=9)
    count = min(6 * bench.scale.rows, RATE * int(full.total_seconds()) // 2)
    with connect(bench.settings) as connection:
        History(count, full.total_seconds() / (count // SENSORS), start).load(connection)
    end, _ = steady(bench, start + full, END_S)
    ages = begin + end
    bench.note(
        freshness_p50_s=statistics.median(ages),
        freshness_p99_s=percentile_99(ages),
        freshness_end_over_begin=statistics.median(end) / statistics.median(begin[: len(end)]),
    )


def measure_freshness_of_many(bench: Bench) -> None:
    """The same rate from 10,000 sensors."""
    ages, growth = steady(bench, next_interval(), bench.scale.fresh_s, sensors=10_000)
    bench.note(freshness_of_many_p99_s=percentile_99(ages), freshness_of_many_growth=growth)


def next_interval() -> datetime:
    """When the next interval begins, of the widest that there are."""
    width = 20 * 60
    return datetime.fromtimestamp(0, UTC) + timedelta(seconds=(datetime.now(UTC).timestamp() // width + 1) * width)


def percentile_99(ages: list[float]) -> float:
    return statistics.quantiles(ages, n=100)[98]


def steady(bench: Bench, clock: datetime, seconds: int, sensors: int = SENSORS) -> tuple[list[float], float]:
    """How old each probe was when its summary included it, and how much older they are in the end than at first.

    A probe is published each tenth of a second; its age counts from its publishing to the summary row with it.
    """
    topic = bench.new_topic()
    seen: list[tuple[float, float]] = []  # (when looked, newest publishing time that is included)
    published: list[float] = []  # when each probe was
    with bench.running(topic, "consume", "etl"), connect(bench.settings) as connection:
        wait_until(lambda: not is_queued(connection), "what was there before", PATIENCE_S)
        ended, pause = threading.Event(), threading.Event()
        thread = threading.Thread(
            target=publish_steadily, args=(topic, sensors, seconds, clock, published, ended), daemon=True
        )
        thread.start()
        while not ended.is_set() or not seen or seen[-1][1] < published[-1]:
            row = connection.execute(
                "SELECT coalesce(sum(reading_count), 0) FROM temperature_summary WHERE sensor_id = 'probe'"
            ).fetchone()
            if row is not None and row[0]:
                seen.append((time.monotonic(), published[int(row[0]) - 1]))
            pause.wait(0.05)
        thread.join()
    ages, at = [], 0
    for moment in published:  # the first look that included it
        while seen[at][1] < moment:
            at += 1
        ages.append(seen[at][0] - moment)
    bench.truncate()
    third = len(ages) // 3
    return ages, statistics.median(ages[-third:]) / statistics.median(ages[:third])


def publish_steadily(
    settings: Settings, sensors: int, seconds: int, clock: datetime, published: list[float], ended: threading.Event
) -> None:
    """RATE readings per second, their times from ``clock`` on, and a probe each tenth."""
    producer = Producer(client_settings(settings, "bench") | {"linger.ms": 5, "compression.type": "lz4"})
    pause = threading.Event()
    names = [f"s{number:04d}" for number in range(sensors)]
    began = time.monotonic()
    sent = 0
    for tick in range(seconds * 10):
        moment = clock + timedelta(seconds=tick / 10)
        for number in range(RATE // 10):
            name = names[sent % sensors]
            value = encode(reading_of(name, moment + timedelta(microseconds=number * 10), 20.0, 50.0))
            producer.produce(settings.kafka_topic, key=name, value=value)
            sent += 1
        producer.produce(settings.kafka_topic, key="probe", value=encode(reading_of("probe", moment, 20.0, 50.0)))
        published.append(time.monotonic())
        producer.poll(0)
        pause.wait(max(0.0, began + (tick + 1) / 10 - time.monotonic()))
    producer.flush()
    ended.set()


# History -------------------------------------------------------------------------------------------------


def measure_history_cost(bench: Bench) -> None:
    """One refresh and mirror of a small change, with some history and with ten times as much (or BENCH_HISTORY)."""
    small, large = (small_change_s(bench, history) for history in (bench.scale.rows, bench.scale.history))
    bench.note(refresh_small_change_s=small, history_cost_ratio=large / small)


def small_change_s(bench: Bench, history: int, changes: int = 15) -> float:
    """The median of how long it takes to summarise the change of one reading."""
    bench.truncate()
    samples = []
    with connect(bench.settings) as connection:
        History(history).load(connection)
        leader = Leader(connection, bench.settings)
        leader.take_over()
        leader.run_once()
        assert leader.take_over() is not None
        for number in range(changes):
            moment = START + timedelta(minutes=number)
            connection.execute(
                "UPDATE sensor_data SET temperature = temperature + 1 WHERE sensor_id = 's0000' AND time = %s",
                (moment,),
            )
            connection.execute(
                "INSERT INTO summary_refresh_queue (touched) VALUES (tstzmultirange(tstzrange(%s, %s)))",
                (moment, moment + timedelta(minutes=1)),
            )
            started = time.monotonic()
            leader.summaries.refresh_queued()
            samples.append(time.monotonic() - started)
    return statistics.median(samples)


def measure_backfill(bench: Bench, files: int = 60) -> None:
    """A year of history in random file order: how often each interval is refreshed."""
    bench.truncate()
    source = bench.directory / "year"
    source.mkdir()
    order = list(range(files))
    random.Random(1).shuffle(order)  # noqa: S311 - an order, no secret
    step, steps = timedelta(hours=3), 365 * 8 // files
    for place, part in enumerate(order):
        history = History(steps * SENSORS, step.total_seconds(), START + part * steps * step)
        history.write_parquet(source / f"{place:03d}.parquet")
    topic = bench.new_topic(**source_of(source), temperature_interval=180, humidity_interval=360)
    with bench.running(topic, "consume", "etl") as (_consumer, etl):
        bench.start(topic, "produce").wait(PATIENCE_S)
        bench.wait_until_complete(files * steps * SENSORS, "the year")
        refreshed = sum(int(event["intervals"]) for event in etl.events("summaries_refreshed"))
    bench.note(backfill_refreshes_per_interval=refreshed / (files * steps * 3 // 2))


# Density -------------------------------------------------------------------------------------------------


def measure_second(bench: Bench) -> None:
    """Sensors that report every second."""
    measure_density(bench, "second", History(bench.scale.rows, 1))


def measure_minute(bench: Bench) -> None:
    """Sensors that report every minute."""
    measure_density(bench, "minute", History(bench.scale.rows, 60))


def measure_hour(bench: Bench) -> None:
    """Sensors that report every hour; fewer readings, since two months of them take longest."""
    measure_density(bench, "hour", History(bench.scale.rows * 3 // 10, 3600))


def measure_density(bench: Bench, name: str, history: History) -> None:
    """What ``etl --once`` takes over history, less the same with nothing to do, and what is stored then."""
    seconds = []
    for _ in range(bench.scale.rounds):
        bench.truncate()
        once_s(bench)  # as on any server that has been running: the aggregates are there, and empty
        with connect(bench.settings) as connection:
            history.load(connection)
            seconds.append(once_s(bench) - once_s(bench))
            disk = disk_mb(connection)
    millions = history.count / 1e6
    bench.note(
        **{f"{name}_summarising_s": statistics.median(seconds) / millions},
        **{f"{name}_{part}_mb": size / millions for part, size in disk.items()},
        **{f"{name}_disk_ratio": (disk["aggregates"] + disk["summaries"]) / disk["raw"]},
    )


def once_s(bench: Bench) -> float:
    """How long ``etl --once`` takes."""
    started = time.monotonic()
    assert bench.start(bench.settings, "etl", "--once").wait(PATIENCE_S) == 0
    return time.monotonic() - started
