"""What ``pip install .`` gives: the wheel in an environment of its own, far from the checkout, and no registry."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import psycopg
import pytest

from services.core.config import Settings
from tests.fix_stack import ROOT, free_port
from tests.measured import ALL_SETTINGS

# Of the gateway's files, what its server does not run with.
DEVELOPMENT = re.compile(r"^services/local/gateway/(\.npmrc|README\.md|.*/.*|biome\.json|tsconfig\.json|types\.d\.ts)$")
VERSION = "9.8.7"  # another than that of the checkout
SOURCES = ("services", "migrations", "pyproject.toml", "README.md", "LICENSE")


def typed(directory: Path, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a directory, in an environment without anything of ours."""
    plain = {name: value for name, value in os.environ.items() if name.lower() not in ALL_SETTINGS.model_fields}
    plain.pop("PYTHONPATH", None)
    return subprocess.run(
        command,
        cwd=directory,
        env=plain | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the tree."""
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        source = ROOT / name
        if source.is_file():
            shutil.copy(source, tree)
        else:
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__", "node_modules"))
    project = tree / "pyproject.toml"
    project.write_text(
        re.sub("^version = .*$", f'version = "{VERSION}"', project.read_text(encoding="utf-8"), flags=re.MULTILINE),
        encoding="utf-8",
    )
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    done = typed(tree, *pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", tree, ".")
    assert done.returncode == 0, done.stderr
    (built,) = tree.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the programs are of a fresh environment with the wheel and what requirements/runtime.txt names."""
    fresh = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", fresh], check=True)
    (packages,) = fresh.glob("lib/python*/site-packages")
    for name in re.findall(
        r"^([\w.-]+)==", (ROOT / "requirements/runtime.txt").read_text(encoding="utf-8"), re.MULTILINE
    ):
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            link = packages / top
            if not link.exists():
                link.symlink_to(Path(str(found.locate_file(top))))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(fresh / "bin" / "python"))
    done = typed(fresh, *pip, "install", "--no-deps", "--no-index", str(wheel))
    assert done.returncode == 0, done.stderr
    return fresh / "bin"


@pytest.mark.slow
def test_the_wheel_holds_every_file(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    ours = {
        path.relative_to(ROOT).as_posix()
        for folder in ("services", "migrations")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and not {"__pycache__", "node_modules"} & set(path.parts)
    }
    runtime = {name for name in ours if not DEVELOPMENT.search(name)}
    assert held == {re.sub("^migrations/", "services/migrations/", name) for name in runtime}


@pytest.mark.slow
@pytest.mark.usefixtures("no_tables")
def test_the_pipeline_runs_from_the_wheel(
    programs: Path, settings: Settings, connection: psycopg.Connection, tmp_path: Path
) -> None:
    command = programs / "sensor-pipeline"
    environment = settings.as_environment() | {"PARQUET_URL": "readings.parquet", "LOG_LEVEL": "ERROR"}
    for arguments, shown in (
        ("--version", f"sensor-pipeline {VERSION}\n"),
        ("migrate", ""),
        ("generate readings.parquet --sensors 2 --days 1", None),
        ("produce", ""),
        ("consume --until-caught-up", ""),
        ("etl --once", ""),
        ("status", None),
    ):
        environment["METRICS_PORT"] = str(free_port())
        done = typed(tmp_path, command, *arguments.split(), **environment)
        assert (done.returncode, done.stderr) == (0, ""), f"{arguments}\n{done.stdout}"
        assert shown in (None, done.stdout)
    assert f"sensor-pipeline {VERSION}" in done.stdout
    assert "no action needed" in done.stdout
    assert connection.execute("SELECT sum(reading_count) FROM temperature_summary").fetchone() == (2 * 1440,)


@pytest.mark.slow
def test_without_the_extra_packages_one_line_names_them(programs: Path, tmp_path: Path) -> None:
    for arguments, extra in ((("demo",), "[local]"), (("dashboard",), "[dashboard]")):
        done = typed(tmp_path, programs / "sensor-pipeline", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert extra in line
