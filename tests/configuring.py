"""What the tests of the configuration table say again and again: INSERT a row, ask one question."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg import sql

Connection = psycopg.Connection[Any]

DOCUMENTS = "CREATE TABLE documents (id bigint PRIMARY KEY, title text, body text, n int, embedding real[])"


def configure(conn: Connection, table: str = "documents", columns: str = "{body}", **more: object) -> int:
    """INSERT a row as a user would; its id."""
    values = {"source_table": table, "source_columns": columns, "target_column": "embedding", "model": "tiny"} | more
    names = sql.SQL(", ").join(map(sql.Identifier, values))
    marks = sql.SQL(", ").join(sql.Placeholder() * len(values))
    statement = sql.SQL("INSERT INTO cdc_embedder.embedding_column ({}) VALUES ({}) RETURNING id")
    row = conn.execute(statement.format(names, marks), list(values.values())).fetchone()
    assert row is not None
    return int(row[0])


def one(conn: Connection, statement: Any, *parameters: object) -> Any:
    """The first row, or its only value."""
    row = conn.execute(statement, parameters or None).fetchone()
    return None if row is None else row[0] if len(row) == 1 else row


def column(conn: Connection, names: str) -> Any:
    """What the only row of the configuration table says."""
    return one(conn, f"SELECT {names} FROM cdc_embedder.embedding_column")


def published(conn: Connection) -> list[str]:
    """The tables of every publication of ours."""
    rows = conn.execute(
        "SELECT r.prrelid::regclass::text FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid"
        " WHERE p.pubname IN (SELECT slot FROM cdc_embedder.embedding_column) ORDER BY 1"
    )
    return [row[0] for row in rows]


def generations(conn: Connection) -> list[tuple[int, bool]]:
    """(generation, is current) of the only column."""
    rows = conn.execute("SELECT generation, superseded_at IS NULL FROM cdc_embedder.generation ORDER BY 1")
    return [(row[0], row[1]) for row in rows]


def wait_until_blocked(watcher: Connection, blocked: Connection) -> None:
    """Returns when `blocked` waits for a lock."""
    while not one(watcher, "SELECT count(*) FROM pg_locks WHERE NOT granted AND pid = %s", blocked.info.backend_pid):
        pass
