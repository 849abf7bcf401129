"""The HTTP server, uvicorn, within the event loop of the service: no signals, no log of its own, nobody waited for.

What uvicorn leaves open is closed here: connections are counted, and the head of a request has to come in time.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

CONNECTIONS = 512
HEAD_BYTES = 8192
HEAD_SECONDS = 5.0
IDLE_SECONDS = 5
TAKING_SECONDS = 60.0
"""How long an answer may lie unread in the buffers of an idle connection."""

END_SECONDS = 1


async def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen at every address of `host`. Raises OSError or UnicodeError."""
    bound = await asyncio.get_running_loop().create_server(asyncio.Protocol, host, port, start_serving=False)
    sockets = [each.dup() for each in bound.sockets]
    bound.close()
    try:
        for each in sockets:
            each.listen(128)
    except OSError:
        for each in sockets:
            each.close()
        raise
    return sockets


@asynccontextmanager
async def serving(app: Any, sockets: list[socket.socket]) -> AsyncIterator[None]:
    """Answer on `sockets` as long as the context lasts, then close them."""
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        log_level=logging.ERROR,  # what a stranger sends is no warning of ours
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=END_SECONDS,
        h11_max_incomplete_event_size=HEAD_BYTES,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets))
    try:
        yield
    finally:
        server.cut()
        await task


class _Server(uvicorn.Server):
    servers: list[asyncio.Server]

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()

    def cut(self) -> None:
        """Leave, with whoever is connected cut off: none of it is worth waiting for."""
        self.should_exit = True
        for server in getattr(self, "servers", ()):
            server.close()
        for connection in list(self.server_state.connections):
            connection.transport.abort()


class _Protocol(H11Protocol):
    """One connection. A deadline runs while the head of a request, or what nobody reads any more, is on its way."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            transport.abort()
        else:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._idle:
            self._disarm()
        elif self._deadline is None and (self.conn.their_state is not h11.IDLE or self.conn.trailing_data[0]):
            self._deadline = self.loop.call_later(HEAD_SECONDS, self._late)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.loop.call_later(TAKING_SECONDS, self.transport.abort)

    @property
    def _idle(self) -> bool:
        """Whether no answer is owed."""
        return self.cycle is None or self.cycle.response_complete

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        if not self._idle or self.transport.is_closing():
            return
        if self.conn.states == {h11.CLIENT: h11.IDLE, h11.SERVER: h11.IDLE}:
            body = b'{"error":"the request took too long"}\n'
            headers = [
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(body))),
                ("Connection", "close"),
            ]
            for event in (
                h11.Response(status_code=408, headers=headers, reason=b"Request Timeout"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
            self.transport.close()
        else:
            self.transport.abort()
