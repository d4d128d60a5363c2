"""How far the producer is: a bar on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from services.core.logs import fields

log = logging.getLogger("producer")

LOG_INTERVAL_S = 5.0


class RowsPerSecond(ProgressColumn):
    """Rows a second, over the last half minute."""

    def render(self, task: Task) -> Text:
        """``612,345 rows/s``."""
        return Text(f"{task.speed or 0:,.0f} rows/s")


@contextmanager
def show_rows(total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that is told, again and again, how many of ``total`` rows are behind us."""
    if not (total and sys.stderr.isatty()):
        yield _LogLines(total).update
        return
    columns = (
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} rows"),
        BarColumn(),
        RowsPerSecond(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), refresh_per_second=4)
    terminal = sys.stderr
    with bar:
        _log_to(sys.stderr, instead_of=terminal)  # now the bar's own, which prints above the bar
        try:
            yield _Bar(bar, total).update
        finally:
            _log_to(terminal, instead_of=sys.stderr)


def _log_to(stream: TextIO, instead_of: TextIO) -> None:
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is instead_of:
            handler.setStream(stream)


class _Bar:
    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=total)
        self._rows: int | None = None

    def update(self, rows: int) -> None:
        if self._rows is None or rows < self._rows:  # rows of an earlier run, or an aborted transaction
            self._progress.reset(self._task, completed=rows)
        else:
            self._progress.update(self._task, completed=rows)
        self._rows = rows


class _LogLines:
    def __init__(self, total: int) -> None:
        self._total = total
        self._before: tuple[float, int] | None = None

    def update(self, rows: int) -> None:
        now = time.monotonic()
        if self._before is None or rows < self._before[1]:  # at the start, and after an aborted transaction
            self._before = now, rows
        then, rows_then = self._before
        if now - then < LOG_INTERVAL_S:
            return
        self._before = now, rows
        speed = (rows - rows_then) / (now - then)
        left = round((self._total - rows) / speed) if speed > 0 else None
        log.info(
            "producing",
            extra=fields(rows=rows, of=self._total, rows_per_second=round(speed), seconds_left=left),
        )
