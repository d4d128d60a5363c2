"""What a demo shows in the end: the first rows of each summary, and whether every row is right."""

from __future__ import annotations

import psycopg
from psycopg import sql

from services.core.config import Settings
from services.core.database import connect, one
from services.core.measurements import measurement
from services.local.check import differences
from services.local.runtime import say

SHOWN_DIFFERENCES = 10


def report(settings: Settings, took_s: float) -> bool:
    """Show what is stored, and say whether every row is right."""
    with connect(settings) as connection:
        summaries = [measurement(name).summary for name in settings.measurements]
        for summary in summaries:
            show_summary(connection, summary)
        say("")
        for table in ("sensor_data", *summaries):
            say(f"{table:20} {fetch(connection, table):>7,} rows")
        found = differences(connection, settings)
    say("")
    for line in found[:SHOWN_DIFFERENCES]:
        say(f"  {line}")
    verdict = "every row is right" if not found else f"{len(found):,} rows are WRONG"
    say(f"check: {verdict} (recomputed from {settings.parquet_url} without our SQL)")
    say(f"took {took_s:.1f} s")
    return not found


def fetch(connection: psycopg.Connection, table: str) -> int:
    """The number of rows."""
    return int(one(connection, sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(table)))[0])


def show_summary(connection: psycopg.Connection, summary: str) -> None:
    """Print the first rows of a summary as psql would."""
    query = sql.SQL("SELECT * FROM {} ORDER BY interval_start, sensor_id LIMIT 4").format(sql.Identifier(summary))
    cursor = connection.execute(query)
    names = [column.name for column in cursor.description or ()]
    rows = [
        [f"{value:.2f}" if isinstance(value, float) else str(value).removesuffix("+00:00") for value in row]
        for row in cursor
    ]
    widths = [max(len(cell) for cell in column) for column in zip(names, *rows, strict=True)]
    say("")
    say(summary)
    for cells in (names, *rows):
        say("  " + "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
