"""The metrics that the services really register."""

from __future__ import annotations

from types import ModuleType

from prometheus_client import REGISTRY
from prometheus_client.registry import Collector

from services.consumer import metrics as consumer
from services.core import monitoring
from services.etl import metrics as etl
from services.producer import metrics as producer

MODULES = {"Every service": monitoring, "Producer": producer, "Consumer": consumer, "Etl": etl}
SUFFIXES = {"counter": ["_total"], "info": ["_info"], "histogram": ["_bucket", "_sum", "_count"]}


def registered(module: ModuleType) -> dict[str, tuple[str, set[str]]]:
    """Type and labels of the metrics that a module registers, by the name that people know."""
    found = {}
    for collector in vars(module).values():
        if hasattr(collector, "describe") and collector in REGISTRY._collector_to_names:
            for metric in collector.describe():
                suffix = "" if metric.type == "histogram" else SUFFIXES.get(metric.type, [""])[0]
                found[metric.name + suffix] = metric.type, labels_of(collector)
    return found


def labels_of(collector: Collector) -> set[str]:
    """The labels, without those that Prometheus adds."""
    return {"service", "version"} if collector is monitoring.BUILD else set(getattr(collector, "_labelnames", ()))


def samples() -> dict[str, set[str]]:
    """The labels of every series that Prometheus stores, by its name."""
    found = {}
    for module in MODULES.values():
        for name, (kind, labels) in registered(module).items():
            for suffix in SUFFIXES["histogram"] if kind == "histogram" else [""]:
                found[name + suffix] = labels | {"job", "instance"} | ({"le"} if suffix == "_bucket" else set())
    return found | {
        sample.name: {"job", "instance"}
        for metric in REGISTRY.collect()
        if metric.name.startswith("process_")
        for sample in metric.samples
    }
