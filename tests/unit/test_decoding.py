"""What is decoded in chunks is what is decoded one message at a time, whatever the messages."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime, timedelta

import pytest
from confluent_kafka import Message

from services.consumer.decoding import decode, decode_at_once
from services.core.errors import MalformedMessage
from services.core.kafka import REPEAT_HEADER, REPEATED, REPEATED_IF_MOVED, place_of
from services.core.reading import EPOCH, Decoder

NOW = datetime(2024, 3, 1, 12, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
MESSAGES = 100_000
MAX_BYTES = 50_000

SENSORS = ["a", "s0001", "é", "日本語", "x" * 255, 'with "quotes"', "b" * 40, "s0042", "\\", "👍"]
FORMS = ["{}Z", "{}+00:00", "{}.5Z", "{}.000Z", "{}.000001Z", "{}.999999+02:00", "{}.1234567Z", "{}-05:30", "{}z"]
NUMBERS = ["20.5", "0", "-0.0", "1e-300", "5e-324", "1E2", "3", "-273.15", "null", "1e100", "0.1234567890123456789"]
ODD_VALUES = [
    *(
        b"",
        None,
        b" ",
        b"{",
        b"[]",
        b"null",
        b"42",
        b'{"sensor_id":"a"}',
        b"\xef\xbb\xbf{}",
        b"{}{}",
        b'{"x": ' + b"[" * 40_000,
    ),
    *(
        f'{{"sensor_id": {sensor}, "time": {time}, "temperature": {value}}}'.encode()
        for sensor, time, value in (
            ('""', '"2024-02-28T00:00:00Z"', "1"),
            ("null", '"2024-02-28T00:00:00Z"', "1"),
            ("7", '"2024-02-28T00:00:00Z"', "1"),
            ('"a\\u0000b"', '"2024-02-28T00:00:00Z"', "1"),
            ('"a\\u202e"', '"2024-02-28T00:00:00Z"', "1"),
            ('"\\ud800"', '"2024-02-28T00:00:00Z"', "1"),
            (f'"{"x" * 256}"', '"2024-02-28T00:00:00Z"', "1"),
            ('"a"', '"2024-02-28T00:00:00"', "1"),
            ('"a"', '"2024-02-28"', "1"),
            ('"a"', "1709078400", "1"),
            ('"a"', '"2023-02-29T00:00:00Z"', "1"),
            ('"a"', '"0001-01-01T00:00:00+23:59"', "1"),
            ('"a"', '"9999-12-31T23:59:59-23:59"', "1"),
            ('"a"', '"2024-03-02T12:00:00.000001Z"', "1"),
            ('"a"', '"2024-03-02T12:00:00Z"', "1"),  # exactly as late as allowed
            ('"a"', '"2024-02-01T12:00:00Z"', "1"),  # exactly as old as is kept
            ('"a"', '"2024-02-01T11:59:59.999999Z"', "1"),
            ('"a"', '"1900-01-01T00:00:00Z"', "1"),
            ('"a"', '"2024-02-28T00:00:00Z"', "null"),
            ('"a"', '"2024-02-28T00:00:00Z"', "NaN"),
            ('"a"', '"2024-02-28T00:00:00Z"', "1e999"),
            ('"a"', '"2024-02-28T00:00:00Z"', "-1.1e100"),
            ('"a"', '"2024-02-28T00:00:00Z"', '"1"'),
            ('"a"', '"2024-02-28T00:00:00Z"', "true"),
            ('"a"', '"2024-02-28T00:00:00Z"', '1, "temperature": null, "humidity": 2'),
            ('"a"', '"2024-02-28T00:00:00Z"', f'1, "note": "{"x" * MAX_BYTES}"'),
        )
    ),
    b'{"sensor_id": "\xff", "time": "2024-02-28T00:00:00Z", "temperature": 1}',
]
Headers = list[tuple[str, str | bytes | None]] | None
MARKS: list[Headers] = [None, None, None, [("other", b"yes")], [(REPEAT_HEADER, REPEATED)]]
MARKS.append([(REPEAT_HEADER, REPEATED_IF_MOVED)])


def value(source: random.Random) -> bytes:
    """A reading in one of many forms."""
    moment = NOW - timedelta(days=28) + timedelta(seconds=source.randrange(27 * 86_400))
    time = source.choice(FORMS).format(moment.strftime("%Y-%m-%dT%H:%M:%S"))
    sensor = json.dumps(source.choice(SENSORS), ensure_ascii=source.random() < 0.5)
    first, second = source.sample(("temperature", "humidity"), 2)
    measured = f'"{first}": {source.choice([number for number in NUMBERS if number != "null"])}'
    if source.random() < 0.8:
        measured += f', "{second}": {source.choice(NUMBERS)}'
    return f'{{"sensor_id": {sensor}, "time": "{time}", {measured}}}'.encode()


def chunk(source: random.Random, first: int) -> list[Message]:
    """Messages as they are polled: often all are well, or all but one."""
    count = source.randint(1, 200)
    odd = source.sample(range(count), min(count, source.choice([0, 0, 0, 1, 1, 5])))
    marks = source.choice([MARKS[:1], MARKS[:1], MARKS])
    return [
        Message(
            topic="t",
            partition=source.randrange(3),
            offset=first + at,
            value=source.choice(ODD_VALUES) if at in odd else value(source),
            headers=source.choice(marks),
        )
        for at in range(count)
    ]


def decoder() -> Decoder:
    decoder = Decoder(max_bytes=MAX_BYTES, max_future=timedelta(days=1), max_age=timedelta(days=29))
    decoder.set_clock(NOW)
    return decoder


@pytest.mark.parametrize("fills_gaps", [False, True])
def test_columns_are_what_the_messages_say_one_by_one(fills_gaps: bool) -> None:
    source = random.Random(int(fills_gaps))  # noqa: S311
    number = at_once = chunks = 0
    while number < MESSAGES // 2:
        messages = chunk(source, number)
        number += len(messages)
        rows, refused, size = [], [], 0
        for message in messages:
            size += len(message.value() or b"")
            repeated = dict(message.headers() or []).get(REPEAT_HEADER)
            try:
                reading = decoder().decode(message.value())
            except MalformedMessage as error:
                refused.append((message.offset(), error.reason, str(error)))
            else:
                time, marked = (reading.time - EPOCH) // MICROSECOND, {REPEATED, fills_gaps and REPEATED_IF_MOVED}
                row = (reading.sensor_id, time, reading.temperature, reading.humidity)
                rows.append((*row, *place_of(message), repeated in marked))
        columns, letters, decoded_size = decode(messages, decoder(), fills_gaps=fills_gaps)
        assert repr(list(zip(*(column.to_pylist() for column in columns.columns), strict=True))) == repr(rows)
        assert [(letter.message.offset(), letter.reason, letter.detail) for letter in letters] == refused
        assert decoded_size == size
        chunks += 1
        at_once += decode_at_once([message.value() for message in messages], decoder()) is not None
    assert 0.4 < at_once / chunks < 0.8, "both ways are taken"
