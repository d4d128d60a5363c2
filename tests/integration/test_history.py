"""What is closed and frozen when chunks are dropped and intervals change: rows that are never computed again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from psycopg import sql

from services.consumer.sink import Sink
from services.core.config import Settings
from services.core.errors import ChunkDroppedError
from services.etl.worker import Leader
from tests.fix_services import NOWHERE
from tests.measured import reading_of, write_to
from tests.model import CHUNK, ceil, chunk_of

pytestmark = pytest.mark.without_topics

MINUTE = timedelta(minutes=1)
OLD = chunk_of(datetime.now(UTC)) - 4 * CHUNK  # the start of a chunk
NEW = chunk_of(datetime.now(UTC)) - CHUNK


@pytest.fixture
def sink(settings: Settings) -> Iterator[Sink]:
    sink = Sink(settings)
    yield sink
    sink.close()


def rows_of(connection: psycopg.Connection, metric: str = "temperature") -> list[tuple[object, ...]]:
    """Start, width in minutes and average of each summary row."""
    query = sql.SQL(
        "SELECT interval_start, extract(epoch FROM interval_end - interval_start)::int / 60, {} FROM {} ORDER BY 1"
    ).format(sql.Identifier(f"avg_{metric}"), sql.Identifier(f"{metric}_summary"))
    return connection.execute(query).fetchall()


def run_once(connection: psycopg.Connection, settings: Settings, **update: int) -> Leader:
    leader = Leader(connection, settings.model_copy(update=update))
    leader.take_over()
    leader.run_once()
    return leader


def test_an_interval_changes_before_the_first_reading(settings: Settings, connection: psycopg.Connection) -> None:
    run_once(connection, settings, temperature_interval=10)
    connection.execute("UPDATE summary_state SET closed_before = %s, frozen_before = %s", (OLD, OLD))
    run_once(connection, settings, temperature_interval=15)
    connection.execute("UPDATE summary_state SET closed_before = '-infinity', frozen_before = '-infinity'")
    run_once(connection, settings, temperature_interval=10)
    assert rows_of(connection) == []


def test_an_interval_change_keeps_the_summaries_of_chunks_that_were_just_dropped(
    settings: Settings, connection: psycopg.Connection, sink: Sink
) -> None:
    write_to(sink, [reading_of("a", OLD, 1.0), reading_of("a", NEW, 2.0)], NOWHERE)
    run_once(connection, settings)
    connection.execute("SELECT drop_chunks('sensor_data', older_than => %s)", (NEW,))
    run_once(connection, settings, temperature_interval=15)
    assert rows_of(connection) == [(OLD, 10, 1.0), (NEW, 15, 2.0)]


@pytest.mark.parametrize("is_noted", [True, False])
def test_a_chunk_that_is_dropped_while_an_interval_changes_keeps_its_summary(
    settings: Settings, connection: psycopg.Connection, sink: Sink, *, is_noted: bool
) -> None:
    write_to(sink, [reading_of("a", OLD, 1.0), reading_of("a", NEW, 2.0)], NOWHERE)
    run_once(connection, settings)
    leader = Leader(connection, settings.model_copy(update={"temperature_interval": 15}))
    leader.take_over()
    steps = leader.change.steps()
    next(steps)  # the new aggregate exists, and holds nothing yet
    connection.execute("SELECT drop_chunks('sensor_data', older_than => %s)", (NEW,))
    if is_noted:
        leader.summaries.refresh_queued()
    with suppress(ChunkDroppedError):
        list(steps)
    assert rows_of(connection)[0] == (OLD, 10, 1.0)
    run_once(connection, settings, temperature_interval=15)
    assert rows_of(connection) == [(OLD, 10, 1.0), (NEW, 15, 2.0)]


def test_a_reading_that_comes_before_a_dropped_chunk_is_noted_overwrites_nothing(
    settings: Settings, connection: psycopg.Connection, sink: Sink
) -> None:
    write_to(sink, [reading_of("a", OLD, 1.0), reading_of("a", NEW, 2.0)], NOWHERE)
    run_once(connection, settings)
    connection.execute("SELECT drop_chunks('sensor_data', older_than => %s)", (NEW,))
    write_to(sink, [reading_of("a", OLD + MINUTE, 99.0)], NOWHERE)
    run_once(connection, settings)
    assert rows_of(connection) == [(OLD, 10, 1.0), (NEW, 10, 2.0)]


def test_a_width_that_was_given_up_leaves_no_edge_inside_an_interval(
    settings: Settings, connection: psycopg.Connection, sink: Sink
) -> None:
    write_to(sink, [reading_of("a", OLD, 1.0), reading_of("a", NEW, 2.0)], NOWHERE)
    run_once(connection, settings)
    connection.execute("SELECT drop_chunks('sensor_data', older_than => %s)", (OLD + CHUNK,))
    run_once(connection, settings)
    # Closed for a change to 7 minutes that did not come to its end; now 15 minutes are wanted.
    closed = ceil(OLD + CHUNK + MINUTE, 70)
    connection.execute("UPDATE summary_state SET closed_before = %s WHERE measurement = 'temperature'", (closed,))
    run_once(connection, settings, temperature_interval=15)
    state = connection.execute(
        "SELECT closed_before, frozen_before FROM summary_state WHERE measurement = 'temperature'"
    ).fetchone()
    assert state == (ceil(closed, 30), ceil(closed, 30))
