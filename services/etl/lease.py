"""Who leads: one row that only etl's role can write, so that nobody else can take the lead away or keep it.

The row names the leader's session, and is renewed beside its work. A standby takes it when that session has ended, or
when it has not been renewed for a while: the machine is gone, or the process is frozen. A leader that wakes up later
changes nothing: every transaction of etl that changes state checks first, under a lock that a takeover needs too,
whether the row is still its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from psycopg import Connection
from psycopg.errors import LockNotAvailable

from services.core.config import Settings
from services.core.database import one, queries
from services.core.errors import LeaseLostError
from services.etl.background import in_background

SQL = queries("services.etl")
LASTS_S = 10.0
RENEW_INTERVAL_S = 2.0
# A server that stood still shows every lease as expired at first: give the leader time to renew it.
SEEN_EXPIRED_FOR_S = 3.0
KEY = 0x5E_50_11  # any number of ours: a session shows with an advisory lock of this and its pid that it is there


class Lease:
    """The lease as one session sees it, which may hold it or wait for it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.expires_at = ""  # as it was last read
        self._seen_otherwise = 0.0  # when it was last seen not to be expired, or to be another than now

    def try_take(self) -> bool:
        """Take the lease if nobody holds it, or if it is ours."""
        holder, expires_at, is_expired, is_free, _ = one(self._connection, SQL["read_lease"], {"key": KEY})
        now = time.monotonic()
        if not is_expired or expires_at != self.expires_at:
            self._seen_otherwise = now
        self.expires_at = expires_at
        if not is_free and now - self._seen_otherwise < SEEN_EXPIRED_FOR_S:
            return False
        try:
            with self._connection.transaction():
                self._connection.execute(SQL["hold_state"])
                arguments = {"holder": holder, "expires_at": expires_at, "lasts": LASTS_S}
                return self._connection.execute(SQL["take_lease"], arguments).rowcount == 1
        except LockNotAvailable:  # the holder is in the middle of a transaction
            return False

    def release(self) -> None:
        """Let the next one lead at once."""
        self._connection.execute(SQL["release_lease"])

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """A transaction that changes what etl decides on. Raises LeaseLostError if another leads by now."""
        with self._connection.transaction():
            self._connection.execute(SQL["hold_state"])
            if not one(self._connection, SQL["is_leading"])[0]:
                raise LeaseLostError("another etl instance has taken the lead")
            yield


def renewal(settings: Settings, connection: Connection) -> AbstractContextManager[None]:
    """Renews the lease of this connection's session while the block runs."""
    arguments = {"holder": connection.info.backend_pid, "lasts": LASTS_S}

    def renew(own: Connection, end: threading.Event) -> None:
        while not end.wait(RENEW_INTERVAL_S):
            own.execute(SQL["renew_lease"], arguments)

    return in_background(settings, "lease_renewal", renew, RENEW_INTERVAL_S)
