"""After a restore to an earlier time, docs/operations.md says how the pipeline makes up for what is missing."""

from __future__ import annotations

import psycopg
from confluent_kafka import Consumer, TopicPartition

from services.core.config import Settings
from services.core.kafka import client_settings
from tests.fix_services import message, minutes, publish, run_cli
from tests.fix_stack import empty


def counts(connection: psycopg.Connection) -> tuple[object, ...]:
    """Rows of the readings, and readings in the summaries."""
    row = connection.execute(
        "SELECT (SELECT count(*) FROM sensor_data), coalesce(sum(reading_count), 0)::int FROM temperature_summary"
    ).fetchone()
    assert row is not None
    return row


def set_offsets_back(settings: Settings) -> None:
    """What kafka-consumer-groups.sh --reset-offsets does, for a group without members."""
    consumer = Consumer(
        client_settings(settings, "test") | {"group.id": settings.kafka_group, "enable.auto.commit": False}
    )
    places = [TopicPartition(settings.kafka_topic, number, 0) for number in range(settings.kafka_partitions)]
    consumer.commit(offsets=places, asynchronous=False)
    consumer.close()


def work(settings: Settings) -> None:
    """Consume and summarise all there is."""
    for arguments in (("consume", "--until-caught-up"), ("etl", "--once")):
        done = run_cli(settings, *arguments)
        assert done.returncode == 0, done.stderr


def test_offsets_that_are_set_back_bring_back_what_a_restored_database_lacks(
    settings: Settings, connection: psycopg.Connection
) -> None:
    publish(settings, [message(time=minutes(number), temperature=float(number)) for number in range(100)])
    work(settings)
    assert counts(connection) == (100, 100)
    empty(connection)  # the backup is from before the first reading
    publish(settings, [message(time=minutes(200), temperature=1.0)])
    work(settings)
    assert counts(connection) == (1, 1)  # the group's offsets are ahead of the database
    connection.execute("UPDATE partition_owner SET epoch = epoch + 1000000")
    set_offsets_back(settings)
    work(settings)
    assert counts(connection) == (101, 101)
    assert "temperature_summary: 0 rows differed" in run_cli(settings, "etl", "--reconcile").stdout
