"""How far the producer is: a bar on a terminal, otherwise a log line every few seconds."""

from __future__ import annotations

import logging
import math
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
    """Rows per second, over the last half minute."""

    def render(self, task: Task) -> Text:
        """``612,345 rows/s``."""
        return Text(f"{task.speed or 0:,.0f} rows/s")


@contextmanager
def show_rows(total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function to call, again and again, with how many of ``total`` rows are done."""
    if not (total and sys.stderr.isatty()):
        yield _log_lines(total)
        return
    rows = TextColumn("{task.completed:,.0f} of {task.total:,.0f} rows")
    columns = (rows, BarColumn(), RowsPerSecond(), TimeRemainingColumn())
    terminal = sys.stderr
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as bar:
        task, shown = bar.add_task("", total=total), math.inf

        def update(rows: int) -> None:
            nonlocal shown
            # At the start (rows of an earlier run) and after an aborted transaction the speed is measured afresh.
            show = bar.reset if rows < shown else bar.update
            show(task, completed=rows)
            shown = rows

        _log_to(sys.stderr, instead_of=terminal)  # now the bar's own, which prints above the bar
        try:
            yield update
        finally:
            _log_to(terminal, instead_of=sys.stderr)


def _log_to(stream: TextIO, instead_of: TextIO) -> None:
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is instead_of:
            handler.setStream(stream)


def _log_lines(total: int) -> Callable[[int], None]:
    then, rows_then = 0.0, math.inf  # of the last line

    def update(rows: int) -> None:
        nonlocal then, rows_then
        now = time.monotonic()
        if rows < rows_then:  # at the start, and after an aborted transaction
            then, rows_then = now, rows
        elif now - then >= LOG_INTERVAL_S:
            speed = (rows - rows_then) / (now - then)
            left = round((total - rows) / speed) if speed > 0 else None
            log.info("producing", extra=fields(rows=rows, of=total, rows_per_second=round(speed), seconds_left=left))
            then, rows_then = now, rows

    return update
