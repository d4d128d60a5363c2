"""A local stack that speaks TLS only, and what its clients need.

Kafka takes users and passwords over TLS (SASL_SSL, SCRAM-SHA-512); it talks to itself, and we to it before there
are users, on a listener that asks for a certificate. PostgreSQL takes its passwords over TLS; who shows a
certificate too must show its own.
"""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from services.core.config import Settings
from services.local.certificates import Authority, Pair

SERVER_NAME = "localhost"  # what the servers' certificate is for: clients that verify it must use this name
USERNAME = "sensor-pipeline"


@dataclass(frozen=True, slots=True)
class Security:
    """Certificates and the Kafka user of one stack."""

    directory: Path
    authority: Authority
    server: Pair
    username: str
    password: str = field(repr=False)

    def client_settings(self) -> dict[str, str]:
        """The settings of a client, by name; the password's file among them."""
        return {
            "kafka_host": SERVER_NAME,
            "kafka_security_protocol": "SASL_SSL",
            "kafka_sasl_mechanism": "SCRAM-SHA-512",
            "kafka_sasl_username": self.username,
            "kafka_sasl_password_file": str(self.directory / "kafka-password"),
            "kafka_ssl_ca_location": str(self.authority.certificate),
            "postgre_host": SERVER_NAME,
            "postgre_sslmode": "verify-full",
            "postgre_sslrootcert": str(self.authority.certificate),
        }

    def applied_to(self, settings: Settings) -> Settings:
        """The settings of a client of this stack."""
        return settings.model_copy(update=self.client_settings())


def secure(directory: Path, settings: Settings) -> Security:
    """Make what is missing in the directory; the Kafka user is the one of the settings, if they name one."""
    authority = Authority(directory)
    password_file = directory / "kafka-password"
    if settings.kafka_sasl_password_file == str(password_file):  # by lines of client.env in .env; it may be gone
        settings = settings.model_copy(update={"kafka_sasl_password_file": ""})
    password = settings.secret("kafka_sasl_password")
    if not password:
        password = password_file.read_text(encoding="utf-8") if password_file.exists() else secrets.token_urlsafe(24)
    password_file.touch(mode=0o600)
    password_file.write_text(password, encoding="utf-8")
    server = authority.issue("server", SERVER_NAME, host=SERVER_NAME)
    security = Security(directory, authority, server, settings.kafka_sasl_username or USERNAME, password)
    write_settings(directory / "client.env", security.client_settings())
    return security


def write_settings(path: Path, values: Mapping[str, str]) -> Path:
    """Write settings as lines of .env that a shell reads too."""
    path.touch(mode=0o600)
    path.write_text("".join(f"{name.upper()}={shlex.quote(value)}\n" for name, value in values.items()), "utf-8")
    return path
