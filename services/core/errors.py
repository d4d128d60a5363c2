"""The error tree.

    PipelineError
    |-- ConfigurationError             a user's mistake; one line, exit code 2
    |   `-- ProtocolNotOfferedError    the brokers do not offer the group protocol of Kafka 4
    |-- TransientError                 a server is unavailable or busy; wait and try again
    |   |-- TransactionAbortedError    nothing of the producer's transaction is visible; send it again
    |   |   `-- TransactionExpiredError    Kafka ended it, and another producer may have taken over
    |   `-- LeaseLostError             another etl instance leads
    |-- PermanentError                 no retry can help; one line, exit code 1
    |   `-- UnreadableFileError        a file is damaged, or has changed or gone since it was checked
    |-- StoppedError                   a signal ended it early; one line, exit code 130
    |-- AbandonedError                 what was under way was given up; the database knows where to continue
    |   |-- PartitionsMovedError       a partition is not where the batch began
    |   `-- OutOfPlaceError            a message was fetched before its partition moved
    |-- HistoryClosedError             readings from a time whose raw history is closed; they become dead letters
    |-- ChunkDroppedError              raw readings were dropped while a summary was computed from them
    `-- MalformedMessageError          a message is not a reading; it becomes a dead letter

Errors of libraries are translated once, where they enter (core/database.py, core/kafka.py), by class, code or
SQLSTATE. Each message is one line: what is wrong, which setting or file, what to do.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

STOPPED = 130  # exit code


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
    """A user's mistake: a setting, a file or a server address is wrong; nothing was changed."""

    exit_code = 2


class ProtocolNotOfferedError(ConfigurationError):
    """The brokers do not offer the group protocol of Kafka 4."""


class TransientError(PipelineError):
    """A server is unreachable, restarting, or out of a resource: wait and try again.

    ``retry_limited``: it may also be a failure that never goes away, so the number of retries is limited.
    """

    def __init__(self, text: str, *, retry_limited: bool = False) -> None:
        super().__init__(text)
        self.retry_limited = retry_limited


class TransactionAbortedError(TransientError):
    """Nothing of the open transaction is visible; send again from the progress of the last commit."""


class TransactionExpiredError(TransactionAbortedError):
    """Kafka ended the transaction because it was open for too long; another producer may have taken over."""


class LeaseLostError(TransientError):
    """Another etl instance leads: stop, and wait for the lead."""


class PermanentError(PipelineError):
    """No retry can help: a missing table, a missing permission, messages that could not be delivered."""


class UnreadableFileError(PermanentError):
    """A file that was checked turned out to be damaged, or has changed or gone since."""


class StoppedError(PipelineError):
    """A signal ended the command, or one step of it, before it was done."""

    exit_code = STOPPED


class AbandonedError(PipelineError):
    """A batch or a question was given up; the database knows where to continue.

    What was stored of it anyway is harmless to repeat.
    """


class PartitionsMovedError(AbandonedError):
    """A partition of this batch is not where the batch began; nothing of it was advanced."""


class OutOfPlaceError(AbandonedError):
    """A message that was fetched before its partition moved: the database must be asked where to continue."""


class HistoryClosedError(PipelineError):
    """Some readings are from a time whose raw history is incomplete, or soon will be; nothing was written.

    They become dead letters.
    """

    def __init__(self, closed_before: datetime) -> None:
        super().__init__(f"older than {closed_before}, before which raw readings are no longer kept")
        self.closed_before = closed_before


class ChunkDroppedError(PipelineError):
    """Raw readings were dropped while a summary was computed from them; nothing was written."""


class MalformedMessageError(PipelineError):
    """A message that is not a reading, and what was found instead; it becomes a dead letter."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
