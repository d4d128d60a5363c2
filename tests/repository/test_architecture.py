"""The rules of the layout, checked on the source: who may import what, where the environment and SQL live."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

SERVICES = ROOT / "services"
PIPELINE = ("producer", "consumer", "etl")
WITH_QUERIES = sorted({path.parent.name for path in SERVICES.glob("*/*.sql")})

# The table that lives for one transaction of the consumer is no schema.
TEMPORARY = re.compile("CREATE TEMPORARY TABLE incoming|DROP TABLE incoming")
DDL = re.compile(r"\b(CREATE|ALTER|DROP|TRUNCATE|GRANT|REVOKE)\s+[A-Z]+\s+(\w|{)")


def modules(*packages: str) -> list[Path]:
    """The Python files of packages below services, or all of them."""
    folders = [SERVICES / package for package in packages] or [SERVICES]
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path)))


def imported_packages(path: Path) -> set[str]:
    """The packages below services that a module imports, wherever in the module it does so."""
    names: list[str] = []
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("services.")}


def texts(path: Path) -> list[str]:
    """The string constants of a module."""
    return [node.value for node in nodes(path) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def subscripts(path: Path) -> list[ast.expr]:
    """What a module looks up in SQL, the dictionary of its queries."""
    return [
        node.slice
        for node in nodes(path)
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "SQL"
    ]


def statements(package: str) -> str:
    """The SQL files of a package."""
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted((SERVICES / package).glob("*.sql")))


def pattern(text: ast.JoinedStr) -> str:
    """An f-string as a pattern; what is filled in matches any letters."""
    return "".join(re.escape(str(part.value)) if isinstance(part, ast.Constant) else "[a-z]+" for part in text.values)


@pytest.mark.parametrize("package", ["core", "producer", "consumer", "etl", "status", "dashboard", "local"])
def test_a_service_imports_nothing_but_itself_and_core(package: str) -> None:
    files = modules(package)
    assert files
    for path in files:
        assert imported_packages(path) <= {package, "core"}, path


def test_only_the_settings_read_the_environment() -> None:
    """Elsewhere the environment may only be passed on whole to a child process: ``os.environ | ...``."""
    for path in modules("core", "status", "dashboard", *PIPELINE):
        if path.name == "config.py":
            continue
        read = [node.attr for node in nodes(path) if isinstance(node, ast.Attribute)]
        assert not {"environ", "getenv", "environb"} & set(read), path
    names = {field for path in modules("local") for field in texts(path)} & {"POSTGRE_HOST", "KAFKA_HOST"}
    assert not names


def test_tables_are_created_by_migrations_only() -> None:
    """logins.py gives the roles that they create their passwords, which are no part of a schema."""
    for path in [*modules("core", "producer", "consumer", "status", "dashboard"), *SERVICES.glob("*/*.sql")]:
        if path.parent.name == "etl" or path.name == "logins.py":
            continue
        found = path.read_text(encoding="utf-8") if path.suffix == ".sql" else "\n".join(texts(path))
        assert not DDL.search(TEMPORARY.sub("", found)), path


def test_etl_creates_and_drops_nothing_but_aggregates_and_their_views() -> None:
    found = {match.group(0).rsplit(maxsplit=1)[0] for match in DDL.finditer(statements("etl"))}
    allowed = {"CREATE MATERIALIZED", "DROP MATERIALIZED", "CREATE OR", "ALTER VIEW", "ALTER TABLE"}
    assert found <= allowed


def test_services_wait_for_an_event_and_never_sleep() -> None:
    """A sleep holds up the end of a service for as long as it lasts."""
    for path in modules("core", "consumer", "etl", "status", "dashboard"):
        for node in nodes(path):
            if isinstance(node, ast.Attribute) and node.attr == "sleep":
                pytest.fail(f"{path}:{node.lineno} sleeps")


@pytest.mark.parametrize("package", WITH_QUERIES)
def test_every_query_is_used_and_every_used_query_exists(package: str) -> None:
    names = re.findall(r"^-- name: (\S+)$", statements(package), re.MULTILINE)
    assert len(names) == len(set(names))
    words = {word for path in modules(package) for word in texts(path)}
    looked_up = [item for path in modules(package) for item in subscripts(path)]
    patterns = [pattern(item) for item in looked_up if isinstance(item, ast.JoinedStr)]
    unused = [name for name in names if name not in words and not any(re.fullmatch(p, name) for p in patterns)]
    assert not unused
    plain = {str(item.value) for item in looked_up if isinstance(item, ast.Constant)}
    assert plain <= set(names)


def test_the_consumer_assigns_no_logical_offset() -> None:
    """librdkafka asks the broker what END is, and may go there after the partition was assigned somewhere else."""
    for path in modules("consumer"):
        if path.name == "worker.py":
            assert not re.search(r"\bOFFSET_(END|BEGINNING|STORED|INVALID)\b", path.read_text(encoding="utf-8"))
