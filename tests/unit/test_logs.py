"""Log lines: an event and fields, for people on a terminal, one JSON object elsewhere."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from services.core.logs import OnceInAWhile, configure_logging, fields


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    before = (root.level, root.handlers[:])
    yield
    root.setLevel(before[0])
    root.handlers[:] = before[1]


def logged(stream: io.StringIO, level: str = "INFO", style: str = "auto") -> str:
    configure_logging(level, style, stream)
    log = logging.getLogger("consumer")
    log.debug("not_shown_at_info")
    log.info("batch_written", extra=fields(rows=10_000, seconds=0.021))
    return stream.getvalue()


def test_a_terminal_gets_text() -> None:
    line = logged(Terminal())
    assert line.endswith(" INFO consumer batch_written rows=10000 seconds=0.021\n")
    assert line.count("\n") == 1


def test_what_comes_from_outside_cannot_forge_a_line_or_command_a_terminal() -> None:
    stream = Terminal()
    configure_logging("INFO", "auto", stream)
    name = "a\x1b]0;owned\x07\n12:00:01 INFO consumer forged\u202e\udcff é.parquet"
    logging.getLogger("producer").info("unreadable", extra=fields(file=name))
    line = stream.getvalue()
    assert line.count("\n") == 1
    assert line.rstrip("\n").isprintable()
    assert r"file=a\x1b]0;owned\x07\n12:00:01 INFO consumer forged\u202e\udcff é.parquet" in line


def test_everything_else_gets_one_json_object_a_line() -> None:
    line = json.loads(logged(io.StringIO()))
    moment = line.pop("time")
    assert moment.endswith("+00:00")
    assert line == {
        "level": "INFO",
        "service": "consumer",
        "event": "batch_written",
        "rows": 10_000,
        "seconds": 0.021,
    }


def test_the_style_can_be_chosen() -> None:
    assert logged(Terminal(), style="json").startswith("{")
    assert "batch_written rows=10000" in logged(io.StringIO(), style="text")


def test_the_level_is_respected() -> None:
    assert "not_shown_at_info" in logged(io.StringIO(), level="DEBUG")
    assert logged(io.StringIO(), level="WARNING") == ""


def test_values_that_json_does_not_know_become_text() -> None:
    stream = io.StringIO()
    configure_logging("INFO", "json", stream)
    logging.getLogger("etl").info("event", extra=fields(detail=ValueError("two\nlines")))
    assert stream.getvalue().count("\n") == 1
    assert json.loads(stream.getvalue())["detail"] == "two\nlines"


@pytest.mark.parametrize("style", ["text", "json"])
def test_an_exception_keeps_its_traceback(style: str) -> None:
    stream = io.StringIO()
    configure_logging("INFO", style, stream)
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        logging.getLogger("etl").exception("failed")
    assert "RuntimeError: broken" in stream.getvalue()


def test_what_librdkafka_says_in_the_course_of_things_is_not_logged() -> None:
    """Its lines as they come: a word, the client, and what happened. The first start on a new cluster is no warning."""
    stream = io.StringIO()
    configure_logging("INFO", "text", stream)
    log = logging.getLogger("librdkafka.of_this_test")
    log.addFilter(OnceInAWhile())
    log.warning("%s [%s] %s", "GETPID", "producer-1", "Failed to acquire transactional PID: retrying")
    log.warning("%s [%s] %s", "FAIL", "producer-1", "Connect to 127.0.0.1:9092 failed")
    log.warning("%s [%s] %s", "FAIL", "producer-1", "Connect to 127.0.0.1:9092 failed")
    (line,) = stream.getvalue().splitlines()
    assert "FAIL [producer-1]" in line
