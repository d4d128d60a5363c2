"""What is decoded in chunks is what is decoded one message at a time, whatever the messages."""

from __future__ import annotations

import json
import math
import random
from datetime import UTC, datetime, timedelta

import msgspec
import pyarrow as pa
import pytest
from confluent_kafka import Message

from services.consumer.decoding import decode, usual_columns
from services.core import block
from services.core.errors import MalformedMessageError
from services.core.kafka import (
    ARROW,
    FORMAT_HEADER,
    JSON,
    REPEAT_HEADER,
    REPEATED,
    REPEATED_IF_MOVED,
    position_of,
)
from services.core.measurements import DEFAULT
from services.core.reading import EPOCH, Decoder
from tests.examples import examples
from tests.measured import MEASUREMENTS

BLOCK_SCHEMA = block.block_schema(DEFAULT)

NOW = datetime(2024, 3, 1, 12, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
MESSAGES = examples(1000)
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


def row(source: random.Random) -> tuple[str | None, int | None, float | None, float | None]:
    """A row of a block, nearly always a reading."""
    odd = source.randrange(100)
    moment = (NOW - timedelta(days=28) - EPOCH) // MICROSECOND + source.randrange(27 * 86_400 * 10**6)
    return (
        source.choice([None, "", "x" * 256, "a\x00b", "a\u202e"] if odd == 0 else SENSORS),
        source.choice([None, moment, -(2**63), 2**62, 0, moment + 10**14]) if odd == 1 else moment,
        source.choice([math.nan, math.inf, -1.1e100, None]) if odd == 2 else source.uniform(-50, 50),
        source.choice([None, 1e100, -0.0, 5e-324, 0.1]),
    )


def as_json(sensor: str | None, time: int | None, temperature: float | None, humidity: float | None) -> bytes:
    """A row as the message that would have held it alone."""
    try:
        text = None if time is None else (EPOCH + time * MICROSECOND).isoformat()
    except OverflowError:
        text = str(time)
    return json.dumps({"sensor_id": sensor, "time": text, "temperature": temperature, "humidity": humidity}).encode()


def block_chunk(source: random.Random, first: int) -> list[tuple[Message, list[bytes | None]]]:
    """Blocks and readings mixed, with what each message would be one by one; of what is no block, what is found."""
    found: list[tuple[Message, list[bytes | None]]] = []
    for offset in range(first, first + source.randint(1, 20)):
        texts: list[bytes | None] = [value(source)]
        form, sent = source.choice([None, JSON]), texts[0]
        if source.random() < 0.7:
            rows = [row(source) for _ in range(source.randrange(60))]
            columns = [pa.array([each[at] for each in rows], field.type) for at, field in enumerate(BLOCK_SCHEMA)]
            texts, form = [as_json(*each) for each in rows], ARROW
            sent = block.encode_block(pa.record_batch(columns, schema=BLOCK_SCHEMA))
        headers: list[tuple[str, str | bytes | None]] = [*(source.choice(MARKS) or [])]
        headers += [(FORMAT_HEADER, form)] if form else []
        message = Message(topic="t", partition=source.randrange(3), offset=offset, value=sent, headers=headers)
        found.append((message, texts))
    return found


@pytest.mark.parametrize("fills_gaps", [False, True])
def test_blocks_are_what_their_rows_say_one_by_one(fills_gaps: bool) -> None:
    source = random.Random(int(fills_gaps))  # noqa: S311
    number = 0
    while number < MESSAGES // 2:
        pairs = block_chunk(source, number)
        rows, refused = [], []
        for message, texts in pairs:
            number += len(texts)
            marked = dict(message.headers() or []).get(REPEAT_HEADER) in {REPEATED, fills_gaps and REPEATED_IF_MOVED}
            for text in texts:
                try:
                    reading = decoder().decode(text)
                except MalformedMessageError as error:
                    refused.append((message.offset(), error.reason))
                else:
                    time = (reading.time - EPOCH) // MICROSECOND
                    values = (reading.sensor_id, time, reading.temperature, reading.humidity)
                    rows.append((*values, *[None] * (len(MEASUREMENTS) - 2), *position_of(message), marked))
        messages = [message for message, _ in pairs]
        chunks, letters = decode(messages, decoder(), fills_gaps=fills_gaps)
        assert repr(tuples(chunks)) == repr(rows)
        assert sorted((letter.message.offset(), letter.reason) for letter in letters) == sorted(refused)


def tuples(chunks: list[pa.RecordBatch]) -> list[tuple[object, ...]]:
    """The rows of columns."""
    return [each for columns in chunks for each in zip(*(column.to_pylist() for column in columns), strict=True)]


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
    decoder = Decoder(MEASUREMENTS, max_bytes=MAX_BYTES, max_future=timedelta(days=1), max_age=timedelta(days=29))
    decoder.set_clock(NOW)
    return decoder


@pytest.mark.parametrize("fills_gaps", [False, True])
def test_columns_are_what_the_messages_say_one_by_one(fills_gaps: bool) -> None:
    source = random.Random(int(fills_gaps))  # noqa: S311
    number = at_once = chunks = 0
    while number < MESSAGES // 2:
        messages = chunk(source, number)
        number += len(messages)
        rows, refused = [], []
        for message in messages:
            repeated = dict(message.headers() or []).get(REPEAT_HEADER)
            try:
                reading = decoder().decode(message.value())
            except MalformedMessageError as error:
                refused.append((message.offset(), error.reason, str(error)))
            else:
                time, marked = (reading.time - EPOCH) // MICROSECOND, {REPEATED, fills_gaps and REPEATED_IF_MOVED}
                row = (reading.sensor_id, time, *msgspec.structs.astuple(reading)[2:])
                rows.append((*row, *position_of(message), repeated in marked))
        decoded, letters = decode(messages, decoder(), fills_gaps=fills_gaps)
        assert repr(tuples(decoded)) == repr(rows)
        assert [(letter.message.offset(), letter.reason, letter.detail) for letter in letters] == refused
        chunks += 1
        values = [message.value() for message in messages]
        at_once += usual_columns(decoder().decode_all(values)[0], values, decoder()) is not None
    assert 0.5 < at_once / chunks < 0.95, "both ways are taken"


def test_json_that_is_nested_as_deeply_as_can_be_decoded_costs_no_other_message() -> None:
    decode_from = decoder()
    good = b'{"sensor_id": "a", "time": "2024-03-01T11:00:00Z", "humidity": 1}'
    for depth in range(500, 1100):
        nested = good.replace(b"}", b', "x": ' + b"[" * depth + b"]" * depth + b"}")
        values = enumerate([good, nested, good])
        messages = [Message(topic="t", partition=0, offset=offset, value=value) for offset, value in values]
        chunks, letters = decode(messages, decode_from, fills_gaps=False)
        assert sum(map(len, chunks)) + len(letters) == 3, depth
        assert len(letters) <= 1, depth
