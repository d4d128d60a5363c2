"""Passwords and certificates that settings name as files, looked at before any server is.

libpq and librdkafka report what is wrong with such a file late, and without the setting's name. Here each mistake
is a ValueError that says what the file lacks; config.py puts the setting in front.
"""

from __future__ import annotations

import ssl
import stat
from pathlib import Path

SYSTEM = "system"  # libpq's word for the CAs of the operating system


def read_password(path: str) -> str:
    """The password in a file, as Docker and Kubernetes mount secrets; a newline at the end is not part of it."""
    try:
        password = Path(path).read_text(encoding="utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError("the file is not text in UTF-8") from error
    except OSError as error:
        raise ValueError(f"the file cannot be read ({error.strerror})") from error
    if not password:
        raise ValueError("the file is empty")
    return password


def check_certificates(path: str) -> None:
    """Whether the file holds certificates, in PEM form."""
    _check_readable(path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError as error:
        raise ValueError("the file holds no certificate in PEM form") from error


def check_key(path: str, certificate: str, password: str = "") -> None:
    """Whether the file holds the certificate's private key, in PEM form, and the password opens it."""
    _check_readable(path)
    try:
        # Without a password of ours OpenSSL would ask for one at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(certificate, path, lambda: password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(f"the key does not belong to the certificate {certificate}") from error
        raise ValueError("the file holds no private key in PEM form, or one that its password does not open") from error


def check_permissions(path: str) -> None:
    """Whether libpq will take the private key: it refuses one that others may read."""
    found = Path(path).stat()
    mask = stat.S_IWGRP | stat.S_IXGRP | stat.S_IRWXO if found.st_uid == 0 else stat.S_IRWXG | stat.S_IRWXO
    if found.st_mode & mask:
        raise ValueError("others may read the private key; take that away (chmod 600)")


def _check_readable(path: str) -> None:
    try:
        with Path(path).open("rb"):
            pass
    except OSError as error:
        raise ValueError(f"the file cannot be read ({error.strerror})") from error
