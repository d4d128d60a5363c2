"""Files that arrive below PARQUET_URL, each as soon as it is whole: two polls see the same size and time, and it opens.

A Parquet file ends with its footer, so one that is still being written cannot be opened; and one that is being
copied over another may hold an old footer for a moment.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from services.core.config import Settings
from services.core.errors import ConfigurationError, PipelineError, StoppedError
from services.core.logs import fields
from services.core.shutdown import Shutdown
from services.producer.columns import Columns
from services.producer.finding import SourceLocation
from services.producer.metrics import FILES_UNREADABLE, WATCHING
from services.producer.reader import FileState
from services.producer.source import Source, SourceFile, check_file

log = logging.getLogger("producer")


class Watch:
    """Polls for files until shutdown.

    Raises ConfigurationError at the start for a URL that names nothing, but not for an empty directory, or a glob that
    no file matches.
    """

    exit_code = 0

    def __init__(self, settings: Settings, shutdown: Shutdown) -> None:
        self._columns = Columns.of(settings)
        self._location = SourceLocation.of(settings.parquet_url)
        self._shutdown = shutdown
        self._period_s = settings.producer_watch_seconds
        # By path: all files at the last poll; those found whole, as they were then; those sent; those unreadable.
        self._before: dict[str, FileState] = {}
        self._known: dict[str, SourceFile] = {}
        self._sent: dict[str, FileState] = {}
        self._reported: dict[str, tuple[FileState | None, str]] = {}
        self.url = self._location.url
        self._location.list_states(must_exist=True)
        WATCHING.set(1)

    def sources(self) -> Iterator[Source]:
        """Nothing, with which the publisher ends what an earlier run left open; then what each poll finds."""
        log.info("watching", extra=fields(url=self.url, seconds=self._period_s))
        yield Source(self.url, ())
        while not self._shutdown.requested:
            try:
                source = self.poll()
            except StoppedError:
                return
            if source.files:
                yield source
            self._shutdown.wait(self._period_s)

    def poll(self) -> Source:
        """The files that are whole and not yet sent, in the order of their names. Raises StoppedError."""
        try:
            now = self._location.list_states()
        except ConfigurationError as error:
            self._report(self.url, None, error)
            return Source(self.url, ())
        self._reported.pop(self.url, None)
        for memory in (self._known, self._sent, self._reported):
            for path in memory.keys() - now.keys():
                del memory[path]
        quiet = [path for path, state in now.items() if self._before.get(path) == state != self._sent.get(path)]
        self._before = now
        files = [file for path in sorted(quiet) if (file := self._open(path, now[path])) is not None]
        return Source(self.url, tuple(files))

    def note_unreadable(self, file: SourceFile, error: PipelineError) -> None:
        """``file`` turned out to be damaged, or has changed or gone; the next poll tells which."""
        self._report(file.path, file.state, error)

    def settle(self, sent: list[SourceFile], _nothing_sent: str = "") -> None:
        """These are not found again until they change."""
        self._sent |= {file.path: file.state for file in sent}

    def _open(self, path: str, state: FileState) -> SourceFile | None:
        """The file, checked; None where it cannot be read, or changed meanwhile."""
        known = self._known.get(path)
        if known is not None and known.state == state:  # its contents need not be hashed again
            return known
        try:
            file = check_file(self._location, path, self._columns, self._shutdown)
        except ConfigurationError as error:
            self._report(path, state, error)
            return None
        self._known[path] = file
        return file if file.state == state else None

    def _report(self, path: str, state: FileState | None, error: PipelineError) -> None:
        """Log it once, and again when the file or the reason changes."""
        if self._reported.get(path) != (state, str(error)):
            self._reported[path] = state, str(error)
            FILES_UNREADABLE.inc()
            log.warning("unreadable", extra=fields(error=str(error)))
