"""Service processes, forked from one that has imported what they need: to start Python and import it takes a second.

A forked process is as real as any other: it has an environment and files of its own, and a signal ends it.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests import ROOT

_IMPORTED = [
    "pytest",  # what runs us is run again in each process
    "services.cli",
    "services.consumer.command",
    "services.consumer.positions",
    "services.consumer.replay",
    "services.core.logins",
    "services.core.schema",
    "services.etl.worker",
    "services.producer.generate",
    "services.producer.worker",
    "services.status.command",
    "tests.processes",
]
# Arrow's allocator has a thread of its own; it is made for forks.
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_IMPORTED)


class Fresh(subprocess.Popen[bytes]):
    """``python -m module arguments``, which write to files."""

    def __init__(
        self, module: str, arguments: Sequence[str], environment: Mapping[str, str], out: Path, err: Path
    ) -> None:
        with out.open("ab") as stdout, err.open("ab") as stderr:
            super().__init__(
                [sys.executable, "-m", module, *arguments],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
            )


class Forked:
    """The same as ``Fresh`` to whoever waits for it or ends it, but there at once."""

    def __init__(
        self, module: str, arguments: Sequence[str], environment: Mapping[str, str], out: Path, err: Path
    ) -> None:
        given = (module, list(arguments), dict(environment), str(out), str(err))
        self._process = _context.Process(target=_run, args=given, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, or the negative number of the signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """As ``returncode``."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if (code := self.returncode) is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _run(module: str, arguments: list[str], environment: dict[str, str], out: str, err: str) -> None:
    """In the new process."""
    for number, path in ((0, os.devnull), (1, out), (2, err)):
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    time.tzset()
    os.chdir(ROOT)
    sys.argv = [module, *arguments]
    warnings.simplefilter("ignore", RuntimeWarning)  # of a module that has been imported
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()
