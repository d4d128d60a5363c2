"""Compression of the raw readings, chunk by chunk, when etl says so and not TimescaleDB's scheduler."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial

import psycopg
from psycopg import Connection

from services.core.config import Settings
from services.core.database import queries
from services.core.logs import fields
from services.etl.background import in_background
from services.etl.duties import Duty
from services.etl.metrics import CHUNKS_COMPRESSED

SQL = queries("services.etl")
RUN_INTERVAL_S = 600.0
RECONNECT_AFTER_S = 10.0

log = logging.getLogger("etl")


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

    return in_background(settings, "compression", run, RECONNECT_AFTER_S)


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
