"""Anything in any order: the pipeline and a model of it live through the same history and must never differ.

Hypothesis draws readings (new, late, repeated, corrected, partial, malformed, far past, far future), refreshes,
restarts, zombies, changes of intervals, retention, compression, chunks dropped by hand, rows changed by hand,
reconciling, and etl runs that are cut off or interfered with between two statements. The services' own classes run
in this process, against the real database, some steps through the real broker. tests/model.py knows what must
come out.

The draws are the same in every run (their times lie around the present day). ``MODEL_EXAMPLES=500 MODEL_STEPS=40``
makes a longer run with draws of its own, and cuts at each statement instead of every eleventh. A failure prints its
steps, and a blob that repeats it; ``MODEL_SHRINK=1`` looks for fewer steps that fail too, which takes minutes.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, Phase
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from psycopg import sql
from psycopg.pq import TransactionStatus
from psycopg.types.multirange import Multirange

from services.consumer.batch import Move
from services.consumer.sink import Sink
from services.consumer.worker import Worker
from services.core.config import Settings
from services.core.database import connect, connection_arguments
from services.core.errors import MalformedMessageError, PartitionsMovedError, TransientError
from services.core.kafka import headers_of
from services.core.measurements import DEFAULT
from services.core.reading import Decoder, Reading
from services.core.shutdown import Shutdown
from services.etl import aggregates
from services.etl.lease import Lease
from services.etl.reconcile import reconcile
from services.etl.rollup import BASE, OF_MINUTES
from services.etl.worker import Leader
from services.local.check import Key, Row, differing, floor
from tests.fix_services import publish, read_topic, wait_until
from tests.fix_stack import empty
from tests.measured import MEASUREMENTS, of_default, reading_of, write_to
from tests.model import CHUNK, METRICS, NEVER, Model, Rows, State, ceil, chunk_of, minute_of

EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", "0"))
EVERY = 1 if EXAMPLES else 11  # of the statements of a run
SHRINK = "MODEL_SHRINK" in os.environ
STEPS = int(os.environ.get("MODEL_STEPS", "20"))
NOW = datetime.now(UTC).replace(second=0, microsecond=0)
TOPIC = "the model's"
MINUTES = (10, 15, 7, 60)
WIDE = (7 * 1440, 30 * 1440, 366 * 1440)
MINUTE = timedelta(minutes=1)
DAY = timedelta(days=1)

# Ages in days whose limit is not near a chunk's end, so that no clock can decide between two outcomes.
AGES = [days for days in range(6, 33) if DAY < NOW - days * DAY - chunk_of(NOW - days * DAY) < CHUNK - DAY]
ANCHORS = [
    *(chunk_of(NOW) - weeks * CHUNK for weeks in range(6)),
    NOW - timedelta(hours=5),
    NOW + timedelta(hours=20),  # a fast clock, but not too fast
    chunk_of(NOW - 70 * DAY),
]
OLD = chunk_of(NOW) - 4 * CHUNK  # the start of a chunk
NEW = chunk_of(NOW) - CHUNK
OFFSETS = [timedelta(minutes=at) for at in (0, 1, 7, 10, 14, 60, 105)]

MALFORMED = {
    b"": "empty",
    b"not json": "invalid_json",
    b'{"sensor_id":"a"}': "invalid_reading",
    b'{"sensor_id":"","time":"2024-03-01T00:00:00Z","temperature":1}': "invalid_reading",
    b'{"sensor_id":"a","time":"2024-03-01T00:00:00Z"}': "no_measurement",
    b'{"sensor_id":"a","time":"0001-01-01T00:00:00Z","humidity":1}': "time_out_of_range",
    b'{"sensor_id":"a","time":"2999-01-01T00:00:00Z","humidity":1}': "future_time",
    b'{"sensor_id":"a","time":"2024-03-01T00:00:00Z","temperature":1e300}': "invalid_reading",
}
UNSTORABLE = "a\0b"

numbers = st.sampled_from([0.0, -40.0, 20.25, 20.3, 21.0, 1e90, 5e-324])
times = st.builds(
    lambda anchor, offset, sign, late: anchor + sign * (offset + late),
    st.sampled_from(ANCHORS),
    st.sampled_from(OFFSETS),
    st.sampled_from([1, 1, -1]),
    st.sampled_from([timedelta(0), timedelta(0), timedelta(0), timedelta(microseconds=1)]),
)
measurements = st.one_of(st.tuples(numbers, numbers), st.tuples(numbers, st.none()), st.tuples(st.none(), numbers))
readings = st.builds(
    lambda sensor, time, values: reading_of(sensor, time, *values),
    st.sampled_from("aaabbc"),
    times,
    measurements,
)
bursts = st.builds(  # one sensor, readings a few minutes apart
    lambda sensor, start, step, values: [
        reading_of(sensor, start + at * step, value, None if at % 3 else value) for at, value in enumerate(values)
    ],
    st.sampled_from("ab"),
    times,
    st.sampled_from([timedelta(minutes=1), timedelta(minutes=4), timedelta(minutes=25)]),
    st.lists(numbers, min_size=2, max_size=6),
)
broken = st.one_of(
    st.sampled_from(sorted(MALFORMED)),
    st.builds(lambda time: encode(reading_of(UNSTORABLE, time, 1.0)), times),
)
batches = st.builds(
    lambda drawn, burst, bad: shuffled([encode(reading) for reading in [*drawn, *burst]], bad),
    st.lists(readings, min_size=1, max_size=6),
    st.one_of(st.just([]), bursts),
    st.lists(broken, max_size=2),
)

widths = st.sampled_from([*MINUTES, *MINUTES, *WIDE])
updates = st.one_of(
    st.fixed_dictionaries({"temperature_interval": widths}),
    st.fixed_dictionaries({"humidity_interval": widths}),
    st.fixed_dictionaries({"raw_retention_days": st.sampled_from([0, *AGES])}),
)


def encode(reading: Reading) -> bytes:
    """The message of a reading; a field that is None is left out or null."""
    fields: dict[str, object] = {"sensor_id": reading.sensor_id, "time": reading.time.isoformat()}
    fields["temperature"] = reading.temperature
    if reading.humidity is not None:
        fields["humidity"] = reading.humidity
    return json.dumps(fields).encode()


def shuffled(good: list[bytes], bad: list[bytes]) -> list[bytes]:
    """The bad messages between the good ones."""
    middle = len(good) // 2
    return [*good[:middle], *bad, *good[middle:]]


class Leading(psycopg.Connection[Any]):
    """A connection that can be cut, or let others write, just before a statement."""

    statements_left: int | None = None
    then: Callable[[], None] | None = None
    waited: int = 0  # statements until it happened

    def execute(self, *arguments: Any, **options: Any) -> psycopg.Cursor[Any]:
        """Run a statement, unless this is the moment; one that others use is never inside a transaction."""
        if self.statements_left is not None:
            self.statements_left -= 1
            self.waited += 1
            then = self.then
            if self.statements_left < 0 and (then is None or self.info.transaction_status == TransactionStatus.IDLE):
                self.statements_left = self.then = None
                if then is None:
                    self.close()
                else:
                    then()
        return super().execute(*arguments, **options)


@dataclass
class Etl:
    """The leader of now and its connection."""

    connection: Leading
    leader: Leader | None = None


class Pipeline(RuleBasedStateMachine):
    """The rules are what can happen, the invariants are what is promised."""

    is_dense = False  # as etl believes of the readings, which are too few to tell

    def __init__(self, servers: Settings, database: psycopg.Connection) -> None:
        super().__init__()
        stored = database.execute("SELECT * FROM partition_progress WHERE topic_id <> %s", (TOPIC,)).fetchall()
        empty(database)
        for row in [*stored, (TOPIC, 1, 0)]:
            database.execute("INSERT INTO partition_progress VALUES (%s, %s, %s)", row)
        Pipeline.is_dense = False
        self.position = 0  # of the partition
        self.database = database
        self.settings = servers
        self.consumes_with = servers  # the consumer learns of new settings when it is started again
        self.model = Model()
        self.decided = {metric: State() for metric in METRICS}
        self.etl: Etl | None = None
        self.zombie: Sink | None = None
        self.last: list[bytes] = []
        self.letters: Counter[str] = Counter()
        self.dead_before: int | None = None
        self.sink = self.new_sink()

    def teardown(self) -> None:
        self.stop_etl()
        for sink in (self.sink, self.zombie):
            if sink is not None:
                sink.close()

    # What can happen: readings ---------------------------------------------------------------------------

    @initialize(batch=batches, temperature=widths, humidity=widths)
    def begin(self, batch: list[bytes], temperature: int, humidity: int) -> None:
        self.configure({"temperature_interval": temperature, "humidity_interval": humidity})
        self.write(batch)

    @rule(batch=batches)
    def store(self, batch: list[bytes]) -> None:
        self.write(batch)

    @rule()
    def store_again(self) -> None:
        self.write(self.last)

    @precondition(lambda self: self.model.rows)
    @rule(data=st.data(), values=st.lists(measurements, min_size=1, max_size=4))
    def correct(self, data: st.DataObject, values: list[tuple[float | None, float | None]]) -> None:
        keys = data.draw(st.lists(st.sampled_from(sorted(self.model.rows)), min_size=1, max_size=2))
        self.write([encode(reading_of(*key, *value)) for key in keys for value in values])

    @rule()
    def restart_consumer(self) -> None:
        if self.zombie is not None:
            self.zombie.close()
        self.zombie, self.sink = self.sink, self.new_sink()

    @precondition(lambda self: self.zombie is not None)
    @rule(reading=readings)
    def wake_zombie(self, reading: Reading) -> None:
        assert self.zombie is not None
        self.refuse(self.zombie, reading)

    @precondition(lambda self: self.dead_before is None)
    @rule(batch=batches, is_rare=st.sampled_from([False] * 7 + [True]))
    def go_through_kafka(self, batch: list[bytes], is_rare: bool) -> None:
        if not is_rare:  # it takes as long as fifty other steps
            self.write(batch)
            return
        self.consumes_with = self.settings
        self.dead_before = len(read_topic(self.settings, self.settings.dead_letter_topic))
        publish(self.settings, batch, partition=1)
        totals = Worker(self.settings, Shutdown(), protocol="classic", until_caught_up=True).run()
        expected = self.expect(batch)
        assert sum(totals[name] for name in ("inserted", "updated", "unchanged", "dead_letters")) == len(batch)
        assert totals["inserted"] == expected["inserted"]
        dead = {
            name[5:]: count for name, count in totals.items() if name.startswith("dead_") and name != "dead_letters"
        }
        assert dead == expected["dead"]
        letters = read_topic(self.settings, self.settings.dead_letter_topic)[self.dead_before :]
        found = Counter((dict(headers_of(letter))["sensor_pipeline.reason"] or b"").decode() for letter in letters)
        assert found == dead
        self.restart_consumer()
        assert self.zombie is not None
        self.refuse(self.zombie, reading_of("a", NOW, 1.0))

    def refuse(self, zombie: Sink, reading: Reading) -> None:
        """It believes that the partition is where it was before the last batch."""
        move = Move(TOPIC, {1: self.position - 1}, {1: self.position})

        def write() -> None:
            if not write_to(zombie, [reading], move).advanced:
                zombie.advance(move)

        with pytest.raises(PartitionsMovedError):
            write()

    # What can happen: etl --------------------------------------------------------------------------------

    @rule()
    def refresh(self) -> None:
        self.run_etl()

    @rule(batch=batches)
    def store_and_refresh(self, batch: list[bytes]) -> None:
        self.write(batch)
        self.run_etl()

    @rule(temperature=widths, humidity=widths)
    def change_intervals(self, temperature: int, humidity: int) -> None:
        self.configure({"temperature_interval": temperature, "humidity_interval": humidity})
        self.run_etl()

    @rule(is_dense=st.booleans())
    def change_density(self, is_dense: bool) -> None:
        self.configure({})
        Pipeline.is_dense = is_dense
        self.run_etl()

    @rule(days=st.sampled_from([0, *AGES]), compress=st.sampled_from([0, 0, 8, 15]))
    def change_retention(self, days: int, compress: int) -> None:
        self.configure({"raw_retention_days": days, "compress_after_days": compress})
        self.run_etl()

    @rule(after=st.integers(0, 60), batch=batches, update=st.one_of(st.none(), updates), is_dense=st.booleans())
    def cut_etl(self, after: int, batch: list[bytes], update: dict[str, int] | None, is_dense: bool) -> None:
        self.write(batch)
        if update is not None:
            self.configure(update)
            Pipeline.is_dense = is_dense
        self.run_etl(after)

    @rule(after=st.integers(0, 60), batch=batches, update=st.one_of(st.none(), updates), is_dense=st.booleans())
    def store_while_etl_runs(
        self, after: int, batch: list[bytes], update: dict[str, int] | None, is_dense: bool
    ) -> None:
        if update is not None:
            self.configure(update)
            Pipeline.is_dense = is_dense
        self.run_etl(after, batch)

    @rule()
    def reconcile(self) -> None:
        if self.dropped_unseen() or self.etl is None or self.etl.leader is None:
            self.run_etl()
        assert self.etl is not None
        assert self.etl.leader is not None
        queued = self.queue()
        wanted, differed = {}, {}
        for metric in METRICS:
            state = self.model.summaries[metric]
            assert state.minutes is not None
            stored = {key: row for key, row in self.summary(metric).items() if key[1] >= state.frozen}
            differ = differing(stored, self.model.recomputed(metric))
            width = state.minutes * MINUTE
            differed[metric] = {key for key in differ if not overlaps(queued, key[1], key[1] + width)}
            wanted[metric] = len(differed[metric])
        self.note_refresh()
        found = reconcile(self.etl.connection, DEFAULT, self.etl.leader.take_over, Shutdown())
        assert found == wanted
        self.check_nothing_waits()
        for metric, state in self.model.summaries.items():
            # A row that was damaged to be what the readings were changed to does not differ; the live view may.
            assert not differing(self.summary(metric), self.model.expected(metric))
            assert not state.suspect & differed[metric]
        assert reconcile(self.etl.connection, DEFAULT, self.etl.leader.take_over, Shutdown()) == dict.fromkeys(
            METRICS, 0
        )

    # What can happen: by hand ----------------------------------------------------------------------------

    @rule(weeks=st.integers(0, 5))
    def drop_chunks_by_hand(self, weeks: int) -> None:
        limit = min(chunk_of(NOW) - weeks * CHUNK, self.limit - 366 * DAY if self.is_wide else self.limit - CHUNK)
        gone = {start for start in self.chunks() if start + CHUNK <= limit}
        known = gone & self.noted_chunks()
        for metric, state in self.model.summaries.items():
            if known and state.minutes is not None:
                self.model.freeze(metric, ceil(max(known) + CHUNK, state.minutes), self.summary(metric))
        self.database.execute("SELECT drop_chunks('sensor_data', older_than => %s)", (limit,))
        self.model.forget(gone)
        assert not gone & self.chunks()

    @precondition(lambda self: self.model.rows)
    @rule(data=st.data(), change=st.sampled_from(["UPDATE", "DELETE"]))
    def change_a_reading_by_hand(self, data: st.DataObject, change: str) -> None:
        sensor, time = data.draw(st.sampled_from(sorted(self.model.rows)))
        where = "WHERE sensor_id = %s AND time = %s"
        if change == "UPDATE":
            self.database.execute(f"UPDATE sensor_data SET temperature = 77, humidity = NULL {where}", (sensor, time))
            self.model.rows[sensor, time] = (77.0, None)
        else:
            self.database.execute(f"DELETE FROM sensor_data {where}", (sensor, time))
            del self.model.rows[sensor, time]
        for metric, state in self.model.summaries.items():
            if state.minutes is not None and floor(time, state.minutes) >= state.frozen:
                self.model.summaries[metric].suspect.add((sensor, floor(time, state.minutes)))

    @precondition(lambda self: self.open_rows())
    @rule(
        data=st.data(),
        damage=st.sampled_from(["average", "end", "count", "delete", "sensor", "start"]),
    )
    def damage_a_summary_row(self, data: st.DataObject, damage: str) -> None:
        metric, (sensor, start) = data.draw(st.sampled_from(self.open_rows()))
        table = f"{metric}_summary"
        statement = {
            "average": f"UPDATE {table} SET avg_{metric} = avg_{metric} * 2 + 1",
            "end": f"UPDATE {table} SET interval_end = interval_end + interval '1 minute'",
            "count": f"UPDATE {table} SET reading_count = reading_count + 1",
            "delete": f"DELETE FROM {table}",
            "sensor": f"UPDATE {table} SET sensor_id = 'ghost'",
            "start": f"UPDATE {table} SET interval_start = interval_start + interval '1 minute'",
        }[damage]
        keys = {(sensor, start)}
        if damage == "sensor":
            keys.add(("ghost", start))
        elif damage == "start":
            keys.add((sensor, start + MINUTE))
        if (keys - {(sensor, start)}) & self.summary(metric).keys():
            return
        self.database.execute(f"{statement} WHERE sensor_id = %s AND interval_start = %s", (sensor, start))
        self.model.summaries[metric].suspect |= keys

    @property
    def limit(self) -> datetime:
        """Nothing may be closed that is younger."""
        return NOW - timedelta(days=self.settings.raw_retention_days)

    @property
    def is_wide(self) -> bool:
        return any(state.minutes in WIDE for state in self.model.summaries.values())

    # What is promised ------------------------------------------------------------------------------------

    @invariant()
    def readings_are_stored_once(self) -> None:
        found = {
            (sensor, time): (temperature, humidity)
            for sensor, time, temperature, humidity in self.database.execute(
                "SELECT sensor_id, time, temperature, humidity FROM sensor_data"
            )
        }
        assert found == self.model.rows

    @invariant()
    def summaries_are_right_where_nothing_is_queued(self) -> None:
        queued = self.queue()
        for metric, state in self.model.summaries.items():
            stored, wanted = self.summary(metric), self.model.expected(metric)
            width = (state.minutes or 1) * MINUTE
            wrong = {
                key: (stored.get(key), wanted.get(key))
                for key in differing(stored, wanted) - state.suspect
                if key[1] < state.frozen or not overlaps(queued, key[1], key[1] + width)
            }
            assert not wrong, f"{metric}_summary: stored and wanted {wrong}"
            assert not overlapping(stored, state.suspect)

    @invariant()
    def live_views_are_right(self) -> None:
        queued = self.queue()
        for metric, state in self.model.summaries.items():
            stored, live, wanted = self.summary(metric), self.summary(metric, "_live"), self.model.expected(metric)
            frozen = self.state(metric).frozen
            newest = self.model.refreshed_to
            for key in differing(live, wanted) - state.suspect:
                start, end = key[1], key[1] + (state.minutes or 1) * MINUTE
                if state.minutes is None or start < frozen:
                    assert live.get(key) == stored.get(key), f"{metric}_summary_live {key}"
                elif start >= state.frozen:
                    assert overlaps(queued, start, end), f"{metric}_summary_live {key}: {live.get(key)}"
                    assert start <= newest, f"{metric}_summary_live {key}: the newest readings are not in it"

    def check_all(self) -> None:
        self.readings_are_stored_once()
        self.summaries_are_right_where_nothing_is_queued()
        self.live_views_are_right()

    # How the steps are done ------------------------------------------------------------------------------

    def new_sink(self) -> Sink:
        self.consumes_with = self.settings
        return Sink(self.settings)

    def configure(self, update: dict[str, int]) -> None:
        """New settings; etl is started again with them."""
        self.stop_etl()
        self.settings = self.settings.model_copy(update=update)

    def write(self, batch: list[bytes]) -> None:
        """Decode and store a batch as the consumer does."""
        self.last = batch
        decoder, found = self.decoder(), []
        dead: Counter[str] = Counter()
        for value in batch:
            try:
                found.append(decoder.decode(value))
            except MalformedMessageError as error:
                dead[error.reason] += 1
        closed, queued = self.closed(), self.queue()
        move = Move(TOPIC, {1: self.position}, {1: self.position + 1})
        result = write_to(self.sink, found, move)
        if not result.advanced:
            self.sink.advance(move)
        self.position += 1
        dead.update(refused.reason for refused in result.refused)
        expected = self.expect(batch, closed)
        assert result.inserted + result.updated + result.unchanged + len(result.refused) == len(found)
        assert result.inserted == expected["inserted"]
        assert dead == expected["dead"]
        now = self.queue()
        missing = {minute for minute in expected["changed"] if not overlaps(now, minute, minute + MINUTE)}
        assert not missing, f"changed, but not queued: {sorted(missing)}"
        more = self.without(now, queued)
        named = {minute for minute in expected["named"] if overlaps(more, minute, minute + MINUTE)}
        assert length(more) == len(named) * MINUTE, f"queued, but no reading came: {more}"

    def decoder(self) -> Decoder:
        days = self.consumes_with.raw_retention_days
        decoder = Decoder(
            MEASUREMENTS,
            max_bytes=self.settings.max_message_bytes,
            max_future=timedelta(seconds=self.settings.max_future_seconds),
            max_age=timedelta(days=days) if days else None,
        )
        decoder.set_clock(NOW)
        return decoder

    def expect(self, batch: list[bytes], closed: datetime | None = None) -> dict[str, Any]:
        """Store a batch in the model; how many readings are new, why messages are dead letters, and which minutes."""
        closed = self.closed() if closed is None else closed
        days = self.consumes_with.raw_retention_days
        oldest = NOW - timedelta(days=days) if days else NEVER
        before = dict(self.model.rows)
        kinds: Counter[str] = Counter()
        dead: Counter[str] = Counter()
        named = set()
        for value in batch:
            reason = MALFORMED.get(value)
            if reason is None:
                fields = json.loads(value)
                time = datetime.fromisoformat(fields["time"])
                if fields["sensor_id"] == UNSTORABLE:
                    reason = "invalid_reading"
                elif time < max(oldest, closed):
                    reason = "too_late"
            if reason is not None:
                dead[reason] += 1
                continue
            kind = self.model.store(fields["sensor_id"], time, fields["temperature"], fields.get("humidity"))
            kinds[kind] += 1
            named.add(minute_of(time))
        changed = {minute_of(key[1]) for key, row in self.model.rows.items() if before.get(key) != row}
        return {"inserted": kinds["inserted"], "dead": dead, "named": named, "changed": changed}

    def stop_etl(self) -> None:
        if self.etl is not None:
            self.etl.connection.close()
            self.etl = None

    def start_etl(self) -> Etl:
        connection = Leading.connect(
            **connection_arguments(self.settings),
            autocommit=True,
            prepare_threshold=None,
            options="-c timezone=UTC",
        )
        wait_until(Lease(connection).try_take, "the leader before has gone")
        return Etl(connection)

    def run_etl(self, after: int | None = None, batch: list[bytes] | None = None) -> bool:
        """One run to the end; or cut after some statements; or, with a batch, stored into at that moment.

        Returns whether that moment came.
        """
        self.etl = self.etl or self.start_etl()
        etl, is_new = self.etl, self.etl.leader is None
        etl.connection.statements_left = after
        etl.connection.then = None if batch is None else lambda: self.write(batch)
        self.note_refresh()
        before, chunks = set(self.model.rows), self.chunks()
        is_cut = False
        try:
            etl.leader = etl.leader or Leader(etl.connection, self.settings)
            etl.leader.run_once()
        except (psycopg.OperationalError, TransientError):
            if not etl.connection.closed:
                raise
            is_cut = True
            self.stop_etl()
        is_interfered = batch is not None and etl.connection.statements_left is None
        etl.connection.statements_left = etl.connection.then = None
        came = {chunk_of(time) for _, time in self.model.rows.keys() - before}
        self.follow(chunks | came)
        self.note_refresh()
        if not is_cut:
            self.check_decisions(came, is_new=is_new)
            if not is_interfered:  # else something may wait for the next run
                self.check_nothing_waits()
        return is_cut or is_interfered

    def note_refresh(self) -> None:
        """From now on something may be refreshed up to the newest reading."""
        times = [self.model.refreshed_to, *(time for _, time in self.model.rows)]
        for state in self.model.summaries.values():
            times += [start for _, start in state.suspect]
        self.model.refreshed_to = max(times)

    def follow(self, chunks: set[datetime]) -> None:
        """Etl has run, to its end or not. What it decided cannot be taken back, and must have been right."""
        gone = chunks - self.chunks()
        assert all(start + CHUNK <= self.limit for start in gone), f"dropped, and to be kept: {gone}"
        assert self.settings.raw_retention_days or not gone
        for metric in METRICS:
            found, past = self.state(metric), self.decided[metric]
            assert found.minutes in {past.minutes, int(getattr(self.settings, f"{metric}_interval"))}
            assert past.closed <= found.closed <= max(past.closed, past.frozen, self.limit), f"{metric}: {found}"
            assert past.frozen <= found.frozen, f"{metric}: {found} after {past}"
            assert all(start + CHUNK <= found.frozen for start in gone), f"dropped and not frozen in {metric}: {gone}"
            wrong = self.model.follow(metric, found, self.summary(metric))
            assert not wrong, f"{metric}_summary was frozen with wrong rows: {wrong}"
            self.decided[metric] = found
        self.model.forget(gone)

    def check_decisions(self, came: set[datetime], *, is_new: bool) -> None:
        """A run has come to its end: the widths are those that are wanted, and no chunk is there that need not be."""
        states = {metric: self.state(metric) for metric in METRICS}
        for metric, found in states.items():
            wanted = int(getattr(self.settings, f"{metric}_interval"))
            if found.minutes != wanted:  # because that would close the present
                assert found.minutes is not None
                closed = max(found.closed, found.frozen)
                assert closed != NEVER
                assert ceil(closed, math.lcm(found.minutes, wanted)) > self.limit
        if is_new and self.settings.raw_retention_days:  # others look for what has expired once in ten minutes
            expired = {
                start
                for start in self.chunks() - came
                if all(ceil(start + CHUNK, state.minutes or 1) <= self.limit for state in states.values())
            }
            assert not expired

    def check_nothing_waits(self) -> None:
        """A run has come to its end, and nobody wrote: the queue is empty, and nothing is left behind."""
        assert not self.queue()
        views = self.database.execute("SELECT view_name FROM timescaledb_information.continuous_aggregates")
        of = OF_MINUTES if self.is_dense else ""
        wanted = {f"{metric}_{state.minutes}min{of}" for metric, state in self.model.summaries.items()}
        assert of_default(name for (name,) in views) == wanted | ({BASE} if of else set())
        noted = self.noted_chunks()
        assert all(start in noted for start in self.chunks() if start + CHUNK > self.model.summaries[METRICS[0]].frozen)
        for metric, state in self.model.summaries.items():  # what the run has repaired by the way
            differ = differing(self.summary(metric), self.model.expected(metric))
            assert differ <= state.suspect, f"{metric}_summary after a refresh: {differ}"
            state.suspect &= differ | differing(self.summary(metric, "_live"), self.model.expected(metric))

    # What the database has -------------------------------------------------------------------------------

    def chunks(self) -> set[datetime]:
        return {
            row[0]
            for row in self.database.execute(
                "SELECT range_start FROM timescaledb_information.chunks"
                " WHERE hypertable_schema = 'public' AND hypertable_name = 'sensor_data'"
            )
        }

    def noted_chunks(self) -> set[datetime]:
        """Those that etl has seen and not yet found to be gone."""
        return {row[0] for row in self.database.execute("SELECT range_start FROM raw_chunk WHERE dropped_at IS NULL")}

    def dropped_unseen(self) -> set[datetime]:
        """Chunks that are gone, which etl does not know."""
        return self.noted_chunks() - self.chunks()

    def closed(self) -> datetime:
        """How far back the database says that history is closed."""
        return max(self.state(metric).closed for metric in METRICS)

    def state(self, metric: str) -> State:
        row = self.database.execute(
            "SELECT extract(epoch FROM width)::int / 60, CASE WHEN isfinite(closed_before) THEN closed_before END,"
            " CASE WHEN isfinite(frozen_before) THEN frozen_before END FROM summary_state WHERE measurement = %s",
            (metric,),
        ).fetchone()
        return State() if row is None else State(row[0], row[1] or NEVER, row[2] or NEVER)

    def queue(self) -> Multirange[datetime]:
        row = self.database.execute("SELECT range_agg(touched) FROM summary_refresh_queue").fetchone()
        assert row is not None
        return row[0] or Multirange()

    def without(self, ranges: Multirange[datetime], others: Multirange[datetime]) -> Multirange[datetime]:
        row = self.database.execute("SELECT %s::tstzmultirange - %s::tstzmultirange", (ranges, others)).fetchone()
        assert row is not None
        found: Multirange[datetime] = row[0]
        return found

    def summary(self, metric: str, suffix: str = "") -> Rows:
        query = sql.SQL("SELECT sensor_id, interval_start, interval_end, {}, {}, {}, reading_count FROM {}").format(
            *(sql.Identifier(f"{function}_{metric}") for function in ("avg", "min", "max")),
            sql.Identifier(f"{metric}_summary{suffix}"),
        )
        found = self.database.execute(query).fetchall()
        rows: Rows = {(row[0], row[1]): row_of(row[2:]) for row in found}
        assert len(rows) == len(found), f"an interval twice in {metric}_summary{suffix}"
        return rows

    def open_rows(self) -> list[tuple[str, Key]]:
        """The summary rows that are not frozen."""
        return [
            (metric, key)
            for metric, state in self.model.summaries.items()
            for key in sorted(self.summary(metric))
            if key[1] >= state.frozen
        ]


def row_of(values: tuple[Any, ...]) -> Row:
    """The values of a summary row."""
    end, average, least, greatest, count = values
    return end, average, least, greatest, count


def overlaps(ranges: Multirange[datetime], start: datetime, end: datetime) -> bool:
    """Whether one of the ranges [lower, upper) has a part of [start, end)."""
    return any((piece.lower or NEVER) < end and start < (piece.upper or NEVER) for piece in ranges)


def length(ranges: Multirange[datetime]) -> timedelta:
    """How much time the ranges have together."""
    return sum(((piece.upper or NOW) - (piece.lower or NOW) for piece in ranges), timedelta(0))


def overlapping(rows: Rows, except_for: Iterable[Key]) -> list[tuple[Key, Key]]:
    """Pairs of one sensor's rows that share some time."""
    keys = sorted(rows.keys() - set(except_for))
    return [(first, second) for first, second in pairwise(keys) if first[0] == second[0] and rows[first][0] > second[1]]


@pytest.fixture(autouse=True)
def believed_density(monkeypatch: pytest.MonkeyPatch) -> None:
    Pipeline.is_dense = False
    monkeypatch.setattr(aggregates, "minutes_pay", lambda _, **__: Pipeline.is_dense)


@pytest.mark.parametrize("examples", [5, pytest.param(25, marks=pytest.mark.slow)])
def test_the_pipeline_does_what_the_model_says(settings: Settings, examples: int) -> None:
    with connect(settings) as database:

        class Here(Pipeline):
            def __init__(self) -> None:
                super().__init__(settings, database)

        run_state_machine_as_test(
            Here,
            settings=hypothesis_settings(
                max_examples=EXAMPLES or examples,
                stateful_step_count=STEPS,
                derandomize=not EXAMPLES,
                deadline=None,
                database=None,
                print_blob=True,
                suppress_health_check=list(HealthCheck),
                phases=(Phase.generate, Phase.shrink) if SHRINK else (Phase.generate,),
            ),
        )


@pytest.mark.parametrize(
    "density",
    [
        (False, True),
        pytest.param((False, False), marks=pytest.mark.slow),
        pytest.param((True, False), marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("event", ["cut", pytest.param("store", marks=pytest.mark.slow)])
def test_at_any_statement_of_a_change_of_interval_and_retention(
    settings: Settings, event: str, density: tuple[bool, bool]
) -> None:
    """And of density. With frozen history, some that expires, readings of both and of now, and one of a new chunk."""
    before = chunk_of(NOW)
    days = next(days for days in AGES if chunk_of(NOW - days * DAY) == before - 2 * CHUNK)
    times = [before - week * CHUNK + at * MINUTE for week in (0, 1, 2, 4, 5) for at in (1, 29, 64)]
    late = [encode(reading_of("a", time, 3.0, 3.0)) for time in (OLD, OLD + 34 * MINUTE, OLD + CHUNK, NEW, NOW)]
    after, moments = 0, 0
    with connect(settings) as database:
        while True:
            pipeline = Pipeline(settings, database)
            Pipeline.is_dense = density[0]
            pipeline.configure({"temperature_interval": 10, "humidity_interval": 15})
            pipeline.write([encode(reading_of("a", time, 1.0, 2.0)) for time in times])
            pipeline.run_etl()
            pipeline.drop_chunks_by_hand(4)
            pipeline.run_etl()
            pipeline.write([encode(reading_of("b", time, 5.0, 6.0)) for time in times[:12]])
            pipeline.configure({"temperature_interval": 7, "raw_retention_days": days})
            Pipeline.is_dense = density[1]
            etl = pipeline.etl = pipeline.start_etl()
            etl.leader = Leader(etl.connection, pipeline.settings)
            is_reached = pipeline.run_etl(after, late if event == "store" else None)
            pipeline.check_all()
            pipeline.run_etl()
            pipeline.check_all()
            pipeline.teardown()
            if not is_reached:
                break
            after = etl.connection.waited + EVERY - 1
            moments += 1
    assert moments > 30 // EVERY
