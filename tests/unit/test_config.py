"""Every setting is read once, checked before anything is touched, and documented where users look."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from services.core.config import find_unknown_names, load_settings, settings_type
from services.core.errors import ConfigurationError
from services.core.measurements import DEFAULT
from tests import ROOT
from tests.documents import GENERATED
from tests.measured import documented_settings


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting in the environment, no .env in the current directory."""
    for name in os.environ:
        if name.lower() in settings_type(DEFAULT).model_fields:
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


WRONG = [
    ("TEMPERATURE_INTERVAL", "abc", "whole minutes: 1 to 527040"),
    ("TEMPERATURE_INTERVAL", "0", "whole minutes: 1 to 527040"),
    ("TEMPERATURE_INTERVAL", "-10", "whole minutes: 1 to 527040"),
    ("TEMPERATURE_INTERVAL", "1.5", "whole minutes: 1 to 527040"),
    ("TEMPERATURE_INTERVAL", "", "whole minutes: 1 to 527040"),
    ("HUMIDITY_INTERVAL", "10 minutes", "whole minutes: 1 to 527040"),
    ("HUMIDITY_INTERVAL", "99999999", "whole minutes: 1 to 527040"),
    ("POSTGRE_PORT", "65536", "1 to 65535"),
    ("KAFKA_PORT", "0", "1 to 65535"),
    ("KAFKA_PORT", "kafka", "1 to 65535"),
    ("POSTGRE_HOST", "", "host name or address"),
    ("POSTGRE_SSLMODE", "on", "verify-full"),
    ("KAFKA_SECURITY_PROTOCOL", "TLS", "SASL_SSL"),
    ("KAFKA_TOPIC", "sensor data", "letters, digits"),
    ("KAFKA_TOPIC", "a" * 201, "letters, digits"),
    ("KAFKA_PARTITIONS", "0", "1 to 10000"),
    ("PRODUCER_FORMAT", "avro", "json (one reading) or arrow"),
    ("PRODUCER_RATE", "-1", "0 (as fast as possible) to 10000000"),
    ("PRODUCER_RATE", "nan", "0 (as fast as possible) to 10000000"),
    ("PRODUCER_RATE", "fast", "0 (as fast as possible) to 10000000"),
    ("PRODUCER_WATCH_SECONDS", "inf", "0 (check once) to 86400"),
    ("KAFKA_MIN_INSYNC_REPLICAS", "-1", "0 (broker default) to 100"),
    ("CONSUMER_BATCH_ROWS", "0", "1 to 1000000"),
    ("CONSUMER_BATCH_SECONDS", "0", "0.001 to 60"),
    ("CONSUMER_BATCH_SECONDS", "nan", "0.001 to 60"),
    ("ETL_POLL_SECONDS", "inf", "0.001 to 3600"),
    ("ETL_CHECK_SECONDS", "-1", "0 (never) to 86400"),
    ("MAX_MESSAGE_BYTES", "2000000", "256 to 1000000"),
    ("MAX_FUTURE_SECONDS", "-1", "0 to 1000000000"),
    ("METRICS_PORT", "65536", "0 (off) to 65535"),
    ("METRICS_PORT", "-1", "0 (off) to 65535"),
    ("METRICS_HOST", "", "address"),
    ("LOG_LEVEL", "verbose", "DEBUG, INFO, WARNING or ERROR"),
    ("LOG_FORMAT", "xml", "text, json, or auto"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), WRONG)
def test_a_wrong_value_is_one_line_with_name_value_and_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, allowed: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    line = str(caught.value)
    assert line.startswith(f"{name}={value} is not allowed (")
    assert allowed in line
    assert "\n" not in line
    assert caught.value.exit_code == 2


def test_all_wrong_values_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPERATURE_INTERVAL", "abc")
    monkeypatch.setenv("POSTGRE_PORT", "99999")
    with pytest.raises(ConfigurationError, match=r"^POSTGRE_PORT=99999 .*; TEMPERATURE_INTERVAL=abc [^\n]*$"):
        load_settings()


@pytest.mark.parametrize(("keep", "compress", "fits"), [("30", "30", False), ("30", "29", True), ("0", "30", True)])
def test_what_is_dropped_before_it_would_be_compressed_is_one_line(
    monkeypatch: pytest.MonkeyPatch, keep: str, compress: str, *, fits: bool
) -> None:
    monkeypatch.setenv("RAW_RETENTION_DAYS", keep)
    monkeypatch.setenv("COMPRESS_AFTER_DAYS", compress)
    if fits:
        load_settings()
        return
    with pytest.raises(ConfigurationError, match=r"^COMPRESS_AFTER_DAYS=30: RAW_RETENTION_DAYS=30 drops [^\n]*$"):
        load_settings()


def test_more_copies_in_step_than_there_are_copies_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_REPLICATION_FACTOR", "3")
    monkeypatch.setenv("KAFKA_MIN_INSYNC_REPLICAS", "4")
    with pytest.raises(
        ConfigurationError, match=r"^KAFKA_MIN_INSYNC_REPLICAS=4: KAFKA_REPLICATION_FACTOR=3 makes [^\n]*$"
    ):
        load_settings()
    monkeypatch.setenv("KAFKA_MIN_INSYNC_REPLICAS", "3")
    assert load_settings().kafka_min_insync_replicas == 3


def test_a_value_of_several_lines_is_still_reported_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_TOPIC", "a\nb")
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert str(caught.value).startswith("KAFKA_TOPIC=a b is not allowed (")
    assert "\n" not in str(caught.value)


def test_a_value_may_not_end_with_a_line_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_TOPIC", "sensor_data\n")
    with pytest.raises(ConfigurationError, match="KAFKA_TOPIC"):
        load_settings()


def test_a_password_that_is_not_text_is_one_line_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRE_PASSWORD", os.fsdecode(b"hunter\xff"))
    with pytest.raises(ConfigurationError, match=r"^POSTGRE_PASSWORD=: the value is not text in UTF-8$"):
        load_settings()


def test_secrets_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRE_PASSWORD", "hunter2")
    monkeypatch.setenv("KAFKA_SASL_PASSWORD", "hunter3")
    monkeypatch.setenv("KAFKA_SSL_KEY_PASSWORD", "hunter4")
    settings = load_settings()
    assert settings.postgre_password.get_secret_value() == "hunter2"
    for shown in (str(settings), repr(settings), settings.model_dump_json()):
        assert "hunter" not in shown
    secret = {name for name in settings_type(DEFAULT).model_fields if name.endswith("password")}
    fields = settings_type(DEFAULT).model_fields
    assert secret == {name for name, field in fields.items() if field.annotation is SecretStr}


def test_settings_cannot_be_changed() -> None:
    settings = load_settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.kafka_port = 1  # type: ignore[misc]


def test_dotenv_is_read_and_the_environment_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("TEMPERATURE_INTERVAL=5\nHUMIDITY_INTERVAL=7\nOF_ANOTHER_TOOL=x\n", encoding="utf-8")
    monkeypatch.setenv("HUMIDITY_INTERVAL", "9")
    settings = load_settings()
    assert (settings.interval_of("temperature"), settings.interval_of("humidity")) == (5, 9)


def test_a_wrong_value_in_dotenv_is_one_line(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("POSTGRE_PORT=x\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"^POSTGRE_PORT=x is not allowed \([^\n]*\)$"):
        load_settings()


def test_a_dotenv_that_is_not_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"POSTGRE_USER=\xff\xfe\n")
    with pytest.raises(ConfigurationError, match=r"^\.env cannot be read: [^\n]*$"):
        load_settings()


def test_a_setting_of_another_measurement_without_a_value_is_one_line(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("MEASUREMENTS=co2\nCO2_INTERVAL\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"^\.env: CO2_INTERVAL has no value; write CO2_INTERVAL=value$"):
        load_settings()


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("TEMPERATURE_INTERVAL: 0\n", 1),
        ("# a comment\n\n\nKAFKA_HOST\n", 4),
        ("KAFKA_HOST=a\n\nPOSTGRE_PASSWORD='hunter2\nKAFKA_PORT=1\n", 3),
    ],
)
def test_what_is_no_setting_in_dotenv_is_one_line_with_its_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str, line: int
) -> None:
    (tmp_path / ".env").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigurationError, match=rf"^\.env, line {line}: [^\n]*$") as caught:
        load_settings()
    assert "hunter2" not in str(caught.value)
    assert caplog.messages == []


def test_a_dotenv_that_is_a_directory_is_one_line(tmp_path: Path) -> None:
    (tmp_path / ".env").mkdir()
    with pytest.raises(ConfigurationError, match=r"^\.env is a directory: [^\n]*$"):
        load_settings()


def test_a_dotenv_that_windows_wrote_is_read(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"\xef\xbb\xbfTEMPERATURE_INTERVAL=5\r\nHUMIDITY_INTERVAL=7\r\n")
    settings = load_settings()
    assert (settings.interval_of("temperature"), settings.interval_of("humidity")) == (5, 7)
    assert find_unknown_names() == []


def test_postgres_is_taken_for_postgre(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(
        "POSTGRES_HOST=db\nPOSTGRE_PORT=2\nPOSTGRES_PORT=1\nPOSTGRES_DB=other\nPOSTGRE_USER=one\n", encoding="utf-8"
    )
    monkeypatch.setenv("POSTGRES_USER", "two")
    monkeypatch.setenv("POSTGRES_PASSWORD", "hunter2")
    settings = load_settings()
    assert settings.postgre_host == "db"
    assert settings.postgre_port == 2  # its own name wins
    assert settings.postgre_dbname == "other"
    assert settings.postgre_user == "two"  # the environment wins
    assert settings.postgre_password.get_secret_value() == "hunter2"
    assert find_unknown_names() == []


def test_what_kubernetes_says_of_a_service_called_postgres_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "POSTGRES_PORT": "tcp://10.0.0.1:5432",
        "POSTGRES_SERVICE_HOST": "10.0.0.1",
        "POSTGRES_PORT_5432_TCP_ADDR": "10.0.0.1",
        "POSTGRE_SERVICE_PORT": "5432",
    }.items():
        monkeypatch.setenv(name, value)
    assert load_settings().postgre_port == 5432
    assert find_unknown_names() == []


def test_a_misspelt_name_is_noticed_wherever_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(
        "TEMPERATUR_INTERVAL=5\nOF_ANOTHER_TOOL=x\nKAFKA_IMAGE=mirror/kafka\nCOMPOSE_PROFILES=x\n", encoding="utf-8"
    )
    monkeypatch.setenv("POSTGRES_HOTS", "db")
    monkeypatch.setenv("kafka_topics", "x")
    monkeypatch.setenv("POSTGRE_DATABASE", "x")
    assert {(each.name, each.source, each.nearest) for each in find_unknown_names()} == {
        ("TEMPERATUR_INTERVAL", ".env", "TEMPERATURE_INTERVAL"),
        ("OF_ANOTHER_TOOL", ".env", None),
        ("POSTGRES_HOTS", "environment", "POSTGRES_HOST"),
        ("KAFKA_TOPICS", "environment", "KAFKA_TOPIC"),
        ("POSTGRE_DATABASE", "environment", "POSTGRE_DBNAME"),
    }


OF_OTHERS = """
    PATH HOME USER LANG LC_ALL TZ PWD SHELL TERM EDITOR HOSTNAME XDG_DATA_HOME PYTHONPATH DATA_DIR LOG_DIR
    PGHOST PGPORT PGUSER PGPASSWORD POSTGRES_INITDB_ARGS POSTGRES_HOST_AUTH_METHOD JAVA_HOME KAFKA_HOME KAFKA_OPTS
    KAFKA_HEAP_OPTS KAFKA_LOG4J_OPTS AWS_ACCESS_KEY_ID AWS_REGION CONSUMER_KEY CONSUMER_SECRET GRAFANA_PASSWORD
    KUBERNETES_SERVICE_HOST KUBERNETES_PORT TEST_POSTGRE_HOST TEST_KAFKA_PORT
"""


def test_the_environment_of_others_makes_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OF_OTHERS.split():
        monkeypatch.setenv(name, "x")
    assert find_unknown_names() == []


def test_everything_that_compose_reads_is_known_in_dotenv(tmp_path: Path) -> None:
    names = set(re.findall(r"\$\{([A-Z_]+)", (ROOT / "docker-compose.yml").read_text(encoding="utf-8")))
    assert {"POSTGRE_USER", "KAFKA_IMAGE", "GRAFANA_PORT"} <= names
    (tmp_path / ".env").write_text("".join(f"{name}=x\n" for name in names), encoding="utf-8")
    assert find_unknown_names() == []


def test_settings_of_what_is_no_longer_measured_by_default_make_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """docker-compose.yml hands them on always, and a copy of .env.example has them."""
    for name, value in {"MEASUREMENTS": "co2", "TEMPERATURE_INTERVAL": "10", "DATA_FEATURE_HUMID": "humid"}.items():
        monkeypatch.setenv(name, value)
    assert find_unknown_names() == []


def test_a_setting_that_is_not_needed_may_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPERATURE_INTERVAL", "0")
    monkeypatch.setenv("KAFKA_SECURITY_PROTOCOL", "SASL_SSL")  # which needs more
    monkeypatch.setenv("KAFKA_PORT", "9999")
    settings = load_settings(("kafka_port", "data_feature_date"))
    assert (settings.kafka_port, settings.interval_of("temperature")) == (9999, 10)
    assert settings.postgre_password.get_secret_value() == "postgres"
    monkeypatch.setenv("KAFKA_PORT", "0")
    with pytest.raises(ConfigurationError, match=r"^KAFKA_PORT=0 is not allowed \(port of the Kafka broker"):
        load_settings(("kafka_port",))
    assert load_settings(()) == settings_type(DEFAULT)()


@pytest.mark.parametrize("level", ["info", "INFO"])
def test_a_log_level_may_be_in_lower_case(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    monkeypatch.setenv("LOG_LEVEL", level)
    assert load_settings().log_level == "INFO"


@pytest.mark.parametrize("name", GENERATED)
def test_what_is_generated_from_the_settings_is_up_to_date(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8") == GENERATED[name](), "run make docs"


@pytest.mark.parametrize("name", [".env.example", "docs/settings.md"])
def test_what_is_generated_has_every_setting_once(name: str) -> None:
    named = re.findall(r"^(?:\| `)?([A-Z_]+)(?:` \||=)", GENERATED[name](), re.MULTILINE)
    assert sorted(named) == sorted(each for each, _, _ in documented_settings())


def test_env_example_as_it_is_gives_the_defaults(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes((ROOT / ".env.example").read_bytes())
    assert load_settings() == settings_type(DEFAULT)()
