"""How a command ends: whatever happens, with an exit code and at most one line that says why."""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from services.core.errors import STOPPED, PermanentError, PipelineError
from services.core.printable import printable

BROKEN_PIPE = 128 + signal.SIGPIPE
OURS = Path(__file__).parents[1]
TRACE = "LOG_LEVEL=DEBUG shows where it comes from"

log = logging.getLogger("sensor-pipeline")


def run_to_its_end(command: Callable[[], int]) -> int:
    """The exit code of a command, or that of the error that ended it, which is then one line on stderr.

    Ctrl-C ends the process at once until the command asks for something else: nothing has begun yet.
    """
    handle_interrupts(signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # there is none, or it is a test's
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        code = _exit_code(command)
        _flush()
        return code
    except PipelineError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return STOPPED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _has_no_reader(sys.stdout):  # such as head, which has seen enough
            _forget(sys.stdout)
            return BROKEN_PIPE
        log.debug("fault", exc_info=True)
        return _fail(_describe(error), PermanentError.exit_code)


def _exit_code(command: Callable[[], int]) -> int:
    """The exit code also of a command that raises SystemExit, as argparse does after printing a help text."""
    try:
        return command()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(bool(end.code))


def handle_interrupts(handler: signal.Handlers | Callable[..., object]) -> None:
    """Set what Ctrl-C does from now on; only the main thread can."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, handler)


def _flush() -> None:
    """Write what was printed, so that a full disk is an error now and not a surprise at the end."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _fail(text: str, exit_code: int) -> int:
    try:
        _flush()
    except OSError:
        _forget(sys.stdout)
    try:
        print(f"error: {printable(text)}", file=sys.stderr, flush=True)  # noqa: T201
    except OSError:
        _forget(sys.stderr)
    return exit_code


def _has_no_reader(stream: TextIO) -> bool:
    """Whether it is a pipe without a reader: other pipes break too, and that is a fault."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _forget(stream: TextIO) -> None:
    """Keep Python from trying again at its end to write what could not be written."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _describe(error: Exception) -> str:
    """An unforeseen fault in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror} ({TRACE})" if error.filename else f"{error.strerror} ({TRACE})"
    frames = traceback.extract_tb(error.__traceback__)
    frame = ([each for each in frames if OURS in Path(each.filename).parents] or frames)[-1]
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"{what} (an unforeseen fault in {Path(frame.filename).name}, line {frame.lineno}; {TRACE})"
