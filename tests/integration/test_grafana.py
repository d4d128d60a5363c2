"""Every SQL query of the dashboards, run as somebody who is only a reader, finds what is there."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import psycopg
import pyarrow.parquet as pq
import pytest

from services.consumer.sink import Sink
from services.core.config import Settings
from services.etl.worker import Leader
from tests.fix_services import NOWHERE, START, minutes
from tests.fix_stack import ROOT
from tests.grafana import MONITORING, dashboard, fill_sql, queries
from tests.measured import reading_of

SENSORS = ["attic", "o'hare"]
MACRO = "$x()"
DAY = timedelta(days=1)


def ask(connection: psycopg.Connection, text: str, sensors: list[str]) -> list[dict[str, object]]:
    """The rows, by column."""
    cursor = connection.execute(fill_sql(text, START, START + DAY, sensor=sensors))
    names = [column.name for column in cursor.description or ()]
    return [dict(zip(names, row, strict=True)) for row in cursor]


def test_every_query_finds_what_is_there(settings: Settings, connection: psycopg.Connection) -> None:
    sink = Sink(settings)
    readings = [reading_of(sensor, minutes(at), float(at), 50.0) for sensor in SENSORS for at in range(0, 720, 5)]
    sink.write(readings, NOWHERE)
    sink.close()
    Leader(connection, settings).run_once()
    connection.execute("SET ROLE sensor_reader")
    asked = [query for query in queries("postgres") if query.dashboard == "sensors"]
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


def test_many_sensors_and_hostile_ids_leave_the_list_short_and_usable(connection: psycopg.Connection) -> None:
    """An id with a dollar sign would be taken for one of Grafana's macros, and fail every panel that includes it."""
    for table, measured in (("temperature_summary", "0, 0, 0, 1"), ("humidity_summary", "0, 0, 0, 1")):
        connection.execute(
            f"INSERT INTO {table} SELECT 's' || n, %(start)s, %(start)s + INTERVAL '10 min', {measured} "
            "FROM generate_series(1, 1500) AS n",
            {"start": START},
        )
        connection.execute(
            f"INSERT INTO {table} VALUES (%(id)s, %(start)s, %(start)s, {measured})", {"start": START, "id": MACRO}
        )
    found = {query.panel: ask(connection, query.text, SENSORS) for query in queries("postgres")}
    assert len(found["$sensor"]) == 1000
    assert {"sensor_id": MACRO} not in found["$sensor"]
    assert found["Sensors"] == [{"Sensors": 1501}]


def test_the_first_look_shows_the_sample() -> None:
    """The page after the login names the years of the file that Compose sends, and the dashboard its sensors."""
    file = pq.read_table(ROOT / "data/measurements.parquet", columns=["origin", "time_hour"])
    (home,) = re.findall(r"GF_USERS_HOME_PAGE: .*:-(/d/.*)}$", (ROOT / "docker-compose.yml").read_text(), re.MULTILINE)
    content = dashboard(MONITORING / "grafana/dashboards/sensors.json")
    match = re.fullmatch(rf"/d/{content['uid']}\?from=(\d+)&to=(\d+)", home)
    assert match is not None
    start, end = (datetime.fromtimestamp(int(edge) / 1000, UTC) for edge in match.groups())
    assert all(start <= time.replace(tzinfo=UTC) < end for time in file["time_hour"].to_pylist() if time is not None)
    (variable,) = content["templating"]["list"]
    assert sorted(set(file["origin"].to_pylist())) == variable["current"]["value"]
