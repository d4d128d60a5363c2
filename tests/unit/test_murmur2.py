"""Partitions are those of Kafka's own test."""

from __future__ import annotations

import pytest

from services.core.murmur2 import murmur2


@pytest.mark.parametrize(
    ("key", "value"),
    [  # org.apache.kafka.common.utils.UtilsTest.testMurmur2
        ("21", -973932308),
        ("foobar", -790332482),
        ("a-little-bit-long-string", -985981536),
        ("a-little-bit-longer-string", -1486304829),
        ("lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        ("abc", 479470107),
    ],
)
def test_it_is_the_murmur2_of_kafka(key: str, value: int) -> None:
    assert murmur2(key.encode()) == value % 2**32
