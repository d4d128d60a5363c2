"""``make bench``: how fast the pipeline is, as ratios to what PostgreSQL itself can do in the same run.

Absolute figures drift from hour to hour, ratios hardly do. Floors and subjects take turns, at least three rounds;
the median counts. Prints a table with the goals (goals.py) and writes .local/bench/native.json or embedded.json;
``--markdown`` prints what docs/speed.md shows of both. It runs on a local stack, or on native servers where
TEST_POSTGRE_* and TEST_KAFKA_* name them (their database is emptied; BENCH_KAFKA is the version of that Kafka, which no
client is told). ``--only wide`` measures what eight more measurements cost.
``BENCH_HISTORY=100000000 ... --only history_cost`` measures with more history.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import psycopg
from confluent_kafka import KafkaException

from tests.benchmarks import consuming, flowing, summarising, wide
from tests.benchmarks.goals import GROUPS, Run, chosen, markdown, table
from tests.benchmarks.servers import Bench, Scale, describe, servers
from tests.fix_stack import ROOT

OUTPUT = ROOT / ".local" / "bench"

MEASUREMENTS: dict[str, Callable[[Bench], None]] = {
    "drain": consuming.measure_drain,
    "produce": flowing.measure_produce,
    "produce_blocks": flowing.measure_produce_blocks,
    "end_to_end": flowing.measure_end_to_end,
    "end_to_end_blocks": flowing.measure_end_to_end_blocks,
    "end_to_end_minute": flowing.measure_end_to_end_minute,
    "freshness": summarising.measure_freshness,
    "freshness_of_many": summarising.measure_freshness_of_many,
    "history_cost": summarising.measure_history_cost,
    "backfill": summarising.measure_backfill,
    "second": summarising.measure_second,
    "minute": summarising.measure_minute,
    "hour": summarising.measure_hour,
    "wide": wide.measure_wide,
}
ON_REQUEST = {"wide"}
NATIVE = {"end_to_end_minute", "freshness_of_many", "hour"}  # too much for the embedded server


def say(line: str) -> None:
    """Tell the person at the terminal."""
    print(line, flush=True)  # noqa: T201


def measure(only: frozenset[str]) -> tuple[Run, list[str]]:
    """Run all measurements, or those of the figures that are wanted; and what failed, after which the others go on."""
    failures = []
    logging.disable(logging.INFO)  # of what runs in this process: the table is what counts
    started = time.monotonic()
    scale = Scale.of_servers()
    with tempfile.TemporaryDirectory() as name, servers(Path(name)) as settings:
        bench = Bench(settings.model_copy(update={"log_format": "json"}), Path(name), scale, only)
        for group, measurement in MEASUREMENTS.items():
            is_wanted = bench.wants(*(key.name for key in GROUPS[group])) and (only or group not in ON_REQUEST)
            if is_wanted and (scale.kind == "native" or group not in NATIVE):
                say(f"{time.monotonic() - started:4.0f} s  measuring {group}")
                try:
                    measurement(bench)
                except (AssertionError, KafkaException, psycopg.Error) as error:
                    failures.append(f"{group}: {error}")
        where = f"{describe(settings, scale)}; {(time.monotonic() - started) / 60:.0f} minutes"
    return Run(scale.kind, where, bench.results), failures


def saved() -> list[Run]:
    """The newest complete runs, native before embedded."""
    paths = [OUTPUT / f"{kind}.json" for kind in ("native", "embedded")]
    return [Run(**json.loads(path.read_text(encoding="utf-8"))) for path in paths if path.exists()]


def main() -> int:
    """A goal that is missed is reported; it is not a failure. A measurement that fails is one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--only", metavar="KEY[,KEY]", help="only these figures or groups of them; nothing is saved")
    parser.add_argument("--markdown", action="store_true", help="print the saved runs as docs/speed.md shows them")
    options = parser.parse_args()
    if options.markdown:
        say(markdown(saved()))
        return 0
    try:
        only = chosen(filter(None, (options.only or "").split(",")))
    except ValueError as error:
        parser.error(str(error))
    run, failures = measure(only)
    say(f"\n{table(run)}")
    for failure in failures:
        say(f"FAILED {failure}")
    if not only and not failures:
        OUTPUT.mkdir(parents=True, exist_ok=True)
        path = OUTPUT / f"{run.kind}.json"
        path.write_text(json.dumps(asdict(run), indent=2) + "\n", encoding="utf-8")
        say(f"written to {path.relative_to(ROOT)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
