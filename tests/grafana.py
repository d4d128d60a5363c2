"""What is below deploy/monitoring: the dashboards' queries, with the variables and macros that Grafana fills in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

MONITORING = Path(__file__).parent.parent / "deploy" / "monitoring"
DASHBOARDS = sorted((MONITORING / "grafana" / "dashboards").glob("*.json"))


@dataclass(frozen=True)
class Query:
    """One query of a panel, or of a variable (``panel`` is then its name)."""

    dashboard: str
    panel: str
    source: str
    text: str
    format: str = ""
    legend: str = ""

    def __str__(self) -> str:
        return f"{self.dashboard}: {self.panel}"


def dashboard(path: Path) -> dict[str, Any]:
    """A dashboard as it is."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def queries(source: str) -> list[Query]:
    """Every query that goes to ``source``: postgres or prometheus."""
    return [query for path in DASHBOARDS for query in _queries(path) if query.source == source]


def _queries(path: Path) -> Iterator[Query]:
    content = dashboard(path)
    for variable in content["templating"]["list"]:
        if variable["query"].startswith("label_values("):
            continue  # Grafana's own, and no PromQL
        yield Query(path.stem, f"${variable['name']}", variable["datasource"]["type"], variable["query"], "table")
    for panel in content["panels"]:
        for target in panel.get("targets", []):  # a row has none
            text = target["rawSql"] if "rawSql" in target else target["expr"]
            yield Query(
                path.stem,
                panel["title"],
                target["datasource"]["type"],
                text,
                target.get("format", ""),
                target.get("legendFormat", ""),
            )


def fill_sql(text: str, start: datetime, end: datetime, measurement: str, sensors: list[str], typed: str = "") -> str:
    """The SQL that Grafana sends in this row for about a day, with ``timescaledb: true``, and this typed in a list."""
    text = text.replace("${measurement:raw}", measurement)
    text = text.replace("${sensor:sqlstring}", ",".join("'" + each.replace("'", "''") + "'" for each in sensors))
    text = text.replace("$__searchFilter", f"{typed}%")
    text = text.replace("$__interval", "60s")  # a day over 1,000 pixels or so, rounded
    text = re.sub(r"\$__timeGroup(Alias)?\(([^,()]+), *'?(\d+)s'?\)", _time_bucket, text)
    text = re.sub(r"\$__timeFilter\(([^()]+)\)", r"\1 BETWEEN $__timeFrom() AND $__timeTo()", text)
    text = text.replace("$__timeFrom()", f"'{start.isoformat()}'").replace("$__timeTo()", f"'{end.isoformat()}'")
    assert "$" not in text, text
    return text


def _time_bucket(match: re.Match[str]) -> str:
    bucket = f"time_bucket('{match[3]}.000s',{match[2]})"
    return f'{bucket} AS "time"' if match[1] else bucket


def fill_promql(text: str) -> str:
    """The PromQL that Grafana sends."""
    text = text.replace("$namespace", ".*").replace("$__rate_interval", "1m").replace("$__range", "1h")
    assert "$" not in text, text
    return text
