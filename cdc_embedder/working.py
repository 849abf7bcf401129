"""One session's worth of work: its connections, its stages, and the order in which they begin and end.

Who works, and when, is for `service` to say; what a stage does is in the stage's own module. Every purpose has a
connection of its own: what waits on one must not hold up another.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg

from cdc_embedder.answering import Answering
from cdc_embedder.catalog import SqlEmbed
from cdc_embedder.database_errors import from_database
from cdc_embedder.embedding.base import ModelSpec
from cdc_embedder.embedding.registry import Embedders
from cdc_embedder.following import POLL_SECONDS, Configuration
from cdc_embedder.metering import Meters
from cdc_embedder.pipeline import STUCK_SECONDS, Pipeline
from cdc_embedder.preparation import Taken
from cdc_embedder.querying import Queries
from cdc_embedder.reading import Reading
from cdc_embedder.reporting import Reporter
from cdc_embedder.retention import Retention
from cdc_embedder.rows import crashes, requests
from cdc_embedder.rows.session import Connection, open_in
from cdc_embedder.rows.writeback import Term
from cdc_embedder.rows.writers import Writers, set_up_origin, suppress_triggers
from cdc_embedder.scanning import Scanner
from cdc_embedder.settings import Settings
from cdc_embedder.spilling import Spiller
from cdc_embedder.standby import Announcing
from cdc_embedder.suspecting import Watch
from cdc_embedder.writing import Writing

if TYPE_CHECKING:
    from cdc_embedder.tracing import Tracing

log = logging.getLogger(__name__)

Beside = Callable[[], Coroutine[Any, Any, None]]

_WRITER = {"cdc_embedder.writer": "on"}
"""What lets a session write to a column that is protected from the application."""


@dataclass(frozen=True, slots=True)
class Lasting:
    """What outlives a session: models stay loaded, and counts go on."""

    settings: Settings
    name: str
    embedders: Embedders
    queries: Queries
    meters: Meters
    retention: Retention
    tracing: Tracing | None
    opened: Callable[[], None]
    """Called whenever a stream was opened."""

    @property
    def lock_timeout_ms(self) -> str:
        """idle_session_timeout of sessions whose locks must not outlive us."""
        return str(int(max(self.settings.wal_sender_timeout_s, 5 * POLL_SECONDS) * 1000))


@dataclass(frozen=True, slots=True)
class Site:
    """Where a session works. What is opened here is closed with `stack`."""

    stack: AsyncExitStack
    dsn: str
    replication_dsn: str
    """Leads to the slot: on the primary, or on the one standby that was looked at."""
    control: Connection
    """Holds the lock that makes this instance the one that works."""
    watching: tuple[Connection, Connection | None]
    """For looks at the WAL: on the primary, and on the standby where the slot is on one."""

    @property
    def on_standby(self) -> bool:
        return self.watching[1] is not None

    async def open(self, purpose: str, **settings: str) -> Connection:
        """As `rows.session.connect`."""
        return await open_in(self.stack, self.dsn, purpose, **settings)


@dataclass(frozen=True, slots=True)
class Working:
    """The stages of one session. `prepare` puts them together, `run` has them work."""

    lasting: Lasting
    site: Site
    term: Term
    plugin: str
    configuration: Configuration
    reading: Reading
    pipeline: Pipeline
    writing: Writing
    reporter: Reporter
    answering: Answering
    failed: list[float] = field(default_factory=list)
    """When a stage failed, on the clock `time.monotonic`: the others are to end then."""

    @classmethod
    async def prepare(cls, lasting: Lasting, site: Site, taken: Taken, *, binary: bool) -> Working:
        """Begin a term, and read what is configured. `binary`: see `Reading`. Raises Problem and psycopg.Error."""
        settings, slot = lasting.settings, taken.slot
        term = Term(slot, await requests.take_term(site.control, slot, lasting.name))
        suspects = await crashes.suspects(site.control, slot, lasting.name)
        writers, origins = await _open_writers(site, term, settings.writers)
        reading = Reading(
            site.replication_dsn, taken, origins, settings.wal_sender_timeout_s, binary=binary, opened=lasting.opened
        )
        # requests are read on the primary in any case: whoever asks does not wait for the standby
        requested = site.dsn if site.on_standby else site.replication_dsn
        answering = Answering(site.dsn, requested, slot, lasting.queries, settings.wal_sender_timeout_s)

        def offer(models: dict[str, ModelSpec], terms: SqlEmbed) -> None:
            lasting.queries.models = models
            answering.want(settings.sql_embed or terms.enabled, terms)

        configuration = Configuration(
            site.control,
            slot,
            taken.plugin,
            lasting.embedders,
            time.monotonic,
            reading.changed,
            reading.covers,
            settings.scan_period_s,
            suspects,
            offer,
            lasting.meters,
        )
        fetcher = await site.open("fetch")
        notes = await site.open("report", synchronous_commit="off")
        watch = Watch(notes, slot, lasting.name)
        pipeline = Pipeline(
            configuration,
            fetcher,
            writers.at_once,
            watch,
            lasting.queries,
            lasting.meters,
            lasting.tracing,
            settings.max_pending_keys,
        )
        reading.attach(configuration, pipeline)
        site.stack.push_async_callback(reading.close, clean=False)
        await configuration.reload()
        return cls(
            lasting,
            site,
            term,
            taken.plugin,
            configuration,
            reading,
            pipeline,
            Writing(pipeline, configuration, writers, watch),
            Reporter(notes, slot, lasting.name, lambda: pipeline.lanes, reading.position, time.monotonic),
            answering,
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`; then the batch in hand is finished and confirmed. Raises what ends a stage."""
        queries = self.lasting.queries
        await self.reporter.once()  # before the slot is active: what an earlier service said is not true any more
        queries.refresh, queries.ended = self._refresh, self.pipeline.wake
        try:
            await self._run_stages(stop)
        finally:
            queries.refresh, queries.ended = None, lambda: None

    async def _run_stages(self, stop: asyncio.Event) -> None:
        pipeline, retrier = self.pipeline, await self.site.open("retry")
        spiller = Spiller(pipeline, self.term, self.lasting.settings.spill_after_s)
        works = await self._works_beside(retrier, spiller)
        async with asyncio.TaskGroup() as group:
            beside = [group.create_task(work()) for work in works]
            stages = [group.create_task(work) for work in (pipeline.fetch(), *self.writing.runs())]
            reader = group.create_task(self.reading.run())
            for task in (*beside, *stages, reader):
                task.add_done_callback(self._ended)
            await stop.wait()
            log.info("stopping: finishing the batch in hand")
            pipeline.stop()
            await asyncio.gather(*stages)
            await pipeline.confirm_once(retrier)
            for task in (reader, *beside):
                task.cancel()
        await self.reading.close()
        await spiller.settle(retrier)
        await self.reporter.once()
        log.info(
            "stopped, confirmed through %s; %d changes of our own were passed over",
            self.configuration.watermark.flushed,
            self.reading.echoes,
        )

    async def _works_beside(self, retrier: Connection, spiller: Spiller) -> list[Beside]:
        """What runs beside the stages for as long as they do, ready to be begun."""
        site, settings, reporter, pipeline = self.site, self.lasting.settings, self.reporter, self.pipeline
        scanner = Scanner(
            await site.open("scan", statement_timeout="0"),
            lambda: pipeline.lanes,
            time.monotonic,
            pipeline.wake,
            self.configuration.fail,
            settings.scan_period_s,
            self.term,
        )
        works: list[Beside] = [
            self.configuration.run,
            partial(self.configuration.listen, await site.open("listen")),
            scanner.run,
            partial(pipeline.confirming, retrier),
            partial(pipeline.retry, retrier),
            partial(spiller.drain, retrier),
            partial(spiller.spill, await site.open("spill")),
            reporter.run,
            self.answering.run,
            partial(self.lasting.retention.run, *site.watching, lambda: reporter.embedded_through),
        ]
        if retrier.info.server_version < 170000:
            works.append(partial(self.answering.flusher.run, await site.open("flush")))
        if site.on_standby:
            session = await site.open("announce", idle_session_timeout=self.lasting.lock_timeout_ms)
            works.append(Announcing(session, self.term.slot, reporter, self.reading.streaming).run)
        return works

    def stuck(self) -> bool:
        """Whether the pipeline gets nowhere, or a stage failed long ago and the others still do not end."""
        return self.pipeline.stuck() or any(time.monotonic() - at >= STUCK_SECONDS for at in self.failed)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self.failed.append(time.monotonic())

    async def _refresh(self) -> None:
        try:
            await self.configuration.reload()
        except psycopg.Error as error:
            raise from_database(error, "reading the models") from error


async def _open_writers(site: Site, term: Term, number: int) -> tuple[Writers, list[tuple[str, int]]]:
    """The sessions that write, and the origins of those that are marked by one."""
    plain, marked, origins = [await site.open("write", **_WRITER)], [], []
    suppressed = await suppress_triggers(plain[0])
    for index in range(1, number + 1):
        session = await site.open(f"write {index}", **_WRITER)
        if suppressed:
            await suppress_triggers(session)
        if (origin := await set_up_origin(session, term.slot, index)) is None:
            plain.append(session)
        else:
            marked.append(session)
            origins.append(origin)
    return Writers(plain, marked, term, triggers_suppressed=suppressed), origins
