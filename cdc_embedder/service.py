"""The life of the service: connect, take the slot, run a pipeline, reconnect, stop.

One consumer (rule 9): whoever holds the advisory lock and the slot works; another instance waits on one idle session
and takes over. Whoever takes over has a term of its own, so that a predecessor that was only frozen can write nothing
any more. Any loss of a connection ends the pipeline as a whole, and the next one starts from what the slot says: there
is no other store of position. Models stay loaded from one to the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import socket
import time
import uuid
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import Any, TypeVar

import psycopg

from cdc_embedder.database_errors import from_database
from cdc_embedder.embedding.registry import Embedders
from cdc_embedder.errors import NotCarried, Problem, SlotBusy, Temporary
from cdc_embedder.following import POLL_SECONDS, Configuration
from cdc_embedder.pipeline import Pipeline
from cdc_embedder.preparation import Taken, check_server, take_advisory_lock, take_slot
from cdc_embedder.reading import Reading
from cdc_embedder.reporting import Reporter
from cdc_embedder.rows import crashes, requests
from cdc_embedder.rows.session import Connection, connect
from cdc_embedder.rows.writeback import Term
from cdc_embedder.rows.writers import Writers, set_up_origin, suppress_triggers
from cdc_embedder.scanning import Scanner
from cdc_embedder.settings import Settings
from cdc_embedder.spilling import Spiller
from cdc_embedder.suspecting import Watch
from cdc_embedder.wal.diagnosis import SlotStuck
from cdc_embedder.wal.slot import PluginRefused
from cdc_embedder.web import Health
from cdc_embedder.writing import Writing

log = logging.getLogger(__name__)

T = TypeVar("T")

CALLS = 64
"""Threads for calls of embedders; each is made when there is a call for it."""

BUSY_SECONDS = 1.0
LONGEST_BACKOFF_SECONDS = 30.0
WORKED_SECONDS = 2.0
"""A session that lasted longer had found its server: trouble after that is new trouble."""

STUCK_TRIES = 5
"""How often a change that the server cannot decode is tried again before the slot is made anew."""


class Service:
    """`run` works until `stop` is called; it raises only what an operator must act on."""

    def __init__(self, settings: Settings, health: Health | None = None) -> None:
        self._settings = settings
        self._health = health or Health()
        self._name = f"{socket.gethostname()}/{os.getpid()}/{uuid.uuid4().hex[:8]}"
        self._spoiled = False
        self._stuck: tuple[object, int] = (None, 0)
        self._taken: Taken | None = None
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
        failures = 0
        # As many calls of models at once as they ask for: asyncio's own pool counts the cores of this machine.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(CALLS, thread_name_prefix="call"))
        try:
            while not self._stop.is_set():
                began = time.monotonic()
                try:
                    await self._session()
                    failures = 0
                except SlotBusy as problem:  # the slot without the lock: its last reader is being found dead
                    self._wait(problem.sentence)
                    await self._rest(BUSY_SECONDS)
                except (PluginRefused, NotCarried) as problem:
                    if self._settings.output_plugin != "auto" or self._refused:
                        raise
                    log.error("%s", problem.sentence)
                    self._refused.add("wal2json")
                except SlotStuck as problem:
                    self._is_stuck(problem)
                    self._health.away(problem.sentence)
                    await self._rest(BUSY_SECONDS)
                except Temporary as problem:
                    failures = 1 if time.monotonic() - began > WORKED_SECONDS else failures + 1
                    rest = min(LONGEST_BACKOFF_SECONDS, 0.25 * 2**failures) * random.uniform(0.5, 1.0)
                    log.warning("%s; trying again in %.1f s", problem.sentence, rest)
                    self._health.away(problem.sentence)
                    await self._rest(rest)
        finally:
            self._embedders.close()

    def _wait(self, reason: str) -> None:
        """Say once that this instance waits."""
        if self._health.role != "waiting":
            log.info("waiting: %s", reason)
            self._health.waiting(reason)

    def _is_stuck(self, problem: SlotStuck) -> None:
        """Waiting mends some errors of decoding; one that comes again at the same place does not go away."""
        place, tries = self._stuck
        here = None if self._taken is None else self._taken.confirmed
        self._stuck = (here, tries + 1 if here == place else 1)
        self._spoiled = problem.for_ever or self._stuck[1] >= STUCK_TRIES
        log.error("%s", problem.sentence)

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
        # A process that is frozen must not hold the lock for ever: this session has something to say every few seconds.
        timeout_s = max(settings.wal_sender_timeout_s, 5 * POLL_SECONDS)
        control = await self._connect(stack, "control", idle_session_timeout=str(int(timeout_s * 1000)))
        await check_server(control, slot)
        while not await take_advisory_lock(control, slot):
            self._wait(f"another instance serves the slot {slot}; this one is ready to take over")
            await self._rest(BUSY_SECONDS)
            if self._stop.is_set():
                return
        taken = await self._unless_stopped(
            take_slot(control, self._dsn, slot, settings.output_plugin, self._refused, spoiled=self._spoiled)
        )
        if taken is None:
            return
        self._taken, self._spoiled = taken, False
        term = Term(slot, await requests.take_term(control, slot, self._name))
        suspects = await crashes.suspects(control, slot, self._name)
        writers, origins = await self._writers(stack, term)
        reading = Reading(
            self._replication_dsn,
            taken,
            origins,
            settings.wal_sender_timeout_s,
            binary=self._stuck[1] == 0,  # a type whose binary form fails must not hold the slot
            opened=self._health.working,
        )
        configuration = Configuration(
            control,
            slot,
            taken.plugin,
            self._embedders,
            time.monotonic,
            reading.changed,
            reading.covers,
            settings.scan_period_s,
            suspects,
        )
        fetcher = await self._connect(stack, "fetch")
        notes = await self._connect(stack, "report", synchronous_commit="off")
        watch = Watch(notes, slot, self._name)
        pipeline = Pipeline(configuration, fetcher, writers.at_once, watch, settings.max_pending_keys)
        writing = Writing(pipeline, configuration, writers, watch)
        reading.attach(configuration, pipeline)
        stack.push_async_callback(reading.close, clean=False)
        await configuration.reload()
        reporter = Reporter(notes, slot, self._name, lambda: pipeline.lanes, reading.position, time.monotonic)
        await reporter.once()  # before the slot is active: what an earlier service said is not true any more
        await self._run_stages(stack, configuration, pipeline, writing, reading, reporter)

    async def _writers(self, stack: AsyncExitStack, term: Term) -> tuple[Writers, list[tuple[str, int]]]:
        """The sessions that write, and the origins of those that are marked by one."""
        plain, marked, origins = [await self._connect(stack, "write")], [], []
        suppressed = await suppress_triggers(plain[0])
        for number in range(1, self._settings.writers + 1):
            session = await self._connect(stack, f"write {number}")
            if suppressed:
                await suppress_triggers(session)
            if (origin := await set_up_origin(session, term.slot, number)) is None:
                plain.append(session)
            else:
                marked.append(session)
                origins.append(origin)
        return Writers(plain, marked, term, triggers_suppressed=suppressed), origins

    async def _run_stages(
        self,
        stack: AsyncExitStack,
        configuration: Configuration,
        pipeline: Pipeline,
        writing: Writing,
        reading: Reading,
        reporter: Reporter,
    ) -> None:
        listener, retrier = await self._connect(stack, "listen"), await self._connect(stack, "retry")
        spilling, spiller = await self._connect(stack, "spill"), Spiller(pipeline, self._settings.spill_after_s)
        scanning = await self._connect(stack, "scan", statement_timeout="0")
        scanner = Scanner(
            scanning,
            lambda: pipeline.lanes,
            time.monotonic,
            pipeline.wake,
            configuration.fail,
            self._settings.scan_period_s,
        )
        async with asyncio.TaskGroup() as group:
            background = [
                group.create_task(work)
                for work in (
                    configuration.run(),
                    configuration.listen(listener),
                    scanner.run(),
                    pipeline.confirming(retrier),
                    pipeline.retry(retrier),
                    spiller.drain(retrier),
                    spiller.spill(spilling),
                    reporter.run(),
                )
            ]
            stages = [group.create_task(work) for work in (pipeline.fetch(), *writing.runs())]
            reader = group.create_task(reading.run())
            await self._stop.wait()
            log.info("stopping: finishing the batch in hand")
            pipeline.stop()
            await asyncio.gather(*stages)
            await pipeline.confirm_once(retrier)
            reader.cancel()
            for task in background:
                task.cancel()
        await reading.close()
        await spiller.settle(retrier)
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
