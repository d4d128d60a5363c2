"""The environment, read once, into one frozen object.

Nothing else reads the environment. ``.env`` in the current directory is read too; the environment wins. POSTGRES_* is
taken for POSTGRE_*, and what is misspelt is noticed (names.py).
Every field's description is what a user is told when the value is wrong, and what ``.env.example`` says.
"""

from __future__ import annotations

import difflib
import logging
import os
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import available_timezones

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    SecretStr,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from services.core.credentials import SYSTEM, check_certificates, check_key, check_permissions, read_password
from services.core.errors import ConfigurationError
from services.core.measurements import DEFAULT, measurement, names_of
from services.core.names import UnknownName, names_in, unknown_names, with_synonyms

DOTENV = Path(".env")


def _password_file(path: str) -> str:
    if path:
        read_password(path)
    return path


def _certificate_file(path: str) -> str:
    if path:
        check_certificates(path)
    return path


def _root_certificate_file(path: str) -> str:
    return path if path == SYSTEM else _certificate_file(path)


def _check_pair(certificate_setting: str, certificate: str, key: str, password: str = "") -> None:
    if certificate and not key:
        raise ValueError(f"{certificate_setting} needs one")
    if key and not certificate:
        raise ValueError(f"{certificate_setting} is not set")
    if key:
        check_key(key, certificate, password)


# The roles whose passwords are settings; the migrations create them.
LOGINS = ("sensor_consumer", "sensor_etl", "sensor_grafana", "sensor_dashboard")


def _password_file_of(login: str) -> Any:
    return Field("", description=f"file with the password of {login}; it wins over {login.upper()}_PASSWORD")


def _password_of(login: str) -> Any:
    what = f"password that migrate sets for the role {login}; empty: it is left alone"
    return Field(SecretStr(""), validate_default=True, description=what)


def _names(given: str | tuple[str, ...]) -> tuple[str, ...]:
    return names_of(given) if isinstance(given, str) else given


def _zone(name: str) -> str:
    if name == "UTC":
        return name
    known = available_timezones() - {"localtime"}  # which is another one on each machine
    if name in known:
        return name
    if not known:
        raise ValueError(
            "there is no database of time zones here: install the package tzdata, the system's or Python's"
        )
    (nearest,) = difflib.get_close_matches(name, known, 1) or [""]
    meant = f"did you mean {nearest}?" if nearest else "it takes an IANA name such as Europe/Berlin"
    raise ValueError(f"there is no such time zone ({meant})")


def _level(text: str) -> str:
    return text.upper() if text.islower() and text.upper() in logging.getLevelNamesMapping() else text


Zone = Annotated[str, AfterValidator(_zone)]
Minutes = Annotated[int, Field(ge=1, le=60 * 24 * 366)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_names), PlainSerializer(",".join)]
Port = Annotated[int, Field(ge=1, le=65535)]
Name = Annotated[str, Field(min_length=1)]
Topic = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,200}$")]
PasswordFile = Annotated[str, AfterValidator(_password_file)]
CertificateFile = Annotated[str, AfterValidator(_certificate_file)]


class Environment(BaseSettings):
    """Whatever is read from the environment and ``.env``."""

    model_config = SettingsConfigDict(env_file=DOTENV, env_file_encoding="utf-8-sig", extra="ignore", frozen=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Each source with the synonyms, so that the environment wins by whatever name."""
        for source in (env_settings, dotenv_settings):
            if isinstance(source, EnvSettingsSource):
                source.env_vars = with_synonyms(dict(source.env_vars))
        return init_settings, env_settings, dotenv_settings


class Settings(Environment):
    """All settings; the names are the environment variables' names in lower case.

    Those of each measurement are added by ``settings_type``.
    """

    measurements: Names = Field(
        DEFAULT, description="what is measured, with commas between; run sensor-pipeline migrate after a change"
    )

    postgre_host: Name = Field("localhost", description="host name or address of PostgreSQL with TimescaleDB")
    postgre_port: Port = Field(5432, description="port of PostgreSQL: 1 to 65535")
    postgre_user: Name = Field("postgres", description="role to connect as")
    postgre_password_file: PasswordFile = Field(
        "", description="file with the password of that role; it wins over POSTGRE_PASSWORD"
    )
    postgre_password: SecretStr = Field(
        SecretStr("postgres"), validate_default=True, description="password of that role"
    )
    postgre_dbname: Name = Field("sensors", description="name of the database")
    postgre_sslmode: Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"] = Field(
        "prefer", description="TLS to PostgreSQL: disable, allow, prefer, require, verify-ca or verify-full"
    )
    postgre_sslrootcert: Annotated[str, AfterValidator(_root_certificate_file)] = Field(
        "", description="file with the CA that signed PostgreSQL's certificate; system: those of the system"
    )
    postgre_sslcert: CertificateFile = Field("", description="file with the certificate we show to PostgreSQL")
    postgre_sslkey: str = Field("", validate_default=True, description="file with that certificate's private key")

    sensor_consumer_password_file: PasswordFile = _password_file_of("sensor_consumer")
    sensor_consumer_password: SecretStr = _password_of("sensor_consumer")
    sensor_etl_password_file: PasswordFile = _password_file_of("sensor_etl")
    sensor_etl_password: SecretStr = _password_of("sensor_etl")
    sensor_grafana_password_file: PasswordFile = _password_file_of("sensor_grafana")
    sensor_grafana_password: SecretStr = _password_of("sensor_grafana")
    sensor_dashboard_password_file: PasswordFile = _password_file_of("sensor_dashboard")
    sensor_dashboard_password: SecretStr = _password_of("sensor_dashboard")

    kafka_host: Name = Field("localhost", description="host name or address of a Kafka broker")
    kafka_port: Port = Field(9092, description="port of the Kafka broker: 1 to 65535")
    kafka_topic: Topic = Field("sensor_data", description="topic of the readings: letters, digits, '.', '_' and '-'")
    kafka_partitions: int = Field(6, ge=1, le=10000, description="partitions the topic is created with: at least 1")
    kafka_replication_factor: int = Field(1, ge=1, le=100, description="copies of each partition: at least 1")
    kafka_min_insync_replicas: int = Field(
        0,
        ge=0,
        le=100,
        description="copies a message must have to count as sent: 0 (as the brokers say) to KAFKA_REPLICATION_FACTOR",
    )
    kafka_compression: Literal["none", "lz4", "zstd"] = Field(
        "none",
        description="compression of the topic when it is created: none (then the broker refuses bombs), lz4 or zstd",
    )
    kafka_group: Name = Field("sensor_data_consumer", description="consumer group of the consumers")
    kafka_group_protocol: Literal["auto", "consumer", "classic"] = Field(
        "auto",
        description="how consumers share partitions: consumer (Kafka 4), classic, or auto: the first where offered",
    )
    kafka_session_timeout_ms: int = Field(
        45_000,
        ge=6000,
        le=1_800_000,
        description="silence in ms after which a classic consumer counts as dead (else the broker decides): "
        "6000 to 1800000",
    )
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="how to talk to Kafka: PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL"
    )
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        "SCRAM-SHA-512", description="SASL mechanism: PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512"
    )
    kafka_sasl_username: str = Field("", validate_default=True, description="SASL user name")
    kafka_sasl_password_file: PasswordFile = Field(
        "", description="file with the SASL password; it wins over KAFKA_SASL_PASSWORD"
    )
    kafka_sasl_password: SecretStr = Field(SecretStr(""), validate_default=True, description="SASL password")
    kafka_ssl_ca_location: CertificateFile = Field(
        "", description="file with the CA that signed the broker's certificate"
    )
    kafka_ssl_certificate_location: CertificateFile = Field(
        "", description="file with the certificate we show to the broker"
    )
    kafka_ssl_key_password: SecretStr = Field(SecretStr(""), description="password of that certificate's private key")
    kafka_ssl_key_location: str = Field("", validate_default=True, description="file with that private key")

    parquet_url: Name = Field(
        "data/measurements.parquet",
        description="file, directory or glob of Parquet files: a local path, or s3:// or gs://",
    )
    data_feature_date: Name = Field("time_hour", description="column of the Parquet file with the time")
    data_feature_timezone: Zone = Field(
        "UTC", description="zone of times that have none: an IANA name such as Europe/Berlin"
    )
    data_feature_date_unit: Literal["", "s", "ms", "us", "ns"] = Field(
        "", description="unit of times that are numbers since 1970: s, ms, us or ns; empty: they are no numbers"
    )
    data_feature_sensor: str = Field(
        "origin", description="column with the sensor's id; empty: all readings belong to sensor 'default'"
    )

    producer_format: Literal["json", "arrow"] = Field(
        "json",
        description="what a message holds: json (one reading) or arrow (a block of up to 1000, for bulk loads)",
    )
    producer_transaction_rows: int = Field(
        200_000, ge=1, le=10_000_000, description="readings a transaction of the producer: 1 to 10000000"
    )
    producer_transaction_timeout_seconds: int = Field(
        60,
        ge=5,
        le=900,
        description="age at which Kafka ends the transaction of a dead producer: 5 to 900 whole seconds",
    )
    producer_rate: float = Field(
        0, ge=0, le=10_000_000, description="readings a second to send: 0 (as fast as possible) to 10000000"
    )
    producer_watch_seconds: float = Field(
        0,
        ge=0,
        le=86_400,
        description="pause between two looks for new files: 0 (send what is there and end) to 86400 seconds",
    )
    consumer_batch_rows: int = Field(
        50_000, ge=1, le=1_000_000, description="readings a transaction at most: 1 to 1000000"
    )
    consumer_batch_seconds: float = Field(
        0.5,
        gt=0,
        le=60,
        description="age in seconds at which a smaller batch is written: above 0, at most 60",
    )
    consumer_writers: int = Field(
        2, ge=1, le=16, description="transactions that a consumer writes at the same time: 1 to 16"
    )
    max_message_bytes: int = Field(
        65_536,
        ge=256,
        le=1_000_000,
        description="longer messages are dead letters, unless they hold blocks: 256 to 1000000 bytes",
    )
    max_future_seconds: int = Field(
        86_400,
        ge=0,
        le=10**9,
        description="readings further than this ahead of the clock are dead letters: 0 or more seconds",
    )
    max_past_days: int = Field(
        7305,
        ge=1,
        le=50_000,
        description="older readings are dead letters: 1 to 50000 days; each week with readings is a chunk",
    )
    dead_letter_retention_days: int = Field(
        90,
        ge=0,
        le=36_500,
        description="days that dead letters are kept: 0 (for ever) or more, when the topic is created",
    )
    dead_letter_retention_mb: int = Field(
        1024, ge=0, le=10**9, description="MB of dead letters that are kept: 0 (all) or more, when the topic is created"
    )
    raw_retention_days: int = Field(
        0,
        ge=0,
        le=36_500,
        description="days that raw readings are kept: 0 (for ever) or more; summaries stay; load older history first",
    )
    compress_after_days: int = Field(
        0, ge=0, le=36_500, description="age in days at which raw readings are compressed: 0 (never) or more"
    )
    etl_poll_seconds: float = Field(
        0.5, gt=0, le=3600, description="pause between two looks at the refresh queue: above 0 seconds"
    )
    etl_check_seconds: float = Field(
        300.0,
        ge=0,
        le=86_400,
        description="pause between two comparisons of summaries with raw readings: 0 (never) to 86400 seconds",
    )
    metrics_host: Name = Field(
        "127.0.0.1", description="address that /metrics, /livez and /readyz are served at; 0.0.0.0: all of this machine"
    )
    metrics_port: int = Field(0, ge=0, le=65535, description="their port: 0 (off) to 65535; each service needs its own")
    startup_timeout_seconds: float = Field(
        15,
        ge=0,
        le=3600,
        description="how long to wait at the start for Kafka and PostgreSQL: 0 or more seconds",
    )
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(_level)] = Field(
        "INFO", description="DEBUG, INFO, WARNING or ERROR"
    )
    log_format: Literal["auto", "text", "json"] = Field(
        "auto", description="text, json, or auto: text on a terminal, json elsewhere"
    )

    # A validator sees the fields above its own, as far as they are right.

    @field_validator("postgre_password", "kafka_sasl_password", *(f"{role}_password" for role in LOGINS))
    @classmethod
    def _read_password_file(cls, password: SecretStr, info: ValidationInfo) -> SecretStr:
        path = info.data.get(f"{info.field_name}_file")
        return SecretStr(read_password(path)) if path else password

    @field_validator("kafka_min_insync_replicas")
    @classmethod
    def _at_most_all(cls, replicas: int, info: ValidationInfo) -> int:
        copies = info.data.get("kafka_replication_factor", replicas)
        if replicas > copies:
            raise ValueError(f"KAFKA_REPLICATION_FACTOR={copies} makes fewer copies, so no message would ever be taken")
        return replicas

    @field_validator("compress_after_days")
    @classmethod
    def _before_they_are_dropped(cls, days: int, info: ValidationInfo) -> int:
        kept = info.data.get("raw_retention_days", 0)
        if days and kept and days >= kept:
            raise ValueError(f"RAW_RETENTION_DAYS={kept} drops raw readings before they would be compressed")
        return days

    @field_validator("kafka_sasl_username", "kafka_sasl_password")
    @classmethod
    def _needed_for_sasl(cls, value: str | SecretStr, info: ValidationInfo) -> str | SecretStr:
        protocol = info.data.get("kafka_security_protocol", "")
        if protocol.startswith("SASL") and not value:
            raise ValueError(f"KAFKA_SECURITY_PROTOCOL={protocol} needs one")
        return value

    @field_validator("postgre_sslkey")
    @classmethod
    def _check_postgre_key(cls, key: str, info: ValidationInfo) -> str:
        if "postgre_sslcert" in info.data:
            _check_pair("POSTGRE_SSLCERT", info.data["postgre_sslcert"], key)
        if key:
            check_permissions(key)
        return key

    @field_validator("kafka_ssl_key_location")
    @classmethod
    def _check_kafka_key(cls, key: str, info: ValidationInfo) -> str:
        if "kafka_ssl_certificate_location" in info.data:
            password = info.data["kafka_ssl_key_password"].get_secret_value()
            _check_pair("KAFKA_SSL_CERTIFICATE_LOCATION", info.data["kafka_ssl_certificate_location"], key, password)
        return key

    def interval_of(self, name: str) -> int:
        """Minutes of an interval of a measurement."""
        return int(getattr(self, measurement(name).interval_setting))

    def column_of(self, name: str) -> str:
        """The Parquet column of a measurement; empty: files do not have it."""
        return str(getattr(self, measurement(name).column_setting))

    def password_of(self, login: str) -> str:
        """What SENSOR_*_PASSWORD says for one of LOGINS; empty: nothing."""
        password: SecretStr = getattr(self, f"{login}_password")
        return password.get_secret_value()

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
        width = f"width of a {each.name} interval: whole minutes, 1 to 527040"
        column = f"column of the Parquet file with the {each.name}; empty: it has none"
        more[each.interval_setting] = (Minutes, Field(each.minutes, description=width))
        more[each.column_setting] = (str, Field(each.column, description=column))
    return create_model("Settings", __base__=Settings, **more)


def load_settings(*names: str) -> Settings:
    """Read the environment and ``.env``; with ``names`` (``kafka_*``) only these, the others have their defaults.

    Raises ConfigurationError with one line for each wrong variable: its name, its value, what is allowed.
    """
    model = settings_type(DEFAULT)
    try:
        if not names or any(name.startswith("data_feature_") for name in names):
            model = _model()
        names_in(DOTENV, model.model_fields)
        return _read(model, names) if names else model()
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            field = str(problem["loc"][0])
            info = model.model_fields.get(field.lower())
            secret = info is not None and info.annotation is SecretStr
            value = "" if secret else " ".join(str(problem["input"]).splitlines())
            if problem["type"] == "value_error":  # said by a validator of ours
                lines.append(f"{field.upper()}={value}: {problem['ctx']['error']}")
                continue
            allowed = info.description if info is not None else problem["msg"]
            lines.append(f"{field.upper()}={value} is not allowed ({allowed})")
        raise ConfigurationError("; ".join(lines)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{DOTENV} cannot be read: {error}") from error


def _model() -> type[Settings]:
    """The settings with those of what MEASUREMENTS lists."""
    return settings_type(_read(Settings, ("measurements",)).measurements)


def _read(model: type[Settings], patterns: tuple[str, ...]) -> Settings:
    chosen: dict[str, Any] = {
        name: (field.annotation, field)
        for name, field in model.model_fields.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    return model.model_construct(**dict(create_model("Chosen", __base__=Environment, **chosen)()))


def default_settings() -> Settings:
    """The defaults, whatever the environment says: for what must work with wrong settings too."""
    return settings_type(DEFAULT).model_construct()


def find_unknown_names() -> list[UnknownName]:
    """Names in the environment and ``.env`` that may be misspelt settings.

    Those of the default measurements are known whatever is measured: docker-compose.yml and .env.example set them.
    """
    known = settings_type(DEFAULT).model_fields | _model().model_fields
    return list(unknown_names(known, os.environ, names_in(DOTENV, known)))
