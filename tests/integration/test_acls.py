"""Each service and command with exactly the rights in Kafka that docs/security.md lists for it, and no others."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)
from pydantic import SecretStr

from services.core.config import Settings
from services.core.kafka import client_settings, read_topic
from services.local.kafka import KafkaProcess
from tests.fix_services import message, minutes, publish, run_cli
from tests.fix_stack import ROOT, free_port

KINDS = {
    "topic": ResourceType.TOPIC,
    "group": ResourceType.GROUP,
    "transactional id": ResourceType.TRANSACTIONAL_ID,
    "cluster": ResourceType.BROKER,
}


def listed() -> list[tuple[str, str, list[str], bool, list[str]]]:
    """The table: who, which kind of resource, its names, whether they are prefixes, which operations."""
    page = (ROOT / "docs/security.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| service \| resource \| operations \|\n\|.*\n((?:\|.*\n)+)", page, re.MULTILINE)
    rows, services = [], ""
    for line in table.splitlines():
        who, resource, operations = (cell.strip() for cell in line.strip("|").split("|"))
        services = who or services
        kind, prefixed, names = re.fullmatch(r"(\w[a-z ]*?)s?( beginning with)?((?: `[^`]+`,?)*)", resource).groups()  # type: ignore[union-attr]
        for service in services.split(", "):
            found = re.findall("`([^`]+)`", names) or ["kafka-cluster"]
            rows.append((service.strip("`"), kind, found, bool(prefixed), operations.split(", ")))
    return rows


ROWS = listed()
USERS = {service: service.replace(" ", "-") for service, *_ in ROWS}


class Guarded(KafkaProcess):
    """A broker that asks for users and rights on one port, and believes everybody on the other."""

    guarded_port = 0

    def _listeners(self) -> dict[str, str | int]:
        self.guarded_port = free_port()
        plain = super()._listeners()
        users = " ".join(f'user_{user}="{user}"' for user in USERS.values())
        module = "org.apache.kafka.common.security.plain.PlainLoginModule"
        return plain | {
            "listeners": f"{plain['listeners']},GUARDED://127.0.0.1:{self.guarded_port}",
            "advertised.listeners": f"{plain['advertised.listeners']},GUARDED://127.0.0.1:{self.guarded_port}",
            "listener.security.protocol.map": f"{plain['listener.security.protocol.map']},GUARDED:SASL_PLAINTEXT",
            "sasl.enabled.mechanisms": "PLAIN",
            "listener.name.guarded.plain.sasl.jaas.config": f"{module} required {users};",
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS",
        }


@pytest.fixture
def guarded(tmp_path: Path, settings: Settings) -> Iterator[tuple[Settings, int]]:
    """Settings for somebody whom the broker believes, and the port where it does not."""
    broker = Guarded(tmp_path, free_port())
    broker.start()
    try:
        broker.wait_ready()
        yield settings.model_copy(update={"kafka_host": "127.0.0.1", "kafka_port": broker.port}), broker.guarded_port
    finally:
        broker.kill()


def allow(settings: Settings) -> None:
    """Give everybody what the table says."""
    bindings = [
        AclBinding(
            KINDS[kind],
            settings.kafka_group if name == "KAFKA_GROUP" else name.replace("sensor_data", settings.kafka_topic),
            ResourcePatternType.PREFIXED if prefixed else ResourcePatternType.LITERAL,
            f"User:{USERS[service]}",
            "*",
            AclOperation[re.sub(r"(?<=[a-z])(?=[A-Z])", "_", operation).upper()],
            AclPermissionType.ALLOW,
        )
        for service, kind, names, prefixed, operations in ROWS
        for name in names
        for operation in operations
    ]
    admin = AdminClient(client_settings(settings, "test"))
    for created in admin.create_acls(bindings).values():
        created.result()


@pytest.mark.slow
def test_the_listed_rights_are_enough(guarded: tuple[Settings, int], connection: psycopg.Connection) -> None:
    trusted, port = guarded
    allow(trusted)

    def acting_as(service: str) -> Settings:
        access = {
            "kafka_port": port,
            "kafka_security_protocol": "SASL_PLAINTEXT",
            "kafka_sasl_mechanism": "PLAIN",
            "kafka_sasl_username": USERS[service],
            "kafka_sasl_password": SecretStr(USERS[service]),
        }
        return trusted.model_copy(update=access)

    def run(service: str, *arguments: str, code: int = 0) -> str:
        done = run_cli(acting_as(service), *arguments)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    run("producer", "produce")
    publish(
        trusted, [message(time=minutes(0), temperature=1.0), message(time=minutes(10**8), temperature=1.0)], partition=0
    )
    run("consumer", "consume", "--until-caught-up")
    row = connection.execute("SELECT count(*) FROM sensor_data").fetchone()
    assert row == (26_115,)
    seen = json.loads(run("status", "status", "--json", code=1))["kafka"]  # somebody has to look at the dead letter
    assert (seen["lag"], seen["dead_letters"]["reasons"]) == (0, {"future_time": 1})
    assert "future_time" in run("dead-letters list", "dead-letters", "list")
    for _ in range(5):  # the library's question about a group, which nobody may ask, is answered sooner or later
        assert len(list(read_topic(acting_as("dead-letters list"), trusted.dead_letter_topic, 0, 0, 2))) == 1
    assert "1 dead letters sent" in run("dead-letters replay", "dead-letters", "replay")
    assert "partition 0" in run("rewind", "rewind", "--to-beginning")
    run("consumer", "consume", "--until-caught-up")  # which has another dead letter now
    run("dead-letters delete", "dead-letters", "delete", "--up-to", "0")
