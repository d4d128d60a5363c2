"""Who leads: one row that only etl's role can write, so that nobody else can take the lead away or keep it.

The row names the leader's session, and is renewed beside its work. A standby takes it when that session has ended, or
when nobody has renewed it for a while: the machine is gone, or the process is frozen. A leader that wakes up later
changes nothing, because every transaction of etl that changes state asks first whether the row is still its own, under
a lock that a takeover needs too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from psycopg import Connection
from psycopg.errors import LockNotAvailable

from services.core.config import Settings
from services.core.database import queries
from services.core.errors import LeaseLostError
from services.etl.beside import Beside

SQL = queries("services.etl")
LASTS_S = 10.0
RENEW_INTERVAL_S = 2.0
# Somebody who looks at the moment at which a server that stood still goes on lets the leader renew it first.
SEEN_EXPIRED_FOR_S = 3.0
KEY = 0x5E_50_11  # any number of ours: a session shows with an advisory lock of this and its pid that it is there


class Lease:
    """The lease as one session sees it, which may hold it or wait for it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        connection.execute(SQL["show_session"], {"key": KEY})
        self.expires_at = ""  # as of the last look
        self._seen_otherwise = 0.0  # when it was last seen not to be expired, or to be another than now

    def try_take(self) -> bool:
        """Take the lease if nobody holds it, or if it is ours."""
        row = self._connection.execute(SQL["look_at_lease"], {"key": KEY}).fetchone()
        assert row is not None
        holder, expires_at, is_expired, is_free = row
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
            row = self._connection.execute(SQL["is_leading"]).fetchone()
            if row is None or not row[0]:
                raise LeaseLostError("another etl instance has taken the lead")
            yield


def renewal(settings: Settings, connection: Connection) -> Beside:
    """Renews the lease of this connection's session while the block runs."""
    arguments = {"holder": connection.info.backend_pid, "lasts": LASTS_S}

    def renew(own: Connection, end: threading.Event) -> None:
        while not end.wait(RENEW_INTERVAL_S):
            own.execute(SQL["renew_lease"], arguments)

    return Beside(settings, "lease_renewal", renew, RENEW_INTERVAL_S)
