"""What `status` shows about the running service, written at most once a second and only when it changed.

An idle service writes nothing, so that the server's WAL position stands still.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cdc_embedder.lane import Lane
from cdc_embedder.lsn import LSN, ZERO
from cdc_embedder.rows import backlog, requests
from cdc_embedder.rows.session import Connection

PERIOD_SECONDS = 1.0


class Reporter:
    """`lanes` are the columns; `position` is (received, confirmed, changes of watched tables so far)."""

    def __init__(
        self,
        connection: Connection,
        slot: str,
        service: str,
        lanes: Callable[[], list[Lane]],
        position: Callable[[], tuple[LSN, LSN, int]],
        now: Callable[[], float],
    ) -> None:
        self._connection = connection
        self._slot = slot
        self._service = service
        self._lanes = lanes
        self._position = position
        self._now = now
        self._told: dict[int, object] = {}
        self._embedded: dict[int, int] = {}
        self._rates: dict[int, float] = {}
        self._progress: tuple[LSN, LSN, int] | None = None
        self.embedded_through = ZERO
        """Everything that was committed before this position is embedded, as far as this connection knows."""

    async def run(self) -> None:
        """For ever. Raises psycopg.Error as it comes."""
        while True:
            await asyncio.sleep(PERIOD_SECONDS)
            await self.once()

    async def once(self) -> None:
        """Write what changed since the last time."""
        for lane in self._lanes():
            await self._lane(lane)
        await self.note()

    async def note(self, news: int | None = None) -> None:
        """Write how far the slot is, where changes came meanwhile or a backlog was worked off; or where it is `news`
        bytes further."""
        received, confirmed, changes = self._position()
        spilled = [await backlog.spilled_from(self._connection, lane.column) for lane in self._lanes() if lane.backlog]
        embedded = min([confirmed, *(lsn for lsn in spilled if lsn is not None)])
        self.embedded_through = embedded
        if self._progress is not None:
            last_embedded, last_confirmed, last_changes = self._progress
            drained = last_embedded < last_confirmed and embedded > last_embedded
            further = confirmed - last_confirmed
            if not drained and (further <= 0 or (changes == last_changes and (news is None or further < news))):
                return
        await requests.progress(self._connection, self._slot, received, embedded, confirmed, self._service)
        self._progress = embedded, confirmed, changes

    async def _lane(self, lane: Lane) -> None:
        id, scan = lane.column.id, lane.scan
        embedded = lane.meter.embedded
        done = embedded - self._embedded.get(id, embedded)
        self._embedded[id] = embedded
        rate = 0.6 * self._rates.get(id, 0.0) + 0.4 * done / PERIOD_SECONDS
        self._rates[id] = rate = rate if rate >= 0.1 else 0.0
        oldest = lane.pending.oldest
        oldest_s = None if oldest is None else round(self._now() - oldest, 3)
        counts = (scan.rows, scan.null, scan.current, scan.failed, scan.truncated)
        breaker = lane.breaker.state(self._now())
        engine = None if lane.embedder is None else lane.embedder.engine
        told = (
            lane.state,
            engine,
            lane.outstanding,
            lane.backlog,
            oldest_s,
            round(rate, 2),
            breaker,
            counts,
            lane.last_error,
        )
        if told != self._told.get(id):
            await requests.report(self._connection, lane, oldest_s, round(rate, 2), breaker)
            self._told[id] = told
