"""The sessions that write vectors back, and which of them writes what.

Where the server lets us, sessions write under replication origins of their own, so that the stream can pass our echo
over; they write only rows of tables whose triggers our update does not fire (a trigger's writes would carry the origin
too, and be hidden). Everything else goes through a plain session. None fires ordinary triggers where the role may
suppress them. Origins: one name a session, `<slot>_1`, `<slot>_2` …; up to PostgreSQL 17 each takes one of
`max_replication_slots`. Which session writes a row does not matter: no row is in two batches at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import psycopg

from cdc_embedder.catalog import EmbeddingColumn
from cdc_embedder.embedding.base import Vectors
from cdc_embedder.errors import Problem
from cdc_embedder.rows.session import Connection, one
from cdc_embedder.rows.writeback import Term, Write, WriteBack

log = logging.getLogger(__name__)

_A_ROW = ("22", "23", "38", "39", "44", "P0")
"""SQLSTATE classes that a constraint, a trigger or a conversion raises because of one row's contents."""


class Writers:
    """Plain sessions, at least one, and those that are marked by an origin, if there are any."""

    def __init__(
        self,
        plain: Sequence[Connection],
        marked: Sequence[Connection],
        term: Term,
        *,
        triggers_suppressed: bool = False,
    ) -> None:
        self._triggers_suppressed = triggers_suppressed
        self._term = term
        self._any_marked = bool(marked)
        self.at_once = max(len(plain), len(marked))
        """How many batches can be written at once."""
        self._free: dict[bool, asyncio.Queue[Connection]] = {False: asyncio.Queue(), True: asyncio.Queue()}
        for session in plain:
            self._free[False].put_nowait(session)
        for session in marked:
            self._free[True].put_nowait(session)
        self._statements: dict[tuple[int, Connection], tuple[EmbeddingColumn, WriteBack]] = {}

    async def write(self, column: EmbeddingColumn, writes: Sequence[Write], vectors: Vectors) -> set[int]:
        """See `WriteBack.write`. Waits for a session that is free."""
        fires = column.fires_always if self._triggers_suppressed else column.fires_triggers
        marked = self._any_marked and not fires
        session = await self._free[marked].get()
        try:
            return await self._statement(column, session, marked).write(writes, vectors)
        finally:
            self._free[marked].put_nowait(session)

    def _statement(self, column: EmbeddingColumn, session: Connection, marked: bool) -> WriteBack:
        known = self._statements.get((column.id, session))
        if known is None or known[0] is not column:
            without = None if not marked else "RA" if self._triggers_suppressed else "OA"
            known = (column, WriteBack(session, column, self._term, without_triggers=without))
            self._statements[column.id, session] = known
        return known[1]

    @staticmethod
    def blames_a_row(problem: Problem) -> bool:
        """Whether the statement may have failed because of what one of its rows holds."""
        return problem.sqlstate is not None and problem.sqlstate.startswith(_A_ROW)


async def suppress_triggers(connection: Connection) -> bool:
    """Let this session fire no ordinary trigger of the user's, where the role may; whether it may.

    A vector is no change that `updated_at` or an audit table should tell of. Those that are ENABLE ALWAYS fire still.
    Source: https://www.postgresql.org/docs/current/runtime-config-client.html#GUC-SESSION-REPLICATION-ROLE
    """
    may = "has_parameter_privilege('session_replication_role', 'SET')"
    if connection.info.server_version < 150000:
        may = "(SELECT rolsuper FROM pg_roles WHERE rolname = current_user)"
    row = await one(connection, f"SELECT {may}")
    if row is None or not row[0]:
        return False
    await connection.execute("SET session_replication_role = replica")
    return True


async def set_up_origin(connection: Connection, slot: str, number: int) -> tuple[str, int] | None:
    """Make every transaction of this session carry our `number`th origin: its (name, id); None where we may not.

    Source: https://www.postgresql.org/docs/current/replication-origins.html
    """
    name = f"{slot}_{number}"
    row = await one(
        connection,
        "SELECT bool_and(has_function_privilege(p.oid, 'EXECUTE')) FROM pg_proc p"
        " WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.proname = ANY($1)",
        ([f"pg_replication_origin_{verb}" for verb in ("create", "oid", "session_setup")],),
    )
    if row is None or not row[0]:
        return None
    try:
        found = await one(connection, "SELECT pg_replication_origin_oid($1)", (name,))
        if found is None or found[0] is None:
            found = await one(connection, "SELECT pg_replication_origin_create($1)", (name,))
        await connection.execute("SELECT pg_replication_origin_session_setup($1)", (name,))
    except psycopg.Error as error:
        if connection.broken:
            raise
        log.info("writing without a replication origin: %s", error.diag.message_primary)
        return None
    assert found is not None
    return name, int(found[0])
