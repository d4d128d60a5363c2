"""PostgreSQL: connections, and the one place where psycopg's errors are translated.

transient   connection lost, server starting or stopping, out of a resource, deadlock, lock not available,
            read-only: wait and try again; some of them only so often (DOUBTFUL)
data        errors that blame a row (class 22, 23, 54, or raised by psycopg itself): the caller finds the row
permanent   all others, such as a missing table or no permission: end with one line
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib import resources
from typing import Any, LiteralString

import psycopg
from psycopg import Connection, sql

from services.core.backoff import at_start
from services.core.config import Settings
from services.core.credentials import check_files
from services.core.errors import ConfigurationError, PermanentError, TransientError
from services.core.shutdown import Shutdown

# Class 08 connection, 40 rollback (deadlock, serialization), 53 resources, 55 lock or state, 57 operator intervention,
# 58 system error (disk), XX internal; 25006 read-only transaction (a standby), 25P03 and 25P04 time limits of one.
TRANSIENT_CLASSES = frozenset({"08", "40", "53", "55", "57", "58", "XX"})
TRANSIENT_STATES = frozenset({"25006", "25P03", "25P04"})
# A bug of the server, a state it may never leave, a time limit that may always be too short, a limit of its
# configuration: often gone with the next try, but they may also come back each time.
DOUBTFUL_CLASSES = frozenset({"XX"})
DOUBTFUL_STATES = frozenset({"53200", "53400", "55000", "57014"})
# Data exception, integrity violation, program limit (an index row too large).
DATA_CLASSES = frozenset({"22", "23", "54"})
# What the migrations create is missing (a role has a state of its own), or not ours.
SCHEMA_STATES = frozenset({"22023", "42P01", "42501", "3F000", "3D000", "28P01", "28000", "42883", "42703", "0A000"})

MIGRATE = "run sensor-pipeline migrate (or alembic upgrade head) as a role that may"

CONNECT_TIMEOUT_S = 5

# libpq's words, and the server's, for TLS that does not fit: no SQLSTATE comes with them.
TLS_WORDS = ("certificate", "private key", "alert unknown ca", "does not support SSL", "no pg_hba.conf entry")
# libpq's words for a connection that ended after the password was sent.
LOST_WORDS = ("closed the connection", "could not receive data", "could not send data", "timeout expired", "SYSCALL")

# A pooler may drop the options without a word. The server reports this one to its clients, and nobody else sets it.
DATE_STYLE = "ISO,YMD"
# What holds for a session, whatever the defaults of server and role: UTC; no time limit on the work itself; no long
# wait for a lock, because others queue behind it; and the server ends the session, with its locks, soon after this
# machine is gone, this process has died in a statement, or it is frozen between two statements of a transaction:
# otherwise nobody could take over from it for hours.
SESSION_OPTIONS = {
    "timezone": "UTC",
    "statement_timeout": "0",
    "lock_timeout": "2s",
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    "idle_in_transaction_session_timeout": "15s",
    "client_connection_check_interval": "5s",
    "DateStyle": DATE_STYLE,
}
# PostgreSQL 17 has one more time limit, which older ones would refuse as an option.
NO_TIME_LIMIT = "SELECT set_config(name, '0', false) FROM pg_settings WHERE name = 'transaction_timeout'"


def connection_arguments(settings: Settings) -> dict[str, Any]:
    """Keyword arguments for psycopg and libpq. Raises ConfigurationError for the files that settings name."""
    check_files(settings, "postgre_sslrootcert", "postgre_sslcert", "postgre_sslkey")
    arguments: dict[str, Any] = {
        "host": settings.postgre_host,
        "port": settings.postgre_port,
        "user": settings.postgre_user,
        "password": settings.secret("postgre_password"),
        "dbname": settings.postgre_dbname,
        "sslmode": settings.postgre_sslmode,
        "connect_timeout": CONNECT_TIMEOUT_S,
        # A dead network must not hold a service for the kernel's two hours (or 15 minutes, with data under way).
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 30_000,
    }
    if settings.postgre_sslmode != "verify-full":
        # Whoever answers for a server that is not verified would be told the password if it asked for it in clear text.
        arguments["require_auth"] = "!password"
    for name in ("sslrootcert", "sslcert", "sslkey"):
        if path := getattr(settings, f"postgre_{name}"):
            arguments[name] = path
    return arguments


def address(settings: Settings) -> str:
    """Where the database is, for messages."""
    return f"{settings.postgre_host}:{settings.postgre_port}/{settings.postgre_dbname}"


def connect(settings: Settings, name: str = "sensor-pipeline") -> Connection:
    """Open a connection in autocommit mode, with SESSION_OPTIONS in force; ``name`` is what pg_stat_activity shows.

    Raises TransientError when the server does not answer, ConfigurationError when it refuses us, or when a pooler
    stands before it that keeps the options to itself.
    """
    options = " ".join(f"-c {name}={value}" for name, value in SESSION_OPTIONS.items())
    try:
        connection = psycopg.connect(
            **connection_arguments(settings),
            autocommit=True,
            prepare_threshold=None,
            application_name=name,
            options=options,
        )
    except psycopg.OperationalError as error:
        raise _translate_connect(error, settings) from error
    if (connection.info.parameter_status("DateStyle") or "").replace(" ", "") != DATE_STYLE:
        connection.close()
        raise _pooled(settings)
    return connection


def connect_for_work(settings: Settings, name: str = "sensor-pipeline") -> Connection:
    """``connect``, without any time limit of the server's or the role's."""
    connection = connect(settings, name)
    with closed_on_error(connection):
        connection.execute(NO_TIME_LIMIT)
    return connection


@contextmanager
def closed_on_error(connection: Connection) -> Iterator[None]:
    """Set up a connection that is new: any error in the block closes it, and psycopg's are ``translated``."""
    try:
        with translated():
            yield
    except BaseException:
        connection.close()
        raise


def _pooled(settings: Settings) -> ConfigurationError:
    return ConfigurationError(
        f"{address(settings)} is a connection pooler that drops session settings (PgBouncer): "
        "set POSTGRE_HOST and POSTGRE_PORT to PostgreSQL itself"
    )


def _translate_connect(error: psycopg.OperationalError, settings: Settings) -> Exception:
    """libpq gives no SQLSTATE for a failed connection; having used the password means we were refused."""
    server = f"PostgreSQL at {address(settings)}"
    text = " ".join(str(error).split())
    if "unsupported startup parameter" in text:
        return _pooled(settings)
    if "authentication method requirement" in text:
        remedy = "set POSTGRE_SSLMODE=verify-full, or scram-sha-256 in its pg_hba.conf"
        return ConfigurationError(f"{server} requests the password in clear text: {remedy}")
    is_lost = any(words in text for words in LOST_WORDS)
    refused = error.pgconn is not None and bool(error.pgconn.used_password) and not is_lost
    busy = any(word in text for word in ("slots", "too many", "starting up", "shutting down", "recovery"))
    if refused and not busy:
        reason = text.rsplit("FATAL:", 1)[-1].strip()
        check = "check POSTGRE_USER, POSTGRE_PASSWORD and POSTGRE_DBNAME"
        return ConfigurationError(f"{server} refused user {settings.postgre_user}: {reason} ({check})")
    if any(word in text for word in TLS_WORDS):
        reason = text.rsplit("failed: ", 1)[-1].removeprefix("FATAL: ").strip()
        check = "check POSTGRE_SSLMODE, POSTGRE_SSLROOTCERT, POSTGRE_SSLCERT, POSTGRE_SSLKEY and POSTGRE_HOST"
        return ConfigurationError(f"{server}: {reason} ({check})")
    return TransientError(f"{server} does not answer: {text}")


def connect_at_start(settings: Settings, shutdown: Shutdown, *, tables: bool = False) -> Connection:
    """Connect, waiting up to STARTUP_TIMEOUT_SECONDS for a server that is still starting.

    Raises ConfigurationError when it did not answer in time, and, with ``tables``, when it lacks a measurement;
    PermanentError when it has no tables.
    """

    def start() -> Connection:
        connection = connect(settings)
        if tables:
            with closed_on_error(connection):
                _require_tables(connection, settings)
        return connection

    def give_up(error: TransientError) -> ConfigurationError:
        where = f"{address(settings)} (POSTGRE_HOST, POSTGRE_PORT)"
        return ConfigurationError(f"PostgreSQL does not answer at {where}: {_remedy(str(error))}")

    return at_start(start, settings, shutdown, ("database", "PostgreSQL", address(settings)), give_up)


def _remedy(text: str) -> str:
    if "resolve host" in text or "translate host name" in text:
        return "there is no host with this name"
    if "invalid response to SSL negotiation" in text:
        return "what answers there is not PostgreSQL"
    return "start it, or correct the address"


def _require_tables(connection: Connection, settings: Settings) -> None:
    """Raise unless the migrations have run for all of MEASUREMENTS; the command status says which ones have."""
    if one(connection, "SELECT to_regclass('partition_progress')") == (None,):
        raise PermanentError(f"the database {address(settings)} does not have the tables yet: {MIGRATE}")
    if missing := missing_measurements(connection, settings):
        names = ", ".join(missing)
        raise ConfigurationError(f"MEASUREMENTS: the database {address(settings)} does not have {names} yet: {MIGRATE}")


def missing_measurements(connection: Connection, settings: Settings) -> list[str]:
    """Those of MEASUREMENTS that no migration has added."""
    (there,) = one(connection, "SELECT measurements()")
    return [name for name in settings.measurements if name not in there]


class Reconnecting:
    """A connection that is opened when it is needed, and again after an error. For one thread at a time."""

    def __init__(self, open_connection: Callable[[], Connection]) -> None:
        self._open = open_connection
        self._connection: Connection | None = None

    @contextmanager
    def connected(self) -> Iterator[Connection]:
        """The connection. Any error in the block closes it, and psycopg's are ``translated``."""
        try:
            with translated():
                self._connection = self._connection or self._open()
                yield self._connection
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None


def cut(connection: Connection) -> None:
    """End a connection that another thread waits on: its statement fails as if the network had gone."""
    with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as line:
        line.shutdown(socket.SHUT_RDWR)


@contextmanager
def translated(*, by_row: bool = False) -> Iterator[None]:
    """Turn psycopg's errors into ours; with ``by_row`` those that blame a row pass as they are."""
    try:
        yield
    except psycopg.Error as error:
        state = error.sqlstate
        text = " ".join(str(error).split())
        if state is None and isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
            raise TransientError(text) from error
        if state is not None and (state in TRANSIENT_STATES or state[:2] in TRANSIENT_CLASSES):
            retry_limited = state in DOUBTFUL_STATES or state[:2] in DOUBTFUL_CLASSES
            raise TransientError(text, retry_limited=retry_limited) from error
        # psycopg's own DataError, raised before the server sees the row, has no SQLSTATE.
        if by_row and (isinstance(error, psycopg.DataError) if state is None else state[:2] in DATA_CLASSES):
            raise
        hint = f" ({MIGRATE})" if state in SCHEMA_STATES else ""
        raise PermanentError(text + hint) from error


def one(
    connection: Connection, query: LiteralString | sql.SQL | sql.Composed, arguments: Mapping[str, Any] | None = None
) -> tuple[Any, ...]:
    """The row of a query that always has one."""
    row = connection.execute(query, arguments).fetchone()
    assert row is not None
    return row


@cache
def queries(package: str) -> dict[str, sql.SQL]:
    """The named statements of the SQL files in ``package``: each begins with a line ``-- name: some_name``."""
    files = (file for file in resources.files(package).iterdir() if file.name.endswith(".sql"))
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    found: dict[str, sql.SQL] = {}
    for block in text.split("-- name: ")[1:]:
        name, body = block.split("\n", 1)
        statement = "\n".join(line for line in body.splitlines() if not line.startswith("--"))
        found[name.strip()] = sql.SQL(statement.strip().rstrip(";"))
    return found
