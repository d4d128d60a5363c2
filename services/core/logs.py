"""Log lines: a stable event name and fields, for people on a terminal, JSON elsewhere.

Use ``log.info("batch_written", extra=fields(rows=10_000, seconds=0.02))``.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

from services.core.printable import printable

REPEAT_INTERVAL_S = 30.0
ROUTINE = "GETPID "  # librdkafka's word before "Coordinator load in progress: retrying"


def fields(**values: object) -> dict[str, Any]:
    """Fields of one log line, for ``extra=``."""
    return {"fields": values}


class TextFormatter(logging.Formatter):
    """``12:00:01 INFO consumer batch_written rows=10000 seconds=0.021``."""

    def format(self, record: logging.LogRecord) -> str:
        clock = datetime.fromtimestamp(record.created, UTC).strftime("%H:%M:%S")
        pairs = "".join(f" {name}={value}" for name, value in getattr(record, "fields", {}).items())
        line = printable(f"{clock} {record.levelname} {record.name} {record.getMessage()}{pairs}")
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (RFC 3339, UTC), level, service, event, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "service": record.name,
            "event": record.getMessage(),
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class OnceInAWhile(logging.Filter):
    """Lets one of librdkafka's lines through every REPEAT_INTERVAL_S: it reports each failed reconnect.

    None of ROUTINE: the first producer of a new cluster always comes too early. What lasts is an error of the call.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last = -REPEAT_INTERVAL_S

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is logged."""
        if record.created - self._last < REPEAT_INTERVAL_S or record.getMessage().startswith(ROUTINE):
            return False
        self._last = record.created
        return True


def configure_logging(level: str, style: str, stream: TextIO = sys.stderr) -> None:
    """Send all log lines to ``stream``; ``style`` is ``text``, ``json`` or ``auto``."""
    text = style == "text" or (style == "auto" and stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.setFormatter(TextFormatter() if text else JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("alembic.runtime.plugins").setLevel(logging.WARNING)
