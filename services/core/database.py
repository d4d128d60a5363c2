"""PostgreSQL: connections, and the one place where psycopg's errors are translated.

transient   connection lost, server starting or stopping, out of a resource, deadlock, lock not available,
            read-only: wait and try again
permanent   missing table or schema, no permission, wrong password: end with one line
data        everything else that names a row (class 22, 23, 54): the caller finds the row
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import resources
from typing import Any

import psycopg
from psycopg import Connection, sql

from services.core.backoff import pauses
from services.core.config import Settings
from services.core.errors import ConfigurationError, PermanentError, TransientError
from services.core.shutdown import Shutdown

# Class 08 connection, 40 rollback (deadlock, serialization), 53 resources, 55 lock or state,
# 57 operator intervention, 58 system error (disk), 25006 read-only transaction (a standby), XX internal.
TRANSIENT_CLASSES = frozenset({"08", "40", "53", "55", "57", "58", "XX"})
TRANSIENT_STATES = frozenset({"25006", "25P03"})
PERMANENT_STATES = frozenset({"42P01", "42501", "3F000", "3D000", "28P01", "28000", "42883", "42703", "0A000"})

CONNECT_TIMEOUT_S = 5


def connection_arguments(settings: Settings) -> dict[str, Any]:
    """Keyword arguments for psycopg and libpq."""
    arguments: dict[str, Any] = {
        "host": settings.postgre_host,
        "port": settings.postgre_port,
        "user": settings.postgre_user,
        "password": settings.postgre_password.get_secret_value(),
        "dbname": settings.postgre_dbname,
        "sslmode": settings.postgre_sslmode,
        "connect_timeout": CONNECT_TIMEOUT_S,
        "application_name": "sensor-pipeline",
        # A dead network must not hold a service for the kernel's two hours.
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
    }
    if settings.postgre_sslrootcert:
        arguments["sslrootcert"] = settings.postgre_sslrootcert
    return arguments


def address(settings: Settings) -> str:
    """Where the database is, for messages."""
    return f"{settings.postgre_host}:{settings.postgre_port}/{settings.postgre_dbname}"


def connect(settings: Settings) -> Connection:
    """Open a connection in autocommit mode, in UTC.

    Raises TransientError when the server does not answer, ConfigurationError when it refuses us.
    """
    try:
        # Without prepared statements the connection also works through poolers in transaction mode.
        connection = psycopg.connect(
            **connection_arguments(settings),
            autocommit=True,
            prepare_threshold=None,
            options="-c timezone=UTC",
        )
    except psycopg.OperationalError as error:
        raise _translate_connect(error, settings) from error
    return connection


def _translate_connect(error: psycopg.OperationalError, settings: Settings) -> Exception:
    """libpq gives no SQLSTATE for a failed connection; having used the password means we were refused."""
    text = " ".join(str(error).split())
    refused = error.pgconn is not None and bool(error.pgconn.used_password)
    busy = any(word in text for word in ("slots", "too many", "starting up", "shutting down", "recovery"))
    if refused and not busy:
        reason = text.rsplit("FATAL:", 1)[-1].strip()
        return ConfigurationError(
            f"PostgreSQL at {address(settings)} refused user {settings.postgre_user}: {reason} "
            "(check POSTGRE_USER, POSTGRE_PASSWORD and POSTGRE_DBNAME)"
        )
    return TransientError(f"PostgreSQL at {address(settings)} does not answer: {text}")


def connect_at_start(settings: Settings, shutdown: Shutdown) -> Connection:
    """Connect, waiting up to STARTUP_TIMEOUT_SECONDS for a server that is still starting.

    Raises ConfigurationError when it did not answer in time.
    """
    deadline = time.monotonic() + settings.startup_timeout_seconds
    for pause in pauses():
        try:
            return connect(settings)
        except TransientError as error:
            if time.monotonic() + pause > deadline or shutdown.wait(pause):
                raise ConfigurationError(
                    f"PostgreSQL does not answer at {address(settings)} (POSTGRE_HOST, POSTGRE_PORT): "
                    "start it, or correct the address"
                ) from error
    raise AssertionError("pauses() has no end")


@contextmanager
def translated() -> Iterator[None]:
    """Turn psycopg's infrastructure errors into ours; errors of data pass as they are."""
    try:
        yield
    except psycopg.Error as error:
        state = error.sqlstate
        text = " ".join(str(error).split())
        if state in PERMANENT_STATES:
            raise PermanentError(f"{text} (did you run 'alembic upgrade head', as a role that may?)") from error
        lost = state is None and isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
        if lost or (state is not None and (state in TRANSIENT_STATES or state[:2] in TRANSIENT_CLASSES)):
            raise TransientError(text) from error
        raise


@cache
def queries(package: str) -> dict[str, sql.SQL]:
    """The named statements of ``queries.sql`` in ``package``: each begins with a line ``-- name: some_name``."""
    text = resources.files(package).joinpath("queries.sql").read_text(encoding="utf-8")
    found: dict[str, sql.SQL] = {}
    for block in text.split("-- name: ")[1:]:
        name, body = block.split("\n", 1)
        statement = "\n".join(line for line in body.splitlines() if not line.startswith("--"))
        found[name.strip()] = sql.SQL(statement.strip().rstrip(";"))
    return found
