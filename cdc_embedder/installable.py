"""What must hold of a server before anything of ours is installed in it, and what its administrator should still set.

Each refusal says what to do. Not for what the service needs when it runs: `preparation` looks after that.
"""

from __future__ import annotations

import re
from typing import Any, LiteralString

import psycopg
from psycopg.rows import TupleRow

from cdc_embedder.errors import Misconfigured

Connection = psycopg.Connection[TupleRow]

OLDEST_SERVER = 14

EMBED_SUFFIX = "_embed"
"""What the names of the slot and the publication for requests from SQL end in, after the name of the service's slot."""

LONGEST_EMBED_SLOT = 63 - len(EMBED_SUFFIX)


def check_server(conn: Connection) -> None:
    if conn.info.server_version < OLDEST_SERVER * 10000:
        raise Misconfigured(
            f"the server is PostgreSQL {conn.info.server_version // 10000}", hint="14 is the oldest that works."
        )
    if scalar(conn, "SELECT pg_is_in_recovery()"):
        raise Misconfigured("the server is a standby, where nothing can be installed", hint="Name the primary.")


def check_slot(conn: Connection, slot: str) -> None:
    if not re.fullmatch("[a-z0-9_]{1,63}", slot):
        raise Misconfigured(
            f'"{slot}" cannot be the name of a replication slot',
            hint="Lower-case letters, digits and underscores, 63 at most.",
        )
    row = conn.execute(
        "SELECT database, current_database() FROM pg_replication_slots"
        " WHERE slot_name = %s AND database IS DISTINCT FROM current_database()",
        (slot,),
    ).fetchone()
    if row is not None:
        proposed = f"{slot}_{re.sub('[^a-z0-9_]+', '_', row[1].lower())}"[:63]
        whose = "physical replication" if row[0] is None else f'the database "{row[0]}"'
        raise Misconfigured(
            f'the replication slot "{slot}" belongs to {whose}; slot names are cluster-wide',
            hint=f"Use another name here: --slot {proposed}, or CDC_EMBEDDER_SLOT={proposed}.",
        )


def check_publications(conn: Connection) -> None:
    names = [row[0] for row in conn.execute("SELECT pubname FROM pg_publication WHERE puballtables ORDER BY 1")]
    if names:
        raise Misconfigured(
            f"the publication {', '.join(names)} is FOR ALL TABLES: the tables of cdc_embedder would appear in it,"
            " and a subscriber that lacks them stops",
            hint="Make it name its tables; or, if its subscribers do not mind, repeat with --published-everywhere.",
        )


def advice(conn: Connection) -> list[str]:
    """What the server's administrator should still set."""
    lines = []
    if (level := scalar(conn, "SELECT current_setting('wal_level')")) != "logical":
        lines.append(f"still to do: wal_level is {level}; ALTER SYSTEM SET wal_level = logical, and restart the server")
    if scalar(conn, "SELECT setting::int FROM pg_settings WHERE name = 'max_slot_wal_keep_size'") == -1:
        lines.append(
            "advice: max_slot_wal_keep_size is unlimited, so the slot of a service that is stopped for long fills the"
            " server's disk; a limit only costs a new scan: ALTER SYSTEM SET max_slot_wal_keep_size = '20GB'"
        )
    return lines


def scalar(conn: Connection, statement: LiteralString, *parameters: object) -> Any:
    row = conn.execute(statement, parameters or None).fetchone()
    return None if row is None else row[0]
