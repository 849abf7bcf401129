"""Take cdc-embedder out of a database: slots, publications, origins and the schema with its ledgers.

Vectors stay where they are: they are the application's. Not for stopping the service, without which nothing is removed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import LiteralString

import psycopg
from psycopg import sql

from cdc_embedder.database_errors import from_database, not_connected
from cdc_embedder.errors import Misconfigured
from cdc_embedder.install import connect, has_pgml
from cdc_embedder.installable import EMBED_SUFFIX, Connection, scalar
from cdc_embedder.wal.slot import PLUGINS


@dataclass(frozen=True, slots=True)
class Belongings:
    """What is ours in one database. `active`: (slot, pid) of each slot that a service holds.

    `on_standby`: slots on the standby that was looked at; `users`: what else needs functions of ours.
    """

    slots: list[str]
    on_standby: list[str]
    active: list[tuple[str, int]]
    publications: list[str]
    origins: list[str]
    columns: int | None
    pgml: bool
    users: list[str]


def uninstall_plan(dsn: str, slot: str, replication_dsn: str | None = None) -> list[str]:
    """What `uninstall` would remove, a sentence each; empty where nothing is ours. `replication_dsn`: may lead to the
    standby that a slot is on. Raises Misconfigured where a slot is on one that it does not lead to."""
    try:
        with connect(dsn, "uninstall") as conn, _standby(replication_dsn) as standby:
            return _sentences(_belongings(conn, standby, slot))
    except psycopg.Error as error:
        raise not_connected(error, dsn, "looking for what is installed") from error


def uninstall(dsn: str, slot: str, replication_dsn: str | None = None) -> list[str]:
    """Remove it all; returns what was removed, a sentence each. Raises Misconfigured while a service runs, and as
    `uninstall_plan` does."""
    try:
        with connect(dsn, "uninstall") as conn, _standby(replication_dsn) as standby:
            found = _belongings(conn, standby, slot)
            if found.active:
                holders = ", ".join(f"{name} (process {pid} of the server)" for name, pid in found.active)
                raise Misconfigured(f"a service holds the slot {holders}", hint="Stop it first.")
            if found.users:
                raise Misconfigured(
                    f"functions of cdc-embedder are used by {', '.join(found.users)}",
                    hint="Drop these first; of a generated column ALTER TABLE … ALTER COLUMN … DROP EXPRESSION keeps"
                    " the vectors.",
                )
            return _remove(conn, standby, found)
    except psycopg.errors.InsufficientPrivilege as error:
        raise Misconfigured(
            f"uninstalling: {error.diag.message_primary}",
            hint="Connect as the role that owns the schema cdc_embedder and may replicate, or as a superuser.",
            sqlstate=error.sqlstate,
        ) from error
    except psycopg.Error as error:
        raise from_database(error, "uninstalling") from error


@contextmanager
def _standby(dsn: str | None) -> Iterator[Connection | None]:
    """A session there, if it is a standby that the DSN leads to."""
    if dsn is None:
        yield None
        return
    with connect(dsn, "uninstall") as session:
        yield session if scalar(session, "SELECT pg_is_in_recovery()") else None


def _belongings(conn: Connection, standby: Connection | None, slot: str) -> Belongings:
    columns = None
    if scalar(conn, "SELECT to_regclass('cdc_embedder.embedding_column') IS NOT NULL"):
        columns = scalar(conn, "SELECT count(*) FROM cdc_embedder.embedding_column")
    names = {slot} | _noted(conn)
    wanted = sorted(names | {name + EMBED_SUFFIX for name in names})
    slots = conn.execute(_SLOTS, (wanted, list(PLUGINS))).fetchall()
    there = [] if standby is None else standby.execute(_SLOTS, (wanted, list(PLUGINS))).fetchall()
    if standby is None and scalar(conn, "SELECT to_regclass('cdc_embedder.standby_slot') IS NOT NULL"):
        left = [
            row[0] for row in conn.execute("SELECT slot::text FROM cdc_embedder.standby_slot WHERE plugin IS NOT NULL")
        ]
        if left:
            raise Misconfigured(
                f"the slot {', '.join(left)} is on a standby, where it would go on holding WAL back",
                hint="Name the standby: --replication-dsn, or CDC_EMBEDDER_REPLICATION_DSN. Where there is none any"
                " more: TRUNCATE cdc_embedder.standby_slot.",
            )
    publications = conn.execute(
        "SELECT pubname::text FROM pg_publication"
        " WHERE pubname = ANY (%s) AND pubinsert AND pubupdate AND NOT pubdelete AND NOT puballtables ORDER BY 1",
        (wanted,),
    ).fetchall()
    origins = conn.execute(_ORIGINS, (wanted,)).fetchall()
    return Belongings(
        slots=[row[0] for row in slots],
        on_standby=[row[0] for row in there],
        active=[(row[0], row[1]) for row in slots + there if row[1] is not None],
        publications=[row[0] for row in publications],
        origins=[row[0] for row in origins],
        columns=columns,
        pgml=has_pgml(conn),
        users=[row[0] for row in conn.execute(_USERS).fetchall()],
    )


def _noted(conn: Connection) -> set[str]:
    """Every slot that our tables tell of: one that no column names any more holds WAL back all the same."""
    names: set[str] = set()
    for table, statement in _NOTED.items():  # an older schema has not all of them
        if scalar(conn, "SELECT to_regclass(%s) IS NOT NULL", table):
            names |= {row[0] for row in conn.execute(statement)}
    return names


_NOTED: dict[str, LiteralString] = {
    "cdc_embedder.embedding_column": """
        SELECT slot::text FROM cdc_embedder.embedding_column
         UNION
        SELECT (regexp_match(pg_get_expr(d.adbin, d.adrelid), '^''([a-z0-9_]+)''::name$'))[1]
          FROM pg_attrdef d JOIN pg_attribute a ON a.attrelid = d.adrelid AND a.attnum = d.adnum
         WHERE d.adrelid = 'cdc_embedder.embedding_column'::regclass AND a.attname = 'slot'
           AND pg_get_expr(d.adbin, d.adrelid) ~ '^''[a-z0-9_]+''::name$'
        """,
    # in a restored dump others' rows are found
    "cdc_embedder.progress": """
        SELECT slot::text FROM cdc_embedder.progress
         WHERE system_identifier = (SELECT c.system_identifier FROM pg_control_system() c)
           AND database_oid = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
        """,
    "cdc_embedder.leader": "SELECT slot::text FROM cdc_embedder.leader",
    "cdc_embedder.given_up": "SELECT slot::text FROM cdc_embedder.given_up",
    "cdc_embedder.standby_slot": "SELECT slot::text FROM cdc_embedder.standby_slot",
}

_SLOTS = """
SELECT slot_name::text, active_pid FROM pg_replication_slots
 WHERE slot_name = ANY (%s) AND plugin = ANY (%s) AND database = current_database() ORDER BY 1
"""

_ORIGINS = """
SELECT o.roname FROM pg_replication_origin o, unnest(%s::text[]) AS s
 WHERE o.roname ~ ('^' || s || '_[0-9]+$')
   AND NOT EXISTS (SELECT FROM pg_replication_slots r
                    WHERE r.slot_name = s AND r.database IS DISTINCT FROM current_database())
 ORDER BY 1
"""
"""Origins are the whole server's: not those of a service of another database, which this one was copied from."""

_USERS = """
WITH ours AS (
    SELECT oid FROM pg_namespace
     WHERE nspname = 'cdc_embedder'
        OR nspname = 'pgml' AND starts_with(obj_description(oid, 'pg_namespace'), 'cdc-embedder')
)
SELECT DISTINCT pg_describe_object(d.classid, d.objid, d.objsubid) AS description
  FROM pg_depend d
  JOIN pg_proc f ON f.oid = d.refobjid AND d.refclassid = 'pg_proc'::regclass
  LEFT JOIN pg_proc p ON p.oid = d.objid AND d.classid = 'pg_proc'::regclass
  LEFT JOIN pg_constraint c ON c.oid = d.objid AND d.classid = 'pg_constraint'::regclass
  LEFT JOIN pg_rewrite r ON r.oid = d.objid AND d.classid = 'pg_rewrite'::regclass
  LEFT JOIN pg_attrdef a ON a.oid = d.objid AND d.classid = 'pg_attrdef'::regclass
  LEFT JOIN pg_class t
    ON t.oid = CASE d.classid WHEN 'pg_class'::regclass THEN d.objid ELSE coalesce(r.ev_class, a.adrelid) END
 WHERE f.pronamespace IN (TABLE ours) AND d.deptype IN ('n', 'a') AND d.classid <> 'pg_trigger'::regclass
   AND coalesce(t.relnamespace, p.pronamespace, c.connamespace, 0) NOT IN (TABLE ours)
 ORDER BY description
"""
"""What the application made with functions of ours, which would go with them. Not triggers, which are ours."""


def _sentences(found: Belongings) -> list[str]:
    lines = [f"the replication slot {name}" for name in found.slots]
    lines += [f"the replication slot {name} on the standby" for name in found.on_standby]
    lines += [f"the publication {name}" for name in found.publications]
    lines += [f"the replication origin {name}" for name in found.origins]
    if found.pgml:
        lines.append("the schema pgml")
    if found.columns is not None:
        lines.append(f"the schema cdc_embedder with {found.columns} configured columns and their ledgers")
    return lines


def _remove(conn: Connection, standby: Connection | None, found: Belongings) -> list[str]:
    """The slots go last: their removal cannot be rolled back, all the rest can."""
    for name in found.publications:
        conn.execute(sql.SQL("DROP PUBLICATION {}").format(sql.Identifier(name)))
    removed, kept = _drop_origins(conn, found.origins)
    conn.execute("SET LOCAL client_min_messages = warning")
    if found.pgml:
        conn.execute("DROP SCHEMA pgml CASCADE")
    if found.columns is not None:
        conn.execute("DROP SCHEMA cdc_embedder CASCADE")
    for name in found.slots:
        conn.execute("SELECT pg_drop_replication_slot(%s)", (name,))
    if standby is not None:
        for name in found.on_standby:
            standby.execute("SELECT pg_drop_replication_slot(%s)", (name,))
    done = replace(found, origins=removed)
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
