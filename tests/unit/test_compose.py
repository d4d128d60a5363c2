"""What docker-compose.yml and the Dockerfile promise, read as text: no Docker and no YAML library needed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from services.core.config import Settings

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
PIPELINE_SERVICES = {"migrate", "producer", "consumer", "etl"}
MONITORING = {"prometheus", "grafana"}
# Where the servers are inside the network, whatever the environment says for commands outside.
ADDRESSES = {
    "KAFKA_HOST": "kafka",
    "KAFKA_PORT": "9092",
    "POSTGRE_HOST": "timescaledb",
    "POSTGRE_PORT": "5432",
    "METRICS_HOST": "0.0.0.0",  # noqa: S104 - in a container
    "METRICS_PORT": "8000",
}


def blocks(text: str) -> dict[str, str]:
    """The keys at the left edge of ``text``, each with what is indented below it, moved to the left edge."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if line.strip() == "" or line.lstrip().startswith("#"):
            continue
        if line.startswith(" "):
            current.append(line)
        else:
            key, _, value = line.partition(":")
            current = found.setdefault(key, [value.strip()] if value.strip() else [])
    return {key: "\n".join(line.removeprefix("  ") for line in lines) for key, lines in found.items()}


FILE = blocks(COMPOSE)
SERVICES = {name: blocks(text) for name, text in blocks(FILE["services"]).items()}
ENVIRONMENT = {
    key: value.strip('"') for key, value in blocks(FILE["x-environment"].removeprefix("&environment\n")).items()
}
PIPELINE = blocks(FILE["x-pipeline"].removeprefix("&pipeline\n"))


def test_all_services_are_seen() -> None:
    assert set(SERVICES) == PIPELINE_SERVICES | {"kafka", "timescaledb"} | MONITORING


def test_monitoring_starts_only_when_asked_for() -> None:
    assert {name for name, service in SERVICES.items() if "monitoring" in service.get("profiles", "")} == MONITORING
    for name in SERVICES.keys() - MONITORING:
        assert not MONITORING & blocks(SERVICES[name].get("depends_on", "")).keys()


def test_every_setting_reaches_every_service_of_ours() -> None:
    assert set(ENVIRONMENT) == {name.upper() for name in Settings.model_fields if not name.startswith("sensor_")}
    assert PIPELINE["environment"] == "*environment"
    for name in PIPELINE_SERVICES:
        assert SERVICES[name]["<<"] == "*pipeline"
        assert "environment" not in SERVICES[name]


def test_addresses_inside_the_network_follow_nothing_outside() -> None:
    assert {name: ENVIRONMENT[name] for name in ADDRESSES} == ADDRESSES


def test_defaults_are_those_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    defaults = {}
    for name in ENVIRONMENT.keys() - ADDRESSES.keys():
        # "-" and not ":-", so that a value that is empty on purpose arrives empty.
        match = re.fullmatch(r"\$\{" + name + r"-([^}]*)\}", ENVIRONMENT[name])
        assert match is not None, f"{name}: {ENVIRONMENT[name]}"
        monkeypatch.setenv(name, match[1])
        defaults[name.lower()] = Settings.model_fields[name.lower()].default
    values = Settings(_env_file=None)
    assert {name: getattr(values, name) for name in defaults} == defaults


def test_ports_are_published_on_loopback_only() -> None:
    published = [line for service in SERVICES.values() for line in service.get("ports", "").splitlines()]
    assert len(published) == 4
    for line in published:
        assert re.fullmatch(r' *- "127\.0\.0\.1:\$\{(KAFKA|POSTGRE|PROMETHEUS|GRAFANA)_PORT:-\d+\}:\d+"', line), line


@pytest.mark.parametrize("name", sorted(PIPELINE_SERVICES))
def test_services_of_ours_can_be_scaled(name: str) -> None:
    assert "ports" not in SERVICES[name] | PIPELINE
    assert "container_name" not in COMPOSE


@pytest.mark.parametrize(
    "service", [PIPELINE, *(SERVICES[name] for name in sorted(SERVICES.keys() - PIPELINE_SERVICES))]
)
def test_images_come_from_variables(service: dict[str, str]) -> None:
    assert re.fullmatch(r"\$\{[A-Z]+_IMAGE:-[a-z/-]+:[\w.-]+\}", service["image"])


def test_image_of_ours_is_built_once_and_before_its_users_start() -> None:
    assert [name for name, service in SERVICES.items() if "build" in service] == ["migrate"]
    assert "build" not in PIPELINE
    for name in PIPELINE_SERVICES - {"migrate"}:
        migrate = blocks(SERVICES[name]["depends_on"])["migrate"]
        assert migrate == "condition: service_completed_successfully"


def test_long_running_services_have_a_health_check_or_start_after_one() -> None:
    long_running = [name for name, service in SERVICES.items() if service["restart"] == "unless-stopped"]
    assert set(long_running) == {"kafka", "timescaledb", "consumer", "etl"} | MONITORING
    for name in PIPELINE_SERVICES - {"migrate"}:
        assert SERVICES[name]["healthcheck"] == "*healthcheck"
    assert f"http://127.0.0.1:{ENVIRONMENT['METRICS_PORT']}/readyz" in FILE["x-healthcheck"]
    for name in long_running:
        conditions = SERVICES[name].get("depends_on", "")
        assert "healthcheck" in SERVICES[name] or "condition: service_healthy" in conditions, name


def test_what_services_wait_for_has_a_health_check() -> None:
    for service in SERVICES.values():
        for needed, condition in blocks(service.get("depends_on", "")).items():
            assert ("healthcheck" in SERVICES[needed]) == (condition == "condition: service_healthy")


@pytest.mark.parametrize("service", [*SERVICES.values(), PIPELINE])
def test_containers_are_hardened(service: dict[str, str]) -> None:
    hardened = service | PIPELINE if "<<" in service else service
    assert hardened["cap_drop"].split() == ["-", "ALL"]
    assert hardened["security_opt"].split() == ["-", "no-new-privileges:true"]
    assert {"mem_limit", "stop_grace_period", "logging"} <= hardened.keys()


def test_file_systems_of_our_containers_are_read_only() -> None:
    assert PIPELINE["read_only"] == "true"
    assert not {"user", "privileged", "cap_add", "read_only"} & {
        key for name in PIPELINE_SERVICES for key in SERVICES[name]
    }
    assert SERVICES["producer"]["volumes"].split() == ["-", "./data:/app/data:ro"]


def test_image_runs_as_a_fixed_user_that_is_not_root() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    final_stage = dockerfile[dockerfile.rindex("\nFROM ") :]
    users = re.findall(r"^USER (\d+):(\d+)$", final_stage, flags=re.MULTILINE)
    assert users
    assert "0" not in users[-1]
    assert len(users) == len(re.findall(r"^USER ", final_stage, flags=re.MULTILINE))


def test_base_image_of_the_build_comes_from_one_argument() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    argument = re.search(r"^ARG PYTHON_IMAGE=(.+)$", dockerfile, flags=re.MULTILINE)
    assert argument is not None
    assert f"PYTHON_IMAGE: ${{PYTHON_IMAGE:-{argument[1]}}}" in SERVICES["migrate"]["build"]
    assert {line.split()[1] for line in dockerfile.splitlines() if line.startswith("FROM ")} == {"${PYTHON_IMAGE}"}


def test_build_context_leaves_secrets_and_dropped_files_out() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    kept = [rule for rule in rules if rule.startswith("!")]
    assert not [rule for rule in kept if ".env" in rule or rule in {"!data", "!.", "!*"}]


def test_no_secret_is_in_a_layer() -> None:
    """Neither as a value nor as an argument of the build, which the image's history would keep."""
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    named = re.findall(r"^(?:ARG|ENV) +(.*?)(?=\n\S|\Z)", dockerfile, flags=re.MULTILINE | re.DOTALL)
    assert named
    assert not re.search(r"PASSWORD|SECRET|TOKEN|KEY|CREDENTIAL", " ".join(named), flags=re.IGNORECASE)
    assert re.findall(r"^  (\w+):", SERVICES["migrate"]["build"], flags=re.MULTILINE) == ["PYTHON_IMAGE"]
    git_ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert {".env", "secrets/", ".local/"} <= set(git_ignored)


def test_a_secret_can_come_from_a_file_in_every_service() -> None:
    """The file wins over the password, which Compose always sets."""
    for name in ("POSTGRE_PASSWORD", "KAFKA_SASL_PASSWORD"):
        assert ENVIRONMENT[f"{name}_FILE"] == f"${{{name}_FILE-}}"
