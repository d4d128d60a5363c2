"""Dead letters can be listed, filtered and sent once more."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from services.consumer.dead_letter import ORIGINAL_BYTES_HEADER
from services.core.config import Settings
from services.core.kafka import REASON_HEADER, REPEAT_HEADER, REPEATED, client_settings, headers_of, position_of
from services.core.letters import LETTER_HEADER, name_of
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


def too_long(at: float) -> bytes:
    """A reading that MAX_MESSAGE_BYTES=256 does not allow."""
    return message(time=minutes(at), temperature=1.0)[:-1] + b', "note": "' + b"x" * 300 + b'"}'


def replayed(settings: Settings, *arguments: str) -> list[str]:
    done = run_cli(settings, "dead-letters", "replay", *arguments)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.splitlines()


STAYS = "messages that were stored stay in the list until they are deleted: dead-letters delete --up-to OFFSET"


def test_replay_stores_what_is_allowed_now_and_keeps_the_rest(
    settings: Settings, connection: psycopg.Connection, start: StartService
) -> None:
    quiet = settings.model_copy(update={"log_level": "ERROR"})
    small = {"MAX_MESSAGE_BYTES": "256"}
    publish(settings, [too_long(0), b"not json", too_long(1)])
    consume(settings, **small)
    (line,) = replayed(quiet, "--reason", "too_large", "--up-to", "0")
    assert line.startswith(f"1 dead letters sent to {settings.kafka_topic}; no consumer of group ")
    start("consume").wait_for("partitions_assigned")
    assert replayed(quiet) == [
        f"2 dead letters sent to {settings.kafka_topic}: 2 stored, or there already",
        "1 (1 invalid_json) not sent: they can never be stored",
        STAYS,
    ]
    assert connection.execute("SELECT temperature FROM sensor_data").fetchall() == [(1.0,), (1.0,)]
    assert len(listed(settings)) == 3


@pytest.mark.slow
def test_what_stays_bad_is_there_once(settings: Settings, connection: psycopg.Connection, start: StartService) -> None:
    """However often it is replayed, whether anybody consumes meanwhile or not, and behind what is never sent."""
    quiet = settings.model_copy(update={"log_level": "ERROR"})
    small = {"MAX_MESSAGE_BYTES": "256"}
    publish(settings, [b"not json", *(too_long(at) for at in range(5))])
    consume(settings, **small)
    for _ in range(2):
        assert replayed(quiet)[1] == "1 (1 invalid_json) not sent: they can never be stored"
        consume(settings, **small)
        assert [entry["reason"] for entry in listed(settings)] == ["invalid_json", *["too_large"] * 5]
    slow = settings.model_copy(update={"max_message_bytes": 256, "consumer_batch_seconds": 3.0})
    start("consume", settings=slow).wait_for("partitions_assigned")
    assert replayed(quiet)[0] == (
        f"5 dead letters sent to {settings.kafka_topic}: 0 stored, or there already; 5 (5 too_large) refused again"
    )
    assert len(listed(settings)) == 6
    state = json.loads(run_cli(quiet, "status", "--json").stdout)
    assert state["kafka"]["dead_letters"] == {
        "count": 6,
        "looked_at": 6,
        "reasons": {"too_large": 5, "invalid_json": 1},
    }
    assert connection.execute("SELECT count(*) FROM sensor_data").fetchone() == (0,)


def test_nobody_can_hide_the_letters_of_others(settings: Settings) -> None:
    """By a header that names them, without what they hold."""
    publish(settings, [b"not json"])
    consume(settings)
    producer = Producer(client_settings(settings, "test"))
    for name in (b"0/0", b"0/0/" + b"0" * 64):
        producer.produce(settings.kafka_topic, b"other", headers=[(LETTER_HEADER, name)])
    assert producer.flush(30) == 0
    consume(settings)
    assert [entry["value"] for entry in listed(settings)] == ["not json", "other", "other"]


def test_what_was_cut_off_is_not_sent_again(settings: Settings) -> None:
    producer = Producer(client_settings(settings, "test"))
    headers: list[tuple[str, str | bytes | None]] = [
        (REASON_HEADER, b"too_large"),
        (ORIGINAL_BYTES_HEADER, b"3000000"),
    ]
    producer.produce(settings.dead_letter_topic, message(temperature=1.0), headers=headers)
    assert producer.flush(30) == 0
    assert replayed(settings) == [
        f"0 dead letters sent to {settings.kafka_topic}",
        "1 (1 truncated) not sent: they can never be stored",
    ]


def test_what_is_replayed_is_marked_unless_it_shall_overwrite(settings: Settings) -> None:
    """A mark of the letter's own, whoever made it, does not count."""
    forged = [("own", b"kept"), (REPEAT_HEADER, b"forged"), (LETTER_HEADER, b"forged")]
    producer = Producer(client_settings(settings, "test"))
    producer.produce(
        settings.dead_letter_topic,
        message(temperature=1.0),
        b"s1",
        headers=[*forged, (REASON_HEADER, b"refused_by_database")],
    )
    assert producer.flush(30) == 0
    for arguments in ((), ("--overwrite",)):
        assert replayed(settings, *arguments)[0].startswith(f"1 dead letters sent to {settings.kafka_topic}")
    (letter,) = read_topic(settings, settings.dead_letter_topic)
    first, second = (headers_of(sent) for sent in read_topic(settings, settings.kafka_topic))
    assert first == [("own", b"kept"), (REPEAT_HEADER, REPEATED), (LETTER_HEADER, name_of(letter))]
    assert second == [("own", b"kept"), (LETTER_HEADER, name_of(letter))]
    assert run_cli(settings, "dead-letters", "list", "--overwrite").returncode == 2


def test_what_is_replayed_goes_to_the_partition_of_its_sensor(settings: Settings) -> None:
    """Where the readings are that Java's clients send, and our producer."""
    producer = Producer(client_settings(settings, "test"))
    keys = [f"s{number}".encode() for number in range(20)]
    for key in keys:
        producer.produce(settings.dead_letter_topic, message(key.decode(), temperature=1.0), key)
    assert producer.flush(30) == 0
    assert run_cli(settings, "dead-letters", "replay").returncode == 0
    found = {message.key(): message.partition() for message in read_topic(settings, settings.kafka_topic)}
    assert found == {key: partition_of(key, settings.kafka_partitions) for key in keys}


def test_what_a_forged_letter_says_cannot_command_a_terminal(settings: Settings) -> None:
    producer = Producer(client_settings(settings, "test"))
    escape = b"\x1b]0;owned\x07\nNEXT"
    for number in range(30):
        headers: list[tuple[str, str | bytes | None]] = [
            (REASON_HEADER, b"%d" % number + escape),
            ("__connect.errors.exception.message", escape),
            ("__connect.errors.topic", escape),
        ]
        producer.produce(settings.dead_letter_topic, escape, headers=headers)
    assert producer.flush(30) == 0
    for command in (("dead-letters", "list"), ("dead-letters", "list", "--json"), ("status",), ("status", "--json")):
        shown = run_cli(settings, *command).stdout
        assert "owned" in shown
        assert not {"\x1b", "\x07"} & set(shown)
        assert "\nNEXT" not in shown
    state = run_cli(settings, "status").stdout
    assert state.count("owned") == 20
    assert "and 10 more reasons)" in state


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
    sent = {position_of(sent): sent for sent in read_topic(settings, settings.kafka_topic)}
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
