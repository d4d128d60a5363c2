"""Dead letters that were replayed and refused again: the newer one takes the place of the older.

A message that is replayed says which letter it was, and the consumer keeps the headers of what it refuses. So the
newer letter names the older one, which stays in the topic, because nothing but its beginning can be deleted.
"""

from __future__ import annotations

from hashlib import sha256

from confluent_kafka import Message

from services.core.kafka import REASON_HEADER, headers_of, position_of

LETTER_HEADER = "sensor_pipeline.letter"


def name_of(letter: Message) -> bytes:
    """What a replayed message says of the letter that it was: its place, and a digest of what it is.

    Without the digest, whoever may write to the topic of readings could hide the letters of others.
    """
    partition, offset = position_of(letter)
    digest = sha256((letter.key() or b"") + b"\0" + (letter.value() or b"")).hexdigest()
    return f"{partition}/{offset}/{digest}".encode()


def replaced_by(letter: Message) -> bytes | None:
    """The name of the older letter whose place this one takes."""
    return dict(headers_of(letter)).get(LETTER_HEADER)


def read_headers(letter: Message) -> dict[str, str]:
    """The headers as text; of two with one name the last."""
    return {name: value.decode("utf-8", "replace") if value is not None else "" for name, value in headers_of(letter)}


def reason_of(letter: Message) -> str:
    """Why it was not stored; whoever may write to the topic may make up any."""
    return read_headers(letter).get(REASON_HEADER, "unknown")
