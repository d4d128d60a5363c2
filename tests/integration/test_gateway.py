"""The gateway in front of the embedded TimescaleDB behaves like a PostgreSQL server towards its clients."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from socket import create_connection
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import errors, pq
from psycopg_pool import ConnectionPool
from sqlalchemy import create_engine, text

from services.core.errors import PermanentError
from services.local.servers import HOST, free_port
from services.local.timescaledb import TimescaleDB

ROOT = Path(__file__).parents[2]
USER, PASSWORD, DBNAME = "keeper", "correct horse", "sensors"

ADVISORY_LOCKS: LiteralString = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"

Connect = Callable[..., psycopg.Connection[Any]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TimescaleDB]:
    directory = tmp_path_factory.mktemp("gateway")
    server = TimescaleDB(directory, free_port(), USER, PASSWORD, DBNAME)
    server.start()
    server.wait_ready()
    yield server
    server.stop()


@pytest.fixture
def connect(server: TimescaleDB) -> Iterator[Connect]:
    opened: list[psycopg.Connection[Any]] = []

    def connect(**settings: Any) -> psycopg.Connection[Any]:
        defaults: dict[str, Any] = {"user": USER, "password": PASSWORD, "dbname": DBNAME, "autocommit": True}
        connection = psycopg.connect(host=HOST, port=server.port, **(defaults | settings))
        opened.append(connection)
        return connection

    yield connect
    for connection in opened:
        connection.close()


@pytest.fixture
def table(connect: Connect) -> str:
    connect().execute("DROP TABLE IF EXISTS t; CREATE TABLE t (a int PRIMARY KEY, b text)")
    return "t"


def value(connection: psycopg.Connection[Any], statement: LiteralString, *parameters: Any) -> Any:
    row = connection.execute(statement, parameters or None).fetchone()
    assert row is not None
    return row[0]


def eventually(connection: psycopg.Connection[Any], statement: LiteralString, wanted: object) -> None:
    """A server learns of a closed connection a moment later than the client that closed it."""
    deadline = time.monotonic() + 5
    while (found := value(connection, statement)) != wanted:
        assert time.monotonic() < deadline, f"{statement}: {found!r}, not {wanted!r}"


def copy_rows(connection: psycopg.Connection[Any], rows: Iterable[tuple[int, str]]) -> None:
    with connection.cursor().copy("COPY t FROM STDIN") as copy:
        for row in rows:
            copy.write_row(row)


class TestLogin:
    def test_database_user_and_version_are_real(self, connect: Connect) -> None:
        connection = connect()
        assert value(connection, "SELECT current_database()") == DBNAME
        assert value(connection, "SELECT current_user") == USER
        assert value(connection, "SELECT session_user") == USER
        assert value(connection, "SHOW server_version").startswith("17.")
        assert connection.info.server_version // 10000 == 17
        assert value(connection, "SELECT extversion FROM pg_extension WHERE extname = 'timescaledb'")

    @pytest.mark.parametrize(
        ("settings", "state"),
        [
            ({"password": "wrong"}, "28P01"),
            ({"user": "nobody"}, "28P01"),
            ({"dbname": "other"}, "3D000"),
        ],
    )
    def test_wrong_credentials_and_database_are_refused(
        self, connect: Connect, settings: dict[str, str], state: str
    ) -> None:
        with pytest.raises(psycopg.OperationalError) as caught:
            connect(**settings)
        messages = {"28P01": "password authentication failed", "3D000": 'database "other" does not exist'}
        assert messages[state] in str(caught.value)

    def test_roles_log_in_and_have_no_more_than_was_granted(self, connect: Connect, table: str) -> None:
        owner = connect()
        owner.execute("DROP ROLE IF EXISTS reader")
        owner.execute("CREATE ROLE reader LOGIN PASSWORD 'let me in'")
        owner.execute("GRANT SELECT ON t TO reader")
        reader = connect(user="reader", password="let me in")
        assert value(reader, "SELECT current_user") == "reader"
        assert value(reader, "SELECT count(*) FROM t") == 0
        with pytest.raises(errors.InsufficientPrivilege):
            reader.execute("INSERT INTO t VALUES (1, 'x')")
        assert value(owner, "SELECT current_user") == USER  # and the owner stays itself
        owner.execute("INSERT INTO t VALUES (1, 'x')")
        reader.execute("RESET SESSION AUTHORIZATION")
        assert value(reader, "SELECT current_user") == "reader"
        reader.close()
        owner.execute("DROP OWNED BY reader; DROP ROLE reader")
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            connect(user="reader", password="let me in")

    def test_role_without_login_is_refused(self, connect: Connect) -> None:
        connect().execute("CREATE ROLE sleeper PASSWORD 'x'")
        with pytest.raises(psycopg.OperationalError, match="not permitted to log in"):
            connect(user="sleeper", password="x")

    def test_many_idle_connections(self, connect: Connect) -> None:
        connections = [connect() for _ in range(200)]
        pids = {value(connection, "SELECT pg_backend_pid()") for connection in connections}
        assert pids == {connection.info.backend_pid for connection in connections}
        assert len(pids) == 200


class TestSessionState:
    def test_settings_are_kept_apart(self, connect: Connect) -> None:
        one, two = connect(options="-c timezone=Asia/Tokyo"), connect(application_name="two")
        one.execute("SET work_mem = '8MB'")
        two.execute("SELECT set_config('lock_timeout', %s, false)", ["2s"])
        assert value(two, "SHOW work_mem") == "4MB"
        assert value(one, "SHOW work_mem") == "8MB"
        assert value(one, "SHOW timezone") == "Asia/Tokyo"
        assert value(two, "SHOW timezone") != "Asia/Tokyo"
        assert value(two, "SHOW application_name") == "two"
        assert value(one, "SHOW lock_timeout") == "0"
        assert value(two, "SHOW lock_timeout") == "2s"

    def test_reset_returns_to_what_the_connection_started_with(self, connect: Connect) -> None:
        one = connect(options="-c timezone=Asia/Tokyo")
        one.execute("SET timezone = 'Europe/Berlin'")
        assert str(one.info.timezone) == "Europe/Berlin"  # reported as it changes
        one.execute("RESET timezone")
        assert value(one, "SHOW timezone") == "Asia/Tokyo"
        one.execute("SET work_mem = '8MB'")
        one.execute("RESET ALL")
        assert value(one, "SHOW work_mem") == "4MB"
        assert value(one, "SHOW timezone") == "Asia/Tokyo"

    def test_settings_of_a_rolled_back_transaction_are_gone(self, connect: Connect) -> None:
        one, two = connect(), connect()
        with one.transaction(force_rollback=True):
            one.execute("SET work_mem = '8MB'")
        with one.transaction():
            one.execute("SET LOCAL work_mem = '9MB'")
            assert value(one, "SHOW work_mem") == "9MB"
        assert value(two, "SHOW work_mem") == "4MB"
        assert value(one, "SHOW work_mem") == "4MB"

    def test_default_search_path_and_planner(self, connect: Connect) -> None:
        one = connect()
        one.execute("SET search_path TO pg_catalog; RESET ALL")
        assert value(one, "SHOW search_path") == '"$user", public'
        assert value(one, "SHOW enable_seqscan") == "on"

    def test_prepared_statements_are_kept_apart(self, connect: Connect) -> None:
        one, two = connect(), connect()
        one.prepare_threshold = two.prepare_threshold = 0
        for number in range(20):
            assert value(one, "SELECT %s::int", number) == number
            assert value(two, "SELECT %s::text || 'x'", str(number)) == f"{number}x"
        one.execute("PREPARE mine AS SELECT 1")
        two.execute("PREPARE mine AS SELECT 2", prepare=False)
        assert value(one, "EXECUTE mine") == 1
        assert value(two, "EXECUTE mine") == 2
        one.execute("DEALLOCATE ALL")
        with pytest.raises(errors.InvalidSqlStatementName):
            one.execute("EXECUTE mine", prepare=False)
        assert value(two, "EXECUTE mine") == 2
        assert value(two, "SELECT %s::text || 'x'", "1") == "1x"
        one.close()
        two.close()
        bystander = connect(prepare_threshold=None)
        eventually(bystander, "SELECT count(*) FROM pg_prepared_statements", 0)

    @pytest.mark.parametrize("statement", ["LISTEN news", "UNLISTEN *", "DISCARD ALL", "discard temp;"])
    def test_what_would_reach_other_connections_is_refused(self, connect: Connect, statement: LiteralString) -> None:
        one, two = connect(), connect()
        one.execute("SET work_mem = '8MB'")
        for connection, parameters in ((one, None), (two, None), (two, [])):
            with pytest.raises(errors.FeatureNotSupported, match="not supported by the gateway"):
                connection.execute(statement, parameters)
        with pytest.raises(errors.FeatureNotSupported), two.transaction():
            two.execute(statement)
        assert value(one, "SHOW work_mem") == "8MB"

    def test_pipeline(self, connect: Connect, table: str) -> None:
        connection = connect(autocommit=False)
        with connection.pipeline():
            for number in range(100):
                connection.execute("INSERT INTO t VALUES (%s, 'x')", [number])
            count = connection.execute("SELECT count(*) FROM t")
        assert count.fetchone() == (100,)
        connection.rollback()
        connection.execute("DROP TABLE t")  # makes psycopg send DEALLOCATE ALL
        with connection.pipeline():
            assert connection.execute("SELECT %s::int", [1]).fetchone() == (1,)
        connection.rollback()

    def test_sqlalchemy_and_pool(self, server: TimescaleDB) -> None:
        engine = create_engine(f"postgresql+psycopg://{USER}:{PASSWORD}@{HOST}:{server.port}/{DBNAME}")
        with engine.begin() as connection:
            assert connection.execute(text("SELECT 1")).scalar() == 1
        engine.dispose()
        conninfo = f"host={HOST} port={server.port} user={USER} password='{PASSWORD}' dbname={DBNAME}"
        with ConnectionPool(conninfo, min_size=2, max_size=4, open=True) as pool:

            def add(number: int) -> int:
                with pool.connection() as connection:
                    return int(value(connection, "SELECT %s + 1", number))

            with ThreadPoolExecutor(8) as threads:
                assert list(threads.map(add, range(100))) == list(range(1, 101))


class TestTransactions:
    def test_failed_transaction_stays_with_its_connection(self, connect: Connect, table: str) -> None:
        one, two = connect(autocommit=False), connect()
        with pytest.raises(errors.DivisionByZero):
            one.execute("SELECT 1 / 0")
        with pytest.raises(errors.InFailedSqlTransaction):
            one.execute("SELECT 1")
        one.rollback()
        assert value(two, "SELECT 1") == 1
        assert value(one, "SELECT 1") == 1
        one.rollback()

    def test_transactions_of_threads_do_not_mix(self, connect: Connect, table: str) -> None:
        def write(worker: int) -> None:
            connection = connect(autocommit=False)
            for number in range(10):
                connection.execute("INSERT INTO t VALUES (%s, 'x')", [worker * 100 + number])
                connection.execute("INSERT INTO t VALUES (%s, 'x')", [worker * 100 + 50 + number])
                (connection.commit if worker % 2 else connection.rollback)()

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(write, range(4)))
        assert value(connect(), "SELECT count(*) FROM t") == 40

    def test_killed_client_leaves_nothing_behind(self, server: TimescaleDB, connect: Connect, table: str) -> None:
        other = connect()
        script = (
            f"import psycopg; c = psycopg.connect(host={HOST!r}, port={server.port}, user={USER!r},"
            f" password={PASSWORD!r}, dbname={DBNAME!r});"
            " c.execute('SELECT pg_try_advisory_lock_shared(9, pg_backend_pid())');"
            " c.commit(); c.execute(\"INSERT INTO t VALUES (1, 'x')\"); print('in', flush=True); input()"
        )
        with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == b"in\n"
            client.send_signal(signal.SIGKILL)
        eventually(other, ADVISORY_LOCKS, 0)
        assert value(other, "SELECT count(*) FROM t") == 0

    @pytest.mark.parametrize("fails", [False, True])
    def test_unfinished_unit_of_a_closed_client_is_rolled_back(self, connect: Connect, table: str, fails: bool) -> None:
        other, client = connect(), connect()
        client.pgconn.enter_pipeline_mode()
        client.pgconn.send_query_params(b"INSERT INTO t VALUES (1, $1)", [b"x"])
        client.pgconn.send_query_params(b"SELECT 1 / $1::int", [b"0" if fails else b"1"])
        client.pgconn.send_flush_request()  # and no Sync
        client.pgconn.flush()
        result = client.pgconn.get_result()
        assert result is not None
        assert result.status == pq.ExecStatus.COMMAND_OK
        client.close()
        assert value(other, "SELECT count(*) FROM t") == 0

    def test_isolation_level_may_follow_a_setting(self, connect: Connect) -> None:
        connection = connect()
        connection.execute("BEGIN")
        connection.execute("SET LOCAL work_mem = '8MB'")
        connection.execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
        assert value(connection, "SHOW transaction_isolation") == "serializable"
        connection.execute("ROLLBACK")


class TestAdvisoryLocks:
    @pytest.mark.parametrize("threshold", [None, 0])
    def test_a_shared_lock_lasts_as_long_as_its_connection(self, connect: Connect, threshold: int | None) -> None:
        one, two = connect(autocommit=False), connect()
        one.prepare_threshold = two.prepare_threshold = threshold
        for connection in (one, one, two):
            assert value(connection, "SELECT pg_try_advisory_lock_shared(%s, pg_backend_pid())", 7) is True
            connection.rollback()
        held = "SELECT classid::int, objid::int FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 2"
        pids = [connection.info.backend_pid for connection in (one, two)]
        assert sorted(two.execute(held)) == [(7, pid) for pid in pids]
        one.close()
        three = connect()
        assert three.execute(held).fetchall() == [(7, pids[1])]
        two.close()
        eventually(three, ADVISORY_LOCKS, 0)

    @pytest.mark.parametrize(
        "function",
        [
            "pg_advisory_lock(1)",
            "pg_try_advisory_lock(1, 2)",
            "pg_try_advisory_xact_lock(1)",
            "pg_try_advisory_lock_shared(1)",
            "pg_advisory_unlock_all()",
        ],
    )
    def test_locks_that_one_backend_cannot_keep_apart_are_refused(
        self, connect: Connect, function: LiteralString
    ) -> None:
        connection = connect()
        with pytest.raises(errors.FeatureNotSupported, match="advisory"):
            connection.execute(f"SELECT {function}")
        assert value(connection, ADVISORY_LOCKS) == 0


class TestCopy:
    @pytest.mark.parametrize("autocommit", [True, False])
    def test_text_in_and_out(self, connect: Connect, table: str, autocommit: bool) -> None:
        connection = connect(autocommit=autocommit)
        cursor = connection.cursor()
        with cursor.copy("COPY t FROM STDIN") as copy:
            for number in range(1000):
                copy.write_row((number, "x" * (number % 50)))
        assert cursor.rowcount == 1000
        with cursor.copy("COPY (SELECT * FROM t ORDER BY a) TO STDOUT") as copy:
            rows = list(copy.rows())
        assert rows == [(str(number), "x" * (number % 50)) for number in range(1000)]
        connection.rollback()
        assert value(connection, "SELECT count(*) FROM t") == (1000 if autocommit else 0)

    def test_csv_and_extended_protocol(self, connect: Connect, table: str) -> None:
        cursor = connect().cursor()
        with cursor.copy("COPY t FROM STDIN (FORMAT csv)") as copy:
            copy.write("1,a\n2,b\n")
        with cursor.copy("COPY (SELECT b FROM t WHERE a = %s) TO STDOUT", [2]) as copy:
            assert b"".join(bytes(part) for part in copy) == b"b\n"
        pgconn = cursor.connection.pgconn
        # COPY FROM STDIN sent by Parse, Bind, Execute, Sync
        assert pgconn.exec_params(b"COPY t FROM STDIN", None).status == pq.ExecStatus.COPY_IN
        pgconn.put_copy_data(b"3\tc\n")
        pgconn.put_copy_end()
        result = pgconn.get_result()
        assert result is not None
        assert result.status == pq.ExecStatus.COMMAND_OK
        assert pgconn.get_result() is None
        assert value(cursor.connection, "SELECT count(*) FROM t") == 3

    def test_binary_larger_than_every_buffer(self, connect: Connect, table: str) -> None:
        cursor = connect().cursor()
        with cursor.copy("COPY t FROM STDIN (FORMAT binary)") as copy:
            copy.set_types(["int4", "text"])
            for number in range(20_000):
                copy.write_row((number, "y" * 600))
        assert value(cursor.connection, "SELECT sum(length(b)) FROM t") == 20_000 * 600
        with cursor.copy("COPY t TO STDOUT (FORMAT binary)") as copy:
            copy.set_types(["int4", "text"])
            assert sum(len(row[1]) for row in copy.rows()) == 20_000 * 600

    @pytest.mark.parametrize("autocommit", [True, False])
    def test_errors_in_the_middle(self, connect: Connect, table: str, autocommit: bool) -> None:
        connection, other = connect(autocommit=autocommit), connect()
        with pytest.raises(errors.UniqueViolation):
            copy_rows(connection, ((number % 1000, "x") for number in range(300_000)))
        connection.rollback()
        with pytest.raises(ZeroDivisionError):  # psycopg sends CopyFail
            copy_rows(connection, ((1 // number, "x") for number in (1, 0)))
        connection.rollback()
        with pytest.raises(errors.UndefinedTable):
            connection.execute("SELECT * FROM nowhere")
        connection.rollback()
        assert value(connection, "SELECT count(*) FROM t") == 0
        connection.rollback()
        assert value(other, "SELECT count(*) FROM t") == 0

    def test_client_that_dies_in_the_middle(self, connect: Connect, table: str) -> None:
        other = connect()
        dying = connect()
        dying.pgconn.exec_(b"COPY t FROM STDIN")
        dying.pgconn.put_copy_data(b"1\tx\n")
        dying.close()
        assert value(other, "SELECT count(*) FROM t") == 0


class TestLargeMessages:
    def test_parameters_larger_than_every_buffer(self, connect: Connect) -> None:
        """Handed over in parts; nobody else may get in between."""
        large, small = connect(), connect()
        with ThreadPoolExecutor(1) as pool:
            lengths = pool.submit(lambda: [value(large, "SELECT length(%s::text)", "z" * 10_000_000) for _ in range(5)])
            while not lengths.done():
                assert value(small, "SELECT 1") == 1
        assert lengths.result() == [10_000_000] * 5

    def test_reader_that_stalls_and_goes_away(self, connect: Connect) -> None:
        stalled, other = connect(), connect()
        stalled.pgconn.send_query(b"SELECT repeat('x', 10000) FROM generate_series(1, 20000)")
        stalled.pgconn.flush()
        timer = threading.Timer(0.3, stalled.close)
        timer.start()
        assert value(other, "SELECT 1") == 1
        timer.join()

    def test_endless_recursion_is_an_error(self, connect: Connect) -> None:
        connection = connect()
        connection.execute(
            "CREATE FUNCTION endless(n int) RETURNS int LANGUAGE plpgsql AS 'BEGIN RETURN endless(n + 1); END'"
        )
        with pytest.raises(errors.StatementTooComplex):
            connection.execute("SELECT endless(1)")
        assert value(connection, "SELECT 1") == 1


class TestCancel:
    def test_running_statement(self, connect: Connect) -> None:
        connection = connect()
        for statement in (
            "SELECT pg_sleep(60)",
            "SELECT count(*) FROM generate_series(1, 2000000000)",
            "DO $$ BEGIN LOOP NULL; END LOOP; END $$",
        ):
            timer = threading.Timer(0.1, connection.cancel_safe)
            timer.start()
            with pytest.raises(errors.QueryCanceled, match="user request"):
                connection.execute(statement)
            timer.join()
            assert value(connection, "SELECT 1") == 1

    def test_waiting_statement(self, connect: Connect) -> None:
        holder, waiting = connect(autocommit=False), connect()
        holder.execute("SELECT 1")
        timer = threading.Timer(0.1, waiting.cancel_safe)
        timer.start()
        with pytest.raises(errors.QueryCanceled):
            waiting.execute("SELECT 2")
        timer.join()
        holder.commit()
        assert value(waiting, "SELECT 3") == 3

    def test_cancel_at_once_is_never_lost(self, server: TimescaleDB, connect: Connect) -> None:
        """Also when the server has read the statement and not yet begun with it."""
        for _ in range(30):
            client, other = connect(), connect()
            client.pgconn.send_query(b"SELECT pg_sleep(60)")
            client.pgconn.flush()
            client.close()
            assert value(other, "SELECT 1") == 1
            other.close()

    def test_wrong_key_cancels_nothing(self, server: TimescaleDB, connect: Connect) -> None:
        connection = connect()
        request = (
            (16).to_bytes(4) + (80877102).to_bytes(4) + connection.info.backend_pid.to_bytes(4) + (12345).to_bytes(4)
        )

        def cancel() -> None:
            with create_connection((HOST, server.port)) as raw:
                raw.sendall(request)
                raw.recv(1)

        timer = threading.Timer(0.05, cancel)
        timer.start()
        connection.execute("SELECT pg_sleep(0.3)")
        timer.join()

    def test_statement_timeout_from_the_start(self, connect: Connect) -> None:
        connection = connect(options="-c statement_timeout=100")
        with pytest.raises(errors.QueryCanceled, match="statement timeout"):
            connection.execute("SELECT pg_sleep(60)")

    def test_statement_timeout(self, connect: Connect) -> None:
        connection, other = connect(), connect()
        connection.execute("SET statement_timeout = '100ms'")
        with pytest.raises(errors.QueryCanceled, match="statement timeout"):
            connection.execute("SELECT count(*) FROM generate_series(1, 2000000000)")
        other.execute("SELECT pg_sleep(0.2)")
        with connection.transaction():
            connection.execute("SET LOCAL statement_timeout = 0")
            connection.execute("SELECT pg_sleep(0.2)")
        with pytest.raises(errors.QueryCanceled, match="statement timeout"):
            connection.execute("SELECT pg_sleep(60)")


class TestTimescale:
    def test_hypertable_and_continuous_aggregate(self, connect: Connect) -> None:
        connection = connect()
        connection.execute("CREATE TABLE h (time timestamptz NOT NULL, v float8)")
        connection.execute("SELECT create_hypertable('h', 'time')")
        connection.execute(
            "CREATE MATERIALIZED VIEW hourly WITH (timescaledb.continuous) AS"
            " SELECT time_bucket('1 hour', time) AS bucket, avg(v) FROM h GROUP BY 1 WITH NO DATA"
        )
        connection.execute(
            "INSERT INTO h SELECT '2024-01-01 00:00Z'::timestamptz + n * interval '10 min', n"
            " FROM generate_series(0, 59) AS n"
        )
        connection.execute("CALL refresh_continuous_aggregate('hourly', '2024-01-01', '2024-01-02')")
        assert value(connection, "SELECT count(*) FROM hourly") == 10
        connection.execute("DROP MATERIALIZED VIEW hourly; DROP TABLE h")


class TestDurability:
    def test_committed_rows_survive_sigkill(self, server: TimescaleDB, connect: Connect, table: str) -> None:
        connection = connect()
        connection.execute("INSERT INTO t SELECT n, 'x' FROM generate_series(1, 1000) AS n")
        connection.execute("CREATE ROLE survivor LOGIN PASSWORD 'y'")
        open_transaction = connect(autocommit=False)
        open_transaction.execute("INSERT INTO t VALUES (5000, 'lost')")
        server.kill()
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
        assert server.state == "crashed"
        server.start()
        server.wait_ready()
        again = connect()
        assert value(again, "SELECT count(*) FROM t") == 1000
        assert value(connect(user="survivor", password="y"), "SELECT 1") == 1
        again.execute("DROP ROLE survivor")

    def test_fatal_error_of_the_engine_ends_the_server(self, server: TimescaleDB, connect: Connect, table: str) -> None:
        connection = connect()
        connection.execute("INSERT INTO t VALUES (1, 'x')")
        with pytest.raises(psycopg.OperationalError, match="closed"):
            connection.execute("SELECT repeat('[', 200000)::jsonb")  # deeper than the stack of V8
        with pytest.raises(PermanentError, match="the database failed and the server ends"):
            server.wait_ready()
        assert server.state == "crashed"
        server.start()
        server.wait_ready()
        assert value(connect(), "SELECT count(*) FROM t") == 1

    def test_stop_hangs_up_and_loses_nothing(self, server: TimescaleDB, connect: Connect, table: str) -> None:
        connection = connect()
        connection.execute("INSERT INTO t VALUES (1, 'x')")
        busy = connect()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(busy.execute, "SELECT pg_sleep(60)")
            server.stop()
            with pytest.raises(psycopg.OperationalError):
                running.result()
        assert not server.running
        assert server.state != "crashed"
        server.start()
        server.wait_ready()
        assert value(connect(), "SELECT count(*) FROM t") == 1


def test_asyncio_client(server: TimescaleDB) -> None:
    async def ask() -> Any:
        connection = await psycopg.AsyncConnection.connect(
            host=HOST, port=server.port, user=USER, password=PASSWORD, dbname=DBNAME
        )
        async with connection:
            cursor = await connection.execute("SELECT %s::int", [1])
            return await cursor.fetchone()

    assert asyncio.run(ask()) == (1,)
