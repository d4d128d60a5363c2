"""What each role may do and may not, and the whole pipeline with each service under its own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from psycopg import errors, sql
from pydantic import SecretStr

from services.consumer.sink import Sink
from services.core.config import Settings
from services.core.database import connect
from services.core.measurements import DEFAULT
from services.core.reading import Reading
from services.core.shutdown import Shutdown
from services.etl.reconcile import reconcile
from services.etl.worker import Leader, run_reconcile
from services.status.database import read_database
from tests.fix_services import NOWHERE, StartService, message, publish, wait_until
from tests.fix_stack import downgrade, upgrade
from tests.integration.test_migrations import alembic
from tests.measured import MEASUREMENTS, reading_of, write_to

PASSWORD = "only for this test"
NOW = datetime.now(UTC).replace(second=0, microsecond=0)
ROLES = ("sensor_consumer", "sensor_etl", "sensor_reader")
READERS = ("sensor_grafana", "sensor_dashboard")
SUMMARIES = ("temperature_summary", "humidity_summary", "temperature_summary_live", "humidity_summary_live")
AGGREGATES = {"temperature_10min", "humidity_20min"}


def ago(days: float) -> datetime:
    return NOW - timedelta(days=days)


def under(settings: Settings, role: str) -> Settings:
    """The settings of a service that logs in as ``role``."""
    return settings.model_copy(update={"postgre_user": role, "postgre_password": SecretStr(PASSWORD)})


@pytest.fixture
def logins(settings: Settings, connection: psycopg.Connection) -> Iterator[None]:
    """An operator's lines: sensor_etl gets a password, the others a login role that is a member."""
    connection.execute(f"""
        ALTER ROLE sensor_etl LOGIN PASSWORD '{PASSWORD}';
        CREATE ROLE app_consumer LOGIN PASSWORD '{PASSWORD}' IN ROLE sensor_consumer;
        CREATE ROLE app_etl LOGIN PASSWORD '{PASSWORD}' IN ROLE sensor_etl;
        CREATE ROLE app_reader LOGIN PASSWORD '{PASSWORD}' IN ROLE sensor_reader;
    """)
    yield
    connection.execute("""
        DROP ROLE app_consumer, app_etl, app_reader;
        ALTER ROLE sensor_etl NOLOGIN PASSWORD NULL;
    """)


def store(settings: Settings, *readings: Reading) -> None:
    """Store readings as the consumer does."""
    sink = Sink(settings)
    result = write_to(sink, readings, NOWHERE)
    sink.close()
    assert not result.refused


def summarise(settings: Settings, **changes: object) -> None:
    """What is queued, with ``changes`` of the settings: as ``etl --once`` does."""
    with connect(settings) as connection:
        Leader(connection, settings.model_copy(update=changes)).run_once()


def owners(connection: psycopg.Connection) -> dict[str, str]:
    rows = connection.execute("SELECT view_name, view_owner FROM timescaledb_information.continuous_aggregates")
    return dict(rows.fetchall())


def refused(connection: psycopg.Connection, *statements: str) -> None:
    """None of the statements is allowed."""
    for statement in statements:
        with pytest.raises(errors.InsufficientPrivilege):
            connection.execute(sql.SQL(statement))


@pytest.fixture
def filled(settings: Settings, logins: None) -> None:
    """One reading, summarised."""
    store(settings, reading_of("s1", ago(1), 20.0, 50.0))
    summarise(settings)


@pytest.mark.usefixtures("filled")
def test_the_consumer_sees_no_summary_and_deletes_nothing(settings: Settings) -> None:
    with connect(under(settings, "app_consumer")) as consumer:
        refused(
            consumer,
            *(f"SELECT * FROM {name}" for name in (*SUMMARIES, *AGGREGATES)),
            "SELECT * FROM summary_refresh_queue",
            "SELECT * FROM raw_chunk",
            "SELECT frozen_before FROM summary_state",
            "SELECT * FROM alembic_version",
            "DELETE FROM sensor_data",
            "TRUNCATE sensor_data",
            "DROP TABLE sensor_data",
            "DELETE FROM summary_refresh_queue",
            "UPDATE summary_refresh_queue SET queued_at = now()",
            "UPDATE etl_lease SET holder = 1",
            "UPDATE summary_state SET closed_before = now()",
            "UPDATE summary_state SET measurement = 'other'",
            "DELETE FROM summary_state",
            "DELETE FROM partition_progress",
            "INSERT INTO temperature_summary SELECT 's', now(), now(), 1, 1, 1, 1",
            "SELECT drop_chunks('sensor_data', older_than => now())",
            "CREATE TABLE mine (x int)",
        )


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("role", ["sensor_etl", "app_etl"])
def test_etl_writes_no_reading(settings: Settings, role: str) -> None:
    with connect(under(settings, role)) as etl:
        refused(
            etl,
            "INSERT INTO sensor_data VALUES (now(), 's1', 1, 1)",
            "UPDATE sensor_data SET temperature = 1",
            "DELETE FROM sensor_data",
            "TRUNCATE sensor_data",
            "UPDATE partition_progress SET next_offset = 0",
            "SELECT advance_partitions('t', '{}', '{}', '{}')",
            "UPDATE alembic_version SET version_num = ''",
            "CREATE ROLE another",
            "SELECT * FROM pg_authid",
        )


@pytest.mark.usefixtures("filled")
def test_the_reader_sees_summaries_and_nothing_else(settings: Settings) -> None:
    with connect(under(settings, "app_reader")) as reader:
        for name in SUMMARIES:
            rows = reader.execute(f"SELECT sensor_id FROM {name}").fetchall()
            assert rows == [("s1",)], name
        hidden = (
            "sensor_data",
            *AGGREGATES,
            "summary_refresh_queue",
            "summary_state",
            "partition_progress",
            "raw_chunk",
        )
        refused(reader, *(f"SELECT * FROM {name}" for name in hidden))


@pytest.mark.usefixtures("filled")
def test_a_reader_takes_no_more_of_the_server_than_its_share(settings: Settings) -> None:
    """No disk but for the bounded temporary files of a query, no lock of which others know nothing."""
    with connect(under(settings, "app_reader")) as reader:
        refused(
            reader,
            "CREATE TEMPORARY TABLE mine (x int)",
            "CREATE TABLE mine (x int)",
            "SELECT lo_create(0)",
            "SELECT lo_from_bytea(0, 'x')",
            "SELECT pg_advisory_lock(1)",
            "SELECT pg_try_advisory_xact_lock(1, 2)",
            "SELECT pg_try_advisory_lock_shared(1, 2)",
            "SET temp_file_limit = -1",
        )


@pytest.mark.parametrize("login", READERS)
def test_what_looks_from_outside_is_limited(connection: psycopg.Connection, login: str) -> None:
    row = connection.execute(
        "SELECT rolconnlimit, rolconfig, pg_has_role(oid, 'sensor_reader', 'USAGE') FROM pg_roles WHERE rolname = %s",
        [login],
    ).fetchone()
    assert row is not None
    connections, limits, is_reader = row
    assert 0 < connections <= 10
    assert set(limits) == {
        "statement_timeout=30s",
        "idle_in_transaction_session_timeout=60s",
        "default_transaction_read_only=on",
        "temp_file_limit=1GB",
    }
    assert is_reader


def test_refreshes_leave_no_lines_in_the_server_s_log(connection: psycopg.Connection) -> None:
    """TimescaleDB writes several for each, at a level that is below no other setting."""
    row = connection.execute("SELECT rolconfig FROM pg_roles WHERE rolname = 'sensor_etl'").fetchone()
    assert row == (["log_min_messages=fatal"],)


def test_who_has_no_role_of_ours_may_not_even_connect(connection: psycopg.Connection) -> None:
    connection.execute("CREATE ROLE stranger")
    try:
        rights = "SELECT has_database_privilege('stranger', current_database(), unnest(ARRAY['CONNECT', 'TEMPORARY']))"
        assert connection.execute(rights).fetchall() == [(False,), (False,)]
    finally:
        connection.execute("DROP ROLE stranger")


def test_nobody_logs_in_before_an_operator_says_so(settings: Settings, connection: psycopg.Connection) -> None:
    rows = connection.execute(
        "SELECT rolname, rolcanlogin, rolpassword FROM pg_authid WHERE rolname ~ '^sensor_' AND NOT rolsuper ORDER BY 1"
    ).fetchall()
    assert rows == [(role, False, None) for role in sorted((*ROLES, *READERS))]
    with pytest.raises(Exception, match=r"password authentication failed|not permitted to log in"):
        connect(under(settings, "sensor_etl"))


@pytest.mark.usefixtures("logins")
def test_the_services_work_under_their_own_roles(
    settings: Settings, connection: psycopg.Connection, start: StartService
) -> None:
    start("consume", settings=under(settings, "app_consumer"))
    start("etl", settings=under(settings, "sensor_etl"))
    publish(settings, [message(time=ago(1), temperature=20.0), message(time=ago(2), humidity=50.0)])
    wait_until(lambda: summary_rows(connection) == (1, 1), "both summaries")
    publish(settings, [message(time=ago(1), temperature=21.0), message(time=ago(1), humidity=40.0)])
    wait_until(lambda: summary_rows(connection) == (1, 2), "the second humidity")
    assert connection.execute("SELECT avg_temperature FROM temperature_summary").fetchone() == (21.0,)
    tables = read_database(under(settings, "sensor_etl"), "here").tables
    assert tables is not None
    assert tables.readings.rows.count == 2


def summary_rows(connection: psycopg.Connection) -> tuple[int, int]:
    row = connection.execute(
        "SELECT (SELECT count(*) FROM temperature_summary), (SELECT count(*) FROM humidity_summary)"
    ).fetchone()
    assert row is not None
    return row[0], row[1]


@pytest.mark.usefixtures("logins")
@pytest.mark.parametrize(("first", "then"), [("superuser", "app_etl"), ("sensor_etl", "superuser")])
def test_all_that_etl_does_whoever_began_it(
    settings: Settings, connection: psycopg.Connection, first: str, then: str
) -> None:
    """Retention, compression, a late reading into compressed history, an interval change, repair."""
    consumer = under(settings, "app_consumer")
    one, other = (settings if role == "superuser" else under(settings, role) for role in (first, then))
    store(consumer, *(reading_of("s1", ago(days), float(days), None) for days in (400, 60, 20, 1)))
    policies = {"raw_retention_days": 100, "compress_after_days": 10}
    summarise(one, **policies)
    assert count_chunks(connection) == (3, 2)
    store(consumer, reading_of("s1", ago(20), 21.0, 50.0), reading_of("s2", ago(60), 61.0, 51.0))
    summarise(other, **policies, temperature_interval=15)
    assert owners(connection).items() >= {"temperature_15min": "sensor_etl", "humidity_20min": "sensor_etl"}.items()
    rows = "SELECT sensor_id, avg_temperature FROM temperature_summary ORDER BY avg_temperature"
    assert connection.execute(rows).fetchall() == [("s1", 1), ("s1", 21), ("s1", 60), ("s2", 61), ("s1", 400)]
    connection.execute("DELETE FROM temperature_summary WHERE avg_temperature = 21")
    changed = other.model_copy(update=policies | {"temperature_interval": 15})
    assert run_reconcile(changed, Shutdown()) == dict.fromkeys(MEASUREMENTS, 0) | {"temperature": 1}
    assert len(connection.execute(rows).fetchall()) == 5


def count_chunks(connection: psycopg.Connection) -> tuple[int, int]:
    """Chunks of readings, and how many of them are compressed."""
    row = connection.execute(
        "SELECT count(*), count(*) FILTER (WHERE is_compressed) FROM timescaledb_information.chunks"
        " WHERE hypertable_name = 'sensor_data'"
    ).fetchone()
    assert row is not None
    return row[0], row[1]


@contextmanager
def owned_by(connection: psycopg.Connection, settings: Settings, owner: str) -> Iterator[None]:
    """The database, empty and without a schema, is another role's, as a hosted one would be."""
    connection.execute(f"""
        DROP TABLE alembic_version;
        CREATE ROLE {owner} LOGIN CREATEROLE PASSWORD '{PASSWORD}';
        ALTER DATABASE {settings.postgre_dbname} OWNER TO {owner};
    """)
    try:
        yield
    finally:
        connection.execute(f"""
            ALTER DATABASE {settings.postgre_dbname} OWNER TO {settings.postgre_user};
            DROP OWNED BY {owner} CASCADE;
            DROP ROLE {owner};
        """)


def test_the_owner_of_the_database_needs_no_superuser(settings: Settings, connection: psycopg.Connection) -> None:
    """The owner of the database migrates, and runs the services as itself."""
    downgrade(settings)
    try:
        with owned_by(connection, settings, "hosted"):
            hosted = under(settings, "hosted")
            upgrade(hosted)
            store(hosted, *(reading_of("s1", ago(days), float(days), 50.0) for days in (400, 20, 1)))
            summarise(hosted, compress_after_days=10, raw_retention_days=100)
            store(hosted, reading_of("s1", ago(20), 21.0, None))
            summarise(hosted, compress_after_days=10, raw_retention_days=100, humidity_interval=40)
            assert summary_rows(connection) == (3, 3)
            assert count_chunks(connection) == (2, 1)
            with connect(hosted) as own:
                assert reconcile(own, DEFAULT, lambda: None, Shutdown()) == dict.fromkeys(DEFAULT, 0)
                own.execute("DELETE FROM sensor_data")  # as its owner always could
            downgrade(hosted)
    finally:
        upgrade(settings)


def test_what_only_a_superuser_may_do_is_one_line_to_run(settings: Settings, connection: psycopg.Connection) -> None:
    """Who owns the database and nothing else is told all that is missing, and needs no more than that."""
    downgrade(settings)
    try:
        with owned_by(connection, settings, "hosted"):
            connection.execute("ALTER ROLE hosted NOCREATEROLE")
            hosted = under(settings, "hosted")
            done = alembic(hosted, "upgrade", "head", LOG_LEVEL="ERROR")
            assert done.returncode == 2
            (line,) = done.stderr.splitlines()
            told = re.fullmatch(r"error: hosted may not create roles; as a superuser, run: (.*)", line)
            assert told, line
            connection.execute(told[1])
            done = alembic(hosted, "upgrade", "head", LOG_FORMAT="json")
            assert done.returncode == 0, done.stderr
            (warning,) = (line for line in done.stderr.splitlines() if "superuser_needed" in line)
            connection.execute(json.loads(warning)["sql"])
            store(hosted, reading_of("s1", ago(1), 1.0, 50.0))
            summarise(hosted)
            assert summary_rows(connection) == (1, 1)
            for login in READERS:
                test_what_looks_from_outside_is_limited(connection, login)
            connection.execute(f"GRANT {', '.join(ROLES)} TO hosted WITH ADMIN OPTION")
            downgrade(hosted)
            connection.execute(f"DROP OWNED BY {', '.join(ROLES)}; DROP ROLE {', '.join((*ROLES, *READERS))}")
    finally:
        upgrade(settings)


def test_roles_that_a_dba_has_made_are_enough(settings: Settings, connection: psycopg.Connection) -> None:
    """Who migrates needs no right to create roles where they exist and it is a member of them."""
    downgrade(settings)
    roles = ", ".join(ROLES)
    try:
        with owned_by(connection, settings, "hosted"):
            connection.execute("ALTER ROLE hosted NOCREATEROLE")
            connection.execute("CREATE ROLE sensor_consumer; CREATE ROLE sensor_etl LOGIN; CREATE ROLE sensor_reader")
            connection.execute(f"GRANT {roles} TO hosted WITH ADMIN OPTION")
            hosted = under(settings, "hosted")
            upgrade(hosted)
            store(hosted, reading_of("s1", ago(1), 1.0, 50.0))
            summarise(hosted)
            assert summary_rows(connection) == (1, 1)
            downgrade(hosted)
            connection.execute(f"DROP ROLE IF EXISTS {roles}")
    finally:
        upgrade(settings)
