"""The backlog of a column: keys that were spilled so that the slot need not wait for them. Rule 8.

A spill is one statement: it is durable when that has committed (our sessions are pinned to that), and only then may the
watermark move on. A key that is spilled again keeps `first_lsn` and `committed_at` and has the rest renewed, `seq`
above all: a row is removed only by who knows its `seq`. It is an INSERT from arrays and no COPY, because a key may be
there already.
Rule 9 holds for it as for a write-back: an instance that was replaced would leave rows that its successor, which reads
the same changes from the slot, does not know of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from psycopg import sql

from cdc_embedder.catalog import EmbeddingColumn
from cdc_embedder.errors import SlotBusy
from cdc_embedder.lsn import LSN
from cdc_embedder.pending import Key, Spill
from cdc_embedder.rows import expressions as e
from cdc_embedder.rows.session import Connection, one
from cdc_embedder.rows.writeback import Term
from cdc_embedder.visibility import widen

SPILL = 10_000
"""Keys a spill."""

PAGE = 1000
"""Keys taken up again at once."""

_SEQS = 1 << 20
"""Each spill has so many values of `seq` for itself."""


@dataclass(frozen=True, slots=True)
class Spilled:
    """A row of the backlog. `xid` (32 bits) is None where every later snapshot sees the transaction.

    `committed_at`: when its oldest change committed, seconds since 1970 by the server's clock; None where not known.
    """

    key: Key
    seq: int
    xid: int | None
    committed_at: float | None


async def spill(
    connection: Connection, column: EmbeddingColumn, term: Term, spills: Sequence[Spill]
) -> tuple[int, int]:
    """Write the keys: (seq of the first, the others follow it; rows that were not there before).

    Durable when it returns. Raises SlotBusy, with nothing written, where the term is over; psycopg.Error as it comes.
    """
    row = await one(connection, "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::int8")
    assert row is not None
    keys = [spill.key for spill in spills]
    found = await one(
        connection,
        _spill(column, term),
        [
            *([key[n] for key in keys] for n in range(len(column.key))),
            [str(spill.first) for spill in spills],
            [str(spill.last) for spill in spills],
            [str(widen(spill.xid, row[0])) for spill in spills],
            [None if spill.at is None else repr(spill.at) for spill in spills],
        ],
    )
    assert found is not None
    first, fresh = found
    if first is None:
        raise SlotBusy(f"another instance took over the slot {term.slot} before keys of {column.label} were spilled")
    return first, fresh


async def page(connection: Connection, column: EmbeddingColumn, after: int) -> list[Spilled]:
    """The next rows whose seq is greater than `after`."""
    cursor = await connection.execute(_page(column), (after,))
    return [Spilled(tuple(key), seq, xid, at) for key, seq, xid, at in await cursor.fetchall()]


async def remove(connection: Connection, column: EmbeddingColumn, settled: Sequence[tuple[Key, int]]) -> int:
    """Remove the rows of these keys that still have the seq beside them; how many there were."""
    row = await one(
        connection,
        _remove(column),
        [*([key[n] for key, _ in settled] for n in range(len(column.key))), [seq for _, seq in settled]],
    )
    assert row is not None
    return int(row[0])


async def count(connection: Connection, column: EmbeddingColumn) -> int:
    """How many keys there are."""
    row = await one(connection, sql.SQL("SELECT count(*) FROM {}").format(_name(column)))
    assert row is not None
    return int(row[0])


async def spilled_from(connection: Connection, column: EmbeddingColumn) -> LSN | None:
    """Where the commit record of the oldest transaction begins whose keys are here."""
    row = await one(connection, "SELECT cdc_embedder._spilled_from($1)::text", (column.id,))
    return None if row is None or row[0] is None else LSN.parse(row[0])


async def forget_transactions(connection: Connection, slot: str) -> None:
    """Another timeline: its xids and positions say nothing about the transactions that these rows were noted for."""
    cursor = await connection.execute(
        "SELECT to_regclass(format('cdc_embedder.backlog_%s', id))::text FROM cdc_embedder.embedding_column"
        " WHERE slot = $1 AND to_regclass(format('cdc_embedder.backlog_%s', id)) IS NOT NULL",
        (slot,),
    )
    for (name,) in await cursor.fetchall():
        async with connection.transaction():
            await connection.execute("SET LOCAL statement_timeout = 0")
            await connection.execute(
                sql.SQL("UPDATE {} SET xid = NULL, first_lsn = '0/0', last_lsn = '0/0' WHERE last_lsn <> '0/0'").format(
                    sql.SQL(name)
                )
            )


def _name(column: EmbeddingColumn) -> e.Composed:
    return sql.Identifier("cdc_embedder", f"backlog_{column.id}")


def _keys(column: EmbeddingColumn, alias: str | None = None) -> list[e.Composed]:
    names = [f"key_{n + 1}" for n in range(len(column.key))]
    return [sql.Identifier(alias, name) if alias else sql.Identifier(name) for name in names]


def _arrays(column: EmbeddingColumn) -> e.Composed:
    return sql.SQL(", ").join(sql.SQL(f"${n + 1}::text[]") for n in range(len(column.key)))


def _spill(column: EmbeddingColumn, term: Term) -> sql.Composed:
    """Two spellings of one key (1.0 and 1.00) are one row, with the xid of the later transaction, and with its seq: who
    holds the other one removes nothing."""
    width, comma = len(column.key), sql.SQL(", ").join
    return sql.SQL(
        "WITH guard AS MATERIALIZED (SELECT FROM cdc_embedder.leader WHERE slot = {slot} AND term = {term} FOR SHARE),"
        " base AS MATERIALIZED (SELECT nextval({sequence}::regclass) * {seqs} AS seq FROM guard), given AS ("
        " SELECT {names}, first_lsn, last_lsn, xid, committed_at, seq FROM {backlog}"  # its types and collations
        "   WHERE false"
        " UNION ALL SELECT {typed}, i.first_lsn, i.last_lsn, i.xid, to_timestamp(i.at), base.seq + i.ordinal - 1 AS seq"
        "   FROM unnest({arrays}, {first}::text[]::pg_lsn[], {last}::text[]::pg_lsn[], {xid}::text[]::xid8[],"
        "               {at}::text[]::float8[])"
        "        WITH ORDINALITY AS i({names}, first_lsn, last_lsn, xid, at, ordinal), base"
        "), written AS ("
        " INSERT INTO {backlog} AS b ({names}, first_lsn, last_lsn, committed_at, xid, seq)"
        " SELECT {names}, min(first_lsn), max(last_lsn), min(committed_at),"
        "        (array_agg(xid ORDER BY last_lsn DESC, seq DESC))[1],"
        "        (array_agg(seq ORDER BY last_lsn DESC, seq DESC))[1]"
        "   FROM given GROUP BY {names}"
        " ON CONFLICT ({names}) DO UPDATE SET last_lsn = greatest(b.last_lsn, excluded.last_lsn),"
        "    committed_at = least(b.committed_at, excluded.committed_at),"
        "    xid = CASE WHEN excluded.last_lsn >= b.last_lsn THEN excluded.xid ELSE b.xid END,"
        "    seq = CASE WHEN excluded.last_lsn >= b.last_lsn THEN excluded.seq ELSE b.seq END"
        " RETURNING b.xmax = 0 AS fresh)"
        " SELECT (SELECT seq FROM base), count(*) FILTER (WHERE fresh) FROM written"
    ).format(
        slot=sql.Literal(term.slot),
        term=sql.Literal(term.number),
        sequence=sql.Literal(f"cdc_embedder.backlog_{column.id}_seq"),
        seqs=sql.Literal(_SEQS),
        typed=comma(
            sql.SQL("{} AS {}").format(value, name)
            for value, name in zip(e.typed(column.key, _keys(column, "i")), _keys(column), strict=True)
        ),
        arrays=_arrays(column),
        first=sql.SQL(f"${width + 1}"),
        last=sql.SQL(f"${width + 2}"),
        xid=sql.SQL(f"${width + 3}"),
        at=sql.SQL(f"${width + 4}"),
        names=comma(_keys(column)),
        backlog=_name(column),
    )


def _page(column: EmbeddingColumn) -> sql.Composed:
    return sql.SQL(
        "SELECT ARRAY[{keys}], b.seq,"
        "       CASE WHEN NOT pg_visible_in_snapshot(b.xid, pg_current_snapshot())"
        "            THEN (b.xid::text::numeric % 4294967296)::int8 END,"
        "       extract(epoch FROM b.committed_at)::float8"
        "  FROM {backlog} b WHERE b.seq > $1::int8 ORDER BY b.seq LIMIT {limit}"
    ).format(
        keys=sql.SQL(", ").join(sql.SQL("CAST({} AS text)").format(key) for key in _keys(column, "b")),
        backlog=_name(column),
        limit=sql.Literal(PAGE),
    )


def _remove(column: EmbeddingColumn) -> sql.Composed:
    width = len(column.key)
    return sql.SQL(
        "WITH removed AS (DELETE FROM {backlog} b USING unnest({arrays}, ${seq}::int8[]) AS i({names}, seq)"
        " WHERE {same} AND b.seq = i.seq RETURNING 1) SELECT count(*) FROM removed"
    ).format(
        backlog=_name(column),
        arrays=_arrays(column),
        seq=sql.SQL(str(width + 1)),
        names=sql.SQL(", ").join(_keys(column)),
        same=e.same_key(column.key, _keys(column, "b"), e.typed(column.key, _keys(column, "i"))),
    )
