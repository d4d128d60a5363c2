"""A measurement is added, taken off the list and put back, and every summary stays exact."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from psycopg import sql

from services.consumer.sink import Sink
from services.core.config import Settings
from services.core.database import connect
from services.core.errors import TransientError
from services.core.measurements import KEYWORDS
from services.core.reading import Reading, reading_type
from services.core.shutdown import Shutdown
from services.etl.history import History
from services.etl.reconcile import reconcile
from services.etl.rollup import OF_MINUTES
from services.etl.worker import Leader
from services.local.check import Key, Values, differences_in_readings, differences_in_summary
from tests.fix_services import NOWHERE, StartService, minutes, publish, run_cli, wait_until
from tests.fix_stack import ROOT, remove_measurement, upgrade
from tests.integration.test_etl import aggregates, summary
from tests.integration.test_recipe import NOT_COPIED
from tests.measured import MEASUREMENTS, with_measurement, write_to

NAMES = (*MEASUREMENTS, "noise")


def more(settings: Settings) -> Settings:
    """The settings with noise."""
    return with_measurement(settings, "noise")


@pytest.fixture
def clean(settings: Settings) -> Iterator[None]:
    """Leaves the schema as it was."""
    yield
    with connect(settings) as connection:
        remove_measurement(connection, "noise")


@pytest.fixture
def added(settings: Settings, clean: None) -> Settings:
    """The settings with noise, in a database that has it."""
    upgrade(more(settings))
    return more(settings)


def a_reading(minute: float, noise: float | None = None, temperature: float | None = None) -> Reading:
    make: Any = reading_type(NAMES)
    return make("s1", minutes(minute), temperature=temperature, noise=noise)  # type: ignore[no-any-return]


def store(settings: Settings, *readings: Reading) -> None:
    with closing(Sink(settings)) as sink:
        write_to(sink, readings, NOWHERE)


def stored(connection: psycopg.Connection, names: tuple[str, ...]) -> dict[tuple[str, datetime], tuple[Any, ...]]:
    columns = sql.SQL(", ").join(map(sql.Identifier, names))
    rows = connection.execute(sql.SQL("SELECT sensor_id, time, {} FROM sensor_data").format(columns))
    return {(row[0], row[1]): row[2:] for row in rows}


def differences(connection: psycopg.Connection, settings: Settings) -> list[str]:
    """What summaries and live views hold that a recomputation from the stored readings does not give."""
    rows, found = stored(connection, settings.measurements), []
    for at, name in enumerate(settings.measurements):
        found += differences_in_summary(connection, rows, at, name, settings.interval_of(name))
        if summary(connection, name) != summary(connection, name, suffix="_live"):
            found.append(f"{name}_summary_live")
    return found


def columns(connection: psycopg.Connection) -> set[str]:
    rows = connection.execute(
        "SELECT attname FROM pg_attribute WHERE attrelid = 'sensor_data'::regclass AND attnum > 0"
    )
    return {name for (name,) in rows}


@pytest.mark.usefixtures("clean")
def test_an_upgrade_adds_what_is_configured_and_nothing_else_does(
    settings: Settings, connection: psycopg.Connection
) -> None:
    """Also where there is no new revision; taken off the list, it stays."""
    alembic = {"env": os.environ | more(settings).as_environment(), "timeout": 60, "check": True}
    assert "noise" not in columns(connection)

    for command in (["current"], ["history"], ["upgrade", "head"], ["upgrade", "head"]):
        subprocess.run([sys.executable, "-m", "alembic", *command], **alembic, stdout=subprocess.DEVNULL)  # type: ignore[call-overload]
        assert ("noise" in columns(connection)) == (command[0] == "upgrade"), command
    table = connection.execute(
        "SELECT column_name, data_type, is_nullable FROM information_schema.columns"
        " WHERE table_name = 'noise_summary' ORDER BY ordinal_position"
    ).fetchall()
    like = connection.execute(
        "SELECT replace(column_name, 'temperature', 'noise'), data_type, is_nullable FROM information_schema.columns"
        " WHERE table_name = 'temperature_summary' ORDER BY ordinal_position"
    ).fetchall()
    assert table == like
    rights = (
        "SELECT grantee, privilege_type FROM information_schema.role_table_grants WHERE table_name = %s ORDER BY 1, 2"
    )
    for suffix in ("summary", "summary_live"):
        given = [connection.execute(rights, [f"{name}_{suffix}"]).fetchall() for name in ("noise", "temperature")]
        assert given[0] == given[1] != []
    upgrade(settings)
    assert "noise" in columns(connection)


@pytest.mark.usefixtures("clean")
def test_a_column_or_a_table_of_somebody_else_is_one_line_and_nothing_is_half_done(
    settings: Settings, connection: psycopg.Connection
) -> None:
    for taken in ("ALTER TABLE sensor_data ADD COLUMN noise text", "CREATE TABLE noise_summary (x int)"):
        connection.execute(taken)
        done = run_cli(more(settings), "migrate")
        assert done.returncode == 2
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert line.startswith("error: MEASUREMENTS: noise cannot be added: ")
        connection.execute("ALTER TABLE sensor_data DROP COLUMN IF EXISTS noise")
        assert "noise" not in columns(connection)


@pytest.mark.parametrize("command", [["consume"], ["consume", "--until-caught-up"], ["etl"], ["etl", "--once"]])
def test_a_service_whose_database_lacks_one_ends_with_one_line(settings: Settings, command: list[str]) -> None:
    done = run_cli(more(settings), *command)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "does not have noise yet" in line
    assert "alembic upgrade head" in line


def test_status_says_so_and_shows_the_rest(settings: Settings) -> None:
    done = run_cli(more(settings), "status")
    assert "the database does not have noise, which MEASUREMENTS names" in done.stdout
    assert "temperature_summary" in done.stdout


@pytest.mark.parametrize("of", ["", OF_MINUTES])
def test_what_is_added_gets_its_summaries_and_nothing_of_the_others_is_made_again(
    settings: Settings, connection: psycopg.Connection, request: pytest.FixtureRequest, of: str
) -> None:
    """Readings that were stored before etl knew of it are no exception."""
    if of:
        request.getfixturevalue("in_minutes")
    request.getfixturevalue("clean")
    upgrade(more(settings))
    added = more(settings)
    store(added, *(a_reading(at, temperature=20.0) for at in range(60)))
    Leader(connection, settings).run_once()
    made = materialized(connection)
    store(added, *(a_reading(at, 40.0 + at) for at in (3, 17, 60 * 24 * 30)))
    Leader(connection, settings).run_once()  # it does not know of noise
    assert connection.execute("SELECT count(*) FROM noise_summary").fetchone() == (0,)
    refreshed = changes(connection)
    leader = Leader(connection, added)
    leader.take_over()
    leader.run_once()
    assert differences(connection, added) == []
    assert connection.execute("SELECT sum(reading_count) FROM noise_summary").fetchone() == (3,)
    assert made <= materialized(connection)
    assert f"noise_10min{of}" in aggregates(connection)
    assert changes(connection) == refreshed
    store(added, a_reading(4, 1.0, 21.0), a_reading(61, 2.0))
    leader.run_once()
    assert differences(connection, added) == []


@pytest.mark.slow
@pytest.mark.parametrize("of", ["", OF_MINUTES])
def test_what_is_taken_off_the_list_stays_and_catches_up_when_it_is_put_back(
    added: Settings, settings: Settings, connection: psycopg.Connection, request: pytest.FixtureRequest, of: str
) -> None:
    if of:
        request.getfixturevalue("in_minutes")
    store(added, *(a_reading(at, 40.0 + at, 20.0) for at in range(0, 60 * 24 * 30, 60 * 12)))
    Leader(connection, added).run_once()
    before = summary(connection, "noise")
    for _ in range(2):  # a restart makes no difference
        leader = Leader(connection, settings)
        leader.take_over()
        store(added, a_reading(0, 99.0, 30.0), a_reading(60 * 12, 98.0), a_reading(5, 97.0))
        leader.run_once()
        assert summary(connection, "noise") == before == summary(connection, "noise", suffix="_live")
        assert not {name for name in aggregates(connection) if "noise" in name}  # each change would be noted for it
        assert summary(connection)[0][2] == 30.0
    connection.execute("DELETE FROM sensor_data WHERE time = %s", [minutes(60 * 24)])
    assert reconcile(connection, settings.measurements, leader.take_over, Shutdown())["temperature"] == 1
    refreshed = changes(connection)
    leader = Leader(connection, added)
    leader.take_over()
    next(leader.summaries.catch_up())
    for _ in leader.aggregates.show_live():
        pass
    assert summary(connection, "noise") == summary(connection, "noise", suffix="_live")
    leader.run_once()
    assert differences(connection, added) == []
    assert len(summary(connection, "noise")) == len(before) - 1
    assert changes(connection) == refreshed
    assert connection.execute("SELECT bool_and(behind_before = '-infinity') FROM summary_state").fetchone() == (True,)


@pytest.mark.usefixtures("native")
def test_readers_of_what_is_taken_off_the_list_hold_nothing_else_up(
    added: Settings, settings: Settings, connection: psycopg.Connection
) -> None:
    store(added, *(a_reading(at, 40.0 + at, 20.0) for at in range(30)))
    Leader(connection, added).run_once()
    with connect(settings) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM noise_summary_live")
        leader = Leader(connection, settings)
        leader.take_over()
        store(added, a_reading(31, 99.0, 30.0))
        with pytest.raises(TransientError, match="lock timeout"):
            leader.run_once()
        assert summary(connection)[-1][2] == 30.0
        store(added, a_reading(32, 98.0))
        Leader(connection, added).run_once()  # put back before anything could be dropped
    assert differences(connection, added) == []


def test_nothing_is_dropped_before_its_summary_has_caught_up(
    added: Settings, settings: Settings, connection: psycopg.Connection
) -> None:
    keep = added.model_copy(update={"raw_retention_days": 30})
    Leader(connection, added).run_once()
    Leader(connection, settings).run_once()
    store(added, a_reading(0, 1.0))
    Leader(connection, settings).run_once()
    leader = Leader(connection, keep)
    leader.take_over()
    for _ in History(connection, leader.lease, timedelta(days=30)).drop_expired():
        pass
    assert stored(connection, ("noise",)) == {("s1", minutes(0)): (1.0,)}
    leader.run_once()
    assert stored(connection, ("noise",)) == {}
    assert [row[2] for row in summary(connection, "noise")] == [1.0]


def test_an_etl_that_dies_while_it_catches_up_goes_on_where_it_was(
    added: Settings, settings: Settings, connection: psycopg.Connection
) -> None:
    Leader(connection, added).run_once()
    Leader(connection, settings).run_once()
    store(added, *(a_reading(60 * 24 * 8 * at, 1.0) for at in range(6)))
    Leader(connection, settings).run_once()
    for _ in range(3):
        leader = Leader(connection, added)
        leader.take_over()
        next(leader.summaries.catch_up())
        assert summary(connection, "noise") == summary(connection, "noise", suffix="_live")
    behind = connection.execute("SELECT behind_before FROM summary_state WHERE measurement = 'noise'").fetchone()
    assert behind == (minutes(60 * 24 * 38),)  # the newest chunk ends on the 41st day; a day each time
    Leader(connection, added).run_once()
    assert differences(connection, added) == []
    assert len(summary(connection, "noise")) == 6


@pytest.mark.slow
def test_a_measurement_is_added_to_a_pipeline_under_load(
    settings: Settings, connection: psycopg.Connection, start: StartService, clean: None
) -> None:
    """Readers of the other summaries never see a gap, and in the end every row is exact."""
    settings = settings.model_copy(update={"consumer_batch_seconds": 0.05})
    added, sent, ended = more(settings), 0, threading.Event()
    services = [start(name, settings=settings) for name in ("consume", "etl")]

    def send(count: int, **values: float) -> None:
        nonlocal sent
        for sensor in range(5):
            batch = [
                {"sensor_id": f"s{sensor}", "time": minutes(at / 20).isoformat(), "temperature": at} | values
                for at in range(sent + sensor, sent + count, 5)
            ]
            publish(settings, [json.dumps(each).encode() for each in batch], key=f"s{sensor}", partition=sensor % 3)
        sent += count

    def summed() -> int:
        row = connection.execute("SELECT coalesce(sum(reading_count), 0) FROM temperature_summary").fetchone()
        assert row is not None
        return int(row[0])

    seen: list[tuple[int, int]] = []

    def look() -> None:
        with connect(settings) as reader:
            while not ended.wait(0.02):
                query = "SELECT coalesce(sum(reading_count), 0)::int FROM temperature_summary"
                live, table = (reader.execute(f"{query}{suffix}").fetchone() for suffix in ("_live", ""))
                assert live is not None
                assert table is not None
                seen.append((live[0], table[0]))

    send(300)
    wait_until(lambda: summed() == sent, "all is summarised")
    reader = threading.Thread(target=look)
    reader.start()
    try:
        send(100)
        upgrade(added)
        send(100, noise=1.0)  # of which nobody takes notice yet
        services += [start("consume", settings=added), start("etl", settings=added)]
        services[0].stop()
        send(100, noise=2.0)
        services[1].stop()
        send(100, noise=3.0)
        wait_until(lambda: summed() == sent, "all is summarised")
        services[3].wait_for("summaries_refreshed")
        wait_until(lambda: is_settled(connection), "it has caught up")
    finally:
        ended.set()
        reader.join()
    for before, after in pairwise(seen):
        assert before[0] <= after[0]
        assert before[1] <= after[1]
    assert summed() == sent  # which the last look may have been too early for
    assert differences(connection, added) == []
    noise = connection.execute("SELECT sum(reading_count) FROM noise_summary").fetchone()
    assert noise is not None
    assert 200 <= noise[0] < 400  # at least all that were sent when only consumers with it were left
    assert differences_in_readings(connection, stored(connection, NAMES), NAMES) == []


def test_the_readme_s_five_lines_bring_co2_to_its_summary(
    settings: Settings, connection: psycopg.Connection, tmp_path: Path
) -> None:
    if "co2" in MEASUREMENTS:
        pytest.skip("it is there already")
    clone = tmp_path / "clone"
    shutil.copytree(ROOT, clone, ignore=NOT_COPIED)
    (section,) = re.findall(r"^## Measure more$(.*?)^## ", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = re.findall(r"^\$ (.*)$", section, re.MULTILINE)
    assert len(lines) == 5
    times = [minutes(at / 3) for at in range(500)]
    table = pa.table(
        {
            "ms": [int(time.timestamp() * 1000) for time in times],
            "origin": [f"s{at % 3}" for at in range(500)],
            "temp": [float(at) for at in range(500)],
            "humid": pa.nulls(500, pa.float64()),
            "ppm": [400.0 + at % 7 for at in range(500)],
        }
    )
    pq.write_table(table, clone / "office.parquet")
    given = {
        name: value
        for name, value in settings.as_environment().items()
        if not re.fullmatch("MEASUREMENTS|DATA_FEATURE_.*|PARQUET_URL", name)
    }
    environment = {name: value for name, value in os.environ.items() if name != "MEASUREMENTS"} | given
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(clone)}
    try:
        for line in lines:
            done = subprocess.run(
                ["sh", "-c", line], cwd=clone, env=environment, capture_output=True, text=True, timeout=120, check=False
            )
            assert done.returncode == 0, done.stderr
        rows: dict[Key, Values] = {
            (row["origin"], time): (row["temp"], row["ppm"]) for row, time in zip(table.to_pylist(), times, strict=True)
        }
        assert differences_in_readings(connection, rows, ("temperature", "co2")) == []
        assert differences_in_summary(connection, rows, 1, "co2", 10) == []
        assert differences_in_summary(connection, rows, 0, "temperature", 10) == []
    finally:
        remove_measurement(connection, "co2")


def is_settled(connection: psycopg.Connection) -> bool:
    """Whether nothing waits, and nothing is behind."""
    return connection.execute(
        "SELECT NOT EXISTS (SELECT FROM summary_refresh_queue)"
        " AND (SELECT bool_and(behind_before = '-infinity') FROM summary_state)"
    ).fetchone() == (True,)


def materialized(connection: psycopg.Connection) -> set[str]:
    rows = connection.execute(
        "SELECT materialization_hypertable_name FROM timescaledb_information.continuous_aggregates"
    )
    return {name for (name,) in rows}


def changes(connection: psycopg.Connection) -> list[tuple[object, ...]]:
    """The transactions that the rows of temperature are from, in its aggregate."""
    (name,) = [name for name in aggregates(connection) if name.startswith("temperature")]
    query = (
        "SELECT materialization_hypertable_schema, materialization_hypertable_name"
        " FROM timescaledb_information.continuous_aggregates WHERE view_name = %s"
    )
    table = sql.Identifier(*(connection.execute(query, [name]).fetchone() or ()))
    return connection.execute(sql.SQL("SELECT interval_start, xmin::text FROM {} ORDER BY 1").format(table)).fetchall()


def test_no_name_must_be_quoted(connection: psycopg.Connection) -> None:
    reserved = connection.execute("SELECT word FROM pg_get_keywords() WHERE catcode IN ('R', 'T')").fetchall()
    assert {word for (word,) in reserved} <= set(KEYWORDS.split())
