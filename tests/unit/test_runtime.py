"""What the local stack runs on: the files that were looked at once, and no secrets in its environment."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from services.core.errors import PermanentError
from services.local import runtime
from services.local.runtime import KAFKA_VERSION, LOG4J_VERSION, check_jars
from services.local.servers import without_secrets
from tests import ROOT


@pytest.fixture
def jars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Two jars that are the expected ones."""
    found = {}
    lines = []
    for name in ("a-1.jar", "b-2.jar"):
        path = tmp_path / name
        path.write_text(name, encoding="utf-8")
        found[name] = str(path)
        lines.append(f"{hashlib.sha256(name.encode()).hexdigest()}  {name}\n")
    (tmp_path / "sums").write_text("".join(lines), encoding="utf-8")
    monkeypatch.setattr(runtime, "_KAFKA_CHECKSUMS", tmp_path / "sums")
    return found


def test_the_expected_jars_are_taken(jars: dict[str, str]) -> None:
    check_jars(jars)


def test_a_jar_that_was_changed_is_refused(jars: dict[str, str]) -> None:
    Path(jars["b-2.jar"]).write_text("other", encoding="utf-8")
    with pytest.raises(PermanentError, match=r"b-2\.jar: its SHA-256 is [0-9a-f]{64}, but should be [0-9a-f]{64}"):
        check_jars(jars)


def test_a_jar_more_or_less_is_refused(jars: dict[str, str]) -> None:
    with pytest.raises(PermanentError, match="should be that of a known file"):
        check_jars(jars | {"c-3.jar": jars["a-1.jar"]})
    del jars["a-1.jar"]
    with pytest.raises(PermanentError, match=r"a-1\.jar: its SHA-256 is missing"):
        check_jars(jars)


def test_the_checksums_are_of_the_versions_that_are_asked_for() -> None:
    lines = (ROOT / "services/local/kafka.sha256").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"[0-9a-f]{64}  [\w.-]+\.jar", line) for line in lines)
    names = {line.split()[1] for line in lines}
    assert {f"kafka_2.13-{KAFKA_VERSION}.jar", f"log4j-slf4j-impl-{LOG4J_VERSION}.jar"} <= names


@pytest.mark.parametrize("name", ["package.json", "package-lock.json", ".npmrc"])
def test_what_npm_reads_names_no_host(name: str) -> None:
    """npm writes where packages ask for money into the lock file; take it out again."""
    assert "://" not in (ROOT / "services/local/gateway" / name).read_text(encoding="utf-8")


def test_servers_get_nobody_s_secrets() -> None:
    kept = {"PATH": "/bin", "HOME": "/root", "JAVA_TOOL_OPTIONS": "", "KEYBOARD": "us"}
    secrets = ("POSTGRE_PASSWORD", "KAFKA_SASL_PASSWORD", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "API_KEY", "Api_Key")
    assert without_secrets(kept | dict.fromkeys(secrets, "hunter2")) == kept
