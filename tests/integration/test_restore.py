"""The database says where to go on: emptied, restored, another group, another topic, or told to go back."""

from __future__ import annotations

import psycopg
import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from services.core.config import Settings
from services.core.kafka import client_settings, create_topics
from services.core.offsets import group_lag
from services.core.shutdown import Shutdown
from tests.fix_services import StartService, message, minutes, publish, run_cli, wait_until
from tests.fix_stack import empty


def counts(connection: psycopg.Connection) -> tuple[object, ...]:
    """Rows of the readings, and readings in the summaries."""
    row = connection.execute(
        "SELECT (SELECT count(*) FROM sensor_data), coalesce(sum(reading_count), 0)::int FROM temperature_summary"
    ).fetchone()
    assert row is not None
    return row


def work(settings: Settings) -> None:
    """Consume and summarise all there is."""
    for arguments in (("consume", "--until-caught-up"), ("etl", "--once")):
        done = run_cli(settings, *arguments)
        assert done.returncode == 0, done.stderr


def send(settings: Settings, start: int, stop: int) -> None:
    publish(settings, [message(time=minutes(at), temperature=float(at)) for at in range(start, stop)], partition=0)


def position(connection: psycopg.Connection) -> int:
    """Of partition 0, the one that tests send to."""
    row = connection.execute("SELECT next_offset FROM partition_progress WHERE partition = 0").fetchone()
    assert row is not None
    return int(row[0])


@pytest.fixture
def admin(settings: Settings) -> AdminClient:
    return AdminClient(client_settings(settings, "test"))


def test_an_emptied_database_gets_everything_back(settings: Settings, connection: psycopg.Connection) -> None:
    """Kafka's offsets of the group stay at the end."""
    send(settings, 0, 100)
    work(settings)
    assert counts(connection) == (100, 100)
    empty(connection)
    work(settings)
    assert counts(connection) == (100, 100)
    assert "temperature_summary: 0 rows differed" in run_cli(settings, "etl", "--reconcile").stdout


def test_a_database_emptied_under_a_running_consumer_gets_everything_back(
    settings: Settings, connection: psycopg.Connection, start: StartService
) -> None:
    send(settings, 0, 100)
    start("consume")
    wait_until(lambda: counts(connection)[0] == 100, "all is stored")
    empty(connection)
    wait_until(lambda: counts(connection)[0] == 100, "all is stored again, though nothing new came")


def test_another_group_goes_on_where_the_database_is(settings: Settings, connection: psycopg.Connection) -> None:
    send(settings, 0, 100)
    work(settings)
    send(settings, 100, 120)
    renamed = settings.model_copy(update={"kafka_group": f"{settings.kafka_group}-renamed"})
    done = run_cli(renamed, "consume", "--until-caught-up")
    assert '"inserted": 20, "updated": 0, "unchanged": 0' in done.stdout + done.stderr
    assert counts(connection)[0] == 120


def test_a_restored_database_goes_on_where_its_data_ends(settings: Settings, connection: psycopg.Connection) -> None:
    send(settings, 0, 100)
    work(settings)
    connection.execute("DELETE FROM sensor_data WHERE temperature >= 60")  # the backup is from before
    connection.execute("UPDATE partition_progress SET next_offset = 60 WHERE partition = 0")
    done = run_cli(settings, "consume", "--until-caught-up")
    assert '"inserted": 40, "updated": 0, "unchanged": 0' in done.stdout + done.stderr
    assert counts(connection)[0] == 100


def test_a_topic_that_is_created_again_begins_at_its_beginning(
    settings: Settings, connection: psycopg.Connection, start: StartService, admin: AdminClient
) -> None:
    """Under a running consumer, and filled beyond where the old one was before the consumer can notice."""
    send(settings, 0, 100)
    consumer = start("consume")
    wait_until(lambda: counts(connection)[0] == 100, "all is stored")
    for done in admin.delete_topics([settings.kafka_topic]).values():
        done.result()
    wait_until(lambda: settings.kafka_topic not in admin.list_topics(timeout=5).topics, "the topic is gone")
    create_topics(admin, settings, shutdown=Shutdown())
    send(settings, 1000, 1200)
    wait_until(lambda: counts(connection)[0] == 300, "the new topic is stored from its beginning", timeout_s=60)
    assert consumer.stop() == 0


def test_messages_that_expired_before_they_were_stored_are_counted(
    settings: Settings, connection: psycopg.Connection, start: StartService, admin: AdminClient
) -> None:
    send(settings, 0, 100)
    for done in admin.delete_records([TopicPartition(settings.kafka_topic, 0, 70)]).values():
        done.result()
    consumer = start("consume", "--until-caught-up")
    assert consumer.wait() == 0
    assert counts(connection)[0] == 30
    (expired,) = consumer.events("messages_expired")
    assert (expired["partition"], expired["messages"]) == (0, 70)
    assert position(connection) == 100
    assert start("consume", "--until-caught-up").wait() == 0  # once is enough
    assert group_lag(settings) == 0


@pytest.mark.slow
def test_a_position_behind_the_end_goes_back_to_it_and_says_so(
    settings: Settings, connection: psycopg.Connection, start: StartService
) -> None:
    """As after an unclean election, in which a broker lost the end of its log."""
    send(settings, 0, 100)
    work(settings)
    connection.execute("UPDATE partition_progress SET next_offset = 150 WHERE partition = 0")
    consumer = start("consume", "--until-caught-up")
    assert consumer.wait() == 0
    (shorter,) = consumer.events("topic_is_shorter")
    assert (shorter["position"], shorter["end"]) == (150, 100)
    assert position(connection) == 100
    send(settings, 100, 200)
    work(settings)
    assert counts(connection) == (200, 200)


@pytest.mark.slow
def test_rewind_goes_back_under_a_running_consumer(
    settings: Settings, connection: psycopg.Connection, start: StartService
) -> None:
    send(settings, 0, 100)
    start("consume")
    wait_until(lambda: counts(connection)[0] == 100, "all is stored")
    connection.execute("DELETE FROM sensor_data")
    done = run_cli(settings, "rewind", "--to-offset", "40", "--partition", "0")
    assert done.stdout == "partition 0: from 100 to 40\n1 partitions moved\n"
    wait_until(lambda: counts(connection)[0] == 60, "what lies behind is stored again")
    done = run_cli(settings, "rewind", "--to-beginning")
    assert "partition 0: from 100 to 0\n" in done.stdout
    wait_until(lambda: counts(connection)[0] == 100, "all is stored again")
    done = run_cli(settings, "rewind", "--to-time", "2999-01-01")
    assert done.stdout == "0 partitions moved: none was beyond it\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--to-offset", "5"], "error: --to-offset needs --partition: each partition has its own offsets"),
        (["--to-offset", "5", "--partition", "9"], "error: --partition=9: "),
        (["--to-offset", "101", "--partition", "0"], "error: --to-offset=101: partition 0 has 0 to 100"),
        (["--to-time", "yesterday"], "error: --to-time=yesterday is not allowed"),
    ],
)
def test_a_wrong_place_to_rewind_to_is_one_line(settings: Settings, arguments: list[str], line: str) -> None:
    send(settings, 0, 100)
    done = run_cli(settings, "rewind", *arguments)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(line)
