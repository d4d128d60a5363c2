"""Prometheus' and Grafana's files: they parse, and name only what exists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import promql_parser as promql
import pytest
import yaml

from tests import ROOT
from tests.grafana import DASHBOARDS, MONITORING, dashboard, fill_promql, queries
from tests.metric_names import samples
from tests.repository.test_compose import FIXED, SERVICES

SAMPLES = samples()
# Of Prometheus itself, of the exporters in the profile monitoring, and of kube-state-metrics.
OF_OTHERS = {
    "up": set(),
    "ALERTS": {"alertname", "alertstate", "severity", "server", "reason"},
    "node_filesystem_avail_bytes": {"device", "fstype", "mountpoint"},
    "node_filesystem_size_bytes": {"device", "fstype", "mountpoint"},
    "pg_stat_database_numbackends": {"datname"},
    "pg_settings_max_connections": set(),
    "pg_database_wraparound_age_datfrozenxid_seconds": {"datname"},
    "kube_cronjob_created": {"cronjob"},
    "kube_cronjob_status_last_schedule_time": {"cronjob"},
    "kube_cronjob_status_last_successful_time": {"cronjob"},
}
EVERYWHERE = {"job", "instance", "namespace"}
LABELS = {name: labels | EVERYWHERE for name, labels in (SAMPLES | OF_OTHERS).items()}
COUNTED = ("_total", "_bucket", "_sum", "_count")


def load(path: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((MONITORING / path).read_text(encoding="utf-8"))
    return content


PROMETHEUS = load("prometheus/prometheus.yml")
ALERTS: list[dict[str, Any]] = [rule for group in load("prometheus/alerts.yml")["groups"] for rule in group["rules"]]
ON_PANELS = queries("prometheus")


def nodes(expression: promql.Expr) -> Iterator[promql.Expr]:
    found: list[promql.Expr] = []
    promql.walk(expression, found.append)
    return iter(found)


def check(text: str) -> set[str]:
    """Parse an expression and check its names; the labels that its result has."""
    expression = promql.parse(text)
    labels: set[str] = set()
    for node in nodes(expression):
        if isinstance(node, promql.VectorSelector):
            assert node.name in LABELS, f"{node.name} is not registered: {text}"
            labels |= LABELS[node.name]
            assert {matcher.name for matcher in node.matchers.matchers} <= LABELS[node.name], text
        elif isinstance(node, promql.Call) and node.func.name in {"rate", "increase"}:
            (ranged,) = node.args
            assert ranged.vector_selector.name.endswith(COUNTED), f"no counter: {text}"
    for node in nodes(expression):
        if isinstance(node, promql.AggregateExpr) and node.modifier is not None:
            assert set(node.modifier.labels) <= labels, text
    while isinstance(expression, promql.BinaryExpr):
        expression = expression.lhs
    while isinstance(expression, promql.Call) and expression.func.name == "histogram_quantile":
        expression = expression.args[1]
    if isinstance(expression, promql.AggregateExpr):
        return set(expression.modifier.labels) if expression.modifier is not None else set()
    return labels


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: str(rule["alert"]))
def test_an_alert_parses_and_tells_what_to_do(rule: dict[str, Any]) -> None:
    labels = check(rule["expr"])
    assert rule["labels"]["severity"] in ({"none"} if rule["alert"] == "SensorWatchdog" else {"critical", "warning"})
    assert set(rule["annotations"]) == {"summary", "runbook"}
    assert set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])) <= labels
    document, anchor = rule["annotations"]["runbook"].split("#")
    assert (document, anchor) == ("docs/operations.md", rule["alert"].lower())
    if "for" in rule:
        assert re.fullmatch(r"\d+[smh]", rule["for"])


def test_alerts_have_names_of_their_own() -> None:
    names = [rule["alert"] for rule in ALERTS]
    assert len(names) == len(set(names)) >= 7
    assert all(re.fullmatch(r"Sensor[A-Z]\w+", name) for name in names)


@pytest.mark.parametrize("query", ON_PANELS, ids=str)
def test_a_panel_asks_for_what_exists(query: Any) -> None:
    assert set(re.findall(r"{{(\w+)}}", query.legend)) <= check(fill_promql(query.text))


@pytest.mark.parametrize("query", ON_PANELS, ids=str)
def test_a_panel_shows_the_chosen_namespace(query: Any) -> None:
    """Which is every one, and what has none, unless somebody chooses."""
    selectors = [
        node for node in nodes(promql.parse(fill_promql(query.text))) if isinstance(node, promql.VectorSelector)
    ]
    assert query.text.count('namespace=~"$namespace"') == len(selectors) > 0


def test_every_metric_is_on_a_panel() -> None:
    shown = "\n".join(query.text for query in ON_PANELS)
    missing = [
        name
        for name in SAMPLES
        if name.startswith("sensor_") and not re.search(rf"\b{re.sub('_(bucket|sum|count)$', '', name)}", shown)
    ]
    assert not missing


def test_an_alert_is_about_a_job_or_a_server_and_not_about_each_instance() -> None:
    """So that one fault of a service pages once; the servers' exporters have one instance for each server."""
    for rule in ALERTS:
        others = {node.name for node in nodes(promql.parse(rule["expr"])) if isinstance(node, promql.VectorSelector)}
        assert "instance" not in check(rule["expr"]) or others <= OF_OTHERS.keys(), rule["alert"]


def test_prometheus_finds_every_container_of_every_service() -> None:
    assert PROMETHEUS["rule_files"] == ["alerts.yml"]
    jobs = {job["job_name"]: job["dns_sd_configs"] for job in PROMETHEUS["scrape_configs"]}
    ours = dict.fromkeys(("producer", "consumer", "etl"), FIXED["METRICS_PORT"])
    ports = ours | {"node": "9100", "postgres": "9187"}
    assert set(jobs) == ports.keys() <= SERVICES.keys()
    for name, (found,) in jobs.items():
        assert found["names"] == [name]
        assert (found["type"], str(found["port"])) == ("A", ports[name])


def test_alerts_go_to_those_that_a_file_of_ours_names() -> None:
    (found,) = PROMETHEUS["alerting"]["alertmanagers"]
    (files,) = found["file_sd_configs"]
    assert not [target for name in files["files"] for target in load(f"prometheus/{name}")]


def test_dashboards_use_the_sources_that_are_provisioned() -> None:
    provisioned = load("grafana/provisioning/datasources/datasources.yml")["datasources"]
    sources = {(source["type"], source["uid"]) for source in provisioned}
    assert sources == {("prometheus", "prometheus"), ("postgres", "postgresql")}
    assert DASHBOARDS
    for path in DASHBOARDS:
        content = dashboard(path)
        panels = [panel for panel in content["panels"] if panel["type"] != "row"]
        for item in [*panels, *content["templating"]["list"]]:
            assert (item["datasource"]["type"], item["datasource"]["uid"]) in sources
        for panel in panels:
            assert panel["title"]
            assert panel["description"]


def test_what_compose_mounts_is_there() -> None:
    for name, inside in (("prometheus", "/etc/prometheus"), ("grafana", "/etc/dashboards")):
        (source,) = re.findall(rf"\./(\S+):{inside}:ro,z", " ".join(SERVICES[name]["volumes"]))
        assert any((ROOT / source).iterdir())
    providers = load("grafana/provisioning/dashboards/dashboards.yml")["providers"]
    assert [provider["options"]["path"] for provider in providers] == ["/etc/dashboards"]
    links = [link["url"] for path in DASHBOARDS for link in dashboard(path)["links"]]
    assert {link.removeprefix("/d/") for link in links} == {dashboard(path)["uid"] for path in DASHBOARDS}
