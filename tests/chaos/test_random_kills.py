"""Kill and freeze everything at random moments; afterwards every row and every summary row is right.

A run is decided by its seed: the readings, which process dies or stands still and when. ``make chaos RUNS=5 SEED=7``
runs more. On the local stack the servers are killed too; servers that TEST_* name are not.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest
from confluent_kafka import Message
from confluent_kafka.admin import AdminClient

from services.core.config import Settings
from services.core.database import connect
from services.core.errors import TransientError
from services.core.kafka import client_settings, create_topics, position_of
from services.core.offsets import group_lag
from services.core.shutdown import Shutdown
from services.local.stack import Stack
from tests.chaos.bystanders import Bystander, dump, read_live_view, read_live_view_at_once
from tests.chaos.slow_commits import slow_commits
from tests.chaos.traffic import COLUMNS, COMPRESS_AFTER_DAYS, Traffic
from tests.chaos.verdict import Verdict, count_readings, count_reasons
from tests.fix_services import Service, read_topic, run_cli, wait_until
from tests.fix_stack import empty, is_native, make_stack, native_settings, stack_settings, upgrade

EVENTS = 36
FILES = 12
CATCH_UP_TIMEOUT_S = 90
WIDTHS = {"temperature": (10, 15), "humidity": (20, 30)}  # before and after the change
COMMANDS = {"consumer": "consume", "etl": "etl", "producer": "produce"}
SERVICES = ("consumer-0", "consumer-1", "consumer-2", "consumer-3", "etl-0", "etl-1", "producer")
HARM = {"kill": 8, "freeze": 14, "rewind": 2}
# A server takes seconds to come back, so the services are killed more often.
HARM_TO_SERVERS = {"timescaledb": 3, "kafka": 2}
TARGETS = dict(zip(SERVICES, (4, 4, 4, 4, 4, 4, 4), strict=True))
# Others take over from a service only when it stands still for long: sessions last ten seconds, or less.
FREEZES_S = {(0.1, 3.0): 4, (3.0, 8.0): 2, (11.0, 16.0): 4}
SESSION_TIMEOUT_MS = 8_000
AIM_TIMEOUT_S = 2.0
IN_TRANSACTION = """
    SELECT client_port FROM pg_stat_activity
    WHERE application_name = 'sensor-pipeline consumer' AND xact_start IS NOT NULL AND state <> 'idle'
"""
QUEUED = "SELECT count(*) FROM summary_refresh_queue"
HAS_CHANGED = """
    SELECT (SELECT count(*) FROM timescaledb_information.chunks
            WHERE hypertable_name = 'sensor_data' AND range_end <= %s),
           (SELECT array_agg((extract(epoch FROM width) / 60)::int ORDER BY width) FROM summary_state)
"""
LOGGED = ("partitions_moved", "dead_writer_ended", "lead_lost", "duty_failed", "chunk_dropped", "chunk_compressed")
RUNS = int(os.environ.get("CHAOS_RUNS", "1"))
# Every worker of a parallel run collects the same tests, so they must draw the same seed.
SEED = int(os.environ.get("CHAOS_SEED", "0")) or random.Random(  # noqa: S311 - a seed, no secret
    os.environ.get("PYTEST_XDIST_TESTRUNUID") or os.urandom(8)
).randrange(1, 10**6)


class Chaos:
    """The services of one run, each started again whenever it ends, as a service manager would."""

    def __init__(self, settings: Settings, stack: Stack | None, directory: Path, seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311 - reproducible, not secret
        self.settings = settings
        self.stack = stack
        self.directory = directory
        self.traffic = Traffic(settings, self.random, Path(settings.parquet_url))
        self.settings_of = {
            "consumer": settings,
            "producer": settings,
            "etl": settings.model_copy(update={"compress_after_days": COMPRESS_AFTER_DAYS}),
        }
        self.harmed: Counter[str] = Counter()
        self.ended_by_themselves: list[str] = []
        self.services: dict[str, Service] = {}
        self._frozen: dict[str, threading.Timer] = {}  # each ends the freeze, whatever this thread waits for
        self._is_racing = False
        self._rewind_to = datetime.now(UTC)

    # Services --------------------------------------------------------------------------------------------

    def tend(self) -> None:
        """Start every service that is not running."""
        for name in SERVICES:
            service = self.services.get(name)
            if service is not None and service.process.poll() is None:
                continue
            if service is not None and service.process.returncode != -signal.SIGKILL:
                tail = service.log_path.read_text(encoding="utf-8").splitlines()[-1:]
                self.ended_by_themselves.append(f"{name}: {service.process.returncode} {tail}")
            kind = name.split("-")[0]
            form = self.random.choice(("json", "arrow"))
            self.services[name] = Service(
                self.settings_of[kind].model_copy(update={"producer_format": form}),
                COMMANDS[kind],
                log_path=self.directory / f"{name}.log",
                module="tests.chaos.hasty" if kind == "etl" else "services.cli",
            )

    def kill(self, name: str) -> None:
        """SIGKILL a service, whatever it does or does not."""
        self.harmed[f"kill {name}"] += 1
        self.services[name].kill()

    def freeze(self, name: str) -> None:
        """SIGSTOP a service; it goes on after a random time, and takes part in what has changed meanwhile."""
        self.harmed[f"freeze {name}"] += 1
        least_s, max_s = self.random.choices(list(FREEZES_S), list(FREEZES_S.values()))[0]
        service = self.services[name]
        service.signal(signal.SIGSTOP)
        self._frozen[name] = threading.Timer(self.random.uniform(least_s, max_s), service.signal, [signal.SIGCONT])
        self._frozen[name].start()

    def kill_server(self, name: str) -> None:
        """SIGKILL a server of the local stack and start it again."""
        assert self.stack is not None
        self.harmed[f"kill {name}"] += 1
        server = getattr(self.stack, name)
        server.kill()
        self.pause(0.0, 1.0)
        server.start()
        server.wait_ready()

    def rewind(self) -> None:
        """Let the consumers read the last seconds again."""
        self.harmed["rewind"] += 1
        moment = max(self._rewind_to, datetime.fromtimestamp(time.time() - self.random.uniform(0, 4), UTC))
        done = run_cli(self.settings, "rewind", "--to-time", moment.isoformat())
        assert done.returncode == 0, done.stderr

    def pause(self, least_s: float, max_s: float) -> None:
        """Let the run go on for a random time."""
        until = time.monotonic() + self.random.uniform(least_s, max_s)
        wait_until(lambda: time.monotonic() >= until, "time passes")

    # The run ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Harm the services, send, and change the settings of etl on the way."""
        changes = [self._change_widths, self._turn_retention_on]
        self.random.shuffle(changes)
        for event in range(EVENTS):
            if event in (EVENTS // 3, 2 * EVENTS // 3):
                changes.pop()()
            if event * FILES >= self.traffic.files * EVENTS:
                self.traffic.add_file()
            self.tend()
            self.pause(0.2, 1.5)
            self._send()
            self._harm()
        while self.traffic.files < FILES:
            self.traffic.add_file()

    def _send(self) -> None:
        self.traffic.send_from_devices()
        if self._is_racing:
            self.traffic.send_racers()

    def _harm(self) -> None:
        harm = HARM | (HARM_TO_SERVERS if self.stack is not None else {})
        kind = self.random.choices(list(harm), list(harm.values()))[0]
        name = self.random.choices(list(TARGETS), list(TARGETS.values()))[0]
        if kind in HARM_TO_SERVERS:
            self.kill_server(kind)
        elif kind == "rewind":
            self.rewind()
        else:
            if name.startswith("consumer") and self.random.random() < 0.5:
                self._aim(name)
            (self.freeze if kind == "freeze" else self.kill)(name)

    def _aim(self, name: str) -> None:
        """Wait for a moment at which the consumer is in the middle of a transaction, if there is one soon."""
        if self.stack is not None or (name in self._frozen and self._frozen[name].is_alive()):
            return
        ports = {each.laddr.port for each in psutil.Process(self.services[name].process.pid).net_connections()}
        deadline = time.monotonic() + AIM_TIMEOUT_S
        with connect(self.settings) as connection:
            while time.monotonic() < deadline:
                if ports & {port for (port,) in connection.execute(IN_TRANSACTION)}:
                    self.harmed["in a transaction"] += 1
                    return

    def _change_widths(self) -> None:
        self._change_etl({f"{metric}_interval": new for metric, (_, new) in WIDTHS.items()})

    def _turn_retention_on(self) -> None:
        """From now on the oldest two chunks are closed, frozen and dropped, while single readings of them arrive."""
        self.traffic.old_is_sent = False
        self.wait_until_stored()
        self._rewind_to = datetime.now(UTC)
        self._is_racing = True
        self._change_etl({"raw_retention_days": self.traffic.keep_days})

    def _change_etl(self, update: dict[str, object]) -> None:
        """With other settings from now on: all of them are started again."""
        self.settings_of["etl"] = self.settings_of["etl"].model_copy(update=update)
        for name in SERVICES:
            if name.startswith("etl"):
                self.services[name].kill()

    # The end ---------------------------------------------------------------------------------------------

    def wait_until_stored(self) -> list[Message]:
        """Until all that was sent is in the topic, and the positions are behind it; what the topic holds."""
        sent = sum(map(len, self.traffic.sent.values())) + len(self.traffic.poison)
        messages: list[Message] = []

        def is_sent() -> bool:
            self.tend()
            messages[:] = read_topic(self.settings, self.settings.kafka_topic)
            return sum(map(count_readings, messages)) >= sent

        wait_until(is_sent, "all is sent", CATCH_UP_TIMEOUT_S)
        ends = dict(map(position_of, messages))
        wait_until(lambda: self._are_behind(ends), "all is stored", CATCH_UP_TIMEOUT_S)
        return messages

    def _are_behind(self, ends: dict[int, int]) -> bool:
        """Whether the position of each partition is behind the offset of its last message."""
        row = self._find("SELECT json_object_agg(partition, next_offset) FROM partition_progress")
        positions = row[0] if row is not None and isinstance(row[0], dict) else {}
        return all(positions.get(str(partition), 0) > last for partition, last in ends.items())

    def wait_until_done(self) -> list[Message]:
        """Until etl has done all that it was asked for, while messages still come; what the topic holds then."""

        def has_changed() -> bool:
            self.pause(0.3, 0.6)
            self._send()
            return self._find(HAS_CHANGED, self.traffic.kept_from) == (0, sorted(new for _, new in WIDTHS.values()))

        wait_until(has_changed, "retention and the change of widths are done", CATCH_UP_TIMEOUT_S)
        self._send()
        messages = self.wait_until_stored()
        wait_until(lambda: self._find(QUEUED) == (0,), "nothing is queued", CATCH_UP_TIMEOUT_S)
        wait_until(lambda: group_lag(self.settings) == 0, "the group has no lag")
        return messages

    def _find(self, query: str, *arguments: object) -> tuple[object, ...] | None:
        """The first row of what the database answers, if it does; the services are tended meanwhile."""
        self.tend()
        try:
            with connect(self.settings) as connection:
                return connection.execute(query, arguments).fetchone()
        except TransientError:
            return None

    def stop(self) -> list[int]:
        """SIGTERM to every service; how they ended."""
        for service in self.services.values():
            service.signal(signal.SIGTERM)
            service.signal(signal.SIGCONT)
        return [service.wait() for service in self.services.values()]

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Every service ends with the block: one that is frozen may hold the database, and all who wait for it."""
        try:
            yield
        finally:
            for timer in self._frozen.values():
                timer.cancel()
            for service in self.services.values():
                service.kill()

    def logged(self) -> dict[str, int]:
        """How often the services said what is worth counting."""
        text = "".join(path.read_text(encoding="utf-8", errors="replace") for path in self.directory.glob("*.log"))
        return {event: text.count(f'"event": "{event}"') for event in LOGGED}


@contextmanager
def make_chaos(directory: Path, seed: int) -> Iterator[Chaos]:
    """Servers, of this run alone where they may be killed; empty tables, topics, and services that are not started."""
    (directory / "source").mkdir()
    update = {
        "parquet_url": str(directory / "source"),
        "kafka_topic": f"chaos_{os.getpid()}_{seed}",
        "kafka_group": f"chaos_{os.getpid()}_{seed}",
        "kafka_group_protocol": ("auto", "classic")[seed % 2],
        "kafka_session_timeout_ms": SESSION_TIMEOUT_MS,
        **COLUMNS,
        "consumer_batch_rows": 400,
        "consumer_batch_seconds": 0.2,
        "etl_poll_seconds": 0.2,
        "etl_check_seconds": 1.0,
        "producer_transaction_rows": 1_000,
        "producer_watch_seconds": 0.5,
        "log_format": "json",
    }
    if is_native():
        settings = native_settings().model_copy(update=update)
        upgrade(settings)
        with connect(settings) as connection:
            empty(connection)
        create_topics(AdminClient(client_settings(settings, "test")), settings, shutdown=Shutdown())
        with slow_commits(settings) as of_consumers:
            chaos = Chaos(settings, None, directory, seed)
            chaos.settings_of["consumer"] = of_consumers
            yield chaos
        return
    with make_stack(directory / "stack") as stack:
        settings = stack_settings(stack).model_copy(update=update)
        upgrade(settings)
        create_topics(AdminClient(client_settings(settings, "test")), settings, shutdown=Shutdown())
        yield Chaos(settings, stack, directory, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [SEED + run for run in range(RUNS)])
def test_nothing_is_lost_or_doubled_whatever_dies(
    seed: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    with make_chaos(tmp_path, seed) as chaos:
        settings, traffic = chaos.settings, chaos.traffic
        reader = Bystander(settings, read_live_view if is_native() else read_live_view_at_once, seed)
        backup = Bystander(settings, dump, seed)
        traffic.add_file()
        chaos.tend()
        with reader.running(), backup.running() if is_native() else nullcontext(), chaos.ending():
            chaos.run()
            messages = chaos.wait_until_done()
            codes = chaos.stop()
        letters = read_topic(settings, settings.dead_letter_topic)
        verdict = Verdict(traffic, messages, letters)
        with connect(settings) as connection:
            found = verdict.judge(connection, WIDTHS)
            (tmp_path / "differences.txt").write_text("\n".join(found), encoding="utf-8")
            row = connection.execute("SELECT count(*), sum(differences)::int FROM summary_check").fetchone()
        reconciled = run_cli(chaos.settings_of["etl"], "etl", "--reconcile")
        record_property(
            "summary",
            f"seed {seed}: {EVENTS} times harmed {dict(sorted(chaos.harmed.items()))}; "
            f"{len(messages)} messages, {len(verdict.rows)} readings, {len(traffic.racers)} of them raced and "
            f"{len(verdict.refused)} of these were too late; dead letters {count_reasons(letters)}, "
            f"{verdict.repeated_letters} twice; {chaos.logged()}; {reader.turns} reports, {backup.turns} dumps; "
            f"ended by themselves {len(chaos.ended_by_themselves)}; {len(found)} differences",
        )
        assert not found, f"seed {seed}: {len(found)} differences: {found[:5]}"
        assert row == (len(WIDTHS), 0), f"seed {seed}: etl's own check found differences"
        assert (reconciled.returncode, reconciled.stdout) == (
            0,
            "".join(f"{metric}_summary: 0 rows differed\n" for metric in sorted(WIDTHS)),
        ), f"seed {seed}: {reconciled}"
        if is_native():
            assert not chaos.ended_by_themselves, f"seed {seed}"
            assert codes == [0] * len(SERVICES), f"seed {seed}"
            assert not reader.errors, f"seed {seed}"
            assert reader.turns, f"seed {seed}"
            assert backup.turns, f"seed {seed}: {backup.errors}"
