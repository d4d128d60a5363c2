"""Where PARQUET_URL points: a file, a directory or a glob, on this machine or in an object store."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs

from services.core.errors import ConfigurationError
from services.producer.reader import FileState

MAX_DETAIL_LENGTH = 400  # of a library's error: clients of object stores repeat themselves
# Up to the last @ before the options: half of all AWS keys have a slash in them.
SECRET = re.compile(r"://(?:[^?\s]*:[^?\s]*|[^/@?\s]+)@")
STORES = frozenset({"s3", "gs", "gcs"})
GLOB = re.compile(r"[*?\[]")
QUERY = re.compile(r"\?(?=[A-Za-z_]+=)")


@dataclass(frozen=True, slots=True)
class SourceLocation:
    """A URL taken apart."""

    given: str
    scheme: str  # "s3://" and so on, empty for local files
    path: str  # within ``filesystem``, with the glob if there is one
    filesystem: pa.fs.FileSystem

    @classmethod
    def of(cls, given: str) -> SourceLocation:
        """Raises ConfigurationError where it is not a URL."""
        try:
            scheme, separator, rest = given.partition("://")
            masked = _masked(given)
            if scheme in STORES and masked != given and not rest.startswith("anonymous@"):
                raise ConfigurationError(
                    f"PARQUET_URL={masked}: keys must not be in the URL: they are read from AWS_ACCESS_KEY_ID and "
                    "AWS_SECRET_ACCESS_KEY, or from the file that GOOGLE_APPLICATION_CREDENTIALS names"
                )
            given = masked
            if not separator:
                # Path.resolve() would follow links: which file a name stands for may change, the name stays.
                path = os.path.abspath(Path(given).expanduser())  # noqa: PTH100
                return cls(given, "", path, pa.fs.LocalFileSystem())
            location, *options = QUERY.split(rest, maxsplit=1)
            base = location[: _glob_start(location)]
            query = options[0] if options else ""
            if scheme in {"gs", "gcs"} and "retry_limit_seconds" not in query:
                query = "&".join(filter(None, (query, "retry_limit_seconds=15")))
            uri = f"{scheme}://{quote(base, safe='/:@%')}" + (f"?{query}" if query else "")
            filesystem, root = pa.fs.FileSystem.from_uri(uri)
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            raise ConfigurationError(f"PARQUET_URL={given}: {one_line(error)}") from error
        if base.endswith("/") and root != "/":
            root = root.rstrip("/") + location[len(base) - 1 :]
        scheme = "" if isinstance(filesystem, pa.fs.LocalFileSystem) else f"{scheme}://"
        return cls(given, scheme, root.rstrip("/") or "/", filesystem)

    @property
    def url(self) -> str:
        """The URL in full, without its options."""
        return self.scheme + self.path

    def find(self) -> list[str]:
        """Paths of the files, sorted. Raises ConfigurationError when there is none."""
        states = self.list_states(must_exist=True)
        if not states:
            is_glob = GLOB.search(self.path)
            missing = "no file matches this glob" if is_glob else "there is no *.parquet file in this directory"
            raise ConfigurationError(f"PARQUET_URL={self.given}: {missing} ({self.url})")
        return sorted(states)

    def list_states(self, *, must_exist: bool = False) -> dict[str, FileState]:
        """The files by path, as they are now; with ``must_exist``, something must be there unless it is a glob.

        Raises ConfigurationError when they cannot be listed.
        """
        try:
            info = self.filesystem.get_file_info(self.path)
            if info.type == pa.fs.FileType.File:
                return {self.path: FileState.of(info)}
            if info.type == pa.fs.FileType.Directory:
                states = self._list(self.path)
                return {path: state for path, state in states.items() if _is_data(path[len(self.path) :])}
            if GLOB.search(self.path):
                pattern = _glob_pattern(self.path)
                states = self._list(self.path[: _glob_start(self.path)].rstrip("/") or "/")
                return {path: state for path, state in states.items() if pattern.fullmatch(path)}
        except (OSError, pa.ArrowException) as error:
            raise ConfigurationError(f"PARQUET_URL={self.given}: {one_line(error)}") from error
        if must_exist:
            raise ConfigurationError(f"PARQUET_URL={self.given}: there is no such file or directory ({self.url})")
        return {}

    def _list(self, base: str) -> dict[str, FileState]:
        selector = pa.fs.FileSelector(base, allow_not_found=True, recursive=True)
        found = self.filesystem.get_file_info(selector)
        return {info.path: FileState.of(info) for info in found if info.type == pa.fs.FileType.File}


def _is_data(path: str) -> bool:
    """Whether ``path``, below the directory that was named, is a file to read."""
    return path.endswith(".parquet") and not any(part[:1] in "._" for part in PurePosixPath(path).parts[1:])


def _glob_start(path: str) -> int:
    """Length of the part of ``path`` before the first component with a glob character."""
    found = GLOB.search(path)
    return path.rfind("/", 0, found.start()) + 1 if found else len(path)


def _glob_pattern(glob: str) -> re.Pattern[str]:
    """The regular expression of a glob, as a shell with globstar reads it."""
    pieces = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\])", glob)
    return re.compile(
        "".join(
            pieces.get(part)
            or (f"[{part[1:].replace('!', '^', 1)}" if part.startswith("[") and len(part) > 2 else re.escape(part))
            for part in parts
        )
    )


def _masked(text: str) -> str:
    """``text`` without the keys that a URL may hold before an ``@``."""
    return SECRET.sub("://***@", text)


def one_line(error: Exception) -> str:
    """The text of an error from a library, without keys."""
    text = _masked(" ".join(str(error).split()))
    return text if len(text) <= MAX_DETAIL_LENGTH else f"{text[:MAX_DETAIL_LENGTH]} ..."
