"""``sensor-pipeline local up | down | status``."""

from __future__ import annotations

from pathlib import Path

from services.core.config import Settings
from services.core.errors import ConfigurationError
from services.local.runtime import make_writable, say
from services.local.security import secure
from services.local.stack import Stack


def run(settings: Settings, action: str, directory: Path, *, tls: bool) -> int:
    """Start both servers, stop them, or say how they are. ``status`` returns 1 unless both are running.

    Raises ConfigurationError where servers run already that do not speak TLS, or do, unlike what is asked for.
    """
    stack = Stack(directory, settings, report=say)
    if action == "up":
        _up(stack, settings, tls=tls)
        return 0
    if action == "down":
        stack.down()
        return 0
    if not any(server.data_path.exists() for server in stack.servers):
        say(f"no servers were ever started in {stack.directory}: each directory has a local stack of its own")
    for server in stack.servers:
        pid = f"pid {server.pid}" if server.pid else "no process"
        say(f"{server.name:12} {server.state:8} {pid}, port {server.port}, log {server.log_path}")
    return 0 if all(server.state == "running" for server in stack.servers) else 1


def _up(stack: Stack, settings: Settings, *, tls: bool) -> None:
    make_writable(stack.directory)
    if stack.kafka.running and stack.kafka.speaks_tls != tls:
        raise ConfigurationError(
            f"the servers in {stack.directory} are running {'without' if tls else 'with'} TLS: "
            "stop them first (sensor-pipeline local down)"
        )
    security = secure(stack.directory / "tls", settings) if tls else None
    Stack(stack.directory, settings, security, say).up(detach=True)
    if security is not None:
        say(f"settings for clients are in {security.directory / 'client.env'}: add its lines to .env")
