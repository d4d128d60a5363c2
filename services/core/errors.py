"""The error tree.

    PipelineError
    |-- ConfigurationError       a user's mistake; one line, exit code 2
    |   `-- ProtocolNotOfferedError  the brokers do not know the group protocol of Kafka 4
    |-- TransientError           a server is away or busy; wait and try again
    |-- PermanentError           no retry can help; one line, exit code 1
    |-- StoppedError             a signal came before it was done; one line, exit code 130
    |-- AbandonedError           what was under way was given up; the database knows where to go on
    |   |-- PartitionsMovedError     a partition is not where the batch began
    |   `-- OutOfPlaceError          a message was fetched before its partition moved
    |-- HistoryClosedError       readings of a time whose raw history is closed; they become dead letters
    `-- MalformedMessage         one message is not a reading; it becomes a dead letter

Errors of libraries are translated once, where they enter (core/database.py, core/kafka.py), by class or
SQLSTATE. Each message is one line: what is wrong, which setting or file, what to do.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

# What a command ends with that a signal has stopped before it was done.
STOPPED = 130


class Reason(StrEnum):
    """Why a message became a dead letter: a header of the letter, and the label of a metric."""

    EMPTY = "empty"
    TOO_LARGE = "too_large"
    UNKNOWN_FORMAT = "unknown_format"
    INVALID_JSON = "invalid_json"
    INVALID_BLOCK = "invalid_block"
    INVALID_READING = "invalid_reading"
    NO_MEASUREMENT = "no_measurement"
    FUTURE_TIME = "future_time"
    TIME_OUT_OF_RANGE = "time_out_of_range"
    TOO_LATE = "too_late"
    REFUSED_BY_DATABASE = "refused_by_database"


class PipelineError(Exception):
    """Any error that this project raises on purpose."""

    exit_code = 1


class ConfigurationError(PipelineError):
    """A setting, a file or a server address is wrong; nothing was changed."""

    exit_code = 2


class ProtocolNotOfferedError(ConfigurationError):
    """The brokers did not let us into the group by the protocol of Kafka 4."""


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


class AbandonedError(PipelineError):
    """A batch or a question was given up. What of it is stored all the same is harmless to repeat."""


class PartitionsMovedError(AbandonedError):
    """A partition of this batch is not where the batch began; nothing of it was advanced."""


class OutOfPlaceError(AbandonedError):
    """A message that was fetched before its partition moved: the database has to be asked where to go on."""


class HistoryClosedError(PipelineError):
    """Some readings are of a time whose raw history is not, or soon not, whole; nothing was written."""

    def __init__(self, closed_before: datetime) -> None:
        super().__init__(f"older than {closed_before}, before which raw readings are no longer kept")
        self.closed_before = closed_before


class MalformedMessage(PipelineError):  # noqa: N818 - it is about the message, not about us
    """A message that is not a reading, and what was found."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
