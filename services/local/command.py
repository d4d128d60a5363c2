"""``sensor-pipeline local up | down | status``."""

from __future__ import annotations

from pathlib import Path

from services.core.config import Settings
from services.core.errors import ConfigurationError
from services.local.runtime import make_writable
from services.local.security import Security, secure
from services.local.stack import Stack, StackOptions


def stack_options(settings: Settings, directory: Path, security: Security | None = None) -> StackOptions:
    """The stack that the settings point at, with its data below ``directory``."""
    return StackOptions(
        directory=directory,
        kafka_port=settings.kafka_port,
        postgre_port=settings.postgre_port,
        postgre_user=settings.postgre_user,
        postgre_password=settings.secret("postgre_password"),
        postgre_dbname=settings.postgre_dbname,
        security=security,
    )


def run(settings: Settings, action: str, directory: Path, *, tls: bool) -> int:
    """Start both servers, stop them, or say how they are. ``status`` returns 1 unless both are running.

    Raises ConfigurationError where servers run already that do not speak TLS, or do, unlike what is asked for.
    """
    stack = Stack(stack_options(settings, directory), report=print)
    if action == "up":
        make_writable(directory)
        if stack.kafka.running and stack.kafka.speaks_tls != tls:
            raise ConfigurationError(
                f"the servers in {directory.resolve()} are running {'without' if tls else 'with'} TLS: "
                "stop them first (sensor-pipeline local down)"
            )
        security = secure((directory / "tls").resolve(), settings) if tls else None
        Stack(stack_options(settings, directory, security), report=print).up(detach=True)
        if security is not None:
            print(f"what clients need is in {security.directory / 'client.env'}: add its lines to .env")  # noqa: T201
        return 0
    if action == "down":
        stack.down()
        return 0
    if not any(server.data_path.exists() for server in stack.servers):
        print(f"no servers were ever started in {directory.resolve()}: the local stack is that of a directory")  # noqa: T201
    for server in stack.servers:
        pid = f"pid {server.pid}" if server.pid else "no process"
        print(f"{server.name:12} {server.state:8} {pid}, port {server.port}, log {server.log_path}")  # noqa: T201
    return 0 if all(server.state == "running" for server in stack.servers) else 1
