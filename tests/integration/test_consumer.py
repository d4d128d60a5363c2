"""The consumer as a process, against a real broker and a real database."""

from __future__ import annotations

import psycopg

from services.core.config import Settings
from tests.fix_services import StartService, message, minutes, publish, read_topic


def rows(connection: psycopg.Connection) -> list[tuple[object, ...]]:
    return connection.execute(
        "SELECT sensor_id, time, temperature, humidity FROM sensor_data ORDER BY sensor_id, time"
    ).fetchall()


def test_new_readings_are_copied_and_their_minutes_queued(
    settings: Settings, connection: psycopg.Connection, start: StartService
) -> None:
    publish(settings, [message(time=minutes(at), temperature=float(at)) for at in (0, 1, 2, 90)])
    consumer = start("consume", "--until-caught-up")
    assert consumer.wait() == 0
    assert rows(connection) == [("s1", minutes(at), float(at), None) for at in (0, 1, 2, 90)]
    touched = connection.execute("SELECT range_agg(touched)::text FROM summary_refresh_queue").fetchone()
    assert touched == (
        '{["2024-03-01 00:00:00+00","2024-03-01 00:03:00+00"),'
        '["2024-03-01 01:30:00+00","2024-03-01 01:31:00+00")}',
    )
    assert consumer.events("stopped")[0]["inserted"] == 4


def test_malformed_messages_become_dead_letters_and_their_neighbours_are_stored(
    settings: Settings, connection: psycopg.Connection, start: StartService
) -> None:
    malformed = {
        b'{"sensor_id":"x"}': "invalid_reading",
        b"not json": "invalid_json",
        b"": "empty",
        b"x" * 200_000: "too_large",
        b'{"sensor_id":"a\\u0000b","time":"2024-03-01T00:00:00Z","temperature":1}': "refused_by_database",
    }
    values = [message(time=minutes(0), temperature=0.0)]
    for at, value in enumerate(malformed, start=1):
        values += [value, message(time=minutes(at), temperature=float(at))]
    publish(settings, values)
    consumer = start("consume", "--until-caught-up")
    assert consumer.wait() == 0
    assert [row[2] for row in rows(connection)] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    letters = read_topic(settings, settings.dead_letter_topic)
    found = {letter.value() or b"": dict(letter.headers() or []) for letter in letters}
    assert {value: headers["sensor_pipeline.reason"].decode() for value, headers in found.items()} == malformed
    headers = found[b"not json"]
    assert headers["__connect.errors.topic"] == settings.kafka_topic.encode()
    assert headers["__connect.errors.offset"] == b"3"
    assert headers["__connect.errors.exception.message"].startswith(b"JSON is malformed")
    assert consumer.events("stopped")[0]["dead_letters"] == 5
