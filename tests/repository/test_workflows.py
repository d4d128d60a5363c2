"""What the workflows of GitHub Actions promise; they cannot run here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.local.runtime import KAFKA_VERSION
from tests import ROOT

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FILES = [*WORKFLOWS, *(ROOT / ".github/actions").rglob("action.yml")]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def read(name: str) -> dict[str, Any]:
    """A workflow. Its key ``on`` is True, as YAML 1.1 has it."""
    found: dict[str, Any] = yaml.safe_load(text_of(ROOT / ".github/workflows" / name))
    return found


def test_all_workflows_are_seen() -> None:
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "nightly.yml", "servers.yml"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name + "/" + path.name)
def test_every_make_target_exists(path: Path) -> None:
    called = {
        word
        for line in re.findall(r"(?:run|command): .*?\bmake (.*)$", text_of(path), re.MULTILINE)
        for word in line.split()
        if re.fullmatch("[a-z-]+", word)
    }
    assert called <= set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))
    assert called or path.name == "servers.yml"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name + "/" + path.name)
def test_actions_of_others_are_pinned_by_commit(path: Path) -> None:
    for action in re.findall(r"uses: (.*)$", text_of(path), re.MULTILINE):
        if action.startswith("./"):
            assert (ROOT / action).exists(), action
        else:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name + "/" + path.name)
def test_nothing_that_others_write_is_pasted_into_a_script(path: Path) -> None:
    assert not re.findall(r"run:.*\$\{\{", text_of(path))
    assert not re.findall(r"^ {10,}[^:\n]*\$\{\{", text_of(path), re.MULTILINE)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_jobs_may_only_read_and_end_in_time(path: Path) -> None:
    workflow = read(path.name)
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert "permissions" not in job
        assert ("timeout-minutes" in job) != ("uses" in job), name


def test_the_oldest_and_the_newest_servers_are_those_of_the_documents() -> None:
    oldest, newest = read("ci.yml")["jobs"]["native"]["strategy"]["matrix"]["include"]
    (supported,) = re.findall(r"PostgreSQL with TimescaleDB (\d+\.\d+) or newer", text_of(ROOT / "README.md"))
    assert oldest["timescaledb"].startswith(f"timescale/timescaledb:{supported}.0-pg")
    assert newest["timescaledb"].partition("-pg")[0] in COMPOSE["timescaledb"]["image"]
    assert newest["kafka"] in COMPOSE["kafka"]["image"]
    assert newest["kafka"] == f"apache/kafka:{KAFKA_VERSION}"
    defaults = read("servers.yml")[True]["workflow_call"]["inputs"]  # type: ignore[index]
    assert {name: defaults[name]["default"] for name in ("timescaledb", "kafka")} == {
        name: newest[name] for name in ("timescaledb", "kafka")
    }


def test_every_python_that_is_supported_is_tested() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    versions = read("ci.yml")["jobs"]["unit"]["strategy"]["matrix"]["python"]
    assert f'requires-python = ">={versions[0]}"' in project
    assert versions == [f"3.{minor}" for minor in range(11, 11 + len(versions))]
