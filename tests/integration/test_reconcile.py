"""Reconciling finds the summary rows that differ from the readings, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from services.consumer.sink import Sink
from services.core.config import Settings
from services.core.measurements import DEFAULT
from services.core.shutdown import Shutdown
from services.etl.reconcile import reconcile
from services.etl.worker import Leader
from tests.fix_services import NOWHERE
from tests.measured import reading_of, write_to
from tests.model import CHUNK, chunk_of

pytestmark = pytest.mark.without_topics

MINUTE = timedelta(minutes=1)
NEW = chunk_of(datetime.now(UTC)) - CHUNK


@pytest.fixture
def sink(settings: Settings) -> Iterator[Sink]:
    sink = Sink(settings)
    yield sink
    sink.close()


@pytest.fixture
def leader(settings: Settings, connection: psycopg.Connection) -> Leader:
    leader = Leader(connection, settings)
    leader.take_over()
    return leader


def test_rows_that_differ_in_both_metrics_are_counted_for_both(
    connection: psycopg.Connection, sink: Sink, leader: Leader
) -> None:
    write_to(sink, [reading_of("a", NEW, 1.0, 1.0)], NOWHERE)
    leader.run_once()
    connection.execute("UPDATE sensor_data SET temperature = 3, humidity = 3")
    assert reconcile(connection, DEFAULT, leader.take_over, Shutdown()) == {"temperature": 1, "humidity": 1}
    assert reconcile(connection, DEFAULT, leader.take_over, Shutdown()) == {"temperature": 0, "humidity": 0}


def test_a_row_that_begins_inside_an_interval_is_the_only_one_that_differs(
    connection: psycopg.Connection, sink: Sink, leader: Leader
) -> None:
    write_to(sink, [reading_of("a", NEW + at * MINUTE, 1.0) for at in range(1, 20_000, 2)], NOWHERE)
    leader.run_once()
    connection.execute(
        "INSERT INTO temperature_summary VALUES ('a', %s, %s, 1, 1, 1, 1)", (NEW - 3 * MINUTE, NEW + 7 * MINUTE)
    )
    assert reconcile(connection, DEFAULT, leader.take_over, Shutdown()) == {"temperature": 1, "humidity": 0}


def test_nothing_differs_where_nothing_is(connection: psycopg.Connection, leader: Leader) -> None:
    leader.run_once()
    assert reconcile(connection, DEFAULT, leader.take_over, Shutdown()) == {"temperature": 0, "humidity": 0}
