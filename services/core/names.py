"""Names that are not settings: a misspelt one would be ignored without a word.

In ``.env`` every name should be a setting, or one that docker-compose.yml reads. In the environment only names that are
close to a setting count, since most of it belongs to others.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dotenv.parser import parse_stream

from services.core.errors import ConfigurationError
from services.core.measurements import DEFAULT

SYNONYMS = {"postgres_db": "postgre_dbname"}  # as the official image of PostgreSQL has it, and POSTGRES_* for POSTGRE_*
# Nobody else's names begin like this.
OURS = ("DATA_FEATURE_", "DEAD_LETTER_", "POSTGRE_", *(f"{name.upper()}_" for name in DEFAULT))
OF_COMPOSE = re.compile(r"(COMPOSE|DOCKER|GRAFANA|POSTGRES|PROMETHEUS|SENSOR)_\w+|\w+_(IMAGE|RESTART)")
OF_KUBERNETES = re.compile(r"\w+_(SERVICE_(HOST|PORT\w*)|PORT_\d+_\w+)")  # what it says of every Service
ALMOST = 0.87  # of difflib's ratio: one letter more, less or other
SIMILAR = 0.6


@dataclass(frozen=True, slots=True)
class UnknownName:
    """A name that nothing reads, and the setting that may have been meant."""

    name: str
    source: str
    nearest: str | None


def setting_of(name: str) -> str:
    """The setting, in lower case, that a name stands for: POSTGRES_HOST is POSTGRE_HOST."""
    lower = name.lower()
    return SYNONYMS.get(lower) or re.sub("^postgres_", "postgre_", lower)


def with_synonyms(values: Mapping[str, str | None]) -> dict[str, str | None]:
    """The values by the lower-case setting that each name stands for; the setting's own name wins."""
    lower = {name.lower(): value for name, value in values.items()}
    if (lower.get("postgres_port") or "").startswith("tcp://"):  # Kubernetes sets it so for a Service called postgres
        del lower["postgres_port"]
    return {setting_of(name): value for name, value in lower.items()} | lower


def names_in(dotenv: Path, settings: Collection[str]) -> list[str]:
    """The names in a file of NAME=value lines; none where there is no file.

    Raises ConfigurationError for what cannot be read. It says where, and not what: that may be a password.
    """
    if dotenv.is_dir():
        raise ConfigurationError(f"{dotenv} is a directory: make it a file of NAME=value lines, or remove it")
    if not dotenv.exists():
        return []
    found = []
    with dotenv.open(encoding="utf-8-sig") as stream:
        for binding in parse_stream(stream):
            text, name = binding.original.string, binding.key
            line = binding.original.line + text[: len(text) - len(text.lstrip())].count("\n")
            if binding.error:
                raise ConfigurationError(f"{dotenv}, line {line}: not NAME=value (or a quote that is never closed)")
            if name is not None and binding.value is None and setting_of(name) in settings:
                raise ConfigurationError(f"{dotenv}, line {line}: {name} has no value; write {name}=value")
            if name is not None:
                found.append(name)
    return found


def unknown_names(
    settings: Collection[str], environment: Iterable[str], dotenv: Iterable[str]
) -> Iterator[UnknownName]:
    """What looks like a setting in the environment and is none, and whatever is none in ``.env``."""
    known = [name.upper() for name in (*settings, *SYNONYMS)]
    known += [name.replace("POSTGRE_", "POSTGRES_") for name in known if name.startswith("POSTGRE_")]
    for source, names in (("environment", environment), (".env", dotenv)):
        for name in sorted({name.upper() for name in names}.difference(known)):
            ours = source == ".env" or (name.startswith(OURS) and not OF_KUBERNETES.fullmatch(name))
            almost = difflib.get_close_matches(name, known, 1, ALMOST)
            if almost or (ours and not OF_COMPOSE.fullmatch(name)):
                nearest = almost or difflib.get_close_matches(name, known, 1, SIMILAR)
                yield UnknownName(name, source, nearest[0] if nearest else None)
