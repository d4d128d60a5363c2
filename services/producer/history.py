"""What the topic has been sent before, so that a file that is repeated undoes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from services.core.kafka import REPEATED_IF_MOVED
from services.producer.progress import Progress
from services.producer.source import SourceFile

Earlier = tuple[int, set[str]]  # rows that were sent from one file, and the digests of their messages


@dataclass(frozen=True, slots=True)
class History:
    """All records of the progress topic, as they bear on one topic of readings."""

    files: Mapping[str, Progress]
    began: float
    contents: set[str]
    versions: Mapping[str, Mapping[int, set[str]]]  # by URL and rows: digests

    @classmethod
    def of(cls, known: Mapping[str, Progress], topic_id: str) -> History:
        """``known``: the records by key, that of the topic among them."""
        versions: dict[str, dict[int, set[str]]] = {}
        for key, progress in known.items():
            if key.startswith(f"{topic_id}/"):
                versions.setdefault(progress.url, {}).setdefault(progress.rows, set()).add(progress.digest)
        return cls(known, known[topic_id].began, {key.rpartition("/")[2] for key in known}, versions)

    def max_rows(self, file: SourceFile) -> Earlier:
        """How many rows, at most those of ``file``, were sent from other contents under its name; and their digests."""
        earlier = {rows: digests for rows, digests in self.versions.get(file.url, {}).items() if rows <= file.rows}
        return max(earlier.items(), default=(0, set()))

    def doubt(self, file: SourceFile) -> str:
        """The mark of a file that the topic has not seen: may the database have stored it from another topic?

        It may if the file is older than what is known of this topic, or if its contents were sent to another one.
        """
        doubtful = file.fingerprint in self.contents or file.state.mtime_ns < self.began * 1e9
        return REPEATED_IF_MOVED.decode() if doubtful else ""
