"""The page: its parts, and the functions that fill them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any

from dash import Dash, Input, Output, State, dcc, html, no_update
from dash.development.base_component import Component
from dash.exceptions import PreventUpdate
from flask import Response, abort, request

from services.core.errors import PipelineError
from services.core.health import is_loopback, is_ours
from services.dashboard import charts
from services.dashboard.monitor import SAMPLE_INTERVAL_S, Monitor, QueueSample, TopicSample, rates
from services.dashboard.series import MAX_SENSORS, Series, SummaryReader

RANGES = {
    "6 hours": timedelta(hours=6),
    "1 day": timedelta(days=1),
    "7 days": timedelta(days=7),
    "30 days": timedelta(days=30),
    "1 year": timedelta(days=365),
    "all": None,
}
TILES = ("published", "stored", "lag", "freshness", "queue", "dead letters", "sensors")
CHART_INTERVAL_S = 5.0
UNKNOWN = "–"  # noqa: RUF001 - a dash where a number will be
NO_READINGS = "no readings yet: send some with sensor-pipeline produce, and run sensor-pipeline consume and etl"
NEVER_SEEN = "Nothing to show yet. The page recovers when this is fixed:"
LAST_SEEN = "These are the last values seen. The page recovers when this is fixed:"
NO_DATABASE = "waiting for the database"

# The parts of the page that each callback fills.
LIVE = "banner.children banner.hidden tiles.children rates.figure lag.figure freshness.figure"
SENSORS = "sensor.options sensor.value known.data"
CHART = "chart.figure chart-box.hidden chart-text.children joined.children shown.data"

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>{%metas%}<title>{%title%}</title>{%favicon%}{%css%}</head>
<body>{%app_entry%}<footer>{%config%}{%scripts%}{%renderer%}</footer></body>
</html>"""


def make_page(monitor: Monitor, summaries: SummaryReader, host: str = "127.0.0.1") -> Dash:
    """The application, to listen on ``host``. ``monitor`` is for the caller to start."""
    app = Dash(
        __name__,
        title="Sensor pipeline",
        update_title="",
        assets_folder=str(Path(__file__).parent / "assets"),
        index_string=PAGE,
        meta_tags=[{"name": "viewport", "content": "width=device-width, initial-scale=1"}],
        add_log_handler=False,
        enable_mcp=False,
    )
    app.layout = layout(summaries.measurements)
    filler = Filler(monitor, summaries)
    tick = Input("tick", "n_intervals")
    app.callback(outputs(LIVE), tick)(filler.live)
    app.callback(outputs(SENSORS), tick, State("known", "data"), State("sensor", "value"))(filler.sensors)
    chosen = [Input(control, "value") for control in ("sensor", "measurement", "range")]
    app.callback(outputs(CHART), *chosen, Input("chart-tick", "n_intervals"), State("shown", "data"))(filler.chart)
    allow_own_content_only(app)
    if is_loopback(host):
        refuse_other_hosts(app)
    return app


def outputs(names: str) -> dict[str, Output]:
    """Properties of the page's parts, by the names under which a callback returns them."""
    return {f"{part}.{value}": Output(part, value) for part, value in (name.split(".") for name in names.split())}


def refuse_other_hosts(app: Dash) -> None:
    """A page from elsewhere may reach this machine under a name of its own, and then a browser lets it read."""

    def refuse() -> None:
        if not is_ours(request.headers.get("Host")):
            abort(HTTPStatus.FORBIDDEN)

    app.server.before_request(refuse)


def allow_own_content_only(app: Dash) -> None:
    """Tell the browser that nothing of the page comes from elsewhere, and that no other page may frame it."""
    scripts = " ".join(app.csp_hashes())
    policy = (
        f"default-src 'self'; script-src 'self' {scripts}; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; frame-ancestors 'none'"
    )

    def add_policy(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = policy
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    app.server.after_request(add_policy)


def layout(measurements: Sequence[str]) -> html.Main:
    """The parts of the page, still empty."""
    return html.Main(
        [
            html.H1("Sensor pipeline"),
            html.Div(id="banner", role="alert", hidden=True),
            html.Section([html.H2("Now"), html.Dl(tiles({}), id="tiles")]),
            html.Section(
                [
                    small_chart("rates", "Messages per second"),
                    small_chart("lag", "Lag, messages"),
                    small_chart("freshness", "Freshness, seconds"),
                ],
                className="small-charts",
            ),
            html.Section(
                [
                    html.H2("Intervals"),
                    controls(measurements),
                    html.P(id="joined"),
                    chart("chart"),
                    html.P(id="chart-text"),
                ]
            ),
            html.P("Times are UTC. Values are in the units of the readings.", className="note"),
            dcc.Interval(id="tick", interval=SAMPLE_INTERVAL_S * 1000),
            dcc.Interval(id="chart-tick", interval=CHART_INTERVAL_S * 1000),
            dcc.Store(id="known"),
            dcc.Store(id="shown"),
        ]
    )


def controls(measurements: Sequence[str]) -> html.Div:
    """The choice of sensor, measurement and range."""
    return html.Div(
        [
            choice("Sensor", dcc.Dropdown(id="sensor", clearable=False, placeholder="none yet")),
            choice("Measurement", dcc.RadioItems(list(measurements), measurements[0], id="measurement", inline=True)),
            choice("Range, up to the newest interval", dcc.RadioItems(list(RANGES), "7 days", id="range", inline=True)),
        ],
        className="controls",
    )


def choice(label: str, control: Component) -> html.Fieldset:
    """A control in a group that gives it its name: a Dropdown cannot be labelled otherwise."""
    return html.Fieldset([html.Legend(label), control])


def small_chart(name: str, title: str) -> html.Div:
    """A chart of the last minutes with its title."""
    return html.Div([html.H3(title), chart(name)])


def chart(name: str) -> html.Div:
    """A chart; what it says is also in the text beside it."""
    graph = dcc.Graph(id=name, figure=charts.live([]), config=charts.CONFIG)
    return html.Div(graph, id=f"{name}-box", className="chart")


def tiles(values: dict[str, str]) -> list[html.Div]:
    """Names and numbers; a dash for what is not known."""
    return [html.Div([html.Dt(name), html.Dd(values.get(name, UNKNOWN))]) for name in TILES]


class Filler:
    """What the callbacks return. None of them waits for a server that is known to be unavailable."""

    def __init__(self, monitor: Monitor, summaries: SummaryReader) -> None:
        self._monitor = monitor
        self._summaries = summaries

    def live(self, _tick: int | None) -> dict[str, Any]:
        """Banner, tiles and small charts from the last samples."""
        topics, queues = list(self._monitor.topics), list(self._monitor.queues)
        problems = [each for each in (self._monitor.database_problem, self._monitor.kafka_problem) if each]
        seen = LAST_SEEN if topics or queues else NEVER_SEEN
        return {
            "banner.children": [html.P(text) for text in (seen, *problems)] if problems else [],
            "banner.hidden": not problems,
            "tiles.children": tiles(numbers(topics, queues, self._monitor.sensors)),
            "rates.figure": charts.rate_chart(topics),
            "lag.figure": charts.lag_chart(topics),
            "freshness.figure": charts.freshness_chart(queues),
        }

    def sensors(self, _tick: int | None, known: int | None, chosen: str | None) -> dict[str, Any]:
        """The choice of sensors. Raises PreventUpdate if it is the one that is ``known``."""
        sensors = self._monitor.sensors or []
        version = hash(tuple(sensors)) % 2**32
        if version == known:
            raise PreventUpdate
        chosen = chosen if chosen in sensors or not sensors else sensors[0]
        return {"sensor.options": sensors, "sensor.value": chosen, "known.data": version}

    def chart(
        self, sensor: str | None, measurement: str, span: object, _tick: int | None, shown: int | None
    ) -> dict[str, Any]:
        """The chart of one sensor and its text. Raises PreventUpdate if they are the ones that are ``shown``."""
        if measurement not in self._summaries.measurements or not isinstance(span, str) or span not in RANGES:
            raise PreventUpdate
        nothing = {"chart.figure": no_update, "chart-box.hidden": True, "joined.children": ""}
        if self._monitor.sensors is None or sensor is None:
            text = NO_DATABASE if self._monitor.sensors is None else NO_READINGS
            return nothing | {"chart-text.children": text, "shown.data": None}
        if self._monitor.database_problem:
            raise PreventUpdate
        try:
            series = self._summaries.series(measurement, sensor, RANGES[span])
        except PipelineError as error:  # the monitor reports it, in the banner and in the log
            raise PreventUpdate from error
        name = f"{sensor} {measurement} {span}"
        version = hash((name, tuple(series.points) if series is not None else ())) % 2**32
        if version == shown:
            raise PreventUpdate
        if series is None:
            return nothing | {"chart-text.children": f"{sensor} has no {measurement} intervals", "shown.data": version}
        return {
            "chart.figure": charts.series_chart(series, name),
            "chart-box.hidden": False,
            "chart-text.children": describe(series, f"{sensor}, {measurement}"),
            "joined.children": note(series),
            "shown.data": version,
        }


def numbers(topics: list[TopicSample], queues: list[QueueSample], sensors: list[str] | None) -> dict[str, str]:
    """The tiles' texts, as far as they are known."""
    found: dict[str, str] = {}
    if topics:
        found |= {"lag": f"{topics[-1].lag:,}", "dead letters": f"{topics[-1].dead_letters:,}"}
    if len(topics) > 1:
        _, published, stored = rates(topics)[-1]
        found |= {"published": f"{published:,.0f} /s", "stored": f"{stored:,.0f} /s"}
    if queues:
        found |= {"freshness": f"{queues[-1].freshness_s:,.1f} s", "queue": f"{queues[-1].rows:,}"}
    if sensors is not None:
        found["sensors"] = f"{len(sensors):,}" + (" or more" if len(sensors) == MAX_SENSORS else "")
    return found


def describe(series: Series, name: str) -> str:
    """The chart in words."""
    points = series.points
    readings = sum(point.readings for point in points)
    what = "intervals" if series.width == series.stored else "points"
    return (
        f"{name}: {len(points):,} {what} of {duration(series.width)} from {points[0].start:%Y-%m-%d %H:%M} to "
        f"{series.end:%Y-%m-%d %H:%M}, {readings:,} readings; minimum {min(point.least for point in points):.6g}, "
        f"maximum {max(point.greatest for point in points):.6g}, newest average {points[-1].average:.6g}."
    )


def note(series: Series) -> str:
    """Why the points are not the intervals of the summary; empty if they are."""
    if series.width == series.stored:
        return ""
    return (
        f"Each point joins {series.width // series.stored:,} intervals of {duration(series.stored)}: there are too "
        "many to draw individually. A shorter range shows each one."
    )


def duration(width: timedelta) -> str:
    """``10 minutes``, ``3 hours``, ``2 days``."""
    for unit, name in ((timedelta(days=1), "day"), (timedelta(hours=1), "hour"), (timedelta(minutes=1), "minute")):
        count, rest = divmod(width, unit)
        if count and not rest:
            return f"{count:,} {name}" + ("s" if count > 1 else "")
    return str(width)
