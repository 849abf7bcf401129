"""Rule 12: sessions that no role or database setting can bend.

Everything that changes the text of a key, the meaning of a statement, how long it may take or what its commit
promises is set by us in the startup packet, where it outranks ALTER ROLE and ALTER DATABASE … SET. An answer that does
not come although the server's own time limit has passed is not waited for. Not for the replication session:
`wal.stream` pins its own.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, TypeVar

import psycopg
from psycopg import pq
from psycopg.abc import PQGen
from psycopg.rows import TupleRow
from psycopg.types.json import Jsonb

from cdc_embedder.conninfo import pinned
from cdc_embedder.database_errors import from_database

log = logging.getLogger(__name__)

T = TypeVar("T")

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
    "tcp_keepalives_idle": "10",  # a machine of ours that is gone must not hold the advisory lock for two hours
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "4",
    "tcp_user_timeout": "30000",
    "plan_cache_mode": "force_generic_plan",  # a big array must not flip the plan to a scan of the whole table
    "jit": "off",
}
"""Setting → value. Durations are in milliseconds, those of keepalives in seconds."""

GRACE_SECONDS = 15.0
"""How long an answer may take beyond `statement_timeout`, after which the server has answered in any case."""


class Session(psycopg.AsyncConnection[TupleRow]):
    """A session that is given up when an answer is overdue.

    Keepalives notice a peer that is gone. They do not notice a proxy, a tunnel or a frozen server whose kernel still
    acknowledges: there no error would ever show. Not bounded: waiting for notifications, and statements of an explicit
    transaction, which may have set another time limit.
    """

    purpose = ""
    answer_within_s: float | None = None

    async def wait(self, gen: PQGen[T], *args: Any, **kwargs: Any) -> T:
        """As the driver's own, which raises OperationalError where the session was given up meanwhile."""
        limit = self.answer_within_s
        if limit is None or self.pgconn.transaction_status != pq.TransactionStatus.IDLE:
            return await super().wait(gen, *args, **kwargs)
        overdue = asyncio.get_running_loop().call_later(limit, self._give_up)
        try:
            return await super().wait(gen, *args, **kwargs)
        finally:
            overdue.cancel()

    def _give_up(self) -> None:
        """Shut the socket down under libpq, which then finds the connection closed, as the driver expects to."""
        if self.pgconn.transaction_status != pq.TransactionStatus.ACTIVE:
            return
        log.warning(
            "the session %r had no answer for %.0f seconds, and is given up: look at the network, and at what stands"
            " between here and the server",
            self.purpose,
            self.answer_within_s,
        )
        with socket.socket(fileno=os.dup(self.pgconn.socket)) as ours:
            ours.shutdown(socket.SHUT_RDWR)


async def connect(dsn: str, purpose: str, **settings: str) -> Connection:
    """A pinned autocommit session named `cdc-embedder <purpose>`. `settings` change or add pins.

    Raises the translation of whatever the driver raised (`ServerGone`, `Misconfigured`).
    """
    pins = PINS | settings
    conninfo = pinned(dsn, purpose, pins, client_encoding="UTF8")
    try:
        connection = await Session.connect(conninfo, autocommit=True, prepare_threshold=None)
        if connection.info.server_version >= 170000:  # older ones do not know it, and would refuse the connection
            await connection.execute("SET transaction_timeout = 0")
    except psycopg.Error as error:
        raise from_database(error, "connecting") from error
    connection.purpose = purpose
    if limit := int(pins["statement_timeout"]):
        connection.answer_within_s = limit / 1000 + GRACE_SECONDS
    connection.cursor_factory = psycopg.AsyncRawCursor  # $1 in statements: identifiers may hold percent signs
    return connection


async def open_in(stack: AsyncExitStack, dsn: str, purpose: str, **settings: str) -> Connection:
    """`connect`, closed with `stack`."""
    connection = await connect(dsn, purpose, **settings)
    stack.push_async_callback(connection.close)
    return connection


async def wait_until_flushed(connection: Connection) -> None:
    """Returns when everything that any snapshot could see by now is flushed: a crash of the server leaves it standing.

    The server does that soon after every commit. Where it does not, a transaction of ours takes along what lies before
    it: one that writes something, since the server flushes for no other. Its message is one that no slot asks for.
    """
    row = await one(connection, "SELECT pg_current_wal_insert_lsn()::text")
    assert row is not None
    written = row[0]
    for turn in range(_FLUSH_TURNS):
        row = await one(connection, "SELECT pg_wal_lsn_diff(pg_current_wal_flush_lsn(), $1::pg_lsn) >= 0", (written,))
        if row is not None and row[0]:
            return
        await asyncio.sleep(0.02 * 2**turn)
    await connection.execute("SELECT pg_logical_emit_message(true, 'cdc-embedder flush', '')")


_FLUSH_TURNS = 5


def jsonb(value: Any) -> Jsonb:
    """A parameter of type jsonb. Without \\u escapes: a database that is not UTF8 refuses those."""
    return Jsonb(value, dumps=_dumps)


_dumps = partial(json.dumps, ensure_ascii=False)


async def one(connection: Connection, statement: Any, parameters: Sequence[Any] | None = None) -> TupleRow | None:
    """The first row of a small statement, or None."""
    cursor = await connection.execute(statement, parameters)
    return await cursor.fetchone()
