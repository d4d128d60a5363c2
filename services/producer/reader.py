"""Parquet files are read in a process of their own, so that a file can harm nothing but itself.

A file of a few kilobytes may ask for terabytes (a long text that each row refers to), and a damaged one may crash the
library that reads it. The memory of the process is limited; if it ends, the file cannot be read, and the next one gets
a new process.

The two talk through a pipe: a request names a file and what is wanted of it, the last answer is None or an error. A
batch is a buffer in Arrow's own format.
"""

from __future__ import annotations

import atexit
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

BATCH_ROWS = 20_000
BUFFER_BYTES = 1024 * 1024  # of each column that is read; with none, whole column chunks are held in memory
MEMORY_BYTES = 256 * 1024 * 1024  # what the process may take in all; it begins with 35 MB
MAX_BATCH_BYTES = 32 * 1024 * 1024  # 1.6 kB a row, and the longest sensor id that is valid has 1 kB
ANSWER_TIMEOUT_S = 300.0
# Arrow's other memory pools reserve a gigabyte at once, which would count.
PROGRAM = """
import os
os.putenv("ARROW_DEFAULT_MEMORY_POOL", "system")
from services.producer import reader
reader.serve()
"""
COMMAND = [sys.executable, "-c", PROGRAM]


class FileState(NamedTuple):
    """What a listing tells about a file: its size in bytes, and when it was last changed, by its own clock."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, info: pa.fs.FileInfo) -> FileState:
        """The state that a listing has."""
        return cls(info.size or 0, info.mtime_ns or 0)


class Request(NamedTuple):
    """Which rows and columns of a file are wanted; no columns: only its footer."""

    filesystem: pa.fs.FileSystem
    path: str
    columns: list[str] | None = None
    start: int = 0
    end: int | None = None


class Reader:
    """Asks the process that reads; starts it when there is none.

    What is wrong with a file is raised as OSError or pyarrow.ArrowException.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._line: Connection

    def footer(self, filesystem: pa.fs.FileSystem, path: str) -> tuple[pa.Schema, int]:
        """The schema of a file, and how many rows it has."""
        ((schema, rows),) = self._ask(Request(filesystem, path))
        return pa.ipc.read_schema(pa.py_buffer(schema)), rows

    def batches(self, request: Request) -> Iterator[FileState | pa.RecordBatch]:
        """The state of the file when it was opened, its rows in batches, and its state after the last one."""
        for answer in self._ask(request):
            yield pa.ipc.open_stream(answer).read_next_batch() if isinstance(answer, pa.Buffer) else answer

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._line.close()
            self._process.kill()
            self._process.wait()
        self._process = None

    def _ask(self, request: Request) -> Iterator[Any]:
        line, answered = self._connect(), False
        try:
            line.send(request)
            while True:
                if not line.poll(ANSWER_TIMEOUT_S):
                    raise TimeoutError(f"no answer within {ANSWER_TIMEOUT_S:g} s")
                answer = line.recv()
                if answer is None or isinstance(answer, Exception):
                    break
                yield answer
            answered = True
        except (EOFError, ConnectionError) as error:
            assert self._process is not None
            code = self._process.wait()
            how = signal.strsignal(-code) if code < 0 else f"exit code {code}"
            raise pa.ArrowException(f"reading it ended the reader process ({how})") from error
        finally:
            if not answered:  # it would keep sending answers
                self.close()
        if answer is not None:
            raise answer

    def _connect(self) -> Connection:
        if self._process is not None and self._process.poll() is not None:  # it was killed, or crashed
            self.close()
        if self._process is None:
            self._line, theirs = Pipe()
            with theirs:
                self._process = subprocess.Popen(  # noqa: S603 - no text of anybody's
                    COMMAND,
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,  # what a library prints is not an answer
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C is for us
                )
        return self._line


READER = Reader()
atexit.register(READER.close)


# --- the process that reads --------------------------------------------------------------------------------


def serve() -> None:
    """Answer requests until the other end of the line is closed."""
    line = Connection(sys.stdin.fileno())
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    filesystem = None
    while True:
        try:
            request: Request = line.recv()
        except EOFError:
            return
        if request.filesystem != filesystem:  # keep connections to an object store
            filesystem = request.filesystem
        last: Exception | None = None
        try:
            for answer in _answer(request._replace(filesystem=filesystem)):
                line.send(answer)
        except (OSError, pa.ArrowException) as error:
            last = error
        except Exception as error:  # noqa: BLE001 - whatever it is, it is about this file
            last = pa.ArrowException(f"{type(error).__name__}: {error}")
        line.send(last)


def _answer(request: Request) -> Iterator[Any]:
    filesystem, path, columns, start, end = request
    with (
        _open(filesystem, path) as stream,
        pq.ParquetFile(stream, pre_buffer=False, buffer_size=BUFFER_BYTES) as parquet,
    ):
        if columns is None:
            yield (parquet.schema_arrow.remove_metadata().serialize().to_pybytes(), parquet.metadata.num_rows)
            return
        yield _state(filesystem, path, stream)
        groups, skip = _groups_from(parquet.metadata, start)
        left = parquet.metadata.num_rows if end is None else end - start
        for batch in parquet.iter_batches(BATCH_ROWS, row_groups=groups, columns=columns, use_threads=False):
            wanted = batch.slice(skip, left)
            skip = max(0, skip - batch.num_rows)
            left -= wanted.num_rows
            if wanted.num_rows:
                yield _packed(wanted)
            if not left:
                break
        yield _state(filesystem, path, stream)


def _open(filesystem: pa.fs.FileSystem, path: str) -> pa.NativeFile:
    return pa.OSFile(path) if isinstance(filesystem, pa.fs.LocalFileSystem) else filesystem.open_input_file(path)


def _state(filesystem: pa.fs.FileSystem, path: str, stream: pa.NativeFile) -> FileState:
    """Of a local file that of what is open, even if another file has its name by now."""
    if not isinstance(stream, pa.OSFile):
        return FileState.of(filesystem.get_file_info(path))
    found = os.fstat(stream.fileno())
    return FileState(found.st_size, found.st_mtime_ns)


def _packed(batch: pa.RecordBatch) -> pa.Buffer:
    if batch.nbytes > MAX_BATCH_BYTES:
        raise pa.ArrowInvalid(f"{batch.num_rows} rows need {batch.nbytes} bytes")
    packed = pa.BufferOutputStream()
    with pa.ipc.new_stream(packed, batch.schema) as stream:
        stream.write_batch(batch)
    return packed.getvalue()


def _groups_from(metadata: pq.FileMetaData, start: int) -> tuple[list[int], int]:
    """The row groups from the one with row ``start`` on, and how many rows of that one come before it."""
    first, before = 0, 0
    while first < metadata.num_row_groups and before + metadata.row_group(first).num_rows <= start:
        before += metadata.row_group(first).num_rows
        first += 1
    return list(range(first, metadata.num_row_groups)), start - before
