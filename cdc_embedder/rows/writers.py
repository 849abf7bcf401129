"""The sessions that write vectors back, and which of them writes what.

Where the server lets us, one session writes under a replication origin of its own, so that the stream can pass our
echo over; it writes only rows of tables whose triggers our update does not fire (a trigger's writes would carry the
origin too, and be hidden). Everything else goes through a plain session. Origins: one name a session, `<slot>_1`;
up to PostgreSQL 17 each takes one of `max_replication_slots`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import psycopg

from cdc_embedder.catalog import EmbeddingColumn
from cdc_embedder.embedding.base import Vectors
from cdc_embedder.errors import Problem
from cdc_embedder.rows.session import Connection, one
from cdc_embedder.rows.writeback import Write, WriteBack

log = logging.getLogger(__name__)

_A_ROW = ("22", "23", "38", "39", "44", "P0")
"""SQLSTATE classes that a constraint, a trigger or a conversion raises because of one row's contents."""


class Writers:
    """A marked session where there is one, and a plain one. `origin` is its name and numeric id, or None."""

    def __init__(self, plain: Connection, marked: Connection | None, origin: tuple[str, int] | None) -> None:
        self._plain = plain
        self._marked = marked
        self.origin = origin
        self._statements: dict[tuple[int, bool], tuple[EmbeddingColumn, WriteBack]] = {}

    async def write(self, column: EmbeddingColumn, writes: Sequence[Write], vectors: Vectors) -> set[int]:
        """See `WriteBack.write`."""
        marked = self._marked is not None and not column.fires_triggers
        known = self._statements.get((column.id, marked))
        if known is None or known[0] is not column:
            session = self._marked if marked and self._marked is not None else self._plain
            known = (column, WriteBack(session, column, only_without_triggers=marked))
            self._statements[column.id, marked] = known
        return await known[1].write(writes, vectors)

    @staticmethod
    def blames_a_row(problem: Problem) -> bool:
        """Whether the statement may have failed because of what one of its rows holds."""
        return problem.sqlstate is not None and problem.sqlstate.startswith(_A_ROW)


async def set_up_origin(connection: Connection, slot: str) -> tuple[str, int] | None:
    """Make every transaction of this session carry an origin of ours: its (name, id); None where we may not.

    Source: https://www.postgresql.org/docs/current/replication-origins.html
    """
    name = f"{slot}_1"
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
