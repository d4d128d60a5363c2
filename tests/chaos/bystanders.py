"""Sessions that are no part of the pipeline and must not stop it: a report that stays open, a dump."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psycopg
from psycopg import Connection

from services.core.config import Settings
from services.core.database import connection_arguments
from tests.fix_services import PATIENCE_S

MAX_OPEN_S = 4.0
MAX_PAUSE_S = 1.0


class Bystander:
    """Does ``turn`` again and again in a thread, over a connection with a server's defaults."""

    def __init__(self, settings: Settings, turn: Callable[[Connection, Bystander], None], seed: int) -> None:
        self.settings = settings
        self.random = random.Random(seed)  # noqa: S311 - reproducible, not secret
        self.turns = 0
        self.errors: list[str] = []
        self.filled: set[str] = set()  # summaries that have had rows
        self._turn = turn
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @contextmanager
    def running(self) -> Iterator[None]:
        """As long as the block runs."""
        self._thread.start()
        try:
            yield
        finally:
            self._end.set()
            self._thread.join(PATIENCE_S)
            assert not self._thread.is_alive(), "the database does not answer"

    def pause(self, max_s: float) -> None:
        """Stay as it is for a random time."""
        self._end.wait(self.random.uniform(0.2, max_s))

    def _run(self) -> None:
        while not self._end.is_set():
            try:
                with psycopg.connect(**connection_arguments(self.settings)) as connection:
                    while not self._end.is_set():
                        self._turn(connection, self)
                        self.turns += 1
                        self.pause(MAX_PAUSE_S)
            except (psycopg.Error, AssertionError) as error:
                self.errors.append(" ".join(str(error).split()))
                self._end.wait(0.5)


def read_live_view(connection: Connection, bystander: Bystander) -> None:
    """A report in a transaction that somebody forgets to end for a while."""
    for metric in ("temperature", "humidity"):
        counts = "count(*), count(DISTINCT (sensor_id, interval_start))"
        row = connection.execute(f"SELECT {counts} FROM {metric}_summary_live").fetchone()
        assert row is not None
        assert row[0] == row[1], f"{metric}_summary_live: {row[0]} rows of {row[1]} intervals"
        assert row[0] or metric not in bystander.filled, f"{metric}_summary_live is empty"
        bystander.filled |= {metric} if row[0] else set()
        bystander.pause(MAX_OPEN_S / 2)
    connection.commit()


def read_live_view_at_once(connection: Connection, bystander: Bystander) -> None:
    """Where an open transaction stops everybody: the embedded database."""
    connection.autocommit = True
    for metric in ("temperature", "humidity"):
        connection.execute(f"SELECT count(*) FROM {metric}_summary_live")


def dump(connection: Connection, bystander: Bystander) -> None:
    """A backup: with pg_dump if there is one that fits the server, else with the locks it would take."""
    program = find_pg_dump(connection)
    connection.commit()
    if program is None:
        dump_by_hand(connection, bystander)
        return
    settings = bystander.settings
    place = ["--host", settings.postgre_host, "--port", str(settings.postgre_port)]
    done = subprocess.run(
        [program, *place, "-U", settings.postgre_user, "--file", os.devnull, settings.postgre_dbname],
        env=os.environ | {"PGPASSWORD": settings.postgre_password.get_secret_value()},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:  # a table was dropped between its being listed and locked
        bystander.errors.append(done.stderr.strip().splitlines()[0] if done.stderr else "pg_dump failed")


def find_pg_dump(connection: Connection) -> str | None:
    """A pg_dump that is not older than the server."""
    program = shutil.which("pg_dump")
    if program is None:
        return None
    stated = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\d+", stated)
    return program if found and int(found[0]) >= connection.info.server_version // 10_000 else None


def dump_by_hand(connection: Connection, bystander: Bystander) -> None:
    """Lock every table as a reader does, and read them for seconds."""
    tables = connection.execute(
        "SELECT format('%I.%I', nspname, relname) FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace"
        " WHERE relkind IN ('r', 'p') AND nspname IN ('public', '_timescaledb_internal', '_timescaledb_catalog')"
    ).fetchall()
    for (table,) in tables:
        # One that was dropped by now must not end the transaction.
        with suppress(psycopg.errors.UndefinedTable), connection.transaction():
            connection.execute(f"LOCK TABLE ONLY {table} IN ACCESS SHARE MODE")
            connection.execute(f"SELECT count(*) FROM ONLY {table}")
    bystander.pause(MAX_OPEN_S)
    connection.commit()
