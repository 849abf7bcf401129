"""The life of the service: connect, take the slot, run a pipeline, reconnect, stop.

One consumer (rule 9): whoever holds the advisory lock and the slot works; another instance waits and takes over. Any
loss of a connection ends the pipeline as a whole, and the next one starts from what the slot says: there is no other
store of position. Models stay loaded from one to the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import Any, TypeVar

import psycopg

from cdc_embedder.database_errors import from_database
from cdc_embedder.embedding.registry import Embedders
from cdc_embedder.errors import Problem, SlotBusy, Temporary
from cdc_embedder.following import Configuration
from cdc_embedder.pipeline import Pipeline
from cdc_embedder.preparation import check_server, take_advisory_lock, take_slot
from cdc_embedder.reading import Reading
from cdc_embedder.reporting import Reporter
from cdc_embedder.rows.session import Connection, connect
from cdc_embedder.rows.writers import Writers, set_up_origin
from cdc_embedder.scanning import Scanner
from cdc_embedder.settings import Settings
from cdc_embedder.wal.slot import PluginRefused

log = logging.getLogger(__name__)

T = TypeVar("T")

BUSY_SECONDS = 1.0
LONGEST_BACKOFF_SECONDS = 30.0
WORKED_SECONDS = 2.0
"""A session that lasted longer had found its server: trouble after that is new trouble."""


class Service:
    """`run` works until `stop` is called; it raises only what an operator must act on."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._dsn = settings.dsn.get_secret_value()
        replication = settings.replication_dsn
        self._replication_dsn = replication.get_secret_value() if replication is not None else self._dsn
        self._stop = asyncio.Event()
        self._refused: set[str] = set()
        self._embedders = Embedders(
            device=settings.device,
            allow_remote_code=settings.allow_remote_code,
            api_key_envs=tuple(settings.allowed_api_key_envs),
            base_urls=settings.allowed_base_urls,
        )

    def stop(self) -> None:
        """Finish the batch in hand, confirm, leave."""
        self._stop.set()

    async def run(self) -> None:
        """Run sessions, one after another. Raises Problem for what trying again cannot mend."""
        failures, waiting = 0, False
        try:
            while not self._stop.is_set():
                began = time.monotonic()
                try:
                    await self._session()
                    failures = 0
                except SlotBusy as problem:
                    if not waiting:
                        log.info("waiting: %s", problem.sentence)
                    waiting = True
                    await self._rest(BUSY_SECONDS)
                    continue
                except PluginRefused as problem:
                    if self._settings.output_plugin != "auto" or self._refused:
                        raise
                    log.error("%s", problem.sentence)
                    self._refused.add("wal2json")
                except Temporary as problem:
                    failures = 1 if time.monotonic() - began > WORKED_SECONDS else failures + 1
                    rest = min(LONGEST_BACKOFF_SECONDS, 0.25 * 2**failures) * random.uniform(0.5, 1.0)
                    log.warning("%s; trying again in %.1f s", problem.sentence, rest)
                    await self._rest(rest)
                waiting = False
        finally:
            self._embedders.close()

    async def _rest(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stop.wait()

    async def _session(self) -> None:
        """One connection's worth of work, until `stop` or trouble. Raises Problem; anything else is a bug of ours."""
        async with AsyncExitStack() as stack:
            try:
                await self._work(stack)
            except (psycopg.Error, ExceptionGroup) as error:
                problem = _problem(error)
                if problem is None:
                    raise
                raise problem from error

    async def _work(self, stack: AsyncExitStack) -> None:
        settings, slot = self._settings, self._settings.slot
        control = await self._connect(stack, "control")
        await check_server(control, slot)
        await take_advisory_lock(control, slot)
        taken = await self._unless_stopped(take_slot(control, self._dsn, slot, settings.output_plugin, self._refused))
        if taken is None:
            return
        plain, marked = await self._connect(stack, "write"), await self._connect(stack, "write marked")
        origin = await set_up_origin(marked, slot)
        writers = Writers(plain, marked if origin else None, origin)
        reading = Reading(self._replication_dsn, taken, origin, settings.wal_sender_timeout_s)
        configuration = Configuration(
            control, slot, taken.plugin, self._embedders, time.monotonic, reading.changed, reading.covers
        )
        fetcher = await self._connect(stack, "fetch")
        pipeline = Pipeline(configuration, fetcher, writers, settings.max_pending_keys)
        reading.attach(configuration, pipeline)
        stack.push_async_callback(reading.close, clean=False)
        await configuration.reload()
        await self._run_stages(stack, configuration, pipeline, reading)

    async def _run_stages(
        self, stack: AsyncExitStack, configuration: Configuration, pipeline: Pipeline, reading: Reading
    ) -> None:
        reporter = Reporter(
            await self._connect(stack, "report"),
            self._settings.slot,
            lambda: pipeline.lanes,
            reading.position,
            time.monotonic,
        )
        await reporter.once()  # before the slot is active: what an earlier service said is not true any more
        listener, retrier = await self._connect(stack, "listen"), await self._connect(stack, "retry")
        scanning = await self._connect(stack, "scan", statement_timeout="0")
        scanner = Scanner(scanning, lambda: pipeline.lanes, time.monotonic, pipeline.wake, configuration.fail)
        async with asyncio.TaskGroup() as group:
            background = [
                group.create_task(work)
                for work in (
                    configuration.run(),
                    configuration.listen(listener),
                    scanner.run(),
                    pipeline.retry(retrier),
                    reporter.run(),
                )
            ]
            stages = [group.create_task(work) for work in (pipeline.fetch(), pipeline.embed(), pipeline.write())]
            reader = group.create_task(reading.run())
            await self._stop.wait()
            log.info("stopping: finishing the batch in hand")
            pipeline.stop()
            await asyncio.gather(*stages)
            reader.cancel()
            for task in background:
                task.cancel()
        await reading.close()
        await reporter.once()
        log.info(
            "stopped, confirmed through %s; %d changes of our own were passed over",
            configuration.watermark.flushed,
            reading.echoes,
        )

    async def _connect(self, stack: AsyncExitStack, purpose: str, **settings: str) -> Connection:
        connection = await connect(self._dsn, purpose, **settings)
        stack.push_async_callback(connection.close)
        return connection

    async def _unless_stopped(self, work: Coroutine[Any, Any, T]) -> T | None:
        """What `work` gives, or None where a stop came first."""
        task, stop = asyncio.create_task(work), asyncio.create_task(self._stop.wait())
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.wait({task})
        return None


def _problem(error: Exception) -> Problem | None:
    """What went wrong, of all that did when one stage took the others down; None where something is no Problem."""
    if isinstance(error, ExceptionGroup):
        problems = [_problem(inner) for inner in error.exceptions]
        if None in problems:
            return None
        return min(problems, key=lambda problem: isinstance(problem, Temporary))
    if isinstance(error, psycopg.Error):
        return from_database(error, "the database session failed")
    return error if isinstance(error, Problem) else None
