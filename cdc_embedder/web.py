"""Whether the process lives and is of use, told over HTTP to an orchestrator, a load balancer or a person with curl.

`/healthz` answers whenever the event loop does; `/readyz` says whether the service works or waits ready to take over.
Nothing here waits for the database, needs an extra, or can stop the service: a request that is malformed, too long or
too slow costs its own connection and no other's.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

from cdc_embedder.errors import Misconfigured

log = logging.getLogger(__name__)

REQUEST_SECONDS = 5.0
REQUEST_BYTES = 8192
CONNECTIONS = 32

_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    503: "Service Unavailable",
}


@dataclass(slots=True)
class Health:
    """What the service says of itself; whoever runs it updates it. After `stopping` nothing makes it ready again."""

    role: Literal["working", "waiting", "none"] = "none"
    reason: str = "starting"
    ends: bool = False

    @property
    def ready(self) -> bool:
        return self.role != "none"

    def working(self) -> None:
        self._become("working", "")

    def waiting(self, reason: str) -> None:
        """Another instance works; this one takes over without being started."""
        self._become("waiting", reason)

    def away(self, reason: str) -> None:
        """Neither works nor could take over."""
        self._become("none", reason)

    def stopping(self) -> None:
        self.away("stopping")
        self.ends = True

    def _become(self, role: Literal["working", "waiting", "none"], reason: str) -> None:
        if not self.ends:
            self.role, self.reason = role, reason


def address(text: str) -> tuple[str, int] | None:
    """Host and port of `host:port` or `[::1]:port`; None for `off`. Raises ValueError with what is wrong."""
    if text == "off":
        return None
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError("an IPv6 address stands in brackets, as in [::1]:8700")
    if not (host and colon and port.isascii() and port.isdigit() and int(port) <= 65535):
        raise ValueError("it is host:port, as in 127.0.0.1:8700, or off")
    return host, int(port)


@asynccontextmanager
async def serving(
    where: tuple[str, int] | None, health: Health, slot: str, *, explicit: bool
) -> AsyncIterator[list[tuple[str, int]]]:
    """Answer at `where` as long as the context lasts; gives the addresses listened on, none where `where` is None.

    An address that cannot be listened on is a warning, or, where somebody asked for it (`explicit`), Misconfigured.
    """
    responder = _Responder(health, slot)
    server = None if where is None else await _listen(responder, where, explicit)
    try:
        yield [] if server is None else [listening.getsockname()[:2] for listening in server.sockets]
    finally:
        if server is not None:
            server.close()
            await responder.end()


async def _listen(responder: _Responder, where: tuple[str, int], explicit: bool) -> asyncio.Server | None:
    host, port = where
    try:
        server = await asyncio.start_server(responder.respond, host, port, limit=REQUEST_BYTES)
    except (OSError, UnicodeError) as error:
        sentence = f"health cannot be served at {_url(host, port)}: {_cause(error)}"
        if explicit:
            raise Misconfigured(sentence, hint="give CDC_EMBEDDER_HTTP another address, or off") from error
        log.warning("%s; going on without. CDC_EMBEDDER_HTTP names another address, or off", sentence)
        return None
    for listening in server.sockets:
        log.info("health is served at %s/healthz and /readyz", _url(*listening.getsockname()[:2]))
    return server


def _cause(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return getattr(error, "strerror", None) or str(error)


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Responder:
    """One request a connection, and so many connections at a time."""

    def __init__(self, health: Health, slot: str) -> None:
        self._health = health
        self._slot = slot
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def respond(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= CONNECTIONS:
            writer.transport.abort()
            return
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = writer
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                writer.write(await self._answer(reader))
                await writer.drain()
        except TimeoutError:
            writer.write(_response(408, {"error": "the request took too long"}))
        except (OSError, EOFError):
            pass  # whoever asked is gone
        finally:
            writer.close()
            del self._open[task]

    async def end(self) -> None:
        """Cut what is open: none of it is worth waiting for."""
        for writer in self._open.values():
            writer.transport.abort()
        if self._open:
            await asyncio.wait(set(self._open))

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return _response(400, {"error": f"the request is longer than {REQUEST_BYTES} bytes"})
        try:
            method, target, version = head.split(b"\r\n", 1)[0].decode("ascii").split(" ")
        except ValueError:
            return _response(400, {"error": "this is not an HTTP request"})
        if not (method and target and version.startswith("HTTP/1.")):
            return _response(400, {"error": "HTTP/1.0 and 1.1 are understood"})
        status, body = self._body(target.partition("?")[0])
        if status != 404 and method not in ("GET", "HEAD"):
            return _response(405, {"error": "GET and HEAD are understood"}, "Allow: GET, HEAD")
        return _response(status, body, without_body=method == "HEAD")

    def _body(self, path: str) -> tuple[int, dict[str, Any]]:
        if path == "/healthz":
            return 200, {"status": "alive"}
        if path == "/readyz":
            health = self._health
            state = "ready" if health.ready else "not ready"
            body = {"status": state, "role": health.role, "slot": self._slot, "reason": health.reason}
            return (200 if health.ready else 503), body
        return 404, {"error": "there are /healthz and /readyz"}


def _response(status: int, body: dict[str, Any], *headers: str, without_body: bool = False) -> bytes:
    content = json.dumps(body, ensure_ascii=False).encode() + b"\n"
    lines = [
        f"HTTP/1.1 {status} {_REASONS[status]}",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        "Cache-Control: no-store",
        "Connection: close",
        *headers,
    ]
    head = "\r\n".join(lines).encode("ascii") + b"\r\n\r\n"
    return head if without_body else head + content
