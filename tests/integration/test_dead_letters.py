"""Dead letters can be listed, filtered and sent once more."""

from __future__ import annotations

import json

import psycopg
from confluent_kafka import Producer

from services.core.config import Settings
from services.core.kafka import REASON_HEADER, REPEAT_HEADER, REPEATED, client_settings, headers_of
from tests.fix_services import message, minutes, publish, read_topic, run_cli
from tests.murmur2 import partition_of


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
