"""``sensor-pipeline dead-letters list | replay | delete``."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime

from confluent_kafka import KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from services.consumer.dead_letter import ORIGINAL_BYTES_HEADER, OUR_HEADERS
from services.core.config import Settings
from services.core.errors import ConfigurationError, MalformedMessageError, PermanentError, StoppedError
from services.core.kafka import (
    DEAD_LETTER_MAX_BYTES,
    JSON,
    PARTITIONER,
    REPEAT_HEADER,
    REPEATED,
    Header,
    Outgoing,
    client_settings,
    connect_admin,
    deliver,
    format_of,
    headers_of,
    position_of,
    read_topic,
)
from services.core.letters import LETTER_HEADER, name_of, read_headers, reason_of, replaced_by
from services.core.offsets import COORDINATOR_TIMEOUT_S, Offsets, PartitionOffsets
from services.core.printable import printable
from services.core.reading import EARLIEST, LATEST, Decoder
from services.core.shutdown import Shutdown

FLUSH_TIMEOUT_S = 60.0
OUTCOME_TIMEOUT_S = 30.0  # after the consumers' last progress
POLL_INTERVAL_S = 0.2
SHOWN_VALUE_BYTES = 200
NOT_REPLAYED = OUR_HEADERS | {REPEAT_HEADER, LETTER_HEADER}

LINE = "{offset:>6}  {time}  {reason:20} {topic}[{partition}]@{source_offset}  {detail}  {value!r}"


def _by_reason(counts: Counter[str]) -> str:
    reasons = ", ".join(f"{count} {printable(reason)}" for reason, count in counts.most_common())
    return f"{counts.total()} ({reasons})"


def list_letters(settings: Settings, shutdown: Shutdown, *, reason: str | None, as_json: bool) -> Iterator[str]:
    """One line for each dead letter there is now, oldest first."""
    for letter in read_letters(settings, shutdown, reason=reason):
        entry = what_is_known(letter)
        yield json.dumps(entry) if as_json else printable(LINE.format(**entry))


def what_is_known(letter: Message) -> dict[str, object]:
    """What a person wants to know of a dead letter."""
    headers, value = read_headers(letter), letter.value() or b""
    origin = {"topic": "topic", "partition": "partition", "source_offset": "offset", "detail": "exception.message"}
    return {
        "offset": position_of(letter)[1],
        "time": datetime.fromtimestamp(letter.timestamp()[1] / 1000, UTC).isoformat(timespec="seconds"),
        "reason": reason_of(letter),
        **{name: headers.get(f"__connect.errors.{header}", "") for name, header in origin.items()},
        "value": value[:SHOWN_VALUE_BYTES].decode("utf-8", "replace") + ("..." if value[SHOWN_VALUE_BYTES:] else ""),
    }


def replay(
    settings: Settings, shutdown: Shutdown, *, reason: str | None, up_to: int | None = None, overwrite: bool = False
) -> Iterator[str]:
    """Send the original key, value and headers of the dead letters there are now to the topic of readings.

    They are marked as repeated, so sending one twice is harmless: it fills a gap, but overwrites nothing that has been
    stored since. With ``overwrite`` they count as new. One that is refused again becomes a newer dead letter, which
    replaces the older one. What no limits could make a reading is not sent.

    Waits until the consumers have read them, if there are any, and yields what a person wants to know. Raises
    PermanentError with the count if some could not be sent.
    """
    admin = connect_admin(settings, shutdown)
    producer = Producer(
        client_settings(settings, "replay")
        | {"enable.idempotence": True, "message.max.bytes": DEAD_LETTER_MAX_BYTES, "partitioner": PARTITIONER}
    )
    names: list[bytes] = []  # of the letters that are sent
    hopeless: Counter[str] = Counter()  # those that are not, by reason

    def messages() -> Iterator[Outgoing]:
        mark: list[Header] = [] if overwrite else [(REPEAT_HEADER, REPEATED)]
        for letter in read_letters(settings, shutdown, reason=reason, up_to=up_to):
            if why := why_hopeless(letter, settings.measurements):
                hopeless[why] += 1
                continue
            theirs: list[Header] = [header for header in headers_of(letter) if header[0] not in NOT_REPLAYED]
            names.append(name_of(letter))
            yield letter.key(), letter.value(), [*theirs, *mark, (LETTER_HEADER, names[-1])]

    answers = deliver(producer, settings.kafka_topic, messages(), FLUSH_TIMEOUT_S)
    failed = [answer for answer in answers if isinstance(answer, KafkaError)]
    if failed:
        raise PermanentError(f"{len(failed)} of {len(names)} dead letters were not sent: {failed[0].str()}")
    last = dict(sorted(answer for answer in answers if not isinstance(answer, KafkaError)))  # offset by partition
    is_known = _has_members(admin, settings) and _wait_until_read(settings, last, shutdown) if last else True
    yield from _outcome(settings, shutdown, names, hopeless, is_known=is_known)


def _outcome(
    settings: Settings, shutdown: Shutdown, names: list[bytes], hopeless: Counter[str], *, is_known: bool
) -> Iterator[str]:
    """What became of the letters that were sent; ``is_known``: consumers have read all of them."""
    line, stored = f"{len(names)} dead letters sent to {settings.kafka_topic}", 0
    if not is_known:
        line += f"; no consumer of group {settings.kafka_group} has read them yet"
    elif names:
        # By the name of the letter that each replaces: one may be there twice after a crash.
        newer = {replaced_by(letter): reason_of(letter) for letter in read_letters(settings, shutdown)}
        refused = Counter(newer[name] for name in names if name in newer)
        stored = len(names) - refused.total()
        line += f": {stored} stored, or there already"
        line += f"; {_by_reason(refused)} refused again" if refused else ""
    yield line
    if hopeless:
        yield f"{_by_reason(hopeless)} not sent: they can never be stored"
    if stored:
        yield "messages that were stored stay in the list until they are deleted: dead-letters delete --up-to OFFSET"


def why_hopeless(letter: Message, measurements: tuple[str, ...]) -> str:
    """Why the letter can never be stored, whatever the limits are; empty if it may be."""
    if any(name == ORIGINAL_BYTES_HEADER for name, _ in headers_of(letter)):
        return "truncated"
    if format_of(letter) != JSON:
        return ""
    try:
        Decoder(measurements, max_bytes=DEAD_LETTER_MAX_BYTES, max_future=LATEST - EARLIEST).decode(letter.value())
    except MalformedMessageError as error:
        return error.reason
    return ""


def _has_members(admin: AdminClient, settings: Settings) -> bool:
    """Whether the consumer group has any members."""
    (group,) = admin.describe_consumer_groups([settings.kafka_group], request_timeout=COORDINATOR_TIMEOUT_S).values()
    try:
        return bool(group.result().members)
    except KafkaException:
        return False


def _wait_until_read(settings: Settings, last: dict[int, int], shutdown: Shutdown) -> bool:
    """Whether consumers have committed beyond these offsets, by partition; waits while they make progress."""
    left, deadline = -1, time.monotonic() + OUTCOME_TIMEOUT_S
    with Offsets(settings) as offsets:
        while time.monotonic() < deadline:
            found = offsets.of(settings.kafka_topic, list(last))
            before, left = left, sum(max(0, last[each.partition] + 1 - (each.committed or 0)) for each in found)
            if not left:
                return True
            if left != before:
                deadline = time.monotonic() + OUTCOME_TIMEOUT_S
            if shutdown.wait(POLL_INTERVAL_S):
                raise StoppedError("stopped before the consumers have read what was sent")
    return False


def delete(settings: Settings, shutdown: Shutdown, *, up_to: int) -> int:
    """Delete the letters up to the one at offset ``up_to``; returns how many. Later ones, not yet seen, stay."""
    admin = connect_admin(settings, shutdown)
    (found,) = letter_offsets(settings, one=True)
    if not found.first <= up_to < found.end:
        there_are = f"there are {found.first} to {found.end - 1}" if found.first < found.end else "there is none"
        raise ConfigurationError(f"--up-to={up_to} is not the offset of a dead letter ({there_are})")
    (deleted,) = admin.delete_records([TopicPartition(settings.dead_letter_topic, 0, up_to + 1)]).values()
    try:
        return int(deleted.result().low_watermark) - found.first
    except KafkaException as error:
        raise PermanentError(f"the dead letters were not deleted: {error.args[0].str()}") from error


def letter_offsets(settings: Settings, *, one: bool = False) -> list[PartitionOffsets]:
    """Where the partitions of the topic of dead letters begin and end; ``one``: there may not be more."""
    topic = settings.dead_letter_topic
    with Offsets(settings) as offsets:
        partitions = offsets.partitions().get(topic)
        if partitions is None:
            raise ConfigurationError(f"there is no topic {topic} (KAFKA_TOPIC); has a consumer run yet?")
        if one and partitions != [0]:
            raise ConfigurationError(
                f"{topic} has several partitions, so an offset does not identify a dead letter: "
                "use Kafka's kafka-delete-records.sh"
            )
        return offsets.of(topic, partitions)


def read_letters(
    settings: Settings, shutdown: Shutdown, *, reason: str | None = None, up_to: int | None = None
) -> Iterator[Message]:
    """The dead letters that exist when this is called and that no newer one replaces, in the order of the topic.

    Raises StoppedError, and ConfigurationError where ``up_to`` cannot name a letter.
    """
    connect_admin(settings, shutdown)
    found = letter_offsets(settings, one=up_to is not None)

    def letters() -> Iterator[Message]:
        for each in found:
            for letter in read_topic(settings, settings.dead_letter_topic, each.partition, each.first, each.end):
                if shutdown.requested:
                    raise StoppedError("stopped before the last dead letter")
                yield letter

    replaced = {replaced_by(letter) for letter in letters()}
    for letter in letters():
        if up_to is not None and position_of(letter)[1] > up_to:
            return
        if reason in (None, reason_of(letter)) and (replaced == {None} or name_of(letter) not in replaced):
            yield letter
