"""What a failed transaction means."""

from __future__ import annotations

import pytest
from confluent_kafka import KafkaError

from services.producer.publisher import MAX_LOSSES, Verdict, verdict

TIMEOUT_S = 60.0


@pytest.mark.parametrize(
    ("code", "age_s", "losses", "expected"),
    [
        (KafkaError._TIMED_OUT, 1.0, 0, Verdict.ABORTED),
        (KafkaError._TIMED_OUT, 61.0, 0, Verdict.ABORTED),  # only Kafka knows whether it ended the transaction
        (KafkaError.INVALID_TXN_STATE, 1.0, MAX_LOSSES, Verdict.ABORTED),
        (KafkaError.INVALID_TXN_STATE, 1.0, MAX_LOSSES + 1, Verdict.UNDELIVERABLE),
        (KafkaError.PRODUCER_FENCED, 59.9, 1, Verdict.FENCED),
        (KafkaError.INVALID_PRODUCER_EPOCH, 1.0, 1, Verdict.FENCED),
        (KafkaError._FENCED, 60.0, 1, Verdict.EXPIRED),
        (KafkaError._FENCED, 60.0, MAX_LOSSES + 1, Verdict.EXPIRED),
        (KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED, 1.0, 0, Verdict.UNDELIVERABLE),
        (KafkaError.TOPIC_AUTHORIZATION_FAILED, 61.0, 0, Verdict.UNDELIVERABLE),
        (KafkaError.MSG_SIZE_TOO_LARGE, 1.0, 0, Verdict.UNDELIVERABLE),
        (KafkaError._UNKNOWN_TOPIC, 1.0, 0, Verdict.UNDELIVERABLE),
        (KafkaError._UNKNOWN_PARTITION, 1.0, 0, Verdict.UNDELIVERABLE),
    ],
)
def test_the_verdict_on_a_failed_transaction(code: int, age_s: float, losses: int, expected: Verdict) -> None:
    assert verdict(KafkaError(code), age_s, TIMEOUT_S, losses) is expected
