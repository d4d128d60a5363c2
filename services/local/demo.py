"""``make demo``: the whole pipeline over real readings, each service a process of its own, and then the check."""

from __future__ import annotations

import fcntl
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from pydantic import SecretStr

from services.core.config import LOGINS, Settings
from services.core.database import connect
from services.core.errors import STOPPED, ConfigurationError, PermanentError
from services.core.logins import settings_as
from services.core.measurements import DEFAULT, measurement
from services.core.offsets import group_lag
from services.local.command import stack_options
from services.local.report import fetch, report, say
from services.local.runtime import make_writable
from services.local.security import Security, secure, write_settings
from services.local.servers import free_port
from services.local.stack import Stack
from services.local.supervisor import ProcessRecord

# Hourly readings: with wider intervals than the defaults a summary shows something.
DEMO_INTERVALS = {measurement(name).interval_setting: 180 * (1 + at) for at, name in enumerate(DEFAULT)}
CLIENT_SETTINGS = "client.env"  # of a demo that is kept
FINISH_TIMEOUT_S = 120
POLL_INTERVAL_S = 0.5
NO_PASSWORD = SecretStr("")


def run(settings: Settings, directory: Path, *, keep: bool, tls: bool) -> int:
    """Run the demo from an empty database. Returns 0 only if every stored and every summary row is right."""
    demo = Demo(settings, directory / "demo")
    make_writable(directory)
    with alone(directory / "demo.lock"):
        demo.check()
        try:
            return demo.run(keep=keep, tls=tls)
        except KeyboardInterrupt:
            say("interrupted; stopping everything")
            demo.down()
            return STOPPED
        except BaseException:
            demo.down()
            raise


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """One at a time in a directory. Raises ConfigurationError where another demo is in the block."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigurationError(f"another demo is running in {lock.parent.resolve()}: wait for its end") from error
        yield


def down(settings: Settings, directory: Path) -> int:
    """Stop a demo that was left running."""
    Demo(settings, directory / "demo").down()
    say("the demo is stopped; the next one begins with empty servers")
    return 0


class Demo:
    """Servers and services of one demo, everything they write below one directory."""

    def __init__(self, settings: Settings, directory: Path) -> None:
        self._directory = directory
        self._settings = settings
        self._services: dict[str, subprocess.Popen[bytes]] = {}
        self._logins: dict[str, Settings] = {}
        self._metrics_ports: dict[str, int] = {}
        self._security: Security | None = None
        self._dashboard_password = ""

    def check(self) -> None:
        """Raise ConfigurationError where a demo is kept, whose data this one would erase, or there is no file."""
        stack = Stack(stack_options(self._settings, self._directory))
        if (self._directory / CLIENT_SETTINGS).exists() and (stack.kafka.running or stack.timescaledb.running):
            raise ConfigurationError(
                "a demo was left running, and a new one would erase its data: stop it first with sensor-pipeline "
                "demo --down (make demo-down)"
            )
        file = Path(self._settings.parquet_url)
        if not file.exists():
            raise ConfigurationError(
                f"PARQUET_URL={file}: there is no such file in {Path.cwd()}; the demo needs a local one "
                "(its own is in the clone: run it there)"
            )

    def run(self, *, keep: bool, tls: bool) -> int:
        """Start, wait, check, show; stop again unless ``keep``."""
        self.down()
        shutil.rmtree(self._directory, ignore_errors=True)
        (self._directory / "logs").mkdir(parents=True)
        self._settings = demo_settings(self._settings)
        if tls:
            self._security = secure((self._directory / "tls").resolve(), self._settings)
            self._settings = self._security.applied_to(self._settings)
        if keep:
            self._metrics_ports = {name: free_port() for name in ("consumer", "etl")}
        stack = Stack(stack_options(self._settings, self._directory, self._security), report=say)
        stack.install()
        started = time.monotonic()
        say("starting Kafka and TimescaleDB" + (" with TLS" if tls else ""))
        stack.up(detach=False)
        say("creating the tables: sensor-pipeline migrate")
        self._migrate()
        say(f"starting producer, consumer and etl over {self._settings.parquet_url}")
        for name in ("consumer", "etl", "producer"):
            self._start(name)
        self._wait_until_done()
        took = time.monotonic() - started
        right = report(self._settings, took)
        if keep:
            self._keep(stack)
        else:
            self.down()
        return 0 if right else 1

    def down(self) -> None:
        """Stop the services and the servers of this directory, whoever started them."""
        for name in ("producer", "consumer", "etl"):
            self._stop(name)
        Stack(stack_options(self._settings, self._directory)).down()

    def _migrate(self) -> None:
        """Create the tables, and let each in under a role of its own, with a password that is thrown away."""
        files = {f"{login}_password_file": "" for login in LOGINS}
        passwords = {f"{login}_password": SecretStr(secrets.token_hex(16)) for login in LOGINS}
        settings = self._settings.model_copy(update=files | passwords)
        done = subprocess.run(
            [sys.executable, "-m", "services.cli", "migrate"],
            env=environment(settings),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise PermanentError(f"sensor-pipeline migrate failed: {(done.stderr or done.stdout).strip()}")
        for name in ("consumer", "etl"):
            login = settings_as(f"sensor_{name}", settings)
            self._logins[name] = login.model_copy(update=dict.fromkeys(passwords, NO_PASSWORD))
        nobody = {"postgre_password": NO_PASSWORD, "postgre_password_file": ""}
        self._logins["producer"] = self._settings.model_copy(update=nobody)
        self._dashboard_password = settings.secret("sensor_dashboard_password")

    def _log_path(self, name: str) -> Path:
        return self._directory / "logs" / f"{name}.log"

    def _start(self, name: str) -> None:
        command = {"producer": "produce", "consumer": "consume", "etl": "etl"}[name]
        with self._log_path(name).open("ab") as log:
            process = subprocess.Popen(  # noqa: S603 - our own command
                [sys.executable, "-m", "services.cli", command],
                env=environment(self._logins.get(name, self._settings))
                | {"METRICS_PORT": str(self._metrics_ports.get(name, 0))},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._services[name] = process
        record = ProcessRecord.of(process.pid)
        (self._directory / f"{name}.pid").write_text(f"{record.pid} {record.created}", encoding="utf-8")

    def _stop(self, name: str) -> None:
        pid_file = self._directory / f"{name}.pid"
        with suppress(FileNotFoundError, psutil.NoSuchProcess, psutil.TimeoutExpired):
            pid, created = pid_file.read_text(encoding="utf-8").split()
            if process := ProcessRecord(int(pid), float(created)).alive():
                process.terminate()
                process.wait(10)
        pid_file.unlink(missing_ok=True)

    def _supervise(self) -> None:
        """Start a service that was killed again, as a service manager would; its own failure ends the demo."""
        for name, process in list(self._services.items()):
            status = process.poll()
            if status is None or (name == "producer" and status == 0):
                continue
            if status >= 0:
                lines = self._log_path(name).read_text(encoding="utf-8").splitlines()
                raise PermanentError(f"{name} ended with exit code {status}: {lines[-1] if lines else ''}")
            say(f"{name} was killed by {signal.Signals(-status).name}; starting it again")
            self._start(name)

    def _wait_until_done(self) -> None:
        """Until the producer has ended, the consumer has no lag, and etl's queue is empty."""
        deadline = time.monotonic() + FINISH_TIMEOUT_S
        shown = (0, 0)
        first = measurement(self._settings.measurements[0])
        with connect(self._settings) as connection:
            while time.monotonic() < deadline:
                self._supervise()
                counts = fetch(connection, "sensor_data"), fetch(connection, first.summary)
                queued = fetch(connection, "summary_refresh_queue")
                if counts != shown:
                    say(f"  {counts[0]:>7,} readings stored, {counts[1]:>6,} {first.name} intervals summarised")
                    shown = counts
                sent = self._services["producer"].poll() == 0
                done = sent and group_lag(self._settings) == 0 and queued == 0
                if done and fetch(connection, "summary_refresh_queue") == 0:
                    return
                time.sleep(POLL_INTERVAL_S)
        raise PermanentError(f"not done within {FINISH_TIMEOUT_S} s; see the logs in {self._directory}/logs")

    def _keep(self, stack: Stack) -> None:
        settings = self._settings
        stack.detach()
        say("")
        say("everything is left running; stop it with: make demo-down")
        say(f"  Kafka      {settings.bootstrap_servers}, topic {settings.kafka_topic}")
        psql = f"PGPASSFILE={self._write_password()} psql"
        if self._security is not None:
            psql = (
                f"PGSSLMODE={settings.postgre_sslmode} PGSSLROOTCERT={shlex.quote(settings.postgre_sslrootcert)} {psql}"
            )
        say(
            f"  PostgreSQL {psql} -h {settings.postgre_host} -p {settings.postgre_port} "
            f"-U {settings.postgre_user} {settings.postgre_dbname}"
        )
        for name, port in self._metrics_ports.items():
            say(f"  metrics    http://{settings.metrics_host}:{port}/metrics ({name})")
        say(f"  logs       {self._directory}/logs")
        client = self._write_client_settings()
        say(f"  look       (set -a; . {client}; {sys.argv[0]} status), or dashboard instead of status")

    def _write_password(self) -> Path:
        """The password as psql takes it from a file: what is printed may be kept by others."""
        path = self._directory / "pgpass"
        password = self._settings.postgre_password.get_secret_value().replace("\\", r"\\").replace(":", r"\:")
        path.touch(mode=0o600)
        path.write_text(f"*:*:*:*:{password}\n", encoding="utf-8")
        return path

    def _write_client_settings(self) -> Path:
        """The settings that a command needs to reach the demo, as lines of .env that a shell reads too."""
        names = ("kafka_host", "kafka_port", "postgre_host", "postgre_port", *DEMO_INTERVALS)
        values = {name: str(getattr(self._settings, name)) for name in names}
        values["sensor_dashboard_password"] = self._dashboard_password
        if self._security is not None:
            values |= self._security.client_settings()
        return write_settings(self._directory / CLIENT_SETTINGS, values)


def environment(settings: Settings) -> dict[str, str]:
    """Our environment with the settings in it, for a process of ours."""
    values = {
        name.upper(): value.get_secret_value() if isinstance(value, SecretStr) else str(value)
        for name, value in settings.model_dump().items()
    }
    return os.environ | values


def demo_settings(settings: Settings) -> Settings:
    """The settings of the demo: what the user did not set is chosen so that it works anywhere."""
    chosen = settings.model_fields_set
    changes: dict[str, object] = {name: value for name, value in DEMO_INTERVALS.items() if name not in chosen}
    changes |= {"kafka_host": "127.0.0.1", "postgre_host": "127.0.0.1", "log_format": "text"}
    for name in ("kafka_port", "postgre_port"):
        port = getattr(settings, name)
        if name not in chosen and not is_free(port):
            changes[name] = free_port()
            say(f"port {port} is taken; the demo uses {name.upper()}={changes[name]}")
    return settings.model_copy(update=changes)


def is_free(port: int) -> bool:
    """Whether nothing listens on the loopback port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
