"""The scan of each column: backfill, and every later doubt about what the stream has told. Rule 10.

A pass pages through the table and hands the keys that are not current to the waiting list; they are judged and embedded
like any others. A pass *counts* only when the snapshot it began under saw the end of every transaction that was open
when the stream came to cover the table (`Lane.barrier`): their changes may be in neither. An earlier pass is a head
start. After a pass that counts, ledger rows without a source row are swept.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import psycopg

from cdc_embedder.database_errors import from_database
from cdc_embedder.errors import Problem, ServerGone, Temporary
from cdc_embedder.lane import Lane
from cdc_embedder.pending import Work
from cdc_embedder.rows import requests, scan
from cdc_embedder.rows.session import Connection, one

log = logging.getLogger(__name__)

AHEAD = 4 * scan.PAGE
"""How many scanned keys may wait before the scan pauses."""

TICK_SECONDS = 0.2


class Scanner:
    """Runs the passes of all lanes on one session, one lane at a time for a page."""

    def __init__(
        self,
        connection: Connection,
        lanes: Callable[[], list[Lane]],
        now: Callable[[], float],
        wake: Callable[[], None],
        fail: Callable[[Lane, Problem], Awaitable[None]],
    ) -> None:
        self._connection = connection
        self._lanes = lanes
        self._now = now
        self._wake = wake
        self._fail = fail
        self._passes: dict[int, Pass] = {}

    async def run(self) -> None:
        """For ever: a page of each lane that wants one, in turn. Raises ServerGone; other trouble is one lane's."""
        while True:
            lanes = {lane.column.id: lane for lane in self._lanes()}
            self._passes = {id: p for id, p in self._passes.items() if lanes.get(id) is p.lane and p.lane.served}
            busy = False
            for lane in lanes.values():
                try:
                    busy |= await self._step(lane)
                except psycopg.Error as error:
                    await self._trouble(lane, from_database(error, f"scanning {lane.column.label}"))
            if not busy:
                await asyncio.sleep(TICK_SECONDS)

    async def _trouble(self, lane: Lane, problem: Problem) -> None:
        """The pass is given up; unless the trouble passes, so is the column until it can be served again."""
        self._passes.pop(lane.column.id, None)
        if isinstance(problem, ServerGone):
            raise problem
        if isinstance(problem, Temporary):
            log.info("%s; trying again", problem.sentence)
        else:
            await self._fail(lane, problem)

    async def _step(self, lane: Lane) -> bool:
        """One page, or one look at whether a pass is over; whether there is more to do at once."""
        if not lane.served:
            return False
        current = self._passes.get(lane.column.id)
        if current is None:
            if not lane.scan.wanted:
                return False
            self._passes[lane.column.id] = await Pass.begin(self._connection, lane)
            return True
        if current.column is not lane.column:  # another generation or another shape: begin anew
            del self._passes[lane.column.id]
            return True
        if current.enumerated:
            if lane.scan_drained():
                return await self._end(current)
            return False
        if lane.pending.waiting(Work.SCAN) >= AHEAD:
            return False
        await current.page(self._connection, self._now())
        self._wake()
        return True

    async def _end(self, current: Pass) -> bool:
        lane = current.lane
        if not lane.scan.counted and not current.counts:
            lane.waiting_for = "waiting for transactions that were open when the column was configured"
            if lane.barrier is None or await _oldest_xid(self._connection) <= lane.barrier:
                return False  # a head start; look again at the next tick
            del self._passes[lane.column.id]
            return True
        await current.sweep(self._connection)
        lane.scan.counted = lane.covered is True
        lane.scan.current = lane.scan.rows - lane.scan.null - lane.scan.failed
        await requests.scan_finished(self._connection, lane, current.request)
        del self._passes[lane.column.id]
        lane.waiting_for = ""
        lane.scan.running = lane.scan.wanted = False
        log.info("scan of %s complete: %d rows, %d without text", lane.column.label, lane.scan.rows, lane.scan.null)
        return False


class Pass:
    """One pass over one table."""

    def __init__(self, lane: Lane, request: object, oldest_xid: int) -> None:
        self.lane = lane
        self.column = lane.column
        self.request = request
        self.enumerated = False
        self._barrier, self._oldest_xid = lane.barrier, oldest_xid
        self._after: tuple[str, ...] | None = None

    @property
    def counts(self) -> bool:
        """Whether the pass may be the one after which nothing is missing."""
        barrier = self._barrier
        return barrier is not None and barrier == self.lane.barrier and self._oldest_xid > barrier

    @classmethod
    async def begin(cls, connection: Connection, lane: Lane) -> Pass:
        """Note which request the pass answers and how old the oldest open transaction is, in this order."""
        request = await requests.scan_started(connection, lane.column.id)
        started = cls(lane, request, await _oldest_xid(connection))
        progress = lane.scan
        progress.running = True
        progress.rows = progress.null = progress.current = progress.failed = progress.truncated = 0
        return started

    async def page(self, connection: Connection, now: float) -> None:
        """Read the next page and put the keys that are not current on the waiting list."""
        found = await scan.page(connection, self.column, self._after)
        for key in found.wanted:
            self.lane.pending.want(key, Work.SCAN, now)
        progress = self.lane.scan
        progress.rows += found.rows
        progress.null += found.null
        progress.current += found.current
        progress.failed += found.failed
        progress.truncated += found.truncated
        self._after = found.last
        self.enumerated = found.last is None

    async def sweep(self, connection: Connection) -> None:
        """Remove the ledger rows whose source row is gone."""
        after: tuple[str, ...] | None = None
        while True:
            after, _ = await scan.sweep(connection, self.column, after)
            if after is None:
                return


async def _oldest_xid(connection: Connection) -> int:
    """Every transaction with a lower xid has ended. 64 bits."""
    row = await one(connection, "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::int8")
    assert row is not None
    return int(row[0])
