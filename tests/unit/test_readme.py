"""What the README names exists, and is said to be what it is."""

from __future__ import annotations

import re
import tomllib

import pytest
from pydantic import SecretStr

from services.cli import parser
from services.core.config import Settings
from tests.fix_stack import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))

# What a line of the shell begins with; then come arguments up to the end of the code.
SHELL = r"(?:^\$ |`|&& )(?:[A-Z_]+=\S+ )*"


def test_the_table_of_settings_equals_the_settings() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| (?:`(.*?)`)? ?\| (.*) \|$", README, re.MULTILINE)
    expected = []
    for name, field in Settings.model_fields.items():
        value = field.default.get_secret_value() if isinstance(field.default, SecretStr) else field.default
        expected.append((name.upper(), str(value), field.description))
    assert rows == expected


def test_every_setting_that_is_named_exists() -> None:
    named = set(re.findall(r"\b((?:POSTGRE|KAFKA|DATA_FEATURE|PARQUET|RAW|COMPRESS|ETL|LOG)_[A-Z_]*[A-Z])\b", README))
    assert named <= {name.upper() for name in Settings.model_fields}


def test_every_command_is_one() -> None:
    found = re.findall(
        rf"{SHELL}sensor-pipeline ([a-z-]+(?: [A-Za-z][\w.-]*)?(?: --[a-z-]+(?: [\d.]+x?)?)*)", README, re.MULTILINE
    )
    assert found
    for command in found:
        parser().parse_args(command.split())


def test_every_option_of_a_command_is_one() -> None:
    rows = re.findall(r"^\| `sensor-pipeline (.*?)` \| (.*) \|$", README, re.MULTILINE)
    for command, description in rows:
        for option in re.findall(r"`(--[a-z-]+(?: [a-z_]+)?)`", description):
            parser().parse_args([*command.split(), *option.split()])


def test_every_make_target_exists() -> None:
    found = re.findall(rf"{SHELL}make ((?:[a-z-]+ ?)+)", README, re.MULTILINE)
    named = {target for targets in found for target in targets.split()}
    assert {"demo", "test"} <= named
    assert named <= TARGETS


def test_every_path_exists() -> None:
    named = set(re.findall(r"`((?:services|migrations|tests|data|\.ci)/[\w./-]*)`", README))
    named |= {target for target in re.findall(r"\]\(([^)#:]+)\)", README) if "://" not in target}
    missing = sorted(path for path in named if not (ROOT / path).exists())
    assert not missing


@pytest.mark.parametrize("folder", ["core", "producer", "consumer", "etl", "local"])
def test_the_files_of_the_layout_exist(folder: str) -> None:
    (row,) = re.findall(rf"^\| `services/{folder}/` \| (.*) \|$", README, re.MULTILINE)
    for name in re.findall(r"`([a-z_]+\.[a-z]+)`", row):
        assert (ROOT / "services" / folder / name).exists(), name


def test_the_licence_is_the_project_s() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"Licence: {project['license']}" in README
