"""A certificate authority of the local stack's own, made when it first starts with TLS.

Its key never leaves the directory, and neither client nor server anywhere else trusts it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

NAME = "sensor-pipeline local authority"
VALID_FOR = timedelta(days=3650)


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its private key, as PEM files."""

    certificate: Path
    key: Path


class Authority:
    """Issues certificates; its own is ``ca.pem`` in the directory, made there if it is not there yet."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._own = self._pair("ca")
        self.certificate = self._own.certificate  # for those who trust this authority
        directory.mkdir(parents=True, exist_ok=True)
        if not self.certificate.exists():
            usage = x509.KeyUsage(
                digital_signature=False,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=True,
                crl_sign=True,
                encipher_only=False,
                decipher_only=False,
            )
            key = generate_private_key(SECP256R1())
            builder = _builder(NAME, key, key).add_extension(
                x509.BasicConstraints(ca=True, path_length=0), critical=True
            )
            _write(self._own, builder.add_extension(usage, critical=True).sign(key, hashes.SHA256()), key)

    def issue(self, file: str, name: str, *, host: str = "") -> Pair:
        """A pair for ``name``, and for the server ``host`` if given; ``file`` is what its two files are called."""
        issuer_key = load_pem_private_key(self._own.key.read_bytes(), None)
        assert isinstance(issuer_key, EllipticCurvePrivateKey)
        key = generate_private_key(SECP256R1())
        purposes = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if host else [])]
        builder = (
            _builder(name, key, issuer_key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        )
        if host:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        pair = self._pair(file)
        _write(pair, builder.sign(issuer_key, hashes.SHA256()), key)
        return pair

    def _pair(self, file: str) -> Pair:
        return Pair(self._directory / f"{file}.pem", self._directory / f"{file}.key")


def _builder(name: str, key: EllipticCurvePrivateKey, issuer_key: EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    subject, issuer = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, each)]) for each in (name, NAME))
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # a clock that is behind must trust it too
        .not_valid_after(now + VALID_FOR)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )


def _write(pair: Pair, certificate: x509.Certificate, key: EllipticCurvePrivateKey) -> None:
    """The key first, readable by its owner only: a certificate that is there has its key."""
    pair.key.unlink(missing_ok=True)
    pair.key.touch(mode=0o600)
    pair.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    pair.certificate.write_bytes(certificate.public_bytes(Encoding.PEM))
