"""Parquet files: found and checked before anything is sent, then streamed as readings (reader.py)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.fs

from services.core.config import Settings
from services.core.errors import ConfigurationError, StoppedError, UnreadableFileError
from services.core.shutdown import Shutdown
from services.producer.columns import Columns
from services.producer.encoding import Digest, Readings, choose
from services.producer.finding import SourceLocation, one_line
from services.producer.reader import BUFFER_BYTES, READER, FileState, Request

MAGIC = b"PAR1"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One Parquet file."""

    url: str
    path: str
    filesystem: pa.fs.FileSystem = field(repr=False)
    columns: Columns
    rows: int
    fingerprint: str  # changes with the contents and the column mapping, and with nothing else that we can know
    state: FileState  # from just before the contents were read for that

    def readings(
        self,
        start: int = 0,
        parts: Callable[[pa.RecordBatch], Iterator[pa.RecordBatch]] = lambda batch: iter((batch,)),
        end: int | None = None,
    ) -> Iterator[Readings]:
        """Those of row number ``start`` up to before ``end``, batch by batch; ``parts`` may cut these further.

        Raises UnreadableFileError.
        """
        row = start
        try:
            for answer in READER.batches(Request(self.filesystem, self.path, self.columns.names, start, end)):
                if isinstance(answer, pa.RecordBatch):
                    for part in parts(answer):
                        yield choose(part, self.columns)
                        row += part.num_rows
                elif answer != self.state:
                    raise UnreadableFileError(
                        f"{self.url} changed after it was checked; the next poll or run sends its new contents"
                    )
        except (OSError, pa.ArrowException) as error:
            raise UnreadableFileError(
                f"{self.url} cannot be read beyond row {row} of {self.rows}: {one_line(error)}"
            ) from error

    def digest(self, end: int) -> Digest:
        """The digest of the readings of the first ``end`` rows. Raises UnreadableFileError."""
        digest = Digest(self.columns)
        for readings in self.readings(end=end) if end else ():
            digest.add(readings)
        return digest


@dataclass(frozen=True, slots=True)
class Source:
    """What PARQUET_URL names: ``url`` in full, its files in the order of their names, and why others cannot be read."""

    url: str
    files: tuple[SourceFile, ...]
    unreadable: tuple[ConfigurationError, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of all files together; of files with the same contents one counts."""
        return sum({file.fingerprint: file.rows for file in self.files}.values())


def open_source(settings: Settings, shutdown: Shutdown) -> Source:
    """Find and check the files that PARQUET_URL names.

    It is a file; or a directory: all ``*.parquet`` in it and below, but for names that start with ``.`` or
    ``_``, as Spark and Arrow have it; or a glob: ``*``, ``?``, ``[...]`` in a name, ``**`` over directories.

    Raises ConfigurationError where none of them can be read, StoppedError on shutdown.
    """
    columns = Columns.of(settings)
    location = SourceLocation.of(settings.parquet_url)
    files, unreadable = [], []
    for path in location.find():
        try:
            files.append(check_file(location, path, columns, shutdown))
        except ConfigurationError as error:
            unreadable.append(error)
    if not files:
        raise unreadable[0]
    return Source(location.url, tuple(files), tuple(unreadable))


def check_file(location: SourceLocation, path: str, columns: Columns, shutdown: Shutdown) -> SourceFile:
    """The file at ``path``. Raises ConfigurationError if it is damaged or lacks columns, StoppedError on shutdown."""
    url = location.scheme + path
    try:
        state = FileState.of(location.filesystem.get_file_info(path))
        schema, rows = READER.footer(location.filesystem, path)
        columns.check(schema, url)
        contents = _contents(location, path, state, shutdown)
    except (OSError, pa.ArrowException) as error:
        raise ConfigurationError(f"PARQUET_URL={location.given}: {_damage(location, path, error)}") from error
    identity = "\0".join((contents, *columns.identity(schema)))
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    return SourceFile(url, path, location.filesystem, columns, rows, fingerprint, state)


def _contents(location: SourceLocation, path: str, state: FileState, shutdown: Shutdown) -> str:
    """Something that changes when the contents of a file do, and not otherwise.

    Of a local file it is the hash of all its bytes: a time stamp would change with every copy and checkout, and might
    not change with an edit. An object in a store can only be written again, so its URL, its size and the time of that
    are enough, and save the transfer; under another name it is another file.
    """
    if not isinstance(location.filesystem, pa.fs.LocalFileSystem):
        return f"{location.scheme}{path}\0{state.size} {state.mtime_ns}"
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while chunk := stream.read(BUFFER_BYTES):
            if shutdown.requested:  # a large file takes minutes
                raise StoppedError("stopped before all files were checked; nothing was sent")
            digest.update(chunk)
    return digest.hexdigest()


def _damage(location: SourceLocation, path: str, error: Exception) -> str:
    """Why a file is not one that can be read, in one line."""
    url = location.scheme + path
    if not isinstance(error, pa.ArrowInvalid):
        return f"{url} cannot be read: {one_line(error)}"
    try:
        with location.filesystem.open_input_file(path) as stream:
            size, start = stream.size(), stream.read(len(MAGIC))
    except OSError:
        return f"{url} cannot be read: {one_line(error)}"
    if start == MAGIC:
        return f"{url} is a truncated or damaged Parquet file ({size} bytes): {one_line(error)}"
    return f"{url} is not a Parquet file ({size} bytes, begins with {start!r})"
