"""What any document names exists: links and anchors, files, tests, settings, commands, make targets, identifiers."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from services.cli import parser
from services.core.config import settings_type
from services.core.measurements import DEFAULT
from tests import ROOT

DOCUMENTS = sorted(
    path
    for path in (found.relative_to(ROOT).as_posix() for found in ROOT.rglob("*.md"))
    if not re.search(r"^\.|/\.|(^|/)(node_modules|build)/|\.egg-info/", path)
)
SOURCES = (
    "services",
    "migrations",
    "tests",
    "deploy",
    "docker-compose.yml",
    "Makefile",
    "pyproject.toml",
    ".env.example",
)
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))
SETTINGS = {name.upper() for name in settings_type(DEFAULT).model_fields}
OF_COMPOSE_AND_TESTS = set(
    re.findall(r"\b[A-Z]+_[A-Z_]+\b", (ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
) | {
    f"TEST_{server}_{name}"
    for server in ("POSTGRE", "KAFKA")
    for name in ("HOST", "PORT", "USER", "PASSWORD", "DBNAME")
}

# What a line of the shell begins with; then come arguments up to the end of the code.
SHELL = r"(?:^\$ |`|&& )(?:[A-Z_]+=\S+ )*"
# Names of other programs, and of what readers call their own, that look like names of ours.
OF_OTHERS = {
    "init_transactions",
    "pg_dump",
    "pg_restore",
    "pg_wal",
    "pg_upgrade",
    "synchronous_commit",
    "isolation_level",
    "refresh_continuous_aggregate",
    "kubelet_volume_stats_available_bytes",
}


def read(document: str) -> str:
    """The text of a document."""
    return (ROOT / document).read_text(encoding="utf-8")


def prose(text: str) -> str:
    """The text without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


@cache
def anchors(document: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", prose(read(document)), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower().strip()
        slug = anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        number = 0
        while anchor in found:
            number += 1
            anchor = f"{slug}-{number}"
        found.add(anchor)
    return found


def exists(target: str, document: str) -> bool:
    """Whether a link that is written in ``document`` leads to a file or folder of ours and an anchor of it."""
    path, _, anchor = target.partition("#")
    there = ((ROOT / document).parent / path).resolve() if path else ROOT / document
    if not there.exists() or not there.is_relative_to(ROOT):
        return False
    return not anchor or anchor in anchors(there.relative_to(ROOT).as_posix())


@cache
def source() -> str:
    """Everything that can define a name that a document uses."""
    files = [
        path for name in SOURCES for path in ([ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*"))
    ]
    kinds = {".py", ".sql", ".yml", ".yaml", ".toml", ".mjs", ".json", ".example", ""}
    return "\n".join(
        path.read_text(encoding="utf-8")
        for path in files
        if path.is_file() and path.suffix in kinds and not {"node_modules", "__pycache__"} & set(path.parts)
    )


@pytest.fixture(params=DOCUMENTS)
def document(request: pytest.FixtureRequest) -> str:
    """Each document in turn."""
    return str(request.param)


def test_the_documents_are_seen() -> None:
    assert {"README.md", "CHANGELOG.md", "docs/guarantees.md", "docs/decisions/0001-natural-key.md"} <= set(DOCUMENTS)


def test_every_link_leads_somewhere(document: str) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(read(document)))
    assert not [target for target in targets if ":" not in target and not exists(target, document)]


def test_every_setting_exists(document: str) -> None:
    named = set(
        re.findall(
            r"\b((?:POSTGRE|KAFKA|DATA_FEATURE|PARQUET|PRODUCER|CONSUMER|MAX|RAW|COMPRESS|ETL|METRICS|STARTUP|LOG)"
            r"_[A-Z_]*[A-Z])\b",
            read(document),
        )
    )
    added_by_a_recipe = {name.upper() for name in re.findall(r"^\+ *(\w+)[=:]", read(document), re.MULTILINE)}
    assert named <= SETTINGS | OF_COMPOSE_AND_TESTS | added_by_a_recipe


def test_every_command_is_one(document: str) -> None:
    for command in re.findall(
        rf"{SHELL}sensor-pipeline ([a-z][a-z-]*(?: [A-Za-z][\w.-]*)?(?: --[a-z-]+(?: [\d.]+x?)?)*)",
        read(document),
        re.MULTILINE,
    ):
        parser().parse_args(command.split())


def test_every_make_target_exists(document: str) -> None:
    found = re.findall(rf"{SHELL}make ((?:[a-z-]+ ?)+)", read(document), re.MULTILINE)
    assert {target for targets in found for target in targets.split()} <= TARGETS


def test_every_make_target_has_a_line_of_help() -> None:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert set(phony.split()) == TARGETS
    assert set(re.findall(r"^([a-z-]+):.*## \S", MAKEFILE, re.MULTILINE)) == TARGETS


def test_every_path_exists(document: str) -> None:
    named = re.findall(
        r"`((?:services|migrations|tests|data|deploy|docs|requirements|\.ci|\.github)/[\w./-]*)`", prose(read(document))
    )
    assert not [path for path in named if not (ROOT / path).exists()]


def test_every_name_is_in_the_file_that_is_said_to_have_it(document: str) -> None:
    """```Class.method`` in ``services/…/file.py```, or a statement of a file of SQL."""
    for name, path in re.findall(r"`([\w.]+)` in `((?:services|migrations)/[\w./-]+)`", read(document)):
        for part in name.split("."):
            assert re.search(rf"(?:\b(?:class|def)|-- name:|FUNCTION) {part}\b", read(path)), f"{name} in {path}"


def named_tests(text: str) -> list[tuple[str, str]]:
    """``tests/…/test_x.py::test_name``, or ``::test_name`` for another one of the file named before it."""
    file, found = "", []
    for named, name in re.findall(r"`(tests/[\w/]+\.py)?::(test_\w+)`", text):
        file = named or file
        found.append((file, name))
    return found


def test_every_test_that_is_named_exists(document: str) -> None:
    for file, name in named_tests(read(document)):
        assert f"def {name}(" in read(file), f"{file}::{name}"


def test_each_promise_has_a_test_that_is_not_slow() -> None:
    """``make test`` leaves slow ones out."""
    sections = re.split(r"^## ", read("docs/guarantees.md"), flags=re.MULTILINE)
    shown = {text.partition("\n")[0]: tests for text in sections if (tests := named_tests(text))}
    assert len(shown) >= 8
    for promise, tests in shown.items():
        slow = {(file, name) for file, name in tests if is_slow(file, name)}
        assert set(tests) - slow, promise


def is_slow(file: str, name: str) -> bool:
    """Whether all of a test, or of its file, is marked so."""
    found = re.findall(rf"^((?:@(?:.+|.+\((?:\n .*)+\n\))\n)*)def {name}\(", read(file), re.MULTILINE)
    return "@pytest.mark.slow" in found[0] or "\npytestmark = pytest.mark.slow" in read(file)


def test_every_identifier_is_in_the_source(document: str) -> None:
    named = set(re.findall(r"`([a-z]+(?:_[a-z0-9]+)+)`", prose(read(document))))
    assert not {name for name in named - OF_OTHERS if not re.search(rf"\b{name}\b", source())}


def test_every_alert_has_its_runbook() -> None:
    """And every runbook its alert, in the same order."""
    rules = yaml.safe_load((ROOT / "deploy/monitoring/prometheus/alerts.yml").read_text(encoding="utf-8"))
    alerts = [rule for group in rules["groups"] for rule in group["rules"]]
    (section,) = re.findall(r"^## Alerts$(.*?)^## ", read("docs/operations.md"), re.MULTILINE | re.DOTALL)
    assert re.findall(r"^### (.*)$", section, re.MULTILINE) == [alert["alert"] for alert in alerts]
    for alert in alerts:
        document, _, anchor = alert["annotations"]["runbook"].partition("#")
        assert anchor in anchors(document)
        assert anchor == alert["alert"].lower()


def test_every_decision_is_listed_in_order() -> None:
    listed = re.findall(r"^(\d)\. \[.*\]\(decisions/(\d{4})-[a-z-]+\.md\)$", read("docs/architecture.md"), re.MULTILINE)
    written = sorted(path.name[:4] for path in Path(ROOT / "docs/decisions").glob("[0-9]*.md"))
    assert [number for _, number in listed] == written
    assert [f"{int(place):04}" for place, _ in listed] == written


@pytest.mark.parametrize("path", sorted((ROOT / "docs/decisions").glob("[0-9]*.md")), ids=lambda path: path.name[:4])
def test_a_decision_has_its_parts(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"# {int(path.name[:4])}. ")
    parts = re.findall(r"^\*\*(Status|Context|Decision|Consequences|Measured)", text, re.MULTILINE)
    assert parts == ["Status", "Context", "Decision", "Consequences", "Measured"]
    status = re.findall(r"^\*\*Status\.\*\* (?:Accepted|Superseded by .*), \d{4}-\d\d-\d\d\.$", text, re.MULTILINE)
    assert len(status) == 1
