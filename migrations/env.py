"""Alembic's entry: the services' own settings, one transaction for all that is run, errors in one line."""

from __future__ import annotations

import logging
import sys
import time

import sqlalchemy as sa
from alembic import context
from psycopg import Connection
from psycopg.errors import DeadlockDetected, DuplicateColumn, DuplicateTable, LockNotAvailable, UniqueViolation

from services.core.backoff import pauses
from services.core.config import load_settings
from services.core.database import connect_at_start
from services.core.errors import ConfigurationError, PipelineError
from services.core.logs import configure_logging, fields
from services.core.printable import printable
from services.core.schema import newest_revision
from services.core.shutdown import Shutdown

# Keeps two "alembic upgrade" from running at once. It is no advisory lock, because any role could take that.
LOCK = """
    CREATE TABLE IF NOT EXISTS alembic_version (
        version_num varchar(32) NOT NULL, CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num));
    LOCK TABLE alembic_version IN SHARE ROW EXCLUSIVE MODE
"""
LOCKED_TIMEOUT_S = 60.0

log = logging.getLogger("migrations")


def run() -> None:
    """Run the migrations that Alembic asked for, again while others hold what they have to lock."""
    settings = load_settings()
    configure_logging(settings.log_level, settings.log_format)
    deadline = time.monotonic() + LOCKED_TIMEOUT_S
    for pause in pauses():
        try:
            migrate(connect_at_start(settings, Shutdown()), settings.measurements)
            return
        except sa.exc.DBAPIError as error:
            is_locked = isinstance(error.orig, LockNotAvailable | UniqueViolation | DeadlockDetected)
            if not is_locked or time.monotonic() + pause > deadline:
                raise
            log.warning("migration_waits", extra=fields(detail=error.orig, retry_s=round(pause, 1)))
            time.sleep(pause)


def migrate(database: Connection, measurements: tuple[str, ...]) -> None:
    """All in one transaction, however long it computes between two statements."""
    database.execute("SET idle_in_transaction_session_timeout = 0")
    database.autocommit = False
    engine = sa.create_engine("postgresql+psycopg://", creator=lambda: database, poolclass=sa.pool.StaticPool)
    try:
        with engine.connect() as connection:
            context.configure(connection=connection, target_metadata=None)
            with context.begin_transaction():
                connection.exec_driver_sql(LOCK)
                context.run_migrations()
                # Not where Alembic only looks: then it has no destination.
                if "destination_rev" in context.get_context().opts and is_newest():
                    add_measurements(connection, measurements)
    finally:
        engine.dispose()
        database.close()


def is_newest() -> bool:
    """Whether the database is at this version's newest revision."""
    return context.get_context().get_current_heads() == (newest_revision(),)


def add_measurements(connection: sa.Connection, names: tuple[str, ...]) -> None:
    """Bring the database to the configured set, also where there was no new revision; it drops nothing."""
    for name in names:
        try:
            added = connection.exec_driver_sql("SELECT add_measurement(%s)", (name,)).scalar()
        except sa.exc.DBAPIError as error:
            if isinstance(error.orig, DuplicateColumn | DuplicateTable):
                raise ConfigurationError(
                    f"MEASUREMENTS: {name} cannot be added: {error.orig.diag.message_primary}"
                ) from error
            raise
        if added:
            log.info("measurement_added", extra=fields(name=name))


try:
    run()
except PipelineError as error:
    print(f"error: {printable(error)}", file=sys.stderr)  # noqa: T201 - Alembic's own log is not set up for users
    sys.exit(error.exit_code)
except sa.exc.DBAPIError as error:
    print(f"error: the migration failed: {' '.join(str(error.orig).split())}", file=sys.stderr)  # noqa: T201
    sys.exit(1)
