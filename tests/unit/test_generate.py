"""What generated files hold: exact counts, the same rows for the same seed, weather that could be."""

from __future__ import annotations

import fcntl
import statistics
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import IO

import pyarrow.parquet as pq
import pytest

from services.cli import main
from services.core.config import Settings
from services.core.errors import ConfigurationError, StoppedError
from services.core.shutdown import Shutdown
from services.producer.generate import GROUP_ROWS, Counts, Plan, generate
from services.producer.source import open_source
from tests.measured import make_settings

START = datetime(2024, 1, 1, tzinfo=UTC)
SETTINGS = make_settings()
PLAN = Plan(sensors=5, days=100, interval_s=3600, seed=1, start=START)


def make(out: Path, plan: Plan = PLAN, settings: Settings = SETTINGS) -> Counts:
    return generate(settings, plan, out, Shutdown())


def test_without_options_each_sensor_has_each_time_once_in_order(tmp_path: Path) -> None:
    out = tmp_path / "a.parquet"
    assert make(out) == Counts(rows=5 * 2400)
    rows = pq.read_table(out).to_pylist()
    assert [row["time_hour"] for row in rows[::5]] == [START + timedelta(hours=hour) for hour in range(2400)]
    assert len({(row["origin"], row["time_hour"]) for row in rows}) == len(rows)
    assert {row["origin"] for row in rows} == {"s0001", "s0002", "s0003", "s0004", "s0005"}


@pytest.mark.parametrize("group_rows", [GROUP_ROWS, 500])  # in one table, and in several
def test_counts_are_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group_rows: int) -> None:
    monkeypatch.setattr("services.producer.generate.GROUP_ROWS", group_rows)
    plan = replace(PLAN, gaps=0.1, late=0.2, duplicates=0.05)
    out = tmp_path / "a.parquet"
    counts = make(out, plan)
    planned = plan.sensors * plan.steps
    rows = pq.read_table(out).to_pylist()
    readings = Counter((row["origin"], row["time_hour"], row["temp"], row["humid"]) for row in rows)
    late, newest = 0, START
    for time in (row["time_hour"] for row in rows):
        late += time < newest
        newest = max(newest, time)
    assert len(rows) == counts.rows
    assert len(readings) == len({reading[:2] for reading in readings}) == counts.rows - counts.duplicates
    assert counts.rows - counts.duplicates + counts.gaps == planned
    assert counts.late <= late <= counts.late + counts.duplicates  # duplicates come after newer rows too
    for share, count in ((0.1, counts.gaps), (0.18, counts.late), (0.045, counts.duplicates)):
        assert count / planned == pytest.approx(share, rel=0.2)


@pytest.mark.parametrize("sensors", [1, 9])
def test_without_duplicates_late_is_exact(tmp_path: Path, sensors: int) -> None:
    out = tmp_path / "a.parquet"
    counts = make(out, replace(PLAN, sensors=sensors, late=0.5, gaps=0.5))
    late, newest = 0, START
    for time in pq.read_table(out).column("time_hour").to_pylist():
        late += time < newest
        newest = max(newest, time)
    assert counts.late == late > 0


def test_the_seed_decides(tmp_path: Path) -> None:
    plan = replace(PLAN, gaps=0.1, late=0.1, duplicates=0.1)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make(tmp_path / name, replace(plan, seed=seed))
    first, same, other = (pq.read_table(tmp_path / name) for name in "abc")
    assert first == same
    for column in ("time_hour", "temp", "humid"):  # which rows there are, and what they say
        assert first.column(column) != other.column(column)
    assert first.column("temp").slice(0, 100) != other.column("temp").slice(0, 100)


def test_the_weather_could_be(tmp_path: Path) -> None:
    out = tmp_path / "a.parquet"
    make(out, replace(PLAN, sensors=3, days=366))
    for sensor in ("s0001", "s0002", "s0003"):
        rows = pq.read_table(out, filters=[("origin", "==", sensor)]).to_pylist()

        def mean(name: str, *, rows: list[dict[str, object]] = rows, **at: range) -> float:
            return statistics.fmean(
                float(str(row[name]))
                for row in rows
                if all(getattr(row["time_hour"], unit) in values for unit, values in at.items())
            )

        assert mean("temp", month=range(6, 9)) - mean("temp", month=range(1, 3)) > 8
        assert mean("temp", hour=range(14, 17)) - mean("temp", hour=range(2, 5)) > 3
        assert mean("humid", hour=range(14, 17)) < mean("humid", hour=range(2, 5)) - 5  # dry when it is warm
        assert all(-40 < row["temp"] < 50 and 0 < row["humid"] <= 100 for row in rows)
        steps = [abs(after["temp"] - before["temp"]) for before, after in pairwise(rows)]
        assert 0 < statistics.fmean(steps) < 2


def test_the_columns_are_those_that_the_producer_reads(tmp_path: Path) -> None:
    settings = make_settings(
        parquet_url=str(tmp_path / "a.parquet"),
        data_feature_date="at",
        data_feature_temp="celsius",
        data_feature_humid="percent",
        data_feature_sensor="",
    )
    make(tmp_path / "a.parquet", replace(PLAN, sensors=1), settings)
    assert pq.read_schema(tmp_path / "a.parquet").names == ["at", "celsius", "percent"]
    (file,) = open_source(settings, Shutdown()).files
    assert sum(readings.sent for readings in file.readings()) == 2400
    with pytest.raises(ConfigurationError, match="DATA_FEATURE_SENSOR is empty"):
        make(tmp_path / "b.parquet", PLAN, settings)


def test_a_file_that_exists_is_kept_unless_forced(tmp_path: Path) -> None:
    out = tmp_path / "a.parquet"
    out.write_text("precious", encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"a\.parquet exists: --force replaces it$"):
        make(out)
    assert out.read_text(encoding="utf-8") == "precious"
    generate(SETTINGS, PLAN, out, Shutdown(), force=True)
    assert pq.ParquetFile(out).metadata.num_rows == 5 * 2400
    assert list(tmp_path.iterdir()) == [out]


def test_of_two_that_write_one_file_the_second_is_refused(tmp_path: Path) -> None:
    """And what the first has written until then stays."""
    out, part = tmp_path / "a.parquet", tmp_path / ".a.parquet.part"
    refused = []

    class Meanwhile(Shutdown):
        """Somebody else generates the same file while the first is at it."""

        @property
        def requested(self) -> bool:
            before = part.read_bytes()
            with pytest.raises(ConfigurationError, match=r"^another generate is writing .*/a\.parquet: wait for it"):
                generate(SETTINGS, PLAN, out, Shutdown(), force=True)
            assert part.read_bytes() == before
            refused.append(True)
            return False

    part.write_bytes(b"what a killed one has left is no obstacle")
    generate(SETTINGS, PLAN, out, Meanwhile())
    assert refused
    assert pq.ParquetFile(out).metadata.num_rows == 5 * 2400
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("force", [False, True])
def test_a_file_that_another_has_just_written_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, force: bool
) -> None:
    out = tmp_path / "a.parquet"

    def lock(file: IO[bytes], operation: int) -> None:
        (tmp_path / ".a.parquet.part").rename(out)
        fcntl_flock(file, operation)

    fcntl_flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lock)
    with pytest.raises(ConfigurationError):
        generate(SETTINGS, PLAN, out, Shutdown(), force=force)
    assert out.read_bytes() == b""


def test_what_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    shutdown = Shutdown()
    shutdown.request()
    with pytest.raises(StoppedError, match="was not written"):
        generate(SETTINGS, PLAN, tmp_path / "a.parquet", shutdown)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--sensors x", "--sensors=x is not allowed (a whole number, 1 to 100,000)"),
        ("--sensors 0", "--sensors=0 is not allowed (a whole number, 1 to 100,000)"),
        ("--days nan", "--days=nan is not allowed (a number, 0 to 100,000)"),
        ("--days 0", "--days=0 is shorter than --interval=60: no reading"),
        ("--late 0.6", "--late=0.6 is not allowed (a number, 0 to 0.5)"),
        ("--start soon", "--start=soon is not allowed (a day or time like 2024-01-01, in UTC)"),
        ("--start 9998-01-01 --days 400", "--start=9998-01-01 and --days=400 go beyond the year 9999"),
    ],
)
def test_a_wrong_option_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, line: str
) -> None:
    assert main(["generate", str(tmp_path / "a.parquet"), *options.split()]) == 2
    assert capsys.readouterr().err == f"error: {line}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", [".", "no/such/a.parquet"])
def test_a_wrong_place_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", out]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
