"""The replication slot: make it, look at it, drop it, and say what is wrong with it and what to do about that.

Talks SQL over an ordinary autocommit session (any cursor factory: no parameters are bound). Not for reading from the
slot, that is `stream`. SQLSTATEs alone do not tell the cases apart (42501 is a role without REPLICATION and a plugin
that is not allowed; 55000 a lost slot, another database's slot and a low wal_level), so `explain` also takes what the
server says about itself. The codes were found by running each case on PostgreSQL 15 and 18.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, LiteralString

import psycopg
from psycopg import sql
from psycopg.rows import TupleRow, scalar_row, tuple_row

from cdc_embedder.database_errors import from_database
from cdc_embedder.errors import Misconfigured, Problem, SlotBusy, Temporary
from cdc_embedder.lsn import LSN

Connection = psycopg.AsyncConnection[Any]

PLUGINS = ("wal2json", "pgoutput")


class SlotLost(Temporary):
    """The slot is gone or was invalidated: what happened since is in no stream. Make it anew and scan everything."""


class PluginRefused(Misconfigured):
    """The server lacks the slot's output plugin or does not allow it. A new slot with pgoutput always works."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One row of pg_replication_slots. Columns that the server's version lacks have the value that means nothing."""

    name: str
    plugin: str | None
    database: str | None
    active: bool
    active_pid: int | None
    wal_status: str | None
    safe_wal_size: int | None
    restart_lsn: LSN | None
    confirmed_flush_lsn: LSN | None
    two_phase: bool
    failover: bool
    invalidation_reason: str | None

    @property
    def lost(self) -> bool:
        """Whether the server gave the slot up: it cannot be read any more."""
        return self.invalidation_reason is not None

    @property
    def logical(self) -> bool:
        return self.plugin is not None


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the server says about itself that tells apart errors with one SQLSTATE."""

    slot: Slot | None
    database: str
    role: str
    can_replicate: bool
    wal_level: str
    max_replication_slots: int
    plugin_libraries: str | None
    in_recovery: bool
    server_version: int


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
        " 'can_replicate', (SELECT rolreplication OR rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user),"
        " 'wal_level', pg_catalog.current_setting('wal_level'),"
        " 'max_replication_slots', pg_catalog.current_setting('max_replication_slots')::int,"
        " 'plugin_libraries', (SELECT setting FROM pg_catalog.pg_settings WHERE name = 'output_plugin_libraries'),"
        " 'in_recovery', pg_catalog.pg_is_in_recovery(),"
        " 'server_version', pg_catalog.current_setting('server_version_num')::int)",
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


async def _create(conn: Connection, name: str, plugin: str, timeout_s: float) -> None:
    version = conn.info.server_version
    statement = sql.SQL("SELECT pg_catalog.pg_create_logical_replication_slot({}, {}, false, false{})").format(
        sql.Literal(name),
        sql.Literal(plugin),
        # a failover slot survives a promotion; there can be none on a standby
        sql.SQL(", NOT pg_catalog.pg_is_in_recovery()") if version >= 170000 else sql.SQL(""),
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


def explain(
    error: psycopg.Error,
    name: str,
    around: Surroundings | None = None,
    *,
    plugin: str | None = None,
    streaming: bool = False,
) -> Problem:
    """What `error` means for the operator of the slot `name`, with the remedy, by SQLSTATE and circumstances.

    `plugin`: the one that was asked for (default: the slot's). `streaming`: the stream had started already.
    """
    slot = around.slot if around else None
    plugin = plugin or (slot.plugin if slot else None) or "pgoutput"
    match error.sqlstate:
        case "42501" if around:
            return _not_allowed(around, plugin)
        case "58P01":
            return PluginRefused(
                f"the server has no output plugin {plugin}",
                hint=f"install it on the server (Debian: postgresql-NN-{plugin}), or set output_plugin to pgoutput",
                sqlstate="58P01",
            )
        case "53400":
            return Misconfigured(
                f"all {around.max_replication_slots if around else ''} replication slots are in use".replace("  ", " "),
                hint="drop one that nobody reads (SELECT * FROM pg_replication_slots), or raise max_replication_slots "
                "and restart the server",
                sqlstate="53400",
            )
        case "55006":
            holder = f"pid {slot.active_pid}" if slot and slot.active_pid else "another session"
            return SlotBusy(
                f"the replication slot {name!r} is in use by {holder}",
                hint="one service reads a slot; this one waits and takes over when it is free",
                sqlstate="55006",
            )
        case "55000" if around:
            return _wrong_state(error, name, around)
        case "42704" if streaming:
            return Misconfigured(
                f"the publication of the slot {name!r} does not exist: {error.diag.message_primary}",
                hint="run `cdc-embedder init` again; on servers before 18 the slot is stuck then and has to be made "
                f"anew: SELECT pg_drop_replication_slot('{name}')",
                sqlstate="42704",
            )
        case "42704":
            return SlotLost(
                f"the replication slot {name!r} does not exist",
                hint="it is made anew and every table scanned",
                sqlstate="42704",
            )
        case "42710":
            return Temporary(f"the replication slot {name!r} was made by somebody else meanwhile", sqlstate="42710")
        case "22023" | "42601":
            return Misconfigured(
                f"the output plugin {plugin} of slot {name!r} refused its options: {error.diag.message_primary}",
                hint="this version of the plugin is not supported: set output_plugin to pgoutput and drop the slot",
                sqlstate=error.sqlstate,
            )
        case "42602":
            return Misconfigured(
                f"{name!r} cannot be the name of a replication slot",
                hint="use lower-case letters, digits and underscores, at most 63",
                sqlstate="42602",
            )
    return from_database(error, f"replication slot {name!r}")


def _not_allowed(around: Surroundings, plugin: str) -> Problem:
    if not around.can_replicate:
        return no_right(around)
    # pg_settings hides the list from roles without pg_read_all_settings: then its default is taken
    listed = around.plugin_libraries or "pgoutput, test_decoding"
    libraries = [library.strip() for library in listed.split(",")]
    allowed = ", ".join(dict.fromkeys([*libraries, "pgoutput", plugin]))
    return PluginRefused(
        f"the server does not allow the output plugin {plugin}",
        hint=f"as a superuser: ALTER SYSTEM SET output_plugin_libraries = {allowed} (without quotes around the list), "
        "then SELECT pg_reload_conf(); or set output_plugin to pgoutput",
        sqlstate="42501",
    )


def no_right(around: Surroundings) -> Misconfigured:
    """The role lacks REPLICATION. Also asked where a connection was refused, which has no SQLSTATE."""
    return Misconfigured(
        f"the role {around.role!r} may not use replication slots",
        hint=f"as a superuser: ALTER ROLE {_identifier(around.role)} REPLICATION",
        sqlstate="42501",
    )


def _wrong_state(error: psycopg.Error, name: str, around: Surroundings) -> Problem:
    slot = around.slot
    if around.wal_level != "logical" and (slot is None or not slot.lost):
        return Misconfigured(
            f"the server's wal_level is {around.wal_level}: its log holds too little for logical replication",
            hint="as a superuser: ALTER SYSTEM SET wal_level = logical, then restart the server",
            sqlstate="55000",
        )
    if slot is None:
        return from_database(error, f"replication slot {name!r}")
    if not slot.logical or slot.database != around.database:
        owner = f"belongs to database {slot.database!r}" if slot.logical else "is a physical one"
        proposal = propose(name, around.database)
        return Misconfigured(
            f"the replication slot {name!r} {owner}: slot names are shared by the whole server",
            hint=f"choose another, for example: cdc-embedder init --slot {proposal}, and run with --slot {proposal}",
            sqlstate="55000",
        )
    if slot.lost:
        return SlotLost(
            f"the server gave up the replication slot {name!r} ({slot.invalidation_reason}): log it needed is gone",
            hint="it is made anew and every table scanned; if this comes back raise max_slot_wal_keep_size",
            sqlstate="55000",
        )
    return from_database(error, f"replication slot {name!r}")


def propose(name: str, database: str) -> str:
    """A slot name for `database` where `name` is taken by another one."""
    suffix = "".join(char if char.isascii() and char.isalnum() else "_" for char in database.lower())
    return f"{name[: 62 - min(len(suffix), 40)]}_{suffix[:40]}"


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


async def _scalar(conn: Connection, statement: LiteralString, name: str) -> Any:
    cursor = conn.cursor(row_factory=scalar_row)
    await cursor.execute(sql.SQL(statement).format(sql.Literal(name)))
    return await cursor.fetchone()


def _slot(row: Mapping[str, Any]) -> Slot:
    """From the row as JSON, which has the columns that this server's version has."""
    reason = row.get("invalidation_reason")
    if reason is None and row.get("wal_status") == "lost":  # before 17 this is all there is
        reason = "wal_removed"
    if reason is None and row.get("conflicting"):  # 16 only has the flag
        reason = "conflict"
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
        invalidation_reason=reason,
    )


def _lsn(text: str | None) -> LSN | None:
    return None if text is None else LSN.parse(text)
