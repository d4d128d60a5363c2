"""The environment, read once, into one frozen object.

Nothing else reads the environment. ``.env`` in the current directory is read too; the environment wins. POSTGRES_* is
accepted for POSTGRE_*, and what is misspelt is noticed (names.py). A field's description is what a user is told when
the value is wrong, and what the documents say (tests/documents.py).
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args
from zoneinfo import available_timezones

from dotenv import dotenv_values
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    PlainSerializer,
    SecretStr,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import ErrorDetails

from services.core.credentials import read_password
from services.core.errors import ConfigurationError
from services.core.measurements import DEFAULT, measurement, names_of
from services.core.names import UnknownName, names_in, unknown_names, with_synonyms

DOTENV = Path(".env")
KEY_OF = {"postgre_sslcert": "postgre_sslkey", "kafka_ssl_certificate_location": "kafka_ssl_key_location"}
# The roles whose passwords are settings; the migrations create them.
LOGINS = ("sensor_consumer", "sensor_etl", "sensor_grafana", "sensor_dashboard")


def _number(default: float, least: float, most: float, what: str, *, zero: str = "") -> Any:
    """A number from ``least`` to ``most``, both allowed; ``zero`` is what 0 means."""
    allowed = f"{least} ({zero}) to {most}" if zero else f"{least} to {most}"
    return Field(default, ge=least, le=most, description=f"{what}: {allowed}")


def _text(default: object, what: str) -> Any:
    return Field(default, description=what)


def _choice(default: str, choices: Any, what: str) -> Any:
    *others, last = get_args(choices)
    return _text(default, f"{what}: {', '.join(others)} or {last}")


def _password(default: str, what: str) -> Any:
    return Field(SecretStr(default), description=what)


def _password_file(setting: str) -> Any:
    return Field("", description=f"file with that password; takes precedence over {setting}")


def _login_password(login: str) -> Any:
    return _password("", f"password that migrate sets for the role {login}; empty: the role is left alone")


def _names(given: str | tuple[str, ...]) -> tuple[str, ...]:
    return names_of(given) if isinstance(given, str) else given


def _zone(name: str) -> str:
    known = available_timezones() - {"localtime"}  # which is a different one on each machine
    if name == "UTC" or name in known:
        return name
    if not known:
        raise ValueError("there is no time zone database: install tzdata, the system package or the Python package")
    (nearest,) = difflib.get_close_matches(name, known, 1) or [""]
    meant = f"did you mean {nearest}?" if nearest else "it takes an IANA name such as Europe/Berlin"
    raise ValueError(f"there is no such time zone ({meant})")


def _level(text: str) -> str:
    return text.upper() if text.islower() and text.upper() in logging.getLevelNamesMapping() else text


def _secret(secret: SecretStr) -> SecretStr:
    try:
        secret.get_secret_value().encode()
    except UnicodeEncodeError:
        raise ValueError("the value is not text in UTF-8") from None  # the cause would show a part of it
    return secret


Zone = Annotated[str, AfterValidator(_zone)]
Secret = Annotated[SecretStr, AfterValidator(_secret)]
Names = Annotated[tuple[str, ...], BeforeValidator(_names), PlainSerializer(",".join)]
Name = Annotated[str, Field(min_length=1)]
SslMode = Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]
SecurityProtocol = Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]
SaslMechanism = Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]
Severity = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
Topic = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,200}$")]


class Settings(BaseModel, frozen=True):
    """All settings; the names are the environment variables' names in lower case.

    Those of each measurement are added by ``settings_type``. Files that settings name are read when a client is made.
    """

    measurements: Names = _text(
        DEFAULT, "what is measured, comma-separated; run sensor-pipeline migrate after a change"
    )

    postgre_host: Name = _text("localhost", "host name or address of PostgreSQL with TimescaleDB")
    postgre_port: int = _number(5432, 1, 65535, "port of PostgreSQL")
    postgre_user: Name = _text("postgres", "role to connect as")
    postgre_password: Secret = _password("postgres", "password of POSTGRE_USER")
    postgre_password_file: str = _password_file("POSTGRE_PASSWORD")
    postgre_dbname: Name = _text("sensors", "name of the database")
    postgre_sslmode: SslMode = _choice("prefer", SslMode, "TLS to PostgreSQL")
    postgre_sslrootcert: str = _text("", "file with the CA of PostgreSQL's certificate; system: the system's CAs")
    postgre_sslcert: str = _text("", "file with the client certificate for PostgreSQL")
    postgre_sslkey: str = _text("", "file with that certificate's private key")

    sensor_consumer_password: Secret = _login_password("sensor_consumer")
    sensor_consumer_password_file: str = _password_file("SENSOR_CONSUMER_PASSWORD")
    sensor_etl_password: Secret = _login_password("sensor_etl")
    sensor_etl_password_file: str = _password_file("SENSOR_ETL_PASSWORD")
    sensor_grafana_password: Secret = _login_password("sensor_grafana")
    sensor_grafana_password_file: str = _password_file("SENSOR_GRAFANA_PASSWORD")
    sensor_dashboard_password: Secret = _login_password("sensor_dashboard")
    sensor_dashboard_password_file: str = _password_file("SENSOR_DASHBOARD_PASSWORD")

    kafka_host: Name = _text("localhost", "host name or address of a Kafka broker")
    kafka_port: int = _number(9092, 1, 65535, "port of the Kafka broker")
    kafka_topic: Topic = _text("sensor_data", "topic of the readings: letters, digits, '.', '_' and '-'")
    kafka_partitions: int = _number(6, 1, 10_000, "partitions of the topic when it is created")
    kafka_replication_factor: int = _number(1, 1, 100, "replicas of each partition when the topic is created")
    kafka_min_insync_replicas: int = _number(0, 0, 100, "min.insync.replicas of the topics", zero="broker default")
    kafka_compression: Literal["none", "lz4", "zstd"] = _text(
        "none", "compression.type of topics we create: none (the broker then refuses decompression bombs), lz4 or zstd"
    )
    kafka_group: Name = _text("sensor_data_consumer", "consumer group of the consumers")
    kafka_group_protocol: Literal["auto", "consumer", "classic"] = _text(
        "auto", "group protocol: consumer (Kafka 4), classic, or auto (consumer where the brokers support it)"
    )
    kafka_session_timeout_ms: int = _number(
        45_000, 6000, 1_800_000, "session timeout of a classic consumer in ms (else the broker decides)"
    )
    kafka_security_protocol: SecurityProtocol = _choice("PLAINTEXT", SecurityProtocol, "protocol to Kafka")
    kafka_sasl_mechanism: SaslMechanism = _choice("SCRAM-SHA-512", SaslMechanism, "SASL mechanism")
    kafka_sasl_username: str = _text("", "SASL user name")
    kafka_sasl_password: Secret = _password("", "SASL password")
    kafka_sasl_password_file: str = _password_file("KAFKA_SASL_PASSWORD")
    kafka_ssl_ca_location: str = _text("", "file with the CA of the broker's certificate; empty: the system's CAs")
    kafka_ssl_certificate_location: str = _text("", "file with the client certificate for the broker")
    kafka_ssl_key_location: str = _text("", "file with that certificate's private key")
    kafka_ssl_key_password: Secret = _password("", "password of that private key")

    parquet_url: Name = _text(
        "data/measurements.parquet", "file, directory or glob of Parquet files: a local path, or s3:// or gs://"
    )
    data_feature_date: Name = _text("time_hour", "column of the Parquet file with the time")
    data_feature_timezone: Zone = _text("UTC", "time zone of times without one: an IANA name such as Europe/Berlin")
    data_feature_date_unit: Literal["", "s", "ms", "us", "ns"] = _text(
        "", "unit of numeric times since 1970: s, ms, us or ns; empty: times are not numbers"
    )
    data_feature_sensor: str = _text("origin", "column with the sensor's id; empty: all are of sensor 'default'")

    producer_format: Literal["json", "arrow"] = _text(
        "json", "what a message holds: json (one reading) or arrow (a block of up to 1000, for bulk loads)"
    )
    producer_transaction_rows: int = _number(200_000, 1, 10_000_000, "maximum readings per producer transaction")
    producer_transaction_timeout_seconds: int = _number(
        60, 5, 900, "age in whole seconds at which Kafka aborts the transaction of a dead producer"
    )
    producer_rate: float = _number(0, 0, 10_000_000, "readings to send per second", zero="as fast as possible")
    producer_watch_seconds: float = _number(0, 0, 86_400, "seconds between checks for new files", zero="check once")
    consumer_batch_rows: int = _number(50_000, 1, 1_000_000, "maximum readings per database transaction")
    consumer_batch_seconds: float = _number(0.5, 0.001, 60, "age in seconds at which a smaller batch is written")
    consumer_writers: int = _number(2, 1, 16, "transactions that a consumer writes at the same time")
    max_message_bytes: int = _number(
        65_536, 256, 1_000_000, "bytes above which a message is a dead letter, unless it holds a block"
    )
    max_future_seconds: int = _number(86_400, 0, 10**9, "seconds in the future beyond which readings are dead letters")
    max_past_days: int = _number(
        7305, 1, 50_000, "age in days beyond which readings are dead letters (a chunk per week with readings)"
    )
    dead_letter_retention_days: int = _number(
        90, 0, 36_500, "days that dead letters are kept, when their topic is created", zero="forever"
    )
    dead_letter_retention_mb: int = _number(
        1024, 0, 10**9, "MB of dead letters that are kept, when their topic is created", zero="all"
    )
    raw_retention_days: int = _number(
        0, 0, 36_500, "days that raw readings are kept (summaries stay; load older history first)", zero="forever"
    )
    compress_after_days: int = _number(0, 0, 36_500, "age in days at which raw readings are compressed", zero="never")
    etl_poll_seconds: float = _number(0.5, 0.001, 3600, "seconds between polls of the refresh queue")
    etl_check_seconds: float = _number(300, 0, 86_400, "seconds between comparisons with raw readings", zero="never")
    metrics_host: Name = _text("127.0.0.1", "address to serve /metrics, /livez and /readyz at; 0.0.0.0: all addresses")
    metrics_port: int = _number(0, 0, 65535, "port of these pages, different for each service", zero="off")
    startup_timeout_seconds: float = _number(15, 0, 3600, "seconds to wait for Kafka and PostgreSQL at the start")
    log_level: Annotated[Severity, BeforeValidator(_level)] = _choice(
        "INFO", Severity, "minimum severity that is logged"
    )
    log_format: Literal["auto", "text", "json"] = _text("auto", "text, json, or auto: text on terminals, else json")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        """What each setting allows, but not with the others."""
        if found := list(self._contradictions()):
            raise ValueError("; ".join(found))
        return self

    def _contradictions(self) -> Iterator[str]:
        if self.kafka_min_insync_replicas > (copies := self.kafka_replication_factor):
            yield (
                f"KAFKA_MIN_INSYNC_REPLICAS={self.kafka_min_insync_replicas}: KAFKA_REPLICATION_FACTOR={copies} makes "
                "fewer replicas, so the broker would refuse every message"
            )
        if self.compress_after_days and 0 < (kept := self.raw_retention_days) <= self.compress_after_days:
            yield (
                f"COMPRESS_AFTER_DAYS={self.compress_after_days}: RAW_RETENTION_DAYS={kept} drops raw readings before "
                "they would be compressed"
            )
        if self.kafka_security_protocol.startswith("SASL"):
            password = self.kafka_sasl_password or self.kafka_sasl_password_file
            for name, value in (("USERNAME", self.kafka_sasl_username), ("PASSWORD", password)):
                if not value:
                    yield f"KAFKA_SASL_{name}=: KAFKA_SECURITY_PROTOCOL={self.kafka_security_protocol} needs one"
        for certificate, key in KEY_OF.items():
            shown, opened = getattr(self, certificate), getattr(self, key)
            if bool(shown) != bool(opened):
                reason = "needs one" if shown else "is not set"
                yield f"{key.upper()}={opened}: {certificate.upper()} {reason}"

    def interval_of(self, name: str) -> int:
        """Minutes of an interval of a measurement."""
        return int(getattr(self, measurement(name).interval_setting))

    def column_of(self, name: str) -> str:
        """The Parquet column of a measurement; empty: files do not have it."""
        return str(getattr(self, measurement(name).column_setting))

    def secret(self, name: str) -> str:
        """The password ``name``: what the file of NAME_FILE holds, else NAME. Raises ConfigurationError."""
        path: str = getattr(self, f"{name}_file")
        password: SecretStr = getattr(self, name)
        return read_password(f"{name}_file", path) if path else password.get_secret_value()

    def as_environment(self) -> dict[str, str]:
        """The environment variables that give these settings, with passwords."""
        return {
            name.upper(): value.get_secret_value() if isinstance(value, SecretStr) else str(value)
            for name, value in self.model_dump().items()
        }

    @property
    def dead_letter_topic(self) -> str:
        """Where messages go that are not readings."""
        return f"{self.kafka_topic}.dlq"

    @property
    def bootstrap_servers(self) -> str:
        """``host:port`` of the broker, as librdkafka takes it."""
        return f"{self.kafka_host}:{self.kafka_port}"


@cache
def settings_type(measurements: tuple[str, ...]) -> type[Settings]:
    """Settings with two for each of these measurements: the width of its intervals, and its Parquet column."""
    more: dict[str, Any] = {"measurements": (Names, Settings.model_fields["measurements"])}
    for each in map(measurement, measurements):
        width = f"width of a {each.name} interval in whole minutes"
        column = f"column of the Parquet file with the {each.name}; empty: it has none"
        more[each.interval_setting] = (int, _number(each.minutes, 1, 60 * 24 * 366, width))
        more[each.column_setting] = (str, _text(each.column, column))
    return create_model("Settings", __base__=Settings, **more)


def load_settings(needed: tuple[str, ...] = ("*",)) -> Settings:
    """Read the environment and ``.env``; all others than those ``needed`` (``kafka_*``) have their defaults.

    Raises ConfigurationError with one line for each wrong variable: its name, its value, what is allowed.
    """
    if not needed:
        return settings_type(DEFAULT)()
    given = {name: value for name, value in given_values().items() if any(fnmatchcase(name, each) for each in needed)}
    model = _type_for(given)
    try:
        return model(**given)
    except ValidationError as error:
        raise ConfigurationError("; ".join(_line(problem, model) for problem in error.errors())) from error


def given_values() -> dict[str, Any]:
    """What the environment and ``.env`` say, by lower-case name; the environment wins, by whatever synonym."""
    try:
        names_in(DOTENV, settings_type(DEFAULT).model_fields)  # raises where dotenv_values would only warn
        dotenv = dotenv_values(DOTENV, encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{DOTENV} cannot be read: {error}") from error
    return with_synonyms(dotenv) | with_synonyms(os.environ)


def _type_for(given: Mapping[str, Any]) -> type[Settings]:
    """The type for what MEASUREMENTS lists; where that is wrong, a type that says so."""
    with suppress(ValueError):
        return settings_type(_names(given.get("measurements", DEFAULT)))
    return settings_type(DEFAULT)


def _line(problem: ErrorDetails, model: type[Settings]) -> str:
    said = problem.get("ctx", {}).get("error")  # by a validator of ours
    if not problem["loc"]:
        return str(said)
    name = str(problem["loc"][0])
    if problem["input"] is None:  # names_in, which says in which line, knows the default measurements only
        return f"{DOTENV}: {name.upper()} has no value; write {name.upper()}=value"
    field = model.model_fields[name]
    value = "" if field.annotation is SecretStr else " ".join(str(problem["input"]).splitlines())
    return f"{name.upper()}={value}: {said}" if said else f"{name.upper()}={value} is not allowed ({field.description})"


def find_unknown_names() -> list[UnknownName]:
    """Names in the environment and ``.env`` that may be misspelt settings.

    Those of the default measurements are known whatever is measured: docker-compose.yml and .env.example set them.
    """
    known = settings_type(DEFAULT).model_fields | _type_for(given_values()).model_fields
    return list(unknown_names(known, os.environ, names_in(DOTENV, known)))
