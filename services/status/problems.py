"""What requires action: each problem in plain words, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from services.core.config import Settings
from services.core.measurements import measurement
from services.status.database import Database, Tables
from services.status.topics import KafkaStatus

# A restart of etl is not a problem; nor is a refresh that takes minutes.
UNATTENDED_AFTER_S = 10.0
BEHIND_AFTER_S = 600.0


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that does not recover without action."""

    what: str
    action: str


def find_problems(settings: Settings, kafka: KafkaStatus | str, database: Database | str) -> list[Problem]:
    """All there are; in place of a server that could not be asked is the reason."""
    return [*_of_kafka(settings, kafka), *_of_database(settings, database)]


def _of_kafka(settings: Settings, kafka: KafkaStatus | str) -> Iterator[Problem]:
    if isinstance(kafka, str):
        yield Problem(kafka, "start it, or correct KAFKA_HOST and KAFKA_PORT")
        return
    if kafka.partitions is None:
        yield Problem(
            f"there is no topic {kafka.topic}",
            "start sensor-pipeline consume or produce, which create it, or correct KAFKA_TOPIC",
        )
    ahead = [each for each in kafka.partitions or () if (each.stored_offset or 0) < (each.committed_offset or 0)]
    if ahead and all(each.stored_offset is not None for each in ahead) and kafka.lag:
        yield Problem(
            f"the database lacks {sum(each.lag for each in ahead):,} messages that group {settings.kafka_group} had "
            f"stored: it was emptied or restored",
            "keep sensor-pipeline consume running: it stores them again; what the topic no longer has, files can bring "
            "back (sensor-pipeline produce --resend)",
        )
    alone = [each for each in kafka.partitions or () if each.lag and each.consumer is None]
    if alone and not kafka.is_rebalancing:
        numbers = ", ".join(str(each.partition) for each in alone)
        yield Problem(
            f"{sum(each.lag for each in alone):,} messages are waiting in {kafka.topic}, and no consumer has their "
            f"partitions ({numbers})",
            f"start sensor-pipeline consume (KAFKA_GROUP={settings.kafka_group})",
        )
    if kafka.dead_letters is not None and kafka.dead_letters.count:
        yield Problem(
            f"{kafka.dead_letters.count:,} messages were not stored (dead letters in {kafka.dead_letter_topic})",
            "check them with sensor-pipeline dead-letters list; replay those that can be stored now, delete the rest",
        )


def _of_database(settings: Settings, database: Database | str) -> Iterator[Problem]:
    if isinstance(database, str):
        yield Problem(database, _advice(database))
    elif database.revision != database.newest_revision:
        found = "no migration" if database.revision is None else f"migration {database.revision}"
        yield Problem(
            f"the database has {found}, this version needs {database.newest_revision}",
            "run alembic upgrade head, or use the version of sensor-pipeline that created the database",
        )
    elif database.tables is not None:
        yield from _of_queue(database.tables)
        yield from _of_intervals(settings, database.tables)


def _advice(reason: str) -> str:
    if "too many" in reason or "connection slots" in reason:
        return "end unused connections (pg_stat_activity), or raise max_connections"
    if "permission denied" in reason:
        return "use a role with the rights: set POSTGRE_USER to sensor_etl or to the database's owner"
    return "start it, or correct POSTGRE_HOST and POSTGRE_PORT"


def _of_queue(tables: Tables) -> Iterator[Problem]:
    waiting = f"readings have been waiting {tables.freshness_seconds:,.0f} s for their summaries"
    if not tables.etl_leads and tables.freshness_seconds > UNATTENDED_AFTER_S:
        yield Problem(f"{waiting}, and no etl is running", "start sensor-pipeline etl")
    elif tables.freshness_seconds > BEHIND_AFTER_S:
        yield Problem(f"{waiting}, although etl is running", "check etl's log and the database's load")


def _of_intervals(settings: Settings, tables: Tables) -> Iterator[Problem]:
    if tables.missing:
        yield Problem(
            f"the database does not have {', '.join(tables.missing)}, which MEASUREMENTS names",
            "run alembic upgrade head, or take them off the list",
        )
    for summary in tables.summaries:
        name, setting = summary.measurement, measurement(summary.measurement).interval_setting
        wanted = settings.interval_of(name)
        aggregate = f"{name}_{wanted}min"
        begun = tables.etl_leads and not {aggregate, f"{aggregate}_of_minutes"}.isdisjoint(tables.aggregates)
        if summary.minutes not in (None, wanted) and not begun:
            yield Problem(
                f"{name} intervals have {summary.minutes} minutes in the database, {wanted} in the settings",
                f"restart etl with these settings (its log says interval_change_refused if that cannot be done yet), "
                f"or set {setting.upper()}={summary.minutes}",
            )
