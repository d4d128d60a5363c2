"""Every SQL query of the dashboards, run as somebody who is only a reader, finds what is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
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
from tests.measured import reading_of, write_to

pytestmark = pytest.mark.without_topics

SENSORS = ["attic", "o'hare"]
MACRO = "$x()"
DAY = timedelta(days=1)
CONTENT = dashboard(MONITORING / "grafana/dashboards/sensors.json")
QUERIES = [query for query in queries("postgres") if query.dashboard == "sensors"]


Found = dict[str, list[dict[str, object]]]


def look(connection: psycopg.Connection, measurement: str, sensors: list[str], typed: str = "") -> Found:
    """The rows of each variable and of each panel in the row of this measurement, by column."""
    found = {}
    for query in QUERIES:
        cursor = connection.execute(fill_sql(query.text, START, START + DAY, measurement, sensors, typed))
        names = [column.name for column in cursor.description or ()]
        found[query.panel] = [dict(zip(names, row, strict=True)) for row in cursor]
    return found


@pytest.fixture
def radon(connection: psycopg.Connection) -> Iterator[str]:
    """A measurement that the dashboards have never heard of, until the test ends."""
    with connection.transaction(force_rollback=True):
        connection.execute("SELECT add_measurement('radon')")
        yield "radon"


def fill(connection: psycopg.Connection, measurement: str, sensors: str, width: int, starts: int) -> None:
    """Summary rows of the sensors that a query names: intervals of ``width`` minutes, each of two readings."""
    connection.execute(
        f"INSERT INTO {measurement}_summary"
        " SELECT sensor_id, start, start + %(width)s, number, number - 1, number + 2, 2"
        f" FROM ({sensors}) AS one (sensor_id), LATERAL (SELECT number, %(start)s + number * %(width)s AS start"
        "  FROM generate_series(0, %(starts)s - 1) AS number) AS interval",
        {"start": START, "width": timedelta(minutes=width), "starts": starts},
    )


def test_every_query_finds_what_is_there(settings: Settings, connection: psycopg.Connection) -> None:
    sink = Sink(settings)
    readings = [reading_of(sensor, minutes(at), float(at), 50.0) for sensor in SENSORS for at in range(0, 720, 5)]
    write_to(sink, readings, NOWHERE)
    sink.close()
    Leader(connection, settings).run_once()
    connection.execute("SET ROLE sensor_reader")
    temperature, humidity = (look(connection, measurement, SENSORS) for measurement in ("temperature", "humidity"))
    for query in QUERIES:
        rows = temperature[query.panel]
        assert rows, query
        if query.format == "time_series":
            assert all(isinstance(row["time"], datetime) for row in rows), query
            assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)  # type: ignore[type-var]
    assert {"temperature", "humidity"} <= {row["measurement"] for row in temperature["$measurement"]}
    assert temperature["$sensor"] == [{"sensor_id": sensor} for sensor in SENSORS]
    (first, *_) = temperature["Each chosen sensor"]
    assert first == {"time": START, "metric": "attic temperature", "value": 2.5}
    assert (len(temperature["Each chosen sensor"]), len(humidity["Each chosen sensor"])) == (2 * 72, 2 * 36)
    (first, *_) = temperature["All chosen sensors"]
    assert first == {
        "time": START,
        "least temperature": 0.0,
        "average temperature": 2.5,
        "greatest temperature": 5.0,
    }
    for found in (temperature, humidity):
        assert found["Newest interval"] == [{"Newest": minutes(720)}]
        assert found["Sensors"] == [{"Sensors": 2}]
        assert found["Readings"] == [{"Readings": len(readings)}]
        assert [(row["Sensor"], row["Readings"]) for row in found["Coverage"]] == [(each, 144) for each in SENSORS]
        assert [float(str(row["Coverage"])) for row in found["Coverage"]] == pytest.approx([0.5, 0.5])
    (newest, *_) = temperature["Newest of each sensor"]
    assert newest == {"Sensor": "attic", "Until": minutes(720), "Average temperature": 712.5}
    one = look(connection, "temperature", ["attic"])
    assert len(one["Each chosen sensor"]) == 72
    assert len(one["Coverage"]) == len(one["Newest of each sensor"]) == 1
    connection.execute("RESET ROLE")


def test_a_measurement_that_is_added_has_its_row_and_its_sensors(connection: psycopg.Connection, radon: str) -> None:
    fill(connection, "temperature", "VALUES ('attic')", 10, 6)
    fill(connection, radon, "VALUES ('attic'), ('<&cellar>')", 30, 4)
    connection.execute("SET LOCAL ROLE sensor_reader")
    found = look(connection, radon, ["<&cellar>"])
    names = [row["measurement"] for row in found["$measurement"]]
    assert {radon, "temperature", "humidity"} <= set(names)
    assert names == sorted(names)  # type: ignore[type-var]
    assert found["$sensor"] == [{"sensor_id": "<&cellar>"}, {"sensor_id": "attic"}]
    assert found["Sensors"] == [{"Sensors": 2}]
    assert found["Readings"] == [{"Readings": 8}]
    assert found["Newest interval"] == [{"Newest": minutes(120)}]
    assert [row["value"] for row in found["Each chosen sensor"]] == [0.0, 1.0, 2.0, 3.0]
    assert {row["metric"] for row in found["Each chosen sensor"]} == {"<&cellar> radon"}
    assert found["All chosen sensors"][-1] == {
        "time": minutes(90),
        "least radon": 2.0,
        "average radon": 3.0,
        "greatest radon": 5.0,
    }
    assert found["Newest of each sensor"] == [{"Sensor": "<&cellar>", "Until": minutes(120), "Average radon": 3.0}]


def test_many_sensors_and_hostile_ids_leave_the_list_short_and_usable(connection: psycopg.Connection) -> None:
    """An id with a dollar sign would be taken for one of Grafana's macros, and fail every panel that includes it."""
    for measurement in ("temperature", "humidity"):
        fill(connection, measurement, "SELECT 's' || n FROM generate_series(1, 1500) AS n", 10, 1)
        fill(connection, measurement, f"VALUES ('{MACRO}')", 10, 1)
    found = look(connection, "temperature", SENSORS)
    assert len(found["$sensor"]) == 1000
    assert {"sensor_id": MACRO} not in found["$sensor"]
    assert found["Sensors"] == [{"Sensors": 1501}]
    found = look(connection, "temperature", SENSORS, typed="s149")
    assert [row["sensor_id"] for row in found["$sensor"]] == ["s149", *(f"s149{last}" for last in range(10))]


def test_units_go_by_the_names_that_panels_give_their_values() -> None:
    """Each panel of the row serves every measurement, so the unit is that of the name that a value has."""
    panels = {panel["title"]: panel for panel in CONTENT["panels"]}
    for title, name in (
        ("Each chosen sensor", "o'hare %s"),
        ("All chosen sensors", "greatest %s"),
        ("Newest of each sensor", "Average %s"),
    ):
        overrides = panels[title]["fieldConfig"]["overrides"]
        for measurement, unit in (("temperature", "celsius"), ("humidity", "humidity"), ("outer_humidity", None)):
            units = [
                override["properties"][0]["value"]
                for override in overrides
                # Without the slashes Grafana would compare the whole name.
                if re.search(re.fullmatch("/(.*)/", override["matcher"]["options"])[1], name % measurement)  # type: ignore[index]
            ]
            assert units == ([unit] if unit else [])


def test_everything_on_the_dashboard_is_in_the_row_that_measurements_repeat() -> None:
    row, *panels = CONTENT["panels"]
    (variable, _) = CONTENT["templating"]["list"]
    assert (row["type"], row["repeat"], row["title"]) == ("row", variable["name"], f"${variable['name']}")
    assert (variable["multi"], variable["includeAll"], variable["current"]["value"]) == (True, True, ["$__all"])
    assert not [panel for panel in panels if panel["type"] == "row"]
    text = "".join(target["rawSql"] for panel in panels for target in panel["targets"])
    assert not re.search("temperature|humidity", text)


def test_the_first_look_shows_the_sample() -> None:
    """The page after the login names the years of the file that Compose sends, and the dashboard its sensors."""
    file = pq.read_table(ROOT / "data/measurements.parquet", columns=["origin", "time_hour"])
    (home,) = re.findall(r"GF_USERS_HOME_PAGE: .*:-(/d/.*)}$", (ROOT / "docker-compose.yml").read_text(), re.MULTILINE)
    match = re.fullmatch(rf"/d/{CONTENT['uid']}\?from=(\d+)&to=(\d+)", home)
    assert match is not None
    start, end = (datetime.fromtimestamp(int(edge) / 1000, UTC) for edge in match.groups())
    assert all(start <= time.replace(tzinfo=UTC) < end for time in file["time_hour"].to_pylist() if time is not None)
    (_, variable) = CONTENT["templating"]["list"]
    assert sorted(set(file["origin"].to_pylist())) == variable["current"]["value"]
