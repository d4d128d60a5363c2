"""``sensor-pipeline logins``: who may log in afterwards, and that no password is ever told."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest
from pydantic import SecretStr

from services.core.config import LOGINS, Settings
from services.core.database import connect
from services.core.errors import ConfigurationError
from services.core.logins import let_in, settings_as
from services.core.shutdown import Shutdown
from tests.fix_proxy import ENCRYPTION_REQUESTS, Proxy
from tests.fix_services import StartService, run_cli, wait_until
from tests.fix_stack import downgrade, free_port, upgrade

pytestmark = pytest.mark.without_topics

PASSWORD = "sesame, and 'more' \\"


@pytest.fixture
def nobody(connection: psycopg.Connection) -> Iterator[None]:
    """Nobody may log in, before and after."""
    yield
    for login in LOGINS:
        connection.execute(f"ALTER ROLE {login} NOLOGIN PASSWORD NULL")


def with_passwords(settings: Settings, password: str = PASSWORD, logins: tuple[str, ...] = LOGINS) -> Settings:
    """The settings with a password for each login that ends with the login's name."""
    return settings.model_copy(update={f"{login}_password": SecretStr(password + login) for login in logins})


def may_log_in(settings: Settings, login: str) -> bool:
    """Whether the login gets in with its password of the settings, as itself."""
    try:
        with connect(settings_as(login, settings)) as connection:
            return connection.execute("SELECT current_user").fetchone() == (login,)
    except ConfigurationError:
        return False


@pytest.mark.usefixtures("nobody")
def test_each_logs_in_with_its_own_password_and_the_next_replaces_it(settings: Settings) -> None:
    first, second = with_passwords(settings), with_passwords(settings, "another")
    assert not any(may_log_in(first, login) for login in LOGINS)
    assert let_in(first, Shutdown()) == list(LOGINS)
    assert all(may_log_in(first, login) for login in LOGINS)
    swapped = first.model_copy(update={"sensor_etl_password": first.sensor_consumer_password})
    assert not may_log_in(swapped, "sensor_etl")
    assert let_in(second, Shutdown()) == list(LOGINS)
    assert not any(may_log_in(first, login) for login in LOGINS)
    assert all(may_log_in(second, login) for login in LOGINS)


@pytest.mark.usefixtures("nobody")
def test_what_is_not_set_is_left_alone(settings: Settings) -> None:
    let_in(with_passwords(settings), Shutdown())
    other = with_passwords(settings, "another", ("sensor_etl",))
    assert let_in(other, Shutdown()) == ["sensor_etl"]
    assert may_log_in(other, "sensor_etl")
    assert may_log_in(with_passwords(settings), "sensor_consumer")


@pytest.mark.usefixtures("nobody")
def test_no_password_is_sent_to_the_server(settings: Settings, proxied: Settings, proxy: Proxy) -> None:
    """What it never gets it cannot write into its log."""
    tapped = with_passwords(proxied).model_copy(update={"postgre_sslmode": "disable"})
    clear = [proxy.cut_at(text.encode()) for text in (PASSWORD, "sesame")]
    let_in(tapped, Shutdown())
    assert not any(cut.done.is_set() for cut in clear)
    assert all(may_log_in(with_passwords(settings), login) for login in LOGINS)


@pytest.mark.usefixtures("nobody")
def test_the_command_prints_names_and_takes_files(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "password").write_text(PASSWORD + "sensor_etl\n", encoding="utf-8")
    done = run_cli(settings, "logins", SENSOR_ETL_PASSWORD="wrong", SENSOR_ETL_PASSWORD_FILE=str(tmp_path / "password"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "these roles may log in: sensor_etl\n", "")
    assert may_log_in(with_passwords(settings), "sensor_etl")
    done = run_cli(settings, "logins")
    assert (done.returncode, done.stdout) == (0, "no SENSOR_*_PASSWORD is set: nothing was changed\n")


@pytest.mark.usefixtures("nobody")
def test_migrate_lets_them_in_too(settings: Settings) -> None:
    done = run_cli(settings, "migrate", LOG_LEVEL="WARNING", SENSOR_ETL_PASSWORD=PASSWORD + "sensor_etl")
    assert (done.returncode, done.stdout) == (0, "these roles may log in: sensor_etl\n"), done.stderr
    assert may_log_in(with_passwords(settings), "sensor_etl")
    assert run_cli(settings, "migrate").stdout == ""


@pytest.mark.usefixtures("nobody")
def test_who_may_not_is_told_what_to_run(settings: Settings) -> None:
    let_in(with_passwords(settings), Shutdown())
    etl = settings_as("sensor_etl", with_passwords(settings))
    done = run_cli(
        etl, "logins", SENSOR_CONSUMER_PASSWORD="another", SENSOR_ETL_PASSWORD="", SENSOR_GRAFANA_PASSWORD=""
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert line == (
        "error: sensor_etl may not let sensor_consumer log in; in psql, as a superuser: "
        "ALTER ROLE sensor_consumer LOGIN; \\password sensor_consumer"
    )
    assert may_log_in(with_passwords(settings), "sensor_consumer")


def test_before_the_migrations_nothing_is_changed(settings: Settings) -> None:
    downgrade(settings)
    try:
        with pytest.raises(
            ConfigurationError, match=r"^there is no role sensor_\w+, .*: run sensor-pipeline migrate first$"
        ):
            let_in(with_passwords(settings), Shutdown())
    finally:
        upgrade(settings)


@pytest.mark.usefixtures("nobody")
def test_the_dashboard_logs_in_as_its_own_role(settings: Settings, start: StartService) -> None:
    """Although POSTGRE_PASSWORD would not let it in."""
    let_in(with_passwords(settings), Shutdown())
    own = with_passwords(settings, logins=("sensor_dashboard",))
    page = start(
        "dashboard",
        "--port",
        str(free_port()),
        settings=own.model_copy(update={"postgre_password": SecretStr("wrong")}),
    )
    wait_until(lambda: "http://" in page.log_path.read_text(encoding="utf-8"), "the page is served")


class Impostor:
    """Answers for PostgreSQL, asks for the password in clear text, and keeps what it is told."""

    def __init__(self) -> None:
        self.heard = b""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        client, _ = self._listener.accept()
        with client:
            while self._is_request_for_encryption(client):
                client.sendall(b"N")
            client.sendall(b"R" + struct.pack("!II", 8, 3))
            client.settimeout(10)
            with suppress(OSError):
                while more := client.recv(4096):
                    self.heard += more

    @staticmethod
    def _is_request_for_encryption(client: socket.socket) -> bool:
        (length,) = struct.unpack("!I", client.recv(4, socket.MSG_WAITALL))
        (code,) = struct.unpack("!I", client.recv(length - 4, socket.MSG_WAITALL)[:4])
        return code in ENCRYPTION_REQUESTS

    def close(self) -> None:
        """What was heard is complete."""
        self._thread.join(10)
        self._listener.close()


def test_who_answers_for_the_server_is_not_told_the_password(settings: Settings) -> None:
    impostor = Impostor()
    with pytest.raises(ConfigurationError, match="requests the password in clear text: set POSTGRE_SSLMODE"):
        connect(settings.model_copy(update={"postgre_host": "127.0.0.1", "postgre_port": impostor.port}))
    impostor.close()
    assert settings.postgre_password.get_secret_value().encode() not in impostor.heard
