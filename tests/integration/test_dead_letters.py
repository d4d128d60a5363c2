"""Dead letters can be listed, filtered and sent once more."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from services.core.config import Settings
from services.core.kafka import REASON_HEADER, REPEAT_HEADER, REPEATED, client_settings, headers_of, place_of
from services.core.murmur2 import partition_of
from tests.fix_services import StartService, message, minutes, publish, read_topic, run_cli, wait_until


@pytest.fixture
def humidity_check(connection: psycopg.Connection) -> Iterator[None]:
    """A rule of the database that a reading can break."""
    connection.execute("ALTER TABLE sensor_data ADD CONSTRAINT plausible CHECK (humidity <= 100)")
    yield
    connection.execute("ALTER TABLE sensor_data DROP CONSTRAINT plausible")


def consume(settings: Settings, **environment: str) -> None:
    done = run_cli(settings, "consume", "--until-caught-up", **environment)
    assert done.returncode == 0, done.stderr


def listed(settings: Settings, *arguments: str) -> list[dict[str, object]]:
    done = run_cli(settings, "dead-letters", "list", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_list_filters_by_reason_and_tells_where_a_letter_came_from(settings: Settings) -> None:
    publish(settings, [b"not json", b"", b'{"sensor_id": "s1"}', b"neither"])
    consume(settings)
    assert [entry["reason"] for entry in listed(settings)] == [
        "invalid_json",
        "empty",
        "invalid_reading",
        "invalid_json",
    ]
    only = listed(settings, "--reason", "invalid_json")
    assert [(entry["topic"], entry["source_offset"], entry["value"]) for entry in only] == [
        (settings.kafka_topic, "0", "not json"),
        (settings.kafka_topic, "3", "neither"),
    ]
    text = run_cli(settings, "dead-letters", "list").stdout.splitlines()
    assert len(text) == 4
    assert "JSON is malformed" in text[0]


def test_replay_stores_what_is_allowed_now_and_keeps_the_rest(
    settings: Settings, connection: psycopg.Connection
) -> None:
    small = {"MAX_MESSAGE_BYTES": "256"}
    long = message(time=minutes(0), temperature=1.0)[:-1] + b', "note": "' + b"x" * 300 + b'"}'
    publish(settings, [long, b"not json"])
    consume(settings, **small)
    done = run_cli(settings, "dead-letters", "replay", "--reason", "too_large")
    assert done.stdout == f"1 dead letters sent to {settings.kafka_topic}\n"
    consume(settings)
    assert connection.execute("SELECT temperature FROM sensor_data").fetchall() == [(1.0,)]

    # A letter that is still refused carries its newest headers once.
    run_cli(settings, "dead-letters", "replay", "--reason", "invalid_json")
    consume(settings)
    assert [entry["source_offset"] for entry in listed(settings, "--reason", "invalid_json")] == ["1", "3"]


def test_what_is_replayed_is_marked_unless_it_shall_overwrite(settings: Settings) -> None:
    """A mark of the letter's own, whoever made it, does not count."""
    forged = [("own", b"kept"), (REPEAT_HEADER, b"forged")]
    producer = Producer(client_settings(settings, "test"))
    producer.produce(
        settings.dead_letter_topic, b"not json", b"s1", headers=[*forged, (REASON_HEADER, b"invalid_json")]
    )
    assert producer.flush(30) == 0
    for arguments in ((), ("--overwrite",)):
        done = run_cli(settings, "dead-letters", "replay", *arguments)
        assert done.stdout == f"1 dead letters sent to {settings.kafka_topic}\n"
    first, second = (headers_of(letter) for letter in read_topic(settings, settings.kafka_topic))
    assert first == [("own", b"kept"), (REPEAT_HEADER, REPEATED)]
    assert second == [("own", b"kept")]
    assert run_cli(settings, "dead-letters", "list", "--overwrite").returncode == 2


def test_what_is_replayed_goes_to_the_partition_of_its_sensor(settings: Settings) -> None:
    """Where the readings are that Java's clients send, and our producer."""
    producer = Producer(client_settings(settings, "test"))
    keys = [f"s{number}".encode() for number in range(20)]
    for key in keys:
        producer.produce(settings.dead_letter_topic, b"not json", key)
    assert producer.flush(30) == 0
    assert run_cli(settings, "dead-letters", "replay").returncode == 0
    found = {message.key(): message.partition() for message in read_topic(settings, settings.kafka_topic)}
    assert found == {key: partition_of(key, settings.kafka_partitions) for key in keys}


def test_without_the_topic_one_line_says_so(settings: Settings) -> None:
    done = run_cli(settings, "dead-letters", "list", KAFKA_TOPIC="nothing_here")
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no topic nothing_here.dlq")
    assert len(done.stderr.splitlines()) == 1


def test_delete_takes_only_what_was_looked_at(settings: Settings) -> None:
    def refusal(*arguments: str) -> str:
        done = run_cli(settings, "dead-letters", "delete", *arguments)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
        return done.stderr

    assert "--up-to=0 is not the offset of a dead letter (there is none)" in refusal("--up-to", "0")
    publish(settings, [b"1", b"2", b"3", b"4"])
    consume(settings)
    assert "needs --up-to" in refusal()
    assert "no --reason" in refusal("--up-to", "3", "--reason", "empty")
    assert "(there are 0 to 3)" in refusal("--up-to", "4")
    done = run_cli(settings, "dead-letters", "delete", "--up-to", "2")
    assert done.stdout == "3 dead letters deleted\n"
    assert [entry["value"] for entry in listed(settings)] == ["4"]
    assert "(there are 3 to 3)" in refusal("--up-to", "2")


@pytest.mark.usefixtures("humidity_check")
def test_what_the_database_refuses_is_sent_as_it_came(settings: Settings, connection: psycopg.Connection) -> None:
    """The consumer keeps no messages: these are read again from the topic, each from its place."""
    producer = Producer(client_settings(settings, "test"))
    for at in range(300):
        value = message(f"s{at}", minutes(at), 1.0, 101.0 if at in (0, 7, 8, 150, 299) else 50.0)
        unusual = value.replace(b"{", b'{ "number": %d, ' % at)
        producer.produce(settings.kafka_topic, unusual, f"s{at}", partition=at % 3, headers=[("number", str(at))])
    assert producer.flush(30) == 0
    consume(settings)
    sent = {place_of(sent): sent for sent in read_topic(settings, settings.kafka_topic)}
    numbers = set()
    for letter in read_topic(settings, settings.dead_letter_topic):
        its = dict(headers_of(letter))
        assert its[REASON_HEADER] == b"refused_by_database"
        place = int(its["__connect.errors.partition"] or 0), int(its["__connect.errors.offset"] or 0)
        assert (letter.key(), letter.value()) == (sent[place].key(), sent[place].value())
        numbers.add(its["number"])
    assert numbers == {b"0", b"7", b"8", b"150", b"299"}
    assert connection.execute("SELECT count(*) FROM sensor_data").fetchone() == (295,)


@pytest.mark.usefixtures("humidity_check")
def test_what_expires_before_it_can_be_read_again_is_counted_as_expired(
    settings: Settings, connection: psycopg.Connection, start: StartService, tmp_path: Path
) -> None:
    publish(settings, [message(time=minutes(at), humidity=101.0 if at == 2 else 1.0) for at in range(10)], partition=0)
    until = tmp_path / "until"
    plan = json.dumps({"step": "write", "until": str(until)})
    consumer = start(plan, "consume", "--until-caught-up", module="tests.crash_runner")
    wait_until(Path(f"{until}.awaited").exists, "the batch is polled")
    admin = AdminClient(client_settings(settings, "test"))
    for done in admin.delete_records([TopicPartition(settings.kafka_topic, 0, 5)]).values():
        done.result()
    until.touch()
    assert consumer.wait() == 0
    (expired,) = consumer.events("messages_expired")
    assert expired["messages"] == 5
    assert connection.execute("SELECT count(*) FROM sensor_data").fetchone() == (9,)
    assert read_topic(settings, settings.dead_letter_topic) == []
