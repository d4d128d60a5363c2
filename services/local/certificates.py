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
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

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
        self._pair = Pair(directory / "ca.pem", directory / "ca.key")
        directory.mkdir(parents=True, exist_ok=True)
        if not self._pair.certificate.exists():
            key = generate_private_key(SECP256R1())
            name = _name("sensor-pipeline local authority")
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
            builder = (
                _builder(name, key)
                .issuer_name(name)
                .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
                .add_extension(usage, critical=True)
            )
            _write(self._pair, builder.sign(key, hashes.SHA256()), key)

    @property
    def certificate(self) -> Path:
        """What those who trust this authority are given."""
        return self._pair.certificate

    def issue(self, file: str, name: str, *, host: str = "", password: str = "") -> Pair:
        """A pair for ``name``, and for the server ``host`` if given; ``file`` is what its two files are called."""
        own = load_pem_private_key(self._pair.key.read_bytes(), None)
        assert isinstance(own, EllipticCurvePrivateKey)
        issuer = x509.load_pem_x509_certificate(self._pair.certificate.read_bytes())
        key = generate_private_key(SECP256R1())
        purposes = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if host else [])]
        builder = (
            _builder(_name(name), key)
            .issuer_name(issuer.subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(own.public_key()), critical=False)
        )
        if host:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        pair = Pair(self._directory / f"{file}.pem", self._directory / f"{file}.key")
        encryption = BestAvailableEncryption(password.encode()) if password else NoEncryption()
        _write(pair, builder.sign(own, hashes.SHA256()), key, encryption)
        return pair


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(subject: x509.Name, key: EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # a clock that is behind shall trust it too
        .not_valid_after(now + VALID_FOR)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _write(
    pair: Pair,
    certificate: x509.Certificate,
    key: EllipticCurvePrivateKey,
    encryption: KeySerializationEncryption | None = None,
) -> None:
    """The key first, readable by its owner only: a certificate that is there has its key."""
    pair.key.unlink(missing_ok=True)
    pair.key.touch(mode=0o600)
    pair.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption()))
    pair.certificate.write_bytes(certificate.public_bytes(Encoding.PEM))
