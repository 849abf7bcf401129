"""Rule 8: the slot cannot fill the disk. Keys leave memory for the backlog, and come back from it.

What holds the slot for longer than `after_s`, or does not fit into memory, is written to the column's backlog table;
when that is durable, and not before, the watermark may pass it. It comes back as repair work, behind live changes, when
its model can be asked and there is room. A row leaves the backlog only after its key was judged done.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

import psycopg

from cdc_embedder import failpoints
from cdc_embedder.database_errors import from_database
from cdc_embedder.lane import Lane
from cdc_embedder.pending import Work
from cdc_embedder.pipeline import RETRY_SECONDS, Pipeline
from cdc_embedder.rows import backlog
from cdc_embedder.rows.session import Connection
from cdc_embedder.rows.writeback import Term

log = logging.getLogger(__name__)

now = time.monotonic

TICK_SECONDS = 0.25
"""How often it is looked whether keys wait for too long, and whether some may come back."""

AHEAD = 2 * backlog.PAGE
"""How many keys of repair work may wait before no more are taken from the backlog."""


class Spiller:
    """`spill` and `drain` run side by side with a pipeline, each on a session of its own."""

    def __init__(self, pipeline: Pipeline, term: Term, after_s: float) -> None:
        self._pipeline = pipeline
        self._term = term
        self._after_s = after_s

    async def spill(self, connection: Connection) -> None:
        """For ever: spill what is due. Raises ServerGone, and SlotBusy where the term is over.

        Other trouble leaves the keys where they are, unconfirmed.
        """
        pipeline = self._pipeline
        while True:
            pipeline.full.clear()
            spilled = 0
            for lane in sorted(pipeline.lanes, key=lambda lane: -lane.pending.unfinished(Work.LIVE)):
                since = now() - (0.0 if pipeline.crowded and not spilled else self._after_s)
                try:
                    spilled += await self._spill(connection, lane, since)
                except psycopg.Error as error:
                    await pipeline.trouble(
                        lane, from_database(error, f"spilling keys of {lane.column.label}", of_rows=True)
                    )
                    await asyncio.sleep(RETRY_SECONDS)
            if spilled:
                pipeline.confirm()
                pipeline.room.set()
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(TICK_SECONDS):
                        await pipeline.full.wait()

    async def drain(self, connection: Connection) -> None:
        """For ever: take keys up again, and remove the rows of those that are done."""
        pipeline = self._pipeline
        while True:
            pipeline.settled.clear()
            taken = 0
            for lane in pipeline.lanes:
                try:
                    await self._settle(connection, lane)
                    taken += await self._take(connection, lane)
                except psycopg.Error as error:
                    await pipeline.trouble(
                        lane, from_database(error, f"reading the backlog of {lane.column.label}", of_rows=True)
                    )
            if taken:
                pipeline.wake()
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(TICK_SECONDS):
                        await pipeline.settled.wait()

    async def settle(self, connection: Connection) -> None:
        """Remove the rows of the keys that are done, of every column, once."""
        for lane in self._pipeline.lanes:
            await self._settle(connection, lane)

    async def _spill(self, connection: Connection, lane: Lane, since: float) -> int:
        spills = lane.pending.holding(since, backlog.SPILL)
        if not spills:
            return 0
        failpoints.reached("spilling")
        column = lane.column
        first, fresh = await backlog.spill(connection, column, self._term, spills)
        failpoints.reached("spilled")
        if lane.backlog == 0:
            log.info("%s: keys wait for too long: they are kept in the backlog, and the slot moves on", column.label)
        lane.backlog += fresh
        lane.meter.spilled += len(spills)
        lane.pending.spilled([(spill, first + n) for n, spill in enumerate(spills)])
        return len(spills)

    async def _settle(self, connection: Connection, lane: Lane) -> None:
        settled, lane.settled = lane.settled[: backlog.SPILL], lane.settled[backlog.SPILL :]
        if settled:
            lane.backlog -= await backlog.remove(connection, lane.column, settled)
            failpoints.reached("settled")
            if lane.backlog <= 0:
                lane.backlog = await backlog.count(connection, lane.column)
                if lane.backlog == 0:
                    log.info("%s: the backlog is empty", lane.column.label)

    async def _take(self, connection: Connection, lane: Lane) -> int:
        pending, column = lane.pending, lane.column
        if lane.backlog <= 0 or not lane.ready(now()) or pending.unfinished(Work.REPAIR) >= AHEAD:
            return 0
        before = len(pending)
        rows = await backlog.page(connection, column, lane.drained)
        if lane.column is not column:
            return 0  # the key may be another one
        for row in rows:
            pending.restore(row.key, row.seq, row.xid, row.committed_at, now())
        if not rows and lane.drained == 0:
            lane.backlog = await backlog.count(connection, lane.column)
        lane.drained = rows[-1].seq if rows else 0
        return len(pending) - before
