"""The producer as a feed: at a rate, by the readings' times, over files that arrive; and generated files."""

from __future__ import annotations

import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from services.core.config import Settings
from services.core.errors import STOPPED
from services.producer.generate import GROUP_ROWS
from tests.fix_services import Service, StartService, read_topic, run_cli, wait_until
from tests.fix_stack import ROOT
from tests.integration.test_producer import BEGIN, assert_once, changed, numbers, source, write

RATE = 400
POLL_S = 0.2


def sending_times(settings: Settings) -> list[tuple[float, int]]:
    """When each message was sent, in seconds, and its number; in the order of sending."""
    messages = read_topic(settings, settings.kafka_topic)
    values = [pa.py_buffer(message.value() or b"").to_pybytes() for message in messages]
    found = [int(match[1]) for value in values if (match := re.search(rb'"temperature":(\d+)', value))]
    return sorted(zip([message.timestamp()[1] / 1000 for message in messages], found, strict=True))


# --- pace --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_rate_is_held_without_bursts(settings: Settings, start: StartService, tmp_path: Path) -> None:
    rows = 3 * RATE
    settings = source(settings, write(tmp_path / "a.parquet", rows), producer_rate=RATE)
    producer = start("produce", settings=settings)
    assert producer.wait() == 0
    assert_once(settings, rows)
    moments = [moment for moment, _ in sending_times(settings)]
    assert (rows - 1) / (moments[-1] - moments[0]) == pytest.approx(RATE, rel=0.05)
    tenths = Counter(int((moment - moments[0]) * 10) for moment in moments)
    # A busy machine may hold the producer up now and then; whole batches would leave most tenths empty.
    even = [tenth for tenth in range(30) if RATE / 20 <= tenths[tenth] <= RATE / 5]
    assert len(even) >= 20, tenths
    assert len(producer.events("transaction_committed")) >= 4  # seen soon, not at the end


def test_a_slow_feed_is_seen_at_once_and_ends_at_once(settings: Settings, start: StartService, tmp_path: Path) -> None:
    """A transaction may last 5 seconds here, which is shorter than the pause between two readings."""
    settings = source(
        settings,
        write(tmp_path / "a.parquet", 3),
        producer_rate=0.1,
        producer_transaction_timeout_seconds=5,
    )
    first = start("produce", settings=settings)
    first.wait_for("transaction_committed")
    began = sending_times(settings)[0][0]
    assert numbers(settings) == Counter([0])
    assert time.time() - began < 5  # the next reading, which would have ended the transaction, is due after 10
    first.signal(signal.SIGTERM)
    assert first.wait(timeout_s=5) == STOPPED
    assert first.events("stopped_early")[0]["rows_left"] == 2
    assert first.events("transaction_aborted") == []
    assert start("produce", settings=changed(settings, producer_rate=0)).wait() == 0
    assert_once(settings, 3)


@pytest.mark.slow
def test_replay_keeps_the_gaps_divided_by_the_speed(settings: Settings, start: StartService, tmp_path: Path) -> None:
    """Number 3 is older than the one before it, number 4 is newer but older than the newest."""
    seconds = [0, 60, 60, 10, 30, 120, 180]
    due_s = [0, 1, 1, 1, 1, 2, 3]
    table = pa.table(
        {
            "time_hour": [BEGIN + timedelta(seconds=second) for second in seconds],
            "origin": ["a"] * len(seconds),
            "temp": list(range(len(seconds))),
            "humid": pa.nulls(len(seconds)),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    settings = source(settings, tmp_path / "a.parquet")
    assert start("produce", "--speed", "60x", settings=settings).wait() == 0
    sent = sending_times(settings)
    assert [number for _, number in sorted(sent, key=lambda item: item[1])] == list(range(len(seconds)))
    for moment, number in sent:
        assert due_s[number] - 0.1 < moment - sent[0][0] < due_s[number] + 0.7, sent


# --- watching ----------------------------------------------------------------------------------------------


@pytest.fixture
def arriving(settings: Settings, tmp_path: Path) -> tuple[Settings, Path]:
    """Settings that watch a directory which is empty still."""
    data = tmp_path / "data"
    data.mkdir()
    settings = source(settings, data, producer_watch_seconds=POLL_S, producer_transaction_rows=10_000)
    return settings, data


def files_sent(service: Service, count: int) -> None:
    service.wait_for("all_sent", count=count)


def test_files_are_sent_as_they_become_whole(
    arriving: tuple[Settings, Path], start: StartService, tmp_path: Path
) -> None:
    settings, data = arriving
    watcher = start("produce", settings=settings)
    watcher.wait_for("watching")
    whole = write(tmp_path / "whole", 1000).read_bytes()
    with (data / "a.parquet").open("wb") as growing:
        growing.write(whole[:-1000])
        growing.flush()
        assert "is a truncated or damaged Parquet file" in watcher.wait_for("unreadable")["error"]
        write(data / "b.parquet", 500, first=1000)  # what cannot be read holds up nothing else
        files_sent(watcher, 1)
        assert sorted(numbers(settings)) == list(range(1000, 1500))
        assert len(watcher.events("unreadable")) == 1  # in several looks
        growing.write(whole[-1000:])
    files_sent(watcher, 2)
    assert_once(settings, 1500)

    write(tmp_path / "longer", 2000, first=1500).replace(data / "a.parquet")  # another content: all of it is new
    files_sent(watcher, 3)
    shutil.rmtree(data)
    data.mkdir()
    write(data / "c.parquet", 500, first=3500)
    files_sent(watcher, 4)
    assert_once(settings, 4000)
    watcher.signal(signal.SIGTERM)
    assert watcher.wait(timeout_s=10) == 0


@pytest.mark.slow
def test_a_file_that_goes_while_it_is_sent_does_not_end_the_watching(
    arriving: tuple[Settings, Path], start: StartService, tmp_path: Path
) -> None:
    """The first file takes a second, and the second has gone when its turn comes."""
    settings, data = arriving
    settings = changed(settings, producer_rate=1000)
    write(data / "a.parquet", 1000)
    write(data / "b.parquet", 1000, first=5000)
    watcher = start("produce", settings=settings)
    wait_until(lambda: bool(watcher.events("transaction_committed")), "some of the first file is sent")
    (data / "b.parquet").unlink()
    write(tmp_path / "c", 1000, first=1000).replace(data / "c.parquet")
    watcher.wait_for("unreadable")
    wait_until(lambda: numbers(settings).total() == 2000, "the third file is sent")
    assert_once(settings, 2000)
    assert watcher.stop() == 0


@pytest.mark.slow
def test_killed_while_watching_each_row_is_there_once(arriving: tuple[Settings, Path], start: StartService) -> None:
    """With a transaction every few milliseconds, so that a kill meets each of its steps."""
    settings, data = arriving
    settings = changed(settings, producer_rate=20_000, producer_transaction_rows=200)
    rows, kills = 10_000, 3
    moments = random.Random(20240101)  # noqa: S311 - a seed, so that a failure can be had again
    for kill in range(kills):
        watcher = start("produce", settings=settings)
        watcher.wait_for("watching")
        write(data / f"{kill}.parquet", rows, first=kill * rows)
        watcher.wait_for("transaction_committed")
        with suppress(subprocess.TimeoutExpired):
            watcher.process.wait(moments.uniform(0, 0.2))
        watcher.kill()
    watcher = start("produce", settings=settings)
    wait_until(lambda: bool(watcher.events("all_sent") or watcher.events("nothing_to_send")), "all is sent")
    watcher.signal(signal.SIGTERM)
    assert watcher.wait(timeout_s=10) == 0
    assert_once(settings, kills * rows)


# --- generated files ---------------------------------------------------------------------------------------


def test_a_generated_file_is_sent_as_it_is(settings: Settings, start: StartService, tmp_path: Path) -> None:
    out = tmp_path / "generated.parquet"
    shares = ["--gaps=0.05", "--late=0.1", "--duplicates=0.02"]
    made = run_cli(settings, "generate", str(out), "--sensors=7", "--days=2", "--interval=600", *shares)
    assert (made.returncode, made.stderr) == (0, "")
    said = re.fullmatch(
        rf"{re.escape(str(out))}: ([\d,]+) rows, of which ([\d,]+) are duplicates and [\d,]+ late; "
        r"[\d,]+ were left out\. In sensor_data they are ([\d,]+) rows\.\n",
        made.stdout,
    )
    assert said is not None, made.stdout
    rows, duplicates, distinct = (int(number.replace(",", "")) for number in said.groups())
    producer = start("produce", settings=source(settings, out))
    assert producer.wait() == 0
    assert producer.events("all_sent")[0]["sent"] == rows
    messages = Counter((message.key(), message.value()) for message in read_topic(settings, settings.kafka_topic))
    assert (messages.total(), len(messages)) == (rows, distinct)
    assert duplicates == rows - distinct > 0


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    def peak_mb(days: int) -> float:
        """Of a process that generates so many days of 200 sensors: 28,800 rows a day."""
        program = (
            "import resource, sys; from services.cli import main; code = main(sys.argv[1:]);"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, file=sys.stderr); sys.exit(code)"
        )
        out = tmp_path / f"{days}.parquet"
        options = ["--days", str(days), "--interval", "600", "--late", "0.1", "--duplicates", "0.01"]
        done = subprocess.run(
            [sys.executable, "-c", program, "generate", str(out), *options],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert pq.ParquetFile(out).metadata.row_group(0).num_rows <= GROUP_ROWS
        return float(done.stderr)

    few, many = peak_mb(5), peak_mb(45)
    assert many - few < 30  # all rows of the second would be 50 MB more
