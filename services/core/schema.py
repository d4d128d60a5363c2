"""The migrations: beside services in a checkout and in the container, below it in an installed package."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

_SERVICES = Path(__file__).parents[1]


def migrations() -> Path:
    """The directory that Alembic calls the script location."""
    packaged = _SERVICES / "migrations"
    return packaged if packaged.exists() else _SERVICES.parent / "migrations"


def newest_revision() -> str:
    """The one that this version needs."""
    return str(ScriptDirectory(str(migrations())).get_current_head())


def upgrade() -> None:
    """Run the migrations that the database lacks: ``alembic upgrade head``, wherever this is installed.

    Ends the process where that fails, after one line; migrations/env.py reads the settings itself.
    """
    config = Config()
    config.set_main_option("script_location", str(migrations()).replace("%", "%%"))
    command.upgrade(config, "head")
