"""Whether the process lives and is of use, and embeddings, over HTTP: what is said of health, and where.

`/healthz` says whether the process gets anywhere, `/readyz` whether it works or waits ready to take over, `/metrics`
all that is measured. None of them waits for the database or can stop the service. Embeddings are in `openai_api`, what
listens in `listening`, what Prometheus is told in `metrics`; they are imported when they are needed.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Literal

from cdc_embedder.errors import Misconfigured

if TYPE_CHECKING:
    from cdc_embedder.querying import Queries

log = logging.getLogger(__name__)

CLOSED = (
    "neither metrics nor embeddings are served: CDC_EMBEDDER_HTTP names an address that other machines reach, and no"
    " token is set. Set CDC_EMBEDDER_HTTP_TOKEN, or listen on 127.0.0.1"
)


@dataclass(slots=True)
class Health:
    """What the service says of itself; whoever runs it updates it. After `stopping` nothing makes it ready again.

    `stuck`: whether it could work, and gets nowhere.
    """

    role: Literal["working", "waiting", "none"] = "none"
    reason: str = "starting"
    ends: bool = False
    stuck: Callable[[], bool] = lambda: False

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
    where: tuple[str, int] | None,
    health: Health,
    slot: str,
    queries: Queries,
    metrics: Callable[[], bytes],
    *,
    explicit: bool,
    token: str | None,
    max_bytes: int,
) -> AsyncIterator[list[tuple[str, int]]]:
    """Answer at `where` as long as the context lasts; gives the addresses listened on, none where `where` is None.

    An address that cannot be listened on is a warning, or, where somebody asked for it (`explicit`), Misconfigured.
    Without a `token`, metrics and embeddings are for this machine alone.
    """
    sockets = [] if where is None else await _bind(where, explicit)
    if not sockets:
        yield []
        return
    from cdc_embedder import listening
    from cdc_embedder.openai_api import application

    addresses = [each.getsockname()[:2] for each in sockets]
    open_to_all = token is None and not all(ip_address(host.partition("%")[0]).is_loopback for host, _ in addresses)
    for host, port in addresses:
        log.info("health is served at %s/healthz and /readyz, /metrics, embeddings at /v1/embeddings", _url(host, port))
    if open_to_all:
        log.warning("%s", CLOSED)
    closed = CLOSED if open_to_all else ""
    app = application(health, slot, queries, metrics, closed=closed, token=token, max_bytes=max_bytes)
    async with listening.serving(app, sockets):
        yield addresses


async def _bind(where: tuple[str, int], explicit: bool) -> list[socket.socket]:
    from cdc_embedder.listening import bind

    host, port = where
    try:
        return await bind(host, port)
    except (OSError, UnicodeError) as error:
        sentence = f"health cannot be served at {_url(host, port)}: {_cause(error)}"
        if explicit:
            raise Misconfigured(sentence, hint="give CDC_EMBEDDER_HTTP another address, or off") from error
        log.warning("%s; going on without. CDC_EMBEDDER_HTTP names another address, or off", sentence)
        return []


def _cause(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return getattr(error, "strerror", None) or str(error)


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
