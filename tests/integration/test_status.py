"""``sensor-pipeline status``: every number is the servers' own, and what requires action is reported."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import psycopg
import pytest
from pydantic import SecretStr

from services.core.config import Settings
from services.core.database import address, connect
from services.core.errors import TransientError
from services.core.logins import let_in, settings_as
from services.core.shutdown import Shutdown
from services.status import command, database
from tests.expected import Expected, samples
from tests.fix_proxy import Proxy
from tests.fix_services import message, minutes, publish, run_cli
from tests.fix_stack import free_port
from tests.measured import MEASUREMENTS, of_default

Capture = pytest.CaptureFixture[str]


def ask(settings: Settings, capsys: Capture) -> tuple[int, Any]:
    """Exit code and what ``status --json`` prints."""
    code = command.run(settings, as_json=True)
    return code, json.loads(capsys.readouterr().out)


def problems(settings: Settings, capsys: Capture) -> list[str]:
    code, state = ask(settings, capsys)
    found = [problem["what"] for problem in state["problems"]]
    assert code == (1 if found else 0)
    assert all(problem["action"] for problem in state["problems"])
    return found


def fetch(connection: psycopg.Connection, query: str) -> Any:
    row = connection.execute(query).fetchone()
    assert row is not None
    return row[0]


@pytest.fixture
def filled(settings: Settings) -> Settings:
    """Readings of two partitions over three days, stored and summarised."""
    expected = Expected(settings)
    expected.send(samples(30, step=97), partition=0)
    expected.send(samples(20, step=211), partition=2)
    for arguments in (["consume", "--until-caught-up"], ["etl", "--once"]):
        done = run_cli(settings, *arguments)
        assert done.returncode == 0, done.stderr
    return settings


@pytest.mark.usefixtures("no_tables")
def test_a_database_without_migrations_is_a_problem(settings: Settings, capsys: Capture) -> None:
    (found,) = problems(settings, capsys)
    assert re.fullmatch(r"the database has no migration, this version needs \d{4}", found)
    command.run(settings, as_json=False)
    assert "migration none" in capsys.readouterr().out


def test_an_older_and_a_newer_schema_are_problems(
    settings: Settings, connection: psycopg.Connection, capsys: Capture
) -> None:
    newest = fetch(connection, "SELECT version_num FROM alembic_version")
    for revision in ("0000", "9999"):
        connection.execute("UPDATE alembic_version SET version_num = %s", [revision])
        try:
            found = problems(settings, capsys)
        finally:
            connection.execute("UPDATE alembic_version SET version_num = %s", [newest])
        assert found == [f"the database has migration {revision}, this version needs {newest}"]


def test_before_anything_is_sent_there_is_no_problem(settings: Settings, capsys: Capture) -> None:
    code, state = ask(settings, capsys)
    assert code == 0
    assert state["kafka"]["lag"] == 0
    assert [each["committed_offset"] for each in state["kafka"]["partitions"]] == [None] * 3
    tables = state["database"]["tables"]
    assert tables["readings"] == {
        "rows": {"count": 0, "exact": True},
        "oldest": None,
        "newest": None,
        "chunks": 0,
        "compressed_chunks": 0,
        "size_bytes": tables["readings"]["size_bytes"],
    }
    assert [summary["minutes"] for summary in tables["summaries"]] == [None] * len(MEASUREMENTS)
    assert (tables["queue_rows"], tables["freshness_seconds"], tables["etl_leads"]) == (0, 0, False)
    command.run(settings, as_json=False)
    assert "no action needed" in capsys.readouterr().out


def test_every_number_agrees_with_psql(filled: Settings, connection: psycopg.Connection, capsys: Capture) -> None:
    chunk = fetch(connection, "SELECT show_chunks('sensor_data') LIMIT 1")
    connection.execute("SELECT compress_chunk(%s::regclass)", [chunk])
    code, state = ask(filled, capsys)
    assert code == 0
    places = state["kafka"]["partitions"]
    assert [each["end_offset"] for each in places] == [30, 0, 20]
    assert [each["lag"] for each in places] == [0, 0, 0]
    tables = state["database"]["tables"]
    assert tables["readings"] == {
        "rows": {"count": fetch(connection, "SELECT count(*) FROM sensor_data"), "exact": True},
        "oldest": fetch(connection, "SELECT min(time) FROM sensor_data").isoformat(),
        "newest": fetch(connection, "SELECT max(time) FROM sensor_data").isoformat(),
        "chunks": fetch(connection, "SELECT count(*) FROM show_chunks('sensor_data')"),
        "compressed_chunks": 1,
        "size_bytes": fetch(connection, "SELECT hypertable_size('sensor_data')"),
    }
    assert tables["readings"]["rows"]["count"] == 50
    assert tables["summaries"] == [
        {
            "measurement": metric,
            "rows": {"count": fetch(connection, f"SELECT count(*) FROM {metric}_summary"), "exact": True},
            "aggregate": f"{metric}_{minutes}min",
            "minutes": minutes,
            "check": None,
        }
        for metric, minutes in ((name, filled.interval_of(name)) for name in MEASUREMENTS)
    ]
    assert of_default(tables["aggregates"]) == {"humidity_20min", "temperature_10min"}
    versions = state["versions"]
    assert versions["PostgreSQL"] == fetch(connection, "SHOW server_version")
    assert versions["TimescaleDB"] == fetch(
        connection, "SELECT extversion FROM pg_extension WHERE extname = 'timescaledb'"
    )
    command.run(filled, as_json=False)
    screen = capsys.readouterr().out
    assert re.search(r"sensor_data +50 rows, 2024-03-01 00:00:00Z to 2024-03-", screen)
    assert "0 messages (group" in screen
    assert len(screen.splitlines()) <= 24


def test_large_tables_are_not_counted(
    filled: Settings, connection: psycopg.Connection, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(database, "EXACT_BELOW_BYTES", 0)
    _, state = ask(filled, capsys)  # no statistics yet
    assert state["database"]["tables"]["readings"]["rows"] == {"count": 50, "exact": True}
    connection.execute("ANALYZE sensor_data, temperature_summary")
    _, state = ask(filled, capsys)
    assert state["database"]["tables"]["readings"]["rows"] == {"count": 50, "exact": False}
    command.run(filled, as_json=False)
    assert "about 50 rows" in capsys.readouterr().out


def test_messages_that_nobody_consumes_are_a_problem(settings: Settings, capsys: Capture) -> None:
    Expected(settings).send(samples(7), partition=1)
    (found,) = problems(settings, capsys)
    assert found == f"7 messages are waiting in {settings.kafka_topic}, and no consumer has their partitions (1)"


def test_a_queue_that_nobody_works_on_is_a_problem(
    settings: Settings, connection: psycopg.Connection, capsys: Capture
) -> None:
    connection.execute(
        "INSERT INTO summary_refresh_queue (touched, queued_at) VALUES ('{[2024-03-01, 2024-03-02)}', now())"
    )
    assert problems(settings, capsys) == []
    connection.execute("UPDATE summary_refresh_queue SET queued_at = now() - interval '1 minute'")
    (found,) = problems(settings, capsys)
    assert re.fullmatch(r"readings have been waiting 6\d s for their summaries, and no etl is running", found)
    connection.execute("UPDATE etl_lease SET expires_at = now() + interval '1 minute'")
    assert problems(settings, capsys) == []
    _, state = ask(settings, capsys)
    tables = state["database"]["tables"]
    assert tables["etl_leads"]
    assert tables["queue_rows"] == 1
    assert 60 <= tables["freshness_seconds"] < 90
    connection.execute("UPDATE summary_refresh_queue SET queued_at = now() - interval '1 hour'")
    (found,) = problems(settings, capsys)
    assert found.endswith(", although etl is running")


def test_intervals_that_differ_from_the_settings_are_a_problem(
    filled: Settings, connection: psycopg.Connection, capsys: Capture
) -> None:
    other = filled.model_copy(update={"humidity_interval": 30})
    assert problems(other, capsys) == ["humidity intervals have 20 minutes in the database, 30 in the settings"]
    connection.execute("UPDATE etl_lease SET expires_at = now() + interval '1 minute'")
    assert len(problems(other, capsys)) == 1
    # An etl that has begun the change needs nobody.
    connection.execute("""
        CREATE MATERIALIZED VIEW humidity_30min WITH (timescaledb.continuous) AS
        SELECT time_bucket('30 minutes', time) FROM sensor_data GROUP BY 1 WITH NO DATA
    """)
    assert problems(other, capsys) == []


def test_dead_letters_are_a_problem_until_they_are_deleted(settings: Settings, capsys: Capture) -> None:
    publish(settings, [b"not json", b"", b"neither"])
    assert run_cli(settings, "consume", "--until-caught-up").returncode == 0
    _, state = ask(settings, capsys)
    assert state["kafka"]["dead_letters"] == {
        "count": 3,
        "looked_at": 3,
        "reasons": {"invalid_json": 2, "empty": 1},
    }
    (found,) = problems(settings, capsys)
    assert found == f"3 messages were not stored (dead letters in {settings.dead_letter_topic})"

    assert run_cli(settings, "dead-letters", "delete", "--up-to", "1").stdout == "2 dead letters deleted\n"
    _, state = ask(settings, capsys)
    assert state["kafka"]["dead_letters"] == {"count": 1, "looked_at": 1, "reasons": {"invalid_json": 1}}
    assert run_cli(settings, "dead-letters", "delete", "--up-to", "2").stdout == "1 dead letters deleted\n"
    assert problems(settings, capsys) == []


def test_only_the_last_of_many_dead_letters_are_looked_at(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("services.status.topics.MAX_LETTERS", 2)
    letters = settings.model_copy(update={"kafka_topic": settings.dead_letter_topic})
    publish(letters, [b"1", b"2", b"3"])
    _, state = ask(settings, capsys)
    assert state["kafka"]["dead_letters"] == {"count": 3, "looked_at": 2, "reasons": {"unknown": 2}}
    command.run(settings, as_json=False)
    assert "3 (of the last 2: unknown 2)" in capsys.readouterr().out


def test_a_missing_topic_is_a_problem(settings: Settings, capsys: Capture) -> None:
    other = settings.model_copy(update={"kafka_topic": "nothing_here"})
    assert problems(other, capsys) == ["there is no topic nothing_here"]


def test_when_one_server_is_away_the_other_half_is_still_shown(settings: Settings, capsys: Capture) -> None:
    """One process, so that the exit code and the missing traceback are seen too."""
    port = free_port()
    done = run_cli(settings, "status", POSTGRE_PORT=str(port))
    assert done.returncode == 1
    assert done.stderr == ""
    assert f"ACTION REQUIRED: PostgreSQL at {settings.postgre_host}:{port}/" in done.stdout
    assert f"  {settings.kafka_topic} 3 partitions" in done.stdout

    without_kafka = settings.model_copy(update={"kafka_port": port})
    started = time.monotonic()
    code, state = ask(without_kafka, capsys)
    assert time.monotonic() - started < 10
    assert code == 1
    assert state["kafka"]["error"].startswith(f"Kafka at {settings.kafka_host}:{port} does not answer")
    assert state["database"]["tables"]["readings"]["rows"]["count"] == 0


def advice(settings: Settings, capsys: Capture) -> str:
    """What to do about the one problem."""
    (problem,) = ask(settings, capsys)[1]["problems"]
    action: str = problem["action"]
    return action


def test_the_advice_is_about_the_reason(settings: Settings, proxied: Settings, proxy: Proxy, capsys: Capture) -> None:
    proxy.answer_with("53300", "sorry, too many clients already")
    assert "max_connections" in advice(proxied, capsys)
    proxy.refuse()
    assert "POSTGRE_HOST and POSTGRE_PORT" in advice(proxied, capsys)
    proxy.listen()
    proxy.answer_with(None)
    password = SecretStr("only for this test")
    consumer = settings.model_copy(update={"sensor_consumer_password": password})
    let_in(consumer, Shutdown())
    with connect(settings) as connection:
        try:
            assert "POSTGRE_USER" in advice(settings_as("sensor_consumer", consumer), capsys)
        finally:
            connection.execute("ALTER ROLE sensor_consumer NOLOGIN PASSWORD NULL")


def test_a_wrong_password_is_a_mistake(settings: Settings) -> None:
    done = run_cli(settings, "status", POSTGRE_PASSWORD="hunter2")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "POSTGRE_PASSWORD" in done.stderr


def test_a_database_that_is_busy_for_long_is_given_up_in_time(
    settings: Settings, connection: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "ANSWER_TIMEOUT_S", 1.0)
    started = time.monotonic()
    with connection.transaction():
        connection.execute("LOCK TABLE sensor_data IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(TransientError):
            database.read_database(settings, address(settings))
    assert time.monotonic() - started < 8


def test_a_database_that_lacks_what_the_group_stored_is_a_problem(
    settings: Settings, connection: psycopg.Connection, capsys: Capture
) -> None:
    publish(settings, [message(time=minutes(at), temperature=1.0) for at in range(50)])
    assert run_cli(settings, "consume", "--until-caught-up").returncode == 0
    connection.execute("TRUNCATE sensor_data, partition_progress")
    found = problems(settings, capsys)
    assert f"the database lacks 50 messages that group {settings.kafka_group} had stored" in found[0]
    assert ask(settings, capsys)[1]["kafka"]["lag"] == 50
    assert run_cli(settings, "consume", "--until-caught-up").returncode == 0
    assert ask(settings, capsys)[1]["kafka"]["lag"] == 0
