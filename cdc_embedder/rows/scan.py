"""The scan: every key of a table in pages, and which of them a fetch should judge. Rule 10's other way in.

A page reads up to a thousand rows in key order, counts them, and names the keys whose verdict is not *done*. Its
finding is a hint like the stream's: the fetch judges. A sweep removes ledger rows whose source row is gone. Paging is
by key, so that no snapshot is held from one page to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from psycopg import sql

from cdc_embedder.catalog import EmbeddingColumn, KeyColumn
from cdc_embedder.pending import Key
from cdc_embedder.rows import expressions as e
from cdc_embedder.rows import fetch
from cdc_embedder.rows.session import Connection, one

MOST_FAILED = 100_000
"""More failed rows are not counted."""

PAGE = 1000
"""Rows a page."""


@dataclass(frozen=True, slots=True)
class Page:
    """What a page held. `last` is where the next one goes on; None when this was the last page."""

    last: Key | None
    wanted: list[Key]
    rows: int
    null: int
    current: int
    failed: int
    truncated: int


async def page(connection: Connection, column: EmbeddingColumn, after: Key | None) -> Page:
    """The page of rows whose keys come after `after` (None: the first). Raises psycopg.Error as it comes."""
    statement = _page(column, first=after is None)
    row = await one(connection, statement, list(after or ()))
    assert row is not None
    rows, null, current, failed, truncated, wanted, last = row
    return Page(
        tuple(last) if rows == PAGE else None, [tuple(key) for key in wanted], rows, null, current, failed, truncated
    )


async def sweep(connection: Connection, column: EmbeddingColumn, after: Key | None) -> tuple[Key | None, int]:
    """Remove the ledger rows without a source row from the page after `after`: where to go on (or None), how many."""
    row = await one(connection, _sweep(column, first=after is None), list(after or ()))
    assert row is not None
    seen, last, removed = row
    return (tuple(last) if seen == PAGE else None), removed


async def due(connection: Connection, column: EmbeddingColumn, limit: int) -> list[Key]:
    """Keys of failed rows whose time to be tried again has come, oldest first."""
    keys = [sql.SQL("CAST({} AS text)").format(e.ledger_key(n)) for n in range(len(column.key))]
    cursor = await connection.execute(
        sql.SQL(
            "SELECT {} FROM {} l WHERE l.state = 'failed' AND l.retry_at <= now() ORDER BY l.retry_at LIMIT {}"
        ).format(sql.SQL(", ").join(keys), e.ledger(column), sql.Literal(limit))
    )
    return [tuple(key) for key in await cursor.fetchall()]


async def failed(connection: Connection, column: EmbeddingColumn) -> int:
    """How many rows have failed, of any generation; MOST_FAILED where it is more."""
    row = await one(
        connection,
        sql.SQL("SELECT count(*) FROM (SELECT FROM {} l WHERE l.state = 'failed' LIMIT {}) f").format(
            e.ledger(column), sql.Literal(MOST_FAILED)
        ),
    )
    assert row is not None
    return int(row[0])


async def holds_vectors(connection: Connection, column: EmbeddingColumn) -> bool:
    """Whether the target holds a vector anywhere while the ledger knows of none: somebody else put it there."""
    row = await one(
        connection,
        sql.SQL("SELECT NOT EXISTS (SELECT FROM {}) AND EXISTS (SELECT FROM {} t WHERE {} IS NOT NULL)").format(
            e.ledger(column), e.table(column), e.target(column)
        ),
    )
    assert row is not None
    return bool(row[0])


def _page(column: EmbeddingColumn, *, first: bool) -> sql.Composed:
    source = e.source_key(column)
    f = sql.SQL("f.fingerprint")
    return sql.SQL(
        "WITH page AS MATERIALIZED ("
        " SELECT {key_text} AS key, row_number() OVER (ORDER BY {order}) AS position,"
        "        {verdict} AS verdict, {is_null} AS is_null,"
        "        {current} AS current, {failed} AS failed, l.state = 'truncated' AS truncated"
        "   FROM (SELECT {columns} FROM {table} t{after} ORDER BY {order} LIMIT {limit}) t"
        "   LEFT JOIN {ledger} l ON {same}"
        "   CROSS JOIN LATERAL (SELECT {fingerprint} AS fingerprint OFFSET 0) f)"
        " SELECT count(*), count(*) FILTER (WHERE is_null), count(*) FILTER (WHERE current AND NOT is_null),"
        "        count(*) FILTER (WHERE failed AND NOT is_null),"
        "        count(*) FILTER (WHERE current AND truncated AND NOT is_null),"
        "        coalesce(jsonb_agg(to_jsonb(key) ORDER BY position) FILTER (WHERE verdict <> 0), '[]'),"
        "        (SELECT to_jsonb(key) FROM page ORDER BY position DESC LIMIT 1)"
        "   FROM page"
    ).format(
        key_text=e.key_text(column),
        verdict=fetch.verdict(column, f),
        is_null=e.is_null(column),
        current=fetch.current(column, f),
        failed=fetch.failed(column, f),
        table=e.table(column),
        after=sql.SQL("") if first else sql.SQL(" WHERE {}").format(comes_after(column.key, source)),
        columns=sql.SQL(", ").join(sql.Identifier("t", name) for name in needed_columns(column)),
        order=in_order(column.key, source),
        limit=sql.Literal(PAGE),
        ledger=e.ledger(column),
        same=e.same_key(column.key, [e.ledger_key(n) for n in range(len(column.key))], source),
        fingerprint=e.fingerprint(column),
    )


def _sweep(column: EmbeddingColumn, *, first: bool) -> sql.Composed:
    ledger = [e.ledger_key(n) for n in range(len(column.key))]
    return sql.SQL(
        "WITH page AS MATERIALIZED ("
        " SELECT {ledger}, ARRAY[{texts}] AS key, row_number() OVER (ORDER BY {order}) AS position,"
        "        EXISTS (SELECT FROM {table} t WHERE {same}) AS present"
        "   FROM (SELECT * FROM {name} l{after} ORDER BY {order} LIMIT {limit}) l"
        "), removed AS ("
        " DELETE FROM {name} l USING page p WHERE NOT p.present AND {is_page} RETURNING 1)"
        " SELECT count(*), (SELECT to_jsonb(key) FROM page ORDER BY position DESC LIMIT 1),"
        "        (SELECT count(*) FROM removed)"
        "   FROM page"
    ).format(
        ledger=sql.SQL(", ").join(ledger),
        texts=sql.SQL(", ").join(sql.SQL("CAST({} AS text)").format(key) for key in ledger),
        table=e.table(column),
        same=e.same_key(column.key, e.source_key(column), ledger),
        name=e.ledger(column),
        after=sql.SQL("") if first else sql.SQL(" WHERE {}").format(comes_after(column.key, ledger)),
        order=in_order(column.key, ledger),
        limit=sql.Literal(PAGE),
        is_page=e.same_key(column.key, ledger, [e.ledger_key(n, "p") for n in range(len(column.key))]),
    )


def needed_columns(column: EmbeddingColumn) -> list[str]:
    """What the role is sure to have the right to read: key, sources and target, each once."""
    assert column.target is not None
    return list(dict.fromkeys([*(key.name for key in column.key), *column.sources, column.target.name]))


def in_order(keys: Sequence[KeyColumn], columns: Sequence[e.Composed]) -> e.Composed:
    """The order of the primary key's own index, which `comes_after` pages by."""
    return sql.SQL(", ").join(
        sql.SQL("{} USING {}").format(column, e.operator(key.less)) for key, column in zip(keys, columns, strict=True)
    )


def comes_after(keys: Sequence[KeyColumn], columns: Sequence[e.Composed]) -> e.Composed:
    """The key comes after the parameters, by its index's own operators.

    A row comparison makes one index condition, but takes one operator name for all columns; where an extension's type
    is among them it is spelled out, and the index serves its first column only.
    """
    values = e.typed(keys, [sql.SQL(f"${n + 1}::text") for n in range(len(keys))])
    if all(key.greater == ("pg_catalog", ">") for key in keys):
        left, right = sql.SQL(", ").join(columns), sql.SQL(", ").join(values)
        return sql.SQL("ROW({}) > ROW({})").format(left, right)
    condition: e.Composed = sql.SQL("false")
    for key, column, value in reversed(list(zip(keys, columns, values, strict=True))):
        condition = sql.SQL("({0} {1} {2} OR ({0} {3} {2} AND {4}))").format(
            column, e.operator(key.greater), value, e.operator(key.equal), condition
        )
    return condition
