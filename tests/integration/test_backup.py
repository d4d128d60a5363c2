"""Backup and restore as docs/operations.md says: pg_dump and pg_restore, and the services go on where the data ends."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql

from services.core.config import Settings
from tests.fix_services import message, minutes, publish, run_cli
from tests.fix_stack import ROOT
from tests.measured import MEASUREMENTS

pytestmark = pytest.mark.usefixtures("native")
RESTORED = "sensors_restored"
# On the database itself, as the migrations give them; nobody else may even connect.
RIGHTS = {
    ("sensor_consumer", "CONNECT"),
    ("sensor_consumer", "TEMPORARY"),
    ("sensor_etl", "CONNECT"),
    ("sensor_etl", "TEMPORARY"),
    ("sensor_reader", "CONNECT"),
}


def tool(settings: Settings, name: str, *arguments: str, given: bytes = b"") -> bytes:
    """Run one of PostgreSQL's programs against the server of the tests; what it prints."""
    where = {
        "PGHOST": settings.postgre_host,
        "PGPORT": str(settings.postgre_port),
        "PGUSER": settings.postgre_user,
        "PGPASSWORD": settings.postgre_password.get_secret_value(),
    }
    done = subprocess.run([name, *arguments], env=os.environ | where, input=given, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@pytest.fixture
def tools(connection: psycopg.Connection) -> None:
    """pg_dump must not be older than the server."""
    if not all(shutil.which(name) for name in ("pg_dump", "pg_restore")):
        pytest.skip("pg_dump and pg_restore are not installed")
    found = subprocess.run(["pg_dump", "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"(\d+)\.\d+", found)
    assert match is not None
    if int(match[1]) < connection.info.server_version // 10_000:
        pytest.skip(f"{found.strip()} is older than the server")


@pytest.fixture
def restored(settings: Settings, connection: psycopg.Connection, tools: None) -> Iterator[Settings]:
    """Settings for an empty database, which is removed afterwards."""
    drop = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(RESTORED))
    connection.execute(drop)
    connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(RESTORED)))
    yield settings.model_copy(update={"postgre_dbname": RESTORED})
    connection.execute(drop)


def send(settings: Settings, start: int, stop: int) -> None:
    publish(settings, [message(time=minutes(at), temperature=float(at), humidity=50.0) for at in range(start, stop)])


def work(settings: Settings) -> str:
    """Consume and summarise all there is; the consumer's lines."""
    consumed = run_cli(settings, "consume", "--until-caught-up")
    assert consumed.returncode == 0, consumed.stderr
    summarised = run_cli(settings, "etl", "--once")
    assert summarised.returncode == 0, summarised.stderr
    return consumed.stdout + consumed.stderr


def content(connection: psycopg.Connection) -> dict[str, list[tuple[object, ...]]]:
    """The readings and both summaries."""
    return {
        table: connection.execute(f"SELECT * FROM {table} ORDER BY sensor_id, 1, 2").fetchall()
        for table in ("sensor_data", "temperature_summary", "humidity_summary")
    }


def rights(connection: psycopg.Connection) -> set[tuple[object, ...]]:
    """Who may do what on the database itself, besides its owner."""
    return set(
        connection.execute(
            "SELECT grantee::regrole::text, privilege_type FROM pg_database, aclexplode(datacl) "
            "WHERE datname = current_database() AND grantee <> datdba"
        )
    )


def test_a_dump_is_restored_and_the_services_go_on_where_it_ends(
    settings: Settings, connection: psycopg.Connection, restored: Settings
) -> None:
    """Nothing is set back by hand: what came after the dump is read from the topic again, and nothing else."""
    send(settings, 0, 500)
    work(settings)
    dump = tool(settings, "pg_dump", "-Fc", settings.postgre_dbname)
    send(settings, 500, 800)
    work(settings)
    expected = content(connection)
    assert len(expected["sensor_data"]) == 800

    with psycopg.connect(
        connection.info.dsn, dbname=RESTORED, password=connection.info.password, autocommit=True
    ) as new:
        new.execute("CREATE EXTENSION IF NOT EXISTS timescaledb")
        new.execute("SELECT timescaledb_pre_restore()")
        tool(settings, "pg_restore", "-d", RESTORED, "--exit-on-error", given=dump)
        new.execute("SELECT timescaledb_post_restore()")
        page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
        for statement in re.findall(r"'((?:GRANT|REVOKE) [^']* ON DATABASE sensors [^']*)'", page):
            new.execute(statement.replace("DATABASE sensors", f"DATABASE {RESTORED}"))
        new.execute("ANALYZE")
    with psycopg.connect(
        connection.info.dsn, dbname=RESTORED, password=connection.info.password, autocommit=True
    ) as new:
        assert len(content(new)["sensor_data"]) == 500
        assert '"inserted": 300, "updated": 0, "unchanged": 0' in work(restored)
        assert content(new) == expected
        assert rights(new) == RIGHTS
        reconciled = run_cli(restored, "etl", "--reconcile").stdout
        assert set(reconciled.splitlines()) == {f"{name}_summary: 0 rows differed" for name in MEASUREMENTS}
        send(settings, 100, 101)  # and a repeated one
        send(settings, 800, 900)
        assert '"inserted": 100, "updated": 0, "unchanged": 1' in work(restored)
        assert len(content(new)["sensor_data"]) == 900
