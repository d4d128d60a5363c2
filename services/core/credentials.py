"""Passwords and certificates in files that settings name.

libpq and librdkafka report what is wrong with such a file late and without the setting's name, or ignore it. Here each
mistake is a ConfigurationError with that name, when a client is made: a command without this client needs no files.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from services.core.errors import ConfigurationError

if TYPE_CHECKING:  # which reads passwords with this module
    from services.core.config import Settings

SYSTEM = ("postgre_sslrootcert", "system")  # libpq's word for the CAs of the operating system


def read_password(setting: str, path: str) -> str:
    """The password in a file, as Docker and Kubernetes mount secrets; a newline at the end is not part of it."""
    with _blamed(setting, path, "the file is not text in UTF-8"):
        password = Path(path).read_text(encoding="utf-8").removesuffix("\n")
    if not password:
        raise ConfigurationError(f"{setting.upper()}={path}: the file is empty")
    return password


def check_files(settings: Settings, authority: str, certificate: str, key: str, key_password: str = "") -> None:
    """Whether the files that these three settings name hold certificates and a key of these, in PEM form."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for setting in (authority, certificate):
        path = getattr(settings, setting)
        if path and (setting, path) != SYSTEM:
            with _blamed(setting, path, "the file does not contain a PEM certificate"):
                context.load_verify_locations(path)
    if path := getattr(settings, key):
        with _blamed(key, path, "the file does not contain a PEM private key, or its password is wrong"):
            # Without a password of ours OpenSSL would ask for one at the terminal.
            context.load_cert_chain(getattr(settings, certificate), path, lambda: key_password)


@contextmanager
def _blamed(setting: str, path: str, reason: str) -> Iterator[None]:
    """Blame the setting for a file that cannot be read, or, with this ``reason``, for what it holds."""
    try:
        Path(path).open("rb").close()
        yield
    except (ssl.SSLError, UnicodeDecodeError) as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            reason = "the key does not belong to the certificate"
        raise ConfigurationError(f"{setting.upper()}={path}: {reason}") from error
    except OSError as error:
        raise ConfigurationError(f"{setting.upper()}={path}: the file cannot be read ({error.strerror})") from error
