"""The real command line, but the process harms itself at the n-th call of a step of the commit order.

    python -m tests.crash_runner '{"step": "transaction", "when": "before", "call": 2}' consume

Nothing is replaced: the real function is called before or after the signal. ``librdkafka`` overrides settings of
the consumer, for time-outs that a test cannot wait for.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from services import cli
from services.consumer import command, worker
from services.consumer.dead_letter import DeadLetterTopic
from services.consumer.positions import Positions
from services.consumer.sink import Sink
from services.consumer.worker import Worker
from services.consumer.writer import Stored
from services.core import backoff
from services.core.config import Settings
from services.etl import worker as etl_worker
from services.etl.worker import Leader

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Plan:
    """What happens when. ``until`` names a file: the thread then waits for it instead of a signal.

    The file ``until`` + ".awaited" says that it does.
    """

    step: str = ""
    when: str = "before"
    call: int = 1
    signal: str = "SIGKILL"
    until: str = ""
    librdkafka: dict[str, int] = field(default_factory=dict)
    hand_over_timeout_s: float = worker.HAND_OVER_TIMEOUT_S
    max_limited_tries: int = backoff.MAX_LIMITED_TRIES
    hung_after_s: float = command.HUNG_AFTER_S

    def strike(self) -> None:
        """Harm this process."""
        if self.until:
            Path(self.until + ".awaited").touch()
            pause = threading.Event()
            while not Path(self.until).exists():
                pause.wait(0.05)
        else:
            # To this thread: with a signal to the process another thread might be stopped first, and we go on.
            signal.pthread_kill(threading.get_ident(), signal.Signals[self.signal])


@dataclass(frozen=True)
class Step:
    """A function of the commit order, and which of its calls count."""

    owner: Any
    name: str
    counts: Callable[[Arguments], bool] = lambda _: True


STEPS = {
    "positions": Step(Positions, "read", lambda arguments: len(arguments[1]) > 0),
    "write": Step(Sink, "write"),
    # After the rows: in the middle of COPY, whose end has not come.
    "copy": Step(psycopg.Copy, "write", lambda arguments: len(arguments[1]) > 50),
    "commit": Step(Sink, "_commit"),
    "letters": Step(DeadLetterTopic, "send", lambda arguments: len(arguments[1]) > 0),
    "offsets": Step(Worker, "_settle", lambda arguments: isinstance(arguments[2], Stored)),
    "round": Step(Leader, "_work"),
}


def wrap(plan: Plan) -> None:
    """Put the plan around its step."""
    step = STEPS[plan.step]
    real = getattr(step.owner, step.name)
    calls = 0

    def wrapped(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        due = False
        if step.counts(arguments):
            calls += 1
            due = calls == plan.call
        if due and plan.when == "before":
            plan.strike()
        result = real(*arguments, **named)
        if due and plan.when == "after":
            plan.strike()
        return result

    setattr(step.owner, step.name, wrapped)


def main() -> int:
    """Run the command line with the plan of the first argument."""
    plan = Plan(**json.loads(sys.argv[1]))
    if plan.step:
        wrap(plan)
    real_settings = worker.consumer_settings

    def consumer_settings(settings: Settings, protocol: str) -> dict[str, Any]:
        return real_settings(settings, protocol) | plan.librdkafka

    worker.consumer_settings = consumer_settings
    worker.HAND_OVER_TIMEOUT_S = plan.hand_over_timeout_s
    backoff.MAX_LIMITED_TRIES = plan.max_limited_tries
    command.HUNG_AFTER_S = etl_worker.HUNG_AFTER_S = plan.hung_after_s
    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
