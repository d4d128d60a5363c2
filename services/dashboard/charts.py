"""Figures as Plotly takes them: plain dictionaries."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import pairwise
from statistics import median
from typing import Any

from services.dashboard.monitor import QueueSample, TopicSample, rates
from services.dashboard.series import Point, Series

Figure = dict[str, Any]

INK = "#1b2733"
GRID = "#dde3e9"
BLUE = "#0b5cad"
ORANGE = "#b34700"
BAND = "rgba(11, 92, 173, 0.18)"
GAP = 3.0  # the line breaks where points are this many times further apart than usual
LEAST_SHOWN = timedelta(minutes=1)
CONFIG: Any = {"displayModeBar": False, "responsive": True}


def moment(time: datetime) -> str:
    """A time in UTC as Plotly reads it, without an offset."""
    return time.replace(tzinfo=None).isoformat(" ", "milliseconds")


def layout(**changes: Any) -> dict[str, Any]:
    """What all figures share."""
    axis = {"gridcolor": GRID, "linecolor": GRID, "zeroline": False, "automargin": True}
    shared = {
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "margin": {"l": 48, "r": 12, "t": 8, "b": 32},
        "hovermode": "x unified",
        "xaxis": axis | {"type": "date"},
        "yaxis": axis,
        "showlegend": False,
    }
    return shared | changes


def line(times: Sequence[datetime], values: Sequence[float | None], name: str, color: str, **changes: Any) -> Figure:
    """One line."""
    trace = {"type": "scatter", "mode": "lines", "name": name, "line": {"color": color, "width": 2}}
    return trace | {"x": [moment(time) for time in times], "y": list(values)} | changes


def live(times: Sequence[datetime], *lines: tuple[str, str, Sequence[float]]) -> Figure:
    """A small chart of the last minutes: a name, a dash and values for each line. Values begin at 0."""
    data = [
        line(times, values, name, color, line={"color": color, "width": 2, "dash": dash})
        for color, (name, dash, values) in zip((BLUE, ORANGE), lines, strict=False)
    ]
    figure = layout(uirevision="live", showlegend=len(lines) > 1, legend={"orientation": "h", "y": 1.4, "x": 0})
    figure["margin"]["t"] = 28
    figure["yaxis"] |= {"rangemode": "tozero", "nticks": 4, "minallowed": 0}
    figure["xaxis"] |= {"tickformat": "%H:%M:%S", "nticks": 5}
    if times:
        figure["xaxis"]["range"] = [moment(min(times[0], times[-1] - LEAST_SHOWN)), moment(times[-1])]
    return {"data": data, "layout": figure}


def rate_chart(topics: list[TopicSample]) -> Figure:
    """Messages per second, published and stored; where both are equal, both are seen."""
    found = rates(topics)
    published = ("published", "solid", [published for _, published, _ in found])
    stored = ("stored", "dot", [stored for _, _, stored in found])
    return live([at for at, _, _ in found], published, stored)


def lag_chart(topics: list[TopicSample]) -> Figure:
    """Messages that wait to be stored."""
    return live([each.at for each in topics], ("lag", "solid", [each.lag for each in topics]))


def freshness_chart(queues: list[QueueSample]) -> Figure:
    """Age of the oldest reading that waits to be summarised."""
    return live([each.at for each in queues], ("seconds", "solid", [each.freshness_s for each in queues]))


def series_chart(series: Series, name: str) -> Figure:
    """The average as a line, from minimum to maximum as a band. ``name`` keeps the zoom as long as it is the same."""
    data: list[Figure] = []
    for at, points in enumerate(pieces(series.points)):
        times = [point.start for point in points]
        edge = [point.least for point in points] + [point.greatest for point in reversed(points)]
        band = {"fill": "toself", "fillcolor": BAND, "hoverinfo": "skip", "showlegend": not at}
        data.append(line([*times, *reversed(times)], edge, "minimum to maximum", BAND, **band))
        data.append(
            line(
                times,
                [point.average for point in points],
                "average",
                BLUE,
                mode="lines+markers",
                marker={"size": 4},
                showlegend=not at,
                customdata=[[point.least, point.greatest, point.readings] for point in points],
                hovertemplate="%{y:.6~g} (%{customdata[0]:.6~g} to %{customdata[1]:.6~g}), %{customdata[2]:,} readings"
                "<extra></extra>",
            )
        )
    legend = {"orientation": "h", "y": 1.1, "x": 0}
    return {"data": data, "layout": layout(uirevision=name, showlegend=True, legend=legend)}


def pieces(points: list[Point]) -> list[list[Point]]:
    """The points, parted where some are missing."""
    gaps = [(after.start - before.start).total_seconds() for before, after in pairwise(points)]
    usual = median(gaps) if gaps else 0.0
    found = [points[:1]] if points else []
    for gap, point in zip(gaps, points[1:], strict=True):
        if gap > GAP * usual:
            found.append([])
        found[-1].append(point)
    return found
