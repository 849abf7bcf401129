"""A slot on a standby (PostgreSQL 16 and up), which then decodes for us and keeps the WAL that we still need.

The primary shows nothing of such a slot. What SQL there has to know is told by us: that there is one (a row, since it
must be dropped one day), that it is read (a lock, which ends with us), and how far (noted while somebody waits for it,
and whenever it is NEWS_BYTES further).
"""

from __future__ import annotations

import asyncio
import logging
import time

import psycopg
from psycopg.conninfo import make_conninfo

from cdc_embedder.errors import Misconfigured, Temporary
from cdc_embedder.reporting import PERIOD_SECONDS, Reporter
from cdc_embedder.rows.session import Connection, connect, one
from cdc_embedder.wal import slot as slots

log = logging.getLogger(__name__)

OLDEST = 160000
"""The first version that decodes on a standby."""

NEWS_BYTES = 1 << 20
"""Far more than the note of it adds to the WAL: an idle service writes nothing."""

AWAITED_SECONDS = 0.05
LOOK_SECONDS = 0.1
TELL_SECONDS = 5.0
TELL_AGAIN_SECONDS = 30.0


async def open_standby(primary: Connection, dsn: str, **settings: str) -> Connection | None:
    """A session on the standby of `primary` that `dsn` leads to; None where that is the way to `primary` itself.
    `settings` as of `connect`.

    Raises Misconfigured where it leads anywhere else, Problem where nothing answers.
    """
    other = await connect(dsn, "standby", **settings)
    try:
        here, there = await one(primary, _WHO), await one(other, _WHO)
        if here == there:
            await other.close()
            return None
        assert here is not None
        assert there is not None
        if here[:2] != there[:2] or not there[2]:
            raise Misconfigured(
                "the replication connection leads to another server or database than the one that is written to",
                hint="CDC_EMBEDDER_REPLICATION_DSN is another way to the primary, past a pooler say, or leads to a"
                " standby of it, to the same database",
            )
        if other.info.server_version < OLDEST:
            raise Misconfigured(
                "the replication connection leads to a standby, which decodes from PostgreSQL 16 on",
                hint="unset CDC_EMBEDDER_REPLICATION_DSN",
            )
    except BaseException:
        await other.close()
        raise
    return other


_WHO = """
SELECT s.system_identifier, current_database(), pg_is_in_recovery(), pg_postmaster_start_time()
  FROM pg_control_system() s
"""


def pinned_to(standby: Connection, dsn: str) -> str:
    """`dsn`, which may name several servers, for the one that `standby` is connected to."""
    info = standby.info
    return make_conninfo(dsn, host=info.host, hostaddr=info.hostaddr, port=info.port, target_session_attrs="any")


async def wait_until_followed(primary: Connection, standby: Connection, slot: str) -> None:
    """Return when `standby` has replayed what is committed on `primary` now, which only one that follows it can.

    A clone that went its own way has the same identifier, and would deliver another history. Raises psycopg.Error.
    """
    row = await one(
        primary,
        "INSERT INTO cdc_embedder.standby_slot (slot, proof) VALUES ($1, gen_random_uuid())"
        " ON CONFLICT (slot) DO UPDATE SET proof = excluded.proof RETURNING proof::text",
        (slot,),
    )
    assert row is not None
    began = time.monotonic()
    told = began + TELL_SECONDS - TELL_AGAIN_SECONDS
    while not await _shows(standby, slot, row[0]):
        now = time.monotonic()
        if now >= told + TELL_AGAIN_SECONDS:
            told = now
            log.warning(
                "the standby has not replayed what was committed on the primary %.0f seconds ago: it lags, or does not"
                " follow this primary",
                now - began,
            )
        await asyncio.sleep(LOOK_SECONDS)
        await primary.execute("SELECT")  # or its idle_session_timeout would end it


async def _shows(standby: Connection, slot: str, proof: str) -> bool:
    try:
        shown = await one(
            standby, "SELECT FROM cdc_embedder.standby_slot WHERE slot = $1 AND proof = $2::uuid", (slot, proof)
        )
    except (psycopg.errors.InvalidSchemaName, psycopg.errors.UndefinedTable):  # `init` was a moment ago
        return False
    return shown is not None


async def leave_primary(primary: Connection, slot: str) -> None:
    """Drop the slot that an earlier service read on the primary: nobody reads it any more. Raises Problem."""
    row = await one(primary, "SELECT current_database()")
    found = await slots.inspect(primary, slot)
    if row is not None and found is not None and found.plugin in slots.PLUGINS and found.database == row[0]:
        await slots.drop(primary, slot)
        log.info("the slot %s is read on a standby from now on: the one on the primary is dropped", slot)


def refuse_copy(found: slots.Slot) -> None:
    """Raises Temporary for a slot that the server keeps as the copy of one on its primary (17 and up)."""
    if found.synced:
        raise Temporary(
            f"the slot {found.name} on the standby is the copy of one that was on the primary: once that is gone the"
            " standby drops it, if sync_replication_slots is on"
        )


async def note_slot(primary: Connection, slot: str, plugin: str | None) -> None:
    """With which plugin the slot is read on a standby; None: on the primary."""
    if plugin is not None:
        await primary.execute("UPDATE cdc_embedder.standby_slot SET plugin = $2 WHERE slot = $1", (slot, plugin))
        return
    if await one(primary, "DELETE FROM cdc_embedder.standby_slot WHERE slot = $1 RETURNING slot", (slot,)) is not None:
        log.warning(LEFT_BEHIND, slot)


LEFT_BEHIND = (
    "the slot %s was read on another server before: where it is still there it holds back WAL, until somebody calls"
    " pg_drop_replication_slot in it"
)


async def note_dropped(primary: Connection, slot: str) -> None:
    """The slot on the standby is no more: nobody has to be told where it is."""
    await primary.execute("UPDATE cdc_embedder.standby_slot SET plugin = NULL WHERE slot = $1", (slot,))


async def create(primary: Connection, standby: Connection, slot: str, plugin: str, *, timeout_s: float) -> str:
    """As `wal.slot.create`, where everything that is committed on the primary now stands on the standby."""
    noted = "SELECT FROM cdc_embedder.standby_slot WHERE slot = $1 AND plugin IS NOT NULL"
    if await one(primary, noted, (slot,)) is not None:
        log.warning(LEFT_BEHIND, slot)
    await wait_until_followed(primary, standby, slot)
    async with asyncio.TaskGroup() as group:
        snapshots = group.create_task(_log_snapshots(primary))
        used = await slots.create(standby, slot, plugin, timeout_s=timeout_s)
        snapshots.cancel()
    return used


async def _log_snapshots(primary: Connection) -> None:
    """For ever: have the primary log which transactions run. Without such records no slot comes to be on a standby.

    Where the role may not, what is written has the background writer do it, within 15 seconds.
    """
    row = await one(primary, "SELECT has_function_privilege('pg_log_standby_snapshot()', 'EXECUTE')")
    assert row is not None
    call = "pg_log_standby_snapshot()" if row[0] else "pg_logical_emit_message(true, 'cdc-embedder wake', '')"
    while True:
        await primary.execute(f"SELECT {call}".encode())
        await asyncio.sleep(1)


class Announcing:
    """Tells SQL on the primary that the slot is read, and how far. Its session holds the lock that says so."""

    def __init__(self, session: Connection, slot: str, reporter: Reporter, streaming: asyncio.Event) -> None:
        """`streaming`: the stream was opened."""
        self._session = session
        self._slot = slot
        self._reporter = reporter
        self._streaming = streaming

    async def run(self) -> None:
        """For ever. Raises psycopg.Error as it comes."""
        await self._streaming.wait()
        # shared: the session of a predecessor that is frozen may have it still
        await self._session.execute(
            "SELECT pg_advisory_lock_shared(hashtextextended('cdc_embedder reads ' || $1, 0))", (self._slot,)
        )
        while True:
            awaited = await one(self._session, _SOMEBODY_WAITS) is not None
            await self._reporter.note(news=1 if awaited else NEWS_BYTES)
            await asyncio.sleep(AWAITED_SECONDS if awaited else PERIOD_SECONDS)


_SOMEBODY_WAITS = (
    "SELECT FROM pg_locks l JOIN pg_database d ON d.oid = l.database AND d.datname = current_database()"
    " WHERE l.locktype = 'advisory' AND (l.classid, l.objid, l.objsubid) = (1667523429, 2, 2) AND l.granted LIMIT 1"
)
