"""Files that arrive below PARQUET_URL, each as soon as it is whole.

A Parquet file ends with its footer, so one that is still being written cannot be opened; and one that is being
copied over another may hold an old footer for a moment. So a file counts as whole when its size and time of
change are the same in two looks and it can be opened then. Until then not a row of it is sent.
"""

from __future__ import annotations

import logging

from services.core.config import Settings
from services.core.errors import ConfigurationError, PipelineError
from services.core.logs import fields
from services.core.shutdown import Shutdown
from services.producer.columns import Columns
from services.producer.finding import SourceLocation
from services.producer.metrics import FILES_UNREADABLE
from services.producer.reader import FileState
from services.producer.source import Source, SourceFile, check_file

log = logging.getLogger("producer")


class Watch:
    """Looks for files again and again; ``url`` is PARQUET_URL in full.

    Raises ConfigurationError at the start for a URL that names nothing; a directory that is empty, or a glob
    that no file matches, is no mistake here.
    """

    def __init__(self, settings: Settings, shutdown: Shutdown) -> None:
        self._columns = Columns.of(settings)
        self._place = SourceLocation.of(settings.parquet_url)
        self._shutdown = shutdown
        self._before: dict[str, FileState] = {}  # by path, at the last look
        self._known: dict[str, SourceFile] = {}  # by path: files found whole, as they were then
        self._sent: dict[str, FileState] = {}
        self._reported: dict[str, tuple[FileState | None, str]] = {}
        self.url = self._place.url
        self._place.list_states(must_exist=True)

    def look(self) -> Source:
        """The files that are whole and not yet sent, in the order of their names. Raises Stopped."""
        try:
            now = self._place.list_states()
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

    def note_sent(self, file: SourceFile) -> None:
        """``file`` need not be looked at again until it changes."""
        self._sent[file.path] = file.state

    def note_unreadable(self, file: SourceFile, error: PipelineError) -> None:
        """``file`` turned out to be damaged, or has changed or gone; the next look tells which."""
        self._report(file.path, file.state, error)

    def _open(self, path: str, state: FileState) -> SourceFile | None:
        """The file, checked; None where it cannot be read, or changed meanwhile."""
        known = self._known.get(path)
        if known is not None and known.state == state:  # its contents need not be hashed again
            return known
        try:
            file = check_file(self._place, path, self._columns, self._shutdown)
        except ConfigurationError as error:
            self._report(path, state, error)
            return None
        self._known[path] = file
        return file if file.state == state else None

    def _report(self, path: str, state: FileState | None, error: PipelineError) -> None:
        """Say it once, and again when the file or the reason changes."""
        if self._reported.get(path) != (state, str(error)):
            self._reported[path] = state, str(error)
            FILES_UNREADABLE.inc()
            log.warning("unreadable", extra=fields(error=str(error)))
