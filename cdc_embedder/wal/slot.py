"""The replication slot: make it, look at it, drop it, and name what is in the way.

Talks SQL over an ordinary autocommit session (any cursor factory: no parameters are bound). Not for reading from the
slot, that is `stream`; what its errors mean is told by `diagnosis`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, LiteralString

import psycopg
from psycopg import sql
from psycopg.rows import TupleRow, scalar_row, tuple_row

from cdc_embedder.errors import Problem, Temporary
from cdc_embedder.lsn import LSN
from cdc_embedder.wal.diagnosis import PluginRefused, Slot, SlotLost, Surroundings, explain

__all__ = [
    "PLUGINS",
    "PluginRefused",
    "Slot",
    "SlotLost",
    "Surroundings",
    "blockers",
    "create",
    "drop",
    "inspect",
    "look",
    "probe",
]

Connection = psycopg.AsyncConnection[Any]

PLUGINS = ("wal2json", "pgoutput")


async def inspect(conn: Connection, name: str) -> Slot | None:
    """The slot of that name, in whatever database, or None."""
    row = await _scalar(conn, "SELECT to_jsonb(s) FROM pg_catalog.pg_replication_slots s WHERE slot_name = {}", name)
    return None if row is None else _slot(row)


async def look(conn: Connection, name: str) -> Surroundings:
    """Everything that `explain` can make use of. Also works on a replication connection that is not streaming."""
    row = await _scalar(
        conn,
        "SELECT pg_catalog.jsonb_build_object("
        " 'slot', (SELECT pg_catalog.to_jsonb(s) FROM pg_catalog.pg_replication_slots s WHERE slot_name = {}),"
        " 'database', pg_catalog.current_database(), 'role', current_user,"
        # Amazon RDS grants the right by membership of a role of its own
        " 'can_replicate', EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = current_user"
        "   AND (rolreplication OR rolsuper) OR rolname = 'rds_replication' AND pg_catalog.pg_has_role(oid, 'MEMBER')),"
        " 'wal_level', pg_catalog.current_setting('wal_level'),"
        " 'max_replication_slots', pg_catalog.current_setting('max_replication_slots')::int,"
        " 'plugin_libraries', (SELECT setting FROM pg_catalog.pg_settings WHERE name = 'output_plugin_libraries'))",
        name,
    )
    slot = row.pop("slot")
    return Surroundings(slot=None if slot is None else _slot(slot), **row)


async def create(conn: Connection, name: str, plugin: str = "auto", *, timeout_s: float = 60.0) -> str:
    """Make the slot and return its plugin; `auto` is wal2json where the server has and allows it, else pgoutput.

    Waits for every open transaction of the cluster that has written; after `timeout_s` it gives up with a Temporary
    that names them. The server makes the slot as a whole or not at all. Raises what `explain` makes of the error.
    """
    for candidate in PLUGINS if plugin == "auto" else (plugin,):
        try:
            await _create(conn, name, candidate, timeout_s)
        except psycopg.Error as error:
            if conn.closed:
                raise explain(error, name) from error
            if error.sqlstate in ("57014", "55P03"):  # our timeout: somebody's transaction is in the way
                raise _blocked(name, await blockers(conn), error) from error
            problem = explain(error, name, await look(conn, name), plugin=candidate)
            if isinstance(problem, PluginRefused) and plugin == "auto" and candidate != "pgoutput":
                continue
            raise problem from error
        return candidate
    raise AssertionError("pgoutput is part of every server")


async def probe(conn: Connection, name: str, plugin: str) -> None:
    """Return where the server would make a slot with this plugin, as far as a temporary one beside `name` can tell.

    The server looks at the plugin before it waits for transactions. Raises PluginRefused.
    """
    beside = f"{name[:57]}_probe"
    try:
        await _create(conn, beside, plugin, 1.0, temporary=True)
    except psycopg.Error as error:
        problem = None if conn.closed else explain(error, beside, await look(conn, beside), plugin=plugin)
        if isinstance(problem, PluginRefused):
            raise problem from error
    else:
        await drop(conn, beside)


async def _create(conn: Connection, name: str, plugin: str, timeout_s: float, *, temporary: bool = False) -> None:
    version = conn.info.server_version
    statement = sql.SQL("SELECT pg_catalog.pg_create_logical_replication_slot({}, {}, {}, false{})").format(
        sql.Literal(name),
        sql.Literal(plugin),
        sql.Literal(temporary),
        # a failover slot survives a promotion; there can be none on a standby, nor a temporary one
        sql.SQL(", NOT pg_catalog.pg_is_in_recovery()") if version >= 170000 and not temporary else sql.SQL(""),
    )
    async with conn.transaction():
        # lock_timeout would count too: the server waits for each transaction's own lock
        await conn.execute("SET LOCAL lock_timeout = 0")
        await conn.execute(
            sql.SQL("SET LOCAL statement_timeout = {}").format(sql.Literal(max(1, int(timeout_s * 1000))))
        )
        await conn.execute(statement)


async def drop(conn: Connection, name: str, *, timeout_s: float = 10.0) -> bool:
    """Drop the slot; False if there is none. Raises SlotBusy if it is still in use after `timeout_s`.

    A walsender lingers for a moment after its client has gone, so 55006 is tried again.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while True:
        try:
            await conn.execute(sql.SQL("SELECT pg_catalog.pg_drop_replication_slot({})").format(sql.Literal(name)))
            return True
        except psycopg.Error as error:
            if error.sqlstate == "42704":
                return False
            if error.sqlstate != "55006" or loop.time() >= deadline:
                raise explain(error, name, None if conn.closed else await look(conn, name)) from error
        await asyncio.sleep(0.1)


async def blockers(conn: Connection) -> list[str]:
    """A sentence for each open transaction of the cluster that slot creation has to wait for, oldest first."""
    cursor = conn.cursor(row_factory=tuple_row)
    await cursor.execute(
        "SELECT a.pid, nullif(a.application_name, ''), a.usename, a.datname, a.state,"
        "       extract(epoch FROM clock_timestamp() - a.xact_start)::float8, null::text"
        "  FROM pg_catalog.pg_stat_activity a WHERE a.backend_xid IS NOT NULL AND a.pid <> pg_catalog.pg_backend_pid()"
        " UNION ALL SELECT null, null, owner, database, null,"
        "       extract(epoch FROM clock_timestamp() - prepared)::float8, gid FROM pg_catalog.pg_prepared_xacts"
        " ORDER BY 6 DESC NULLS LAST"
    )
    return [_blocker(row) for row in await cursor.fetchall()]


def _blocker(row: TupleRow) -> str:
    pid, application, role, database, state, seconds, gid = row
    since = "has been open for an unknown time" if seconds is None else f"has been open for {_duration(seconds)}"
    if gid is not None:
        return f"the prepared transaction {gid!r} of role {role} in database {database} {since}"
    details = ", ".join(filter(None, [application, f"role {role}", f"database {database}", state]))
    return f"a transaction of pid {pid} ({details}) {since}"


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} seconds"


def _blocked(name: str, open_transactions: list[str], error: psycopg.Error) -> Problem:
    return Temporary(
        f"the replication slot {name!r} waits for transactions that were open before it: "
        + ("; ".join(open_transactions) or "they have ended by now"),
        hint="they have to end first: commit or roll back, or SELECT pg_terminate_backend(pid)",
        sqlstate=error.sqlstate,
    )


async def _scalar(conn: Connection, statement: LiteralString, name: str) -> Any:
    cursor = conn.cursor(row_factory=scalar_row)
    await cursor.execute(sql.SQL(statement).format(sql.Literal(name)))
    return await cursor.fetchone()


def _slot(row: Mapping[str, Any]) -> Slot:
    """From the row as JSON, which has the columns that this server's version has."""
    reason = row.get("invalidation_reason")
    if reason is None and row.get("conflicting"):  # 16 only has the flag
        reason = "conflict"
    if reason is None and row.get("wal_status") == "lost":  # before 17 this is all there is
        reason = "wal_removed"
    return Slot(
        name=row["slot_name"],
        plugin=row["plugin"],
        database=row["database"],
        active=row["active"],
        active_pid=row["active_pid"],
        wal_status=row["wal_status"],
        safe_wal_size=row["safe_wal_size"],
        restart_lsn=_lsn(row["restart_lsn"]),
        confirmed_flush_lsn=_lsn(row["confirmed_flush_lsn"]),
        two_phase=row["two_phase"],
        failover=bool(row.get("failover")),
        synced=bool(row.get("synced")),
        invalidation_reason=reason,
    )


def _lsn(text: str | None) -> LSN | None:
    return None if text is None else LSN.parse(text)
