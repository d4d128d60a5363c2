"""Who asks for /metrics, and how: slowly, too often, or by a name of somebody else's."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from services.core import health
from services.core.health import HealthServer, Page
from tests.fix_stack import free_port
from tests.measured import make_settings


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HealthServer]:
    monkeypatch.setattr(health, "REQUEST_TIMEOUT_S", 1.0)
    settings = make_settings(metrics_port=free_port())
    with HealthServer(settings, {"/metrics": lambda: Page(b"fine\n")}) as server:
        yield server


def ask(server: HealthServer, host: str) -> bytes:
    with socket.create_connection(server.server_address, timeout=10) as connection:  # type: ignore[arg-type]
        connection.sendall(f"GET /metrics HTTP/1.0\r\n{host}\r\n".encode())
        return b"".join(iter(lambda: connection.recv(4096), b""))


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("", 200),
        ("Host: localhost:8000\r\n", 200),
        ("Host: 127.0.0.1\r\n", 200),
        ("Host: [::1]:8000\r\n", 200),
        ("Host: elsewhere.example:8000\r\n", 403),
        ("Host: localhost.elsewhere.example\r\n", 403),
        ("Host: 10.0.0.1\r\n", 403),
        ("Host: :\r\n", 403),
    ],
)
def test_on_loopback_only_this_machine_is_asked_for(server: HealthServer, host: str, status: int) -> None:
    """A page of elsewhere.example may have given that name our address."""
    answer = ask(server, host)
    assert answer.startswith(f"HTTP/1.0 {status} ".encode())
    assert (b"fine" in answer) == (status == 200)
    assert b"Python" not in answer


def test_on_a_network_any_name_may_be_used() -> None:
    settings = make_settings(metrics_host="0.0.0.0", metrics_port=free_port())  # noqa: S104
    with HealthServer(settings, {"/metrics": lambda: Page(b"fine\n")}) as server:
        assert b"fine" in ask(server, "Host: consumer.example\r\n")


def test_who_is_slow_is_cut_off_and_keeps_nobody_waiting(server: HealthServer) -> None:
    """A byte now and then would keep a time limit for each byte from ever being reached."""
    began = time.monotonic()
    with socket.create_connection(server.server_address, timeout=10) as slow:  # type: ignore[arg-type]
        stop = threading.Event()

        def drip() -> None:
            while not stop.wait(0.1):
                try:
                    slow.sendall(b"G")
                except OSError:
                    return

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            assert b"fine" in ask(server, "")
            slow.settimeout(10)
            assert slow.recv(1024) in (b"",)
        except ConnectionResetError:
            pass
        finally:
            stop.set()
            dripping.join()
    assert time.monotonic() - began < 5


def test_of_many_at_once_some_are_refused_and_then_all_is_well(server: HealthServer) -> None:
    address = server.server_address
    many = [socket.create_connection(address, timeout=10) for _ in range(3 * health.MAX_REQUESTS)]  # type: ignore[arg-type]
    assert threading.active_count() < 3 * health.MAX_REQUESTS
    for connection in many:
        connection.close()
    for _ in range(100):
        try:
            if b"fine" in ask(server, ""):
                return
        except OSError:
            pass
        threading.Event().wait(0.05)
    pytest.fail("it never recovered")
