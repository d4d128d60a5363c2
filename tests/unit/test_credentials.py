"""Passwords and certificates in files: what is read, and the one line for each mistake."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import pytest

from services.core.config import LOGINS, Settings, load_settings, settings_type
from services.core.database import connection_arguments
from services.core.errors import ConfigurationError
from services.core.kafka import client_settings
from services.core.logins import settings_as
from services.core.measurements import DEFAULT
from services.local.certificates import Authority
from services.local.security import secure
from tests.certificates import locked
from tests.measured import make_settings

PASSWORDS = {"POSTGRE_PASSWORD_FILE": "postgre_password", "KAFKA_SASL_PASSWORD_FILE": "kafka_sasl_password"}
LOGIN_FILES = [f"{login.upper()}_PASSWORD_FILE" for login in LOGINS]
PAIRS = [("POSTGRE_SSLCERT", "POSTGRE_SSLKEY"), ("KAFKA_SSL_CERTIFICATE_LOCATION", "KAFKA_SSL_KEY_LOCATION")]
CERTIFICATES = ["POSTGRE_SSLROOTCERT", "KAFKA_SSL_CA_LOCATION", *(certificate for certificate, _ in PAIRS)]


def use(settings: Settings) -> None:
    """What all commands do together with the files that settings name."""
    connection_arguments(settings)
    client_settings(settings, "test")
    for login in LOGINS:
        settings_as(login, settings)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting in the environment, no .env in the current directory."""
    for name in os.environ:
        if name.lower() in settings_type(DEFAULT).model_fields:
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def mistake(monkeypatch: pytest.MonkeyPatch, **environment: object) -> str:
    """The one line that these settings give, at the latest when the clients are made."""
    monkeypatch.setenv("KAFKA_SECURITY_PROTOCOL", "SASL_SSL")
    monkeypatch.setenv("KAFKA_SASL_USERNAME", "somebody")
    keys: dict[str, object] = {key: "its.key" for certificate, key in PAIRS if certificate in environment}
    for name, value in ({"KAFKA_SASL_PASSWORD": "hunter1"} | keys | environment).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConfigurationError) as caught:
        use(load_settings())
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", PASSWORDS)
@pytest.mark.parametrize(
    ("content", "password"),
    [
        (b"hunter2", "hunter2"),
        (b"hunter2\n", "hunter2"),
        (b"hunter2\r\n", "hunter2"),
        (b" two words \n", " two words "),
        (b"hunter2\n\n", "hunter2\n"),
        ("schlüssel\n".encode(), "schlüssel"),
    ],
)
def test_a_password_comes_from_a_file_and_wins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, content: bytes, password: str
) -> None:
    """A file wins: docker-compose.yml always sets POSTGRE_PASSWORD, to its default if to nothing else."""
    (tmp_path / "secret").write_bytes(content)
    monkeypatch.setenv(name, str(tmp_path / "secret"))
    monkeypatch.setenv(name.removesuffix("_FILE"), "from the environment")
    settings = load_settings()
    assert settings.secret(PASSWORDS[name]) == password
    for shown in (str(settings), repr(settings), settings.model_dump_json()):
        assert password.strip() not in shown


@pytest.mark.parametrize("name", [*PASSWORDS, *LOGIN_FILES])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "the file cannot be read (No such file or directory)"),
        (b"", "the file is empty"),
        (b"\n", "the file is empty"),
        (b"\xff\xfe\x00", "the file is not text in UTF-8"),
    ],
)
def test_a_password_file_that_has_none_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, content: bytes | None, expected: str
) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    assert mistake(monkeypatch, **{name: path}) == f"{name}={path}: {expected}"


@pytest.mark.parametrize("name", [*PASSWORDS, *CERTIFICATES])
def test_a_directory_is_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    assert mistake(monkeypatch, **{name: tmp_path}).startswith(
        f"{name}={tmp_path}: the file cannot be read (Is a directory)"
    )


@pytest.mark.parametrize("name", [*PASSWORDS, *CERTIFICATES])
@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    path = tmp_path / "secret"
    path.touch(mode=0)
    assert f"{name}={path}: the file cannot be read (Permission denied)" in mistake(monkeypatch, **{name: path})


@pytest.mark.parametrize("name", CERTIFICATES)
def test_a_file_without_a_certificate_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    path = tmp_path / "some.pem"
    for content in ("", "not a certificate", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"):
        path.write_text(content, encoding="utf-8")
        assert mistake(monkeypatch, **{name: path}).startswith(
            f"{name}={path}: the file does not contain a PEM certificate"
        )


@pytest.mark.parametrize(("certificate", "key"), PAIRS)
def test_a_certificate_and_a_key_belong_together(
    monkeypatch: pytest.MonkeyPatch, authority: Authority, certificate: str, key: str
) -> None:
    one, other = authority.issue("one", "one"), authority.issue("other", "other")
    opened = locked(authority.issue("locked", "locked"), "hunter2")
    assert (
        mistake(monkeypatch, **{certificate: one.certificate, key: other.key})
        == f"{key}={other.key}: the key does not belong to the certificate"
    )
    unusable = "the file does not contain a PEM private key, or its password is wrong"
    assert mistake(monkeypatch, **{key: one.certificate}) == f"{key}={one.certificate}: {unusable}"
    assert (
        mistake(monkeypatch, **{certificate: opened.certificate, key: opened.key}) == f"{key}={opened.key}: {unusable}"
    )
    assert (
        mistake(monkeypatch, **{key: "/no/key"})
        == f"{key}=/no/key: the file cannot be read (No such file or directory)"
    )
    assert mistake(monkeypatch, **{key: ""}) == f"{key}=: {certificate} needs one"
    assert mistake(monkeypatch, **{certificate: "", key: one.key}) == f"{key}={one.key}: {certificate} is not set"


def test_a_key_with_a_password_needs_it(monkeypatch: pytest.MonkeyPatch, authority: Authority) -> None:
    opened = locked(authority.issue("locked", "locked"), "hunter2")
    monkeypatch.setenv("KAFKA_SECURITY_PROTOCOL", "SSL")
    monkeypatch.setenv("KAFKA_SSL_CERTIFICATE_LOCATION", str(opened.certificate))
    monkeypatch.setenv("KAFKA_SSL_KEY_LOCATION", str(opened.key))
    monkeypatch.setenv("KAFKA_SSL_KEY_PASSWORD", "hunter2")
    arguments = client_settings(load_settings(), "test")
    assert arguments["ssl.certificate.location"] == str(opened.certificate)
    assert arguments["ssl.key.location"] == str(opened.key)
    assert arguments["ssl.key.password"] == "hunter2"
    line = mistake(monkeypatch, KAFKA_SSL_KEY_PASSWORD="hunter3")
    assert line.endswith("or its password is wrong")
    assert "hunter" not in line


def test_a_certificate_and_its_key_are_for_libpq(monkeypatch: pytest.MonkeyPatch, authority: Authority) -> None:
    pair = authority.issue("client", "client")
    monkeypatch.setenv("POSTGRE_SSLCERT", str(pair.certificate))
    monkeypatch.setenv("POSTGRE_SSLKEY", str(pair.key))
    arguments = connection_arguments(load_settings())
    assert (arguments["sslcert"], arguments["sslkey"]) == (str(pair.certificate), str(pair.key))


def test_the_systems_authorities_have_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRE_SSLROOTCERT", "system")
    assert connection_arguments(load_settings())["sslrootcert"] == "system"


def test_sasl_needs_a_user_and_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mistake(monkeypatch, KAFKA_SASL_USERNAME="", KAFKA_SASL_PASSWORD="") == (
        "KAFKA_SASL_USERNAME=: KAFKA_SECURITY_PROTOCOL=SASL_SSL needs one; "
        "KAFKA_SASL_PASSWORD=: KAFKA_SECURITY_PROTOCOL=SASL_SSL needs one"
    )


def test_files_that_are_gone_are_missed_by_those_who_need_them_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whoever deletes .local makes its files again with the same settings that name them."""
    directory = tmp_path / ".local" / "tls"
    for name, value in secure(directory, make_settings()).client_settings().items():
        monkeypatch.setenv(name.upper(), value)
    before = load_settings()
    use(before)
    shutil.rmtree(tmp_path / ".local")
    settings = load_settings()
    for make in (connection_arguments, partial(client_settings, role="test")):
        with pytest.raises(ConfigurationError, match="the file cannot be read"):
            make(settings)
    assert secure(directory, settings).applied_to(settings) == before
    use(settings)
