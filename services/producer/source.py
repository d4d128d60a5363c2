"""Parquet files: found, checked, then streamed as messages.

A source is what PARQUET_URL names. All its files are opened and checked before anything is sent (watch.py: each
when it arrives); then each is read batch by batch (reader.py), so that memory follows neither the size of a file nor
that of its row groups.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs

from services.core.config import Settings
from services.core.errors import ConfigurationError, PermanentError
from services.core.shutdown import Shutdown
from services.producer.blocks import Rows, RowsDigest, choose_rows
from services.producer.encoding import Columns, Encoded, Messages, encode_batch
from services.producer.progress import Stopped
from services.producer.reader import BUFFER_BYTES, READER, FileState, Request

LONGEST_DETAIL = 400  # of a library's error: clients of object stores repeat themselves
MAGIC = b"PAR1"
# Up to the last @ before the options: half of all AWS keys have a slash in them.
SECRET = re.compile(r"://(?:[^?\s]*:[^?\s]*|[^/@?\s]+)@")
STORES = frozenset({"s3", "gs", "gcs"})
GLOB = re.compile(r"[*?\[]")
QUERY = re.compile(r"\?(?=[A-Za-z_]+=)")


class Digest(Protocol):
    """What hashlib makes, or RowsDigest."""

    def update(self, content: Any, /) -> None:
        """Take the contents of messages in."""

    def hexdigest(self) -> str:
        """What was taken in until now, as text."""


class UnreadableFileError(PermanentError):
    """A file that was checked turned out to be damaged, or has changed or gone since."""


def _whole(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    yield batch


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One Parquet file.

    ``fingerprint`` (hex) stands for what would be sent: it changes with the contents and the column mapping, and
    with nothing else that we can know. ``rows`` counts all its rows. ``state`` is from just before the contents were
    read for that.
    """

    url: str
    path: str
    filesystem: pa.fs.FileSystem = field(repr=False)
    columns: Columns
    rows: int
    fingerprint: str
    state: FileState

    def messages(
        self,
        start: int = 0,
        parts: Callable[[pa.RecordBatch], Iterator[pa.RecordBatch]] = _whole,
        end: int | None = None,
    ) -> Iterator[Messages | Rows]:
        """The rows from number ``start`` on, before number ``end``, in order, up to 20,000 at a time.

        ``parts`` may cut them further.

        Raises UnreadableFileError where the file turns out to be damaged, or has changed or gone.
        """
        row = start
        encode: Callable[[pa.RecordBatch, Columns], Messages | Rows] = (
            choose_rows if self.columns.blocks else encode_batch
        )
        try:
            for answer in READER.batches(Request(self.filesystem, self.path, self.columns.names, start, end)):
                if isinstance(answer, pa.RecordBatch):
                    for part in parts(answer):
                        yield encode(part, self.columns)
                        row += part.num_rows
                elif answer != self.state:
                    raise UnreadableFileError(
                        f"{self.url} changed after it was checked; the next look, or the next run, sends what it is now"
                    )
        except (OSError, pa.ArrowException) as error:
            raise UnreadableFileError(
                f"{self.url} cannot be read beyond row {row} of {self.rows}: {_one_line(error)}"
            ) from error

    def digest(self, end: int) -> Digest:
        """The digest of the messages of the first ``end`` rows. Raises UnreadableFileError."""
        digest = new_digest(self.columns)
        for messages in self.messages(end=end) if end else ():
            add_to_digest(digest, messages)
        return digest

    def begins_with(self, rows: int, digests: set[str]) -> bool:
        """Whether one of these is the digest of the first ``rows`` rows, in either format.

        Raises UnreadableFileError.
        """
        for blocks in (False, True):
            if any(digest.startswith(RowsDigest.PREFIX) == blocks for digest in digests):
                file = replace(self, columns=replace(self.columns, blocks=blocks))
                if file.digest(rows).hexdigest() in digests:
                    return True
        return False


def new_digest(columns: Columns) -> Digest:
    """The digest of no message."""
    return RowsDigest(3 + len(columns.measurements)) if columns.blocks else hashlib.sha256()


def add_to_digest(digest: Digest, messages: Encoded) -> None:
    """Let ``digest`` stand for ``messages`` too; how they are cut into batches makes no difference."""
    digest.update(messages.content)


@dataclass(frozen=True, slots=True)
class Source:
    """What PARQUET_URL names: ``url`` in full, its files in the order of their names, and why others cannot be read."""

    url: str
    files: tuple[SourceFile, ...]
    unreadable: tuple[ConfigurationError, ...] = ()

    @property
    def found(self) -> int:
        """How many files there are."""
        return len(self.files) + len(self.unreadable)

    @property
    def rows(self) -> int:
        """Rows of all files together; of files with the same contents one counts."""
        return sum({file.fingerprint: file.rows for file in self.files}.values())


def open_source(settings: Settings, shutdown: Shutdown | None = None) -> Source:
    """Find and check the files that PARQUET_URL names.

    It is a file; or a directory: all ``*.parquet`` in it and below, but for names that start with ``.`` or
    ``_``, as Spark and Arrow have it; or a glob: ``*``, ``?``, ``[...]`` in a name, ``**`` over directories.

    A file that cannot be read keeps the others from nothing. Raises ConfigurationError, one line, where none can be
    read; Stopped when ``shutdown`` was requested meanwhile.
    """
    columns = Columns.of(settings)
    place = Place.of(settings.parquet_url)
    files, unreadable = [], []
    for path in place.find():
        try:
            files.append(check_file(place, path, columns, shutdown))
        except ConfigurationError as error:
            unreadable.append(error)
    if not files:
        raise unreadable[0]
    return Source(place.url, tuple(files), tuple(unreadable))


# --- finding -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """A URL taken apart: ``path`` is its path within ``filesystem``, with the glob if there is one.

    ``scheme`` is empty for local files, ``s3://`` and so on for others.
    """

    given: str
    scheme: str
    path: str
    filesystem: pa.fs.FileSystem

    @classmethod
    def of(cls, given: str) -> Place:
        """Raises ConfigurationError where it is no URL."""
        try:
            scheme, separator, rest = given.partition("://")
            masked = _masked(given)
            if scheme in STORES and masked != given and not rest.startswith("anonymous@"):
                raise ConfigurationError(
                    f"PARQUET_URL={masked}: no keys in the URL, please: they are read from AWS_ACCESS_KEY_ID and "
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
            raise ConfigurationError(f"PARQUET_URL={given}: {_one_line(error)}") from error
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
            missing = (
                "no file matches this glob" if GLOB.search(self.path) else "this directory holds no *.parquet file"
            )
            raise ConfigurationError(f"PARQUET_URL={self.given}: {missing} ({self.url})")
        return sorted(states)

    def list_states(self, *, must_exist: bool = False) -> dict[str, FileState]:
        """The files by path, as they are now; ``must_exist``: what is no glob has to name something.

        Raises ConfigurationError when they cannot be listed.
        """
        try:
            return self._list_states(must_exist=must_exist)
        except (OSError, pa.ArrowException) as error:
            raise ConfigurationError(f"PARQUET_URL={self.given}: {_one_line(error)}") from error

    def _list_states(self, *, must_exist: bool) -> dict[str, FileState]:
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


# --- checking ----------------------------------------------------------------------------------------------


def check_file(place: Place, path: str, columns: Columns, shutdown: Shutdown | None = None) -> SourceFile:
    """The file at ``path``, when it can be read and has the columns.

    Raises ConfigurationError, one line, where not; Stopped when ``shutdown`` was requested meanwhile.
    """
    url = place.scheme + path
    try:
        state = FileState.of(place.filesystem.get_file_info(path))
        schema, rows = READER.footer(place.filesystem, path)
        columns.check(schema, url)
        contents = _contents(place, path, state, shutdown)
    except (OSError, pa.ArrowException) as error:
        raise ConfigurationError(f"PARQUET_URL={place.given}: {_damage(place, path, error)}") from error
    identity = "\0".join((contents, *columns.identity, *columns.identity_of_times(schema)))
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    return SourceFile(url, path, place.filesystem, columns, rows, fingerprint, state)


def _contents(place: Place, path: str, state: FileState, shutdown: Shutdown | None) -> str:
    """Something that changes when the contents of a file do, and not otherwise.

    Of a local file it is the hash of all its bytes, at over a gigabyte per second: a time stamp would change with every
    copy and checkout, and might not change with an edit. An object in a store cannot be edited, only written again, so
    its URL, its size and the time of that are enough, and save the transfer; under another name it is another file.
    """
    if not isinstance(place.filesystem, pa.fs.LocalFileSystem):
        return f"{place.scheme}{path}\0{state.size} {state.mtime_ns}"
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while chunk := stream.read(BUFFER_BYTES):
            if shutdown is not None and shutdown.requested:  # a large file takes minutes
                raise Stopped("the files were not checked to the end")
            digest.update(chunk)
    return digest.hexdigest()


def _damage(place: Place, path: str, error: Exception) -> str:
    """Why a file is not one that can be read, in one line."""
    url = place.scheme + path
    if not isinstance(error, pa.ArrowInvalid):
        return f"{url} cannot be read: {_one_line(error)}"
    try:
        with place.filesystem.open_input_file(path) as stream:
            size, start = stream.size(), stream.read(len(MAGIC))
    except OSError:
        return f"{url} cannot be read: {_one_line(error)}"
    if start == MAGIC:
        return f"{url} is a Parquet file that was cut off or damaged ({size} bytes): {_one_line(error)}"
    return f"{url} is not a Parquet file ({size} bytes, begins with {start!r})"


def _masked(text: str) -> str:
    """``text`` without the keys that a URL may hold before an ``@``."""
    return SECRET.sub("://***@", text)


def _one_line(error: Exception) -> str:
    text = _masked(" ".join(str(error).split()))
    return text if len(text) <= LONGEST_DETAIL else f"{text[:LONGEST_DETAIL]} ..."
