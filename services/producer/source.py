"""Parquet files: found, checked, then streamed as messages.

A source is what PARQUET_URL names. All its files are opened and checked before anything is sent (watch.py: each
when it arrives); then each is read batch by batch (reader.py), so that memory follows neither the size of a file nor
that of its row groups.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.fs

from services.core.config import Settings
from services.core.errors import ConfigurationError, PermanentError
from services.core.shutdown import Shutdown
from services.producer.blocks import Rows, RowsDigest, choose_rows
from services.producer.columns import Columns
from services.producer.encoding import Encoded, Messages, encode_batch
from services.producer.finding import SourceLocation, one_line
from services.producer.progress import Stopped
from services.producer.reader import BUFFER_BYTES, READER, FileState, Request

MAGIC = b"PAR1"


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
                f"{self.url} cannot be read beyond row {row} of {self.rows}: {one_line(error)}"
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
    place = SourceLocation.of(settings.parquet_url)
    files, unreadable = [], []
    for path in place.find():
        try:
            files.append(check_file(place, path, columns, shutdown))
        except ConfigurationError as error:
            unreadable.append(error)
    if not files:
        raise unreadable[0]
    return Source(place.url, tuple(files), tuple(unreadable))


def check_file(place: SourceLocation, path: str, columns: Columns, shutdown: Shutdown | None = None) -> SourceFile:
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


def _contents(place: SourceLocation, path: str, state: FileState, shutdown: Shutdown | None) -> str:
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


def _damage(place: SourceLocation, path: str, error: Exception) -> str:
    """Why a file is not one that can be read, in one line."""
    url = place.scheme + path
    if not isinstance(error, pa.ArrowInvalid):
        return f"{url} cannot be read: {one_line(error)}"
    try:
        with place.filesystem.open_input_file(path) as stream:
            size, start = stream.size(), stream.read(len(MAGIC))
    except OSError:
        return f"{url} cannot be read: {one_line(error)}"
    if start == MAGIC:
        return f"{url} is a Parquet file that was cut off or damaged ({size} bytes): {one_line(error)}"
    return f"{url} is not a Parquet file ({size} bytes, begins with {start!r})"
