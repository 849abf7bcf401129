"""A TCP proxy that misbehaves on demand: it cuts, holds back, or swallows what passes through it.

A connection that was once in the hole stays there, as one does that a firewall has forgotten: both ends believe in it,
and not even a goodbye gets through. Connections made after `heal` are forwarded again.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from psycopg.conninfo import make_conninfo

Direction = Literal["to client", "to server"]

BOTH: tuple[Direction, Direction] = ("to client", "to server")


@dataclass(eq=False)
class _Link:
    """One connection through the proxy."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter | None = None
    swallowed: set[Direction] = field(default_factory=set)
    allowance: int | None = None
    """Bytes that may still pass to the client, after which the connection is cut."""

    def cut(self, *, reset: bool) -> None:
        for writer in (self.client, self.server):
            if writer is None or writer.is_closing():
                continue
            if reset:
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.transport.abort()
            else:
                writer.close()


class Proxy:
    """Forwards 127.0.0.1:`port` to 127.0.0.1:`target`. Its methods may be called from any thread."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._holes: set[Direction] = set()
        self._refusing = False
        self._fatal: bytes | None = None
        self._delay_s = 0.0
        self._started = threading.Event()
        self._ended = asyncio.Event()
        self.port = 0
        self.accepted = 0
        """Connections that were asked for so far."""
        self.cuts = 0
        """Connections that were cut because they had used up their allowance."""

    def dsn(self, dsn: str) -> str:
        """`dsn` by way of this proxy."""
        return make_conninfo(dsn, host="127.0.0.1", port=self.port)

    def cut(self, *, reset: bool = True) -> None:
        """End every connection there is: with a reset, or with an orderly close that nobody asked for."""
        self._do(lambda: [link.cut(reset=reset) for link in self._links])

    def cut_after(self, size: int) -> None:
        """Let `size` more bytes of each connection that there is pass to the client, then reset it."""
        self._do(lambda: [setattr(link, "allowance", size) for link in self._links])

    def swallow(self, *directions: Direction) -> None:
        """From now on nothing passes in these directions, in connections that there are or that come."""

        def swallow() -> None:
            self._holes.update(directions)
            for link in self._links:
                link.swallowed.update(directions)

        self._do(swallow)

    def swallow_from(self, words: bytes) -> None:
        """A connection in which a piece with these words goes to the server passes nothing on from then on."""
        self._do(lambda: setattr(self, "_fatal", words))

    def heal(self) -> None:
        """Forward connections that are made from now on."""

        def heal() -> None:
            self._holes.clear()
            self._refusing, self._delay_s, self._fatal = False, 0.0, None

        self._do(heal)

    def refuse(self) -> None:
        """Reset every connection there is, and each new one as soon as it is made."""

        def refuse() -> None:
            self._refusing = True
            for link in self._links:
                link.cut(reset=True)

        self._do(refuse)

    def delay(self, seconds: float) -> None:
        """Hold every piece back for so long."""
        self._do(lambda: setattr(self, "_delay_s", seconds))

    def _do(self, work: Callable[[], object]) -> None:
        async def doing() -> None:
            work()

        asyncio.run_coroutine_threadsafe(doing(), self._loop).result(timeout=30)

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._ended.wait()
        server.close()
        for link in self._links:
            link.cut(reset=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        link = _Link(writer, swallowed=set(self._holes))
        if self._refusing:
            link.cut(reset=True)
            return
        self._links.add(link)
        try:
            server_reader, link.server = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:  # the server is down, and so is the way to it
            link.cut(reset=True)
            self._links.discard(link)
            return
        pumps = [
            asyncio.create_task(self._pump(link, "to server", reader, link.server)),
            asyncio.create_task(self._pump(link, "to client", server_reader, writer)),
        ]
        self._tasks.update(pumps)

    async def _pump(
        self, link: _Link, direction: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if self._delay_s:
                    await asyncio.sleep(self._delay_s)
                if direction == "to server" and self._fatal is not None and self._fatal in data:
                    link.swallowed.update(BOTH)
                if direction in link.swallowed:
                    continue
                if direction == "to client" and link.allowance is not None:
                    data, link.allowance = data[: link.allowance], link.allowance - len(data)
                    if link.allowance <= 0:
                        writer.write(data)
                        await writer.drain()
                        self.cuts += 1
                        link.cut(reset=True)
                        return
                writer.write(data)
                await writer.drain()
        if direction not in link.swallowed and not writer.is_closing():
            writer.close()


@contextmanager
def proxied(target: int) -> Iterator[Proxy]:
    """A proxy in front of the server on port `target`, in a thread of its own."""
    proxy = Proxy(target)
    thread = threading.Thread(target=proxy._loop.run_until_complete, args=(proxy._serve(),))
    thread.start()
    try:
        proxy._started.wait()
        yield proxy
    finally:
        proxy._loop.call_soon_threadsafe(proxy._ended.set)
        thread.join()
        proxy._loop.close()
