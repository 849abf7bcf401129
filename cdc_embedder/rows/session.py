"""Rule 12: sessions that no role or database setting can bend.

Everything that changes the text of a key, the meaning of a statement, how long it may take or what its commit
promises is set by us in the startup packet, where it outranks ALTER ROLE and ALTER DATABASE … SET. Not for the
replication session: `wal.stream` pins its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psycopg
from psycopg.rows import TupleRow

from cdc_embedder.conninfo import pinned
from cdc_embedder.database_errors import from_database

Connection = psycopg.AsyncConnection[TupleRow]

PINS = {
    "search_path": "pg_catalog",
    "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "off",
    "default_transaction_deferrable": "off",
    "row_security": "off",  # an error instead of silently fewer rows
    "DateStyle": "ISO, YMD",
    "TimeZone": "UTC",
    "IntervalStyle": "postgres",
    "extra_float_digits": "3",
    "bytea_output": "hex",
    "xmlbinary": "base64",
    "lc_monetary": "C",
    "synchronous_commit": "local",  # flushed here before a key counts as done; a lost standby must not hang us
    "statement_timeout": "60000",
    "lock_timeout": "1000",
    "idle_in_transaction_session_timeout": "30000",
    "idle_session_timeout": "0",
    "plan_cache_mode": "force_generic_plan",  # a big array must not flip the plan to a scan of the whole table
    "jit": "off",
}
"""Setting → value. Durations are in milliseconds."""


async def connect(dsn: str, purpose: str, **settings: str) -> Connection:
    """A pinned autocommit session named `cdc-embedder <purpose>`. `settings` change or add pins.

    Raises the translation of whatever the driver raised (`ServerGone`, `Misconfigured`).
    """
    conninfo = pinned(dsn, purpose, PINS | settings, client_encoding="UTF8")
    try:
        connection = await psycopg.AsyncConnection.connect(conninfo, autocommit=True, prepare_threshold=None)
    except psycopg.Error as error:
        raise from_database(error, "connecting") from error
    connection.cursor_factory = psycopg.AsyncRawCursor  # $1 in statements: identifiers may hold percent signs
    return connection


async def one(connection: Connection, statement: Any, parameters: Sequence[Any] | None = None) -> TupleRow | None:
    """The first row of a small statement, or None."""
    cursor = await connection.execute(statement, parameters)
    return await cursor.fetchone()
