"""The README's tables say what there is; test_docs.py has what holds for any document."""

from __future__ import annotations

import re
import tomllib

import pytest

from services.cli import parser
from tests import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_option_of_a_command_is_one() -> None:
    rows = re.findall(r"^\| `sensor-pipeline (.*?)` \| (.*) \|$", README, re.MULTILINE)
    for command, description in rows:
        for option in re.findall(r"`(--[a-z-]+(?: [a-z_]+)?)`", description):
            parser().parse_args([*command.split(), *option.split()])


@pytest.mark.parametrize("folder", ["core", "producer", "consumer", "etl", "status", "dashboard", "local"])
def test_the_files_of_the_layout_exist(folder: str) -> None:
    (row,) = re.findall(rf"^\| `services/{folder}/` \| (.*) \|$", README, re.MULTILINE)
    for name in re.findall(r"`([a-z_]+\.[a-z]+)`", row):
        assert (ROOT / "services" / folder / name).exists(), name


def test_the_licence_is_the_project_s() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"Licence: {project['license']}" in README
