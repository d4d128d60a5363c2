"""Each alert fires in its situation and only there: a table of situations, checked by Prometheus' own rule tests."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fix_stack import ROOT

RULES = ROOT / "deploy/monitoring/prometheus/alerts.yml"
ALERTS = [
    rule["alert"] for group in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]
]
SEVERITY = {
    rule["alert"]: rule["labels"]["severity"]
    for group in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
}
EVERY_S = 30
HOURS = 4
SAMPLES = HOURS * 3600 // EVERY_S
EVENT = 3600 // EVERY_S  # in each situation something happens after an hour of health

pytestmark = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (part of Prometheus; Debian: prometheus)"
)

Series = Mapping[str, str]


def always(value: float) -> str:
    """The same value from beginning to end."""
    return f"{value}x{SAMPLES}"


def then(before: float | str, *steps: tuple[int, float | str]) -> str:
    """``before`` until the event; then, for this many minutes each, another value, or a growth like "+5" per sample.

    "gone" is a series that has ended. The last step lasts.
    """
    parts = [_run(before, EVENT, 0.0)]
    level = 0.0 if isinstance(before, str) else before
    left = SAMPLES - EVENT
    for number, (minutes, value) in enumerate(steps):
        count = left if number == len(steps) - 1 else minutes * 60 // EVERY_S
        parts.append(_run(value, count, level))
        if isinstance(value, str) and value.startswith("+"):
            level += float(value) * count
        elif not isinstance(value, str):
            level = value
        left -= count
    return " ".join(parts)


def _run(value: float | str, count: int, level: float) -> str:
    if value == "gone":
        return f"stale _x{count - 1}"
    if isinstance(value, str):
        return f"{level + float(value)}{value}x{count - 1}"
    return f"{value}x{count - 1}"


def service(job: str, instance: str, servers: Sequence[str], **labels: str) -> dict[str, str]:
    """What every healthy service tells."""
    common = ",".join(f'{name}="{value}"' for name, value in {"job": job, "instance": instance, **labels}.items())
    series = {f"sensor_ready{{{common}}}": always(1), f"up{{{common}}}": always(1)}
    series[f"process_start_time_seconds{{{common}}}"] = always(1000)
    for server in servers:
        series[f'sensor_server_connected{{{common},server="{server}"}}'] = always(1)
        series[f'sensor_outages_total{{{common},server="{server}"}}'] = always(0)
    return series


def consumer(instance: str, partition: int) -> dict[str, str]:
    """A healthy consumer with one partition, to which five readings come per second."""
    own = f'job="consumer",instance="{instance}"'
    return service("consumer", instance, ["kafka", "database"]) | {
        f'sensor_consumer_lag_messages{{{own},partition="{partition}"}}': always(3),
        f"sensor_consumer_expiring_messages{{{own}}}": always(0),
        f'sensor_readings_stored_total{{{own},result="inserted"}}': f"0+150x{SAMPLES}",
        f'sensor_readings_stored_total{{{own},result="updated"}}': always(0),
        f'sensor_dead_letters_total{{{own},reason="invalid_json"}}': always(0),
        f'sensor_dead_letters_total{{{own},reason="too_late"}}': always(0),
        f"sensor_messages_expired_total{{{own}}}": always(0),
    }


def etl(instance: str, leading: int) -> dict[str, str]:
    """A healthy etl."""
    own = f'job="etl",instance="{instance}"'
    return service("etl", instance, ["database"]) | {
        f"sensor_etl_leading{{{own}}}": always(leading),
        f"sensor_freshness_seconds{{{own}}}": always(1),
        f"sensor_refresh_queue_age_seconds{{{own}}}": always(1),
    }


def producer(**changes: str) -> dict[str, str]:
    """A healthy producer that watches."""
    own = 'job="producer",instance="p1"'
    return service("producer", "p1", ["kafka"]) | {
        f"sensor_producer_watching{{{own}}}": always(1),
        f'sensor_rows_skipped_total{{{own},reason="no_time"}}': always(0),
        f"sensor_files_unreadable_total{{{own}}}": always(0),
        **changes,
    }


DISK = 'job="node",instance="n1",device="/dev/sda1",fstype="ext4"'
SERVER = 'job="postgres",instance="d1"'
CONSUMERS, ETLS = ("c1", "c2", "c3"), ("e1", "e2")
HEALTHY: dict[str, str] = {
    **consumer("c1", 0),
    **consumer("c2", 1),
    **consumer("c3", 2),
    **etl("e1", 1),
    **etl("e2", 0),
    **producer(),
    'up{job="node",instance="n1"}': always(1),
    f"up{{{SERVER}}}": always(1),
    f'node_filesystem_avail_bytes{{{DISK},mountpoint="/"}}': always(50),
    f'node_filesystem_size_bytes{{{DISK},mountpoint="/"}}': always(100),
    f'node_filesystem_avail_bytes{{{DISK},mountpoint="/var/lib/docker"}}': always(50),
    f'node_filesystem_size_bytes{{{DISK},mountpoint="/var/lib/docker"}}': always(100),
    f'pg_stat_database_numbackends{{{SERVER},datname="sensors"}}': always(20),
    f'pg_stat_database_numbackends{{{SERVER},datname="postgres"}}': always(2),
    f"pg_settings_max_connections{{{SERVER}}}": always(100),
    f'pg_database_wraparound_age_datfrozenxid_seconds{{{SERVER},datname="sensors"}}': always(1e8),
}


def without(*fragments: str, after: str = "") -> dict[str, str]:
    """The series that have one of these fragments: gone from the event on, or ``after`` it as said."""
    return {name: after or ended(name) for name in HEALTHY if any(fragment in name for fragment in fragments)}


def ended(name: str) -> str:
    """A series that is there until the event."""
    value = HEALTHY[name]
    if "+" in value:
        return f"{value.split('x')[0]}x{EVENT - 1} stale _x{SAMPLES - EVENT}"
    return then(float(value.split("x")[0]), (0, "gone"))


def having(name: str, value: str, **labels: str) -> dict[str, str]:
    """All series of this metric with these labels."""
    wanted = [f'{label}="{each}"' for label, each in labels.items()]
    found = {
        series: value for series in HEALTHY if series.startswith(f"{name}{{") and all(each in series for each in wanted)
    }
    assert found, name
    return found


def stored_nothing(*instances: str, back: tuple[int, str] | None = None) -> dict[str, str]:
    """No reading is stored from the event on, by these consumers."""
    steps: list[tuple[int, float | str]] = [(back[0], "+0"), (0, back[1])] if back else [(0, "+0")]
    text = f"0+150x{EVENT - 1} "
    level = 150.0 * (EVENT - 1)
    left = SAMPLES - EVENT
    parts = []
    for number, (minutes, growth) in enumerate(steps):
        count = left if number == len(steps) - 1 else minutes * 60 // EVERY_S
        parts.append(f"{level}{growth}x{count - 1}")
        left -= count
    changes: dict[str, str] = {}
    for instance in instances:
        changes |= having("sensor_readings_stored_total", text + " ".join(parts), instance=instance, result="inserted")
    return changes


def database_away(minutes: int) -> dict[str, str]:
    """The database is stopped for this long; then everybody works on what waits."""
    away = then(1, (minutes, 0), (0, 1))
    changes = having("sensor_server_connected", away, server="database")
    changes |= having("sensor_ready", away, job="consumer") | having("sensor_ready", away, job="etl")
    changes |= having("sensor_outages_total", then(0, (0, 1)), server="database")
    changes |= having("sensor_consumer_lag_messages", then(3, (minutes, "+500"), (3, "-100"), (0, 3)))
    changes |= having("sensor_freshness_seconds", then(1, (minutes, "+30"), (1, 40), (0, 1)))
    changes |= having("sensor_etl_leading", then(1, (minutes + 1, 0), (0, 1)), instance="e1")
    changes |= having("sensor_refresh_queue_age_seconds", then(1, (minutes, "gone"), (0, 1)))
    return changes | stored_nothing(*CONSUMERS, back=(minutes, "+400"))


Fires = dict[str, list[dict[str, str]]]


@dataclass(frozen=True)
class Situation:
    """What changes from the event on, and which alerts fire so many minutes after it; no others do, ever."""

    name: str
    series: Series
    fires: dict[int, Fires] = field(default_factory=dict)
    quiet: Sequence[int] = ()  # minutes after the event at which nothing fires

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


KAFKA_AWAY = then(1, (30, 0), (0, 1))


def first_seen(value: float) -> str:
    """A series that begins at the event with this value: what it counts happened before Prometheus first looked."""
    return f"_x{EVENT} {value}x{SAMPLES - EVENT}"


LETTER = 'sensor_dead_letters_total{job="consumer",instance="c1",reason="invalid_json"}'
SITUATIONS = [
    Situation("all is well", {}, quiet=(-30, 0, 30, 120)),
    Situation(
        "database down and up again",
        database_away(30),
        fires={minute: {"SensorServerUnavailable": [{"server": "database"}]} for minute in (3, 12, 29)},
        quiet=(1, 31, 35, 45, 60),
    ),
    Situation("database restarted", database_away(1), quiet=(1, 2, 3, 5, 10, 20)),
    Situation(
        "database goes and comes again and again",
        having("sensor_outages_total", then(0, (0, "+0.2")), job="consumer", server="database"),
        fires={20: {"SensorOutages": [{"job": "consumer", "server": "database"}]}},
    ),
    Situation(
        "broker down",
        having("sensor_server_connected", KAFKA_AWAY, server="kafka")
        | having("sensor_ready", KAFKA_AWAY, job="consumer")
        | having("sensor_ready", KAFKA_AWAY, job="producer")
        | having("sensor_outages_total", then(0, (0, 1)), server="kafka")
        | stored_nothing(*CONSUMERS, back=(30, "+150")),
        fires={minute: {"SensorServerUnavailable": [{"server": "kafka"}]} for minute in (3, 12, 29)},
        quiet=(1, 31, 40),
    ),
    Situation(
        "one of three consumers killed, its partition taken over",
        without('instance="c3"')
        | {'sensor_consumer_lag_messages{job="consumer",instance="c1",partition="2"}': then("gone", (0, 3))},
        quiet=(1, 5, 30),
    ),
    Situation(
        "one consumer killed and started again",
        having("process_start_time_seconds", then(1000, (0, 5000)), instance="c3")
        | having(
            "sensor_readings_stored_total",
            f"0+150x{EVENT - 1} 0+150x{SAMPLES - EVENT}",
            instance="c3",
            result="inserted",
        ),
        quiet=(1, 5, 30),
    ),
    Situation(
        "every consumer killed",
        without('job="consumer"'),
        fires={minute: {"SensorServiceAbsent": [{"job": "consumer"}]} for minute in (3, 30, 120)},
        quiet=(1,),
    ),
    Situation(
        "a consumer is killed for its memory again and again",
        having("process_start_time_seconds", then(1000, (3, 2000), (3, 3000), (3, 4000), (0, 5000)), instance="c2"),
        fires={12: {"SensorServiceRestarts": [{"job": "consumer"}]}},
        quiet=(4, 60),
    ),
    Situation(
        "one consumer cut off from the database",
        having("sensor_server_connected", then(1, (0, 0)), instance="c2", server="database")
        | having("sensor_ready", then(1, (0, 0)), instance="c2")
        | stored_nothing("c2"),
        fires={minute: {"SensorServiceNotReady": [{"job": "consumer"}]} for minute in (3, 30, 120)},
        quiet=(1,),
    ),
    Situation(
        "one consumer cut off from Prometheus",
        {**without('instance="c2"'), 'up{job="consumer",instance="c2"}': then(1, (0, 0))},
        fires={10: {"SensorServiceUnreachable": [{"job": "consumer"}]}},
        quiet=(3,),
    ),
    Situation(
        "etl stopped",
        without('job="etl"'),
        fires={minute: {"SensorServiceAbsent": [{"job": "etl"}]} for minute in (3, 30, 120)},
        quiet=(1,),
    ),
    Situation(
        "the leading etl killed, the other one takes over",
        without('instance="e1"') | having("sensor_etl_leading", then(0, (1, 0), (0, 1)), instance="e2"),
        quiet=(1, 2, 5, 30),
    ),
    Situation(
        "a session that nobody knows holds the lease",
        having("sensor_etl_leading", then(1, (0, 0)), instance="e1"),
        fires={5: {"SensorNoLeader": [{}]}},
        quiet=(1,),
    ),
    Situation(
        "summaries take long",
        having("sensor_freshness_seconds", then(1, (0, "+30"))),
        fires={20: {"SensorSummariesStale": [{}]}},
        quiet=(1,),
    ),
    Situation(
        "a refresh fails for ever",
        having("sensor_freshness_seconds", then(1, (0, "+30")))
        | having("sensor_refresh_queue_age_seconds", then(1, (0, "+30"))),
        fires={20: {"SensorSummariesStale": [{}], "SensorRefreshQueueOld": [{}]}},
    ),
    Situation(
        "the producer that watched is absent",
        without('job="producer"'),
        fires={minute: {"SensorProducerAbsent": [{}]} for minute in (15, 120)},
        quiet=(5,),
    ),
    Situation(
        "a producer that ends has ended",
        {**without('job="producer"'), 'sensor_producer_watching{job="producer",instance="p1"}': then(0, (0, "gone"))},
        quiet=(5, 30, 120),
    ),
    Situation(
        "the producer's job fails",
        {
            'kube_cronjob_created{cronjob="prod-producer"}': always(0),
            'kube_cronjob_status_last_schedule_time{cronjob="prod-producer"}': f"0+30x{SAMPLES}",
            'kube_cronjob_status_last_successful_time{cronjob="prod-producer"}': f"0+30x{EVENT} {30 * EVENT}x{SAMPLES}",
        },
        fires={75: {"SensorProducerAbsent": [{}]}},
        quiet=(-10, 30, 60),
    ),
    Situation(
        "a run of the producer's job takes three hours",
        {
            'kube_cronjob_created{cronjob="producer"}': always(0),
            'kube_cronjob_status_last_schedule_time{cronjob="producer"}': always(600),
        },
        quiet=(60, 170),
    ),
    Situation(
        "a poison message",
        {LETTER: then(0, (0, 1))},
        fires={
            1: {"SensorDeadLetters": [{"reason": "invalid_json"}]},
            9: {"SensorDeadLetters": [{"reason": "invalid_json"}]},
        },
        quiet=(15,),
    ),
    Situation(
        "a poison message that the consumer met before it was first looked at",
        {LETTER: first_seen(1)},
        fires={1: {"SensorDeadLetters": [{"reason": "invalid_json"}]}},
        quiet=(15,),
    ),
    Situation(
        "lag growing",
        having("sensor_consumer_lag_messages", then(3, (0, "+500")), instance="c2"),
        fires={20: {"SensorLagGrowing": [{}]}},
        quiet=(2, 5),
    ),
    Situation(
        "lag that shrinks after history was loaded, while a partition moves",
        having("sensor_consumer_lag_messages", then(3, (1, 50_000), (0, "-100")), instance="c2")
        | having("sensor_consumer_lag_messages", then(3, (20, "gone"), (0, 3)), instance="c3"),
        quiet=(20, 25, 30, 60),
    ),
    Situation(
        "lag flat but nothing stored",
        having("sensor_consumer_lag_messages", then(3, (0, 5))) | stored_nothing(*CONSUMERS),
        fires={30: {"SensorNothingStored": [{}]}},
        quiet=(5, 15),
    ),
    Situation(
        "one of three consumers stores nothing",
        having("sensor_consumer_lag_messages", then(3, (0, 500)), instance="c2") | stored_nothing("c2"),
        fires={30: {"SensorNothingStored": [{}]}},
        quiet=(5, 15),
    ),
    Situation(
        "nothing comes",
        having("sensor_consumer_lag_messages", then(3, (0, 0))) | stored_nothing(*CONSUMERS),
        quiet=(30, 120),
    ),
    Situation(
        "nothing but malformed messages",
        stored_nothing(*CONSUMERS)
        | having("sensor_dead_letters_total", f"0x{EVENT - 1} 0+150x{SAMPLES - EVENT}", reason="invalid_json"),
        fires={30: {"SensorDeadLetters": [{"reason": "invalid_json"}]}},
    ),
    Situation(
        "lag age near the topic's retention",
        having("sensor_consumer_expiring_messages", then(0, (0, 7)), instance="c2")
        | having("sensor_consumer_expiring_messages", then(0, (0, "gone")), instance="c3"),
        fires={10: {"SensorMessagesExpiring": [{}]}},
        quiet=(3,),
    ),
    Situation(
        "the retention cannot be asked for",
        having("sensor_consumer_expiring_messages", " ".join(["NaN"] * SAMPLES)),
        quiet=(30,),
    ),
    Situation(
        "messages had expired when the consumer came back",
        having("sensor_messages_expired_total", first_seen(900), instance="c1"),
        fires={1: {"SensorMessagesExpired": [{}]}, 50: {"SensorMessagesExpired": [{}]}},
        quiet=(70,),
    ),
    Situation(
        "self-check found a difference",
        {'sensor_summary_differences_total{job="etl",instance="e1",measurement="humidity"}': first_seen(2)},
        fires={1: {"SensorSummaryDifferences": [{"measurement": "humidity"}]}},
        quiet=(70,),
    ),
    Situation(
        "compression fails",
        {'sensor_etl_duty_failures_total{job="etl",instance="e1",duty="compression"}': f"_x{EVENT} 0+0.5x{SAMPLES}"},
        fires={60: {"SensorDutyFailing": [{"duty": "compression"}]}},
        quiet=(20,),
    ),
    Situation(
        "a file with rows that are no readings, and one that is broken, from a producer that lived for a minute",
        {
            'sensor_rows_skipped_total{job="producer",instance="p2",reason="no_time"}': f"_x{EVENT} 3 3 stale",
            'sensor_files_unreadable_total{job="producer",instance="p2"}': f"_x{EVENT} 1 1 stale",
        },
        fires={5: {"SensorRowsSkipped": [{"reason": "no_time"}], "SensorFilesUnreadable": [{}]}},
        quiet=(15,),
    ),
    Situation(
        "disk nearly full",
        having("node_filesystem_avail_bytes", then(50, (0, 9))),
        fires={10: {"SensorDiskNearlyFull": [{"instance": "n1", "device": "/dev/sda1"}]}},
        quiet=(3,),
    ),
    Situation(
        "connections nearly used up",
        having("pg_stat_database_numbackends", then(20, (0, 85)), datname="sensors"),
        fires={10: {"SensorDatabaseConnections": [{"instance": "d1"}]}},
        quiet=(3,),
    ),
    Situation(
        "vacuum does not keep up",
        having("pg_database_wraparound_age_datfrozenxid_seconds", then(1e8, (0, 6e8))),
        fires={70: {"SensorDatabaseWraparound": [{"instance": "d1"}]}},
        quiet=(30,),
    ),
    Situation(
        "the exporter of the disks is gone",
        {**without("node_filesystem"), 'up{job="node",instance="n1"}': then(1, (0, 0))},
        fires={10: {"SensorServiceUnreachable": [{"job": "node"}]}},
    ),
]


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rules without their texts: a rule test compares those too, and here it is about when they fire."""
    content = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    for group in content["groups"]:
        for rule in group["rules"]:
            del rule["annotations"]
    path = tmp_path_factory.mktemp("rules") / "alerts.yml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def promtool(*arguments: str) -> None:
    """Run it; what it says is the message of the failure."""
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def rule_test(series: Series, fires: Mapping[int, Fires], labels: Mapping[str, str]) -> dict[str, Any]:
    """One test: at each of the minutes these alerts fire, with their labels, and no other one does."""
    return {
        "interval": f"{EVERY_S}s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [
            {
                "eval_time": f"{60 + minute}m",
                "alertname": alert,
                "exp_alerts": [
                    {"exp_labels": {**found, **labels, "severity": SEVERITY[alert]}}
                    for found in expected.get(alert, ())
                ],
            }
            for minute, expected in fires.items()
            for alert in ALERTS
            if alert != "SensorWatchdog"
        ],
    }


def run(rules: Path, folder: Path, *tests: dict[str, Any]) -> None:
    """Let promtool run rule tests."""
    path = folder / "test.yml"
    path.write_text(
        json.dumps({"rule_files": [str(rules)], "evaluation_interval": f"{EVERY_S}s", "tests": tests}), encoding="utf-8"
    )
    promtool("test", "rules", str(path))


def in_namespace(name: str, series: Series) -> dict[str, str]:
    """The same series in one of several environments."""
    return {each.replace("{", f'{{namespace="{name}",', 1): values for each, values in series.items()}


def test_the_rules_are_valid() -> None:
    promtool("check", "rules", str(RULES))


@pytest.mark.parametrize("situation", SITUATIONS, ids=str)
def test_alerts_fire_in_their_situation_and_only_there(situation: Situation, rules: Path, tmp_path: Path) -> None:
    series = {**HEALTHY, **situation.series}
    expected = {**situation.fires, **{minute: {} for minute in situation.quiet}}
    run(rules, tmp_path, rule_test(series, expected, {}))


@pytest.mark.parametrize("situation", SITUATIONS, ids=str)
def test_one_of_two_environments_does_not_hide_the_other(situation: Situation, rules: Path, tmp_path: Path) -> None:
    """What happens in one is reported for it, although the other one is well."""
    series = in_namespace("bad", {**HEALTHY, **situation.series}) | in_namespace("good", HEALTHY)
    expected = {**situation.fires, **{minute: {} for minute in situation.quiet}}
    run(rules, tmp_path, rule_test(series, expected, {"namespace": "bad"}))


def test_every_alert_fires_somewhere() -> None:
    fired = {alert for situation in SITUATIONS for expected in situation.fires.values() for alert in expected}
    assert fired == set(ALERTS) - {"SensorWatchdog"}


def test_the_watchdog_always_fires(rules: Path, tmp_path: Path) -> None:
    labels = {"severity": "none"}
    tests = [
        {"eval_time": at, "alertname": "SensorWatchdog", "exp_alerts": [{"exp_labels": labels}]} for at in ("0m", "1h")
    ]
    run(rules, tmp_path, {"interval": "30s", "input_series": [], "alert_rule_test": tests})


def test_a_pipeline_that_was_never_there_is_absent(rules: Path, tmp_path: Path) -> None:
    fires: Fires = {"SensorServiceAbsent": [{"job": "consumer"}, {"job": "etl"}]}
    run(rules, tmp_path, rule_test({}, {0: fires}, {}))
