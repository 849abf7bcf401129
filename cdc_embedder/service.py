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
from collections import Counter
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg

from cdc_embedder import standby as standbys
from cdc_embedder.database_errors import from_database
from cdc_embedder.embedding.registry import Embedders
from cdc_embedder.errors import Misconfigured, NotCarried, Problem, SlotBusy, Temporary
from cdc_embedder.install import upgrade
from cdc_embedder.metering import Meters
from cdc_embedder.preparation import Taken, check_server, take_advisory_lock, take_slot
from cdc_embedder.querying import Queries
from cdc_embedder.retention import OverLimit, Retention
from cdc_embedder.rows import requests
from cdc_embedder.rows.session import Connection, connect, open_in
from cdc_embedder.settings import Settings
from cdc_embedder.wal.diagnosis import SlotStuck
from cdc_embedder.wal.slot import PluginRefused
from cdc_embedder.web import Health
from cdc_embedder.working import Lasting, Site, Working

if TYPE_CHECKING:
    from cdc_embedder.tracing import Tracing

log = logging.getLogger(__name__)

T = TypeVar("T")

CALLS = 64
"""Threads for calls of embedders; each is made when there is a call for it."""

BUSY_SECONDS = 1.0
LONGEST_BACKOFF_SECONDS = 30.0
WORKED_SECONDS = 2.0
"""A session that lasted longer had found its server: trouble after that is new trouble."""

TELL_SECONDS = 3.0
"""What takes longer before the work begins is said to whoever watches: systemd would end what is not ready in time."""

STUCK_TRIES = 5
"""How often a change that the server cannot decode is tried again before the slot is made anew."""


class Service:
    """`run` works until `stop` is called; it raises only what an operator must act on."""

    def __init__(self, settings: Settings, health: Health | None = None) -> None:
        self._settings = settings
        self._health = health or Health()
        self._spoiled = False
        self._stuck: tuple[object, int] = (None, 0)
        self._taken: Taken | None = None
        self._dsn = settings.dsn.get_secret_value()
        replication = settings.replication_dsn
        self._replication_dsn = replication.get_secret_value() if replication is not None else self._dsn
        self._stop = asyncio.Event()
        self._refused: set[str] = set()
        embedders = Embedders(
            device=settings.device,
            allow_remote_code=settings.allow_remote_code,
            api_key_envs=tuple(settings.allowed_api_key_envs),
            base_urls=settings.allowed_base_urls,
        )
        self.meters = Meters()
        self.retention = Retention(settings)
        self.queries = Queries(embedders, self.meters)
        """Answers whoever asks for vectors; see `web`."""
        self._lasting = Lasting(
            settings,
            f"{socket.gethostname()}/{os.getpid()}/{uuid.uuid4().hex[:8]}",
            embedders,
            self.queries,
            self.meters,
            self.retention,
            _tracing(settings),
            self._health.working,
        )
        self.working: Working | None = None
        """What works now, for whoever asks how it is; None while nothing does."""

    @property
    def slot(self) -> str:
        return self._settings.slot

    def stuck(self) -> bool:
        """Whether the process should be ended: it could work, and gets nowhere."""
        return self.working is not None and self.working.stuck()

    def summary(self) -> str:
        """How it is, in one line."""
        if self.working is None:
            return "preparing"
        lanes = self.working.pipeline.lanes
        waiting = sum(lane.outstanding for lane in lanes)
        failed = sum(lane.failed_rows for lane in lanes)
        states = Counter(lane.state[0] for lane in lanes)
        how = ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "none configured"
        return f"columns: {how}; keys waiting: {waiting}; rows failed: {failed}"

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
                    self.meters.reconnects += 1
                    failures = 1 if time.monotonic() - began > WORKED_SECONDS else failures + 1
                    rest = min(LONGEST_BACKOFF_SECONDS, 0.25 * 2**failures) * random.uniform(0.5, 1.0)
                    log.warning("%s; trying again in %.1f s", problem.sentence, rest)
                    self._health.away(problem.sentence)
                    await self._rest(rest)
        finally:
            await self.queries.close()
            self._lasting.embedders.close()
            if self._lasting.tracing is not None:
                await asyncio.to_thread(self._lasting.tracing.close)

    def _wait(self, reason: str) -> None:
        """Say once that this instance waits."""
        if self._health.role != "waiting":
            log.info("waiting: %s", reason)
            self._health.waiting(reason)

    @contextmanager
    def _taking_its_time(self, doing: str) -> Iterator[None]:
        """What is done here is the reason why nothing works yet, if it takes long."""
        timer = asyncio.get_running_loop().call_later(TELL_SECONDS, self._health.away, doing)
        try:
            yield
        finally:
            timer.cancel()

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
                control = await self._lead(stack)
                if control is None:
                    return
                standby = await self._standby(stack, control)
                if not await requests.given_up(control, self._settings.slot):
                    await self._work_or_give_up(control, standby)
                    return
                await self.retention.drop(control, standby)  # which may have failed when it was given up
                await stack.aclose()
                await self._until_told()
            except (psycopg.Error, ExceptionGroup) as error:
                problem = _problem(error)
                if problem is None:
                    raise
                raise problem from error

    async def _lead(self, stack: AsyncExitStack) -> Connection | None:
        """Wait until this instance is the one that works; its session, which holds the lock. None: stopped before."""
        slot = self.slot
        # A process that is frozen must not hold the lock for ever: this session has something to say every few seconds.
        control = await open_in(stack, self._dsn, "control", idle_session_timeout=self._lasting.lock_timeout_ms)
        await self._check(control)
        while not await take_advisory_lock(control, slot):
            self._wait(f"another instance serves the slot {slot}; this one is ready to take over")
            await self._rest(BUSY_SECONDS)
            if self._stop.is_set():
                return None
        if not await self._check(control):
            with self._taking_its_time("bringing the schema up to date"):
                for sentence in await asyncio.to_thread(upgrade, self._dsn):
                    log.info("%s", sentence)
        return control

    async def _standby(self, stack: AsyncExitStack, control: Connection) -> Connection | None:
        """A session where the slot is, if that is on a standby."""
        if self._settings.replication_dsn is None:
            return None
        session = await standbys.open_standby(control, self._settings.replication_dsn.get_secret_value())
        if session is not None:
            stack.push_async_callback(session.close)
        return session

    async def _check(self, control: Connection) -> bool:
        current = await check_server(control)
        if not current and not self._settings.auto_migrate:
            raise Misconfigured(
                "the schema is older than this cdc-embedder, and auto_migrate is off", hint="run: cdc-embedder init"
            )
        return current

    async def _until_told(self) -> None:
        """The slot was given up: wait for `take_slot_again`, without asking again and again."""
        reason = f"the slot {self._settings.slot} was given up: SELECT cdc_embedder.take_slot_again() has it made anew"
        log.error("waiting: %s", reason)
        self._health.away(reason)
        self.retention.given_up = True
        async with await connect(self._dsn, "listen") as session:
            await session.execute("LISTEN cdc_embedder")
            while not self._stop.is_set() and await requests.given_up(session, self._settings.slot):
                await self._unless_stopped(_notification(session))
        self.retention.given_up = self._stop.is_set()

    async def _work_or_give_up(self, control: Connection, standby: Connection | None) -> None:
        """Rule 9 holds to the end: the lock is ours until the slot is dropped."""
        try:
            async with AsyncExitStack() as stack:
                await self._work(stack, control, standby)
        except (OverLimit, ExceptionGroup) as error:
            problem = _problem(error)
            if not isinstance(problem, OverLimit):
                raise
            log.error("%s", problem.sentence)
            await self.retention.give_up(control, standby)
            if self._settings.wal_limit_then == "renew":
                await requests.take_again(control, self._settings.slot)

    async def _work(self, stack: AsyncExitStack, control: Connection, standby: Connection | None) -> None:
        replication_dsn, beside = self._replication_dsn, None
        if standby is not None:
            replication_dsn = standbys.pinned_to(standby, replication_dsn)
            beside = await open_in(stack, replication_dsn, "standby wal")
        watching = await open_in(stack, self._dsn, "wal"), beside
        taken = await self._take_slot(control, standby, watching)
        if taken is None:
            return
        self._taken, self._spoiled = taken, False
        binary = self._stuck[1] == 0  # a type whose binary form fails must not hold the slot
        working = await Working.prepare(
            self._lasting, Site(stack, self._dsn, replication_dsn, control, watching), taken, binary=binary
        )
        self.working = working
        try:
            await working.run(self._stop)
        finally:
            self.working = None
            self.meters.received_changes += working.reading.changes
            self.meters.own_changes += working.reading.echoes

    async def _take_slot(
        self, control: Connection, standby: Connection | None, watching: tuple[Connection, Connection | None]
    ) -> Taken | None:
        """The slot, or None where a stop came first. What it holds back is watched meanwhile."""
        watched = asyncio.create_task(self.retention.run(*watching))
        plugin = self._settings.output_plugin
        try:
            with self._taking_its_time(f"waiting for the slot {self.slot}: the log says what for"):
                return await self._unless_stopped(
                    take_slot(control, standby, self._dsn, self.slot, plugin, self._refused, spoiled=self._spoiled),
                    watched,
                )
        finally:
            watched.cancel()
            await asyncio.wait({watched})

    async def _unless_stopped(self, work: Coroutine[Any, Any, T], *guards: asyncio.Task[None]) -> T | None:
        """What `work` gives, or None where a stop came first. Raises what ends one of `guards` meanwhile."""
        task, stop = asyncio.create_task(work), asyncio.create_task(self._stop.wait())
        await asyncio.wait({task, stop, *guards}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.wait({task})
        for guard in guards:
            if guard.done():
                guard.result()
        return None


def _tracing(settings: Settings) -> Tracing | None:
    if not settings.traces:
        return None
    try:
        from cdc_embedder.tracing import Spans
    except ImportError as error:
        raise Misconfigured(
            "traces are on, and OpenTelemetry is not installed", hint="pip install 'cdc-embedder[otel]'"
        ) from error
    return Spans(settings.slot)


async def _notification(session: Connection) -> None:
    async for _ in session.notifies(stop_after=1):
        pass


def _problem(error: Exception) -> Problem | None:
    """What went wrong, of all that did when one stage took the others down; None where something is no Problem."""
    if isinstance(error, ExceptionGroup):
        problems = [_problem(inner) for inner in error.exceptions]
        if None in problems:
            return None
        return min(problems, key=lambda problem: isinstance(problem, Temporary))
    if isinstance(error, psycopg.Error):
        return from_database(error, "the database session failed", of_rows=True)
    return error if isinstance(error, Problem) else None
