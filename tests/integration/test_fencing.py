"""Consumers die, freeze, come back late and take over from each other: every row is exact.

All processes are real, and so are the signals; tests/crash_runner.py says where in the commit order they strike.
"""

from __future__ import annotations

import itertools
import json
import random
import signal
import threading
import time
from pathlib import Path

import psycopg
import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient

from services.core.config import Settings
from services.core.kafka import client_settings, create_topics, headers_of
from services.core.shutdown import Shutdown
from services.local.check import Key, Values
from tests.expected import Expected, Sample, committed_offsets, member_ids
from tests.fix_services import PATIENCE_S, Service, StartService, publish, read_topic, wait_until

RUNNER = "tests.crash_runner"
SESSION_MS = 6000  # the least that a broker allows by default


@pytest.fixture
def own(settings: Settings) -> Settings:
    """Small batches, and a group that soon notices a frozen member."""
    return settings.model_copy(
        update={
            "consumer_batch_rows": 20,
            "kafka_group_protocol": "classic",  # in the other one the broker sets the session's timeout
            "kafka_session_timeout_ms": SESSION_MS,
        }
    )


@pytest.fixture
def expected(own: Settings) -> Expected:
    return Expected(own)


def a_case(own: Settings, name: str, rows: dict[Key, Values]) -> Expected:
    """A topic and a group of its own, in the same database."""
    settings = own.model_copy(
        update={"kafka_topic": f"{own.kafka_topic}-{name}", "kafka_group": f"{own.kafka_group}-{name}"}
    )
    create_topics(AdminClient(client_settings(settings, "test")), settings, shutdown=Shutdown())
    return Expected(settings, f"{name}-p", rows)


def send_to_all(expected: Expected, readings: list[Sample]) -> None:
    for partition in range(expected.settings.kafka_partitions):
        expected.send(readings, partition)


def corrections(count: int, first_value: float) -> list[Sample]:
    """Ever newer values for the same 15 minutes: the order of writing decides what is stored."""
    return [(at % 15, first_value + at, None if at % 3 else first_value - at) for at in range(count)]


def is_frozen(service: Service) -> bool:
    """Whether a signal has stopped the process."""
    stat = Path(f"/proc/{service.process.pid}/stat").read_text(encoding="ascii")
    return stat.rpartition(") ")[2].startswith("T")


def plan(step: str, when: str = "before", **more: object) -> str:
    return json.dumps({"step": step, "when": when, **more})


# Death at each step of the commit order ------------------------------------------------------------------------

DEATHS = [
    ("positions", "before", 1),
    ("positions", "after", 1),
    ("commit", "before", 2),
    ("commit", "after", 2),
    ("copy", "after", 2),
    ("letters", "before", 1),
    ("letters", "after", 1),
    ("offsets", "before", 2),
    ("offsets", "after", 2),
]


def test_a_consumer_killed_at_any_step_leaves_exact_rows_and_every_dead_letter(
    own: Settings, start: StartService
) -> None:
    """All steps at the same time, each in a topic of its own, since each waits for a dead session's end."""
    rows: dict[Key, Values] = {}
    cases = {death: a_case(own, "-".join(map(str, death)), rows) for death in DEATHS}
    doomed = {}
    for (step, when, call), case in cases.items():
        send_to_all(case, corrections(40, 100))
        publish(case.settings, [b"malformed 1", b"malformed 2"], partition=1)
        send_to_all(case, corrections(40, 500))
        doomed[case] = start(plan(step, when, call=call), "consume", settings=case.settings, module=RUNNER)
    for case, service in doomed.items():
        assert service.wait() == -signal.SIGKILL, case.sensors
    heirs = [start("consume", "--until-caught-up", settings=case.settings) for case in cases.values()]
    for heir in heirs:
        assert heir.wait() == 0
    for case in cases.values():
        case.wait_until_stored(dead_letters=None)
        letters = read_topic(case.settings, case.settings.dead_letter_topic)
        assert {letter.value() for letter in letters} == {b"malformed 1", b"malformed 2"}, case.sensors
        assert len(letters) <= 4
        offsets = [dict(headers_of(letter))["__connect.errors.offset"] for letter in letters]
        assert set(offsets) == {b"40", b"41"}
        assert committed_offsets(case.settings) == {0: 80, 1: 82, 2: 80}, case.sensors


# Rebalances ------------------------------------------------------------------------------------------------------


def test_consumers_joining_and_leaving_under_load_store_every_reading_in_order(
    own: Settings, expected: Expected, start: StartService
) -> None:
    choices = random.Random(11)  # noqa: S311 - reproducible, not secret
    running = [start("consume", settings=own)]
    for turn in range(6):
        send_to_all(expected, corrections(300, turn * 1000))
        if turn % 3 == 2:
            leaver = running.pop(choices.randrange(len(running)))
            assert leaver.stop() == 0
        else:
            running.append(start("consume", settings=own))
            running[-1].wait_for("partitions_assigned")
    expected.wait_until_stored()
    assert sum(len(service.events("partitions_revoked")) for service in running) > 0


# Zombies ---------------------------------------------------------------------------------------------------------


FREEZES = [
    ("positions", "after", 1),  # knows where to begin
    ("write", "before", 2),  # has a batch in hand
    ("offsets", "before", 2),  # has written, and not told Kafka
]
NATIVE_FREEZES = [
    ("copy", "after", 2),  # in the middle of COPY: no time limit of PostgreSQL ends that
    ("commit", "before", 2),  # all is written, and nothing committed
]


def freeze_and_wake(own: Settings, start: StartService, freezes: list[tuple[str, str, int]]) -> None:
    """All moments at the same time, each in a topic of its own, since each waits for a frozen session's end."""
    rows: dict[Key, Values] = {}
    cases = {freeze: a_case(own, "-".join(map(str, freeze)), rows) for freeze in freezes}
    zombies, owners = [], []
    for (step, when, call), case in cases.items():
        send_to_all(case, corrections(60, 100))
        frozen = plan(step, when, call=call, signal="SIGSTOP")
        zombies.append(start(frozen, "consume", settings=case.settings, module=RUNNER))
    for zombie, case in zip(zombies, cases.values(), strict=True):
        wait_until(lambda zombie=zombie: is_frozen(zombie), f"{case.sensors} has frozen itself")  # type: ignore[misc]
        owners.append(start("consume", settings=case.settings))
        send_to_all(case, corrections(60, 5000))
    for case in cases.values():
        case.wait_until_read()  # by the new owner, after the session of the frozen one
    next(iter(cases.values())).wait_until_stored()
    for zombie in zombies:
        zombie.signal(signal.SIGCONT)
    for zombie in zombies:
        zombie.wait_for("partitions_assigned", count=2)
    # Nothing newer has come that would hide what the frozen one had in hand.
    for case in cases.values():
        case.wait_until_stored()
        send_to_all(case, corrections(60, 9000))
        case.wait_until_read()
    for case in cases.values():
        wait_until(lambda case=case: len(member_ids(case.settings)) == 2, f"{case.sensors} has two members")  # type: ignore[misc]
    assert [service.stop() for service in (*zombies, *owners)] == [0] * 2 * len(cases)
    case.wait_until_stored()


@pytest.mark.slow
def test_a_frozen_consumer_that_wakes_up_overwrites_nothing_and_joins_again(own: Settings, start: StartService) -> None:
    freeze_and_wake(own, start, FREEZES)


@pytest.mark.usefixtures("native")
def test_a_consumer_frozen_inside_its_transaction_is_ended_by_its_heir(own: Settings, start: StartService) -> None:
    freeze_and_wake(own, start, NATIVE_FREEZES)


def test_a_batch_in_hand_when_its_partitions_move_is_not_written(
    own: Settings, expected: Expected, start: StartService, tmp_path: Path
) -> None:
    """The one that hangs stays a member, and what it has in hand is older than what the new owner stores."""
    may_go_on = tmp_path / "go-on"
    send_to_all(expected, corrections(60, 100))
    fast = own.model_copy(update={"consumer_batch_rows": 500, "consumer_writers": 1})  # all that it has hangs
    hanging = start(
        plan("write", "before", call=1, until=str(may_go_on), hand_over_timeout_s=0.2),
        "consume",
        settings=fast,
        module=RUNNER,
    )
    wait_until((tmp_path / "go-on.awaited").exists, "it hangs")
    owner = start("consume", settings=own)
    send_to_all(expected, corrections(60, 5000))
    wait_until(lambda: any(event["partitions"] for event in owner.events("partitions_assigned")), "a partition moves")
    taken = {each for event in owner.events("partitions_assigned") for each in event["partitions"]}
    wait_until(lambda: all(committed_offsets(own)[partition] == 120 for partition in taken), "they are stored")
    may_go_on.touch()
    hanging.wait_for("partitions_moved")
    expected.wait_until_stored()


# Survivors -------------------------------------------------------------------------------------------------------


class Load:
    """Sends fifty readings per second to each partition, and knows how long each stood still in the database."""

    def __init__(self, expected: Expected) -> None:
        self._expected = expected
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._send)
        self._positions: dict[int, int] = {}
        self._changed: dict[int, float] = {}
        self.gaps: dict[int, float] = {}

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _send(self) -> None:
        producer = Producer(client_settings(self._expected.settings, "test") | {"linger.ms": 0})
        for turn in itertools.count():
            for partition in range(self._expected.settings.kafka_partitions):
                (value,) = self._expected.values([(turn % 15, float(turn), None)], partition)
                producer.produce(self._expected.settings.kafka_topic, value, partition=partition)
            producer.poll(0)
            if self._end.wait(0.02):
                break
        assert producer.flush(PATIENCE_S) == 0

    def forget(self) -> None:
        """Measure from now on."""
        self._changed, self.gaps = {}, {}

    def look(self, connection: psycopg.Connection) -> dict[int, float]:
        """The longest pause of each partition, in seconds, the present one included."""
        now = time.monotonic()
        for partition, position in connection.execute("SELECT partition, next_offset FROM partition_progress"):
            before = self._changed.setdefault(partition, now)
            self.gaps[partition] = max(self.gaps.get(partition, 0.0), now - before)
            if self._positions.get(partition) != position:
                self._positions[partition], self._changed[partition] = position, now
        return self.gaps


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["consumer", "classic"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_others_go_on_without_a_pause(
    own: Settings, start: StartService, connection: psycopg.Connection, protocol: str, how: signal.Signals
) -> None:
    """One of three is killed, or frozen, and started again: its own partition waits for a session's end, no other."""
    expected = Expected(own.model_copy(update={"kafka_group_protocol": protocol, "consumer_batch_rows": 1000}))
    consumers = [start("consume", settings=expected.settings) for _ in range(3)]
    with Load(expected) as load:
        wait_until(lambda: sorted(map(len, member_ids(own).values())) == [1, 1, 1], "a partition each")
        lost = owned(consumers[0])
        wait_until(lambda: len(load.look(connection)) == 3, "all begin")
        load.forget()
        consumers[0].signal(how)
        consumers.append(start("consume", settings=expected.settings))
        wait_until(lambda: has_heir(load, connection, consumers[1:], lost), "its partition has an heir")
        longest = {partition: round(gap, 2) for partition, gap in load.look(connection).items()}
    kept = {partition: gap for partition, gap in longest.items() if partition not in lost}
    assert len(kept) == 2
    assert max(kept.values()) < 2.0, longest
    consumers[0].signal(signal.SIGKILL)
    expected.wait_until_stored()


def owned(service: Service) -> set[int]:
    """The partitions of a consumer, by its log."""
    events = [*service.events("partitions_assigned"), *service.events("partitions_revoked")]
    found: set[int] = set()
    for event in sorted(events, key=lambda event: str(event["time"])):
        change = set(event["partitions"])
        found = found | change if event["event"] == "partitions_assigned" else found - change
    return found


def has_heir(load: Load, connection: psycopg.Connection, others: list[Service], lost: set[int]) -> bool:
    """Look at the load until ``lost`` are the others'."""
    load.look(connection)
    return lost <= set().union(*(owned(service) for service in others))
