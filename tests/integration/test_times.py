"""Times as files have them, from the file to the table."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from services.core.config import Settings
from tests.fix_services import PATIENCE_S, Service, StartService, read_topic, rows_of, run_cli
from tests.fix_stack import ROOT
from tests.integration.test_monitoring import Pages
from tests.integration.test_producer import FORMATS, changed, source

BERLIN = ZoneInfo("Europe/Berlin")
NOON = datetime(2024, 3, 1, 12, tzinfo=UTC)


def write(path: Path, times: pa.Array, sensor: str = "s1", first: int = 0) -> Path:
    """A row for each time; the temperature is the row's number."""
    numbers = pa.array(range(first, first + len(times)), pa.float64())
    table = pa.table({"time_hour": times, "origin": [sensor] * len(times), "temp": numbers, "humid": numbers})
    pq.write_table(table, path)
    return path


def produce(start: StartService, settings: Settings) -> Service:
    producer = start("produce", settings=settings)
    assert producer.wait() == 0, producer.log_path.read_text(encoding="utf-8")
    return producer


def stored(settings: Settings, connection: psycopg.Connection) -> dict[datetime, float]:
    """What a consumer stores of the topic: the temperature of each time."""
    done = run_cli(settings, "consume", "--until-caught-up")
    assert done.returncode == 0, done.stderr
    return dict(connection.execute("SELECT time, temperature FROM sensor_data").fetchall())


def instant(shown: datetime) -> datetime:
    """What a local time of Berlin is, by Python's rule for those that come twice or never."""
    return shown.replace(tzinfo=BERLIN, fold=0).astimezone(UTC)


@pytest.mark.slow
@FORMATS
def test_integer_milliseconds_are_read_in_their_unit(
    settings: Settings, connection: psycopg.Connection, start: StartService, tmp_path: Path, form: str
) -> None:
    """Without the setting the error names it."""
    times = [NOON + timedelta(milliseconds=250 * number) for number in range(1000)]
    path = write(tmp_path / "a.parquet", pa.array([int(time.timestamp() * 1000) for time in times]))
    settings = source(settings, path, producer_format=form)
    refused = run_cli(settings, "produce")
    assert refused.returncode == 2
    assert refused.stderr == (
        f"error: DATA_FEATURE_DATE=time_hour: this column of {path} is int64, not a timestamp, a date or ISO 8601 text "
        "(numbers since 1970: set DATA_FEATURE_DATE_UNIT to s, ms, us or ns)\n"
    )
    settings = changed(settings, data_feature_date_unit="ms")
    (said,) = produce(start, settings).events("all_sent")
    assert (said["level"], said["sent"]) == ("INFO", 1000)
    assert stored(settings, connection) == dict(zip(times, map(float, range(1000)), strict=True))


@pytest.mark.slow
@FORMATS
@pytest.mark.parametrize("text", [False, True], ids=["timestamp", "text"])
def test_local_times_over_a_year_with_its_changes(
    settings: Settings, connection: psycopg.Connection, start: StartService, tmp_path: Path, form: str, text: bool
) -> None:
    """A clock that is set, every half hour; in the hour that comes twice the later reading wins, and it is counted."""
    times = [datetime(2024, 1, 1, tzinfo=UTC) + timedelta(minutes=30 * number) for number in range(366 * 48)]
    shown = [time.astimezone(BERLIN).replace(tzinfo=None) for time in times]
    column = pa.array(shown, pa.timestamp("us"))
    path = write(tmp_path / "a.parquet", column.cast(pa.string()) if text else column)
    settings = source(settings, path, producer_format=form, data_feature_timezone="Europe/Berlin")
    (said,) = produce(start, settings).events("all_sent")
    assert (said["level"], said["sent"], said["ambiguous_times"]) == ("WARNING", len(times), 4)
    assert "nonexistent_times" not in said
    expected = {instant(each): float(number) for number, each in enumerate(shown)}
    assert len(expected) == len(times) - 2
    assert stored(settings, connection) == expected


def test_a_clock_that_is_never_set_loses_no_more_than_it_must(
    settings: Settings, connection: psycopg.Connection, start: StartService, tmp_path: Path
) -> None:
    """Times that never came are sent, each as another reading."""
    shown = [datetime(2024, 3, 31, 2) + timedelta(minutes=number) for number in range(60)]  # noqa: DTZ001 - local
    path = write(tmp_path / "a.parquet", pa.array(shown, pa.timestamp("s")))
    settings = source(settings, path, data_feature_timezone="Europe/Berlin")
    (said,) = produce(start, settings).events("all_sent")
    assert (said["level"], said["nonexistent_times"]) == ("WARNING", 60)
    first = datetime(2024, 3, 31, 1, tzinfo=UTC)
    assert sorted(stored(settings, connection)) == [first + timedelta(minutes=number) for number in range(60)]


def test_after_the_zone_is_corrected_only_what_it_changes_is_sent_again(
    settings: Settings, start: StartService, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write(data / "a.parquet", pa.array([NOON.replace(tzinfo=None)] * 3, pa.timestamp("us")), "local")
    write(data / "b.parquet", pa.array([NOON] * 5, pa.timestamp("us", "UTC")), "instants")
    settings = source(settings, data)
    produce(start, settings)
    settings = changed(settings, data_feature_timezone="Europe/Berlin")
    (said,) = produce(start, settings).events("all_sent")
    assert said["sent"] == 3
    assert produce(start, settings).events("nothing_to_send")
    assert produce(start, changed(settings, data_feature_timezone="UTC")).events("nothing_to_send")
    rows = [row for message in read_topic(settings, settings.kafka_topic) for row in rows_of(message)]
    assert [row["time"] for row in rows if row["sensor_id"] == "local"] == [
        f"2024-03-01T{hour}:00:00.000000Z" for hour in (12, 12, 12, 11, 11, 11)
    ]


def test_a_file_of_which_hardly_any_row_can_be_sent_is_a_warning(
    settings: Settings, start: StartService, tmp_path: Path
) -> None:
    """With the commonest reason and an example, whether other files are sent or not, in each run but once."""
    data = tmp_path / "data"
    data.mkdir()
    seconds = int(NOON.timestamp())
    good = [NOON + timedelta(seconds=number) for number in range(1000)]
    write(data / "a.parquet", pa.array(good, pa.timestamp("us", "UTC")))
    write(data / "b.parquet", pa.array([None] + [seconds] * 30_000 + [seconds * 1000] * 299))
    write(data / "c.parquet", pa.array([None] * 10 + ["soon"] * 20 + ["2024-03-01"]))
    write(data / "d.parquet", pa.array([None] * 9 + good[:1], pa.timestamp("us", "UTC")))  # a tenth is enough
    write(data / "e.parquet", pa.array([], pa.timestamp("us")))
    settings = source(settings, data, data_feature_date_unit="ms")
    producer = produce(start, settings)
    said = [
        (Path(event["file"]).name, *(event[name] for name in ("level", "sent", "skipped", "reason", "rows", "row")))
        for event in producer.events("hardly_any_row_sent")
    ]
    assert said == [("b.parquet", "WARNING", 299, 30_001, "time_out_of_range", 30_000, 1)]
    (event,) = producer.events("hardly_any_row_sent")
    assert event["example"] == f"time_hour={seconds} (read as 1970-01-20 18:48:14.400000 UTC)"

    write(data / "c.parquet", pa.array([None] * 10 + ["soon"] * 200 + ["2024-03-01"]))
    again = produce(start, settings)
    (event,) = again.events("hardly_any_row_sent")
    assert (event["reason"], event["row"], event["example"]) == ("bad_time", 10, "time_hour=soon")


def test_a_file_that_grew_by_a_bad_row_is_one_that_was_sent(
    settings: Settings, start: StartService, tmp_path: Path
) -> None:
    times = [NOON + timedelta(seconds=number) for number in range(2000)]
    path = write(tmp_path / "a.parquet", pa.array(times[:1900], pa.timestamp("us", "UTC")))
    produce(start, source(settings, path))
    write(path, pa.array(times, pa.timestamp("us", "UTC")))
    grown = produce(start, source(settings, path))
    assert grown.events("all_sent")[0]["sent"] == 100
    assert not grown.events("hardly_any_row_sent")
    write(path, pa.array([*times, None], pa.timestamp("us", "UTC")))
    grown = produce(start, source(settings, path))
    assert grown.events("all_sent")[0]["skipped_no_time"] == 1
    assert not grown.events("hardly_any_row_sent")


def test_files_that_arrive_are_read_alike(settings: Settings, start: StartService, tmp_path: Path) -> None:
    """Watched, with a zone, a unit, and a warning for the file that cannot be sent."""
    data = tmp_path / "data"
    data.mkdir()
    settings = source(
        settings,
        data,
        producer_watch_seconds=0.1,
        data_feature_timezone="Europe/Berlin",
        data_feature_date_unit="s",
    )
    pages = Pages(settings)
    producer = start("produce", settings=pages.settings)
    producer.wait_for("watching")
    assert pages.values("sensor_times_doubtful_total") == {"ambiguous": 0, "nonexistent": 0}
    twice, never = datetime(2024, 10, 27, 2, 30), datetime(2024, 3, 31, 2, 30)  # noqa: DTZ001 - local
    clock = [NOON.replace(tzinfo=None), twice, twice, never]
    write(data / "a.parquet", pa.array(clock, pa.timestamp("us")), "local")
    write(data / "b.parquet", pa.array([int(NOON.timestamp())]), "number")
    write(data / "c.parquet", pa.array([int(NOON.timestamp()) * 1000]), "wrong")
    event = producer.wait_for("hardly_any_row_sent")
    assert (Path(event["file"]).name, event["reason"]) == ("c.parquet", "time_out_of_range")
    assert event["example"] == f"time_hour={int(NOON.timestamp()) * 1000}"
    assert pages.values("sensor_times_doubtful_total") == {"ambiguous": 2, "nonexistent": 1}
    assert producer.stop() == 0
    rows = [row for message in read_topic(settings, settings.kafka_topic) for row in rows_of(message)]
    assert sorted((row["sensor_id"], row["time"][:16]) for row in rows) == [
        ("local", "2024-03-01T11:00"),
        ("local", "2024-03-31T01:30"),
        *[("local", "2024-10-27T00:30")] * 2,
        ("number", "2024-03-01T12:00"),
    ]


def test_on_a_terminal_the_warning_stands_above_the_bar(settings: Settings, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", pa.array(["01.05.2024 12:00"] * 3))
    settings = changed(source(settings, path), log_level="INFO", log_format="auto")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "services.cli", "produce"],
        cwd=ROOT,
        env=os.environ | settings.as_environment() | {"COLUMNS": "500", "TERM": "xterm"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65_536)
        except OSError:  # nobody writes any more
            break
        shown += part
    os.close(ours)
    assert process.wait(PATIENCE_S) == 1
    text = shown.decode()
    assert f"hardly_any_row_sent file={path} sent=0 skipped=3 reason=bad_time rows=3 row=0" in text
    assert "example=time_hour=01.05.2024 12:00" in text
    assert "rows/s" in text
    assert f"error: no row of {path} could be sent: 3 x bad_time" in text


def test_no_zone_of_that_name_is_one_line(settings: Settings) -> None:
    done = run_cli(settings, "produce", DATA_FEATURE_TIMEZONE="Europe/Berln")
    assert done.returncode == 2
    assert json.dumps(done.stderr).count("\\n") == 1
    assert done.stderr.startswith(
        "error: DATA_FEATURE_TIMEZONE=Europe/Berln: there is no such time zone (did you mean "
    )
