"""The scan of each column: backfill, and every later doubt about what the stream has told. Rule 10.

A pass pages through the table and hands the keys that are not current to the waiting list; they are judged and embedded
like any others. A pass *counts* only when the snapshot it began under saw the end of every transaction that was open
when the stream came to cover the table (`Lane.barrier`): their changes may be in neither. An earlier pass is a head
start. After a pass that counts, ledger rows without a source row are swept. Where the user wants it, the first passes
take over the vectors that are there (`rows.adoption`), each page before it is read.

The scan never ends: when nobody asked for one for a period, a routine pass goes over the table at a pace that a server
does not notice. Every few seconds a pass lets its keys be judged and notes where it is, durably: one that is broken off
goes on from there, unless its request, the generation or the key is another by then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import psycopg

from cdc_embedder import failpoints
from cdc_embedder.database_errors import from_database
from cdc_embedder.errors import ColumnFault, Problem, ServerGone, Temporary
from cdc_embedder.lane import Lane
from cdc_embedder.pending import Work
from cdc_embedder.rows import adoption, requests, scan
from cdc_embedder.rows.session import Connection, one
from cdc_embedder.rows.writeback import Term

log = logging.getLogger(__name__)

AHEAD = 4 * scan.PAGE
"""How many scanned keys may wait before the scan pauses."""

TICK_SECONDS = 0.2

CHECKPOINT_SECONDS = 5.0
"""How often a pass notes where it is."""

ROUTINE_SHARE = 0.25
"""Of the period: a routine pass takes so long, unless that would be slower than one page a second."""


class Scanner:
    """Runs the passes of all lanes on one session, one lane at a time for a page."""

    def __init__(
        self,
        connection: Connection,
        lanes: Callable[[], list[Lane]],
        now: Callable[[], float],
        wake: Callable[[], None],
        fail: Callable[[Lane, Problem], Awaitable[None]],
        period_s: float,
        term: Term,
    ) -> None:
        self._connection = connection
        self._lanes = lanes
        self._now = now
        self._wake = wake
        self._fail = fail
        self._period_s = period_s
        self._term = term
        self._passes: dict[int, Pass] = {}

    async def run(self) -> None:
        """For ever: a page of each lane that wants one, in turn. Raises ServerGone; other trouble is one lane's."""
        while True:
            lanes = {lane.column.id: lane for lane in self._lanes()}
            self._passes = {id: p for id, p in self._passes.items() if lanes.get(id) is p.lane and p.lane.served}
            rest = TICK_SECONDS
            for lane in lanes.values():
                try:
                    rest = min(rest, await self._step(lane))
                except psycopg.Error as error:
                    await self._trouble(lane, from_database(error, f"scanning {lane.column.label}", of_rows=True))
                except ColumnFault as problem:
                    await self._trouble(lane, problem)
            await asyncio.sleep(rest)

    async def _trouble(self, lane: Lane, problem: Problem) -> None:
        """The pass is given up; unless the trouble passes, so is the column until it can be served again."""
        self._passes.pop(lane.column.id, None)
        if isinstance(problem, ServerGone):
            raise problem
        if isinstance(problem, Temporary):
            log.info("%s; trying again", problem.sentence)
        else:
            await self._fail(lane, problem)

    async def _step(self, lane: Lane) -> float:
        """One page, or one look at whether a pass is over; returns the seconds until the next is wanted."""
        if not lane.served:
            return TICK_SECONDS
        current = self._passes.get(lane.column.id)
        if current is None:
            if lane.barrier is None and not lane.scan.counted:
                return TICK_SECONDS  # the stream is about to cover the table: a pass that began before would not count
            if not lane.scan.wanted and self._now() < lane.scan.due:
                return TICK_SECONDS
            self._passes[lane.column.id] = await Pass.begin(
                self._connection, lane, self._now(), self._period_s, self._term
            )
            return 0.0
        if current.column is not lane.column or (current.routine and lane.scan.wanted):
            del self._passes[lane.column.id]  # another generation or shape, or somebody waits for it: begin anew
            return 0.0
        if (early := current.next_at - self._now()) > 0:
            return early
        if current.swept is not None:
            return await self._end(current)
        if current.enumerated or current.checkpoint_at <= self._now():
            if not lane.scan_drained():
                return TICK_SECONDS
            if not current.enumerated:
                await current.checkpoint(self._connection, self._now())
                return 0.0
            return await self._may_end(current)
        if lane.pending.waiting(Work.SCAN) >= AHEAD:
            return TICK_SECONDS
        await current.page(self._connection, self._now)
        self._wake()
        return 0.0

    async def _may_end(self, current: Pass) -> float:
        """Every row was judged. Where the pass does not count another one is needed, once the barrier is passed."""
        lane = current.lane
        if lane.covered is None:
            return TICK_SECONDS  # not known yet: a pass that ended now would not count
        if lane.scan.counted or current.sound:
            await current.sweep(self._connection, self._now)
            return 0.0
        lane.waiting_for = "waiting for transactions that were open when the column was configured"
        if lane.barrier is not None and await _oldest_xid(self._connection) > lane.barrier:
            del self._passes[lane.column.id]
            return 0.0
        return TICK_SECONDS  # a head start; look again

    async def _end(self, current: Pass) -> float:
        """Sweep on; after the last page the scan is complete."""
        if not current.swept:
            await current.sweep(self._connection, self._now)
            return 0.0
        lane = current.lane
        if not (lane.scan.counted or current.sound):
            del self._passes[lane.column.id]  # a doubt came while it swept
            return 0.0
        lane.scan.counted = lane.covered is True
        lane.scan.current = lane.scan.rows - lane.scan.null - lane.scan.failed
        await requests.scan_finished(self._connection, lane, current.request)
        del self._passes[lane.column.id]
        lane.waiting_for = ""
        lane.scan.running = lane.scan.wanted = lane.scan.routine = False
        lane.scan.due = self._now() + self._period_s
        told = log.debug if current.routine else log.info
        told("scan of %s complete: %d rows, %d without text", lane.column.label, lane.scan.rows, lane.scan.null)
        if current.adopting:
            log.info("%s: no more vectors are adopted", lane.column.label)
        return 0.0


class Pass:
    """One pass over one table."""

    def __init__(
        self, lane: Lane, request: str, oldest_xid: int, now: float, rows_per_s: float | None, term: Term
    ) -> None:
        self.lane = lane
        self.column = lane.column
        self.request = request
        self.routine = rows_per_s is not None
        self.enumerated = False
        self.swept: bool | None = None
        self.next_at = now
        self.checkpoint_at = now + CHECKPOINT_SECONDS
        self._began_sound = lane.barrier is not None and oldest_xid > lane.barrier
        self._doubts = lane.doubts
        self.adopting = False
        self._term = term
        self._rows_per_s = rows_per_s
        self._after: tuple[str, ...] | None = None
        self._swept_to: tuple[str, ...] | None = None

    @property
    def sound(self) -> bool:
        """Whether the pass may be the one after which nothing is missing."""
        return self._began_sound and self._doubts == self.lane.doubts

    @classmethod
    async def begin(cls, connection: Connection, lane: Lane, now: float, period_s: float, term: Term) -> Pass:
        """Start a pass, or go on with the one that was broken off."""
        rows_per_s = None if lane.scan.wanted else max(float(scan.PAGE), lane.scan.rows / (ROUTINE_SHARE * period_s))
        request, unfinished = await requests.scan_started(connection, lane.column.id)
        self = cls(lane, request, await _oldest_xid(connection), now, rows_per_s, term)
        self.adopting = await adoption.wanted(connection, lane.column)
        progress = lane.scan
        progress.running, progress.routine = True, self.routine
        counts = [0] * 5
        if unfinished is not None and (unfinished.generation, unfinished.key) == (lane.column.generation, self._key()):
            self._after, self._began_sound = tuple(unfinished.position), unfinished.sound
            counts = unfinished.counts
            log.info("scan of %s goes on after %d rows", lane.column.label, counts[0])
        progress.rows, progress.null, progress.current, progress.failed, progress.truncated = counts
        return self

    def _key(self) -> list[str]:
        return [f"{key.name} {key.type}" for key in self.column.key]

    async def page(self, connection: Connection, now: Callable[[], float]) -> None:
        """Read the next page and put the keys that are not current on the waiting list."""
        began = now()
        if self.adopting:
            adopted = await adoption.page(connection, self.column, self._term, self._after)
            log.debug("%s: %d vectors adopted", self.column.label, adopted)
        found = await scan.page(connection, self.column, self._after)
        failpoints.reached("scanned")
        if self.lane.column is not self.column:
            return  # the key may be another one: the pass is over
        for key in found.wanted:
            self.lane.pending.want(key, Work.SCAN, now())
        progress = self.lane.scan
        progress.rows += found.rows
        progress.null += found.null
        progress.current += found.current
        progress.failed += found.failed
        progress.truncated += found.truncated
        self.enumerated = found.last is None
        self._after = found.last if found.last is not None else self._after
        self._pace(began, now())

    async def checkpoint(self, connection: Connection, now: float) -> None:
        """Every row so far was judged: note it, so that a restart goes on from here. Not for a mere head start."""
        self.checkpoint_at = now + CHECKPOINT_SECONDS
        if self._after is None or not (self.sound or self.lane.scan.counted):
            return
        progress = self.lane.scan
        counts = [progress.rows, progress.null, progress.current, progress.failed, progress.truncated]
        position = requests.Unfinished(
            self.request, self.column.generation, self._key(), list(self._after), self.sound, counts
        )
        await requests.scan_checkpoint(connection, self.column.id, position)
        failpoints.reached("checkpoint")

    async def sweep(self, connection: Connection, now: Callable[[], float]) -> None:
        """Remove the ledger rows whose source row is gone, of the next page; `swept` says whether that was the last."""
        began = now()
        self._swept_to, _ = await scan.sweep(connection, self.column, self._swept_to)
        self.swept = self._swept_to is None
        self._pace(began, now())

    def _pace(self, began: float, ended: float) -> None:
        """A routine pass keeps its pace; one that is waited for leaves the server half of the time."""
        if self._rows_per_s is not None:
            self.next_at = began + scan.PAGE / self._rows_per_s
        else:
            self.next_at = ended + (ended - began)


async def _oldest_xid(connection: Connection) -> int:
    """Every transaction with a lower xid has ended. 64 bits."""
    row = await one(connection, "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::int8")
    assert row is not None
    return int(row[0])
