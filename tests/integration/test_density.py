"""Summaries stay exact while the readings become denser or sparser, and what they are made of changes with them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from services.consumer.sink import Sink
from services.core.config import Settings
from services.etl import aggregates as aggregates_module
from services.etl.rollup import BASE, OF_MINUTES
from services.etl.summaries import SummaryMirror
from services.etl.worker import Leader
from tests.fix_services import NOWHERE, StartService, minutes, run_cli, wait_until
from tests.integration.test_etl import aggregates, differences, queue_length, readers, summary
from tests.measured import of_default, reading_of, write_to

pytestmark = pytest.mark.without_topics

SENSORS = 20
DENSE, SPARSE = [at / 60 for at in range(150)], [60.0 + 10 * at for at in range(150)]  # each second; each ten minutes
WEEK = 7 * 24 * 60.0
OF_READINGS = {"temperature_10min", "humidity_20min"}
OF_DENSE = {BASE, f"temperature_10min{OF_MINUTES}", f"humidity_20min{OF_MINUTES}"}


@pytest.fixture
def sink(settings: Settings) -> Iterator[Sink]:
    with closing(Sink(settings)) as sink:
        yield sink


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether an etl in this process takes the readings for dense: the last one."""
    now = [False]
    monkeypatch.setattr(aggregates_module, "minutes_pay", lambda _, **__: now[-1])
    return now


def store(sink: Sink, *times: float) -> None:
    write_to(
        sink, [reading_of(f"s{sensor}", minutes(at), at, 50.0) for at in times for sensor in range(SENSORS)], NOWHERE
    )


def work_off(leader: Leader) -> None:
    while leader.summaries.refresh_queued():
        pass


def test_there_are_minutes_as_long_as_the_readings_are_dense(
    connection: psycopg.Connection, settings: Settings, sink: Sink, start: StartService
) -> None:
    assert run_cli(settings, "etl", "--once").returncode == 0
    assert aggregates(connection) == OF_READINGS
    store(sink, *DENSE)
    etl = start("etl")
    wait_until(lambda: aggregates(connection) == OF_DENSE, "minutes")
    wait_until(lambda: not queue_length(connection), "all is summarised")
    with readers(settings, SENSORS * len(DENSE)) as seen:
        write_to(sink, [reading_of("s1", minutes(1), -5.0)], NOWHERE)
        query = "SELECT count(*) FROM temperature_summary WHERE min_temperature = -5"
        wait_until(lambda: connection.execute(query).fetchone() == (1,), "a correction")
        assert etl.stop() == 0
    assert seen == []
    assert differences(connection, settings) == []
    store(sink, *SPARSE)
    etl = start("etl")
    wait_until(lambda: aggregates(connection) == OF_READINGS, "no minutes")
    wait_until(lambda: not queue_length(connection), "all is summarised")
    assert etl.stop() == 0
    assert differences(connection, settings) == []


def test_dense_readings_in_a_new_database_are_summed_by_the_minute_at_once(
    connection: psycopg.Connection, settings: Settings, sink: Sink
) -> None:
    store(sink, *DENSE, 60 * 24 * 365 * 50)  # and one from the future of each sensor
    Leader(connection, settings).take_over()
    assert aggregates(connection) == OF_DENSE


@pytest.mark.parametrize("runs_on", [False, True], ids=["started again", "running on"])
def test_dense_history_of_an_empty_database_is_read_once(
    connection: psycopg.Connection, settings: Settings, sink: Sink, monkeypatch: pytest.MonkeyPatch, runs_on: bool
) -> None:
    """An etl that found no readings took them for sparse; nothing is made of that."""
    leader = Leader(connection, settings)
    leader.take_over()
    leader.run_once()
    assert aggregates(connection) == OF_READINGS
    store(sink, *DENSE)
    refreshed = []
    refresh = SummaryMirror.refresh

    def note_and_refresh(self: SummaryMirror, aggregate: str, *window: datetime, force: bool = False) -> None:
        refreshed.append(aggregate)
        refresh(self, aggregate, *window, force=force)

    monkeypatch.setattr(SummaryMirror, "refresh", note_and_refresh)
    (leader if runs_on else Leader(connection, settings)).run_once()
    assert of_default(refreshed) == aggregates(connection) == OF_DENSE
    assert summary(connection, suffix="_live") == summary(connection)
    assert differences(connection, settings) == []


@pytest.mark.parametrize("times", [[0.0, 60.0], DENSE[:49]], ids=["once an hour", "too few to tell"])
def test_where_it_does_not_pay_or_nobody_knows_there_are_no_minutes(
    connection: psycopg.Connection, settings: Settings, sink: Sink, times: list[float]
) -> None:
    for number in range(25 if len(times) == 2 else 1):
        store(sink, *(at + number * 120 for at in times))
    Leader(connection, settings).run_once()
    assert aggregates(connection) == OF_READINGS


def test_readers_notice_nothing_of_a_change(
    connection: psycopg.Connection, settings: Settings, sink: Sink, dense: list[bool]
) -> None:
    """The summary's rows are the same ones."""
    store(sink, *DENSE, *SPARSE)
    Leader(connection, settings).run_once()
    written = "SELECT sensor_id, interval_start, xmin::text, ctid::text FROM temperature_summary ORDER BY 1, 2"
    before = connection.execute(written).fetchall()
    with readers(settings, SENSORS * (len(DENSE) + len(SPARSE))) as seen:
        for now, there in ((True, OF_DENSE), (False, OF_READINGS)):
            dense.append(now)
            Leader(connection, settings).run_once()
            assert aggregates(connection) == there
            assert connection.execute(written).fetchall() == before
            assert differences(connection, settings) == []
    assert seen == []


@pytest.mark.parametrize("width", [10, 15], ids=["the same width", "another width"])
@pytest.mark.parametrize("then", [True, False], ids=["dense", "sparse"])
@pytest.mark.parametrize("restarts", [False, True], ids=["at once", "with restarts"])
def test_late_readings_and_corrections_in_every_step_of_a_change(
    connection: psycopg.Connection,
    settings: Settings,
    sink: Sink,
    dense: list[bool],
    width: int,
    then: bool,
    restarts: bool,
) -> None:
    dense.append(not then)
    for number in range(4):
        store(sink, *(number * WEEK + at for at in (0, 3, 10, 14.5, 61)))
    Leader(connection, settings).run_once()
    dense.append(then)
    settings = settings.model_copy(update={"temperature_interval": width})
    chooser = random.Random(3)  # noqa: S311
    left, steps = 5 if restarts else 0, 0
    leader = Leader(connection, settings)
    leader.take_over()
    changing = leader.change.steps()
    while next(changing, changing) is None:
        late = [chooser.choice([0, 1, 2, 3]) * WEEK + chooser.choice([0, 3, 7.25, 60]) for _ in range(5)]
        write_to(sink, [reading_of("s1", minutes(at), chooser.random(), None) for at in late], NOWHERE)
        if chooser.random() < 0.7:
            work_off(leader)
            found = settings.model_copy(update={"temperature_interval": width_of(connection)})
            assert differences(connection, found) == []
        steps += 1
        if left and chooser.random() < 0.5:
            left -= 1
            leader = Leader(connection, settings)
            leader.take_over()
            changing = leader.change.steps()
    assert steps > 1
    work_off(leader)
    assert differences(connection, settings) == []
    there = {name.replace("10", str(width)) for name in (OF_DENSE if then else OF_READINGS)}
    assert aggregates(connection) == there


def width_of(connection: psycopg.Connection) -> int:
    query = "SELECT extract(epoch FROM width)::int / 60 FROM summary_state WHERE measurement = 'temperature'"
    ((width,),) = connection.execute(query).fetchall()
    return int(width)


def materialized(connection: psycopg.Connection) -> set[str]:
    """The tables of what is made of minutes, and theirs."""
    query = (
        "SELECT materialization_hypertable_name FROM timescaledb_information.continuous_aggregates"
        " WHERE view_name ~ 'minute'"
    )
    return {name for (name,) in connection.execute(query)}


def test_what_was_begun_and_given_up_feeds_nothing(
    connection: psycopg.Connection, settings: Settings, sink: Sink, dense: list[bool]
) -> None:
    """By a restart, or since the readings are sparse again: it has missed what came meanwhile."""
    store(sink, 0, 3, 10)
    leader = Leader(connection, settings)
    leader.take_over()
    work_off(leader)
    for minute in (4, 5):
        dense.append(True)
        next(leader.change.steps())
        assert {BASE, f"temperature_10min{OF_MINUTES}"} <= aggregates(connection)
        dense.append(False)
        for _ in leader.change.steps():
            pass
        assert aggregates(connection) == OF_READINGS
        dense.append(True)
        next(leader.change.steps())
        begun = materialized(connection)
        leader = Leader(connection, settings)  # a restart
        leader.take_over()
        store(sink, minute)
        work_off(leader)
        connection.execute("TRUNCATE summary_refresh_queue")
        for _ in leader.change.steps():
            pass
        assert aggregates(connection) == OF_DENSE
        assert not begun & materialized(connection)
        assert differences(connection, settings) == []
        dense.append(False)
        for _ in leader.change.steps():
            pass
        assert aggregates(connection) == OF_READINGS
        assert differences(connection, settings) == []


@pytest.mark.slow
@pytest.mark.parametrize("first", [False, True], ids=["of readings", "of minutes"])
def test_frozen_history_stays_while_what_it_was_made_of_changes(
    connection: psycopg.Connection, settings: Settings, sink: Sink, dense: list[bool], first: bool
) -> None:
    """And what is compressed changes on."""
    settings = settings.model_copy(update={"raw_retention_days": 30, "compress_after_days": 10})
    now = datetime.now(UTC)
    keep = [now - timedelta(days=days) for days in (400, 25, 20, 1)]
    dense.append(first)
    write_to(sink, [reading_of("s1", at, 20.0, 50.0) for at in keep], NOWHERE)
    Leader(connection, settings).run_once()
    assert connection.execute("SELECT count(*) FROM sensor_data").fetchone() == (3,)
    before = summary(connection)
    assert len(before) == 4
    for at, then in enumerate((not first, first)):
        dense.append(then)
        Leader(connection, settings).run_once()
        assert aggregates(connection) == (OF_DENSE if then else OF_READINGS)
        assert summary(connection) == summary(connection, suffix="_live") == before
        write_to(sink, [reading_of("s1", keep[2], 21.0 + at, 50.0)], NOWHERE)
        Leader(connection, settings).run_once()
        assert [row[2] for row in summary(connection)] == [20, 20, 21 + at, 20]
        assert summary(connection, suffix="_live") == summary(connection)
        before = summary(connection)
