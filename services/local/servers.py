"""Kafka and TimescaleDB as processes of this machine: start, await, stop, kill, start again on the same data.

Each server listens on 127.0.0.1 only, keeps its data, log and pid file below the stack's directory, and runs
under a supervisor (supervisor.py) that stops it when its starter dies.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from abc import ABC, abstractmethod
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import psutil
import psycopg
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, ScramCredentialInfo, ScramMechanism, UserScramCredentialUpsertion

from services.core.config import Settings
from services.core.errors import ConfigurationError, PermanentError
from services.local import supervisor
from services.local.runtime import Runtime
from services.local.security import SERVER_NAME, Security
from services.local.supervisor import Order, PidFile

HOST = "127.0.0.1"
_SUPERVISOR = Path(supervisor.__file__)
_PROBE_PAUSE_S = 0.05
FULL_BELOW_BYTES = 16 * 1024 * 1024
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|CREDENTIAL|(_|^)KEY(_|$)", re.IGNORECASE)
_HANDSHAKE_S = 2.0  # the first ones of a Java that has just started take their time

_quiet = logging.getLogger("services.local.probe")
_quiet.addHandler(logging.NullHandler())
_quiet.propagate = False


class Server(ABC):
    """One server process. Subclasses say what to run and how to tell that it is ready."""

    name: ClassVar[str]
    port_setting: ClassVar[str]
    stop_timeout_s: ClassVar[float] = 20.0

    def __init__(self, directory: Path, port: int, runtime: Runtime | None = None) -> None:
        self.port = port
        self.runtime = runtime
        self.data_path = directory / self.name
        self.log_path = directory / "logs" / f"{self.name}.log"
        self._pid_path = directory / f"{self.name}.pid"
        self._lock_path = directory / f"{self.name}.lock"
        self._supervisor: subprocess.Popen[bytes] | None = None

    # -- state

    @property
    def pid(self) -> int | None:
        """The running server's process id."""
        process = self._process()
        return process.pid if process else None

    @property
    def running(self) -> bool:
        return self._process() is not None

    @property
    def crashed(self) -> bool:
        """Whether the server ended without being asked to."""
        return self._pid_path.exists() and not self.running

    def _process(self) -> psutil.Process | None:
        record = PidFile.read(self._pid_path)
        return record.server.alive() if record else None

    # -- life

    def check_port(self) -> None:
        """Raise `ConfigurationError` when another program has the port."""
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, self.port))
            except OSError as error:
                raise ConfigurationError(
                    f"{self.port_setting}: port {self.port} of {HOST} cannot be used ({error.strerror}); "
                    f"stop the program that has it, or set {self.port_setting} to a free port"
                ) from error

    def start(self) -> None:
        """Start the server on its data; returns when its process is there, `wait_ready` waits for more.

        Raises `ConfigurationError` when the port is taken, `PermanentError` when it is running already.
        """
        if self.running:
            raise PermanentError(f"{self.name} is already running (pid {self.pid})")
        self._end_supervisor()
        self.check_port()
        for path in (self.data_path, self.log_path.parent):
            path.mkdir(parents=True, exist_ok=True)
        order = Order(
            name=self.name,
            command=self._command(),
            environment=without_secrets(os.environ) | self._secrets(),
            port=self.port,
            log_path=str(self.log_path),
            pid_path=str(self._pid_path),
            lock_path=str(self._lock_path),
            stop_timeout_s=self.stop_timeout_s,
        )
        self._pid_path.unlink(missing_ok=True)
        self._supervisor = _spawn(order)
        if not self._pid_path.exists():
            code = self._supervisor.wait()
            self._end_supervisor()
            if code == supervisor.EXIT_LOCKED:
                raise PermanentError(f"{self.name}: another process has its data open ({self.data_path})")
            raise PermanentError(f"{self.name} could not be started{self._log_tail()}")

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return when the server answers a real request; `PermanentError` when it died or is too slow."""
        deadline = time.monotonic() + timeout_s
        while not self._answers():
            process = self._process()
            if process is None or psutil.wait_procs([process], timeout=_PROBE_PAUSE_S)[0]:
                raise PermanentError(f"{self.name} is not running (any more){self._log_tail()}")
            if time.monotonic() > deadline:
                raise PermanentError(f"{self.name} did not answer within {timeout_s:g} s{self._log_tail()}")

    def detach(self) -> None:
        """Let the server outlive this process."""
        if self._supervisor is not None and self._supervisor.stdin is not None:
            with suppress(BrokenPipeError):
                self._supervisor.stdin.write(b"detach\n")
                self._supervisor.stdin.close()
            self._supervisor.stdin = None

    def stop(self) -> None:
        """Stop gracefully, whoever started it; nothing happens when it is not running."""
        record = PidFile.read(self._pid_path)
        process = record.supervisor.alive() if record else None
        if process is not None:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        self._end_supervisor()
        self.kill()  # a server whose supervisor is gone, where the kernel did not take it along
        self._pid_path.unlink(missing_ok=True)

    def kill(self) -> None:
        """SIGKILL, as an out-of-memory killer would; returns when the process is gone."""
        process = self._process()
        if process is None:
            return
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
        psutil.wait_procs([process], timeout=10)
        self._end_supervisor()

    def _end_supervisor(self) -> None:
        """Wait for the supervisor's end; one that this process started loses its lifeline."""
        if self._supervisor is not None:
            if self._supervisor.stdin is not None:
                self._supervisor.stdin.close()
            self._supervisor.wait()
            self._supervisor = None
        record = PidFile.read(self._pid_path)
        keeper = record.supervisor.alive() if record else None
        if keeper is not None:
            psutil.wait_procs([keeper], timeout=self.stop_timeout_s + 5)

    def _log_tail(self, lines: int = 8) -> str:
        try:
            tail = self.log_path.read_text(errors="replace").splitlines()[-lines:]
        except FileNotFoundError:
            tail = []
        if shutil.disk_usage(self.log_path.parent).free < FULL_BELOW_BYTES:
            tail.append("the disk is full")
        return "".join(f"\n    {line}" for line in [f"see {self.log_path}", *tail])

    # -- what subclasses say

    @abstractmethod
    def _command(self) -> list[str]:
        """What starts it, with its arguments."""

    def _secrets(self) -> dict[str, str]:
        return {}

    @abstractmethod
    def _answers(self) -> bool:
        """Whether it answers a real request."""

    def _installed(self) -> Runtime:
        if self.runtime is None:
            raise PermanentError(f"{self.name} is not installed; install() comes first")
        return self.runtime


class Kafka(Server):
    """Apache Kafka, one node, broker and controller in one process (KRaft)."""

    name = "kafka"
    port_setting = "KAFKA_PORT"

    def __init__(
        self, directory: Path, port: int, runtime: Runtime | None = None, security: Security | None = None
    ) -> None:
        super().__init__(directory, port, runtime)
        self._security = security
        self._user_is_known = False
        self.internal_port = 0  # where it asks for a certificate; chosen at each start

    def _command(self) -> list[str]:
        runtime = self._installed()
        properties = self._write_configuration()
        java = [str(runtime.java), "-cp", os.pathsep.join(map(str, runtime.kafka_jars))]
        java += [f"-Dlog4j2.configurationFile={self.data_path / 'log4j2.yaml'}"]
        if not (self.data_path / "log" / "meta.properties").exists():
            self._format(java, properties)
        # Kafka's own libraries do what Java warns about at length.
        java += ["--sun-misc-unsafe-memory-access=allow", "--enable-native-access=ALL-UNNAMED"]
        # The first compiler only: measured as fast for a broker of this size, and a start costs 30 % less.
        java += ["-XX:TieredStopAtLevel=1", "-Xmx512m", "-Xms128m"]
        return [*java, "kafka.Kafka", str(properties)]

    def _format(self, java: list[str], properties: Path) -> None:
        cluster = urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=").replace("-", "A")
        command = [*java, "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "kafka.tools.StorageTool"]
        command += ["format", "--cluster-id", cluster, "--config", str(properties), "--ignore-formatted"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode != 0:
            raise PermanentError(f"formatting Kafka's storage failed: {(done.stderr or done.stdout).strip()}")

    def _write_configuration(self) -> Path:
        settings = self._listeners() | {
            "process.roles": "broker,controller",
            "node.id": 1,
            "controller.listener.names": "CONTROLLER",
            "log.dirs": self.data_path / "log",
            "auto.create.topics.enable": "false",
            # A broker that was killed may come back only after its old session has ended (9 s by default).
            "broker.session.timeout.ms": 2000,
            "broker.heartbeat.interval.ms": 300,
            # A single broker, and consumers that join at once, whatever the group's protocol.
            "group.initial.rebalance.delay.ms": 0,
            "group.consumer.min.heartbeat.interval.ms": 200,
            "group.consumer.heartbeat.interval.ms": 500,
            "group.consumer.min.session.timeout.ms": 6000,
            "group.consumer.session.timeout.ms": 10000,
            "offsets.topic.num.partitions": 4,
            "offsets.topic.replication.factor": 1,
            "transaction.state.log.num.partitions": 4,
            "transaction.state.log.replication.factor": 1,
            "transaction.state.log.min.isr": 1,
            "share.coordinator.state.topic.num.partitions": 4,
            "share.coordinator.state.topic.replication.factor": 1,
            "share.coordinator.state.topic.min.isr": 1,
        }
        path = self.data_path / "server.properties"
        path.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
        (self.data_path / "log4j2.yaml").write_text(json.dumps(_LOG4J, indent=1))  # JSON is YAML
        return path

    def _listeners(self) -> dict[str, str | int]:
        controller = _free_port()
        if self._security is None:
            return {
                "controller.quorum.voters": f"1@{HOST}:{controller}",
                "listeners": f"PLAINTEXT://{HOST}:{self.port},CONTROLLER://{HOST}:{controller}",
                "advertised.listeners": f"PLAINTEXT://{HOST}:{self.port}",
                "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            }
        self.internal_port = _free_port()
        self._user_is_known = False
        keystore = self.data_path / "keystore.pem"
        keystore.touch(mode=0o600)
        keystore.write_text(self._security.server.key.read_text() + self._security.server.certificate.read_text())
        login = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
        return {
            "controller.quorum.voters": f"1@{SERVER_NAME}:{controller}",
            "listeners": f"SASL_SSL://{HOST}:{self.port},INTERNAL://{HOST}:{self.internal_port}"
            f",CONTROLLER://{HOST}:{controller}",
            "advertised.listeners": f"SASL_SSL://{SERVER_NAME}:{self.port}"
            f",INTERNAL://{SERVER_NAME}:{self.internal_port}",
            "listener.security.protocol.map": "SASL_SSL:SASL_SSL,INTERNAL:SSL,CONTROLLER:SSL",
            "inter.broker.listener.name": "INTERNAL",
            "listener.name.internal.ssl.client.auth": "required",
            "listener.name.controller.ssl.client.auth": "required",
            "listener.name.sasl_ssl.sasl.enabled.mechanisms": "SCRAM-SHA-512",
            "listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config": login,
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(keystore),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(self._security.authority.certificate),
        }

    @property
    def speaks_tls(self) -> bool:
        """Whether it does, or did when it ran last."""
        try:
            return "SASL_SSL://" in (self.data_path / "server.properties").read_text(encoding="utf-8")
        except FileNotFoundError:
            return False

    def _answers(self) -> bool:
        if self._security is None:
            return _lists_topics(_client(f"{HOST}:{self.port}"))
        if not self._user_is_known:
            self._user_is_known = self._introduce_user(self._security)
        return self._user_is_known and _lists_topics(
            _client(
                f"{SERVER_NAME}:{self.port}",
                **{
                    "security.protocol": "SASL_SSL",
                    "ssl.ca.location": str(self._security.authority.certificate),
                    "sasl.mechanism": "SCRAM-SHA-512",
                    "sasl.username": self._security.username,
                    "sasl.password": self._security.password,
                },
            ),
            _HANDSHAKE_S,
        )

    def _introduce_user(self, security: Security) -> bool:
        """Tell the broker the user and its password, which may be another than at the last start."""
        admin = _client(
            f"{SERVER_NAME}:{self.internal_port}",
            **{
                "security.protocol": "SSL",
                "ssl.ca.location": str(security.authority.certificate),
                "ssl.certificate.location": str(security.server.certificate),
                "ssl.key.location": str(security.server.key),
            },
        )
        if not _lists_topics(admin, _HANDSHAKE_S):
            return False
        credential = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
        change = UserScramCredentialUpsertion(security.username, credential, security.password.encode())
        with suppress(KafkaException):
            for done in admin.alter_user_scram_credentials([change], request_timeout=5).values():
                done.result()
            return True
        return False


_LOG4J = {
    "Configuration": {
        "status": "ERROR",
        "shutdownHook": "disable",
        "Appenders": {
            "Console": {
                "name": "log",
                "target": "SYSTEM_OUT",
                "PatternLayout": {"pattern": "%d{ISO8601_OFFSET_DATE_TIME_HHCMM} %-5p %m (%c)%n"},
            }
        },
        "Loggers": {
            "Root": {"level": "WARN", "AppenderRef": [{"ref": "log"}]},
            "Logger": [{"name": "kafka.server.KafkaRaftServer", "level": "INFO"}],
        },
    }
}


class TimescaleDB(Server):
    """PostgreSQL with TimescaleDB compiled to WebAssembly, behind our gateway (gateway/main.mjs)."""

    name = "timescaledb"
    port_setting = "POSTGRE_PORT"

    def __init__(
        self,
        directory: Path,
        port: int,
        user: str,
        password: str,
        dbname: str,
        runtime: Runtime | None = None,
        security: Security | None = None,
    ) -> None:
        super().__init__(directory, port, runtime)
        self._user, self._password, self._dbname = user, password, dbname
        self._security = security

    def _command(self) -> list[str]:
        runtime = self._installed()
        template = runtime.gateway.parents[1] / "cluster"
        arguments = [f"--port={self.port}", f"--data={self.data_path}", f"--template={template}"]
        arguments += [f"--user={self._user}", f"--database={self._dbname}"]
        if self._security is not None:
            server = self._security.server
            arguments += [f"--certificate={server.certificate}", f"--key={server.key}"]
            arguments += [f"--authority={self._security.authority.certificate}"]
        # V8's own stack: deep enough that PostgreSQL notices its depth first, within the usual limit of 8 MB.
        return [str(runtime.node), "--stack-size=6000", str(runtime.gateway), *arguments]

    def _secrets(self) -> dict[str, str]:
        return {"GATEWAY_PASSWORD": self._password}

    def _answers(self) -> bool:
        arguments: dict[str, Any] = {"host": HOST}
        if self._security is not None:
            ca = str(self._security.authority.certificate)
            arguments = {"host": SERVER_NAME, "sslmode": "verify-full", "sslrootcert": ca}
        try:
            with psycopg.connect(
                **arguments,
                port=self.port,
                user=self._user,
                password=self._password,
                dbname=self._dbname,
                connect_timeout=2,
                autocommit=True,
            ) as connection:
                return connection.execute("SELECT 1").fetchone() == (1,)
        except psycopg.OperationalError:
            return False


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for servers: they need none of our settings, and nobody's passwords."""
    return {
        name: value
        for name, value in environment.items()
        if name.lower() not in Settings.model_fields and not SECRET.search(name)
    }


def _free_port() -> int:
    with socket.socket() as free:
        free.bind((HOST, 0))
        return int(free.getsockname()[1])


def _client(address: str, **security: str) -> AdminClient:
    settings: dict[str, str | int | float | bool] = {
        "bootstrap.servers": address,
        "reconnect.backoff.max.ms": 100,
        "log_level": 0,
        **security,
    }
    return AdminClient(settings, logger=_quiet)


def _lists_topics(admin: AdminClient, within_s: float = 0.5) -> bool:
    try:
        return bool(admin.list_topics(timeout=within_s).brokers)
    except KafkaException:
        return False


def _spawn(order: Order) -> subprocess.Popen[bytes]:
    """Start a supervisor; returns when it has started its server, or has ended."""
    with Path(order.log_path).open("ab") as log:
        process = subprocess.Popen(  # noqa: S603 - our own file
            [sys.executable, str(_SUPERVISOR)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
    if process.stdin is not None and process.stdout is not None:
        process.stdin.write(json.dumps(asdict(order)).encode() + b"\n")
        process.stdin.flush()
        with process.stdout as answer:
            answer.read()
    return process
