"""Servers fail, connections break: the same processes go on by themselves, and every row is exact."""

from __future__ import annotations

import json
import signal
import time

import psutil
import psycopg
import pytest
from pydantic import SecretStr

from services.core.config import Settings
from services.core.database import connect
from services.core.errors import TransientError
from services.local.stack import Stack
from tests.expected import Expected, committed_offsets, member_ids, samples
from tests.fix_proxy import Moment, Proxy
from tests.fix_services import PATIENCE_S, Service, StartService, message, minutes, publish, run_cli, wait_until

RUNNER = "tests.crash_runner"
UP_S = 60.0  # a killed broker needs a while until it leads its partitions again


@pytest.fixture
def expected(settings: Settings) -> Expected:
    """Sends and checks past the proxy, so that only the services meet the fault."""
    return Expected(settings)


def assert_alive(*services: Service) -> None:
    for service in services:
        assert service.process.poll() is None, service.log_path.read_text(encoding="utf-8")[-2000:]


def error_lines(service: Service) -> list[str]:
    """What the service printed that is no log line."""
    return [line for line in service.log_path.read_text(encoding="utf-8").splitlines() if not line.startswith("{")]


# The database is away ------------------------------------------------------------------------------------------


def test_a_database_that_refuses_connections_is_waited_for(
    proxied: Settings, proxy: Proxy, expected: Expected, start: StartService
) -> None:
    consumer, etl = start("consume", settings=proxied), start("etl", settings=proxied)
    expected.send(samples(50))
    expected.wait_until_stored()
    expected.wait_until_summarised()
    proxy.refuse()
    expected.send(samples(200, start=20, step=0.5))
    for service in (consumer, etl):
        service.wait_for("database_unavailable", count=5)  # a second or two, with growing pauses
    proxy.listen()
    expected.wait_until_stored()
    expected.wait_until_summarised()
    assert_alive(consumer, etl)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sqlstate", "text"),
    [("53300", "sorry, too many clients already"), ("57P03", "the database system is starting up")],
)
def test_a_database_without_a_free_connection_or_still_starting_is_waited_for(
    proxied: Settings, proxy: Proxy, expected: Expected, start: StartService, sqlstate: str, text: str
) -> None:
    consumer, etl = start("consume", settings=proxied), start("etl", settings=proxied)
    etl.wait_for("leading")
    consumer.wait_for("partitions_assigned")
    proxy.answer_with(sqlstate, text)
    proxy.cut()
    expected.send(samples(50))
    for service in (consumer, etl):
        assert text in service.wait_for("database_unavailable", count=3)["detail"]
    proxy.answer_with(None)
    expected.wait_until_stored()
    expected.wait_until_summarised()
    assert_alive(consumer, etl)


def test_a_killed_database_is_waited_for(own_stack: Stack, settings: Settings, start: StartService) -> None:
    expected = Expected(settings)
    consumer, etl = start("consume"), start("etl")
    expected.send(samples(50))
    expected.wait_until_stored()
    own_stack.timescaledb.kill()
    expected.send(samples(200, start=20, step=0.5))
    for service in (consumer, etl):
        service.wait_for("database_unavailable", count=2)
    own_stack.timescaledb.start()
    own_stack.timescaledb.wait_ready()
    expected.wait_until_stored()
    expected.wait_until_summarised()
    assert_alive(consumer, etl)


@pytest.mark.slow
def test_a_stalled_database_costs_the_consumer_neither_its_partitions_nor_memory(
    proxied: Settings, proxy: Proxy, expected: Expected, start: StartService
) -> None:
    few = proxied.model_copy(update={"consumer_batch_rows": 1000, "kafka_group_protocol": "classic"})
    plan = json.dumps({"librdkafka": {"session.timeout.ms": 6000, "max.poll.interval.ms": 6000}})
    consumer = start(plan, "consume", settings=few, module=RUNNER)
    expected.send(samples(10))
    expected.wait_until_stored()
    before = member_ids(few)
    process = psutil.Process(consumer.process.pid)
    memory = process.memory_info().rss
    proxy.stall()
    stalled_at = time.monotonic()
    rows = 60_000
    padding = b'{"pad":"' + b"x" * 3000 + b'",'
    publish(few, (padding + message("p1", minutes(at % 30), float(at))[1:] for at in range(rows)), "p1", 1)
    expected.rows |= {("p1", minutes(at % 30)): (float(at), None) for at in range(rows - 30, rows)}
    consumer.wait_for("paused")
    most = memory

    def long_stalled() -> bool:
        nonlocal most
        most = max(most, process.memory_info().rss)
        return time.monotonic() - stalled_at > 9

    wait_until(long_stalled, "the database is stalled for longer than max.poll.interval.ms")
    assert member_ids(few) == before
    proxy.flow()
    expected.wait_until_stored()
    assert member_ids(few) == before
    assert len(consumer.events("partitions_assigned")) == 1
    assert not consumer.events("partitions_revoked")
    assert consumer.events("resumed")
    assert most - memory < 150_000_000, f"{most - memory} bytes more for {rows * 3100} waiting"


# Connections are cut -------------------------------------------------------------------------------------------


def test_connections_cut_at_any_step_of_a_write_leave_every_reading_once(
    proxied: Settings, proxy: Proxy, expected: Expected, start: StartService
) -> None:
    consumer = start("consume", settings=proxied)
    cuts = [
        (b"FROM STDIN (FORMAT binary)", Moment.BEFORE, 2000),  # in the middle of a COPY
        (b"COMMIT\0", Moment.BEFORE, 0),
        (b"COMMIT\0", Moment.SENT, 0),
        (b"COMMIT\0", Moment.ANSWERED, 0),  # ambiguous: committed, and nobody told us
        (b"LOCK TABLE ONLY", Moment.ANSWERED, 0),
    ]
    expected.send(samples(1))
    for number, (pattern, moment, after_bytes) in enumerate(cuts):
        expected.wait_until_stored()
        cut = proxy.cut_at(pattern, moment, after_bytes=after_bytes)
        # New readings by COPY, then corrections by merge.
        start_minute = number // 2 * 200
        expected.send([*samples(100, start=start_minute), (start_minute, -1.0 * number, None)])
        assert cut.done.wait(PATIENCE_S), pattern
    expected.wait_until_stored()
    assert len(consumer.events("database_unavailable")) == len(cuts)
    assert_alive(consumer)


@pytest.mark.slow
@pytest.mark.parametrize("moment", list(Moment))
def test_a_merge_cut_at_its_commit_is_repeated_without_harm(
    proxied: Settings, proxy: Proxy, expected: Expected, start: StartService, moment: Moment
) -> None:
    start("consume", settings=proxied)
    expected.send(samples(50))
    expected.wait_until_stored()
    cut = proxy.cut_at(b"CREATE TEMPORARY TABLE", Moment.BEFORE, after_bytes=100)
    again = proxy.cut_at(b"COMMIT\0", moment)
    expected.send([(minute, temperature + 0.5, None) for minute, temperature, _ in samples(80) if temperature])
    assert cut.done.wait(PATIENCE_S)
    assert again.done.wait(PATIENCE_S)
    expected.wait_until_stored()


@pytest.mark.slow
def test_connections_cut_at_any_step_of_a_refresh_leave_exact_summaries(
    proxied: Settings, proxy: Proxy, expected: Expected, start: StartService
) -> None:
    start("consume")
    etl = start("etl", settings=proxied)
    etl.wait_for("leading")
    cuts = [
        *((b"CALL refresh_continuous_aggregate", moment) for moment in Moment),
        *((b'MERGE INTO "humidity_summary"', moment) for moment in Moment),
        *((b"DELETE FROM summary_refresh_queue", moment) for moment in Moment),
        *((b"COMMIT\0", moment) for moment in Moment),
    ]
    for number, (pattern, moment) in enumerate(cuts):
        cut = proxy.cut_at(pattern, moment)
        expected.send(samples(40, start=number * 15))
        assert cut.done.wait(PATIENCE_S), (pattern, moment)
    expected.wait_until_stored()
    expected.wait_until_summarised()
    assert len(etl.events("database_unavailable")) == len(cuts)
    # A COMMIT that is cut may be the one that takes the lead.
    assert len(cuts) + 1 - len(Moment) <= len(etl.events("leading")) <= len(cuts) + 1
    assert_alive(etl)


# The database refuses to work ----------------------------------------------------------------------------------


def test_a_connection_that_ends_after_the_password_was_sent_is_no_refusal(proxied: Settings, proxy: Proxy) -> None:
    cut = proxy.cut_at(b"SCRAM-SHA-256", Moment.ANSWERED)
    with pytest.raises(TransientError, match="does not answer"):
        connect(proxied)
    assert cut.done.is_set()


def test_a_read_only_database_is_waited_for(
    proxied: Settings, proxy: Proxy, expected: Expected, start: StartService, connection: psycopg.Connection
) -> None:
    consumer, etl = start("consume", settings=proxied), start("etl", settings=proxied)
    expected.send(samples(20))
    expected.wait_until_stored()
    expected.wait_until_summarised()
    connection.execute("ALTER ROLE CURRENT_USER SET default_transaction_read_only = on")
    try:
        proxy.cut()
        expected.send(samples(60))
        for service in (consumer, etl):
            detail = service.wait_for("database_unavailable", count=4)["detail"]
            assert "read-only" in detail
    finally:
        connection.execute("ALTER ROLE CURRENT_USER RESET default_transaction_read_only")
    proxy.cut()
    expected.wait_until_stored()
    expected.wait_until_summarised(timeout_s=60)  # etl may have begun its longest pause
    assert_alive(consumer, etl)


RAISING = """
    CREATE FUNCTION raise_fault() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION 'a fault of this test' USING ERRCODE = '{sqlstate}'; END $$;
    CREATE TRIGGER fault BEFORE INSERT ON summary_refresh_queue FOR EACH ROW EXECUTE FUNCTION raise_fault();
"""
QUIET = "DROP TRIGGER IF EXISTS fault ON summary_refresh_queue; DROP FUNCTION IF EXISTS raise_fault;"


def test_a_full_disk_is_waited_for_and_dead_letters_nothing(
    settings: Settings, expected: Expected, start: StartService, connection: psycopg.Connection
) -> None:
    consumer = start("consume")
    connection.execute(RAISING.format(sqlstate="53100"))
    try:
        expected.send(samples(50))
        consumer.wait_for("database_unavailable", count=4)
        assert connection.execute("SELECT count(*) FROM sensor_data").fetchone() == (0,)
    finally:
        connection.execute(QUIET)
    expected.wait_until_stored()
    assert_alive(consumer)


@pytest.mark.parametrize("sqlstate", ["XX000", "P0001"])
def test_a_failure_that_comes_back_each_time_ends_the_consumer_and_commits_nothing(
    settings: Settings, start: StartService, connection: psycopg.Connection, sqlstate: str
) -> None:
    connection.execute(RAISING.format(sqlstate=sqlstate))
    try:
        publish(settings, [message(temperature=1.0)], partition=0)
        consumer = start(json.dumps({"max_limited_tries": 4}), "consume", module=RUNNER)
        assert consumer.wait() == 1
    finally:
        connection.execute(QUIET)
    (line,) = error_lines(consumer)
    assert line.startswith("error: ")
    assert "a fault of this test" in line
    assert committed_offsets(settings)[0] <= 0


@pytest.mark.parametrize(
    ("command", "break_it", "mend_it"),
    [
        ("consume", "ALTER TABLE sensor_data RENAME TO gone", "ALTER TABLE gone RENAME TO sensor_data"),
        ("etl", "ALTER TABLE humidity_summary RENAME TO gone", "ALTER TABLE gone RENAME TO humidity_summary"),
    ],
)
def test_a_missing_table_ends_the_service_and_commits_nothing(
    settings: Settings,
    expected: Expected,
    start: StartService,
    connection: psycopg.Connection,
    command: str,
    break_it: str,
    mend_it: str,
) -> None:
    start("consume")
    expected.send(samples(5))
    expected.wait_until_stored()
    offsets = committed_offsets(settings)
    service = start("etl") if command == "etl" else start("consume", settings=settings)
    if command == "etl":
        expected.wait_until_summarised()
    connection.execute(break_it)
    try:
        expected.send(samples(10))
        assert service.wait() == 1
        if command == "consume":
            assert committed_offsets(settings) == offsets
    finally:
        connection.execute(mend_it)
    (line,) = error_lines(service)
    assert line.startswith("error: ")
    assert "alembic upgrade head" in line


CREATE_WRITER = """
    DO $$ BEGIN
        BEGIN CREATE ROLE may_write LOGIN PASSWORD 'may_write'; EXCEPTION WHEN duplicate_object THEN NULL; END;
        EXECUTE format('GRANT CONNECT, TEMPORARY ON DATABASE %I TO may_write', current_database());
    END $$;
    GRANT ALL ON sensor_data, summary_refresh_queue, partition_progress, summary_state TO may_write;
    GRANT EXECUTE ON FUNCTION advance_partitions TO may_write;
"""


def test_a_role_that_may_not_write_ends_the_consumer_and_commits_nothing(
    settings: Settings, expected: Expected, start: StartService, connection: psycopg.Connection
) -> None:
    connection.execute(CREATE_WRITER)
    role = {"postgre_user": "may_write", "postgre_password": SecretStr("may_write")}
    consumer = start("consume", settings=settings.model_copy(update=role))
    expected.send(samples(5))
    expected.wait_until_stored()
    offsets = committed_offsets(settings)
    connection.execute("REVOKE INSERT ON summary_refresh_queue FROM may_write")
    expected.send(samples(10))
    assert consumer.wait() == 1
    assert committed_offsets(settings) == offsets
    (line,) = error_lines(consumer)
    assert "permission denied for table summary_refresh_queue" in line
    # What it did not store, the next one does.
    assert run_cli(settings, "consume", "--until-caught-up").returncode == 0
    expected.wait_until_stored()


# The broker ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_broker_is_waited_for(own_stack: Stack, settings: Settings, start: StartService) -> None:
    expected = Expected(settings)
    consumer, etl = start("consume"), start("etl")
    expected.send(samples(50))
    expected.wait_until_stored()
    own_stack.kafka.kill()
    own_stack.kafka.start()
    own_stack.kafka.wait_ready()
    expected.send(samples(200, start=20, step=0.5))
    expected.wait_until_stored(timeout_s=UP_S)
    expected.wait_until_summarised()
    assert_alive(consumer, etl)


# The end of a service while something is down --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["refuse", "stall"])
def test_services_end_in_time_while_the_database_is_away(
    proxied: Settings, proxy: Proxy, expected: Expected, start: StartService, fault: str
) -> None:
    consumer, etl = start("consume", settings=proxied), start("etl", settings=proxied)
    etl.wait_for("leading")
    expected.send(samples(5))
    expected.wait_until_stored()
    getattr(proxy, fault)()
    expected.send(samples(20))
    if fault == "refuse":
        for service in (consumer, etl):
            service.wait_for("database_unavailable")
    else:
        expected.send(samples(20, start=50))
    asked = time.monotonic()
    for service in (consumer, etl):
        service.signal(signal.SIGTERM)
    assert [service.wait(10) for service in (consumer, etl)] == [0, 0]
    assert time.monotonic() - asked < 10
    (proxy.listen if fault == "refuse" else proxy.flow)()
    assert run_cli(proxied, "consume", "--until-caught-up").returncode == 0
    expected.wait_until_stored()
