"""What has to be there before the stream is opened: a server that can, our schema, the lock, the slot.

The order matters where something is made anew: first the scan of every column is requested, durably, then the slot is
made; a crash between the two costs a scan, never a row. The publication stands before the slot does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from dataclasses import dataclass

import psycopg

from cdc_embedder import standby as standbys
from cdc_embedder.errors import Misconfigured
from cdc_embedder.lsn import LSN
from cdc_embedder.rows import backlog, requests
from cdc_embedder.rows.session import Connection, connect, one
from cdc_embedder.wal import slot as slots
from cdc_embedder.wal.diagnosis import PluginRefused

log = logging.getLogger(__name__)

OLDEST_SERVER = 140000
SCHEMA_VERSION = 3
"""The migration that this package needs; an older schema is to be migrated, a newer one wants a newer package."""

PATIENCE_SECONDS = 86_400.0
"""How long the making of a slot may wait for open transactions; trying again sooner would only wait longer."""


@dataclass(frozen=True, slots=True)
class Taken:
    """The slot as it stands when the service has it."""

    slot: str
    plugin: str
    server_encoding: str
    confirmed: LSN | None


async def check_server(connection: Connection) -> bool:
    """Whether our schema is of this version; False where it is older.

    Raises Misconfigured where the server or our schema in it cannot be worked with.
    """
    version = connection.info.server_version
    if version < OLDEST_SERVER:
        raise Misconfigured(f"the server is PostgreSQL {version // 10000}; 14 is the oldest that can be served")
    row = await one(connection, "SELECT pg_is_in_recovery(), to_regclass('cdc_embedder.migration') IS NOT NULL")
    assert row is not None
    if row[0]:
        raise Misconfigured(
            "the server is a standby: vectors cannot be written back to it",
            hint="name the primary in CDC_EMBEDDER_DSN; target_session_attrs=read-write finds it among several",
        )
    if not row[1]:
        raise Misconfigured("the schema cdc_embedder is not installed in this database", hint="run: cdc-embedder init")
    found = await one(connection, "SELECT max(version) FROM cdc_embedder.migration")
    installed = int(found[0] or 0) if found else 0
    if installed > SCHEMA_VERSION:
        raise Misconfigured(
            f"the schema is of version {installed}, newer than this cdc-embedder knows ({SCHEMA_VERSION})",
            hint="install the newer cdc-embedder",
        )
    return installed == SCHEMA_VERSION


async def take_advisory_lock(connection: Connection, slot: str) -> bool:
    """The lock beside the slot, held as long as the session lives; False where another instance has it."""
    row = await one(connection, "SELECT pg_try_advisory_lock(hashtextextended('cdc_embedder:' || $1, 0))", (slot,))
    return bool(row and row[0])


async def take_slot(
    connection: Connection,
    standby: Connection | None,
    dsn: str,
    slot: str,
    plugin: str,
    refused: Collection[str],
    *,
    spoiled: bool = False,
) -> Taken:
    """Find the slot, or make it: an existing slot's plugin wins, unless the server is known to have `refused` it.

    `standby`: a session where the slot is, if that is not the primary. `spoiled`: the slot cannot get past some change,
    and is made anew.

    Raises Problem; Misconfigured where an operator must act.
    """
    row = await one(connection, "SELECT getdatabaseencoding()")
    assert row is not None
    encoding = str(row[0])
    if standby is not None:
        await standbys.wait_until_followed(connection, standby, slot)
        await standbys.leave_primary(connection, slot)
    there = connection if standby is None else standby
    found = await slots.inspect(there, slot)
    if standby is not None and found is not None:
        standbys.refuse_copy(found)
    if encoding == "SQL_ASCII" and found is None and plugin == "auto":
        plugin = "pgoutput"
    asked = found.plugin if found is not None else plugin
    if encoding == "SQL_ASCII" and asked == "wal2json" and "wal2json" not in refused:
        raise PluginRefused(
            "the database's encoding is SQL_ASCII: the JSON of wal2json may be no text at all there",
            hint="the slot is made anew with pgoutput, unless output_plugin forbids it",
        )
    if found is not None and found.logical and found.plugin not in slots.PLUGINS:
        raise Misconfigured(
            f"the slot {slot} uses the output plugin {found.plugin}, which is not understood",
            hint="give CDC_EMBEDDER_SLOT another name, or drop the slot",
        )
    if found is not None and (found.lost or found.plugin in refused or spoiled):
        if found.plugin in refused:
            await slots.probe(there, slot, "pgoutput")  # what cannot be replaced is not dropped
        await _drop_slot(connection, there, found, "is stuck" if spoiled else f"uses {found.plugin}, refused now")
        found = None
    if found is None or found.plugin is None:
        used = await _make_slot(connection, standby, dsn, slot, "pgoutput" if refused else plugin)
    else:
        used = found.plugin
    await standbys.note_slot(connection, slot, None if standby is None else used)
    await _settle_publication(connection, slot, used)
    await _look_at_history(connection, slot)
    return Taken(slot, used, encoding, found.confirmed_flush_lsn if found is not None else None)


async def _drop_slot(connection: Connection, there: Connection, found: slots.Slot, reason: str) -> None:
    """Drop a slot that is to be made anew, when a scan of every column is requested. `reason`: if it was not lost."""
    if found.lost:
        reason = f"was invalidated ({found.invalidation_reason})"
    log.error("the slot %s %s: it is made anew, and everything is scanned", found.name, reason)
    await _want_all(connection, found.name, "the slot was made anew")
    await slots.drop(there, found.name)
    await standbys.note_dropped(connection, found.name)


async def _make_slot(connection: Connection, standby: Connection | None, dsn: str, slot: str, plugin: str) -> str:
    """Request a scan of every column, then make the publication and the slot; returns the plugin used."""
    await _want_all(connection, slot, "the slot was made anew")
    await _make_publication(connection, slot)
    log.info("making the slot %s%s", slot, "" if standby is None else " on the standby")
    patience = asyncio.create_task(_explain_waiting(dsn))
    try:
        if standby is None:
            used = await slots.create(connection, slot, plugin, timeout_s=PATIENCE_SECONDS)
        else:
            used = await standbys.create(connection, standby, slot, plugin, timeout_s=PATIENCE_SECONDS)
    finally:
        patience.cancel()
    log.info("made the slot %s with the plugin %s", slot, used)
    return used


async def _look_at_history(connection: Connection, slot: str) -> None:
    """Rule 10: after a failover, a restore or an upgrade the slot may be there and yet have missed something."""
    if await requests.elsewhere(connection, slot):
        log.warning(
            "the slot %s was served on another timeline, cluster or database before: everything is scanned", slot
        )
        await _want_all(connection, slot, "another timeline, cluster or database")
        await backlog.forget_transactions(connection, slot)


async def _explain_waiting(dsn: str) -> None:
    """Say whom the making of the slot waits for, if it does."""
    await asyncio.sleep(3)
    async with await connect(dsn, "waiting") as connection:
        while True:
            for sentence in await slots.blockers(connection):
                log.warning("making the slot waits: %s", sentence)
            await asyncio.sleep(30)


async def _want_all(connection: Connection, slot: str, reason: str) -> None:
    cursor = await connection.execute("SELECT id FROM cdc_embedder.embedding_column WHERE slot = $1", (slot,))
    await requests.want_scan(connection, [row[0] for row in await cursor.fetchall()], reason)


async def _make_publication(connection: Connection, slot: str) -> None:
    try:
        await requests.make_publication(connection, slot)
    except psycopg.errors.InsufficientPrivilege as error:
        raise Misconfigured(
            f"the publication {slot} is missing and the service's role may not create it", hint="run: cdc-embedder init"
        ) from error


async def _settle_publication(connection: Connection, slot: str, plugin: str) -> None:
    """Rule 11: with wal2json no publication is needed, so no table stands in it."""
    if plugin != "wal2json":
        await _make_publication(connection, slot)
        return
    cursor = await connection.execute(
        "SELECT n.nspname, c.relname FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid"
        " JOIN pg_class c ON c.oid = r.prrelid JOIN pg_namespace n ON n.oid = c.relnamespace WHERE p.pubname = $1",
        (slot,),
    )
    for schema, table in await cursor.fetchall():
        await requests.unpublish(connection, slot, schema, table)
