"""The servers under test: a local stack started for the session, or native ones that the environment names.

Set TEST_POSTGRE_HOST (with _PORT, _USER, _PASSWORD, _DBNAME) and TEST_KAFKA_HOST (with _PORT) to run the same
tests against servers of your own. The database is emptied by the tests.
"""

from __future__ import annotations

import itertools
import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest
from alembic import command
from alembic.config import Config
from confluent_kafka.admin import AdminClient
from psycopg import sql
from pydantic import SecretStr

from services.core.config import Settings
from services.core.database import connect
from services.core.kafka import client_settings, create_topics
from services.core.shutdown import Shutdown
from services.etl.rollup import BASE
from services.local.security import Security
from services.local.servers import free_port as free_port
from services.local.stack import Stack
from tests import ROOT as ROOT
from tests.measured import MEASUREMENTS, make_settings

_numbers = itertools.count(1)


def answers(settings: Settings, dbname: str) -> bool:
    """Whether somebody lets us in at the database's address."""
    with suppress(psycopg.OperationalError):
        psycopg.connect(
            host=settings.postgre_host,
            port=settings.postgre_port,
            user=settings.postgre_user,
            password=settings.postgre_password.get_secret_value(),
            dbname=dbname,
        ).close()
        return True
    return False


def is_native() -> bool:
    """Whether the environment names servers to test against."""
    return "TEST_POSTGRE_HOST" in os.environ and "TEST_KAFKA_HOST" in os.environ


def native_settings() -> Settings:
    """The settings of the servers that TEST_* name."""
    return make_settings(
        postgre_host=os.environ["TEST_POSTGRE_HOST"],
        postgre_port=int(os.environ.get("TEST_POSTGRE_PORT", "5432")),
        postgre_user=os.environ.get("TEST_POSTGRE_USER", "postgres"),
        postgre_password=SecretStr(os.environ.get("TEST_POSTGRE_PASSWORD", "postgres")),
        postgre_dbname=os.environ.get("TEST_POSTGRE_DBNAME", "sensors_test"),
        kafka_host=os.environ["TEST_KAFKA_HOST"],
        kafka_port=int(os.environ.get("TEST_KAFKA_PORT", "9092")),
    )


def make_stack(directory: Path, security: Security | None = None) -> Stack:
    """A local stack with its own data and ports; not started."""
    return Stack(directory, make_settings(kafka_port=free_port(), postgre_port=free_port()), security)


def stack_settings(stack: Stack) -> Settings:
    """Settings that reach a local stack."""
    return make_settings(
        postgre_host="127.0.0.1",
        postgre_port=stack.timescaledb.port,
        kafka_host="127.0.0.1",
        kafka_port=stack.kafka.port,
    )


def upgrade(settings: Settings, revision: str = "head") -> None:
    """Run the migrations, as ``alembic upgrade`` does."""
    with alembic_environment(settings):
        command.upgrade(Config(toml_file=str(ROOT / "pyproject.toml")), revision)


def downgrade(settings: Settings, revision: str = "base") -> None:
    """Take the migrations back with all data, as ``alembic -x drop_data=yes downgrade`` does."""
    with alembic_environment(settings):
        word = Namespace(x=["drop_data=yes"])
        command.downgrade(Config(toml_file=str(ROOT / "pyproject.toml"), cmd_opts=word), revision)


@contextmanager
def alembic_environment(settings: Settings) -> Iterator[None]:
    """The settings as environment variables, for as long as the block runs."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.as_environment().items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack | None]:
    """The running local stack of this session; None when the environment names servers."""
    if is_native():
        yield None
        return
    with make_stack(tmp_path_factory.mktemp("stack")) as stack:
        yield stack


@pytest.fixture(scope="session")
def servers(stack: Stack | None) -> Settings:
    """Settings of running servers whose database is migrated to head."""
    settings = native_settings() if stack is None else stack_settings(stack)
    upgrade(settings)
    return settings


@pytest.fixture
def own_stack(stack: Stack | None) -> Stack:
    """The local stack, for a test that kills servers; servers of yours are left alone."""
    if stack is None:
        pytest.skip("the servers that TEST_* name are not killed")
    return stack


@pytest.fixture(scope="session")
def native() -> None:
    """For a test that needs transactions at the same time, which the embedded database does not have."""
    if not is_native():
        pytest.skip("the embedded database runs one statement at a time: name a native server with TEST_POSTGRE_*")


@pytest.fixture(scope="session")
def kafka_admin(servers: Settings) -> AdminClient:
    """A client that creates topics."""
    return AdminClient(client_settings(servers, "test"))


@pytest.fixture
def settings(servers: Settings, request: pytest.FixtureRequest) -> Settings:
    """Settings of this test alone: empty tables, topics (unless it is ``without_topics``) and a group of its own."""
    with connect(servers) as connection:
        empty(connection)
    number = next(_numbers)
    own = servers.model_copy(
        update={
            "kafka_topic": f"sensor_data_{os.getpid()}_{number}",
            "kafka_group": f"group_{os.getpid()}_{number}",
            "kafka_partitions": 3,
            "consumer_batch_seconds": 0.1,
            "etl_poll_seconds": 0.1,
            "log_format": "json",
        }
    )
    if request.node.get_closest_marker("without_topics") is None:
        create_topics(request.getfixturevalue("kafka_admin"), own, shutdown=Shutdown())
    return own


@pytest.fixture
def connection(settings: Settings) -> Iterator[psycopg.Connection]:
    """A connection in autocommit mode to the test's empty database."""
    with connect(settings) as connection:
        yield connection


@pytest.fixture
def no_tables(settings: Settings) -> Iterator[None]:
    """A database before its first migration."""
    downgrade(settings)
    yield
    upgrade(settings)


def empty(connection: psycopg.Connection) -> None:
    """Leave the schema and remove all rows and all aggregates."""
    views = connection.execute(  # those that are built on others first
        "SELECT view_name FROM timescaledb_information.continuous_aggregates ORDER BY starts_with(view_name, %s)",
        [BASE],
    ).fetchall()
    for metric in MEASUREMENTS:
        connection.execute(f"CREATE OR REPLACE VIEW {metric}_summary_live AS SELECT * FROM {metric}_summary")
    for (name,) in views:
        connection.execute(sql.SQL("DROP MATERIALIZED VIEW {}").format(sql.Identifier(name)))
    summaries = ", ".join(f"{metric}_summary" for metric in MEASUREMENTS)
    connection.execute(
        f"TRUNCATE sensor_data, summary_refresh_queue, {summaries}, summary_state, raw_chunk, summary_check,"
        " partition_progress"
    )
    connection.execute("UPDATE etl_lease SET holder = 0, expires_at = '-infinity'")


def remove_measurement(connection: psycopg.Connection, name: str) -> None:
    """Take a measurement out of the schema; removes all rows, too."""
    connection.execute(f"DROP VIEW IF EXISTS {name}_summary_live")
    empty(connection)
    connection.execute(f"DROP TABLE IF EXISTS {name}_summary")
    connection.execute(f"ALTER TABLE sensor_data DROP COLUMN IF EXISTS {name}")


def pytest_report_collectionfinish() -> str:
    """Which servers are under test."""
    if is_native():
        settings = native_settings()
        with connect(settings) as connection:
            version = connection.execute("SHOW server_version").fetchone()
        assert version is not None
        return f"servers: Kafka {settings.bootstrap_servers}, PostgreSQL {version[0]} at {settings.postgre_host}"
    return "servers: a local stack of Apache Kafka and embedded TimescaleDB, started for this session"
