"""Private keys that a password locks."""

from __future__ import annotations

from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from services.local.certificates import Pair


def locked(pair: Pair, password: str) -> Pair:
    """The pair, with its key encrypted."""
    key = load_pem_private_key(pair.key.read_bytes(), None)
    encryption = BestAvailableEncryption(password.encode())
    pair.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    return pair
