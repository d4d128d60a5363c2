"""``sensor-pipeline dashboard``: what it reads, and the page in a real browser in each of its states."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

import psycopg
import pytest
from dash.exceptions import PreventUpdate
from pydantic import SecretStr
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from services.consumer.sink import Sink
from services.core.config import Settings
from services.core.database import connect
from services.core.offsets import Offsets
from services.core.reading import Reading
from services.dashboard import series
from services.dashboard.monitor import Monitor
from services.dashboard.page import NO_READINGS, UNKNOWN, Filler, make_page
from services.dashboard.series import SummaryReader
from services.etl.worker import Leader
from tests.expected import Expected, samples
from tests.fix_browser import console, hosts, save
from tests.fix_proxy import Proxy
from tests.fix_services import NOWHERE, Service, StartService, minutes, publish, run_cli
from tests.fix_services import wait_until as wait_at_most
from tests.fix_stack import free_port
from tests.measured import reading_of, write_to

PROBLEM = re.compile("does not answer|closed|lost")
Look = Callable[[Settings], "Looks"]
OpenPage = Callable[[Settings], "Page"]

# Set it to keep the pictures.
PICTURES = os.environ.get("DASHBOARD_PICTURES")


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """On a busy machine a browser takes its time."""
    wait_at_most(condition, what, timeout_s=90)


def fill(settings: Settings, *readings: Reading) -> None:
    """Store readings as the consumer does, and summarise them as etl does."""
    sink = Sink(settings)
    assert not write_to(sink, readings, NOWHERE).refused
    sink.close()
    with connect(settings) as connection:
        Leader(connection, settings).run_once()


def steps(sensor: str, count: int, step: float = 10, humidity: float | None = 50.0) -> list[Reading]:
    """``count`` readings, one each ``step`` minutes; the temperature rises by 1 from 20 to 31 and falls back."""
    return [reading_of(sensor, minutes(at * step), 20.0 + at % 12, humidity) for at in range(count)]


def days(sensor: str, phase: float = 0.0) -> list[Reading]:
    """A day and a half of readings, one each two minutes, warm by day."""
    found = []
    for at in range(0, 36 * 60, 2):
        temperature = 18 + 6 * math.sin(math.tau * at / 1440 + phase) + math.sin(at * 1.7)
        found.append(reading_of(sensor, minutes(at), round(temperature, 2), round(95 - 2 * temperature, 2)))
    return found


def averages(readings: list[Reading], width: int) -> list[float]:
    """The averages of the temperature in intervals of ``width`` minutes."""
    size = width // 2
    values = [reading.temperature or 0.0 for reading in readings]
    return [fmean(values[at : at + size]) for at in range(0, len(values), size)]


class Looks:
    """Monitor and callbacks without a browser."""

    def __init__(self, settings: Settings) -> None:
        self.summaries = SummaryReader(settings)
        self.monitor = Monitor(settings, self.summaries)
        self.filler = Filler(self.monitor, self.summaries)

    def chart(self, sensor: str, measurement: str, span: str = "all") -> dict[str, Any]:
        return self.filler.chart(sensor, measurement, span, None, None)

    def is_unchanged(self, sensor: str, measurement: str, span: str = "all") -> bool:
        try:
            self.chart(sensor, measurement, span)
        except PreventUpdate:
            return True
        return False

    def tiles(self) -> dict[str, str]:
        return {
            tile.children[0].children: tile.children[1].children for tile in self.filler.live(None)["tiles.children"]
        }


@pytest.fixture
def look() -> Iterator[Callable[[Settings], Looks]]:
    with ExitStack() as stack:

        def look_with(settings: Settings) -> Looks:
            looks = Looks(settings)
            stack.enter_context(looks.summaries)
            return looks

        yield look_with


# What is read ---------------------------------------------------------------------------------------------


def test_the_intervals_are_those_of_the_summary(settings: Settings, connection: psycopg.Connection, look: Look) -> None:
    fill(settings, *steps("s1", 40, step=5), *steps("s2", 3))
    summaries = look(settings).summaries
    found = summaries.series("temperature", "s1", None)
    assert found is not None
    assert (found.width, found.stored) == (timedelta(minutes=10), timedelta(minutes=10))
    stored = connection.execute(
        "SELECT interval_start, avg_temperature, min_temperature, max_temperature, reading_count"
        " FROM temperature_summary WHERE sensor_id = 's1' ORDER BY interval_start"
    ).fetchall()
    assert len(stored) == 20
    assert [(each.start, each.average, each.least, each.greatest, each.readings) for each in found.points] == stored
    last_hour = summaries.series("temperature", "s1", timedelta(hours=1))
    assert last_hour is not None
    assert last_hour.points == found.points[-6:]


def test_too_many_intervals_are_joined_and_the_page_says_so(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, look: Look
) -> None:
    monkeypatch.setattr(series, "MAX_POINTS", 10)
    fill(settings, *steps("s1", 25))
    page = look(settings)
    page.monitor.sample_database()
    shown = page.chart("s1", "temperature")
    assert shown["joined.children"].startswith(
        "Each point joins 3 intervals of 10 minutes: there are too many to draw individually."
    )
    assert "9 points of 30 minutes" in shown["chart-text.children"]
    found = page.summaries.series("temperature", "s1", None)
    assert found is not None
    assert len(found.points) == 9
    assert sum(point.readings for point in found.points) == 25
    assert (found.points[1].average, found.points[1].least, found.points[1].greatest) == (24.0, 23.0, 25.0)


def test_a_measurement_that_a_sensor_does_not_have(settings: Settings, look: Look) -> None:
    fill(settings, *steps("s1", 3, humidity=None))
    page = look(settings)
    page.monitor.sample_database()
    shown = page.chart("s1", "humidity")
    assert (shown["chart-box.hidden"], shown["chart-text.children"]) == (True, "s1 has no humidity intervals")


def test_a_measurement_that_the_database_lacks_hides_no_other(settings: Settings, look: Look) -> None:
    fill(settings, *steps("s1", 3))
    page = look(settings.model_copy(update={"measurements": ("radon", *settings.measurements)}))
    page.monitor.watch_database_once()
    assert (page.monitor.database_problem, page.monitor.sensors) == ("", ["s1"])
    assert page.chart("s1", "radon")["chart-text.children"] == "s1 has no radon intervals"
    assert page.chart("s1", "temperature")["chart.figure"]["data"]


def test_a_measurement_that_is_added_is_shown(settings: Settings, connection: psycopg.Connection, look: Look) -> None:
    connection.execute("SELECT add_measurement('radon')")
    try:
        connection.execute(
            "INSERT INTO radon_summary VALUES ('cellar', %(start)s, %(start)s + interval '1 hour', 200, 190, 230, 60)",
            {"start": minutes(0)},
        )
        page = look(settings.model_copy(update={"measurements": (*settings.measurements, "radon")}))
        page.monitor.watch_database_once()
        assert page.monitor.sensors == ["cellar"]
        shown = page.chart("cellar", "radon")
        assert not shown["chart-box.hidden"]
        assert shown["chart-text.children"].startswith("cellar, radon: 1 intervals of 1 hour from 2024-03-01 00:00")
        client = make_page(page.monitor, page.summaries).server.test_client()
        assert (
            f'"options":{json.dumps([*settings.measurements, "radon"], separators=(",", ":"))}'
            in client.get("/_dash-layout").text
        )
    finally:
        connection.execute("DROP TABLE radon_summary CASCADE; ALTER TABLE sensor_data DROP COLUMN radon")


@pytest.mark.parametrize(
    ("measurement", "span"),
    [
        ("temperature_summary; --", "all"),
        ("temperature", "for ever"),
        ("temperature", ["all"]),
        (["temperature"], "all"),
    ],
)
def test_what_no_control_can_ask_changes_nothing(settings: Settings, measurement: Any, span: Any, look: Look) -> None:
    page = look(settings)
    page.monitor.sample_database()
    assert page.is_unchanged("s1", measurement, span)


@pytest.mark.parametrize(
    ("listens", "asked", "status"),
    [
        ("127.0.0.1", "localhost:8050", 200),
        ("localhost", "[::1]:8050", 200),
        ("127.0.0.1", "elsewhere.example:8050", 403),
        ("0.0.0.0", "elsewhere.example:8050", 200),  # noqa: S104
    ],
)
def test_on_loopback_only_this_machine_is_asked_for(
    settings: Settings, look: Look, listens: str, asked: str, status: int
) -> None:
    """A page of elsewhere.example may have given that name our address, to read what is here."""
    page = look(settings)
    client = make_page(page.monitor, page.summaries, listens).server.test_client()
    for path in ("/", "/_dash-layout"):
        answer = client.get(path, headers={"Host": asked})
        assert answer.status_code == status
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_numbers_come_from_the_servers_alone(settings: Settings, look: Look) -> None:
    page = look(settings)
    expected = Expected(settings)
    with Offsets(settings) as offsets:

        def is_sampled() -> bool:  # not at once, if a broker that is busy does not know its new topic yet
            count = len(page.monitor.topics)
            page.monitor.sample_kafka(offsets)
            return len(page.monitor.topics) > count

        wait_until(is_sampled, "a sample of the empty topics")
        expected.send(samples(40), partition=1)
        publish(settings.model_copy(update={"kafka_topic": settings.dead_letter_topic}), [b"a letter"])
        wait_until(is_sampled, "a sample")
        before, now = page.monitor.topics
        assert (now.end - before.end, now.lag, now.dead_letters) == (40, 40, 1)
        assert run_cli(settings, "consume", "--until-caught-up").returncode == 0
        wait_until(is_sampled, "a sample after the consumer")
    last = page.monitor.topics[-1]
    assert (last.committed - now.committed, last.lag) == (40, 0)
    page.monitor.sample_database()
    assert page.monitor.queues[-1].rows == 1
    assert 0 < page.monitor.queues[-1].freshness_s < 60
    shown = page.tiles()
    assert (shown["lag"], shown["queue"], shown["dead letters"], shown["sensors"]) == ("0", "1", "1", "0")
    assert int(shown["stored"].removesuffix(" /s")) > 0


def test_a_reader_may_see_all_of_it(settings: Settings, connection: psycopg.Connection, look: Look) -> None:
    fill(settings, *steps("s1", 3))
    connection.execute("CREATE ROLE looks LOGIN PASSWORD 'at it' IN ROLE sensor_reader")
    try:
        page = look(settings.model_copy(update={"postgre_user": "looks", "postgre_password": SecretStr("at it")}))
        page.monitor.sample_database()
        assert page.monitor.sensors == ["s1"]
        assert page.chart("s1", "humidity")["chart.figure"]["data"]
    finally:
        connection.execute("DROP ROLE looks")


def test_while_the_database_is_away_the_last_data_stays(
    proxied: Settings, settings: Settings, proxy: Proxy, look: Look, caplog: pytest.LogCaptureFixture
) -> None:
    fill(settings, *steps("s1", 3))
    page = look(proxied)
    page.monitor.watch_database_once()
    assert page.chart("s1", "temperature")["chart.figure"]["data"]
    proxy.refuse()
    caplog.clear()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            page.monitor.watch_database_once()
        shown = page.filler.live(None)
        assert not shown["banner.hidden"]
        assert PROBLEM.search(shown["banner.children"][1].children)
        assert page.tiles()["sensors"] == "1"
        assert page.is_unchanged("s1", "humidity")
        proxy.listen()
        page.monitor.watch_database_once()
    assert page.filler.live(None)["banner.hidden"]
    assert page.chart("s1", "humidity")["chart.figure"]["data"]
    assert [record.getMessage() for record in caplog.records] == ["server_unavailable", "server_available"]


def test_a_query_that_fails_before_the_monitor_knows(
    proxied: Settings, settings: Settings, proxy: Proxy, look: Look
) -> None:
    fill(settings, *steps("s1", 3))
    page = look(proxied)
    page.monitor.sample_database()
    proxy.refuse()
    assert page.is_unchanged("s1", "temperature")
    proxy.listen()
    assert page.chart("s1", "temperature")["chart.figure"]["data"]


# The command ----------------------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_one_line(settings: Settings) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run_cli(settings, "dashboard", "--port", port)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: the dashboard cannot listen on 127.0.0.1:{port} (--host, --port): Address already in use\n"
    )


def test_a_missing_extra_says_what_to_install(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "dash.py").write_text("raise ModuleNotFoundError(name='dash')", encoding="utf-8")
    done = run_cli(settings, "dashboard", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the dashboard's packages are not installed: pip install '.[dashboard]'\n"


@pytest.mark.parametrize(
    ("arguments", "environment", "begin"),
    [
        (["--port", "0"], {}, "--port=0 is not allowed (a whole number, 1 to 65,535)"),
        (["--host", "no such host"], {}, "the dashboard cannot listen on no such host:8050 (--host, --port)"),
        ([], {"POSTGRE_PASSWORD": "hunter2"}, "PostgreSQL at "),
    ],
)
def test_mistakes_are_one_line(
    settings: Settings, arguments: list[str], environment: dict[str, str], begin: str
) -> None:
    done = run_cli(settings, "dashboard", *arguments, **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {begin}")
    assert len(done.stderr.splitlines()) == 1


# The page -------------------------------------------------------------------------------------------------


class Page:
    """The page in a browser, and the process that serves it."""

    def __init__(self, browser: webdriver.Chrome, service: Service, port: int) -> None:
        self.browser = browser
        self.service = service
        self.address = f"127.0.0.1:{port}"
        wait_until(lambda: "http://" in service.log_path.read_text(encoding="utf-8"), "the page is served")
        browser.get(f"http://{self.address}/")
        wait_until(lambda: UNKNOWN not in (self.text("#tiles") or UNKNOWN), "every tile has a number")

    def text(self, selector: str) -> str:
        return str(
            self.browser.execute_script(
                "return document.querySelector(arguments[0])?.innerText ?? ''",
                selector,
            )
        )

    def wait_for(self, selector: str, text: str) -> None:
        wait_until(lambda: text in self.text(selector), f"{text!r} in {selector}")

    def press(self, selector: str) -> None:
        self.browser.find_element(By.CSS_SELECTOR, selector).click()

    def drawn(self) -> list[float]:
        """The averages that the chart of intervals draws."""
        values = self.browser.execute_script(
            "return (document.querySelector('#chart .js-plotly-plot')?.data ?? [])"
            ".filter(trace => trace.name == 'average').flatMap(trace => Array.from(trace.y))"
        )
        return [float(value) for value in values]

    def keep(self, name: str) -> None:
        """Keep a picture when asked to; nothing may have come from elsewhere or gone wrong on the page."""
        if PICTURES:
            save(self.browser, name, Path(PICTURES))
        assert console(self.browser) == []
        assert hosts(self.browser) == {self.address}
        assert "Traceback" not in self.service.log_path.read_text(encoding="utf-8")


@pytest.fixture
def open_page(browser: webdriver.Chrome, start: StartService) -> Iterator[OpenPage]:
    def open_one(settings: Settings) -> Page:
        port = free_port()
        return Page(browser, start("dashboard", "--port", str(port), settings=settings), port)

    yield open_one
    browser.get("about:blank")


def test_the_page_says_that_there_are_no_data(settings: Settings, open_page: OpenPage) -> None:
    page = open_page(settings)
    page.wait_for("#chart-text", NO_READINGS)
    assert page.text("#tiles").split("\n")[-1] == "0"
    page.keep("no-data")


def test_the_page_draws_the_summary_of_one_sensor(settings: Settings, open_page: OpenPage) -> None:
    readings = days("attic")
    fill(settings, *readings)
    page = open_page(settings)
    page.wait_for("#chart-text", "attic, temperature: 216 intervals of 10 minutes from 2024-03-01 00:00")
    wait_until(lambda: page.drawn() == pytest.approx(averages(readings, 10)), "the summary's averages are drawn")
    page.keep("one-sensor")
    page.press("#measurement input[value=humidity]")
    page.wait_for("#chart-text", "attic, humidity: 108 intervals of 20 minutes")
    wait_until(lambda: len(page.drawn()) == 108, "the humidity is drawn")
    page.press("#range input[value='6 hours']")
    page.wait_for("#chart-text", "18 intervals")

    # What comes is shown without a touch.
    fill(settings, reading_of("attic", minutes(2160), 10.0, 99.0))
    page.wait_for("#chart-text", "maximum 99")
    assert console(page.browser) == []


def test_the_page_with_200_sensors_by_keyboard(settings: Settings, open_page: OpenPage) -> None:
    fill(settings, *(reading for number in range(200) for reading in days(f"s{number:04}", number)[::20]))
    page = open_page(settings)
    page.wait_for("#chart-text", "s0000, temperature")
    wait_until(lambda: len(page.drawn()) == 54, "one sensor is drawn")
    browser = page.browser
    browser.switch_to.active_element.send_keys(Keys.TAB)
    chosen = browser.switch_to.active_element
    assert chosen.accessible_name == "s0000"
    group = chosen.find_element(By.XPATH, "ancestor::fieldset")
    assert (group.aria_role, group.accessible_name) == ("group", "Sensor")
    chosen.send_keys(Keys.ENTER)
    search = browser.find_element(By.CSS_SELECTOR, ".dash-dropdown-search")
    search.send_keys("17")
    wait_until(lambda: "s0000" not in page.text(".dash-dropdown-content"), "the list holds what was searched for")
    assert page.text(".dash-dropdown-content").split()[:3] == ["s0017", "s0117", "s0170"]
    page.keep("200-sensors")
    search.send_keys(Keys.ENTER)
    page.wait_for("#chart-text", "s0017, temperature")
    assert console(browser) == []


def test_the_page_keeps_its_chart_while_the_database_is_away(
    proxied: Settings, settings: Settings, proxy: Proxy, open_page: OpenPage
) -> None:
    fill(settings, *days("attic"))
    page = open_page(proxied)
    page.wait_for("#chart-text", "attic, temperature")
    wait_until(lambda: len(page.drawn()) == 216, "the averages are drawn")
    drawn = page.drawn()
    proxy.refuse()
    page.wait_for("#banner", "does not answer")
    fill(settings, reading_of("attic", minutes(2160), 10.0, 90.0))
    assert page.drawn() == drawn
    page.keep("database-away")
    proxy.listen()
    wait_until(lambda: page.text("#banner") == "", "the banner is gone")
    page.wait_for("#chart-text", "newest average 10")
    assert len(page.service.events("server_unavailable")) == 1
    assert page.service.stop() == 0


def test_the_page_opened_while_the_database_is_away(
    proxied: Settings, settings: Settings, proxy: Proxy, browser: webdriver.Chrome, start: StartService
) -> None:
    fill(settings, *steps("attic", 3))
    proxy.refuse()
    port = free_port()
    service = start("dashboard", "--port", str(port), settings=proxied)
    wait_until(lambda: "http://" in service.log_path.read_text(encoding="utf-8"), "the page is served")
    browser.get(f"http://127.0.0.1:{port}/")
    body = "return document.body.innerText"
    wait_until(lambda: "waiting for the database" in browser.execute_script(body), "it says what it waits for")
    proxy.listen()
    wait_until(lambda: "attic, temperature" in browser.execute_script(body), "it recovers by itself")
    assert console(browser) == []
    browser.get("about:blank")
