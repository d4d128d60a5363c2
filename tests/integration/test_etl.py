"""Summaries follow the readings: exactly, at the cost of the change, whatever dies."""

from __future__ import annotations

import logging
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from psycopg import sql
from psycopg.types.multirange import Multirange
from psycopg.types.range import Range

from services.consumer.sink import Sink
from services.core.config import Settings
from services.core.database import connect
from services.core.measurements import DEFAULT, measurement
from services.core.reading import Reading
from services.etl.aggregates import Aggregates
from services.etl.history import History
from services.etl.lease import Lease
from services.etl.rollup import BASE, OF_MINUTES, Rollup, bucket_floor, configured_rollups
from services.etl.summaries import SummaryMirror
from services.etl.worker import Leader
from services.local.check import Values, differences_in_readings, differences_in_summary
from tests.fix_services import NOWHERE, START, StartService, minutes, run_cli, touched_ranges, wait_until
from tests.measured import of_default, reading_of, write_to

pytestmark = pytest.mark.without_topics

Summary = list[tuple[object, ...]]


@pytest.fixture
def sink(settings: Settings) -> Iterator[Sink]:
    """Stores readings as a consumer does."""
    sink = Sink(settings)
    yield sink
    sink.close()


@pytest.fixture(params=["of readings", "of minutes"])
def leader(request: pytest.FixtureRequest, settings: Settings, connection: psycopg.Connection) -> Leader:
    """An etl in this process, which works when a test says so; what its aggregates are made of."""
    if request.param == "of minutes":
        request.getfixturevalue("in_minutes")
    leader = Leader(connection, settings)
    leader.take_over()
    return leader


def store(sink: Sink, *readings: Reading) -> None:
    assert not write_to(sink, readings, NOWHERE).refused


def at(minute: float, temperature: float | None = None, humidity: float | None = None, sensor: str = "s1") -> Reading:
    if temperature is None and humidity is None:
        temperature = 20.0
    return reading_of(sensor, minutes(minute), temperature, humidity)


def summary(connection: psycopg.Connection, metric: str = "temperature", suffix: str = "") -> Summary:
    """The rows without their interval's end."""
    name = sql.Identifier(f"{metric}_summary{suffix}")
    columns = sql.SQL(", ").join(sql.Identifier(f"{function}_{metric}") for function in ("avg", "min", "max"))
    query = sql.SQL("SELECT sensor_id, interval_start, {}, reading_count FROM {} ORDER BY 2, 1")
    return connection.execute(query.format(columns, name)).fetchall()


def versions(connection: psycopg.Connection) -> dict[datetime, tuple[str, str]]:
    """What changes whenever a summary row is written again, even to the same values."""
    rows = connection.execute("SELECT interval_start, xmin::text, ctid::text FROM temperature_summary")
    return {start: (xmin, ctid) for start, xmin, ctid in rows}


def stored_rows(connection: psycopg.Connection) -> dict[tuple[str, datetime], Values]:
    rows = connection.execute("SELECT sensor_id, time, temperature, humidity FROM sensor_data")
    return {(sensor, time): (temperature, humidity) for sensor, time, temperature, humidity in rows}


def differences(
    connection: psycopg.Connection, settings: Settings, rows: dict[tuple[str, datetime], Values] | None = None
) -> list[str]:
    """What the tables and the live views hold that a recomputation does not give."""
    rows = stored_rows(connection) if rows is None else rows
    found = differences_in_readings(connection, rows, DEFAULT)
    for at, name in enumerate(DEFAULT):
        found += differences_in_summary(connection, rows, at, name, settings.interval_of(name))
        found += differences_in_views(connection, name)
    return found


def differences_in_views(connection: psycopg.Connection, metric: str) -> list[str]:
    """Rows of the summary table and the live view that differ by more than the last digits of the average."""
    table, live = ({row[:2]: row[2:] for row in summary(connection, metric, suffix)} for suffix in ("", "_live"))
    return [
        f"{metric} {key}: {table.get(key)} in the table, {live.get(key)} in the live view"
        for key in table.keys() | live.keys()
        if table.get(key) != pytest.approx(live.get(key), rel=1e-9, abs=1e-9)
    ]


def queue_length(connection: psycopg.Connection) -> int:
    row = connection.execute("SELECT count(*) FROM summary_refresh_queue").fetchone()
    assert row is not None
    return int(row[0])


def aggregates(connection: psycopg.Connection) -> set[str]:
    rows = connection.execute("SELECT view_name FROM timescaledb_information.continuous_aggregates")
    return of_default(name for (name,) in rows)


def test_a_committed_reading_shows_in_table_and_live_view(
    connection: psycopg.Connection, sink: Sink, start: StartService
) -> None:
    etl = start("etl")
    etl.wait_for("leading")
    wait_until(lambda: len(aggregates(connection)) == 2, "aggregates")
    store(sink, at(1, 20.0, 50.0), at(2, 22.0), at(3, None, 52.0), at(11, 10.0, sensor="s2"))
    expected = [("s1", minutes(0), 21.0, 20.0, 22.0, 2), ("s2", minutes(10), 10.0, 10.0, 10.0, 1)]
    wait_until(lambda: summary(connection) == expected, "the summary", timeout_s=5)
    assert summary(connection, suffix="_live") == expected
    assert summary(connection, "humidity") == [("s1", minutes(0), 51.0, 50.0, 52.0, 2)]
    ends = connection.execute("SELECT DISTINCT interval_end - interval_start FROM temperature_summary").fetchall()
    assert ends == [(timedelta(minutes=10),)]
    assert etl.stop() == 0


def test_the_live_view_shows_the_newest_state_before_any_refresh(
    connection: psycopg.Connection, sink: Sink, leader: Leader
) -> None:
    store(sink, at(0, 1.0))
    leader.run_once()
    store(sink, at(60, 2.0))
    assert len(summary(connection)) == 1
    assert summary(connection, suffix="_live")[1] == ("s1", minutes(60), 2.0, 2.0, 2.0, 1)


def test_the_last_interval_of_a_quiet_stream_is_summarised(
    connection: psycopg.Connection, sink: Sink, leader: Leader
) -> None:
    """The queue drives the work, not the clock and not the next message."""
    store(sink, at(5))
    leader.run_once()
    assert summary(connection) == [("s1", minutes(0), 20.0, 20.0, 20.0, 1)]


def test_a_late_reading_recomputes_its_interval_and_no_other(
    connection: psycopg.Connection,
    settings: Settings,
    sink: Sink,
    leader: Leader,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ten months late, between readings that were summarised long ago."""
    months_ago = -300 * 24 * 60.0
    store(sink, *(at(minute) for minute in range(0, 600, 5)))
    store(sink, *(at(months_ago + minute) for minute in range(0, 600, 5)))
    leader.run_once()
    before = versions(connection)
    assert len(before) == 120
    windows = []
    refresh = leader.summaries.refresh

    def note_and_refresh(aggregate: str, start: datetime, end: datetime, *, force: bool) -> None:
        assert force
        if of_default([aggregate]):
            windows.append((aggregate, start, end))
        refresh(aggregate, start, end, force=force)

    monkeypatch.setattr(leader.summaries, "refresh", note_and_refresh)
    caplog.clear()
    with caplog.at_level(logging.INFO, "etl"):
        store(sink, at(months_ago + 302, 80.0))
        leader.run_once()
    of = OF_MINUTES if windows[0][0] == BASE else ""
    assert windows == [
        *([(BASE, minutes(months_ago + 302), minutes(months_ago + 303))] if of else []),
        (f"temperature_10min{of}", minutes(months_ago + 300), minutes(months_ago + 310)),
        (f"humidity_20min{of}", minutes(months_ago + 300), minutes(months_ago + 320)),
    ]
    (refreshed,) = [record.fields for record in caplog.records if record.message == "summaries_refreshed"]  # type: ignore[attr-defined]
    assert (refreshed["queue_rows"], refreshed["summary_rows_changed"]) == (1, 1)
    after = versions(connection)
    assert {start for start in after if after[start] != before[start]} == {minutes(months_ago + 300)}
    row = connection.execute(
        "SELECT avg_temperature, max_temperature, reading_count FROM temperature_summary WHERE interval_start = %s",
        [minutes(months_ago + 300)],
    ).fetchone()
    assert row == (40.0, 80.0, 3)
    assert differences(connection, settings) == []


def test_a_late_reading_does_not_replace_the_others_of_its_interval(
    connection: psycopg.Connection, sink: Sink, leader: Leader
) -> None:
    store(sink, *(at(minute, float(minute)) for minute in range(10)))
    leader.run_once()
    store(sink, at(0.5, 100.0))
    leader.run_once()
    assert summary(connection) == [("s1", minutes(0), 145 / 11, 0.0, 100.0, 11)]


def test_historical_readings_appear(connection: psycopg.Connection, sink: Sink, leader: Leader) -> None:
    store(sink, at(0))
    leader.run_once()
    store(sink, at(-20 * 365 * 24 * 60.0, 5.0))
    leader.run_once()
    assert [row[2] for row in summary(connection)] == [5.0, 20.0]


def test_a_correction_replaces(connection: psycopg.Connection, sink: Sink, leader: Leader) -> None:
    store(sink, at(1, 90.0), at(2, 20.0))
    leader.run_once()
    store(sink, at(1, 10.0))
    leader.run_once()
    assert summary(connection) == [("s1", minutes(0), 15.0, 10.0, 20.0, 2)]


def test_an_interval_without_readings_vanishes(connection: psycopg.Connection, sink: Sink, leader: Leader) -> None:
    store(sink, at(1, 1.0), at(11, 2.0), at(11, 3.0, sensor="s2"))
    leader.run_once()
    connection.execute("DELETE FROM sensor_data WHERE sensor_id = 's1' AND time = %s", [minutes(11)])
    connection.execute("INSERT INTO summary_refresh_queue (touched) VALUES (%s)", [touched_ranges([at(11)])])
    leader.run_once()
    assert [row[:3] for row in summary(connection)] == [("s1", minutes(0), 1.0), ("s2", minutes(10), 3.0)]


def test_a_repeated_refresh_changes_nothing(connection: psycopg.Connection, sink: Sink, leader: Leader) -> None:
    readings = [at(minute, minute / 7) for minute in range(100)]
    store(sink, *readings)
    leader.run_once()
    before = versions(connection)
    connection.execute("INSERT INTO summary_refresh_queue (touched) VALUES (%s)", [touched_ranges(readings)])
    leader.run_once()
    assert versions(connection) == before
    assert queue_length(connection) == 0


def test_more_ranges_than_windows_are_all_refreshed(
    connection: psycopg.Connection, settings: Settings, sink: Sink, leader: Leader
) -> None:
    for minute in random.Random(1).sample(range(0, 200_000, 10), 80):  # noqa: S311
        store(sink, at(minute, float(minute)))
    leader.run_once()
    assert len(summary(connection)) == 80
    assert differences(connection, settings) == []


def test_a_queue_row_that_commits_after_a_higher_id_is_not_lost(
    connection: psycopg.Connection, sink: Sink, leader: Leader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids are given out in order, but transactions commit in any: here the lower one during the refresh."""
    taken = connection.execute("SELECT nextval(pg_get_serial_sequence('summary_refresh_queue', 'id'))").fetchone()
    assert taken is not None
    store(sink, at(100))
    late = [taken[0]]
    refresh = leader.summaries.refresh

    def commit_then_refresh(aggregate: str, start: datetime, end: datetime, *, force: bool) -> None:
        if late:
            connection.execute("INSERT INTO sensor_data VALUES (%s, 's1', 5, NULL)", [minutes(0)])
            connection.execute(
                "INSERT INTO summary_refresh_queue (id, touched) OVERRIDING SYSTEM VALUE VALUES (%s, %s)",
                [late.pop(), touched_ranges([at(0)])],
            )
        refresh(aggregate, start, end, force=force)

    monkeypatch.setattr(leader.summaries, "refresh", commit_then_refresh)
    leader.summaries.refresh_queued()
    assert queue_length(connection) == 1
    leader.run_once()
    assert queue_length(connection) == 0
    assert [row[2] for row in summary(connection)] == [5.0, 20.0]


def test_history_that_is_loaded_waits_until_it_settles_and_the_present_does_not(
    connection: psycopg.Connection, sink: Sink, leader: Leader
) -> None:
    long_ago = minutes(0) - timedelta(days=300)
    store(sink, reading_of("s1", long_ago, 5.0), reading_of("s1", datetime.now(UTC), 20.0))

    def age(which: str, seconds: float) -> None:
        connection.execute(
            "UPDATE summary_refresh_queue SET queued_at = now() - make_interval(secs => %s)"
            f" WHERE id = (SELECT {which}(id) FROM summary_refresh_queue)",
            [seconds],
        )

    def averages() -> list[object]:
        leader.summaries.refresh_queued(settled=True)
        return [row[2] for row in summary(connection)]

    age("min", 0)
    assert averages() == [20.0]
    store(sink, reading_of("s1", long_ago, 6.0))
    age("min", 4)
    age("max", 0)
    assert averages() == [20.0]  # it was touched again
    age("min", 6)
    assert averages() == [6.0, 20.0]  # but it does not wait for ever
    assert queue_length(connection) == 1
    age("max", 2)
    assert averages() == [6.0, 20.0]  # settled
    assert queue_length(connection) == 0


def left_in_queue(connection: psycopg.Connection) -> list[tuple[object, ...]]:
    return connection.execute(
        "SELECT id, lower(touched), upper(touched), queued_at FROM summary_refresh_queue ORDER BY id"
    ).fetchall()


@pytest.mark.parametrize("width", [10, 7 * 1440, 366 * 1440])
def test_a_year_of_history_is_worked_off_step_by_step(
    connection: psycopg.Connection, settings: Settings, sink: Sink, width: int
) -> None:
    """The newest first; whoever comes after a crash goes on where the last step ended."""
    wide = settings.model_copy(update={"temperature_interval": width})
    Leader(connection, wide).take_over()
    days = 60 * 24 * 60.0
    store(sink, at(-days, 2.0), at(-days / 2, 3.0), at(0, 4.0))
    connection.execute("DELETE FROM summary_refresh_queue")
    connection.execute(
        "INSERT INTO summary_refresh_queue (touched) VALUES (%s)",
        [Multirange([Range(minutes(-days), minutes(1), bounds="[)")])],
    )
    ((number, start, end, queued_at),) = left_in_queue(connection)
    steps = 0
    while True:
        leader = Leader(connection, wide)  # as if the one before had died
        leader.take_over()
        assert leader.summaries.refresh_queued()
        steps += 1
        if steps == 1 and width == 10:
            assert [row[2] for row in summary(connection)] == [4.0]
        left = left_in_queue(connection)
        if not left:
            break
        assert (left[0][0], left[0][1], left[0][3]) == (number, start, queued_at)
        assert timedelta(0) < end - left[0][2] <= timedelta(days=1)  # type: ignore[operator]
        end = left[0][2]
    assert steps == 61
    assert differences(connection, wide) == []


def test_a_step_that_ends_inside_an_interval_loses_nothing_of_it(
    connection: psycopg.Connection, settings: Settings, sink: Sink
) -> None:
    """Intervals of 3 days and of 7 minutes; scattered minutes, so that steps end in all places."""
    uneven = settings.model_copy(update={"temperature_interval": 3 * 1440, "humidity_interval": 7})
    leader = Leader(connection, uneven)
    leader.take_over()
    source = random.Random(7)  # noqa: S311
    for _ in range(4):
        store(sink, *(at(source.randrange(14 * 1440), source.random(), 1.0) for _ in range(150)))
        leader.summaries.step = timedelta(minutes=source.randint(1, 3000))
        while leader.summaries.refresh_queued():
            pass
        assert differences(connection, uneven) == []


def test_readings_that_were_there_before_etl_are_summarised_to_the_last(
    connection: psycopg.Connection, settings: Settings
) -> None:
    """Without a queue row, and the last one at the very start of an interval."""
    for minute in (0, 5, 10, 120):
        connection.execute("INSERT INTO sensor_data VALUES (%s, 's1', %s, 50)", [minutes(minute), float(minute)])
    Leader(connection, settings).run_once()
    assert [row[1] for row in summary(connection)] == [minutes(0), minutes(10), minutes(120)]
    assert differences(connection, settings) == []


@pytest.mark.parametrize("extreme", [5e-324, -5e-324, 1e100, -1e100])
def test_extreme_values_do_not_stop_the_summaries(
    connection: psycopg.Connection, settings: Settings, sink: Sink, leader: Leader, extreme: float
) -> None:
    """A sum that overflows, or a quotient that underflows, is an error in PostgreSQL."""
    store(sink, *(at(minute, extreme if minute == 1 else 0.0, extreme) for minute in range(7)))
    leader.run_once()
    assert differences(connection, settings) == []


def test_the_smallest_numbers_are_mirrored_when_their_interval_is_refreshed_again(
    connection: psycopg.Connection, settings: Settings, sink: Sink, leader: Leader
) -> None:
    for sensor in ("s1", "s2"):
        store(sink, at(1, 5e-324, sensor=sensor))
        leader.run_once()
    assert len(summary(connection)) == 2
    assert differences(connection, settings) == []


@pytest.mark.parametrize("seed", range(3))
def test_a_summary_equals_a_recomputation_for_any_readings(
    connection: psycopg.Connection, settings: Settings, sink: Sink, leader: Leader, seed: int
) -> None:
    source = random.Random(seed)  # noqa: S311
    model: dict[tuple[str, datetime], Values] = {}
    for _ in range(8):
        batch = []
        for _ in range(source.randint(1, 60)):
            near = source.choice([0, 0, 0, -400_000, 90_000])
            reading = reading_of(
                source.choice(["s1", "s2", "ß"]),
                minutes(near + source.randrange(400) / 2),
                source.choice([None, source.uniform(-50, 50)]),
                source.choice([None, source.uniform(0, 100)]),
            )
            batch.append(reading)
            before = model.get((reading.sensor_id, reading.time), (None, None))
            model[reading.sensor_id, reading.time] = (
                before[0] if reading.temperature is None else reading.temperature,
                before[1] if reading.humidity is None else reading.humidity,
            )
        store(sink, *batch)
        leader.run_once()
        assert differences(connection, settings, model) == []
    assert queue_length(connection) == 0


def test_once_does_what_is_queued_and_ends(connection: psycopg.Connection, settings: Settings, sink: Sink) -> None:
    store(sink, at(0))
    done = run_cli(settings, "etl", "--once")
    assert (done.returncode, done.stdout) == (0, "")
    assert len(summary(connection)) == 1
    assert queue_length(connection) == 0


def test_one_leads_and_another_takes_over_when_it_is_killed(
    connection: psycopg.Connection, settings: Settings, sink: Sink, start: StartService
) -> None:
    first = start("etl")
    first.wait_for("leading")
    second = start("etl")
    second.wait_for("standing_by")
    once = run_cli(settings, "etl", "--once")
    assert once.returncode == 1
    assert once.stderr.splitlines()[-1].startswith("error: another etl instance leads")
    store(sink, at(0))
    wait_until(lambda: len(summary(connection)) == 1, "a summary by the first")
    first.kill()
    second.wait_for("leading")
    store(sink, at(10))
    wait_until(lambda: len(summary(connection)) == 2, "a summary by the second")
    assert len(second.events("standing_by")) == 1
    second.signal(signal.SIGTERM)
    assert second.wait(10) == 0


def test_killed_at_any_moment_the_summaries_end_exact(
    connection: psycopg.Connection, settings: Settings, sink: Sink, start: StartService
) -> None:
    source = random.Random(4)  # noqa: S311
    pause = threading.Event()
    for round_ in range(6):
        etl = start("etl", settings=settings.model_copy(update={"etl_poll_seconds": 0.01}))
        etl.wait_for("leading")
        for _ in range(source.randint(1, 6)):
            store(sink, *(at(source.randrange(3000), source.random(), round_) for _ in range(200)))
            pause.wait(source.uniform(0, 0.05))
        etl.kill()
    assert run_cli(settings, "etl", "--once").returncode == 0
    assert queue_length(connection) == 0
    assert differences(connection, settings) == []


READER_QUERY = """
    SELECT count(*), count(DISTINCT interval_end - interval_start), coalesce(sum(reading_count), 0),
           coalesce(bool_or(crossing), false)
    FROM (
        SELECT *, interval_end > lead(interval_start) OVER (PARTITION BY sensor_id ORDER BY interval_start) AS crossing
        FROM {}
    ) AS rows
"""


@contextmanager
def readers(settings: Settings, readings: int) -> Iterator[list[str]]:
    """People who look at the summaries all the time; what they see that they never should."""
    seen: list[str] = []
    ended = threading.Event()

    def read(name: str) -> None:
        query = sql.SQL(READER_QUERY).format(sql.Identifier(name))
        with connect(settings) as connection:
            while not ended.is_set():
                rows, widths, counted, overlapping = connection.execute(query).fetchone() or (0, 0, 0, True)
                if not rows or widths != 1 or counted != readings or overlapping:
                    seen.append(f"{name}: {rows} rows of {widths} widths, {counted} readings, {overlapping}")
                ended.wait(0.005)

    names = ("temperature_summary", "temperature_summary_live")
    threads = [threading.Thread(target=read, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def test_changing_an_interval_never_shows_an_empty_or_mixed_answer(
    connection: psycopg.Connection, settings: Settings, sink: Sink, start: StartService
) -> None:
    store(sink, *(at(minute, float(minute)) for minute in range(3000)))
    Leader(connection, settings).run_once()
    with readers(settings, 3000) as seen:
        for width in (15, 10):
            changed = settings.model_copy(update={"temperature_interval": width})
            etl = start("etl", settings=changed)
            etl.wait_for("interval_changed")
            wait_until(lambda: len(aggregates(connection)) == 2, "the old aggregate is gone")
            assert f"temperature_{width}min" in aggregates(connection)
            assert etl.stop() == 0
            assert differences(connection, changed) == []
    assert seen == []


def test_an_interval_change_that_was_killed_finishes_on_restart(
    connection: psycopg.Connection, settings: Settings, sink: Sink, start: StartService
) -> None:
    store(sink, *(at(minute * 60, float(minute)) for minute in range(2000)))
    Leader(connection, settings).run_once()
    changed = settings.model_copy(update={"temperature_interval": 15, "humidity_interval": 7})
    with readers(settings, 2000) as seen:
        etl = start("etl", settings=changed)
        etl.wait_for("interval_change_begun")
        etl.kill()
        assert run_cli(changed, "etl", "--once").returncode == 0
    assert seen == []
    assert aggregates(connection) == {"temperature_15min", "humidity_7min"}
    assert differences(connection, changed) == []


def test_an_interval_change_that_was_taken_back_leaves_nothing(
    connection: psycopg.Connection, settings: Settings, sink: Sink
) -> None:
    store(sink, at(0), at(100))
    Leader(connection, settings).run_once()
    lease = Lease(connection)
    assert lease.try_take()
    begun = Aggregates(connection, lease, History(connection, lease, timedelta(0)), configured_rollups(settings))
    begun.prepare()
    begun.build(Rollup(measurement("temperature"), 15))  # begun, and no more
    assert "temperature_15min" in aggregates(connection)
    Leader(connection, settings).run_once()
    assert aggregates(connection) == {"temperature_10min", "humidity_20min"}
    assert differences(connection, settings) == []


def old_aggregates(connection: psycopg.Connection, settings: Settings) -> Aggregates:
    """Those of an etl that knew temperature alone."""
    lease = Lease(connection)
    assert lease.try_take()
    aggregates = Aggregates(
        connection, lease, History(connection, lease, timedelta(0)), configured_rollups(settings)[:1]
    )
    aggregates.prepare()
    for _ in aggregates.show_live():
        pass
    return aggregates


@pytest.mark.parametrize("of", ["", OF_MINUTES])
def test_a_new_measurement_is_summarised_from_all_the_readings_there_are(
    connection: psycopg.Connection, settings: Settings, sink: Sink, request: pytest.FixtureRequest, of: str
) -> None:
    """Minutes of an etl that knew temperature alone stay as they are; what is new has minutes of its own."""
    if of:
        request.getfixturevalue("in_minutes")
    older = old_aggregates(connection, settings)
    store(sink, *(at(minute, float(minute), 50.0) for minute in range(100)), at(60 * 24 * 30, 1.0))
    lease = Lease(connection)
    summaries = SummaryMirror(connection, lease, older, History(connection, lease, timedelta(0)))
    summaries.prepare()
    while summaries.refresh_queued():
        pass
    before = summary(connection)
    leader = Leader(connection, settings)
    leader.take_over()
    assert summary(connection, suffix="_live") == before
    assert summary(connection, "humidity") == []
    leader.run_once()
    assert summary(connection) == before
    base = {BASE, f"{BASE}_humidity"} if of else set()
    assert aggregates(connection) == {f"temperature_10min{of}", f"humidity_20min{of}"} | base
    assert differences(connection, settings) == []


def test_a_leader_asks_nothing_before_it_takes_over(connection: psycopg.Connection, settings: Settings) -> None:
    connection.close()
    Leader(connection, settings)


def test_a_leader_that_leads_again_knows_what_another_has_changed(
    connection: psycopg.Connection, settings: Settings
) -> None:
    leader = Leader(connection, settings)
    leader.run_once()
    Leader(connection, settings.model_copy(update={"temperature_interval": 15})).run_once()
    leader.take_over()
    assert leader.aggregates.current["temperature"].minutes == 15


@pytest.mark.parametrize("width", [1, 7, 10, 60, 1440, 7 * 1440, 366 * 1440])
def test_intervals_begin_where_timescaledb_begins_them(connection: psycopg.Connection, width: int) -> None:
    length = timedelta(minutes=width)
    for text in ("1900-01-01", "1999-12-31 23:59:59.999999", "2000-01-03", "2024-02-29 12:34:56", "2199-12-31 23:59"):
        time = datetime.fromisoformat(text).replace(tzinfo=UTC)
        bucket = connection.execute("SELECT time_bucket(%s, %s::timestamptz)", [length, time]).fetchone()
        assert bucket == (bucket_floor(length, time),), text


def test_aggregates_of_somebody_else_are_left_alone(
    connection: psycopg.Connection, settings: Settings, sink: Sink
) -> None:
    old_aggregates(connection, settings)
    connection.execute(
        "CREATE MATERIALIZED VIEW theirs WITH (timescaledb.continuous) AS"
        " SELECT time_bucket('1 hour', time) AS hour, count(*) FROM sensor_data GROUP BY 1 WITH NO DATA"
    )
    Leader(connection, settings).take_over()
    assert aggregates(connection) == {"temperature_10min", "humidity_20min", "theirs"}


def test_an_interval_changes_while_readings_come_without_a_pause(
    connection: psycopg.Connection, settings: Settings, sink: Sink, start: StartService
) -> None:
    """Every look at the queue finds something."""
    store(sink, at(0))
    Leader(connection, settings).run_once()
    changed = settings.model_copy(update={"temperature_interval": 15, "etl_poll_seconds": 0.5})
    etl = start("etl", settings=changed)
    pause = threading.Event()
    for minute in range(200):
        store(sink, at(minute))
        if etl.events("interval_changed"):
            break
        pause.wait(0.05)
    assert etl.events("interval_changed"), "the interval never changed"
    assert etl.stop() == 0
    assert run_cli(changed, "etl", "--once").returncode == 0
    assert differences(connection, changed) == []


def test_the_new_width_begins_where_an_interval_of_both_widths_begins(
    connection: psycopg.Connection, settings: Settings, sink: Sink
) -> None:
    """What is frozen ends in the middle of a new interval, and late readings wait there when the change begins."""
    store(sink, *(at(minute) for minute in range(60)))
    store(sink, *(at(minute) for minute in range(60, 30_000, 5)))
    Leader(connection, settings).run_once()
    connection.execute("UPDATE summary_state SET closed_before = %s, frozen_before = %s", [minutes(20), minutes(20)])
    store(sink, at(22.5, 80.0), at(50.5, 80.0))
    changed = settings.model_copy(update={"temperature_interval": 15})
    Leader(connection, changed).run_once()
    rows = connection.execute(
        "SELECT interval_start, interval_end, reading_count FROM temperature_summary ORDER BY 1"
    ).fetchall()
    assert rows[:5] == [
        (minutes(0), minutes(10), 10),
        (minutes(10), minutes(20), 10),
        (minutes(20), minutes(30), 11),
        (minutes(30), minutes(45), 15),
        (minutes(45), minutes(60), 16),
    ]
    assert rows[5:] == [(minutes(start), minutes(start + 15), 3) for start in range(60, 30_000, 15)]


def test_a_chunk_that_was_noted_as_dropped_freezes_even_after_a_crash(
    connection: psycopg.Connection, sink: Sink, leader: Leader
) -> None:
    """A refresh of its time would delete what only the summary still knows."""
    store(sink, at(0, 1.0), at(30 * 24 * 60, 2.0))
    leader.run_once()
    before = summary(connection)
    connection.execute("SELECT drop_chunks('sensor_data', older_than => %s)", [minutes(20 * 24 * 60)])
    connection.execute("UPDATE raw_chunk SET dropped_at = now() WHERE range_start <= %s", [START])
    connection.execute("INSERT INTO summary_refresh_queue (touched) VALUES (%s)", [touched_ranges([at(0)])])
    leader.run_once()
    assert summary(connection) == before
