"""The service as a process: signals in, exit status out, and its health for who asks."""

from __future__ import annotations

import asyncio
import os
import signal

from cdc_embedder import logs, web
from cdc_embedder.notifying import Notifier, notifying
from cdc_embedder.service import Service
from cdc_embedder.settings import Settings


def run_until_signalled(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT; a second signal leaves at once. Raises Problem as the service does."""
    asyncio.run(_run(settings))


async def _run(settings: Settings) -> None:
    health = web.Health()
    service = Service(settings, health)
    signalled = False

    def stop() -> None:
        nonlocal signalled
        if signalled:
            os._exit(1)  # nothing is lost: what is not confirmed is read again
        signalled = True
        notifier.say("STOPPING=1", "STATUS=stopping: finishing the batch in hand")
        health.stopping()
        service.stop()

    loop = asyncio.get_running_loop()
    loop.set_exception_handler(logs.unhandled)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    health.stuck = service.stuck

    def metrics() -> bytes:
        from cdc_embedder.metrics import exposition

        return exposition(service, health)

    notifier = Notifier()
    async with web.serving(
        settings.http_address,
        health,
        settings.slot,
        service.queries,
        metrics,
        explicit=settings.http_is_explicit,
        token=None if settings.http_token is None else settings.http_token.get_secret_value(),
        max_bytes=settings.http_max_bytes,
    ):
        telling = asyncio.create_task(notifying(notifier, health, service))
        try:
            await service.run()
        finally:
            telling.cancel()
