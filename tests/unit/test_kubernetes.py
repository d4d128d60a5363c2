"""deploy/kubernetes: valid for Kubernetes, hardened, and about the settings and roles that there are."""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path, PurePosixPath
from typing import Any

import kubernetes_validate
import pytest
import yaml

from services.cli import parser
from services.core.config import Settings
from services.local.certificates import Authority
from tests.fix_stack import ROOT

KUBERNETES = ROOT / "deploy/kubernetes"
BASE = KUBERNETES / "base"
OVERLAYS = sorted((KUBERNETES / "overlays").iterdir())
VERSIONS = ("1.30", "1.33")
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
WITH_PROBES = {"consumer", "etl"}

Object = dict[str, Any]


def load(path: Path) -> list[Object]:
    """The objects of a file."""
    return [item for item in yaml.safe_load_all(path.read_text(encoding="utf-8")) if item]


FILES = sorted(path for path in KUBERNETES.rglob("*.yaml") if path.name != "kustomization.yaml")
OBJECTS = {
    (item["kind"], item["metadata"]["name"]): item
    for path in BASE.glob("*.yaml")
    for item in load(path)
    if "metadata" in item
}
SETTINGS = {name: item["data"] for (kind, name), item in OBJECTS.items() if kind == "ConfigMap"}


def pod_template(item: Object) -> Object:
    """The pods that an object makes; empty if it makes none."""
    spec = item.get("spec", {})
    found: Object = spec.get("jobTemplate", {}).get("spec", spec).get("template", {})
    return found


WORKLOADS = {name: item for (_, name), item in OBJECTS.items() if pod_template(item)}
PODS = {name: pod_template(item)["spec"] for name, item in WORKLOADS.items()}


def container(name: str) -> Object:
    """The one container of a workload."""
    (found,) = PODS[name]["containers"]
    return dict(found)


def environment(name: str) -> dict[str, str]:
    """What the container of a workload gets."""
    values: dict[str, str] = {}
    for source in container(name)["envFrom"]:
        values |= SETTINGS[source["configMapRef"]["name"]]
    return values | {item["name"]: item["value"] for item in container(name).get("env", [])}


def secret_files(name: str) -> dict[str, tuple[str, str]]:
    """Path in the container, and from which Secret and key it comes."""
    mounted = {mount["name"]: mount["mountPath"] for mount in container(name)["volumeMounts"]}
    return {
        f"{mounted[volume['name']]}/{item['path']}": (volume["secret"]["secretName"], item["key"])
        for volume in PODS[name]["volumes"]
        if "secret" in volume
        for item in volume["secret"]["items"]
    }


def test_all_workloads_are_seen() -> None:
    assert set(WORKLOADS) == {"migrate", "producer", "consumer", "etl"}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(KUBERNETES).as_posix())
def test_every_object_is_valid(path: Path, version: str) -> None:
    """Strictly: a field that Kubernetes does not know is an error. A patch of an overlay is checked with its object."""
    for item in load(path):
        if BASE not in path.parents and (item["kind"], item["metadata"]["name"]) in OBJECTS:
            item = merged(OBJECTS[item["kind"], item["metadata"]["name"]], item)
        kubernetes_validate.validate(item, version, strict=True)


def merged(item: Any, patch: Any) -> Any:
    """A strategic merge, as far as the overlays need it: objects by key, lists of named objects by name."""
    if isinstance(item, dict) and isinstance(patch, dict):
        return item | {key: merged(item[key], value) if key in item else value for key, value in patch.items()}
    if isinstance(item, list) and all(isinstance(part, dict) and "name" in part for part in item + patch):
        named = {part["name"]: part for part in item}
        return list((named | {part["name"]: merged(named.get(part["name"]), part) for part in patch}).values())
    return patch


@pytest.mark.parametrize("folder", [BASE, *OVERLAYS], ids=lambda folder: folder.name)
def test_the_kustomization_names_every_file(folder: Path) -> None:
    (kustomization,) = load(folder / "kustomization.yaml")
    patches = [patch["path"] for patch in kustomization.get("patches", [])]
    named = [*kustomization["resources"], *patches]
    there = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
    assert {name for name in named if "/" not in name} == there
    assert all((folder / name).resolve().exists() for name in named)
    for patch in patches:
        for item in load(folder / patch):
            assert (item["kind"], item["metadata"]["name"]) in OBJECTS


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_every_variable_is_a_setting_with_an_allowed_value(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    authority, password = Authority(tmp_path).certificate, tmp_path / "password"
    password.write_text("secret", encoding="utf-8")
    given = environment(name)
    assert set(given) <= {field.upper() for field in Settings.model_fields}
    for variable, value in given.items():
        if PurePosixPath(value).is_absolute():
            assert value in secret_files(name), variable
            shutil.copy(authority if value.endswith("ca.crt") else password, tmp_path / variable)
            value = str(tmp_path / variable)
        monkeypatch.setenv(variable, value)
    assert Settings(_env_file=None).kafka_min_insync_replicas in (0, 2)


def test_overlays_set_nothing_but_settings() -> None:
    for path in FILES:
        for item in load(path):
            if item["kind"] == "ConfigMap":
                assert set(item["data"]) <= {field.upper() for field in Settings.model_fields}
            for found in pod_template(item).get("spec", {}).get("containers", []):
                assert {entry["name"] for entry in found.get("env", [])} <= {
                    field.upper() for field in Settings.model_fields
                }


def test_topics_survive_the_loss_of_a_broker() -> None:
    kafka = SETTINGS["kafka-settings"]
    assert int(kafka["KAFKA_REPLICATION_FACTOR"]) == 3
    assert int(kafka["KAFKA_MIN_INSYNC_REPLICAS"]) == 2
    assert OBJECTS["Deployment", "consumer"]["spec"]["replicas"] <= int(kafka["KAFKA_PARTITIONS"])


def test_no_secret_is_in_a_manifest() -> None:
    assert not [key for key in OBJECTS if key[0] == "Secret"]
    for name in WORKLOADS:
        assert not {variable for variable in environment(name) if re.search("PASSWORD$", variable)}


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda folder: folder.name)
def test_an_overlay_makes_every_secret_that_is_mounted(overlay: Path) -> None:
    (kustomization,) = load(overlay / "kustomization.yaml")
    made = {
        (secret["name"], file.partition("=")[0])
        for secret in kustomization["secretGenerator"]
        for file in secret["files"]
    }
    assert {place for name in WORKLOADS for place in secret_files(name).values()} == made
    files = [file.partition("=")[2] for secret in kustomization["secretGenerator"] for file in secret["files"]]
    assert all(file.startswith("secrets/") for file in files)
    assert "/deploy/kubernetes/overlays/*/secrets/" in (ROOT / ".gitignore").read_text(encoding="utf-8").split()


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_what_runs_is_a_command_of_ours(name: str) -> None:
    program, *arguments = container(name)["command"]
    assert program in {"sensor-pipeline", "alembic"}
    if program == "sensor-pipeline":
        parser().parse_args(arguments)


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_images_are_pinned(name: str) -> None:
    assert container(name)["image"] == f"sensor-pipeline:{VERSION}"
    for overlay in OVERLAYS:
        (kustomization,) = load(overlay / "kustomization.yaml")
        (image,) = kustomization["images"]
        assert (image["name"], image["newTag"]) == ("sensor-pipeline", VERSION)


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_pods_are_hardened(name: str) -> None:
    pod, ours = PODS[name], container(name)
    assert pod["automountServiceAccountToken"] is False
    security = pod["securityContext"]
    assert security["runAsNonRoot"] is True
    assert f"USER {security['runAsUser']}:{security['runAsGroup']}\n" in (ROOT / "Dockerfile").read_text(
        encoding="utf-8"
    )
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert ours["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"cpu", "memory"} == set(ours["resources"]["requests"])
    assert "memory" in ours["resources"]["limits"]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    writable = [mount["mountPath"] for mount in ours["volumeMounts"] if not mount.get("readOnly")]
    assert writable == ["/tmp"]  # noqa: S108
    assert all(volume.keys() <= {"name", "secret", "emptyDir"} for volume in pod["volumes"])


@pytest.mark.parametrize("name", sorted(WITH_PROBES))
def test_long_running_services_have_probes_and_may_be_moved(name: str) -> None:
    ours, workload = container(name), WORKLOADS[name]
    (port,) = ours["ports"]
    assert str(port["containerPort"]) == environment(name)["METRICS_PORT"]
    assert environment(name)["METRICS_HOST"] == "0.0.0.0"  # noqa: S104
    for probe, path in (("livenessProbe", "/livez"), ("readinessProbe", "/readyz")):
        assert ours[probe]["httpGet"] == {"path": path, "port": port["name"]}
    labels = pod_template(workload)["metadata"]["labels"]
    assert workload["spec"]["selector"]["matchLabels"] == labels
    budget = OBJECTS["PodDisruptionBudget", name]["spec"]
    assert budget == {"maxUnavailable": 1, "selector": {"matchLabels": labels}}
    assert workload["spec"]["replicas"] > 1
    (spread,) = PODS[name]["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == labels


def test_each_service_has_its_own_role_and_no_more_secrets_than_it_needs() -> None:
    roles = {name: environment(name).get("POSTGRE_USER") for name in WORKLOADS}
    assert roles == {"migrate": "postgres", "producer": None, "consumer": "sensor_consumer", "etl": "sensor_etl"}
    secrets = {name: {secret for secret, _ in secret_files(name).values()} for name in WORKLOADS}
    postgre, kafka = "postgre-credentials", "kafka-credentials"
    assert secrets == {"migrate": {postgre}, "producer": {kafka}, "consumer": {postgre, kafka}, "etl": {postgre}}


def test_the_network_policy_is_about_all_pods_and_the_ports_of_the_settings() -> None:
    policy = OBJECTS["NetworkPolicy", "sensor-pipeline"]["spec"]
    (expression,) = policy["podSelector"]["matchExpressions"]
    names = {pod_template(item)["metadata"]["labels"]["app.kubernetes.io/name"] for item in WORKLOADS.values()}
    assert (expression["operator"], set(expression["values"])) == ("In", names)
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    (entry,) = policy["ingress"]
    assert [str(port["port"]) for port in entry["ports"]] == [SETTINGS["settings"]["METRICS_PORT"]]
    out = {str(port["port"]) for rule in policy["egress"] for port in rule["ports"]}
    assert out == {"53", SETTINGS["kafka-settings"]["KAFKA_PORT"], SETTINGS["postgre-settings"]["POSTGRE_PORT"]}
