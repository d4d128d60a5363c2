"""Retention and compression of the raw readings, chunk by chunk, when etl says so and not TimescaleDB's scheduler.

A policy could drop a chunk before its last readings are in the summaries. Before etl drops one it does this:

1. close its time: the consumer stores no more readings of it (they become dead letters, too_late),
2. drain the queue: every reading that was stored is in the summaries,
3. freeze its intervals: neither refresh nor mirror touches them again,
4. drop it.

A chunk is part of whole intervals, at every width. It has expired when the last of these ended long enough ago, so that
nothing is ever closed that is younger than what is kept.

A crash in between leaves closed or frozen time whose chunk still exists; the next run goes on. Closing and dropping
need locks that others may hold for long (a dump, an open transaction): they wait two seconds for them, then etl goes
on with its work and tries again later.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial

import psycopg
from psycopg import Connection

from services.core.config import Settings
from services.core.database import queries
from services.core.logs import fields
from services.etl.beside import Beside
from services.etl.duties import Duty
from services.etl.lease import Lease
from services.etl.metrics import CHUNKS_COMPRESSED, CHUNKS_DROPPED
from services.etl.rollup import BASE

SQL = queries("services.etl")
RUN_INTERVAL_S = 600.0
RECONNECT_AFTER_S = 10.0

log = logging.getLogger("etl")


class Retention:
    """Drops what has expired."""

    def __init__(self, connection: Connection, lease: Lease, keep: timedelta) -> None:
        self._connection = connection
        self._lease = lease
        self._keep = keep

    def steps(self) -> Iterator[None]:
        """Piece by piece; in between the queue is worked off."""
        if not self._keep:
            return
        expired = self._connection.execute(SQL["expired_edges"], {"keep": self._keep}).fetchall()
        if not expired:
            return
        edges = {name: edge for name, edge, is_open in expired if is_open}
        close(self._connection, self._lease, edges, self._keep)
        while (waits := self._is_closing()) is not None:
            if waits:
                yield
                continue
            with self._lease.transaction():
                self._connection.execute(SQL["freeze_closed"])
        yield from self._drop()

    def _is_closing(self) -> bool | None:
        """Whether something that is closed waits for its summaries; None when all that is closed is frozen."""
        row = self._connection.execute(SQL["is_closing"]).fetchone()
        assert row is not None
        return bool(row[1]) if row[0] else None

    def _drop(self) -> Iterator[None]:
        chunks = self._connection.execute(SQL["expired_chunks"], {"keep": self._keep}).fetchall()
        for start, end in chunks:
            with self._lease.transaction():
                self._connection.execute(SQL["drop_chunk"], {"start": start, "end": end})
            CHUNKS_DROPPED.inc()
            log.info("chunk_dropped", extra=fields(start=start, end=end))
            yield
        if chunks:
            with self._lease.transaction():
                self._connection.execute(SQL["drop_frozen_minutes"], {"base": BASE})


def close(connection: Connection, lease: Lease, edges: Mapping[str, str], keep: timedelta) -> None:
    """Close the history of each measurement up to its edge: no transaction that ends later stores what is older."""
    if not edges:
        return
    with lease.transaction():
        connection.execute(SQL["hold_readings"])
        for name, edge in edges.items():
            connection.execute(SQL["close_history"], {"measurement": name, "edge": edge, "keep": keep})


def compression(settings: Settings) -> AbstractContextManager[None]:
    """Compresses what is older than COMPRESS_AFTER_DAYS, beside the refresh: a large chunk takes minutes."""
    if not settings.compress_after_days:
        return nullcontext()
    age = timedelta(days=settings.compress_after_days)

    def run(connection: Connection, end: threading.Event) -> None:
        duty = Duty("compression", partial(compress, connection, age), RUN_INTERVAL_S)
        while not end.is_set():
            if duty.is_due:
                duty.step(connection)
            else:
                end.wait(1.0)

    return Beside(settings, "compression", run, RECONNECT_AFTER_S)


def compress(connection: Connection, age: timedelta) -> Iterator[None]:
    """Compress what is older, chunk by chunk; one that cannot be compressed now does not keep the others from it.

    Raises the first error at the end.
    """
    first: psycopg.Error | None = None
    for (chunk,) in connection.execute(SQL["uncompressed_chunks"], {"age": age}).fetchall():
        try:
            connection.execute(SQL["compress_chunk"], {"chunk": chunk})
        except psycopg.Error as error:
            first = first or error
        else:
            CHUNKS_COMPRESSED.inc()
            log.info("chunk_compressed", extra=fields(chunk=chunk))
        yield
    if first is not None:
        raise first
