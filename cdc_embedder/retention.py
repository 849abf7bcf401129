"""The lag budget: how much WAL our slots hold back, looked at every few seconds, and what is done when it is too much.

Rule 8 keeps the slot moving whatever the model does. What is left are things that no reader of a slot can help: a
transaction that stays open for hours, a disk too full for the backlog. Above the limit that the operator sets, the
slot is given up: a scan of every column is requested and the giving up noted, durably, and only then the slot dropped.
Not for a service that is stopped: there PostgreSQL's max_slot_wal_keep_size is what helps.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import psycopg

from cdc_embedder import standby as standbys
from cdc_embedder.database_errors import from_database
from cdc_embedder.errors import Problem
from cdc_embedder.installable import EMBED_SUFFIX
from cdc_embedder.lsn import LSN, ZERO
from cdc_embedder.rows import requests
from cdc_embedder.rows.session import Connection
from cdc_embedder.settings import Settings
from cdc_embedder.sizes import size
from cdc_embedder.wal import slot as slots

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0

MOST_SAMPLES = 20_000
"""Positions that are remembered to tell the lag in seconds; of more every second one is forgotten."""

REASON = "the slot was given up"


WHY = (
    "what holds it is a transaction that stays open, or a backlog that cannot be written:"
    " `cdc-embedder doctor` names it, pg_stat_activity has backend_xid and xact_start"
)


_HELD = """
SELECT s.slot_name, coalesce(greatest(pg_wal_lsn_diff(w.here, s.restart_lsn), 0), 0)::int8,
       coalesce(greatest(pg_wal_lsn_diff(coalesce($3::pg_lsn, w.here), s.confirmed_flush_lsn), 0), 0)::int8,
       s.safe_wal_size, s.wal_status, w.here::text
  FROM (SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END AS here) w
  LEFT JOIN pg_replication_slots s ON s.slot_name IN ($1, $2) AND s.database = current_database()
"""
"""$3: where the log ends on the primary, which a standby does not know."""


class OverLimit(Problem):
    """Our slots hold back more WAL than the operator allows."""


@dataclass(frozen=True, slots=True)
class Held:
    """What one slot holds back, in bytes, and on which server. `safe`: what may still be written before the server
    invalidates it."""

    slot: str
    retained: int
    lag: int
    safe: int | None
    wal_status: str | None
    on_standby: bool = False


class Retention:
    """What the slots of one service hold back. It belongs to the process; `run` to a connection."""

    def __init__(self, settings: Settings) -> None:
        self._slot = settings.slot
        self._levels = {"warn": settings.wal_warn_bytes, "alarm": settings.wal_alarm_bytes}
        self._limit = settings.wal_limit_bytes
        self._told = ""
        self._most = 0
        self._samples: deque[tuple[float, LSN]] = deque()
        self.held: list[Held] = []
        """As last looked at; empty while no connection works."""
        self.given_up = False
        """Whether the slot was given up, and nobody has said yet that it may be made again."""

    @property
    def budget(self) -> dict[str, int]:
        """The levels that are set, in bytes."""
        set_ = {level: size for level, size in self._levels.items() if size}
        return set_ if self._limit is None else set_ | {"limit": self._limit}

    def lag_seconds(self, embedded_through: LSN) -> float:
        """For how long something has been in the WAL behind `embedded_through`; to about LOOK_SECONDS."""
        samples = self._samples
        while samples and samples[0][1] <= embedded_through:
            samples.popleft()
        return time.monotonic() - samples[0][0] if samples else 0.0

    def sampled(self, position: LSN) -> None:
        """The WAL ends at `position` now."""
        self._samples.append((time.monotonic(), position))
        if len(self._samples) > MOST_SAMPLES:
            self._samples = deque(sample for n, sample in enumerate(self._samples) if n % 2 == 0)

    @property
    def remembered(self) -> int:
        return len(self._samples)

    async def run(
        self,
        connection: Connection,
        standby: Connection | None = None,
        embedded_through: Callable[[], LSN] = lambda: ZERO,
    ) -> None:
        """Look for ever, on the standby too where there is one. Raises OverLimit where the limit is passed,
        psycopg.Error as it comes."""
        try:
            while True:
                await self._look(connection, standby, embedded_through())
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            self.held = []

    async def give_up(self, connection: Connection, standby: Connection | None) -> None:
        """Drop the slots in an orderly way. Raises Problem, psycopg.Error."""
        try:
            await requests.give_up(connection, self._slot, self._most, REASON)
        except psycopg.Error as error:  # a full disk above all: whoever makes the slot again requests the scans, too
            log.error("%s", from_database(error, "noting that the slot is given up").sentence)
        await self.drop(connection, standby)

    async def drop(self, connection: Connection, standby: Connection | None) -> None:
        """Drop what is there of our slots. Raises Problem, psycopg.Error."""
        for server in filter(None, (connection, standby)):
            for name in (self._slot, self._slot + EMBED_SUFFIX):
                if await slots.drop(server, name):
                    log.error("dropped the slot %s: every column will be scanned once there is one again", name)
        if standby is not None:
            await standbys.note_dropped(connection, self._slot)

    async def _look(self, connection: Connection, standby: Connection | None, embedded_through: LSN) -> None:
        names = (self._slot, self._slot + EMBED_SUFFIX)
        found = await (await connection.execute(_HELD, (*names, None))).fetchall()
        end = found[0][5]
        held = [Held(*row[:5]) for row in found if row[0] is not None]
        if standby is not None:
            there = await (await standby.execute(_HELD, (*names, end))).fetchall()
            held += [replace(Held(*row[:5]), on_standby=True) for row in there if row[0] is not None]
        self.lag_seconds(embedded_through)  # forgets what is embedded
        self.sampled(LSN.parse(end))
        self.judge(held)

    def judge(self, held: list[Held]) -> None:
        """Say what is new about it. Raises OverLimit."""
        self.held = held
        holding = [held for held in self.held if held.wal_status != "lost"]  # what is lost holds nothing back
        most = max(holding, key=lambda held: held.retained, default=None)
        if most is None:
            return
        where = " on the standby" if most.on_standby else ""
        sentence = f"the slot {most.slot} holds back {size(most.retained)} of WAL{where}"
        if self._limit is not None and most.retained > self._limit:
            self._most = most.retained
            raise OverLimit(f"{sentence}, more than the limit of {size(self._limit)}: it is given up", hint=WHY)
        at_risk = most.wal_status == "unreserved"
        level = next((level for level in ("alarm", "warn") if 0 < self._levels[level] < most.retained), "")
        told = "alarm" if at_risk else level
        if told and told != self._told:
            status = f", its wal_status is {most.wal_status}" if at_risk else ""
            log.log(logging.ERROR if told == "alarm" else logging.WARNING, "%s%s. %s", sentence, status, WHY)
        elif self._told and not told:
            log.info("%s: within the budget again", sentence)
        self._told = told
