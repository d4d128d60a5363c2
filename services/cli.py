"""Every command in one place."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from services.core.ending import handle_interrupts, run_to_its_end
from services.core.errors import STOPPED, ConfigurationError
from services.core.logs import configure_logging, fields
from services.core.shutdown import Shutdown
from services.core.version import version

if TYPE_CHECKING:  # everything large is imported when it is needed: Ctrl-C may come meanwhile
    from services.core.config import Settings

LOCAL_DIRECTORY = Path(".local")
WATCH_SECONDS = 5
# What to read of the settings, where that is not all: who stops something must be able to with wrong ones too.
NEEDS: dict[str, tuple[str, ...]] = {
    "generate": ("measurements", "data_feature_*", "log_*"),
    "local status": ("kafka_port", "postgre_port"),
    "local down": (),
    "demo --down": (),
}

Run = Callable[["Settings", argparse.Namespace], int]
Commands = Any  # what add_subparsers returns; its type is private

log = logging.getLogger("settings")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors that a user can cause are one line and exit code 2, others 1."""
    return run_to_its_end(lambda: _run(parser().parse_args(arguments)))


def _run(options: argparse.Namespace) -> int:
    from services.core.config import find_unknown_names, load_settings

    needed = NEEDS.get(_name(options), ("*",))
    settings = load_settings(needed)
    configure_logging(settings.log_level, settings.log_format)
    for each in find_unknown_names() if needed else []:
        nearest = {"did_you_mean": each.nearest} if each.nearest else {}
        log.warning("unknown_setting", extra=fields(name=each.name, source=each.source, **nearest))
    return int(options.run(settings, options))


def _name(options: argparse.Namespace) -> str:
    """The command, as far as its needs depend on it."""
    if options.command == "demo" and options.down:
        return "demo --down"
    return f"local {options.action}" if options.command == "local" else str(options.command)


class Parser(argparse.ArgumentParser):
    """Mistakes are one line, and an abbreviation is one of them: what it stands for may change."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise ConfigurationError."""
        raise ConfigurationError(f"{message} ({self.prog} --help)")

    def flag(self, option: str, what: str) -> None:
        """Add an option without a value."""
        self.add_argument(option, action="store_true", help=what)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = Parser(prog="sensor-pipeline", description="Sensor readings from Parquet through Kafka into TimescaleDB.")
    top.add_argument("--version", action="version", version=f"%(prog)s {version()}")
    commands = top.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for add in (_add_setup, _add_generate, _add_services, _add_views, _add_repairs):
        add(commands)
    return top


def _command(commands: Commands, run: Run, name: str, what: str) -> Parser:
    made: Parser = commands.add_parser(name, help=what)
    made.set_defaults(run=run)
    return made


def _add_services(commands: Commands) -> None:
    produce = _command(commands, _run_produce, "produce", "send the readings of PARQUET_URL to the Kafka topic")
    produce.flag("--resend", "send files again that were sent before; they only fill gaps")
    produce.flag("--overwrite", "with --resend: overwrite what is stored")
    produce.add_argument("--speed", metavar="60x", help="replay by event time, 60 times as fast")
    what = f"stay, and check for new files every PRODUCER_WATCH_SECONDS, or {WATCH_SECONDS} if that is 0"
    produce.flag("--watch", what)

    consume = _command(commands, _run_consume, "consume", "store the topic's readings in sensor_data")
    consume.flag("--until-caught-up", "end at the topic's end")

    etl = _command(commands, _run_etl, "etl", "keep the summaries equal to the readings")
    etl.flag("--once", "refresh what is queued, then end")
    what = "compare all summaries with the raw readings, repair them, and print how many rows differed"
    etl.flag("--reconcile", what)


def _add_generate(commands: Commands) -> None:
    what = "write made-up readings to a Parquet file, for trying out the pipeline"
    generate = _command(commands, _run_generate, "generate", what)
    generate.add_argument("out", metavar="OUT", type=Path, help="the file")
    _number(generate, "--sensors", 1, 100_000, default=200, help="default: 200")
    _number(generate, "--days", 0, 100_000, float, default=7, help="default: 7")
    what = "seconds between two readings of a sensor (default: 60)"
    _number(generate, "--interval", 1, 86_400, dest="interval_s", default=60, help=what)
    what = "first day, UTC (default: 2024-01-01)"
    generate.add_argument("--start", type=partial(_time, "--start"), default="2024-01-01", help=what)
    _number(generate, "--seed", 0, 2**63, default=1, help="default: 1")
    shares = {"gaps": "left out", "late": "that arrive after newer ones", "duplicates": "that arrive twice"}
    for name, what in shares.items():
        _number(generate, f"--{name}", 0, 0.5, float, default=0.0, help=f"share of rows {what}: 0 to 0.5 (default: 0)")
    generate.flag("--force", "replace OUT if it exists")


def _add_setup(commands: Commands) -> None:
    what = "create the tables or bring them up to this version, then allow roles to log in, as logins does"
    _command(commands, _run_migrate, "migrate", what)

    what = "allow the services' roles to log in, with the passwords in SENSOR_*_PASSWORD"
    _command(commands, _run_logins, "logins", what)

    local = _command(commands, _run_local, "local", "Kafka and TimescaleDB on this machine, without Docker")
    local.add_argument("action", choices=["up", "down", "status"])
    local.flag("--tls", "up: with TLS, and passwords for Kafka (SASL)")

    demo = _command(commands, _run_demo, "demo", "run the whole pipeline on real readings, and check the result")
    demo.flag("--keep", "leave everything running")
    demo.flag("--down", "stop a demo that was left running")
    demo.flag("--tls", "with TLS, SASL and verified certificates")


def _add_views(commands: Commands) -> None:
    status = _command(commands, _run_status, "status", "the state of the pipeline; exit code 1 if action is required")
    status.flag("--json", "as one JSON object")

    what = "a page with live rates, and the intervals of each sensor"
    dashboard = _command(commands, _run_dashboard, "dashboard", what)
    dashboard.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    _number(dashboard, "--port", 1, 65_535, default=8050, help="default: 8050")


def _add_repairs(commands: Commands) -> None:
    rewind = _command(commands, _run_rewind, "rewind", "make consumers read the topic again from an earlier position")
    position = rewind.add_mutually_exclusive_group(required=True)
    what = "from the oldest message that the topic still has"
    position.add_argument("--to-beginning", action="store_true", help=what)
    what = "from the first message sent at or after this time, like 2024-01-01T00:00Z"
    position.add_argument("--to-time", metavar="TIME", help=what)
    what = "from this offset of --partition; one ahead of the current position skips messages"
    _number(position, "--to-offset", 0, 2**63 - 1, metavar="OFFSET", help=what)
    _number(rewind, "--partition", 0, 2**31 - 1, help="only this partition")

    what = "messages that were not stored: list them, send them again, delete them"
    letters = _command(commands, _run_dead_letters, "dead-letters", what)
    letters.add_argument("action", choices=["list", "replay", "delete"])
    letters.add_argument("--reason", help="list or replay only those with this reason, for example too_late")
    letters.flag("--json", "list as JSON, one object per line")
    letters.flag("--overwrite", "replay: overwrite what is stored, instead of only filling gaps")
    what = "delete or replay those up to this offset, the first column of the list"
    _number(letters, "--up-to", 0, 2**63 - 1, metavar="OFFSET", help=what)


def _number(
    to: argparse._ActionsContainer,
    option: str,
    least: float,
    most: float,
    kind: type[int | float] = int,
    **more: Any,
) -> None:
    """Add an option with a number; what is none of those allowed raises ConfigurationError."""

    def parse(text: str) -> float:
        with suppress(ValueError):
            number = kind(text)
            if least <= number <= most:
                return number
        what = "whole number" if kind is int else "number"
        raise ConfigurationError(f"{option}={text} is not allowed (a {what}, {least:,} to {most:,})")

    to.add_argument(option, type=parse, **more)


def _time(option: str, text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigurationError(f"{option}={text} is not allowed (a day or time like 2024-01-01, in UTC)") from error
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)


def _run_migrate(settings: Settings, _: argparse.Namespace) -> int:
    from services.core.logins import let_in
    from services.core.schema import upgrade

    upgrade()
    if done := let_in(settings, Shutdown().listen()):
        print(f"these roles may log in: {', '.join(done)}")
    return 0


def _run_produce(settings: Settings, options: argparse.Namespace) -> int:
    from services.producer.pacing import parse_speed
    from services.producer.worker import run

    speed = None if options.speed is None else parse_speed(options.speed)
    if options.watch and not settings.producer_watch_seconds:
        settings = settings.model_copy(update={"producer_watch_seconds": WATCH_SECONDS})
    return run(settings, Shutdown().listen(), resend=options.resend, overwrite=options.overwrite, speed=speed)


def _run_generate(settings: Settings, options: argparse.Namespace) -> int:
    from services.producer.generate import Plan, generate

    plan = Plan(**{each.name: getattr(options, each.name) for each in dataclasses.fields(Plan)})
    counts = generate(settings, plan, options.out, Shutdown().listen(), force=options.force)
    print(
        f"{options.out}: {counts.rows:,} rows, of which {counts.duplicates:,} are duplicates and {counts.late:,} late; "
        f"{counts.gaps:,} were left out. In sensor_data they are {counts.rows - counts.duplicates:,} rows."
    )
    return 0


def _run_consume(settings: Settings, options: argparse.Namespace) -> int:
    from services.consumer.command import run

    shutdown = Shutdown().listen()
    code = run(settings, shutdown, until_caught_up=options.until_caught_up)
    return STOPPED if options.until_caught_up and shutdown.requested else code


def _run_rewind(settings: Settings, options: argparse.Namespace) -> int:
    from services.consumer.positions import rewind

    if options.to_offset is not None and options.partition is None:
        raise ConfigurationError("--to-offset needs --partition: each partition has its own offsets")
    moment = None if options.to_time is None else _time("--to-time", options.to_time)
    moved = rewind(settings, Shutdown().listen(), moment=moment, offset=options.to_offset, partition=options.partition)
    for each in moved:
        print(f"partition {each.partition}: from {each.before} to {each.after}")
    print(f"{len(moved)} partitions moved" + ("" if moved else ": none was beyond it"))
    return 0


def _run_etl(settings: Settings, options: argparse.Namespace) -> int:
    from services.etl.worker import run, run_reconcile

    if options.reconcile:
        for name, rows in run_reconcile(settings, Shutdown().listen()).items():
            print(f"{name}_summary: {rows} rows differed" + (" and were repaired" if rows else ""))
        return 0
    shutdown = Shutdown().listen()
    code = run(settings, shutdown, once=options.once)
    return STOPPED if options.once and shutdown.requested else code


def _run_logins(settings: Settings, _: argparse.Namespace) -> int:
    from services.core.logins import let_in

    done = let_in(settings, Shutdown().listen())
    print(f"these roles may log in: {', '.join(done)}" if done else "no SENSOR_*_PASSWORD is set: nothing was changed")
    return 0


def _run_status(settings: Settings, options: argparse.Namespace) -> int:
    from services.status.command import run

    return run(settings, as_json=options.json)


def _run_dashboard(settings: Settings, options: argparse.Namespace) -> int:
    try:
        from services.dashboard.command import run
    except ModuleNotFoundError as error:
        if error.name not in ("dash", "flask", "waitress"):
            raise
        raise ConfigurationError("the dashboard's packages are not installed: pip install '.[dashboard]'") from error
    from services.core.logins import settings_as

    return run(settings_as("sensor_dashboard", settings), Shutdown().listen(), host=options.host, port=options.port)


def _run_dead_letters(settings: Settings, options: argparse.Namespace) -> int:
    from services.consumer.replay import delete, list_letters, replay

    shutdown = Shutdown().listen()
    if options.overwrite and options.action != "replay":
        raise ConfigurationError("--overwrite is only for dead-letters replay")
    match options.action:
        case "delete":
            if options.up_to is None or options.reason:
                raise ConfigurationError(
                    "dead-letters delete needs --up-to OFFSET (the last one that you have checked) and no --reason"
                )
            lines: Iterable[str] = [f"{delete(settings, shutdown, up_to=options.up_to)} dead letters deleted"]
        case "replay":
            lines = replay(settings, shutdown, reason=options.reason, up_to=options.up_to, overwrite=options.overwrite)
        case _:
            lines = list_letters(settings, shutdown, reason=options.reason, as_json=options.json)
    for line in lines:
        print(line)
    return 0


def _run_local(settings: Settings, options: argparse.Namespace) -> int:
    from services.local.command import run

    handle_interrupts(signal.default_int_handler)
    return run(settings, options.action, LOCAL_DIRECTORY, tls=options.tls)


def _run_demo(settings: Settings, options: argparse.Namespace) -> int:
    from services.local.demo import down, run

    handle_interrupts(signal.default_int_handler)
    if options.down:
        return down(settings, LOCAL_DIRECTORY)
    return run(settings, LOCAL_DIRECTORY, keep=options.keep, tls=options.tls)


if __name__ == "__main__":
    sys.exit(main())
