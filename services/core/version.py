"""The project's version."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def version() -> str:
    """As pyproject.toml says in a checkout and in the container; elsewhere that of the installed package."""
    if PYPROJECT.exists():
        return str(tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["version"])
    try:
        return metadata.version("sensor-pipeline")
    except metadata.PackageNotFoundError:
        return "unknown"
