"""Which partition Kafka's Java clients give a key: toPositive(murmur2(key)) % partitions (BuiltInPartitioner)."""

from __future__ import annotations

from functools import lru_cache

MASK, FACTOR, SEED = 0xFFFF_FFFF, 0x5BD1_E995, 0x9747_B28C


@lru_cache(maxsize=1 << 18)  # each sensor's id comes with every batch
def murmur2(data: bytes) -> int:
    """Kafka's murmur2 with its seed, as an unsigned number of 32 bits (MurmurHash2 by Austin Appleby)."""
    value = SEED ^ len(data)
    whole = len(data) // 4 * 4
    for start in range(0, whole, 4):
        word = int.from_bytes(data[start : start + 4], "little") * FACTOR & MASK
        word = (word ^ word >> 24) * FACTOR & MASK
        value = value * FACTOR & MASK ^ word
    if whole < len(data):
        value = (value ^ int.from_bytes(data[whole:], "little")) * FACTOR & MASK
    value = (value ^ value >> 13) * FACTOR & MASK
    return value ^ value >> 15


def partition_of(key: bytes, partitions: int) -> int:
    """The partition of ``key``, as librdkafka's murmur2_random has it, too."""
    return (murmur2(key) & 0x7FFF_FFFF) % partitions
