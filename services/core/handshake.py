"""Why a Kafka listener and our settings do not fit, found by a handshake of our own.

librdkafka only retries: it reports a wrong host name like an unknown authority, and a TLS listener that it speaks
plain text to not at all.
"""

from __future__ import annotations

import socket
import ssl
from typing import NamedTuple

from services.core.config import Settings

ANSWER_TIMEOUT_S = 2.0
# In TLS 1.3 a server checks our certificate after the handshake, and may refuse it then.
REFUSED_TIMEOUT_S = 0.5


class Mismatch(NamedTuple):
    """What to tell the user, with the settings to check; unless ``certain``, the server may only be starting."""

    text: str
    certain: bool = True


def find_mismatch(settings: Settings) -> Mismatch | None:
    """Why the listener does not answer us; None if nothing takes connections there."""
    try:
        line = socket.create_connection((settings.kafka_host, settings.kafka_port), ANSWER_TIMEOUT_S)
    except OSError:
        return None
    protocol, found = settings.kafka_security_protocol, None
    with line:
        if protocol.endswith("SSL"):
            found = _tls_mismatch(line, settings)
        elif _speaks_tls(line):
            found = Mismatch(
                f"it speaks TLS, and KAFKA_SECURITY_PROTOCOL={protocol} is plain text: set SSL or SASL_SSL"
            )
    sasl = "" if protocol.startswith("SASL") else " (does it ask for SASL?)"
    text = f"something takes connections there, but does not answer to KAFKA_SECURITY_PROTOCOL={protocol}{sasl}"
    return found or Mismatch(text, certain=False)


def _speaks_tls(line: socket.socket) -> bool:
    anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anybody.check_hostname = False
    anybody.verify_mode = ssl.CERT_NONE
    try:
        anybody.wrap_socket(line).close()
    except OSError:
        return False
    return True


def _tls_mismatch(line: socket.socket, settings: Settings) -> Mismatch | None:
    context = ssl.create_default_context(cafile=settings.kafka_ssl_ca_location or None)
    if settings.kafka_ssl_certificate_location:
        context.load_cert_chain(
            settings.kafka_ssl_certificate_location,
            settings.kafka_ssl_key_location,
            settings.kafka_ssl_key_password.get_secret_value,
        )
    try:
        with context.wrap_socket(line, server_hostname=settings.kafka_host) as secure:
            secure.settimeout(REFUSED_TIMEOUT_S)
            secure.recv(1)
    except TimeoutError:
        return None
    except ssl.SSLCertVerificationError as error:
        reason = error.verify_message.rstrip(".")
        text = f"its certificate is not to be trusted: {reason} (check KAFKA_SSL_CA_LOCATION and KAFKA_HOST)"
        return Mismatch(text)
    except OSError as error:
        reason = getattr(error, "reason", None) or ""
        if "ALERT" in reason:
            words = reason.lower().replace("_", " ")
            text = f"it refuses us: {words} (check KAFKA_SSL_CERTIFICATE_LOCATION and KAFKA_SSL_KEY_LOCATION)"
            return Mismatch(text)
        return Mismatch(
            f"it does not speak TLS, and KAFKA_SECURITY_PROTOCOL={settings.kafka_security_protocol} does: "
            "set PLAINTEXT or SASL_PLAINTEXT, or correct the address",
            certain=False,
        )
    return None
