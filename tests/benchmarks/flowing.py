"""From a Parquet file to the topic, and on to the table and both summaries."""

from __future__ import annotations

import statistics
import time

from services.core.shutdown import Shutdown
from services.producer.generate import Plan, generate
from tests.benchmarks.history import SENSORS, START, History
from tests.benchmarks.servers import Bench, peak_rss, rss_mb, source_of

FLOOR_ROWS = 1_000_000


def measure_produce(bench: Bench) -> None:
    """JSON."""
    produce(bench, "json", "produce")
    if {"produce_rows_s", "drain_rows_s"} <= bench.results.keys():
        bench.note(produce_over_drain=bench.results["produce_rows_s"] / bench.results["drain_rows_s"])


def measure_produce_blocks(bench: Bench) -> None:
    """Arrow."""
    produce(bench, "arrow", "produce_blocks")


def produce(bench: Bench, form: str, name: str) -> None:
    """A Parquet file of ten times as many rows to the topic, transactions on."""
    path, count = bench.directory / "generated.parquet", 10 * bench.scale.rows
    topic = bench.new_topic(**source_of(path), producer_format=form)
    plan = Plan(sensors=SENSORS, days=count / SENSORS / 1440, interval_s=60, seed=1, start=START)
    generate(topic, plan, path, Shutdown())
    started = time.monotonic()
    rss = peak_rss([bench.start(topic, "produce")])
    bench.note(**{f"{name}_rss_mb": rss, f"{name}_rows_s": count / (time.monotonic() - started)})
    path.unlink()


def measure_end_to_end(bench: Bench) -> None:
    """A reading every second of each sensor, JSON."""
    end_to_end(bench, History(bench.scale.large), "end_to_end")


def measure_end_to_end_blocks(bench: Bench) -> None:
    """The same in blocks."""
    end_to_end(bench, History(bench.scale.large), "end_to_end_blocks", "arrow")


def measure_end_to_end_minute(bench: Bench) -> None:
    """A reading every minute of each sensor, JSON."""
    end_to_end(bench, History(bench.scale.rows, every_s=60), "end_to_end_minute")


def end_to_end(bench: Bench, history: History, name: str, form: str = "json") -> None:
    """From the start of the producer to the last reading in the table and the last interval in both summaries."""
    path = bench.parquet(history)
    floor_rows = History(min(FLOOR_ROWS, history.count), history.every_s).rows()
    rounds = bench.scale.rounds if history.count <= FLOOR_ROWS else 1
    ratios, rss = [], 0.0
    for _ in range(rounds):
        floors = [bench.copy_floor(floor_rows)]
        bench.truncate()
        topic = bench.new_topic(**source_of(path), producer_format=form)
        with bench.running(topic, "consume", "etl") as (consumer, _etl):
            started = time.monotonic()
            producer = bench.start(topic, "produce")
            bench.wait_until_complete(history.count, "the last reading and the last interval")
            rows_s = history.count / (time.monotonic() - started)
            rss = max(rss, rss_mb(consumer))
            producer.wait()
        floors.append(bench.copy_floor(floor_rows))
        ratios.append(rows_s / statistics.mean(floors))
    bench.note(**{f"{name}_ratio": statistics.median(ratios), f"{name}_rss_mb": rss})
