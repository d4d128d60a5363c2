"""What only many sessions at once can do to the summaries: transactions that overlap, locks that are held for long.

The embedded database runs one statement at a time, so these run against native servers alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest
from psycopg import Connection

from services.core.config import Settings
from services.core.database import connect
from services.core.reading import Reading
from services.core.shutdown import Shutdown
from services.etl.worker import Leader, run_reconcile
from tests.fix_services import minutes, store

pytestmark = pytest.mark.usefixtures("native")
NOW = datetime.now(UTC).replace(second=0, microsecond=0)
NOTHING = {"temperature": 0, "humidity": 0}


def ago(days: float) -> datetime:
    return NOW - timedelta(days=days)


def at(minute: float, value: float = 20.0, sensor: str = "s1") -> Reading:
    return Reading(sensor, minutes(minute), value, value)


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
        refresh = "CALL refresh_continuous_aggregate('sensor_data_minute', %s::timestamptz, %s::timestamptz)"
        connection.execute(refresh, [minute, end])
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
