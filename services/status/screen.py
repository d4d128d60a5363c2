"""The state as one screen of text."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from services.core.measurements import measurement
from services.status.database import Check, Database, Rows, Tables
from services.status.problems import Problem
from services.status.topics import KafkaStatus

LABEL = 21
MAX_REASONS = 20  # whoever may write to the topic of dead letters may make up any number


def lines(
    kafka: KafkaStatus | str, database: Database | str, versions: dict[str, str], problems: list[Problem]
) -> Iterator[str]:
    """Line by line; in place of a server that could not be asked is the reason."""
    yield from _kafka(kafka)
    yield ""
    yield from _database(database)
    yield ""
    yield _line("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))
    yield ""
    if not problems:
        yield "no action needed"
    for problem in problems:
        yield f"ACTION REQUIRED: {problem.what}"
        yield f"  what to do: {problem.action}"


def _line(label: str, text: str) -> str:
    return f"{label:{LABEL}} {text}"


def _kafka(kafka: KafkaStatus | str) -> Iterator[str]:
    if isinstance(kafka, str):
        yield _line("Kafka", kafka)
        return
    yield _line("Kafka", f"{kafka.address}, {_many(kafka.brokers, 'broker')}")
    if kafka.partitions is None:
        yield _line(f"  {kafka.topic}", "there is no such topic")
    else:
        consumed = sum(each.consumer is not None for each in kafka.partitions)
        state = "rebalancing" if kafka.is_rebalancing else f"{consumed} with a consumer"
        yield _line(f"  {kafka.topic}", f"{_many(len(kafka.partitions), 'partition')}, {state}")
        yield _line("  lag", f"{_many(kafka.lag, 'message')} (group {kafka.group})")
    letters = kafka.dead_letters
    if letters is None:
        yield _line("  dead letters", f"there is no topic {kafka.dead_letter_topic}")
    else:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in list(letters.reasons.items())[:MAX_REASONS])
        more = len(letters.reasons) - MAX_REASONS
        reasons += f" and {_many(more, 'more reason')}" if more > 0 else ""
        of = "" if letters.looked_at == letters.count else f"of the last {letters.looked_at:,}: "
        yield _line("  dead letters", f"{letters.count:,}" + (f" ({of}{reasons})" if letters.count else ""))


def _database(database: Database | str) -> Iterator[str]:
    if isinstance(database, str):
        yield _line("PostgreSQL", database)
        return
    yield _line("PostgreSQL", f"{database.address}, migration {database.revision or 'none'}")
    if database.tables is not None:
        yield from _tables(database.tables)


def _tables(tables: Tables) -> Iterator[str]:
    readings = tables.readings
    span = "" if readings.oldest is None else f", {_moment(readings.oldest)} to {_moment(readings.newest)}"
    yield _line("  sensor_data", f"{_rows(readings.rows)}{span}")
    yield _line(
        "",
        f"{_many(readings.chunks, 'chunk')}, {readings.compressed_chunks:,} compressed, "
        f"{readings.size_bytes / 1_000_000:,.1f} MB",
    )
    for summary in tables.summaries:
        width = f"intervals of {_many(summary.minutes, 'minute')}" if summary.minutes else "etl has not run yet"
        table = measurement(summary.measurement).summary
        yield _line(f"  {table}", f"{_rows(summary.rows)}, {width}{_check(summary.check)}")
    yield _line("  aggregates", ", ".join(tables.aggregates) or "none: etl has not run yet")
    leads = "etl is running" if tables.etl_leads else "no etl is running"
    waiting = f"{_many(tables.queue_rows, 'entry', 'entries')}, the oldest {tables.freshness_seconds:,.1f} s old"
    yield _line("  refresh queue", f"{waiting if tables.queue_rows else 'empty: everything is summarised'}; {leads}")


def _check(check: Check | None) -> str:
    if check is None:
        return ""
    compared = f", compared {check.age_seconds:,.0f} s ago"
    if not check.differences:
        return compared
    return f"{compared}; {check.differences:,} differed in total, last at {_moment(check.differed_at)}"


def _rows(rows: Rows) -> str:
    return _many(rows.count, "row") if rows.exact else f"about {rows.count:,} rows"


def _many(count: int, one: str, more: str = "") -> str:
    return f"{count:,} {one if count == 1 else more or one + 's'}"


def _moment(moment: datetime | None) -> str:
    return "" if moment is None else f"{moment:%Y-%m-%d %H:%M:%S}Z"
