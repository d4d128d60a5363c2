"""The metrics: docs/metrics.md lists exactly those that the services register, and names follow Prometheus."""

from __future__ import annotations

import ast
import re

import pytest

from services.consumer import metrics as consumer
from services.core.errors import Reason
from services.producer import metrics as producer
from services.producer.times import DOUBTS
from tests import ROOT
from tests.metric_names import MODULES, registered

PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")


def listed(section: str) -> dict[str, tuple[str, set[str]]]:
    (text,) = re.findall(rf"^## {section}$(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    assert all(meaning for *_, meaning in rows)
    return {name.strip("`"): (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels, _, _ in rows}


@pytest.mark.parametrize("section", MODULES)
def test_the_page_lists_what_is_registered(section: str) -> None:
    assert registered(MODULES[section])
    assert listed(section) == registered(MODULES[section])


@pytest.mark.parametrize("section", MODULES)
def test_names_follow_the_conventions(section: str) -> None:
    for name, (kind, _) in registered(MODULES[section]).items():
        assert re.fullmatch(r"sensor_[a-z]+(_[a-z]+)*", name)
        assert (kind == "counter") == name.endswith("_total")
        assert not re.search(r"_(ms|millis|minutes|hours|kb|mb)(_|$)", name)


def reasons_given(*calls: str) -> set[Reason]:
    """The reasons in calls of these anywhere below services."""
    found: set[Reason] = set()
    for path in (ROOT / "services").glob("*/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in calls:
                names = [ast.unparse(argument) for argument in node.args]
                found |= {Reason[name.removeprefix("Reason.")] for name in names if name.startswith("Reason.")}
    return found


def test_every_reason_of_a_dead_letter_has_its_series_from_the_start() -> None:
    reasons = set(Reason)
    assert len(reasons) > 5
    assert reasons == reasons_given("MalformedMessageError", "Refused")
    (metric,) = consumer.DEAD_LETTERS.collect()
    assert reasons == {sample.labels["reason"] for sample in metric.samples}
    assert documented("sensor_dead_letters_total") >= reasons


def test_every_reason_of_a_skipped_row_has_its_series_from_the_start() -> None:
    source = (ROOT / "services" / "producer" / "encoding.py").read_text(encoding="utf-8")
    reasons = dict.fromkeys(re.findall(r'choice\.skip\("(\w+)", ', source))
    assert len(reasons) > 5
    assert tuple(reasons) == producer.REASONS
    assert documented("sensor_rows_skipped_total") >= set(reasons)


def test_every_kind_of_a_doubtful_time_is_documented() -> None:
    assert documented("sensor_times_doubtful_total") >= set(DOUBTS)


def documented(metric: str) -> set[str]:
    """The values that the page names for a label."""
    (row,) = re.findall(rf"^\| `{metric}` \|.*$", PAGE, re.MULTILINE)
    return set(re.findall(r"`(\w+)`", row))
