"""The recipes of CONTRIBUTING.md, followed word by word in a copy of the tree, on a database of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from services.consumer.sink import Sink
from services.core.config import Settings
from services.core.database import connect
from services.etl.worker import Leader
from tests.fix_services import NOWHERE, START
from tests.fix_stack import ROOT, is_native, make_stack, upgrade
from tests.measured import MEASUREMENTS, reading_of, write_to

GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", ".local", ".*_cache", "__pycache__", "node_modules", "*.egg-info")


@pytest.fixture(scope="module")
def database(servers: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Settings of the session's Kafka and of a database that a recipe may change; with readings and summaries."""
    if is_native():
        pytest.skip("the databases of servers that TEST_* name keep their schema")
    stack = make_stack(tmp_path_factory.mktemp("recipe"))
    stack.timescaledb.start()
    try:
        stack.timescaledb.wait_ready()
        settings = servers.model_copy(
            update={
                "postgre_port": stack.timescaledb.port,
                "kafka_topic": f"recipe_{os.getpid()}",
                "kafka_group": f"recipe_{os.getpid()}",
            }
        )
        upgrade(settings)
        sink = Sink(settings)
        write_to(
            sink, [reading_of("s1", START, 20.0, 50.0), reading_of("s1", START.replace(hour=5), 21.0, None)], NOWHERE
        )
        sink.close()
        with connect(settings) as connection:
            Leader(connection, settings).run_once()
        yield settings
    finally:
        stack.timescaledb.stop()


class Follower:
    """Somebody who does what a recipe says, in a clone of their own."""

    def __init__(self, title: str, settings: Settings, directory: Path) -> None:
        begin = GUIDE.index(f"### {title}\n")
        self.text = GUIDE[begin : GUIDE.find("\n### ", begin) % (len(GUIDE) + 1)]
        self.clone = directory / "clone"
        self.results: list[list[tuple[object, ...]]] = []
        self._settings = settings
        shutil.copytree(ROOT, self.clone, ignore=NOT_COPIED)
        (apply,) = re.findall(r"^\$ (sed .* git apply)$", GUIDE, re.MULTILINE)
        self.type(apply.replace("### Add a setting", f"### {title}"))
        self.type("ruff check --quiet . && ruff format --quiet --check .")

    def follow(self) -> None:
        """Every block after the diffs, in order."""
        for kind, text in BLOCK.findall(self.text):
            match kind:
                case "console":
                    for command in re.findall(r"^\$ (.*)$", text, re.MULTILINE):
                        self.type(command)
                case "python":
                    (name,) = re.findall(r"Save that as `(\w+\.py)`", self.text)
                    (self.clone / name).write_text(text, encoding="utf-8")
                case "sql":
                    self.results.append(self.ask(text))
                case "":
                    assert [as_psql(row) for row in self.results[-1]] == cells(text)

    def type(self, command: str) -> str:
        """A line of the shell, which must succeed; its output."""
        programs = Path(sys.executable).parent
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=self.clone,
            env=os.environ
            | self._settings.as_environment()
            | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(self.clone)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        return done.stdout

    def ask(self, query: str, role: str = "postgres") -> list[tuple[object, ...]]:
        """The rows of a query."""
        with connect(self._settings) as connection:
            connection.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
            return connection.execute(query.encode()).fetchall()


def cells(table: str) -> list[list[str]]:
    """The rows of a table as psql prints it."""
    return [[cell.strip() for cell in line.split("|")] for line in table.splitlines()[2:]]


def as_psql(row: tuple[object, ...]) -> list[str]:
    return [f"{value:%Y-%m-%d %H:%M:%S}+00" if isinstance(value, datetime) else f"{value:g}" for value in row]


def summaries(connection: psycopg.Connection) -> dict[str, list[tuple[object, ...]]]:
    """The rows of the tables and the live views of all metrics that there were before any recipe."""
    names = [f"{metric}_summary{suffix}" for metric in MEASUREMENTS for suffix in ("", "_live")]
    query = sql.SQL("SELECT * FROM {} WHERE sensor_id = 's1' ORDER BY interval_start")
    return {name: connection.execute(query.format(sql.Identifier(name))).fetchall() for name in names}


@pytest.mark.slow
def test_the_recipe_for_a_setting_works_word_by_word(database: Settings, tmp_path: Path) -> None:
    follower = Follower("Add a setting", database, tmp_path)
    follower.follow()
    shown = follower.type(
        "python -c 'from services.core.kafka import *; from services.core.config import *;"
        ' print(client_settings(load_settings(), "x")["client.rack"])\''
    )
    assert shown.strip() == ""


@pytest.mark.slow
def test_the_recipe_for_a_migration_works_word_by_word(database: Settings, tmp_path: Path) -> None:
    follower = Follower("Add a migration", database, tmp_path)
    follower.follow()
    try:
        newest = follower.ask("SELECT * FROM newest_interval", "sensor_reader")
    finally:
        follower.type("alembic downgrade -1")
    assert newest == [("s1", START.replace(hour=5))]
