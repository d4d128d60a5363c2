"""``sensor-pipeline status``: everything on one screen, and exit code 1 if action is required."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import datetime
from typing import TypeVar

import confluent_kafka

from services.core.config import Settings
from services.core.database import address
from services.core.errors import ConfigurationError, PipelineError
from services.core.printable import printable
from services.core.version import version
from services.status.database import Database, read_database
from services.status.problems import find_problems
from services.status.screen import lines
from services.status.topics import KafkaStatus, read_kafka

State = TypeVar("State", KafkaStatus, Database)


def run(settings: Settings, *, as_json: bool) -> int:
    """Print the state. Returns 1 if action is required; the two servers are asked at the same time."""
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(_ask, lambda: read_kafka(settings))
        database = _ask(lambda: read_database(settings, address(settings)))
        kafka = asked.result()
    if isinstance(kafka, KafkaStatus) and isinstance(database, Database) and database.tables is not None:
        kafka = kafka.compared_with(database.tables.positions)
    problems = find_problems(settings, kafka, database)
    versions = _versions(database)
    if as_json:
        state = {
            "kafka": {"error": kafka} if isinstance(kafka, str) else asdict(kafka),
            "database": {"error": database} if isinstance(database, str) else asdict(database),
            "versions": versions,
            "problems": [asdict(problem) for problem in problems],
        }
        print(json.dumps(state, indent=2, default=_as_text))  # noqa: T201
    else:
        for line in lines(kafka, database, versions, problems):
            print(printable(line))  # noqa: T201
    return 1 if problems else 0


def _ask(read: Callable[[], State]) -> State | str:
    """The state, or in one line why there is none: the other server's is shown all the same."""
    try:
        return read()
    except ConfigurationError:
        raise
    except PipelineError as error:
        return str(error)


def _as_text(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _versions(database: Database | str) -> dict[str, str]:
    """Kafka tells its clients no version of its own."""
    found = {"sensor-pipeline": version(), "librdkafka": confluent_kafka.libversion()[0]}
    if not isinstance(database, str):
        found |= {"PostgreSQL": database.postgresql, "TimescaleDB": database.timescaledb or "none"}
    return found
