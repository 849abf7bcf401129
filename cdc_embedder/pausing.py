"""`cdc-embedder pause` and `resume`: of all columns of a table, or of one. And what a name on the command line means.

A column that is paused is not served: its changes are passed over, and a scan is requested when it goes on.
"""

from __future__ import annotations

import psycopg

from cdc_embedder.asking import Row, session
from cdc_embedder.errors import Problem
from cdc_embedder.identifiers import join, split

Connection = psycopg.Connection[Row]


def pause(dsn: str, name: str) -> int:
    """Stop filling what `name` means; returns how many columns it is. Raises Problem."""
    with session(dsn, "cli", "pausing") as connection:
        table, column = called(connection, name)
        if column is None:
            return _number(connection, "SELECT cdc_embedder.pause($1::regclass) AS columns", table)
        connection.execute("UPDATE cdc_embedder.embedding_column SET enabled = false WHERE id = $1", (column,))
        return 1


def resume(dsn: str, name: str) -> int:
    """Go on with what `name` means; returns how many columns it is. Raises Problem.

    A column whose table was replaced by another of its name is bound to the new one.
    """
    with session(dsn, "cli", "resuming") as connection:
        table, column = called(connection, name)
        if column is None:
            return _number(connection, "SELECT cdc_embedder.resume($1::regclass) AS columns", table)
        connection.execute(
            "UPDATE cdc_embedder.embedding_column SET source_table = $2::regclass, enabled = true WHERE id = $1",
            (column, table),
        )
        return 1


def called(connection: Connection, name: str) -> tuple[str, int | None]:
    """The table that `name` means, quoted, and the id of the configured column where it means one of those.

    `a.b` is the column b of the table a where such a column is configured, else the table b of the schema a. Raises
    Problem.
    """
    parts = split(name)
    if len(parts) > 1:
        table = join(parts[:-1])
        found = connection.execute(_COLUMN, (table, parts[-1])).fetchone() if len(parts) <= 3 else None
        if found is not None:
            return table, found["id"]
    if len(parts) <= 2:
        table = join(parts)
        if connection.execute("SELECT to_regclass($1) IS NOT NULL AS yes", (table,)).fetchall()[0]["yes"]:
            return table, None
    raise Problem(f"{name} is neither a table nor a configured column", hint="see: cdc-embedder status")


def _number(connection: Connection, statement: str, table: str) -> int:
    [row] = connection.execute(statement, (table,)).fetchall()
    return int(row["columns"])


_COLUMN = """
SELECT c.id FROM cdc_embedder.embedding_column c
 WHERE c.target_column = $2
   AND (c.source_table = to_regclass($1)
        OR (c.source_schema, c.source_name) = (SELECT n.nspname, t.relname FROM pg_class t
             JOIN pg_namespace n ON n.oid = t.relnamespace WHERE t.oid = to_regclass($1)))
"""
