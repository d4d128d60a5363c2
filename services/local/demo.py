"""``make demo``: the whole pipeline over real readings, each service a process of its own, and then the check."""

from __future__ import annotations

import fcntl
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import SecretStr

from services.core.config import LOGINS, Settings
from services.core.database import connect
from services.core.errors import STOPPED, ConfigurationError, PermanentError
from services.core.logins import settings_as
from services.core.measurements import DEFAULT, measurement
from services.core.offsets import group_lag
from services.local.report import fetch, report
from services.local.runtime import install, make_writable, say
from services.local.security import Security, secure, write_settings
from services.local.servers import Server, free_port, port_problem
from services.local.stack import Stack

# Hourly readings: with wider intervals than the defaults a summary shows something.
DEMO_INTERVALS = {measurement(name).interval_setting: 180 * (1 + at) for at, name in enumerate(DEFAULT)}
COMMANDS = {"producer": "produce", "consumer": "consume", "etl": "etl"}
CLIENT_SETTINGS = "client.env"  # of a demo that is kept
FINISH_TIMEOUT_S = 120
POLL_INTERVAL_S = 0.5
NO_PASSWORD = SecretStr("")


def run(settings: Settings, directory: Path, *, keep: bool, tls: bool) -> int:
    """Run the demo from an empty database. Returns 0 only if every stored and every summary row is right."""
    make_writable(directory)
    with alone(directory / "demo.lock"):
        demo = Demo(settings, directory / "demo")
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
            raise ConfigurationError(
                f"another demo is running in {lock.parent.resolve()}: wait until it ends"
            ) from error
        yield


def down(settings: Settings, directory: Path) -> int:
    """Stop a demo that was left running."""
    Demo(settings, directory / "demo").down()
    say("the demo is stopped; the next one begins with empty servers")
    return 0


class ServiceProcess(Server):
    """One of the services, with its settings as its environment."""

    port_setting = "METRICS_PORT"

    def __init__(self, directory: Path, name: str, settings: Settings) -> None:
        self.name = name
        super().__init__(directory, settings.metrics_port)
        self._settings = settings

    def _command(self) -> list[str]:
        return [sys.executable, "-m", "services.cli", COMMANDS[self.name]]

    def _environment(self) -> dict[str, str]:
        return self._settings.as_environment()


class Demo:
    """Servers and services of one demo, everything they write below one directory."""

    def __init__(self, settings: Settings, directory: Path) -> None:
        self._directory = directory
        self._settings = settings
        self._stack = Stack(directory, settings)
        self._services = {name: ServiceProcess(self._stack.directory, name, settings) for name in COMMANDS}
        self._security: Security | None = None
        self._dashboard_password = ""

    def check(self) -> None:
        """Raise ConfigurationError where a demo is kept, whose data this one would erase, or there is no file."""
        if (self._directory / CLIENT_SETTINGS).exists() and any(server.running for server in self._stack.servers):
            raise ConfigurationError(
                "a demo was left running, and a new one would erase its data: stop it first with sensor-pipeline "
                "demo --down (make demo-down)"
            )
        file = Path(self._settings.parquet_url)
        if not file.exists():
            raise ConfigurationError(
                f"PARQUET_URL={file}: there is no such file in {Path.cwd()}; the demo needs a local file "
                "(the sample file is in the clone: run the demo there)"
            )

    def run(self, *, keep: bool, tls: bool) -> int:
        """Start, wait, check, show; stop again unless ``keep``."""
        self.down()
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(parents=True)
        self._settings = demo_settings(self._settings)
        if tls:
            self._security = secure((self._directory / "tls").resolve(), self._settings)
            self._settings = self._security.applied_to(self._settings)
        self._stack = Stack(self._directory, self._settings, self._security, say)
        install()
        started = time.monotonic()
        say("starting Kafka and TimescaleDB" + (" with TLS" if tls else ""))
        self._stack.up(detach=False)
        say("creating the tables: sensor-pipeline migrate")
        logins = self._migrate()
        say(f"starting producer, consumer and etl over {self._settings.parquet_url}")
        for name, settings in logins.items():
            port = free_port() if keep and name != "producer" else 0
            own = settings.model_copy(update={"metrics_port": port})
            self._services[name] = ServiceProcess(self._stack.directory, name, own)
            self._services[name].start()
        self._wait_until_done()
        right = report(self._settings, time.monotonic() - started)
        if keep:
            self._keep()
        else:
            self.down()
        return 0 if right else 1

    def down(self) -> None:
        """Stop the services and the servers of this directory, whoever started them."""
        for service in self._services.values():
            service.stop()
        self._stack.down()

    def _migrate(self) -> dict[str, Settings]:
        """Create the tables; each service's settings, to log in as its role with a password that is thrown away."""
        files = {f"{login}_password_file": "" for login in LOGINS}
        passwords = {f"{login}_password": SecretStr(secrets.token_hex(16)) for login in LOGINS}
        settings = self._settings.model_copy(update=files | passwords)
        done = subprocess.run(
            [sys.executable, "-m", "services.cli", "migrate"],
            env=os.environ | settings.as_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise PermanentError(f"sensor-pipeline migrate failed: {(done.stderr or done.stdout).strip()}")
        self._dashboard_password = settings.secret("sensor_dashboard_password")
        nobody = {"postgre_password": NO_PASSWORD, "postgre_password_file": ""}
        without_others = dict.fromkeys(passwords, NO_PASSWORD)
        return {
            "consumer": settings_as("sensor_consumer", settings).model_copy(update=without_others),
            "etl": settings_as("sensor_etl", settings).model_copy(update=without_others),
            "producer": self._settings.model_copy(update=nobody),
        }

    def _supervise(self) -> None:
        """Start a service that was killed again, as a service manager would; its own failure ends the demo."""
        for name, service in self._services.items():
            code = service.exit_code
            if code is None or (name == "producer" and code == 0):
                continue
            if code >= 0:
                lines = service.log_lines()
                raise PermanentError(f"{name} ended with exit code {code}: {lines[-1] if lines else ''}")
            say(f"{name} was killed by {signal.Signals(-code).name}; restarting it")
            service.start()

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
                sent = self._services["producer"].exit_code == 0
                done = sent and group_lag(self._settings) == 0 and queued == 0
                if done and fetch(connection, "summary_refresh_queue") == 0:
                    return
                time.sleep(POLL_INTERVAL_S)
        raise PermanentError(f"not done within {FINISH_TIMEOUT_S} s; see the logs in {self._directory}/logs")

    def _keep(self) -> None:
        settings = self._settings
        for server in (*self._stack.servers, *self._services.values()):
            server.detach()
        say("")
        say("everything is left running; stop it with: make demo-down")
        say(f"  Kafka      {settings.bootstrap_servers}, topic {settings.kafka_topic}")
        tls = ""
        if self._security is not None:
            tls = f"PGSSLMODE={settings.postgre_sslmode} PGSSLROOTCERT={shlex.quote(settings.postgre_sslrootcert)} "
        say(
            f"  PostgreSQL {tls}PGPASSFILE={self._write_password()} psql -h {settings.postgre_host} "
            f"-p {settings.postgre_port} -U {settings.postgre_user} {settings.postgre_dbname}"
        )
        for name in ("consumer", "etl"):
            say(f"  metrics    http://{settings.metrics_host}:{self._services[name].port}/metrics ({name})")
        say(f"  logs       {self._directory}/logs")
        client = self._write_client_settings()
        say(f"  look       (set -a; . {client}; {sys.argv[0]} status), or dashboard instead of status")

    def _write_password(self) -> Path:
        """The password as psql takes it from a file: what is printed may be kept by others."""
        path = self._directory / "pgpass"
        password = self._settings.secret("postgre_password").replace("\\", r"\\").replace(":", r"\:")
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


def demo_settings(settings: Settings) -> Settings:
    """The settings of the demo: what the user did not set is chosen so that it works anywhere."""
    chosen = settings.model_fields_set
    changes: dict[str, object] = {name: value for name, value in DEMO_INTERVALS.items() if name not in chosen}
    changes |= {"kafka_host": "127.0.0.1", "postgre_host": "127.0.0.1", "log_format": "text"}
    for name in ("kafka_port", "postgre_port"):
        port = getattr(settings, name)
        if name not in chosen and port_problem(port):
            changes[name] = free_port()
            say(f"port {port} is taken; the demo uses {name.upper()}={changes[name]}")
    return settings.model_copy(update=changes)
