"""What systemd is told of a service of `Type=notify`: that it is ready, how it is, that it still gets somewhere.

The protocol of sd_notify(3): lines in a datagram to the socket that NOTIFY_SOCKET names. Without one nothing is said.
The watchdog is fed by progress, not by time: see `Pipeline.stuck`.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping
from typing import Protocol

from cdc_embedder.web import Health

CHECK_SECONDS = 1.0


class Notifier:
    """The socket, and how often the watchdog is to be fed (`watchdog_s`, None: not at all)."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        name = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + name[1:] if name.startswith("@") else name
        micros = environment.get("WATCHDOG_USEC", "")
        ours = environment.get("WATCHDOG_PID", "") in ("", str(os.getpid()))
        self.watchdog_s = int(micros) / 1e6 if self._address and ours and micros.isdigit() and int(micros) else None

    def say(self, *lines: str) -> None:
        """Send; a socket that is gone is nobody's trouble."""
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.setblocking(False)
            try:
                channel.sendto("\n".join(lines).encode(), self._address)
            except OSError:
                """systemd is being restarted, or its queue is full: the next one comes soon."""


class Observed(Protocol):
    """What is watched: whether it gets nowhere although it could, and how it is in one line."""

    def stuck(self) -> bool: ...
    def summary(self) -> str: ...


async def notifying(notifier: Notifier, health: Health, service: Observed) -> None:
    """For ever: READY once it works, waits, tries again or is held up; STATUS when it changed; WATCHDOG while it is
    not stuck."""
    period = min(CHECK_SECONDS, notifier.watchdog_s / 3) if notifier.watchdog_s else CHECK_SECONDS
    ready, told = False, ""
    while True:
        lines = []
        if not ready and (health.ready or health.reason != "starting"):
            ready = True
            lines.append("READY=1")
        status = service.summary() if health.role == "working" else f"{health.role}: {health.reason}"
        if status != told:
            told = status
            lines.append("STATUS=" + status.replace("\n", " "))
        if notifier.watchdog_s and not service.stuck():
            lines.append("WATCHDOG=1")
        if lines:
            notifier.say(*lines)
        await asyncio.sleep(period)
