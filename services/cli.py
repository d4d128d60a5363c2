"""Every command in one place."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from services.core.config import Settings, load_settings
from services.core.errors import PipelineError
from services.core.logs import configure_logging
from services.core.shutdown import Shutdown

LOCAL_DIRECTORY = Path(".local")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors that a user can cause are one line and exit code 2, others 1."""
    options = parser().parse_args(arguments)
    try:
        settings = load_settings()
        configure_logging(settings.log_level, settings.log_format)
        return int(options.run(settings, options))
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="sensor-pipeline", description="Sensor readings from Parquet through Kafka into TimescaleDB."
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    produce = commands.add_parser("produce", help="send the readings of PARQUET_URL to the Kafka topic")
    produce.add_argument("--resend", action="store_true", help="send files that were sent before once more")
    produce.set_defaults(run=run_produce)

    consume = commands.add_parser("consume", help="store the topic's readings in sensor_data")
    consume.add_argument("--until-caught-up", action="store_true", help="end at the topic's end")
    consume.set_defaults(run=run_consume)

    etl = commands.add_parser("etl", help="keep the summaries equal to the readings")
    etl.add_argument("--once", action="store_true", help="refresh what is queued, then end")
    etl.add_argument(
        "--reconcile",
        action="store_true",
        help="compare all summaries with the raw readings, repair what differs, print how many rows did",
    )
    etl.set_defaults(run=run_etl)

    letters = commands.add_parser("dead-letters", help="list messages that were not stored, or send them once more")
    letters.add_argument("action", choices=["list", "replay"])
    letters.add_argument("--reason", help="only those with this reason, for example too_late")
    letters.add_argument("--json", action="store_true", help="list as JSON, one object a line")
    letters.set_defaults(run=run_dead_letters)

    local = commands.add_parser("local", help="Kafka and TimescaleDB on this machine, without Docker")
    local.add_argument("action", choices=["up", "down", "status"])
    local.set_defaults(run=run_local)

    demo = commands.add_parser("demo", help="the whole pipeline over real readings, checked")
    demo.add_argument("--keep", action="store_true", help="leave everything running")
    demo.add_argument("--down", action="store_true", help="stop a demo that was left running")
    demo.set_defaults(run=run_demo)
    return top


def run_produce(settings: Settings, options: argparse.Namespace) -> int:
    """``produce``."""
    from services.producer.worker import run

    return run(settings, Shutdown().listen(), resend=options.resend)


def run_consume(settings: Settings, options: argparse.Namespace) -> int:
    """``consume``."""
    from services.consumer.worker import run

    return run(settings, Shutdown().listen(), until_caught_up=options.until_caught_up)


def run_etl(settings: Settings, options: argparse.Namespace) -> int:
    """``etl``."""
    from services.etl.worker import run, run_reconcile

    if options.reconcile:
        for metric, rows in run_reconcile(settings, Shutdown().listen()).items():
            print(f"{metric}_summary: {rows} rows differed" + (" and were repaired" if rows else ""))
        return 0
    return run(settings, Shutdown().listen(), once=options.once)


def run_dead_letters(settings: Settings, options: argparse.Namespace) -> int:
    """``dead-letters list | replay``."""
    from services.consumer.replay import list_letters, replay

    shutdown = Shutdown().listen()
    if options.action == "replay":
        print(f"{replay(settings, shutdown, reason=options.reason)} dead letters sent to {settings.kafka_topic}")
        return 0
    for line in list_letters(settings, shutdown, reason=options.reason, as_json=options.json):
        print(line)
    return 0


def run_local(settings: Settings, options: argparse.Namespace) -> int:
    """``local up | down | status``."""
    from services.local.command import run

    return run(settings, options.action, LOCAL_DIRECTORY)


def run_demo(settings: Settings, options: argparse.Namespace) -> int:
    """``demo``."""
    from services.local.demo import down, run

    return down(settings, LOCAL_DIRECTORY) if options.down else run(settings, LOCAL_DIRECTORY, keep=options.keep)


if __name__ == "__main__":
    sys.exit(main())
