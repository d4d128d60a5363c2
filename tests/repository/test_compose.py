"""What docker-compose.yml and the Dockerfile promise; no Docker is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.core.config import LOGINS, settings_type
from services.core.measurements import DEFAULT
from tests.documents import with_blocks

ROOT = Path(__file__).resolve().parents[2]
MEASUREMENTS = ROOT / "measurements.env"
COMPOSE = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
PIPELINE_SERVICES = {"migrate", "producer", "consumer", "etl"}
TOOLS = {"toolbox"}
MONITORING = {"prometheus", "grafana", "node", "postgres"}
# Where the servers are inside the network, and what else does not depend on settings for commands outside.
FIXED = {
    "KAFKA_HOST": "kafka",
    "KAFKA_PORT": "9092",
    "POSTGRE_HOST": "timescaledb",
    "POSTGRE_PORT": "5432",
    "METRICS_HOST": "0.0.0.0",  # noqa: S104 - in a container
    "METRICS_PORT": "8000",
    "STARTUP_TIMEOUT_SECONDS": "60",
}
# How commands outside reach the servers: by other addresses, and with TLS if they have it there.
OUTSIDE = re.compile("^(POSTGRE_SSL|KAFKA_SSL|KAFKA_SASL|KAFKA_SECURITY)|_FILE$")
OWNER = {"POSTGRE_USER": "${POSTGRE_USER-postgres}", "POSTGRE_PASSWORD": "${POSTGRE_PASSWORD-postgres}"}
PASSWORDS = {f"{login.upper()}_PASSWORD": f"${{{login.upper()}_PASSWORD:-{login}}}" for login in LOGINS}

FILE: dict[str, Any] = yaml.safe_load(COMPOSE)
SERVICES: dict[str, dict[str, Any]] = FILE["services"]
SECRETS: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.secrets.yml").read_text(encoding="utf-8"))
ENVIRONMENT: dict[str, dict[str, str]] = {name: SERVICES[name]["environment"] for name in sorted(PIPELINE_SERVICES)}
PIPELINE: dict[str, Any] = FILE["x-pipeline"]


def test_all_services_are_seen() -> None:
    assert set(SERVICES) == PIPELINE_SERVICES | TOOLS | {"kafka", "timescaledb"} | MONITORING


def test_monitoring_starts_only_when_asked_for_and_last() -> None:
    """What is wrong with it then keeps nothing else from starting."""
    assert {name for name, service in SERVICES.items() if "monitoring" in service.get("profiles", [])} == MONITORING
    for name in SERVICES.keys() - MONITORING:
        assert not MONITORING & SERVICES[name].get("depends_on", {}).keys()
    after = {name: {"condition": "service_started"} for name in ("producer", "consumer", "etl")}
    for name in MONITORING:
        assert SERVICES[name]["depends_on"] == after


def names_in(package: str) -> set[str]:
    """The settings that a service's code names."""
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "services" / package).glob("*.py"))
    return {name.upper() for name in settings_type(DEFAULT).model_fields if re.search(rf"\b{name}\b", source)}


def test_every_setting_reaches_a_service_and_each_what_it_needs() -> None:
    given = set().union(*ENVIRONMENT.values())
    assert given == {name for name in map(str.upper, settings_type(DEFAULT).model_fields) if not OUTSIDE.search(name)}
    for name in ("producer", "consumer", "etl"):
        needed = {each for each in names_in(name) if not OUTSIDE.search(each)}
        assert needed <= set(ENVIRONMENT[name]), name


def test_settings_of_further_measurements_reach_all_services_of_ours_and_nobody_else() -> None:
    """By a file whose names Compose need not know. As it comes, it changes nothing; a list of names, for 1.29."""
    assert {name for name, service in SERVICES.items() if "env_file" in service} == PIPELINE_SERVICES | TOOLS
    assert PIPELINE["env_file"] == [MEASUREMENTS.name]
    measuring = {name for name, service in SERVICES.items() if "MEASUREMENTS" in service.get("environment", {})}
    assert measuring == PIPELINE_SERVICES | TOOLS
    text = MEASUREMENTS.read_text(encoding="utf-8")
    assert all(line.startswith("#") for line in text.splitlines())
    assert not re.search(r"PASSWORD|SECRET|TOKEN|KEY|CREDENTIAL", text)


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is not installed")
def test_what_the_file_for_measurements_says_arrives(tmp_path: Path) -> None:
    """The example of its comments, as somebody makes it active; what docker-compose.yml says itself wins over it."""
    shutil.copy(ROOT / "docker-compose.yml", tmp_path)
    example = re.findall(r"^# ([A-Z0-9_]+=.*)$", MEASUREMENTS.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(example) == 2
    lines = "".join(f"{line}\n" for line in [*example, "POSTGRE_USER=somebody"])
    (tmp_path / MEASUREMENTS.name).write_text(MEASUREMENTS.read_text(encoding="utf-8") + lines, encoding="utf-8")
    command = ["docker-compose", "--profile", "tools", "--profile", "monitoring", "config"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    given = {name: service.get("environment", {}) for name, service in services.items()}
    expected = dict(line.split("=", 1) for line in example)
    assert given.keys() == SERVICES.keys()
    for name, environment in given.items():
        found = {each: environment[each] for each in expected if each in environment}
        assert found == (expected if name in PIPELINE_SERVICES | TOOLS else {}), name
    assert given["etl"]["POSTGRE_USER"] == "sensor_etl"


def test_nobody_has_credentials_that_it_does_not_need() -> None:
    def found(prefix: str, name: str) -> dict[str, str]:
        return {key: value for key, value in ENVIRONMENT[name].items() if key.startswith(prefix)}

    assert not found("POSTGRE_", "producer")
    assert not found("KAFKA_", "etl")
    assert not found("KAFKA_", "migrate")
    for name in ("consumer", "etl"):
        login = found("POSTGRE_", name)
        assert login["POSTGRE_USER"] == f"sensor_{name}"
        assert login["POSTGRE_PASSWORD"] == PASSWORDS[f"SENSOR_{name.upper()}_PASSWORD"]
        assert not found("SENSOR_", name)
    assert found("SENSOR_", "migrate") == PASSWORDS
    assert found("POSTGRE_", "migrate").items() >= OWNER.items()
    server = SERVICES["timescaledb"]["environment"]
    assert {"POSTGRE_USER": server["POSTGRES_USER"], "POSTGRE_PASSWORD": server["POSTGRES_PASSWORD"]} == OWNER
    for name in SERVICES.keys() - {"timescaledb", "migrate"}:
        assert not set(OWNER.values()) & {str(value) for value in SERVICES[name].get("environment", {}).values()}, name


def test_the_toolbox_logs_in_as_etl_does_and_starts_only_when_asked_for() -> None:
    toolbox = SERVICES["toolbox"]
    assert toolbox["profiles"] == ["tools"]
    login = {key: ENVIRONMENT["etl"][key] for key in ("POSTGRE_USER", "POSTGRE_PASSWORD")}
    assert login.items() <= toolbox["environment"].items()
    assert {each for each in names_in("status") if not OUTSIDE.search(each)} <= toolbox["environment"].keys()


def test_who_has_no_business_with_a_server_does_not_reach_it() -> None:
    reach = {name: set(service["networks"]) for name, service in SERVICES.items()}
    assert {name for name in reach if reach[name] & reach["kafka"]} == {
        "kafka",
        "producer",
        "consumer",
        "toolbox",
    }
    assert {name for name in reach if reach[name] & reach["timescaledb"]} == {
        "timescaledb",
        "migrate",
        "consumer",
        "etl",
        "grafana",
        "postgres",
        "toolbox",
    }
    assert all(reach[name] & reach["prometheus"] for name in (*PIPELINE_SERVICES - {"migrate"}, "grafana"))
    assert set(FILE["networks"]) == set().union(*reach.values())


def test_grafana_logs_in_as_a_role_of_its_own() -> None:
    text = (ROOT / "deploy/monitoring/grafana/provisioning/datasources/datasources.yml").read_text(encoding="utf-8")
    (source,) = (source for source in yaml.safe_load(text)["datasources"] if source["uid"] == "postgresql")
    assert (source["user"], source["secureJsonData"]) == ("sensor_grafana", {"password": "$GF_POSTGRE_PASSWORD"})
    assert SERVICES["grafana"]["environment"]["GF_POSTGRE_PASSWORD"] == PASSWORDS["SENSOR_GRAFANA_PASSWORD"]
    assert 0 < source["jsonData"]["maxIdleConns"] <= source["jsonData"]["maxOpenConns"] <= 5


def test_with_secrets_no_password_is_in_an_environment() -> None:
    """Each that is set is emptied, and comes from a file that this service, and "make secrets", know."""
    made = set(
        re.findall(r"^SECRETS := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[0].split()
    )
    assert {name: secret["file"] for name, secret in SECRETS["secrets"].items()} == {
        name: f"./secrets/{name}" for name in made
    }
    for name, service in SERVICES.items():
        ours = SECRETS["services"].get(name, {"environment": {}, "secrets": []})
        passwords = {key for key in service.get("environment", {}) if re.search("PASS(WORD)?$", key)}
        emptied = {key for key, value in ours["environment"].items() if value == ""}
        assert emptied == passwords
        files = {key: value for key, value in ours["environment"].items() if value}
        assert {key.removesuffix("FILE").rstrip("_") for key in files} == passwords
        assert set(files.values()) == {f"/run/secrets/{secret}" for secret in ours["secrets"]}


def test_what_is_fixed_follows_nothing_outside() -> None:
    for environment in ENVIRONMENT.values():
        assert {key: value for key, value in environment.items() if key in FIXED}.items() <= FIXED.items()
        assert not [key for key in environment if OUTSIDE.search(key)]


def test_what_follows_a_setting_is_generated_with_its_default() -> None:
    """test_config.py has that what is generated is up to date."""
    by_hand = with_blocks("docker-compose.yml", lambda _: [])
    assert not re.findall(r"^ +([A-Z_]+): \$\{\1-.*", by_hand, re.MULTILINE)
    otherwise = set(re.findall(r"^ +([A-Z_]+): \$\{\1:-", by_hand, re.MULTILINE))
    assert otherwise == {"LOG_FORMAT", "PYTHON_IMAGE", *PASSWORDS}


def test_what_a_copy_of_the_example_leaves_empty_has_a_default() -> None:
    """A .env that is a copy of .env.example changes nothing."""
    example = dict(
        line.split("=", 1)
        for line in (ROOT / ".env.example").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    )
    assert {name for name in PASSWORDS if example[name] == ""} == set(PASSWORDS)
    assert all(":-" in value for value in PASSWORDS.values())


def test_ports_are_published_on_loopback_only() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(published) == 4
    for port in published:
        assert re.fullmatch(r"127\.0\.0\.1:\$\{(KAFKA|POSTGRE|PROMETHEUS|GRAFANA)_PORT:-\d+\}:\d+", port), port


@pytest.mark.parametrize("name", sorted(PIPELINE_SERVICES))
def test_services_of_ours_can_be_scaled(name: str) -> None:
    assert "ports" not in SERVICES[name] | PIPELINE
    assert "container_name" not in COMPOSE


@pytest.mark.parametrize(
    "service", [PIPELINE, *(SERVICES[name] for name in sorted(SERVICES.keys() - PIPELINE_SERVICES - TOOLS))]
)
def test_images_come_from_variables(service: dict[str, Any]) -> None:
    assert re.fullmatch(r"\$\{[A-Z_]+_IMAGE:-[a-z/-]+:[\w.-]+\}", service["image"])


def test_image_of_ours_is_built_once_and_before_its_users_start() -> None:
    assert [name for name, service in SERVICES.items() if "build" in service] == ["migrate"]
    assert "build" not in PIPELINE
    for name in PIPELINE_SERVICES - {"migrate"}:
        assert SERVICES[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}


def test_all_but_the_migrations_come_back_after_a_reboot() -> None:
    """The producer too, which therefore stays when all is sent; so "up --wait" has nobody who has ended to wait for."""
    assert {name for name, service in SERVICES.items() if service["restart"] != "unless-stopped"} == {"migrate", *TOOLS}
    assert all(SERVICES[name]["restart"] == "no" for name in ("migrate", *TOOLS))
    assert SERVICES["producer"]["command"] == ["sensor-pipeline", "produce", "--watch"]


def test_services_have_a_health_check_or_start_after_one() -> None:
    for name in PIPELINE_SERVICES - {"migrate"}:
        assert SERVICES[name]["healthcheck"] == FILE["x-healthcheck"]
    assert f"http://127.0.0.1:{FIXED['METRICS_PORT']}/readyz" in FILE["x-healthcheck"]["test"][-1]
    for name in SERVICES.keys() - PIPELINE_SERVICES - TOOLS - MONITORING:
        assert "healthcheck" in SERVICES[name], name


def test_what_services_wait_for_has_a_health_check() -> None:
    for name in SERVICES.keys() - MONITORING:
        for needed, condition in SERVICES[name].get("depends_on", {}).items():
            assert ("healthcheck" in SERVICES[needed]) == (condition == {"condition": "service_healthy"})


def test_the_database_is_asked_as_a_user_that_there_is() -> None:
    """Otherwise its log has a line about the user root for each time."""
    (_, command) = SERVICES["timescaledb"]["healthcheck"]["test"]
    assert '--username="$$POSTGRES_USER" --dbname="$$POSTGRES_DB"' in command


def test_enough_connections_for_all_who_may_want_one() -> None:
    assert int(SERVICES["timescaledb"]["environment"]["TS_TUNE_MAX_CONNS"]) == 100


def test_the_servers_log_what_matters() -> None:
    kafka = SERVICES["kafka"]["environment"]
    assert kafka["KAFKA_LOG4J_ROOT_LOGLEVEL"] == "WARN"
    assert kafka["KAFKA_LOG4J_LOGGERS"] == "kafka=WARN,org.apache.kafka=WARN"
    for name, service in SERVICES.items():
        assert service["logging"]["options"] == {"max-size": "10m", "max-file": "3"}, name


def test_nothing_without_a_name_is_left_behind() -> None:
    assert SERVICES["kafka"]["tmpfs"] == ["/mnt/shared/config", "/etc/kafka/secrets"]


@pytest.mark.parametrize("service", [*SERVICES.values(), PIPELINE])
def test_containers_are_hardened(service: dict[str, Any]) -> None:
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"mem_limit", "pids_limit", "stop_grace_period", "logging"} <= service.keys()


def test_file_systems_of_our_containers_are_read_only() -> None:
    for name in PIPELINE_SERVICES:
        assert SERVICES[name]["read_only"] is True
        assert SERVICES[name]["tmpfs"] == ["/tmp:size=64m"]  # noqa: S108 - in a container
        assert not {"user", "privileged", "cap_add"} & SERVICES[name].keys()
    assert SERVICES["producer"]["volumes"] == ["./data:/app/data:ro,z"]


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
    assert SERVICES["migrate"]["build"]["args"]["PYTHON_IMAGE"] == f"${{PYTHON_IMAGE:-{argument[1]}}}"
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
    assert list(SERVICES["migrate"]["build"]["args"]) == ["PYTHON_IMAGE"]
    git_ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert {".env", "secrets/", ".local/"} <= set(git_ignored)


def test_image_has_nothing_left_that_installs_python_packages() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    final_stage = dockerfile[dockerfile.rindex("\nFROM ") :]
    assert re.search(r"python -m pip uninstall --yes .*\bpip\b", final_stage)
    assert "shutil.rmtree(ensurepip.__path__[0])" in final_stage
    assert not re.search(r"pip install|apt-get", final_stage)
