"""`cdc-embedder pause`, `resume` and `remove`. And what a name on the command line means.

A column that is paused is not served: its changes are passed over, and a scan is requested when it goes on. A table
that was dropped has no name any more: its columns are found by the one that it had when they were configured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import LiteralString

import psycopg

from cdc_embedder.asking import NAMES, Row, session
from cdc_embedder.errors import Problem
from cdc_embedder.identifiers import join, join_plain, split

Connection = psycopg.Connection[Row]

Show = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Meant:
    """A table, quoted, and the ids of its configured columns, or of one of them where the name is a column's (`one`).

    `gone`: the table was dropped.
    """

    table: str
    ids: list[int]
    one: bool
    gone: bool


def pause(dsn: str, name: str, show: Show | None = None) -> int:
    """Stop filling what `name` means; returns how many columns it is. Raises Problem. `show`: as of `session`."""
    with session(dsn, "cli", "pausing", show) as connection:
        meant = _there(called(connection, name))
        if not meant.one:
            return _number(connection, "SELECT cdc_embedder.pause($1::regclass) AS columns", meant.table)
        connection.execute("UPDATE cdc_embedder.embedding_column SET enabled = false WHERE id = $1", meant.ids)
        return 1


def resume(dsn: str, name: str, show: Show | None = None) -> int:
    """Go on with what `name` means; returns how many columns it is. Raises Problem. `show`: as of `session`.

    A column whose table was replaced by another of its name is bound to the new one.
    """
    with session(dsn, "cli", "resuming", show) as connection:
        meant = _there(called(connection, name))
        if not meant.one:
            return _number(connection, "SELECT cdc_embedder.resume($1::regclass) AS columns", meant.table)
        connection.execute(
            "UPDATE cdc_embedder.embedding_column SET source_table = $2::regclass, enabled = true WHERE id = $1",
            (*meant.ids, meant.table),
        )
        return 1


def remove(dsn: str, table: str, target: str, show: Show | None = None) -> None:
    """Stop serving the column `target` of `table` (quoted), which may have been dropped. Raises Problem."""
    parts = split(table)
    name = join_plain([*parts, target])
    with session(dsn, "cli", "removing the column", show) as connection:
        found = configured(connection, parts, target)
        if not found:
            raise Problem(f"{name} is not configured", hint=NAMES)
        # One whose table was renamed has that name now; one whose table was dropped is still told by the old one.
        meant = [row["id"] for row in found if row["present"] or row["gone"] or not found[0]["present"]]
        if len(meant) > 1:
            earlier = next((row["id"] for row in found if row["gone"]), meant[-1])
            raise Problem(
                f"{len(meant)} configured columns are called {name}: a table of that name was replaced",
                hint=f"the earlier table's is removed by its id: DELETE FROM cdc_embedder.embedding_column"
                f" WHERE id = {earlier}",
            )
        connection.execute("DELETE FROM cdc_embedder.embedding_column WHERE id = $1", meant)


def called(connection: Connection, name: str) -> Meant:
    """The table or the configured column that `name` means.

    `a.b` is the column b of the table a where such a column is configured, else the table b of the schema a. Raises
    Problem.
    """
    parts = split(name)
    if 1 < len(parts) <= 3 and (found := configured(connection, parts[:-1], parts[-1])):
        there = found[0]["there"]
        return Meant(join(parts[:-1]) if there else _stored(found[0]), [found[0]["id"]], one=True, gone=not there)
    if len(parts) <= 2:
        table, found = join(parts), configured(connection, parts)
        if connection.execute("SELECT pg_catalog.to_regclass($1) IS NOT NULL AS yes", (table,)).fetchall()[0]["yes"]:
            return Meant(table, [row["id"] for row in found if row["present"]], one=False, gone=False)
        if found:
            return Meant(_stored(found[0]), [row["id"] for row in found], one=False, gone=True)
    raise Problem(f"{name} is neither a table nor a configured column", hint="see: cdc-embedder status")


def configured(connection: Connection, table: Sequence[str], target: str | None = None) -> list[Row]:
    """The configured columns that the identifiers of a table, and of a column, may mean, the likeliest first.

    `there`: a table has that name; `present`: it is the column's; `gone`: the column's was dropped; `source_schema` and
    `source_name`: the name that it had when the column was configured. None of more than two parts.
    """
    if len(table) > 2:
        return []
    schema = table[0] if len(table) == 2 else None
    return connection.execute(_CONFIGURED, (join(table), schema, table[-1], target)).fetchall()


def _stored(row: Row) -> str:
    return join_plain([row["source_schema"], row["source_name"]])


def _there(meant: Meant) -> Meant:
    if meant.gone:
        raise Problem(
            f"the table {meant.table} was dropped",
            hint="cdc-embedder remove ends that; or make a table of that name, and resume it",
        )
    return meant


def _number(connection: Connection, statement: LiteralString, table: str) -> int:
    [row] = connection.execute(statement, (table,)).fetchall()
    return int(row["columns"])


# In the operator's search path, for the name's sake: nothing else is looked for by it, where others may make things.
_CONFIGURED = """
SELECT c.id, named.oid IS NOT NULL AS there, t.oid IS NULL AS gone, c.source_schema, c.source_name,
       coalesce(c.source_table OPERATOR(pg_catalog.=) named.oid, false) AS present
  FROM cdc_embedder.embedding_column c
  LEFT JOIN pg_catalog.pg_class t ON t.oid OPERATOR(pg_catalog.=) c.source_table
  LEFT JOIN (SELECT n.oid, n.relname, s.nspname
               FROM pg_catalog.pg_class n
               JOIN pg_catalog.pg_namespace s ON s.oid OPERATOR(pg_catalog.=) n.relnamespace
              WHERE n.oid OPERATOR(pg_catalog.=) pg_catalog.to_regclass($1)) named ON true
 WHERE ($4::pg_catalog.name IS NULL OR c.target_column OPERATOR(pg_catalog.=) $4)
   AND CASE WHEN named.oid IS NULL
            THEN t.oid IS NULL AND c.source_name OPERATOR(pg_catalog.=) $3::pg_catalog.name
                 AND (c.source_schema OPERATOR(pg_catalog.=) $2::pg_catalog.name
                      OR $2 IS NULL AND c.source_schema OPERATOR(pg_catalog.=) ANY (pg_catalog.current_schemas(true)))
            ELSE c.source_table OPERATOR(pg_catalog.=) named.oid
                 OR c.source_schema OPERATOR(pg_catalog.=) named.nspname
                    AND c.source_name OPERATOR(pg_catalog.=) named.relname END
 ORDER BY present DESC, c.id
"""
