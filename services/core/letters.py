"""Dead letters that were replayed and refused again: the newer one replaces the older.

A message that is replayed names the letter that it was, and the consumer keeps the headers of what it refuses. So the
newer letter names the older one, which stays in the topic, because only the topic's beginning can be deleted.
"""

from __future__ import annotations

from hashlib import sha256

from confluent_kafka import Message

from services.core.kafka import REASON_HEADER, headers_of, position_of

LETTER_HEADER = "sensor_pipeline.letter"


def name_of(letter: Message) -> bytes:
    """How a replayed message names the letter that it was: by partition, offset and a digest of key and value.

    Without the digest, anyone who may write to the topic of readings could hide the letters of others.
    """
    partition, offset = position_of(letter)
    digest = sha256((letter.key() or b"") + b"\0" + (letter.value() or b"")).hexdigest()
    return f"{partition}/{offset}/{digest}".encode()


def replaced_by(letter: Message) -> bytes | None:
    """The name of the older letter that this one replaces."""
    return dict(headers_of(letter)).get(LETTER_HEADER)


def read_headers(letter: Message) -> dict[str, str]:
    """The headers as text; of two with one name the last."""
    return {name: value.decode("utf-8", "replace") if value is not None else "" for name, value in headers_of(letter)}


def reason_of(letter: Message) -> str:
    """Why it was not stored; anyone who may write to the topic can make up any reason."""
    return read_headers(letter).get(REASON_HEADER, "unknown")
