"""Alembic's entry: the services' own settings, one transaction for all that is run, errors in one line."""

from __future__ import annotations

import sys

import sqlalchemy as sa
from alembic import context

from services.core.config import load_settings
from services.core.database import connect_at_start
from services.core.errors import PipelineError
from services.core.logs import configure_logging
from services.core.shutdown import Shutdown

MIGRATION_LOCK = 0x5E_50_12  # any number of ours; keeps two "alembic upgrade" from running at once


def run() -> None:
    """Run the migrations that Alembic asked for."""
    settings = load_settings()
    configure_logging(settings.log_level, settings.log_format)
    database = connect_at_start(settings, Shutdown())
    database.autocommit = False
    engine = sa.create_engine("postgresql+psycopg://", creator=lambda: database, poolclass=sa.pool.StaticPool)
    try:
        with engine.connect() as connection:
            context.configure(connection=connection, target_metadata=None)
            with context.begin_transaction():
                connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
                context.run_migrations()
    finally:
        engine.dispose()
        database.close()


try:
    run()
except PipelineError as error:
    print(f"error: {error}", file=sys.stderr)  # noqa: T201 - Alembic's own log is not set up for users
    sys.exit(error.exit_code)
except sa.exc.DBAPIError as error:
    print(f"error: the migration failed: {' '.join(str(error.orig).split())}", file=sys.stderr)  # noqa: T201
    sys.exit(1)
