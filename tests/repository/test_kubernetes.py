"""deploy/kubernetes: valid for Kubernetes, hardened, and about the settings and roles that there are."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path, PurePosixPath
from typing import Any

import kubernetes_validate
import pytest
import yaml

from services.cli import parser
from services.core.config import load_settings, settings_type
from services.core.measurements import DEFAULT
from services.local.certificates import Authority
from tests import ROOT
from tests.repository.test_compose import SERVICES as COMPOSE

KUBERNETES = ROOT / "deploy/kubernetes"
BASE = KUBERNETES / "base"
COMPONENTS = sorted((KUBERNETES / "components").iterdir())
OVERLAYS = sorted((KUBERNETES / "overlays").iterdir())
VERSIONS = ("1.30", "1.33")
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
WITH_PROBES = {"consumer", "etl"}
SERVICES = {"producer", *WITH_PROBES}
COMPONENT = "app.kubernetes.io/component"
CREDENTIALS, AUTHORITIES = "/run/secrets/pipeline", "/run/authorities"

Object = dict[str, Any]


def load(path: Path) -> list[Object]:
    """The objects of a file."""
    return [item for item in yaml.safe_load_all(path.read_text(encoding="utf-8")) if item]


FILES = sorted(path for path in KUBERNETES.rglob("*.yaml") if path.name != "kustomization.yaml")
OF_OPERATORS = {"PodMonitor", "ScaledObject"}  # their schemas come with them
OBJECTS = {
    (item["kind"], item["metadata"]["name"]): item
    for path in BASE.glob("*.yaml")
    for item in load(path)
    if "metadata" in item
}
(KUSTOMIZATION,) = load(BASE / "kustomization.yaml")


def variables(lines: list[str]) -> dict[str, str]:
    """What lines of the form NAME=value set."""
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


SETTINGS = {
    source["name"]: variables((BASE / source["envs"][0]).read_text(encoding="utf-8").splitlines())
    for source in KUSTOMIZATION["configMapGenerator"]
}


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


def made(overlay: Path, generator: str) -> dict[str, dict[str, str]]:
    """The files that an overlay puts into Secrets or ConfigMaps: by name and key, where they come from."""
    (kustomization,) = load(overlay / "kustomization.yaml")
    return {
        source["name"]: variables(source["files"])
        for source in kustomization[generator]
        if source.get("files") is not None
    }


def mounted(name: str) -> dict[str, str]:
    """Where the container of a workload mounts which Secret or ConfigMap."""
    places = {mount["name"]: mount["mountPath"] for mount in container(name)["volumeMounts"]}
    found = {}
    for volume in PODS[name]["volumes"]:
        if "emptyDir" not in volume:
            source = volume["secret"]["secretName"] if "secret" in volume else volume["configMap"]["name"]
            found[places[volume["name"]]] = source
    return found


def test_all_workloads_are_seen() -> None:
    assert set(WORKLOADS) == {"migrate", "producer", "consumer", "etl", "toolbox"}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(KUBERNETES).as_posix())
def test_every_object_is_valid(path: Path, version: str) -> None:
    """Strictly: a field that Kubernetes does not know is an error. A patch of an overlay is checked with its object."""
    for item in load(path):
        if BASE not in path.parents and (item["kind"], item["metadata"]["name"]) in OBJECTS:
            item = merged(OBJECTS[item["kind"], item["metadata"]["name"]], item)
        if item["kind"] not in OF_OPERATORS:
            kubernetes_validate.validate(item, version, strict=True)


def merged(item: Any, patch: Any) -> Any:
    """A strategic merge, as far as the overlays need it: objects by key, lists of named objects by name."""
    if isinstance(item, dict) and isinstance(patch, dict):
        return item | {key: merged(item[key], value) if key in item else value for key, value in patch.items()}
    if isinstance(item, list) and all(isinstance(part, dict) and "name" in part for part in item + patch):
        named = {part["name"]: part for part in item}
        return list((named | {part["name"]: merged(named.get(part["name"]), part) for part in patch}).values())
    return patch


@pytest.mark.parametrize("folder", [BASE, *OVERLAYS, *COMPONENTS], ids=lambda folder: folder.name)
def test_the_kustomization_names_every_file(folder: Path) -> None:
    (kustomization,) = load(folder / "kustomization.yaml")
    patches = [patch["path"] for patch in kustomization.get("patches", []) if "path" in patch]
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
    assert set(given) <= {field.upper() for field in settings_type(DEFAULT).model_fields}
    for variable, value in given.items():
        if PurePosixPath(value).is_absolute():
            assert PurePosixPath(value).parent.as_posix() in mounted(name), variable
            shutil.copy(authority if value.endswith(".crt") else password, tmp_path / variable)
            value = str(tmp_path / variable)
        monkeypatch.setenv(variable, value)
    assert load_settings().kafka_min_insync_replicas in (0, 2)


def test_overlays_set_nothing_but_settings() -> None:
    known = {field.upper() for field in settings_type(DEFAULT).model_fields}
    for overlay in OVERLAYS:
        (kustomization,) = load(overlay / "kustomization.yaml")
        for source in kustomization["configMapGenerator"]:
            assert (source.get("behavior") == "merge") == (source["name"] in SETTINGS)
            lines = [(overlay / name).read_text(encoding="utf-8").splitlines() for name in source.get("envs", [])]
            for each in (source.get("literals", []), *lines):
                assert set(variables(each)) <= known
    for path in FILES:
        for item in load(path):
            for found in pod_template(item).get("spec", {}).get("containers", []):
                assert {entry["name"] for entry in found.get("env", [])} <= known


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
def test_an_overlay_makes_what_is_mounted_and_no_more(overlay: Path) -> None:
    secrets, authorities = made(overlay, "secretGenerator"), made(overlay, "configMapGenerator")
    assert set(secrets) == {f"{name}-credentials" for name in WORKLOADS}
    for name in WORKLOADS:
        assert mounted(name) == {AUTHORITIES: "authorities", CREDENTIALS: f"{name}-credentials"}
        files = {f"{CREDENTIALS}/{key}" for key in secrets[f"{name}-credentials"]}
        used = {value for value in environment(name).values() if PurePosixPath(value).is_absolute()}
        assert {value for value in used if value.startswith(CREDENTIALS)} == files
        assert used - files <= {f"{AUTHORITIES}/{key}" for key in authorities["authorities"]}
    named = [file for source in (secrets | authorities).values() for file in source.values()]
    assert all(file.startswith("secrets/") for file in named)
    assert "/deploy/kubernetes/overlays/*/secrets/" in (ROOT / ".gitignore").read_text(encoding="utf-8").split()


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_what_runs_is_a_command_of_ours(name: str) -> None:
    program, *arguments = container(name)["command"]
    if name == "toolbox":
        assert program == "python"
    elif name == "migrate":  # as in Compose
        assert [program, *arguments] == COMPOSE["migrate"]["command"]
    else:
        assert program == "sensor-pipeline"
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
    assert pod["enableServiceLinks"] is False  # a Service named kafka would set KAFKA_PORT=tcp://...
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
    assert {"cpu", "memory", "ephemeral-storage"} == set(ours["resources"]["requests"])
    assert {"memory", "ephemeral-storage"} == set(ours["resources"]["limits"])
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    writable = [mount["mountPath"] for mount in ours["volumeMounts"] if not mount.get("readOnly")]
    assert writable == ["/tmp"]  # noqa: S108
    assert all(volume.keys() <= {"name", "secret", "configMap", "emptyDir"} for volume in pod["volumes"])


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


def test_each_service_has_its_own_users_and_no_more_servers_than_it_needs() -> None:
    roles = {name: environment(name).get("POSTGRE_USER") for name in WORKLOADS}
    assert roles == {
        "migrate": "postgres",
        "producer": None,
        "consumer": "sensor_consumer",
        "etl": "sensor_etl",
        "toolbox": "sensor_etl",
    }
    users = {name: environment(name).get("KAFKA_SASL_USERNAME") for name in WORKLOADS}
    assert users == {
        name: f"sensor-{name}" if name in {"producer", "consumer", "toolbox"} else None for name in WORKLOADS
    }
    for name in WORKLOADS:
        assert ("KAFKA_HOST" in environment(name)) == (users[name] is not None)
        assert ("POSTGRE_HOST" in environment(name)) == (roles[name] is not None)


def selected(policy: Object) -> set[str]:
    """The workloads that a network policy is about."""
    names = {pod_template(item)["metadata"]["labels"][COMPONENT] for item in WORKLOADS.values()}
    expressions = policy["podSelector"].get("matchExpressions", [])
    for expression in expressions:
        assert (expression["key"], expression["operator"]) == (COMPONENT, "In")
        names &= set(expression["values"])
    return names


def test_network_policies_let_each_pod_reach_its_servers_and_nothing_else() -> None:
    policies = {name: item["spec"] for (kind, name), item in OBJECTS.items() if kind == "NetworkPolicy"}
    assert set(policies) == {"names", "to-kafka", "to-postgre", "metrics"}
    assert set(policies["names"]["policyTypes"]) == {"Ingress", "Egress"}
    assert selected(policies["names"]) == set(WORKLOADS)
    out: dict[str, set[str]] = {name: set() for name in WORKLOADS}
    for policy in policies.values():
        for rule in policy.get("egress", []):
            for name in selected(policy):
                out[name] |= {str(port["port"]) for port in rule["ports"]}
    for name in WORKLOADS:
        servers = {value for key, value in environment(name).items() if key in {"KAFKA_PORT", "POSTGRE_PORT"}}
        assert out[name] == {"53"} | servers
    (entry,) = policies["metrics"]["ingress"]
    assert [str(port["port"]) for port in entry["ports"]] == [SETTINGS["settings"]["METRICS_PORT"]]
    assert selected(policies["metrics"]) == SERVICES
    assert not any("ingress" in policy for name, policy in policies.items() if name != "metrics")


def test_the_pod_monitor_names_jobs_as_the_alerts_expect() -> None:
    (monitor,) = load(KUBERNETES / "components/monitoring/pod-monitor.yaml")
    spec = monitor["spec"]
    assert spec["jobLabel"] == COMPONENT
    (expression,) = spec["selector"]["matchExpressions"]
    assert (expression["key"], set(expression["values"])) == (COMPONENT, SERVICES)
    (endpoint,) = spec["podMetricsEndpoints"]
    for name in SERVICES:
        assert pod_template(WORKLOADS[name])["metadata"]["labels"] == {COMPONENT: name}
        assert endpoint["port"] in [port["name"] for port in container(name)["ports"]]
    (labels,) = KUSTOMIZATION["labels"]
    assert labels == {"pairs": spec["selector"]["matchLabels"], "includeSelectors": True}


def test_scaling_stays_within_the_partitions() -> None:
    (scaled,) = load(KUBERNETES / "components/scaling/scaled-object.yaml")
    assert scaled["spec"]["minReplicaCount"] == OBJECTS["Deployment", "consumer"]["spec"]["replicas"]
    assert scaled["spec"]["maxReplicaCount"] == int(SETTINGS["kafka-settings"]["KAFKA_PARTITIONS"])


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """A copy of the example, with files where its passwords and authorities belong."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    example = tmp_path / "kubernetes/overlays/example"
    (example / "secrets").mkdir(exist_ok=True)
    for generator in ("secretGenerator", "configMapGenerator"):
        for files in made(OVERLAYS[0], generator).values():
            for file in files.values():
                (example / file).write_text("made up", encoding="utf-8")
    return example


def build(overlay: Path) -> dict[tuple[str, str], Object]:
    """The objects, as kubectl would apply them."""
    built = subprocess.run(["kubectl", "kustomize", str(overlay)], capture_output=True, text=True, check=True).stdout
    return {(item["kind"], item["metadata"]["name"]): item for item in yaml.safe_load_all(built)}


def uncomment(path: Path, pattern: str) -> list[str]:
    """Make the lines active that match; they are returned."""
    text, found = path.read_text(encoding="utf-8"), re.compile(rf"^# ({pattern})$", re.MULTILINE)
    path.write_text(found.sub(r"\1", text), encoding="utf-8")
    return [match[1] for match in found.finditer(text)]


def test_measurements_are_added_by_lines_that_every_pod_gets(example: Path) -> None:
    """The example of the file's comments; as it comes, the file changes nothing."""
    before = build(example)
    lines = uncomment(example / "measurements.env", "[A-Z0-9_]+=.*")
    assert len(lines) == 3
    after = build(example)
    ((_, old),) = (key for key in before if key[1].startswith("sensor-settings-"))
    ((_, new),) = (key for key in after if key[1].startswith("sensor-settings-"))
    assert new != old  # so that the change is rolled out
    assert before["ConfigMap", old]["data"] == SETTINGS["settings"]
    assert after["ConfigMap", new]["data"] == SETTINGS["settings"] | variables(lines)
    pods = {name: pod_template(item)["spec"] for (_, name), item in after.items() if pod_template(item)}
    assert set(pods) == {f"sensor-{name}" for name in WORKLOADS}
    for pod in pods.values():
        (ours,) = pod["containers"]
        assert {"configMapRef": {"name": new}} in ours["envFrom"]


def test_the_example_is_built_with_every_component(example: Path) -> None:
    """As kubectl would apply it: names have the prefix and a hash, references follow, and every object is valid."""
    assert len(uncomment(example / "kustomization.yaml", r"components:|  - \.\./.*")) == 1 + len(COMPONENTS)
    objects = build(example)
    kinds = {kind for kind, _ in objects}
    assert kinds > OF_OPERATORS
    for (kind, name), item in objects.items():
        if kind not in OF_OPERATORS:
            kubernetes_validate.validate(item, VERSIONS[-1], strict=True)
        if kind != "Namespace":
            assert name.startswith("sensor-")
            assert item["metadata"]["namespace"] == "sensors"
        if kind in {"ConfigMap", "Secret"}:
            assert re.search("-[0-9a-z]{10}$", name)
        for volume in pod_template(item).get("spec", {}).get("volumes", []):
            assert "secret" not in volume or ("Secret", volume["secret"]["secretName"]) in objects
            assert "configMap" not in volume or ("ConfigMap", volume["configMap"]["name"]) in objects
        for entry in pod_template(item).get("spec", {}).get("containers", []):
            assert all(("ConfigMap", source["configMapRef"]["name"]) in objects for source in entry["envFrom"])
    consumer = objects["Deployment", "sensor-consumer"]["spec"]
    assert "replicas" not in consumer
    assert objects["ScaledObject", "sensor-consumer"]["spec"]["scaleTargetRef"] == {"name": "sensor-consumer"}
    labels = {"app.kubernetes.io/name": "sensor-pipeline", COMPONENT: "consumer"}
    assert consumer["selector"]["matchLabels"] == consumer["template"]["metadata"]["labels"] == labels
    assert objects["PodDisruptionBudget", "sensor-consumer"]["spec"]["selector"]["matchLabels"] == labels
    ours = {"app.kubernetes.io/name": "sensor-pipeline"}
    policies = [item["spec"]["podSelector"] for (kind, _), item in objects.items() if kind == "NetworkPolicy"]
    assert all(ours.items() <= selector["matchLabels"].items() for selector in policies)
