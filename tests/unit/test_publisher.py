"""What a failed transaction means."""

from __future__ import annotations

import pytest
from confluent_kafka import KafkaError

from services.core.config import Settings
from services.core.errors import PermanentError, PipelineError, TransactionAbortedError, TransactionExpiredError
from services.core.shutdown import Shutdown
from services.producer.publisher import MAX_LOSSES, Publisher


@pytest.mark.parametrize(
    ("code", "age_s", "losses", "expected"),
    [
        (KafkaError._TIMED_OUT, 1.0, 0, TransactionAbortedError),
        (KafkaError._TIMED_OUT, 61.0, 0, TransactionAbortedError),  # only Kafka knows whether it ended the transaction
        (KafkaError.INVALID_TXN_STATE, 1.0, MAX_LOSSES, TransactionAbortedError),
        (KafkaError.INVALID_TXN_STATE, 1.0, MAX_LOSSES + 1, PermanentError),
        (KafkaError.PRODUCER_FENCED, 59.9, 1, PermanentError),
        (KafkaError.INVALID_PRODUCER_EPOCH, 1.0, 1, PermanentError),
        (KafkaError._FENCED, 60.0, 1, TransactionExpiredError),
        (KafkaError._FENCED, 60.0, MAX_LOSSES + 1, TransactionExpiredError),
        (KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED, 1.0, 0, PermanentError),
        (KafkaError.TOPIC_AUTHORIZATION_FAILED, 61.0, 0, PermanentError),
        (KafkaError.MSG_SIZE_TOO_LARGE, 1.0, 0, PermanentError),
        (KafkaError._UNKNOWN_TOPIC, 1.0, 0, PermanentError),
        (KafkaError._UNKNOWN_PARTITION, 1.0, 0, PermanentError),
    ],
)
def test_what_is_raised_for_a_failed_transaction(
    code: int, age_s: float, losses: int, expected: type[PipelineError]
) -> None:
    """``losses``: clients lost to fatal errors in a row, this one included."""
    settings = Settings(_env_file=None, producer_transaction_timeout_seconds=60)
    publisher = Publisher(settings, "a.parquet", Shutdown())
    for _ in range(losses - 1):
        publisher.error_after(KafkaError(KafkaError.INVALID_TXN_STATE, fatal=True), 1.0)
    found = publisher.error_after(KafkaError(code, fatal=losses > 0), age_s)
    assert type(found) is expected
    assert ("fenced" in str(found)) == (code in {KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH})
