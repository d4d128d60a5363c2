"""Real listeners with TLS: who gets in, and the one line that everybody else is told."""

from __future__ import annotations

import shutil
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import psycopg
import pytest
from pydantic import SecretStr

from services.core.config import Settings, load_settings
from services.core.database import connect, connect_at_start
from services.core.errors import ConfigurationError
from services.core.kafka import connect_admin, create_topics
from services.core.shutdown import Shutdown
from services.local.certificates import Authority
from services.local.kafka import KafkaProcess
from services.local.security import Security, secure
from services.local.stack import Stack
from tests.certificates import locked
from tests.fix_services import message, publish, run_cli
from tests.fix_stack import make_stack, upgrade
from tests.measured import make_settings

PASSWORD = "a password that nobody prints"


@pytest.fixture(scope="module")
def security(tmp_path_factory: pytest.TempPathFactory) -> Security:
    given = make_settings(kafka_sasl_password=SecretStr(PASSWORD))
    return secure(tmp_path_factory.mktemp("tls"), given)


@pytest.fixture(scope="module")
def tls_stack(security: Security, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A local stack that speaks TLS only."""
    with make_stack(tmp_path_factory.mktemp("stack"), security) as stack:
        yield stack


@pytest.fixture(scope="module")
def client(tls_stack: Stack, security: Security) -> Settings:
    """The settings of a client that verifies the servers; the tables are there."""
    plain = make_settings(
        kafka_port=tls_stack.kafka.port,
        postgre_port=tls_stack.timescaledb.port,
        startup_timeout_seconds=0,
        log_format="json",
    )
    settings = security.applied_to(plain)
    upgrade(settings)
    return settings


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that the servers do not know."""
    return Authority(tmp_path_factory.mktemp("stranger"))


def changed(settings: Settings, **changes: object) -> Settings:
    return settings.model_copy(update=changes)


def kafka_mistake(settings: Settings, capfd: pytest.CaptureFixture[str]) -> str:
    """The line that the settings give; nothing is printed beside it, not by librdkafka either."""
    capfd.readouterr()
    with pytest.raises(ConfigurationError) as caught:
        connect_admin(settings, Shutdown())
    assert capfd.readouterr() == ("", "")
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"Kafka at {settings.bootstrap_servers}: ")
    return line.partition(f"{settings.bootstrap_servers}: ")[2]


def postgre_mistake(settings: Settings) -> str:
    with pytest.raises(ConfigurationError) as caught:
        connect(settings)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"PostgreSQL at {settings.postgre_host}:{settings.postgre_port}/{settings.postgre_dbname}")
    return line


@pytest.mark.parametrize("protocol", ["PLAINTEXT", "SASL_PLAINTEXT"])
def test_plain_text_to_a_tls_listener_says_what_to_set(
    client: Settings, capfd: pytest.CaptureFixture[str], protocol: str
) -> None:
    assert kafka_mistake(changed(client, kafka_security_protocol=protocol), capfd) == (
        f"it speaks TLS, and KAFKA_SECURITY_PROTOCOL={protocol} is plain text: set SSL or SASL_SSL"
    )


def test_tls_without_the_sasl_that_kafka_asks_for(client: Settings, capfd: pytest.CaptureFixture[str]) -> None:
    assert kafka_mistake(changed(client, kafka_security_protocol="SSL"), capfd) == (
        "something takes connections there, but does not answer to KAFKA_SECURITY_PROTOCOL=SSL (does it ask for SASL?)"
    )


def test_tls_to_a_plain_listener_says_what_to_set(client: Settings, capfd: pytest.CaptureFixture[str]) -> None:
    """PostgreSQL's, which closes the connection as Kafka's would. It may be one that starts, so this one waits."""
    line = kafka_mistake(changed(client, kafka_port=client.postgre_port), capfd)
    assert line.startswith("it does not speak TLS, and KAFKA_SECURITY_PROTOCOL=SASL_SSL does: set PLAINTEXT or SASL_")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"kafka_sasl_password": SecretStr("hunter2"), "kafka_sasl_password_file": ""}, "invalid credentials"),
        ({"kafka_sasl_username": "nobody"}, "invalid credentials"),
        ({"kafka_sasl_mechanism": "SCRAM-SHA-256"}, "Unsupported SASL mechanism"),
    ],
)
def test_a_login_that_kafka_refuses_names_the_settings(
    client: Settings, capfd: pytest.CaptureFixture[str], changes: dict[str, object], expected: str
) -> None:
    settings = changed(client, **changes)
    line = kafka_mistake(settings, capfd)
    assert line.startswith(f"it refuses user {settings.kafka_sasl_username}: ")
    assert expected in line
    assert line.endswith("(check KAFKA_SASL_USERNAME, KAFKA_SASL_PASSWORD and KAFKA_SASL_MECHANISM)")
    assert "hunter2" not in line


@pytest.mark.parametrize(("mechanism", "warned"), [("PLAIN", True), ("SCRAM-SHA-512", False)])
def test_a_password_that_anybody_on_the_way_can_read_is_a_warning(
    client: Settings, caplog: pytest.LogCaptureFixture, mechanism: str, *, warned: bool
) -> None:
    with pytest.raises(ConfigurationError):
        connect_admin(
            changed(client, kafka_security_protocol="SASL_PLAINTEXT", kafka_sasl_mechanism=mechanism), Shutdown()
        )
    assert ("password_in_clear_text" in caplog.messages) == warned


@pytest.mark.slow
def test_what_waiting_cannot_change_is_said_at_once(client: Settings, capfd: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    patient = changed(client, startup_timeout_seconds=40)
    assert "it refuses user" in kafka_mistake(changed(patient, kafka_sasl_username="nobody"), capfd)
    assert "it speaks TLS" in kafka_mistake(changed(patient, kafka_security_protocol="PLAINTEXT"), capfd)
    with pytest.raises(ConfigurationError):
        connect_at_start(changed(patient, postgre_sslmode="disable"), Shutdown())
    assert time.monotonic() - started < 30


def test_a_kafka_that_is_not_to_be_trusted(
    client: Settings, capfd: pytest.CaptureFixture[str], stranger: Authority
) -> None:
    other = changed(client, kafka_ssl_ca_location=str(stranger.certificate))
    assert kafka_mistake(other, capfd) == (
        "its certificate is not to be trusted: unable to get local issuer certificate"
        " (check KAFKA_SSL_CA_LOCATION and KAFKA_HOST)"
    )
    by_address = changed(client, kafka_host="127.0.0.1")
    assert "certificate is not valid for '127.0.0.1'" in kafka_mistake(by_address, capfd)


def test_kafka_takes_our_certificate_and_refuses_a_strangers(
    client: Settings,
    capfd: pytest.CaptureFixture[str],
    tls_stack: Stack,
    security: Security,
    stranger: Authority,
) -> None:
    """Its internal listener asks for one."""
    internal = changed(client, kafka_port=tls_stack.kafka.internal_port, kafka_security_protocol="SSL")
    check = "(check KAFKA_SSL_CERTIFICATE_LOCATION and KAFKA_SSL_KEY_LOCATION)"
    assert kafka_mistake(internal, capfd) == f"it refuses us: tlsv13 alert certificate required {check}"
    for authority in (security.authority, stranger):
        pair = locked(authority.issue("client", "client"), "hunter2")
        settings = changed(
            internal,
            kafka_ssl_certificate_location=str(pair.certificate),
            kafka_ssl_key_location=str(pair.key),
            kafka_ssl_key_password=SecretStr("hunter2"),
        )
        if authority is security.authority:
            connect_admin(settings, Shutdown())
        else:
            line = kafka_mistake(settings, capfd)
            assert line.startswith("it refuses us: ")
            assert line.endswith(check)


def test_a_mistake_in_postgresqls_tls_names_the_settings(client: Settings, stranger: Authority) -> None:
    check = "(check POSTGRE_SSLMODE, POSTGRE_SSLROOTCERT, POSTGRE_SSLCERT, POSTGRE_SSLKEY and POSTGRE_HOST)"
    for changes, expected in (
        ({"postgre_sslmode": "disable"}, "no encryption"),
        ({"postgre_sslrootcert": str(stranger.certificate)}, "certificate verify failed"),
        ({"postgre_host": "127.0.0.1"}, 'does not match host name "127.0.0.1"'),
    ):
        line = postgre_mistake(changed(client, **changes))
        assert expected in line
        assert line.endswith(check)
    line = postgre_mistake(changed(client, postgre_password=SecretStr("hunter2")))
    assert 'refused user postgres: password authentication failed for user "postgres"' in line
    assert "hunter2" not in line


def test_postgresql_takes_our_certificate_and_refuses_a_strangers(
    client: Settings, security: Security, stranger: Authority
) -> None:
    for authority, name, expected in (
        (security.authority, "postgres", None),
        (security.authority, "alice", 'certificate authentication failed for user "postgres"'),
        (stranger, "postgres", "valid client certificate"),
    ):
        pair = authority.issue(name, name)
        settings = changed(client, postgre_sslcert=str(pair.certificate), postgre_sslkey=str(pair.key))
        if expected is None:
            with connect(settings) as connection:
                assert connection.pgconn.ssl_in_use
        else:
            assert expected in postgre_mistake(settings)
        pair.key.chmod(0o644)
        assert "has group or world access" in postgre_mistake(settings)
        pair.key.chmod(0o600)


def test_a_statement_is_cancelled_over_tls(client: Settings) -> None:
    with connect(client) as connection:
        timer = threading.Timer(0.5, connection.cancel_safe)
        timer.start()
        with pytest.raises(psycopg.errors.QueryCanceled):
            connection.execute("SELECT pg_sleep(60)")
        timer.join()


def test_what_comes_before_the_handshake_is_not_taken_for_the_clients(client: Settings) -> None:
    """Otherwise somebody in between could put statements in front of the client's."""
    with socket.create_connection(("127.0.0.1", client.postgre_port), 5) as line:
        line.sendall(struct.pack("!II", 8, 80877103) + b"SELECT")
        assert line.recv(1) == b""


@pytest.mark.slow
def test_each_command_tells_it_in_one_line(client: Settings) -> None:
    for command, changes in (
        ("produce", {"kafka_security_protocol": "PLAINTEXT"}),
        ("consume", {"kafka_sasl_password": SecretStr("hunter2"), "kafka_sasl_password_file": ""}),
        ("etl", {"postgre_sslmode": "disable"}),
        ("status", {"kafka_sasl_password": SecretStr("hunter2"), "kafka_sasl_password_file": ""}),
    ):
        done = run_cli(changed(client, **changes), command, LOG_LEVEL="WARNING")
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert "hunter2" not in done.stderr


def test_no_password_is_in_a_log_a_file_or_a_command_line(
    client: Settings, tls_stack: Stack, security: Security
) -> None:
    create_topics(connect_admin(client, Shutdown()), client, shutdown=Shutdown())
    publish(client, [message(temperature=1.0)])
    for arguments in (["consume", "--until-caught-up"], ["etl", "--once"]):
        done = run_cli(client, *arguments, LOG_LEVEL="DEBUG")
        assert done.returncode == 0, done.stderr
        assert PASSWORD not in done.stdout + done.stderr
    with connect(client) as connection:
        assert connection.execute("SELECT count(*) FROM temperature_summary").fetchone() == (1,)
    for server in (tls_stack.kafka, tls_stack.timescaledb):
        assert server.pid is not None
        assert PASSWORD not in " ".join(psutil.Process(server.pid).cmdline())
        assert PASSWORD not in server.log_path.read_text(encoding="utf-8")
    assert PASSWORD not in (tls_stack.kafka.data_path / "server.properties").read_text(encoding="utf-8")
    secret = [*tls_stack.kafka.data_path.glob("*.pem"), *security.directory.glob("*.key")]
    secret.append(security.directory / "kafka-password")
    assert len(secret) >= 4
    for path in secret:
        assert path.stat().st_mode & 0o077 == 0, path


def test_local_up_writes_down_what_clients_need(
    client: Settings, security: Security, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = security.directory / "client.env"
    assert PASSWORD not in path.read_text(encoding="utf-8")
    monkeypatch.setenv("KAFKA_PORT", str(client.kafka_port))
    monkeypatch.setenv("POSTGRE_PORT", str(client.postgre_port))
    shutil.copy(path, tmp_path / ".env")
    monkeypatch.chdir(tmp_path)
    settings = load_settings()
    connect_admin(settings, Shutdown())
    connect(settings).close()


@pytest.mark.slow
def test_a_broker_that_was_killed_comes_back_with_a_new_password(
    client: Settings, capfd: pytest.CaptureFixture[str], tls_stack: Stack, security: Security
) -> None:
    """The last one here: the old password is worth nothing from then on."""
    kafka = tls_stack.kafka
    kafka.kill()
    renewed = KafkaProcess(kafka.data_path.parent, kafka.port, replace(security, password="another one"))
    renewed.start()
    renewed.wait_ready()
    assert "invalid credentials" in kafka_mistake(client, capfd)
    login = {"kafka_sasl_password": SecretStr("another one"), "kafka_sasl_password_file": ""}
    connect_admin(changed(client, **login), Shutdown())
    renewed.stop()
