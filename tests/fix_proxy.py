"""A TCP proxy between the services and PostgreSQL that breaks connections at a chosen moment.

proxy.refuse(); proxy.listen()                 the server is down, and up again
proxy.cut()                                    every connection ends now
cut = proxy.cut_at(b"COMMIT\\0")                the server never gets it
cut = proxy.cut_at(b"COMMIT\\0", Moment.ANSWERED)   it got and did it, the client never hears of it
proxy.stall(); proxy.flow()                    connections stay, nothing passes
proxy.slow_down(bytes_a_second)
proxy.answer_with("53300", "sorry, too many clients already")
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

import pytest

from services.core.config import Settings

CHUNK = 65_536
WAIT_S = 0.05
# What a PostgreSQL client may ask before it says who it is: encryption by TLS or by GSSAPI.
ENCRYPTION_REQUESTS = (80877103, 80877104)


class Moment(Enum):
    """When a connection is cut, relative to bytes that the client sends."""

    BEFORE = "the server never gets them"
    SENT = "the server gets them; its answer is not waited for"
    ANSWERED = "the server has answered; the client does not get the answer"


@dataclass(slots=True)
class Cut:
    """One cut that is to come: ``done`` is set when it has come."""

    pattern: bytes
    moment: Moment
    after_bytes: int
    done: threading.Event = field(default_factory=threading.Event)


@dataclass(slots=True)
class Link:
    """One connection through the proxy."""

    client: socket.socket
    server: socket.socket
    tail: bytes = b""  # what the client sent last, as a pattern may come in pieces
    armed: Cut | None = None  # its pattern was seen, its bytes are being counted
    left: int = 0
    swallow: Cut | None = None  # cut as soon as the server answers

    def close(self) -> None:
        """End both sides; what is under way is lost."""
        for side in (self.client, self.server):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)
            side.close()


class Proxy:
    """Passes bytes between clients of ``port`` and a server, until it is told to do worse."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._lock = threading.Lock()
        self._links: list[Link] = []
        self._cuts: list[Cut] = []
        self._flowing = threading.Event()
        self._flowing.set()
        self._closed = threading.Event()
        self._bytes_a_second = 0
        self._answer: bytes | None = None
        self._listener = self._open_listener(0)
        self.port = int(self._listener.getsockname()[1])
        self.accepted = 0

    # What can be asked for ---------------------------------------------------------------------------------

    def refuse(self) -> None:
        """Refuse new connections and end those that are there, as a server that is down does."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        self.cut()

    def listen(self) -> None:
        """Take connections again after ``refuse``."""
        self._listener = self._open_listener(self.port)

    def cut(self) -> None:
        """End every connection now."""
        with self._lock:
            links, self._links = self._links, []
        for link in links:
            link.close()

    def cut_at(self, pattern: bytes, moment: Moment = Moment.BEFORE, *, after_bytes: int = 0) -> Cut:
        """End the next connection whose client sends ``pattern`` and then ``after_bytes`` more; once."""
        cut = Cut(pattern, moment, after_bytes)
        with self._lock:
            self._cuts.append(cut)
        return cut

    def stall(self) -> None:
        """Accept connections and keep them, but pass nothing on."""
        self._flowing.clear()

    def flow(self) -> None:
        """Pass on what was held back by ``stall``, and everything that follows."""
        self._flowing.set()

    def slow_down(self, bytes_a_second: int) -> None:
        """Pass no more than this in each direction of a connection; 0: as fast as it goes."""
        self._bytes_a_second = bytes_a_second

    def answer_with(self, sqlstate: str | None, text: str = "") -> None:
        """Answer every new connection with a FATAL error of PostgreSQL, until called with None."""
        if sqlstate is None:
            self._answer = None
            return
        body = b"".join(
            kind + value.encode() + b"\0" for kind, value in ((b"S", "FATAL"), (b"C", sqlstate), (b"M", text))
        )
        self._answer = b"E" + struct.pack("!I", len(body) + 5) + body + b"\0"

    def close(self) -> None:
        """Stop everything."""
        self._closed.set()
        self._flowing.set()
        self.refuse()

    # How it works ------------------------------------------------------------------------------------------

    def _open_listener(self, port: int) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return listener

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            self.accepted += 1
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        if self._answer is not None:
            self._refuse_politely(client, self._answer)
            return
        try:
            server = socket.create_connection(self._target)
        except OSError:
            client.close()
            return
        for side in (client, server):
            side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = Link(client, server)
        with self._lock:
            self._links.append(link)
        threading.Thread(target=self._pump, args=(link, server, client), daemon=True).start()
        self._pump(link, client, server)

    def _refuse_politely(self, client: socket.socket, answer: bytes) -> None:
        with contextlib.suppress(OSError, struct.error), client:
            while True:
                head = client.recv(8, socket.MSG_WAITALL)
                length, code = struct.unpack("!II", head)
                if code not in ENCRYPTION_REQUESTS:
                    break
                client.sendall(b"N")
            client.recv(length - 8, socket.MSG_WAITALL)
            client.sendall(answer)

    def _pump(self, link: Link, source: socket.socket, drain: socket.socket) -> None:
        try:
            while chunk := source.recv(CHUNK):
                self._flowing.wait()
                if self._bytes_a_second:
                    self._closed.wait(len(chunk) / self._bytes_a_second)
                if not self._pass(link, chunk, drain):
                    break
        except OSError:
            pass
        with self._lock:
            if link in self._links:
                self._links.remove(link)
        link.close()

    def _pass(self, link: Link, chunk: bytes, drain: socket.socket) -> bool:
        """Send a chunk on its way; False if the connection is to end."""
        if drain is link.client:
            if link.swallow is not None:
                link.swallow.done.set()
                return False
            drain.sendall(chunk)
            return True
        cut = self._due(link, chunk)
        if cut is None:
            drain.sendall(chunk)
            return True
        if cut.moment is Moment.ANSWERED:
            link.swallow = cut
            drain.sendall(chunk)
            return True
        if cut.moment is Moment.SENT:
            drain.sendall(chunk)
        elif cut.after_bytes:
            drain.sendall(chunk[: len(chunk) // 2])  # in the middle of a message
        cut.done.set()
        return False

    def _due(self, link: Link, chunk: bytes) -> Cut | None:
        """The cut that this chunk brings about."""
        with self._lock:
            if link.armed is None:
                seen = link.tail + chunk
                found = next((cut for cut in self._cuts if cut.pattern in seen), None)
                link.tail = seen[-max((len(cut.pattern) for cut in self._cuts), default=0) :]
                if found is None:
                    return None
                self._cuts.remove(found)
                link.armed, link.left = found, found.after_bytes
                chunk = seen[seen.index(found.pattern) + len(found.pattern) :]
            link.left -= len(chunk)
            if link.armed.after_bytes and link.left > 0:
                return None
            cut, link.armed = link.armed, None
            return cut


@pytest.fixture
def proxy(servers: Settings) -> Iterator[Proxy]:
    """A proxy in front of PostgreSQL."""
    proxy = Proxy(servers.postgre_host, servers.postgre_port)
    yield proxy
    proxy.close()


@pytest.fixture
def proxied(settings: Settings, proxy: Proxy) -> Settings:
    """Settings of this test that reach PostgreSQL through the proxy, unencrypted so that it can read along."""
    return settings.model_copy(
        update={"postgre_host": "127.0.0.1", "postgre_port": proxy.port, "postgre_sslmode": "disable"}
    )
