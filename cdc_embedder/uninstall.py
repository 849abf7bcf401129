"""Take cdc-embedder out of a database: slots, publications, origins and the schema with its ledgers.

Vectors stay where they are: they are the application's. Not for stopping the service, without which nothing is removed.
"""

from __future__ import annotations

from dataclasses import dataclass

import psycopg
from psycopg import sql

from cdc_embedder.database_errors import from_database
from cdc_embedder.errors import Misconfigured
from cdc_embedder.install import connect
from cdc_embedder.installable import Connection


@dataclass(frozen=True, slots=True)
class Belongings:
    """What is ours in one database. `active`: (slot, pid) of each slot that a service holds."""

    slots: list[str]
    active: list[tuple[str, int]]
    publications: list[str]
    origins: list[str]
    columns: int | None


def uninstall_plan(dsn: str, slot: str) -> list[str]:
    """What `uninstall` would remove, a sentence each; empty where nothing is ours."""
    try:
        with connect(dsn, "uninstall") as conn:
            return _sentences(_belongings(conn, slot))
    except psycopg.Error as error:
        raise from_database(error, "looking for what is installed") from error


def uninstall(dsn: str, slot: str) -> list[str]:
    """Remove it all; returns what was removed, a sentence each. Raises Misconfigured while a service runs."""
    try:
        with connect(dsn, "uninstall") as conn:
            found = _belongings(conn, slot)
            if found.active:
                holders = ", ".join(f"{name} (process {pid} of the server)" for name, pid in found.active)
                raise Misconfigured(f"a service holds the slot {holders}", hint="Stop it first.")
            return _remove(conn, found)
    except psycopg.errors.InsufficientPrivilege as error:
        raise Misconfigured(
            f"uninstalling: {error.diag.message_primary}",
            hint="Connect as the role that owns the schema cdc_embedder and may replicate, or as a superuser.",
            sqlstate=error.sqlstate,
        ) from error
    except psycopg.Error as error:
        raise from_database(error, "uninstalling") from error


def _belongings(conn: Connection, slot: str) -> Belongings:
    installed = conn.execute("SELECT to_regclass('cdc_embedder.embedding_column') IS NOT NULL").fetchone()
    names, columns = {slot}, None
    if installed is not None and installed[0]:
        rows = conn.execute("SELECT slot::text, count(*) FROM cdc_embedder.embedding_column GROUP BY 1").fetchall()
        names |= {row[0] for row in rows}
        columns = sum(row[1] for row in rows)
    wanted = sorted(names)
    slots = conn.execute(
        "SELECT slot_name::text, active_pid FROM pg_replication_slots"
        " WHERE slot_name = ANY (%s) AND database = current_database() ORDER BY 1",
        (wanted,),
    ).fetchall()
    publications = conn.execute(
        "SELECT pubname::text FROM pg_publication"
        " WHERE pubname = ANY (%s) AND pubinsert AND pubupdate AND NOT pubdelete AND NOT puballtables ORDER BY 1",
        (wanted,),
    ).fetchall()
    origins = conn.execute(
        "SELECT o.roname FROM pg_replication_origin o, unnest(%s::text[]) AS s"
        " WHERE o.roname ~ ('^' || s || '_[0-9]+$') ORDER BY 1",
        (wanted,),
    ).fetchall()
    return Belongings(
        slots=[row[0] for row in slots],
        active=[(row[0], row[1]) for row in slots if row[1] is not None],
        publications=[row[0] for row in publications],
        origins=[row[0] for row in origins],
        columns=columns,
    )


def _sentences(found: Belongings) -> list[str]:
    lines = [f"the replication slot {name}" for name in found.slots]
    lines += [f"the publication {name}" for name in found.publications]
    lines += [f"the replication origin {name}" for name in found.origins]
    if found.columns is not None:
        lines.append(f"the schema cdc_embedder with {found.columns} configured columns and their ledgers")
    return lines


def _remove(conn: Connection, found: Belongings) -> list[str]:
    """The slots go last: their removal cannot be rolled back, all the rest can."""
    for name in found.publications:
        conn.execute(sql.SQL("DROP PUBLICATION {}").format(sql.Identifier(name)))
    removed, kept = _drop_origins(conn, found.origins)
    if found.columns is not None:
        conn.execute("SET LOCAL client_min_messages = warning")
        conn.execute("DROP SCHEMA cdc_embedder CASCADE")
    for name in found.slots:
        conn.execute("SELECT pg_drop_replication_slot(%s)", (name,))
    done = Belongings(found.slots, [], found.publications, removed, found.columns)
    return [f"removed {line}" for line in _sentences(done)] + [
        f"left the replication origin {name}: only a superuser, or a role that was granted it, may drop origins"
        for name in kept
    ]


def _drop_origins(conn: Connection, names: list[str]) -> tuple[list[str], list[str]]:
    """Which could be dropped and which not."""
    removed, kept = [], []
    for name in names:
        try:
            with conn.transaction():
                conn.execute("SELECT pg_replication_origin_drop(%s)", (name,))
            removed.append(name)
        except psycopg.errors.InsufficientPrivilege:
            kept.append(name)
    return removed, kept
