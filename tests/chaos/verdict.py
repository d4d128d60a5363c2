"""What must be there at the end, from what was sent; computed here, not by the code under test.

A dead letter decides whether a racer was stored. Everything else must be in the table and in the summaries, or be a
dead letter, by what it is.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from confluent_kafka import Message
from psycopg import Connection

from services.core.kafka import REASON_HEADER, position_of
from services.core.letters import read_headers
from services.local.check import Key, Row, floor, same
from tests.chaos.traffic import POISON_KEY, Sample, Traffic
from tests.fix_services import rows_of
from tests.model import METRICS, Rows, Values

Place = tuple[int, int]  # partition and offset


@dataclass
class Verdict:
    """``found`` are the differences, one line each."""

    traffic: Traffic
    messages: Sequence[Message]
    letters: Sequence[Message]
    found: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lettered: dict[Place, Message] = {}
        self.repeated_letters = 0
        for letter in self.letters:
            headers = read_headers(letter)
            place = int(headers["__connect.errors.partition"]), int(headers["__connect.errors.offset"])
            self.repeated_letters += place in self.lettered
            self.lettered[place] = letter
        self.refused: set[str] = set()  # racers
        self.rows: dict[Key, Values] = {}

    def judge(self, connection: Connection, widths: dict[str, tuple[int, int]]) -> list[str]:
        """Compare everything; ``widths`` are the old and the new one of each summary."""
        self._judge_topic()
        self._judge_letters()
        self._judge_readings(connection)
        for metric, pair in widths.items():
            self._judge_summary(connection, metric, *pair)
            self._judge_live_view(connection, metric)
        return self.found

    def _judge_topic(self) -> None:
        """Each sensor's readings are there once, in the order in which they were sent."""
        topic: dict[str, list[Sample]] = defaultdict(list)
        for message in self.messages:
            if message.key() == POISON_KEY.encode():
                continue
            for sensor, sample in read_samples(message):
                topic[sensor].append(sample)
                if sensor in self.traffic.racers and position_of(message) in self.lettered:
                    self.refused.add(sensor)
                else:
                    self._apply(sensor, sample)
        for sensor in sorted(topic.keys() | self.traffic.sent.keys()):
            there, sent = topic.get(sensor, []), self.traffic.sent.get(sensor, [])
            if there != sent:
                self.found.append(f"topic: {sensor} has {len(there)} messages, {len(sent)} were sent, or their order")

    def _apply(self, sensor: str, sample: Sample) -> None:
        time, *values = sample
        before = self.rows.get((sensor, time), (None, None))
        temperature, humidity = (old if new is None else new for old, new in zip(before, values, strict=True))
        self.rows[sensor, time] = temperature, humidity

    def _judge_letters(self) -> None:
        """Each message that is no reading has its letter, whole and with its reason; of the others only racers do."""
        for message in self.messages:
            place, value = position_of(message), message.value() or b""
            reason = self.traffic.poison.get(value) if message.key() == POISON_KEY.encode() else None
            letter = self.lettered.pop(place, None)
            if letter is None:
                if reason is not None:
                    self.found.append(f"dead letters: none for {place} ({reason})")
                continue
            if reason is None:
                reason = "too_late" if read_samples(message)[0][0] in self.traffic.racers else "none"
            stated = read_headers(letter).get(REASON_HEADER)
            if stated != reason or (letter.key(), letter.value() or b"") != (message.key(), value):
                self.found.append(f"dead letters: {place} is {stated}, must be {reason}: {value[:80]!r}")
        self.found += [f"dead letters: one for {place}, where no message is" for place in self.lettered]

    def _judge_readings(self, connection: Connection) -> None:
        """All that was stored and is kept; nothing of the chunks that were dropped."""
        stored = {
            (sensor, time): (temperature, humidity)
            for sensor, time, temperature, humidity in connection.execute(
                "SELECT sensor_id, time, temperature, humidity FROM sensor_data"
            )
        }
        wanted = {key: values for key, values in self.rows.items() if key[1] >= self.traffic.kept_from}
        self.found += [
            f"sensor_data {key}: stored {stored.get(key)}, must be {wanted.get(key)}"
            for key in sorted(stored.keys() | wanted.keys())
            if stored.get(key) != wanted.get(key)
        ]

    def _judge_summary(self, connection: Connection, metric: str, old: int, new: int) -> None:
        """Every row is that of its interval's readings, every reading has one; the new width follows the old one."""
        stored: Rows = {}
        ends: dict[int, list[datetime]] = {old: [], new: []}
        starts: dict[int, list[datetime]] = {old: [], new: []}
        for sensor, start, end, *values in connection.execute(
            f"SELECT sensor_id, interval_start, interval_end, avg_{metric}, min_{metric}, max_{metric}, reading_count "
            f"FROM {metric}_summary"
        ):
            width = (end - start) // timedelta(minutes=1)
            if width not in ends or floor(start, width) != start:
                self.found.append(f"{metric}_summary: {sensor} has an interval from {start} to {end}")
                continue
            average, least, greatest, count = values
            stored[sensor, start] = (end, average, least, greatest, count)
            ends[width].append(end)
            starts[width].append(start)
        frozen = connection.execute(
            "SELECT bool_and(frozen_before >= %s) FROM summary_state WHERE measurement = %s",
            [max(ends[old], default=self.traffic.kept_from), metric],
        ).fetchone()
        if frozen != (True,) or (ends[old] and starts[new] and max(ends[old]) > min(starts[new])):
            self.found.append(f"{metric}_summary: intervals of {old} minutes where those of {new} must be")
        wanted = summarised(self._values(metric, stored), stored, old, new)
        for key in sorted(stored.keys() | wanted.keys()):
            if not same(stored.get(key), wanted.get(key)):
                self.found.append(f"{metric}_summary {key}: stored {stored.get(key)}, must be {wanted.get(key)}")

    def _values(self, metric: str, stored: Rows) -> Iterator[tuple[str, datetime, float]]:
        """The metric's values of all readings. A racer that is a dead letter may have been stored just before."""
        with_rows = {sensor for sensor, _ in stored}
        for (sensor, time), values in self.rows.items():
            value = values[METRICS.index(metric)]
            if value is not None:
                yield sensor, time, value
        for sensor in self.refused & with_rows:
            ((time, *racing),) = self.traffic.sent[sensor]
            value = racing[METRICS.index(metric)]
            if value is not None:
                yield sensor, time, value

    def _judge_live_view(self, connection: Connection, metric: str) -> None:
        columns = f"sensor_id, interval_start, interval_end, min_{metric}, max_{metric}, reading_count"
        live, summary = (f"SELECT {columns} FROM {metric}_summary{suffix}" for suffix in ("_live", ""))
        row = connection.execute(
            f"SELECT count(*) FROM (({live} EXCEPT {summary}) UNION ({summary} EXCEPT {live})) AS d"
        )
        differing = row.fetchone()
        if differing != (0,):
            self.found.append(f"{metric}_summary_live: {differing} rows are not those of the summary")


def read_samples(message: Message) -> list[tuple[str, Sample]]:
    """The readings of a message, each with its sensor."""
    return [
        (
            row["sensor_id"],
            (datetime.fromisoformat(str(row["time"])), row.get("temperature"), row.get("humidity")),
        )
        for row in rows_of(message)
    ]


def count_readings(message: Message) -> int:
    """How many readings a message holds; poison counts as one."""
    return 1 if message.key() == POISON_KEY.encode() else len(rows_of(message))


def summarised(values: Iterable[tuple[str, datetime, float]], stored: Rows, old: int, new: int) -> Rows:
    """The rows of a summary; of the old width where there is such a row."""
    groups: dict[tuple[str, datetime, int], list[float]] = defaultdict(list)
    for sensor, time, value in values:
        of_old = stored.get((sensor, floor(time, old)))
        is_old = of_old is not None and of_old[0] - floor(time, old) == timedelta(minutes=old)
        width = old if is_old else new
        groups[sensor, floor(time, width), width].append(value)
    return {(sensor, start): row_of(start, width, found) for (sensor, start, width), found in groups.items()}


def row_of(start: datetime, width: int, values: list[float]) -> Row:
    """The row of an interval that has these values."""
    average = sum(values) / len(values)
    return start + timedelta(minutes=width), average, min(values), max(values), len(values)


def count_reasons(letters: Iterable[Message]) -> dict[str, int]:
    """How many dead letters there are of each reason."""
    return dict(Counter(read_headers(letter).get(REASON_HEADER, "") for letter in letters))
