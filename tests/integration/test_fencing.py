"""Consumers die, freeze, come back late and take over from each other: every row is exact.

All processes are real, and so are the signals; tests/crash_runner.py says where in the commit order they strike.
"""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient

from services.core.config import Settings
from services.core.kafka import client_settings, create_topics, headers_of
from services.local.check import Key, Values
from tests.expected import Expected, Sample, committed_offsets, member_ids
from tests.fix_services import Service, StartService, publish, read_topic, run_cli, wait_until

RUNNER = "tests.crash_runner"
SESSION_MS = 6000  # the least that a broker allows by default


@pytest.fixture
def own(settings: Settings) -> Settings:
    """Small batches, and a group that soon notices a frozen member."""
    return settings.model_copy(update={"consumer_batch_rows": 20, "kafka_session_timeout_ms": SESSION_MS})


@pytest.fixture
def expected(own: Settings) -> Expected:
    return Expected(own)


def a_case(own: Settings, name: str, rows: dict[Key, Values]) -> Expected:
    """A topic and a group of its own, in the same database."""
    settings = own.model_copy(
        update={"kafka_topic": f"{own.kafka_topic}-{name}", "kafka_group": f"{own.kafka_group}-{name}"}
    )
    create_topics(AdminClient(client_settings(settings, "test")), settings)
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
    ("claim", "before", 1),
    ("claim", "after", 1),
    ("confirm", "after", 1),
    ("transaction", "before", 2),
    ("transaction", "after", 2),
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
    ("claim", "before", 1),  # claims after the new owner has
    ("confirm", "before", 1),  # has claimed before the new owner
    ("write", "before", 2),  # has a batch in hand, owned and confirmed
    ("offsets", "before", 2),  # has written, and not told Kafka
]


def test_a_frozen_consumer_that_wakes_up_overwrites_nothing_and_joins_again(own: Settings, start: StartService) -> None:
    """All moments at the same time, each in a topic of its own, since each waits for a frozen session's end."""
    rows: dict[Key, Values] = {}
    cases = {freeze: a_case(own, "-".join(map(str, freeze)), rows) for freeze in FREEZES}
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
        assert len(member_ids(case.settings)) == 2, case.sensors
    assert [service.stop() for service in (*zombies, *owners)] == [0] * 2 * len(cases)
    case.wait_until_stored()


@pytest.mark.parametrize("outcome", ["stored", "lost"])
def test_what_ends_after_its_partitions_moved_neither_commits_offsets_nor_is_written(
    own: Settings, expected: Expected, start: StartService, tmp_path: Path, outcome: str
) -> None:
    """The one that hangs stays a member, so the broker takes its offsets: only we know that they are stale."""
    may_go_on = tmp_path / "go-on"
    slow = own.model_copy(update={"consumer_batch_rows": 5})
    fast = own.model_copy(update={"consumer_batch_rows": 500})
    send_to_all(expected, corrections(60, 100))
    step, when = ("write", "after") if outcome == "stored" else ("write", "before")
    hanging = start(
        plan(step, when, call=1, until=str(may_go_on), hand_over_within_s=0.2),
        "consume",
        settings=fast,
        module=RUNNER,
    )
    # Not earlier: a claim on its way would take the partitions from the new owner, for one more write.
    wait_until((tmp_path / "go-on.awaited").exists, "it hangs")
    assert (Expected.count(own) > 0) == (outcome == "stored")
    owner = start(
        plan("write", "before", call=2, until=str(tmp_path / "never")), "consume", settings=slow, module=RUNNER
    )
    taken = owner.wait_for("partitions_assigned")["partitions"]
    # The new owner has stored five older values and waits with the next batch.
    wait_until(lambda: sum(committed_offsets(own)[partition] for partition in taken) >= 5, "it has begun")
    before = {partition: committed_offsets(own)[partition] for partition in taken}
    may_go_on.touch()
    if outcome == "stored":
        hanging.wait_for("offsets_left_to_the_next_owner")
    else:
        hanging.wait_for("partitions_lost")
    kept = set(range(own.kafka_partitions)) - set(taken)
    wait_until(lambda: all(committed_offsets(own)[partition] == 60 for partition in kept), "it stored what it kept")
    assert {partition: committed_offsets(own)[partition] for partition in taken} == before
    for service in (hanging, owner):
        service.kill()
    assert run_cli(own, "consume", "--until-caught-up").returncode == 0
    expected.wait_until_stored()
