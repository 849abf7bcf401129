"""Following the configuration: which columns there are, which are served and with which model, what the stream covers.

Woken by NOTIFY and, since a notification can be missed and the catalog changes without one, every few seconds. A
column stops being served only after a scan of it was requested durably; it is served again before that scan begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping

import psycopg

from cdc_embedder import catalog
from cdc_embedder.catalog import EmbeddingColumn
from cdc_embedder.database_errors import from_database
from cdc_embedder.embedding.base import ModelSpec
from cdc_embedder.embedding.registry import Embedders
from cdc_embedder.errors import ColumnFault, ModelFault, Problem, Temporary
from cdc_embedder.lane import HEAL_SECONDS, Lane
from cdc_embedder.metering import Meters
from cdc_embedder.pending import Key, Pending
from cdc_embedder.routing import Route
from cdc_embedder.rows import backlog, requests, scan
from cdc_embedder.rows.crashes import Suspect
from cdc_embedder.rows.requests import ScanRequest
from cdc_embedder.rows.session import Connection, one
from cdc_embedder.watermark import Position, Watermark

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0
RESCAN_SECONDS = 30.0
"""How often a column that no stream covers is scanned."""

RELOAD_RETRY_SECONDS = 1.0


class Configuration:
    """The lanes of one connection, kept as the configuration table and the catalog say.

    `changed` is called after every look; `covers(column)` says whether the stream delivers the table's changes now
    (None: it will be told soon). `offer` is told at every look which models there are, and on which terms SQL may ask
    for vectors.
    """

    def __init__(
        self,
        connection: Connection,
        slot: str,
        plugin: str,
        embedders: Embedders,
        now: Callable[[], float],
        changed: Callable[[], None],
        covers: Callable[[EmbeddingColumn], bool | None],
        scan_period_s: float,
        suspects: Mapping[int, dict[Key, Suspect]],
        offer: Callable[[dict[str, ModelSpec], catalog.SqlEmbed], None],
        meters: Meters,
    ) -> None:
        self._connection = connection
        self._slot = slot
        self._plugin = plugin
        self._embedders = embedders
        self._now = now
        self._changed = changed
        self._covers = covers
        self._scan_period_s = scan_period_s
        self._suspects = suspects
        self._offer = offer
        self._meters = meters
        self._doubt = ""
        self._loads: set[asyncio.Task[None]] = set()
        self._looking = asyncio.Lock()
        self.watermark = Watermark()
        self.lanes: dict[int, Lane] = {}
        self.wake = asyncio.Event()

    async def run(self) -> None:
        """For ever: look again when woken, or after a while. Raises psycopg.Error as it comes."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self.wake.wait()
            self.wake.clear()
            await self.reload()

    async def listen(self, connection: Connection) -> None:
        """For ever: wake `run` at every notification, on a session of its own."""
        await connection.execute("LISTEN cdc_embedder")
        async for _ in connection.notifies():
            self.wake.set()

    async def reload(self) -> None:
        """Look once: lanes come, go and change; scans are requested where a column stops being served."""
        async with self._looking:
            await self._reload()
        self._changed()

    async def _reload(self) -> None:
        columns = {column.id: column for column in await catalog.load(self._connection, self._slot)}
        scans = await requests.scans(self._connection)
        self._offer(*await catalog.offered(self._connection))
        for id in [id for id in self.lanes if id not in columns]:
            lane = self.lanes.pop(id)
            log.info("%s is not configured any more", lane.column.label)
            self._forget(lane)
            self._release(lane.route.missed)
        for column in columns.values():
            try:
                await self._refresh(column, scans.get(column.id, ScanRequest()))
            except psycopg.Error as error:
                problem = from_database(error, f"preparing {column.label}", of_rows=True)
                if isinstance(problem, Temporary):
                    raise
                await self.fail(self.lanes[column.id], problem)
        doubt, self._doubt = self._doubt, ""
        for lane in self.lanes.values():
            if lane.route.missed:
                await self._missed_keys(lane)
            if doubt and lane.served:
                await self.missed(lane, doubt)
        # Before a barrier is taken: whatever was passed over until now is of a transaction older than it (rule 10).
        self._changed()
        await self._cover()

    def doubt(self, reason: str) -> None:
        """Changes of any column may have been missed: all are scanned again, after the next look."""
        self._doubt = reason
        self.wake.set()

    async def fail(self, lane: Lane, problem: Problem) -> None:
        """The column cannot be served for now: it pauses with the reason, the others go on."""
        if lane.fault != problem.sentence:
            log.error("%s: %s", lane.column.label, problem.sentence)
        lane.fault = lane.last_error = problem.sentence
        lane.fault_until = self._now() + HEAL_SECONDS
        await self._stop_serving(lane)

    async def missed(self, lane: Lane, reason: str) -> None:
        """Changes of the column may have been missed: scan it, under a snapshot that the stream covers."""
        log.warning("%s: %s; it is scanned again", lane.column.label, reason)
        await requests.want_scan(self._connection, [lane.column.id], reason)
        lane.cast_doubt()

    async def _missed_keys(self, lane: Lane) -> None:
        positions, lane.route.missed[:] = list(lane.route.missed), []
        await self.missed(lane, "changes arrived without the key as it is now")
        self._release(positions)

    async def _refresh(self, column: EmbeddingColumn, request: ScanRequest) -> None:
        lane = self.lanes.get(column.id)
        if lane is None:
            pending = Pending(self.watermark)
            route = Route(column.table_oid, column.relations, tuple(key.name for key in column.key), pending)
            lane = self.lanes[column.id] = Lane(column, pending, route, meter=self._meters.column(column.label))
            lane.suspects.update(self._suspects.get(column.id, {}))
            lane.scan.rows, lane.scan.null, lane.scan.current, lane.scan.failed, lane.scan.truncated = request.counts
        lane.scan.wanted, lane.scan.counted = request.wanted, request.counted
        lane.scan.due = self._now() + self._scan_period_s - request.age_s
        before = lane.column
        if lane.served and (before.key, before.sources, before.target) != (column.key, column.sources, column.target):
            # The keys that wait are of another shape; or names were swapped, and until now another column was used.
            # First of all: what takes keys meanwhile must find them, the column and the model as they belong together.
            await self._stop_serving(lane)
        if before != column:
            lane.column = column  # the same object otherwise: statements are kept by it
            if before.model != column.model:
                lane.embedder = None
        await self._decide(lane, before, request)
        if lane.served:
            self._load(lane)
            await self._look_at_storage(lane, request)

    async def _look_at_storage(self, lane: Lane, request: ScanRequest) -> None:
        """Rule 10: a rewritten table and an attached partition bring rows that no event told of."""
        if request.storage == lane.column.storage:
            return
        if request.storage is not None:
            await self.missed(lane, "the table was rewritten, truncated, or a partition came or went")
        await requests.note_storage(self._connection, lane.column)

    async def _decide(self, lane: Lane, before: EmbeddingColumn, request: ScanRequest) -> None:
        """Whether the lane is served from now on."""
        column = lane.column
        if column.moved and not (lane.fault and lane.fault_until > self._now()):
            log.warning("%s was configured in another cluster or database: it is resolved by name", column.label)
            await requests.follow(self._connection, column.id)
            self.wake.set()
            return
        if column.fault is not None:
            await self._unusable(lane, column.fault)
            return
        if lane.fault and (lane.fault_until > self._now() and before == column):
            return
        lane.fault = ""
        if column.renamed:
            log.info("%s.%s is called %s.%s now", *column.stored_name, column.schema, column.table)
            await requests.follow(self._connection, column.id)
        if not column.enabled:
            await self._stop_serving(lane)
            return
        if not lane.served:
            await self._start_serving(lane, request)
        elif (before.schema, before.table) != (column.schema, column.table) and self._plugin == "wal2json":
            await self.missed(lane, f"the table was renamed from {before.schema}.{before.table}")
        lane.route.table_oid, lane.route.relations = column.table_oid, column.relations

    async def _start_serving(self, lane: Lane, request: ScanRequest) -> None:
        column = lane.column
        if await requests.remake_ledger(self._connection, column.id) and request.started:
            await requests.want_scan(self._connection, [column.id], "the key changed")
            lane.cast_doubt()
        lane.paused = ""
        if column.on_existing == "ask" and not request.started and await scan.holds_vectors(self._connection, column):
            lane.paused = (
                "the target column holds vectors already: set on_existing to 'replace' to have them embedded anew, or"
                " to 'adopt' to keep them, if they are this model's (cdc-embedder adopt compares a sample first)"
            )
            return
        lane.backlog = await backlog.count(self._connection, column)
        lane.forget()
        lane.route.key = tuple(key.name for key in column.key)
        lane.barrier = None
        lane.served = True
        log.info("%s is served: model %s, generation %d", column.label, column.model.name, column.generation)

    async def _stop_serving(self, lane: Lane) -> None:
        """Nothing is lost by it: the scan is requested first, durably."""
        if lane.served or lane.scan.counted or not lane.scan.wanted:
            await requests.want_scan(self._connection, [lane.column.id], "the column was not served")
            lane.cast_doubt()
        lane.served, lane.covered = False, None
        self._forget(lane)

    def _forget(self, lane: Lane) -> None:
        """Nothing more is put on the waiting list of a lane that is not served, and what is there goes."""
        self._changed()
        lane.forget()

    def _release(self, positions: Iterable[Position]) -> None:
        """Changes whose keys could not be told hold the watermark no longer."""
        for position in positions:
            self.watermark.release(position)

    async def _unusable(self, lane: Lane, reason: str) -> None:
        """Rule 11: a table that lost its identity is taken out of the publication at once."""
        if lane.fault != reason:
            log.error("%s: %s", lane.column.label, reason)
        lane.fault = lane.last_error = reason
        if lane.column.published and lane.column.refuses_updates:
            await requests.unpublish(self._connection, self._slot, lane.column.schema, lane.column.table)
        await self._stop_serving(lane)

    async def _cover(self) -> None:
        """Publish what is not published, note where the stream covers a table from now on, scan where it does not."""
        fresh = []
        for lane in self.lanes.values():
            covered = self._covers(lane.column) if lane.served else None
            if covered is None:
                continue
            if lane.covered is not None and lane.covered is not covered:
                await self.missed(lane, "the stream did not cover the table for a while")
            lane.covered, lane.uncovered = covered, ""
            if not covered:
                await self._without_stream(lane)
            elif lane.barrier is None and not lane.scan.counted:
                fresh.append(lane)
        if fresh:
            row = await one(self._connection, "SELECT pg_current_xact_id()::text::int8")
            assert row is not None
            for lane in fresh:
                lane.barrier = int(row[0])

    async def _without_stream(self, lane: Lane) -> None:
        """Scans alone feed the column; one of them is as good as another."""
        column = lane.column
        if column.unlogged:
            lane.uncovered = "changes are not seen: the table is unlogged, scans alone feed the column"
        else:
            if self._now() >= lane.next_publication:
                lane.next_publication = self._now() + RESCAN_SECONDS
                lane.statement = await self._publish(column)
            if lane.statement is None:
                self.wake.set()
                return
            lane.uncovered = (
                f"changes are not seen, scans alone feed the column, until its table's owner runs: {lane.statement}"
            )
        lane.barrier = 0
        if self._now() >= lane.next_scan and not lane.scan.wanted:
            lane.next_scan = self._now() + RESCAN_SECONDS
            await requests.want_scan(self._connection, [column.id], "no stream covers the table", uncover=False)
            lane.scan.wanted = True

    async def _publish(self, column: EmbeddingColumn) -> str | None:
        """Add the table to the publication, which somebody may have dropped; else what has to be run."""
        try:
            if await requests.make_publication(self._connection, self._slot):
                self.doubt("the publication was gone")
        except psycopg.errors.InsufficientPrivilege:
            return "cdc-embedder init: the publication is gone"
        return await requests.publish(self._connection, self._slot, column)

    def _load(self, lane: Lane) -> None:
        if lane.embedder is None and not lane.loading and lane.breaker.state(self._now()) != "open":
            lane.loading = True
            task = asyncio.create_task(self._load_model(lane, lane.column))
            self._loads.add(task)
            task.add_done_callback(self._loads.discard)

    async def _load_model(self, lane: Lane, column: EmbeddingColumn) -> None:
        """Load in a thread; what was loaded must be what this generation was embedded with before."""
        try:
            embedder = await asyncio.to_thread(self._embedders.get, column.model)
            lane.breaker.succeeded()
            lane.trouble = ""
            recorded = await requests.weights(self._connection, column.id, column.generation, embedder.identity)
            if lane.column.model != column.model:
                return
            if recorded is not None and recorded != embedder.identity:
                raise ColumnFault(
                    f"the model {column.model.name} is not the one that the vectors were made with"
                    f" ({embedder.identity}, not {recorded})",
                    hint="pin its revision in the model table, or change the row to start a new generation",
                )
            lane.embedder, lane.loaded = embedder, self._now()
            log.info("%s: the model %s runs %s", column.label, column.model.name, embedder.engine)
        except ColumnFault as problem:
            await self.fail(lane, problem)
        except psycopg.Error as error:
            log.info("%s", from_database(error, "noting which model was loaded").sentence)
        except Problem as problem:
            log.warning("%s: %s", column.label, problem.sentence)
            lane.last_error = lane.trouble = problem.sentence
            lane.breaker.failed(self._now())
        except Exception as error:
            # what a library raised may quote anything: its kind has to do
            await self.fail(lane, ModelFault(f"the model {column.model.name} cannot be loaded: {type(error).__name__}"))
        finally:
            lane.loading = False
            self._changed()
