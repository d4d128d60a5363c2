"""The error tree.

    PipelineError
    |-- ConfigurationError     a user's mistake; one line, exit code 2
    |-- TransientError         a server is away or busy; wait and try again
    |-- PermanentError         no retry can help; one line, exit code 1
    |-- StoppedError           a signal came before it was done; one line, exit code 130
    `-- MalformedMessage       one message is not a reading; it becomes a dead letter

Errors of libraries are translated once, where they enter (core/database.py, core/kafka.py), by class or
SQLSTATE. Each message is one line: what is wrong, which setting or file, what to do.
"""

from __future__ import annotations

# What a command ends with that a signal has stopped before it was done.
STOPPED = 130


class PipelineError(Exception):
    """Any error that this project raises on purpose."""

    exit_code = 1


class ConfigurationError(PipelineError):
    """A setting, a file or a server address is wrong; nothing was changed."""

    exit_code = 2


class TransientError(PipelineError):
    """A server is unreachable, restarting, or out of a resource.

    ``doubtful``: it may also be a failure that comes back each time, so it is not tried again without end.
    """

    def __init__(self, text: str, *, doubtful: bool = False) -> None:
        super().__init__(text)
        self.doubtful = doubtful


class PermanentError(PipelineError):
    """A missing table, a missing permission, messages that could not be delivered."""


class StoppedError(PipelineError):
    """A signal has ended the command before it was done."""

    exit_code = STOPPED


class MalformedMessage(PipelineError):  # noqa: N818 - it is about the message, not about us
    """A message that is not a reading.

    ``reason`` is one of a few stable words, fit for a metric label; the text says what was found.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
