"""Apache Kafka as a process of this machine."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import uuid
from base64 import urlsafe_b64encode
from contextlib import suppress
from pathlib import Path

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, ScramCredentialInfo, ScramMechanism, UserScramCredentialUpsertion

from services.core.errors import PermanentError
from services.core.kafka import ClientSettings
from services.local.runtime import install
from services.local.security import SERVER_NAME, Security
from services.local.servers import HOST, Server, free_port

HANDSHAKE_S = 2.0  # the first ones of a Java that has just started take their time

_quiet = logging.getLogger("services.local.probe")
_quiet.addHandler(logging.NullHandler())
_quiet.propagate = False


class KafkaProcess(Server):
    """Apache Kafka, one node, broker and controller in one process (KRaft)."""

    name = "kafka"
    port_setting = "KAFKA_PORT"

    def __init__(self, directory: Path, port: int, security: Security | None = None) -> None:
        super().__init__(directory, port)
        self._security = security
        self.internal_port = 0  # where it asks for a certificate; chosen at each start

    def _command(self) -> list[str]:
        runtime = install()
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
        controller = free_port()
        if self._security is None:
            return {
                "controller.quorum.voters": f"1@{HOST}:{controller}",
                "listeners": f"PLAINTEXT://{HOST}:{self.port},CONTROLLER://{HOST}:{controller}",
                "advertised.listeners": f"PLAINTEXT://{HOST}:{self.port}",
                "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            }
        return self._secure_listeners(self._security, controller)

    def _secure_listeners(self, security: Security, controller: int) -> dict[str, str | int]:
        self.internal_port = free_port()
        keystore = self.data_path / "keystore.pem"
        keystore.touch(mode=0o600)
        keystore.write_text(security.server.key.read_text() + security.server.certificate.read_text())
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
            "ssl.truststore.location": str(security.authority.certificate),
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
            return _lists_topics(_client(f"{HOST}:{self.port}", {}))
        if not self._introduce_user(self._security):
            return False
        login = {
            "security.protocol": "SASL_SSL",
            "ssl.ca.location": str(self._security.authority.certificate),
            "sasl.mechanism": "SCRAM-SHA-512",
            "sasl.username": self._security.username,
            "sasl.password": self._security.password,
        }
        return _lists_topics(_client(f"{SERVER_NAME}:{self.port}", login), HANDSHAKE_S)

    def _introduce_user(self, security: Security) -> bool:
        """Tell the broker the user and its password, which may have changed since the last start."""
        certificate = {
            "security.protocol": "SSL",
            "ssl.ca.location": str(security.authority.certificate),
            "ssl.certificate.location": str(security.server.certificate),
            "ssl.key.location": str(security.server.key),
        }
        admin = _client(f"{SERVER_NAME}:{self.internal_port}", certificate)
        if not _lists_topics(admin, HANDSHAKE_S):
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


def _client(address: str, security: dict[str, str]) -> AdminClient:
    settings: ClientSettings = {"bootstrap.servers": address, "reconnect.backoff.max.ms": 100, "log_level": 0}
    return AdminClient(settings | security, logger=_quiet)


def _lists_topics(admin: AdminClient, timeout_s: float = 0.5) -> bool:
    try:
        return bool(admin.list_topics(timeout=timeout_s).brokers)
    except KafkaException:
        return False
