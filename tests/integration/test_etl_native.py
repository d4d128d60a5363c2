"""What only many sessions at once can do to the summaries: transactions that overlap, locks that are held for long.

The embedded database runs one statement at a time, so these run against native servers alone.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta

import pytest
from psycopg import Connection, errors

from services.consumer.sink import Sink
from services.core.config import Settings
from services.core.database import connect
from services.core.errors import LeaseLostError
from services.core.reading import Reading
from services.core.shutdown import Shutdown
from services.etl.history import History
from services.etl.lease import KEY, Lease
from services.etl.worker import Leader, run_reconcile
from tests.fix_services import NOWHERE, START, StartService, minutes, run_cli, store, wait_until
from tests.measured import MEASUREMENTS, reading_of, write_to

pytestmark = [pytest.mark.usefixtures("native"), pytest.mark.without_topics]
NOW = datetime.now(UTC).replace(second=0, microsecond=0)
NOTHING = dict.fromkeys(MEASUREMENTS, 0)


def ago(days: float) -> datetime:
    return NOW - timedelta(days=days)


def at(minute: float, value: float = 20.0, sensor: str = "s1") -> Reading:
    return reading_of(sensor, minutes(minute), value, value)


def run_once(settings: Settings, **changes: object) -> None:
    with connect(settings) as connection:
        Leader(connection, settings.model_copy(update=changes)).run_once()


def value(connection: Connection, query: str, *arguments: object) -> object:
    row = connection.execute(query, arguments).fetchone()
    assert row is not None
    return row[0]


def count(connection: Connection, table: str) -> int:
    return int(str(value(connection, f"SELECT count(*) FROM {table}")))


@contextmanager
def open_transaction(settings: Settings, *statements: str) -> Iterator[Connection]:
    """Somebody who has run these statements and does not end the transaction until the block ends."""
    with connect(settings) as connection:
        connection.execute("SET idle_in_transaction_session_timeout = 0")
        connection.execute("BEGIN")
        for statement in statements:
            connection.execute(statement)
        yield connection
        if not connection.closed:
            connection.execute("ROLLBACK")


# What TimescaleDB does not notice ----------------------------------------------------------------------------


def test_a_write_that_commits_while_its_minute_is_refreshed_is_summarised(
    settings: Settings, connection: Connection
) -> None:
    """Before it commits it looks what is out of date anyway; a refresh that begins then does not see its readings."""
    store(settings, at(-1000, sensor="other"))
    run_once(settings)
    attempts = (number for number in range(20) if commits_while_refreshed(settings, connection, number))
    overtaken = next(attempts, None)
    assert overtaken is not None, "no commit was slow enough to tell"
    run_once(settings)
    assert count(connection, "temperature_summary WHERE sensor_id = 'lost'") == overtaken + 1
    assert run_reconcile(settings, Shutdown()) == NOTHING


def commits_while_refreshed(settings: Settings, connection: Connection, number: int) -> bool:
    """A minute is refreshed while a transaction commits that writes to it; whether the refresh was first.

    A minute later than all that was ever refreshed.
    """
    first = 60 * 24 * 30 + number * 10
    minute, end = minutes(first), minutes(first + 1)
    store(settings, at(first + 0.1, sensor="other"))
    with connect(settings) as slow:
        slow.execute("BEGIN")
        slow.execute("INSERT INTO sensor_data (sensor_id, time, temperature) VALUES ('lost', %s, 1)", [minute])
        slow.execute(
            "INSERT INTO summary_refresh_queue (touched) VALUES (tstzmultirange(tstzrange(%s, %s)))", [minute, end]
        )
        # A table that is dropped at the commit makes it slow just there.
        slow.execute(
            "DO $$ BEGIN FOR i IN 1..3000 LOOP"
            " EXECUTE format('CREATE TEMP TABLE t%s (a int) ON COMMIT DROP', i); END LOOP; END $$"
        )
        committing = threading.Thread(target=slow.execute, args=("COMMIT",))
        committing.start()
        active = "SELECT query = 'COMMIT' AND state = 'active' FROM pg_stat_activity WHERE pid = %s"
        while committing.is_alive() and not value(connection, active, slow.info.backend_pid):
            pass
        refresh = "CALL refresh_continuous_aggregate('temperature_10min', %s::timestamptz, %s::timestamptz)"
        connection.execute(refresh, [minute, minutes(first + 10)])
        is_first = count(connection, f"sensor_data WHERE sensor_id = 'lost' AND time = '{minute}'") == 0
        committing.join()
    return is_first


def test_a_write_in_flight_while_the_aggregate_is_created_is_summarised(
    settings: Settings, connection: Connection
) -> None:
    """It has decided already that nobody has to be told of its readings."""
    store(settings, at(0, sensor="other"))
    insert = f"INSERT INTO sensor_data (sensor_id, time, temperature) VALUES ('lost', '{minutes(0.5)}', 1)"
    with open_transaction(settings, insert) as writer:
        run_once(settings)
        assert count(connection, "temperature_summary WHERE sensor_id = 'other'") == 1
        writer.execute(
            "INSERT INTO summary_refresh_queue (touched) VALUES (tstzmultirange(tstzrange(%s, %s)))",
            [minutes(0), minutes(1)],
        )
        writer.execute("COMMIT")
    run_once(settings)
    assert count(connection, "temperature_summary WHERE sensor_id = 'lost'") == 1
    assert run_reconcile(settings, Shutdown()) == NOTHING


def test_timescaledbs_notes_of_what_is_out_of_date_stay_few(settings: Settings, connection: Connection) -> None:
    """Although what the queue does not name is never refreshed, whatever lies between an old and a new reading."""
    logs = "continuous_aggs_hypertable_invalidation_log", "continuous_aggs_materialization_invalidation_log"
    store(settings, *(at(minute) for minute in range(0, 60 * 24 * 60, 60)))
    run_once(settings)
    sizes = []
    with connect(settings) as own:
        leader = Leader(own, settings)
        leader.take_over()
        for number in range(150):
            late = [(number * 7919 + step * 104_729) % (60 * 24 * 60) for step in range(3)]
            with connect(settings) as consumer, consumer.transaction():
                for minute in (*late, 60 * 24 * 60 + number):
                    consumer.execute(
                        "INSERT INTO sensor_data VALUES (%s, 'late', 1, 1) ON CONFLICT DO NOTHING", [minutes(minute)]
                    )
                    consumer.execute(
                        "INSERT INTO summary_refresh_queue (touched) VALUES (tstzmultirange(tstzrange(%s, %s)))",
                        [minutes(minute), minutes(minute + 1)],
                    )
            leader.summaries.refresh_queued()
            sizes.append(sum(count(connection, f"_timescaledb_catalog.{log}") for log in logs))
    assert max(sizes[75:]) < 2 * max(sizes[:75]) + 20, sizes


def test_history_loaded_twice_by_many_writers_is_summarised_exactly(
    settings: Settings, connection: Connection, start: StartService
) -> None:
    """Half of it repeats what another writer has just stored, so minutes are refreshed while they are written to."""
    quick = settings.model_copy(update={"etl_poll_seconds": 0.1, "etl_check_seconds": 0.5})
    etl = start("etl", settings=quick)
    etl.wait_for("leading")
    rows = int(os.environ.get("LOAD_ROWS", "200000"))
    batch, sensors = 5000, 50

    def write(writer: int) -> None:
        with closing(Sink(settings)) as sink:
            for first in range(writer // 2 * batch, rows, 2 * batch):  # two of the four write the same
                write_to(
                    sink,
                    [
                        reading_of(f"s{at % sensors}", minutes(at // sensors / 2), at % 97, writer)
                        for at in range(first, first + batch)
                    ],
                    NOWHERE,
                )

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    wait_until(lambda: count(connection, "summary_refresh_queue") == 0, "all is summarised", timeout_s=300)
    looked = value(connection, "SELECT max(checked_at) FROM summary_check")
    wait_until(lambda: value(connection, "SELECT min(checked_at) FROM summary_check") != looked, "one more look")
    assert count(connection, "sensor_data") == rows
    assert value(connection, "SELECT sum(differences) FROM summary_check") == 0
    assert run_reconcile(settings, Shutdown()) == NOTHING
    assert etl.stop() == 0


# Locks that others hold --------------------------------------------------------------------------------------


@contextmanager
def overlapping_writers(settings: Settings) -> Iterator[None]:
    """Six sessions that each store something for 0.3 s, so that there is no moment without one of them."""
    ended = threading.Event()

    def write() -> None:
        with connect(settings) as own:
            while not ended.is_set():
                with own.transaction():
                    own.execute("SET LOCAL lock_timeout = 0")
                    own.execute("LOCK TABLE ONLY sensor_data IN ROW EXCLUSIVE MODE")
                    own.execute("SELECT pg_sleep(0.3)")

    threads = [threading.Thread(target=write) for _ in range(6)]
    for thread in threads:
        thread.start()
        threading.Event().wait(0.05)
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def test_history_is_closed_within_seconds_however_many_consumers_are_busy(
    settings: Settings, connection: Connection
) -> None:
    store(settings, at(0))
    run_once(settings)
    lease = Lease(connection)
    assert lease.try_take()
    history = History(connection, lease, timedelta(0))
    with overlapping_writers(settings):
        started = time.monotonic()
        for number in range(5):
            history.close({"temperature": minutes(number * 10)})
        assert time.monotonic() - started < 5
    assert value(connection, "SELECT closed_before FROM summary_state WHERE measurement = 'temperature'") == minutes(40)


def test_closing_gives_up_soon_if_somebody_does_not_end_a_transaction(
    settings: Settings, connection: Connection
) -> None:
    """Consumers queue behind whoever waits for the lock."""
    store(settings, at(0))
    run_once(settings)
    lease = Lease(connection)
    assert lease.try_take()
    history = History(connection, lease, timedelta(0))
    with open_transaction(settings, "LOCK TABLE ONLY sensor_data IN ROW EXCLUSIVE MODE"):
        started = time.monotonic()
        with pytest.raises(errors.LockNotAvailable):
            history.close({"temperature": minutes(10)})
        assert time.monotonic() - started < 4
    history.close({"temperature": minutes(10)})


def summarised(connection: Connection, minute: float) -> Callable[[], bool]:
    """Whether the reading of that minute is in the summary."""
    found = f"temperature_summary WHERE interval_start <= '{minutes(minute)}' AND interval_end > '{minutes(minute)}'"
    return lambda: count(connection, found) == 1


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT count(*) FROM temperature_summary_live",
        "SELECT count(*) FROM temperature_summary",
        "LOCK TABLE sensor_data, temperature_summary, summary_state, summary_refresh_queue IN ACCESS SHARE MODE",
    ],
    ids=["a reader of the live view", "a reader of the summary", "a dump"],
)
def test_an_open_transaction_stops_neither_consumers_nor_summaries_while_an_interval_changes(
    settings: Settings, connection: Connection, start: StartService, statement: str
) -> None:
    store(settings, *(at(minute) for minute in range(100)))
    run_once(settings)
    with open_transaction(settings, statement):
        etl = start("etl", settings=settings.model_copy(update={"temperature_interval": 15}))
        etl.wait_for("interval_change_begun")
        for minute in range(200, 260, 20):
            started = time.monotonic()
            store(settings, at(minute))
            assert time.monotonic() - started < 4
            wait_until(summarised(connection, minute), "the summary follows", timeout_s=8)
        if "live" in statement:
            assert etl.wait_for("duty_failed")["duty"] == "interval_change"
            assert not etl.events("interval_changed")
    etl.wait_for("interval_changed", timeout_s=90)
    assert etl.stop() == 0


def test_retention_waits_for_a_dump_and_the_summaries_do_not(
    settings: Settings, connection: Connection, start: StartService
) -> None:
    keeps = settings.model_copy(update={"raw_retention_days": 30})
    store(settings, *(reading_of("s1", ago(days), 1.0, None) for days in (60, 50, 1)))
    run_once(settings)
    chunks = "timescaledb_information.chunks WHERE hypertable_name = 'sensor_data'"
    (oldest,) = (str(row[0]) for row in connection.execute("SELECT show_chunks('sensor_data') LIMIT 1"))
    with open_transaction(settings, f"LOCK TABLE {oldest} IN ACCESS SHARE MODE"):
        etl = start("etl", settings=keeps)
        assert etl.wait_for("duty_failed")["duty"] == "retention"
        store(settings, reading_of("s2", ago(1), 2.0, None))
        wait_until(lambda: count(connection, "temperature_summary WHERE sensor_id = 's2'") == 1, "summarised", 5)
        assert count(connection, chunks) == 3
    wait_until(lambda: count(connection, chunks) == 1, "both are dropped", timeout_s=90)
    assert count(connection, "temperature_summary") == 4
    assert etl.stop() == 0


def test_a_chunk_that_cannot_be_compressed_costs_a_warning(
    settings: Settings, connection: Connection, start: StartService
) -> None:
    store(settings, *(reading_of("s1", ago(days), 1.0, None) for days in (60, 50, 1)))
    run_once(settings)
    oldest = str(value(connection, "SELECT show_chunks('sensor_data') LIMIT 1"))
    compressed = "timescaledb_information.chunks WHERE hypertable_name = 'sensor_data' AND is_compressed"
    with open_transaction(settings, f"LOCK TABLE {oldest} IN ROW EXCLUSIVE MODE"):
        etl = start("etl", settings=settings.model_copy(update={"compress_after_days": 10}))
        assert etl.wait_for("duty_failed")["duty"] == "compression"
        assert count(connection, compressed) == 1  # the other one
        store(settings, reading_of("s2", ago(1), 2.0, None))
        wait_until(lambda: count(connection, "temperature_summary WHERE sensor_id = 's2'") == 1, "summarised", 5)
    wait_until(lambda: count(connection, compressed) == 2, "both are compressed", timeout_s=90)
    assert etl.stop() == 0


def test_a_session_that_has_the_pid_of_a_refresh_before_a_crash_stops_nothing(
    settings: Settings, connection: Connection, start: StartService
) -> None:
    registrations = "_timescaledb_catalog.continuous_aggs_jobs_refresh_ranges"
    columns = connection.execute("SELECT attname FROM pg_attribute WHERE attrelid = to_regclass(%s)", [registrations])
    if ("created_at",) not in columns.fetchall():
        pytest.skip("this TimescaleDB does not register refreshes so")
    store(settings, at(0))
    run_once(settings)
    with connect(settings) as idle:
        connection.execute(
            f"INSERT INTO {registrations} (materialization_id, start_range, end_range, pid, job_id, created_at)"
            " SELECT id, 0, 4000000000000000, %s, 0, now() - interval '1 hour' FROM _timescaledb_catalog.hypertable"
            " WHERE table_name = (SELECT materialization_hypertable_name"
            "  FROM timescaledb_information.continuous_aggregates WHERE view_name = 'temperature_10min')",
            [idle.info.backend_pid],
        )
        store(settings, at(20))
        etl = start("etl")
        assert etl.wait_for("session_ended")["pid"] == idle.info.backend_pid
        wait_until(summarised(connection, 20), "it is summarised")
        assert etl.stop() == 0
    assert count(connection, registrations) == 0


# Who leads ---------------------------------------------------------------------------------------------------


def test_a_leader_that_was_frozen_is_replaced_and_changes_nothing_when_it_wakes_up(
    settings: Settings, connection: Connection, start: StartService
) -> None:
    first = start("etl")
    first.wait_for("leading")
    second = start("etl")
    second.wait_for("standing_by")
    first.signal(signal.SIGSTOP)
    store(settings, at(0))
    second.wait_for("leading", timeout_s=30)  # after the server has ended an open transaction
    wait_until(summarised(connection, 0), "the second works")
    first.signal(signal.SIGCONT)
    first.wait_for("lead_lost")
    first.wait_for("standing_by")
    assert not second.events("lead_lost")
    assert (first.stop(), second.stop()) == (0, 0)


@pytest.fixture
def much_history(settings: Settings, connection: Connection) -> None:
    """A refresh of it takes seconds."""
    run_once(settings)
    connection.execute(
        "INSERT INTO sensor_data SELECT %s + at * interval '1 second', 's' || sensor, 1, 1"
        " FROM generate_series(0, 20000) AS at, generate_series(1, 60) AS sensor",
        [START],
    )
    connection.execute(
        "INSERT INTO summary_refresh_queue (touched) VALUES (tstzmultirange(tstzrange(%s, %s)))", [START, minutes(360)]
    )


def is_refreshing(connection: Connection) -> Callable[[], bool]:
    """Whether a refresh runs on the server."""
    refreshes = "pg_stat_activity WHERE state = 'active' AND starts_with(query, 'CALL refresh')"
    return lambda: count(connection, refreshes) > 0


@pytest.mark.usefixtures("much_history")
def test_a_standby_takes_over_within_seconds_from_a_refresh_that_nobody_waits_for(
    settings: Settings, connection: Connection, start: StartService
) -> None:
    first = start("etl")
    first.wait_for("leading")
    second = start("etl")
    second.wait_for("standing_by")
    wait_until(is_refreshing(connection), "a refresh")
    first.kill()
    second.wait_for("leading", timeout_s=12)
    wait_until(lambda: count(connection, "summary_refresh_queue") == 0, "all is summarised", timeout_s=60)
    assert second.stop() == 0
    assert run_reconcile(settings, Shutdown()) == NOTHING


@pytest.mark.usefixtures("much_history")
def test_a_signal_cancels_a_long_refresh(settings: Settings, connection: Connection, start: StartService) -> None:
    etl = start("etl")
    wait_until(is_refreshing(connection), "a refresh")
    assert etl.stop() == 0
    wait_until(lambda: not is_refreshing(connection)(), "the refresh has ended too", timeout_s=3)


def test_whoever_has_lost_the_lead_changes_nothing(settings: Settings, connection: Connection) -> None:
    store(settings, at(0))
    with connect(settings) as other:
        leader = Leader(connection, settings)
        leader.take_over()
        connection.execute("UPDATE etl_lease SET expires_at = '-infinity'")
        connection.execute("SELECT pg_advisory_unlock_all()")  # as if its session were gone
        assert Lease(other).try_take()
        with pytest.raises(LeaseLostError):
            leader.summaries.refresh_queued()
        with pytest.raises(LeaseLostError):
            leader.history.close({"temperature": minutes(10)})
    assert count(connection, "temperature_summary") == 0
    assert value(connection, "SELECT closed_before = '-infinity' FROM summary_state WHERE measurement = 'temperature'")


def test_once_waits_for_a_lead_that_nobody_renews_and_not_for_one_that_works(
    settings: Settings, connection: Connection, start: StartService
) -> None:
    frozen = start("etl")
    frozen.wait_for("leading")
    frozen.signal(signal.SIGSTOP)
    store(settings, at(0))
    done = run_cli(settings, "etl", "--once")
    assert done.returncode == 0, done.stderr
    assert (count(connection, "summary_refresh_queue"), summarised(connection, 0)()) == (0, True)
    frozen.kill()
    start("etl").wait_for("leading")
    done = run_cli(settings, "etl", "--once")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: another etl instance leads")


def test_reconcile_does_the_work_itself_if_the_leader_dies(
    settings: Settings, connection: Connection, start: StartService
) -> None:
    store(settings, at(0), at(100))
    run_once(settings)
    leader = start("etl")
    leader.wait_for("leading")
    leader.signal(signal.SIGSTOP)
    connection.execute("UPDATE temperature_summary SET reading_count = 7 WHERE interval_start = %s", [START])
    store(settings, at(1))
    assert run_reconcile(settings, Shutdown()) == NOTHING  # what is queued is not known to differ
    assert count(connection, "summary_refresh_queue") == 0
    leader.kill()


def test_a_role_that_may_only_read_stops_nothing(
    settings: Settings, connection: Connection, start: StartService
) -> None:
    """It takes every lock that it can, on everything that etl and migrations lock."""
    store(settings, at(0))
    run_once(settings)
    with open_transaction(settings, "SET ROLE sensor_reader") as reader:
        reader.execute("SELECT count(*) FROM temperature_summary, humidity_summary_live")
        with pytest.raises(errors.InsufficientPrivilege), reader.transaction():
            reader.execute("SELECT pg_advisory_lock(%s, 1)", [KEY])
        for table in ("summary_state", "etl_lease", "sensor_data", "summary_refresh_queue", "alembic_version"):
            for mode in ("ROW SHARE", "ROW EXCLUSIVE", "SHARE", "ACCESS EXCLUSIVE"):
                with pytest.raises(errors.InsufficientPrivilege), reader.transaction():
                    reader.execute(f"LOCK TABLE {table} IN {mode} MODE")
        etl = start("etl")
        etl.wait_for("leading")
        store(settings, at(20))
        wait_until(summarised(connection, 20), "the summary", timeout_s=5)
        assert etl.stop() == 0


# Time limits -------------------------------------------------------------------------------------------------


@pytest.fixture
def limited(connection: Connection) -> Iterator[None]:
    """What a managed server may set for every role."""
    limits = ("statement_timeout = '50ms'", "lock_timeout = '10ms'", "transaction_timeout = '50ms'")
    for limit in limits:
        connection.execute(f"ALTER ROLE CURRENT_USER SET {limit}")
    yield
    with connection.transaction():
        connection.execute("SET LOCAL transaction_timeout = 0")
        connection.execute("ALTER ROLE CURRENT_USER RESET ALL")


@pytest.mark.usefixtures("limited")
def test_time_limits_of_the_role_do_not_end_the_work(settings: Settings, connection: Connection) -> None:
    store(settings, *(at(minute, sensor=f"s{sensor}") for minute in range(0, 3000, 2) for sensor in range(40)))
    done = run_cli(settings.model_copy(update={"temperature_interval": 15}), "etl", "--once")
    assert done.returncode == 0, done.stderr
    assert count(connection, "summary_refresh_queue") == 0
    assert run_reconcile(settings, Shutdown()) == NOTHING


# Chunks that go ----------------------------------------------------------------------------------------------


def test_a_chunk_that_is_dropped_in_the_middle_of_a_round_keeps_its_summary(
    settings: Settings, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(settings, *(reading_of("s1", ago(days), days, None) for days in (60, 50, 1)))
    run_once(settings)
    rows = connection.execute("SELECT * FROM temperature_summary ORDER BY interval_start").fetchall()
    store(settings, reading_of("s1", ago(60) + timedelta(seconds=1), 100.0, None))
    with connect(settings) as own:
        leader = Leader(own, settings)
        leader.take_over()
        refresh = leader.summaries.refresh
        drops = [ago(40)]

        def drop_and_refresh(aggregate: str, start: datetime, end: datetime, *, force: bool = False) -> None:
            if drops:
                connection.execute("SELECT drop_chunks('sensor_data', older_than => %s)", [drops.pop()])
            refresh(aggregate, start, end, force=force)

        monkeypatch.setattr(leader.summaries, "refresh", drop_and_refresh)
        leader.run_once()
    assert connection.execute("SELECT * FROM temperature_summary ORDER BY interval_start").fetchall() == rows
    assert count(connection, "summary_refresh_queue") == 0
