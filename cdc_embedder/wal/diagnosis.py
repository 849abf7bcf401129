"""What an error at the replication slot means for the operator, and what to do about it. No I/O.

SQLSTATEs alone do not tell the cases apart (42501 is a role without REPLICATION and a plugin that is not allowed; 55000
a lost slot, another database's slot and a low wal_level), so what the server says about itself is taken too. The codes
were found by running each case on PostgreSQL 15 and 18.
"""

from __future__ import annotations

from dataclasses import dataclass

import psycopg

from cdc_embedder.database_errors import from_database
from cdc_embedder.errors import Misconfigured, Problem, SlotBusy, Temporary
from cdc_embedder.lsn import LSN

CONFLICTS = ("conflict", "rows_removed")
"""Reasons why a standby gives a slot up; 16 has one word for all of them."""


class SlotLost(Temporary):
    """The slot is gone or was invalidated: what happened since is in no stream. Make it anew and scan everything."""


class SlotStuck(Temporary):
    """The server cannot decode some change. `for_ever`, or if it is met again and again: drop the slot, make it anew
    and scan everything."""

    for_ever = False


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
    synced: bool
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
            stuck = SlotStuck(
                f"the slot {name!r} had no publication when a change was made: {error.diag.message_primary}",
                hint="publication and slot are made anew and every table scanned",
                sqlstate="42704",
            )
            stuck.for_ever = True
            return stuck
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
    problem = from_database(error, f"replication slot {name!r}")
    if streaming and not isinstance(problem, Temporary):
        return SlotStuck(
            f"the server cannot decode a change: {error.diag.message_primary}",
            hint="it is tried again a few times; then the slot is made anew and every table scanned",
            sqlstate=error.sqlstate,
        )
    return problem


def _not_allowed(around: Surroundings, plugin: str) -> Problem:
    if not around.can_replicate:
        return no_right(around)
    # pg_settings hides the list from roles without pg_read_all_settings: then its default is taken
    listed = around.plugin_libraries or "pgoutput, test_decoding"
    libraries = [library.strip() for library in listed.split(",")]
    allowed = ", ".join(dict.fromkeys([*libraries, "pgoutput", plugin]))
    otherwise = "" if plugin == "pgoutput" else "; or set output_plugin to pgoutput"
    return PluginRefused(
        f"the server does not allow the output plugin {plugin}",
        hint=f"as a superuser: ALTER SYSTEM SET output_plugin_libraries = {allowed} (without quotes around the list), "
        f"then SELECT pg_reload_conf(){otherwise}",
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
        conflict = slot.invalidation_reason in CONFLICTS
        remedy = (
            "set hot_standby_feedback and primary_slot_name on the standby"
            if conflict
            else "raise max_slot_wal_keep_size"
        )
        return SlotLost(
            f"the server gave up the replication slot {name!r} ({slot.invalidation_reason}):"
            f" {'rows of catalogs' if conflict else 'log'} it needed {'are' if conflict else 'is'} gone",
            hint=f"it is made anew and every table scanned; if this comes back {remedy}",
            sqlstate="55000",
        )
    return from_database(error, f"replication slot {name!r}")


def propose(name: str, database: str) -> str:
    """A slot name for `database` where `name` is taken by another one."""
    suffix = "".join(char if char.isascii() and char.isalnum() else "_" for char in database.lower())
    return f"{name[: 62 - min(len(suffix), 40)]}_{suffix[:40]}"


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
