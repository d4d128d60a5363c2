"""The schema: up, down and up again, who may read it, and what is said where it cannot be made."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from alembic.script import ScriptDirectory
from psycopg import errors, sql

from services.consumer.sink import Sink
from services.core.config import Settings
from services.core.database import connect
from services.etl.worker import Leader
from tests.fix_services import NOWHERE, START, wait_until
from tests.fix_stack import ROOT, answers, downgrade, free_port, upgrade
from tests.measured import MEASUREMENTS, reading_of, write_to

pytestmark = pytest.mark.without_topics

TABLES = {
    "sensor_data",
    "partition_progress",
    "summary_refresh_queue",
    "summary_state",
    "summary_check",
    "raw_chunk",
    "etl_lease",
}
QUEUE_STATE = "refresh_queue_state"
SUMMARIES = {f"{metric}_summary{suffix}" for metric in MEASUREMENTS for suffix in ("", "_live")}
READABLE = SUMMARIES | {QUEUE_STATE}
OURS = TABLES | READABLE


def relations(connection: psycopg.Connection) -> set[str]:
    """Tables and views of the public schema, without Alembic's own and the aggregates, which belong to etl."""
    rows = connection.execute(
        "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v')"
    )
    return {name for (name,) in rows if not name.endswith(("min", "minute"))} - {"alembic_version"}


def alembic(settings: Settings, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``alembic`` as typed, from the repository root."""
    return subprocess.run(
        [Path(sys.executable).parent / "alembic", *arguments],
        cwd=ROOT,
        env=os.environ | settings.as_environment() | {"STARTUP_TIMEOUT_SECONDS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def store_and_summarise(settings: Settings, connection: psycopg.Connection) -> None:
    """One reading through consumer and etl."""
    sink = Sink(settings)
    write_to(sink, [reading_of("s1", START, *(20.0 for _ in MEASUREMENTS))], NOWHERE)
    sink.close()
    Leader(connection, settings).run_once()
    for name in SUMMARIES:
        rows = connection.execute(sql.SQL("SELECT sensor_id FROM {}").format(sql.Identifier(name))).fetchall()
        assert rows == [("s1",)], name


def test_down_and_up_again_with_readings_and_summaries(settings: Settings, connection: psycopg.Connection) -> None:
    assert relations(connection) == OURS
    store_and_summarise(settings, connection)
    try:
        downgrade(settings)
        left = relations(connection)
    finally:
        upgrade(settings)
    assert left == set()
    assert relations(connection) == OURS
    store_and_summarise(settings, connection)


@pytest.mark.slow
@pytest.mark.parametrize("left", ["sensor_data", "temperature_summary", "humidity_summary"])
def test_a_downgrade_drops_no_data_unless_told_so(
    settings: Settings, connection: psycopg.Connection, left: str
) -> None:
    """Summaries may have outlived their readings."""
    store_and_summarise(settings, connection)
    for table in {"sensor_data", *(f"{name}_summary" for name in MEASUREMENTS)} - {left}:
        connection.execute(sql.SQL("TRUNCATE {}").format(sql.Identifier(table)))
    for words in ((), ("-x", "drop_data=no")):
        done = alembic(settings, *words, "downgrade", "base", LOG_LEVEL="WARNING")
        assert done.returncode == 2
        assert done.stderr == (
            f"error: {left} hold data that this downgrade drops for good; if that is what you want: "
            "alembic -x drop_data=yes downgrade base\n"
        )
    assert relations(connection) == OURS
    try:
        done = alembic(settings, "-x", "drop_data=yes", "downgrade", "base")
        assert done.returncode == 0, done.stderr
        assert relations(connection) == set()
    finally:
        upgrade(settings)


def test_an_upgrade_may_be_repeated(settings: Settings) -> None:
    for _ in range(2):
        done = alembic(settings, "upgrade", "head")
        assert done.returncode == 0, done.stderr
    current = alembic(settings, "current")
    head = ScriptDirectory(str(ROOT / "migrations")).get_current_head()
    assert current.stdout.strip() == f"{head} (head)"


def test_alembic_takes_the_password_from_a_file(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "password").write_text(settings.postgre_password.get_secret_value() + "\n", encoding="utf-8")
    done = alembic(settings, "current", POSTGRE_PASSWORD="wrong", POSTGRE_PASSWORD_FILE=str(tmp_path / "password"))
    assert done.returncode == 0, done.stderr


def test_the_key_is_unique_and_nothing_else_is_indexed(connection: psycopg.Connection) -> None:
    """A second index would cost a third of the ingest rate."""
    indexes = connection.execute("SELECT indexdef FROM pg_indexes WHERE tablename = 'sensor_data'").fetchall()
    assert len(indexes) == 1
    assert re.search(r'^CREATE UNIQUE INDEX .*\("?time"?, sensor_id\)$', indexes[0][0])


def test_ids_mean_the_same_on_every_machine(settings: Settings, connection: psycopg.Connection) -> None:
    """An index in the order of a language breaks without a word when the C library changes."""
    store_and_summarise(settings, connection)
    rows = connection.execute(
        "SELECT DISTINCT attrelid::regclass::text, collname FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid"
        " JOIN pg_collation ON pg_collation.oid = attcollation"
        " WHERE attname = 'sensor_id' AND relkind IN ('r', 'v', 'i')"
    ).fetchall()
    assert {collation for _, collation in rows} == {"C"}
    assert {name for name, _ in rows} >= {"sensor_data", "temperature_summary", "temperature_10min", "sensor_data_key"}


def test_sensor_reader_may_read_summaries_and_views_and_nothing_else(
    settings: Settings, connection: psycopg.Connection
) -> None:
    store_and_summarise(settings, connection)
    with connect(settings) as reader:
        reader.execute("SET ROLE sensor_reader")
        for name in SUMMARIES:
            rows = reader.execute(sql.SQL("SELECT sensor_id FROM {}").format(sql.Identifier(name))).fetchall()
            assert rows == [("s1",)], name
        assert reader.execute("SELECT * FROM refresh_queue_state").fetchall() == [(0, 0.0)]
        for name in [*(OURS - READABLE), "alembic_version", "temperature_10min"]:
            with pytest.raises(errors.InsufficientPrivilege):
                reader.execute(sql.SQL("SELECT * FROM {}").format(sql.Identifier(name)))
        for statement in (
            "INSERT INTO temperature_summary SELECT * FROM temperature_summary",
            "UPDATE temperature_summary SET reading_count = 0",
            "DELETE FROM humidity_summary",
            "TRUNCATE humidity_summary",
            "DROP TABLE humidity_summary",
            "CREATE TABLE mine (x int)",
        ):
            with pytest.raises(errors.InsufficientPrivilege):
                reader.execute(statement)
        reader.execute("RESET ROLE")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"POSTGRE_PASSWORD": "wrong"}, "refused user"),
        ({"POSTGRE_PORT": "closed"}, "PostgreSQL does not answer at"),
        ({"POSTGRE_PORT": "0"}, "POSTGRE_PORT=0 is not allowed"),
        ({"POSTGRE_PASSWORD_FILE": "/no/such"}, "POSTGRE_PASSWORD_FILE=/no/such: the file cannot be read"),
    ],
)
def test_a_mistake_is_one_line(settings: Settings, environment: dict[str, str], expected: str) -> None:
    closed = {name: str(free_port()) if value == "closed" else value for name, value in environment.items()}
    done = alembic(settings, "upgrade", "head", **closed)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert expected in line
    assert "wrong" not in line


@pytest.fixture
def plain_postgres(settings: Settings) -> Iterator[Settings]:
    """Settings of a PostgreSQL server without TimescaleDB."""
    found = [shutil.which("initdb"), *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")))]
    programs = [Path(path).parent for path in found if path]
    if not programs:
        pytest.skip("no plain PostgreSQL is installed here (initdb)")
    user = "nobody" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "data"
        if user:
            shutil.chown(directory, user)
        subprocess.run(
            [programs[-1] / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "--no-sync"],
            user=user,
            check=True,
            capture_output=True,
            cwd=directory,
        )
        own = settings.model_copy(
            update={"postgre_host": "127.0.0.1", "postgre_port": free_port(), "postgre_dbname": "postgres"}
        )
        server = subprocess.Popen(
            [programs[-1] / "postgres", "-D", data, "-p", str(own.postgre_port), "-k", "", "-h", "127.0.0.1"],
            user=user,
            cwd=directory,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_until(lambda: answers(own, "postgres"), "PostgreSQL")
            with connect(own) as connection:
                if connection.execute("SELECT FROM pg_available_extensions WHERE name = 'timescaledb'").fetchone():
                    pytest.skip("the PostgreSQL that is installed here has TimescaleDB")
            yield own
        finally:
            server.terminate()
            server.wait(30)


def test_without_timescaledb_one_line_says_what_to_install(plain_postgres: Settings) -> None:
    done = alembic(plain_postgres, "upgrade", "head", LOG_LEVEL="WARNING")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: this PostgreSQL server has no TimescaleDB: install TimescaleDB 2.23 or newer")
    with connect(plain_postgres) as connection:
        assert relations(connection) == set()


@pytest.mark.usefixtures("native", "no_tables")
def test_two_at_once_and_somebody_who_holds_the_old_locks(settings: Settings) -> None:
    with connect(settings) as other, ThreadPoolExecutor(2) as pool:
        other.execute("SELECT pg_advisory_lock(6180882)")  # any role may take any advisory lock
        done = list(pool.map(lambda _: alembic(settings, "upgrade", "head"), range(2)))
    assert [each.returncode for each in done] == [0, 0], [each.stderr for each in done]


def is_waiting(connection: psycopg.Connection) -> bool:
    """Whether somebody waits for a lock."""
    row = connection.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    ).fetchone()
    return row is not None and row[0] > 0


@pytest.mark.usefixtures("native", "no_tables")
def test_a_lock_that_somebody_holds_is_waited_for(settings: Settings) -> None:
    upgrade(settings)
    with connect(settings) as other, connect(settings) as watcher, ThreadPoolExecutor(1) as pool:
        other.execute("BEGIN; SELECT * FROM alembic_version FOR UPDATE")
        migrating = pool.submit(alembic, settings, "downgrade", "base", LOG_FORMAT="json")
        wait_until(lambda: is_waiting(watcher), "it waits for the lock")
        wait_until(lambda: not is_waiting(watcher), "it gives the lock up")
        wait_until(lambda: is_waiting(watcher), "it tries again")
        assert not migrating.done()
        other.execute("COMMIT")
        done = migrating.result()
    assert done.returncode == 0, done.stderr
    assert "migration_waits" in done.stderr
