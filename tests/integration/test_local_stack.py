"""The local stack: real servers that start, stop, crash and come back, and never outlive their keeper."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import socket

import psutil
import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from pydantic import SecretStr

from services.core.config import Settings
from services.core.database import connect
from services.core.errors import ConfigurationError, PermanentError
from services.local.command import run
from services.local.servers import HOST, Server, free_port
from services.local.stack import Stack
from services.local.supervisor import PidFile, ProcessRecord
from tests.fix_services import wait_until
from tests.measured import make_settings

ROOT = Path(__file__).parents[2]
PASSWORD = "secret"


def own_settings() -> Settings:
    return make_settings(kafka_port=free_port(), postgre_port=free_port(), postgre_password=SecretStr(PASSWORD))


@pytest.fixture(scope="module")
def local() -> Settings:
    """The settings of the shared stack."""
    return own_settings()


@pytest.fixture(scope="module")
def stack(local: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(tmp_path_factory.mktemp("stack"), local) as stack:
        yield stack


@pytest.fixture
def ready(stack: Stack) -> Stack:
    """The shared stack, whatever a test before has done to it."""
    stack.up(detach=False)
    return stack


def count(settings: Settings) -> int:
    with connect(settings) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS visits (at timestamptz DEFAULT now())")
        connection.execute("INSERT INTO visits DEFAULT VALUES")
        row = connection.execute("SELECT count(*) FROM visits").fetchone()
        assert row is not None
        return int(row[0])


def processes(stack: Stack) -> list[psutil.Process]:
    records = [PidFile.read(stack.directory / f"{status.name}.pid") for status in stack.servers]
    return [psutil.Process(part.pid) for record in records if record for part in (record.supervisor, record.server)]


@pytest.mark.slow
def test_up_is_idempotent_and_says_so(ready: Stack, local: Settings) -> None:
    lines: list[str] = []
    again = Stack(ready.directory, local, report=lines.append)
    before = [status.pid for status in again.servers]
    again.up(detach=True)
    assert [line.split(" is ")[1].split(" (")[0] for line in lines] == ["already running"] * 2
    assert [(status.state, status.pid) for status in again.servers] == [("running", pid) for pid in before]
    assert {status.log_path.name for status in again.servers} == {"kafka.log", "timescaledb.log"}
    assert all(status.log_path.exists() and status.data_path.is_dir() for status in again.servers)


def test_servers_listen_on_loopback_only(ready: Stack) -> None:
    for server in (ready.kafka, ready.timescaledb):
        assert server.pid is not None
        listening = [
            connection.laddr.ip
            for connection in psutil.Process(server.pid).net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert listening
        assert {address.removeprefix("::ffff:") for address in listening} == {HOST}


@pytest.mark.slow
def test_kafka_dies_with_its_supervisor_and_keeps_messages_and_offsets(ready: Stack, local: Settings) -> None:
    address: dict[str, str | int | float | bool] = {
        "bootstrap.servers": f"{HOST}:{local.kafka_port}",
        "log_level": 0,
    }
    admin = AdminClient(address)
    admin.create_topics([NewTopic("readings", 2, 1)])["readings"].result(10)
    producer = Producer(address | {"acks": "all"})
    for number in range(10):
        producer.produce("readings", str(number))
    assert producer.flush(10) == 0
    group = address | {"group.id": "g", "auto.offset.reset": "earliest", "enable.auto.commit": False}
    consumer = Consumer(group)
    consumer.subscribe(["readings"])
    assert len(consumer.consume(4, timeout=10)) == 4
    consumer.commit(asynchronous=False)
    consumer.close()

    record = PidFile.read(ready.directory / "kafka.pid")
    assert record is not None
    server = psutil.Process(record.server.pid)
    psutil.Process(record.supervisor.pid).kill()
    server.wait(10)
    assert [status.state for status in ready.servers] == ["crashed", "running"]
    ready.kafka.start()
    ready.kafka.wait_ready()

    consumer = Consumer(group)
    consumer.subscribe(["readings"])
    assert len(consumer.consume(6, timeout=10)) == 6
    consumer.close()
    producer.list_topics("absent", timeout=10)
    assert set(admin.list_topics(timeout=10).topics) == {"readings", "__consumer_offsets"}


def test_up_after_a_crash_reopens_the_same_data(ready: Stack, local: Settings) -> None:
    visits = count(local)
    ready.timescaledb.kill()
    assert not ready.timescaledb.running
    ready.up(detach=False)
    assert count(local) == visits + 1


def test_data_is_opened_once(ready: Stack, local: Settings) -> None:
    twin = Stack(ready.directory, own_settings())
    pid_file = ready.directory / "timescaledb.pid"
    kept = pid_file.read_bytes()
    pid_file.unlink()  # as if it had been lost
    with pytest.raises(PermanentError, match="another process is using its data"):
        twin.timescaledb.start()
    pid_file.write_bytes(kept)
    assert ready.timescaledb.running


def test_recycled_pid_is_not_taken_for_the_server(ready: Stack, local: Settings) -> None:
    stranger = psutil.Process()
    record = PidFile(
        ProcessRecord(stranger.pid, stranger.create_time() - 100),
        ProcessRecord(stranger.pid, stranger.create_time() - 100),
    )
    directory = ready.directory / "elsewhere"
    directory.mkdir()
    record.write(directory / "kafka.pid")
    other = Stack(directory, own_settings())
    assert [status.state for status in other.servers] == ["crashed", "stopped"]
    other.down()
    assert stranger.is_running()
    assert [status.state for status in other.servers] == ["stopped", "stopped"]


@pytest.mark.parametrize("taken", ["kafka_port", "postgre_port"])
def test_taken_port_is_one_line_and_nothing_is_started(tmp_path: Path, taken: str) -> None:
    settings = own_settings()
    with socket() as other:
        other.bind((HOST, getattr(settings, taken)))
        other.listen()
        with pytest.raises(ConfigurationError) as caught:
            Stack(tmp_path / "new", settings).up(detach=True)
    line = str(caught.value)
    assert "\n" not in line
    assert taken.upper() in line
    assert str(getattr(settings, taken)) in line
    assert not (tmp_path / "new").exists()


def test_servers_that_run_without_tls_are_not_taken_for_others(ready: Stack, local: Settings) -> None:
    with pytest.raises(ConfigurationError, match="are running without TLS: stop them first"):
        run(local, "up", ready.directory, tls=True)
    assert not ready.kafka.speaks_tls
    assert not (ready.directory / "tls").exists()


def test_servers_have_no_secrets_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_SASL_PASSWORD", "hunter2")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    with Stack(tmp_path, own_settings()) as stack:
        for server in (stack.kafka, stack.timescaledb):
            assert "hunter2" not in Path(f"/proc/{server.pid}/environ").read_text(encoding="utf-8")


@pytest.mark.slow
def test_server_that_dies_while_starting_shows_its_log(tmp_path: Path) -> None:
    stack = Stack(tmp_path, own_settings())
    (tmp_path / "timescaledb" / "cluster").mkdir(parents=True)
    (tmp_path / "timescaledb" / "cluster" / "PG_VERSION").write_text("9.6\n")
    with pytest.raises(PermanentError) as caught:
        stack.up(detach=False)
    assert str(stack.timescaledb.log_path) in str(caught.value)
    assert [status.state for status in stack.servers] == ["stopped", "stopped"]


def test_stop_is_graceful(ready: Stack) -> None:
    server: Server = ready.timescaledb
    server.stop()
    assert server.state != "crashed"
    assert server.log_path.read_text().splitlines()[-1].endswith("stopped")
    with pytest.raises(PermanentError, match="not running"):
        server.wait_ready(1)


class Command(Server):
    """Any command as a server."""

    name = "command"

    def __init__(self, directory: Path, *command: str) -> None:
        super().__init__(directory, 0)
        self._arguments = list(command)

    def _command(self) -> list[str]:
        return self._arguments


def test_how_a_server_ended_by_itself_is_known(tmp_path: Path) -> None:
    failing = Command(tmp_path, sys.executable, "-c", "import sys; sys.exit(3)")
    failing.start()
    wait_until(lambda: failing.exit_code == 3, "its own exit code")
    assert failing.state == "crashed"
    failing.stop()
    lasting = Command(tmp_path, "sleep", "60")
    lasting.start()
    assert lasting.exit_code is None
    assert lasting.pid is not None
    os.kill(lasting.pid, signal.SIGKILL)
    wait_until(lambda: lasting.exit_code == -signal.SIGKILL, "the signal")
    lasting.start()
    lasting.stop()
    assert lasting.state == "stopped"


@pytest.mark.skipif(sys.platform != "linux", reason="the order of pending signals is Linux's")
def test_a_server_that_died_before_its_supervisor_was_asked_to_stop_it_has_crashed(tmp_path: Path) -> None:
    server = Command(tmp_path, "sleep", "60")
    server.start()
    record = PidFile.read(tmp_path / f"{server.name}.pid")
    assert record is not None
    keeper = psutil.Process(record.supervisor.pid)
    wait_until(lambda: keeper.num_threads() == 2 and keeper.status() == psutil.STATUS_SLEEPING, "it waits for signals")
    keeper.suspend()
    wait_until(lambda: keeper.status() == psutil.STATUS_STOPPED, "it stands still")
    psutil.Process(record.server.pid).kill()
    wait_until(lambda: not server.running, "the server is a zombie")
    keeper.terminate()  # it will see this signal before that of its child
    keeper.resume()
    wait_until(lambda: server.exit_code is not None, "it ends")
    assert (server.exit_code, server.state) == (-signal.SIGKILL, "crashed")
    server.stop()


def test_no_signal_is_blocked_in_a_server(tmp_path: Path) -> None:
    """Its supervisor blocks those that it waits for."""
    shown = Command(tmp_path, "grep", "SigBlk", "/proc/self/status")
    shown.start()
    wait_until(lambda: shown.exit_code == 0, "it ends")
    assert shown.log_lines() == ["SigBlk:\t0000000000000000"]
    shown.stop()


STARTER = """
import sys
from pathlib import Path
from services.core.config import load_settings
from services.local.stack import Stack
directory, mode = sys.argv[1:]
stack = Stack(Path(directory), load_settings())
stack.up(detach=mode == "detach")
print("up", flush=True)
if mode == "stay":
    sys.stdin.read()
"""


@pytest.mark.slow
def test_who_outlives_whom(ready: Stack, local: Settings) -> None:
    """Servers die with a starter that was killed; detached ones outlive it until `down`."""
    visits = count(local)
    ready.down()
    observer = Stack(ready.directory, local)

    with started(observer, local, "stay") as starter:
        alive = processes(observer)
        starter.kill()
        gone, left = psutil.wait_procs(alive, timeout=20)
    assert (len(gone), left) == (4, [])
    assert [status.state for status in observer.servers] == ["stopped", "stopped"]

    with started(observer, local, "detach") as starter:
        alive = processes(observer)
        assert starter.wait(10) == 0
        assert [status.state for status in observer.servers] == ["running", "running"]
        assert count(local) == visits + 1
        observer.down()
        gone, left = psutil.wait_procs(alive, timeout=20)
    assert (len(gone), left) == (4, [])
    assert [status.state for status in observer.servers] == ["stopped", "stopped"]


@contextmanager
def started(stack: Stack, settings: Settings, mode: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has brought the stack up."""
    with subprocess.Popen(
        [sys.executable, "-c", STARTER, str(stack.directory), mode],
        cwd=ROOT,
        env=os.environ | settings.as_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == b"up\n"
        yield starter
