"""Passwords for the roles that the services log in as: ``sensor-pipeline logins``, which migrate does too.

The server is given what it stores, a verifier that this machine computes: the password itself is in no statement, and
so in no log, whatever the server logs.
"""

from __future__ import annotations

from psycopg import Connection, sql
from psycopg.errors import InsufficientPrivilege
from pydantic import SecretStr

from services.core.config import LOGINS, Settings
from services.core.database import connect_at_start, translated
from services.core.errors import ConfigurationError
from services.core.shutdown import Shutdown


def settings_as(login: str, settings: Settings) -> Settings:
    """The settings with which to log in as one of LOGINS; unchanged where its password is not set."""
    password = settings.secret(f"{login}_password")
    if not password:
        return settings
    change = {"postgre_user": login, "postgre_password": SecretStr(password), "postgre_password_file": ""}
    return settings.model_copy(update=change)


def let_in(settings: Settings, shutdown: Shutdown) -> list[str]:
    """Let each role log in whose password is set, with that password, all or none; returns their names.

    Raises ConfigurationError where a role does not exist, or where we may not change one.
    """
    passwords = {login: settings.secret(f"{login}_password") for login in LOGINS}
    wanted = [login for login in LOGINS if passwords[login]]
    if not wanted:
        return []
    with connect_at_start(settings, shutdown) as connection, translated(), connection.transaction():
        found = connection.execute("SELECT rolname FROM pg_roles WHERE rolname = ANY(%s)", [wanted]).fetchall()
        missing = sorted({*wanted} - {name for (name,) in found})
        if missing:
            raise ConfigurationError(f"there is no role {', '.join(missing)}: run sensor-pipeline migrate first")
        for login in wanted:
            _let_in(connection, login, passwords[login])
    return wanted


def _let_in(connection: Connection, login: str, password: str) -> None:
    verifier = connection.pgconn.encrypt_password(password.encode(), login.encode(), b"scram-sha-256").decode()
    change = sql.SQL("ALTER ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(login), sql.Literal(verifier))
    try:
        connection.execute(change)
    except InsufficientPrivilege as error:
        raise ConfigurationError(
            f"{connection.info.user} may not let {login} log in; in psql, as a superuser: "
            f"ALTER ROLE {login} LOGIN; \\password {login}"
        ) from error
