"""Consumers whose commits take long between their last decision and the moment at which others see them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from psycopg import Connection, errors, sql
from pydantic import SecretStr

from services.core.config import Settings
from services.core.database import connect

DELAY_MICROSECONDS = 30_000
ROLE, PASSWORD = "slow_consumer", "slow_consumer"
SLOW = {"commit_delay": str(DELAY_MICROSECONDS), "commit_siblings": "0", "synchronous_commit": "on"}


@contextmanager
def slow_commits(settings: Settings) -> Iterator[Settings]:
    """The settings for consumers, in a role of their own; unchanged where we may not create one.

    Before it writes a commit to the disk, the server waits for others (``commit_delay``). The transaction has decided
    by then what it tells TimescaleDB, and its rows are not visible yet. Everybody else's commits wait for no disk, or
    they would wait for these. The server is never killed here.
    """
    with connect(settings) as connection:
        try:
            create_role(connection, settings)
        except errors.InsufficientPrivilege:
            yield settings
            return
    try:
        yield settings.model_copy(update={"postgre_user": ROLE, "postgre_password": SecretStr(PASSWORD)})
    finally:
        with connect(settings) as connection:
            drop_role(connection, settings)


def create_role(connection: Connection, settings: Settings) -> None:
    """All or nothing."""
    role = sql.Identifier(ROLE)
    drop_role(connection, settings)  # of a run that was killed
    with connection.transaction():
        connection.execute(
            sql.SQL("CREATE ROLE {} LOGIN PASSWORD {} IN ROLE sensor_consumer").format(role, sql.Literal(PASSWORD))
        )
        for name, value in SLOW.items():
            connection.execute(
                sql.SQL("ALTER ROLE {} SET {} = {}").format(role, sql.Identifier(name), sql.Literal(value))
            )
        connection.execute(
            sql.SQL("ALTER DATABASE {} SET synchronous_commit = off").format(sql.Identifier(settings.postgre_dbname))
        )


def drop_role(connection: Connection, settings: Settings) -> None:
    """Leave the server as it was."""
    connection.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(ROLE)))
    connection.execute(
        sql.SQL("ALTER DATABASE {} RESET synchronous_commit").format(sql.Identifier(settings.postgre_dbname))
    )
