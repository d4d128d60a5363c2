"""Every SQL query of the dashboards, run as somebody who is only a reader, finds what is there."""

from __future__ import annotations

from datetime import datetime, timedelta

import psycopg
import pytest

from services.consumer.sink import Sink
from services.core.config import Settings
from services.core.reading import Reading
from services.etl.worker import Leader
from tests.fix_services import NOWHERE, START, minutes
from tests.grafana import fill_sql, queries

SENSORS = ["attic", "o'hare"]
DAY = timedelta(days=1)


def ask(connection: psycopg.Connection, text: str, sensors: list[str]) -> list[dict[str, object]]:
    """The rows, by column."""
    cursor = connection.execute(fill_sql(text, START, START + DAY, sensor=sensors))
    names = [column.name for column in cursor.description or ()]
    return [dict(zip(names, row, strict=True)) for row in cursor]


def test_every_query_finds_what_is_there(settings: Settings, connection: psycopg.Connection) -> None:
    sink = Sink(settings)
    readings = [Reading(sensor, minutes(at), float(at), 50.0) for sensor in SENSORS for at in range(0, 720, 5)]
    sink.write(readings, NOWHERE)
    sink.close()
    Leader(connection, settings).run_once()
    connection.execute("SET ROLE sensor_reader")
    asked = queries("postgres")
    assert len(asked) > 8
    found = {query.panel: ask(connection, query.text, SENSORS) for query in asked}
    for query in asked:
        rows = found[query.panel]
        assert rows, query
        if query.format == "time_series":
            assert all(isinstance(row["time"], datetime) for row in rows), query
            assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)  # type: ignore[type-var]
    assert found["$sensor"] == [{"sensor_id": sensor} for sensor in SENSORS]
    assert found["Temperature"][0] == {"time": START, "metric": "attic", "value": 2.5}
    assert len(found["Temperature"]) == 2 * 72
    assert len(found["Humidity"]) == 2 * 36
    assert found["Newest interval"] == [{"Newest": minutes(720)}]
    assert found["Sensors"] == [{"Sensors": 2}]
    assert found["Readings"] == [{"Readings": len(readings)}]
    (first, *_) = found["Temperature of all chosen sensors"]
    assert first == {"time": START, "least": 0.0, "average": 2.5, "greatest": 5.0}
    assert [row["Sensor"] for row in found["Coverage"]] == SENSORS
    for row in found["Coverage"]:
        assert (row["Temperature readings"], row["Humidity readings"]) == (144, 144)
        assert float(str(row["Temperature coverage"])) == pytest.approx(0.5)
        assert float(str(row["Humidity coverage"])) == pytest.approx(0.5)
    newest = found["Newest of each sensor"][0]
    assert (newest["Temperature until"], newest["Temperature"]) == (minutes(720), 712.5)
    one = {query.panel: ask(connection, query.text, ["attic"]) for query in asked}
    assert len(one["Temperature"]) == 72
    assert len(one["Coverage"]) == len(one["Newest of each sensor"]) == 1
    connection.execute("RESET ROLE")
