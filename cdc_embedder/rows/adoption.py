"""Taking over the vectors that a target column holds at its first scan, where the user says that they are the model's.

A page of the scan gets a ledger row for each row of it that has a text, a vector that may be stored as it is (rule 13),
no ledger row, and that nobody has written since the column was configured: a text that changed later stands beside the
vector of another. The verdict that follows finds the ledger row; whatever has none is work like any other. Not for
deciding whether the vectors are right: `cdc_embedder.adopting` samples that.

Whether a row was written since is told by the transaction that wrote its present version: it must be older than every
transaction that ran then. xmin has 32 bits, and that of a frozen row may be of any age: one that lies between then and
now by its 32 bits counts as written since, which costs a call of the model and no more.
"""

from __future__ import annotations

from psycopg import sql
from psycopg.errors import InsufficientPrivilege

from cdc_embedder.catalog import EmbeddingColumn
from cdc_embedder.errors import ColumnFault
from cdc_embedder.pending import Key
from cdc_embedder.rows import expressions as e
from cdc_embedder.rows import scan
from cdc_embedder.rows.session import Connection, one
from cdc_embedder.rows.writeback import Term

LENGTH_TOLERANCE = 0.001
"""By how much the length of a vector of unit length may differ from 1: half precision leaves half of that."""


async def wanted(connection: Connection, column: EmbeddingColumn) -> bool:
    """Whether the column's present generation takes over vectors: until its first scan is complete."""
    row = await one(
        connection,
        "SELECT FROM cdc_embedder.generation WHERE column_id = $1 AND generation = $2 AND adopting",
        (column.id, column.generation),
    )
    return row is not None


async def page(connection: Connection, column: EmbeddingColumn, term: Term, after: Key | None) -> int:
    """Take over what may be of the scan's page after `after` (None: the first); how many rows it was.

    Raises ColumnFault where the right to read xmin is missing, psycopg.Error as it comes.
    """
    statement = _page(column, term, first=after is None)
    try:
        cursor = await connection.execute(statement, list(after or ()))
    except InsufficientPrivilege as error:
        grant = sql.SQL("GRANT SELECT (xmin) ON {} TO {}").format(e.table(column), sql.Identifier(connection.info.user))
        raise ColumnFault(
            f"adopting the vectors of {column.label}: {error.diag.message_primary}",
            hint=f"It takes xmin, too, which tells whether a row was written since: {grant.as_string(connection)}",
            sqlstate=error.sqlstate,
        ) from error
    return cursor.rowcount


def fit(column: EmbeddingColumn, vector: e.Composed) -> e.Composed:
    """SQL: `vector` is one that a write-back could have stored: not NULL, of the model's dimensions, rule 13."""
    assert column.target is not None
    return fitting(vector, column.target.kind, column.model.dimensions, normalized=column.model.normalize)


def fitting(vector: e.Composed, kind: str, dimensions: int, *, normalized: bool) -> e.Composed:
    """The same of a vector of this `kind`: arrays declare neither dimensions nor that there is no NULL in them."""
    shape = sql.SQL("{} IS NOT NULL")
    if kind in ("float4", "float8"):
        shape = sql.SQL("array_ndims({}) = 1")
    else:
        vector = sql.SQL("CAST({} AS real[])").format(vector)
    # A float4 has a square in float8, always; that of a float8 may be an error. With NaN a sum is beyond infinity.
    squares = "sum(CASE WHEN abs(u.x) < 1e-18 THEN 0 WHEN abs(u.x) < 1e18 THEN u.x * u.x ELSE 'NaN' END)"
    if kind != "float8":
        squares = "sum(u.x::float8 * u.x::float8)"
    length = sql.SQL(squares + " < 'Infinity'::float8")
    if normalized:
        length = sql.SQL("sqrt(" + squares + f") BETWEEN {1 - LENGTH_TOLERANCE} AND {1 + LENGTH_TOLERANCE}")
    return sql.SQL(
        "({} AND (SELECT count(*) = {size} AND count(u.x) = {size} AND {} FROM (SELECT unnest({}) AS x) u))"
    ).format(shape.format(vector), length, vector, size=sql.Literal(dimensions))


_SHAPE = """
WITH guard AS MATERIALIZED (
    SELECT s.adoptable_before::text::int8 AS before, pg_snapshot_xmax(pg_current_snapshot())::text::int8 AS next
      FROM cdc_embedder.generation g
      JOIN cdc_embedder.scan s ON s.column_id = g.column_id
      JOIN cdc_embedder.leader e ON e.slot = {slot} AND e.term = {term}
     WHERE g.column_id = {column_id} AND g.generation = {generation} AND g.superseded_at IS NULL AND g.adopting
       FOR SHARE OF g, e
)
INSERT INTO {ledger} ({ledger_names}, fingerprint, generation, vector_digest, state)
SELECT {source}, {fingerprint}, {generation}, {digest}, 'current'
  FROM (SELECT {columns}, t.xmin::text::int8 AS {xid} FROM {table} t{after} ORDER BY {order} LIMIT {limit}) t
 CROSS JOIN guard w
  LEFT JOIN {ledger} l ON {same}
 WHERE l.key_1 IS NULL AND NOT {is_null}
   AND mod(t.{xid} - mod(w.before, 4294967296) + 4294967296, 4294967296) >= w.next - w.before
   AND {fit}
 ORDER BY {order}
    ON CONFLICT DO NOTHING
"""


def _page(column: EmbeddingColumn, term: Term, *, first: bool) -> sql.Composed:
    source = e.source_key(column)
    names = scan.needed_columns(column)
    xid = "xid"
    while xid in names:
        xid += "_"
    comma = sql.SQL(", ").join
    return sql.SQL(_SHAPE).format(
        slot=sql.Literal(term.slot),
        term=sql.Literal(term.number),
        column_id=sql.Literal(column.id),
        generation=sql.Literal(column.generation),
        ledger=e.ledger(column),
        ledger_names=comma(sql.Identifier(f"key_{n + 1}") for n in range(len(column.key))),
        source=comma(source),
        fingerprint=e.fingerprint(column),
        digest=e.digest(column, e.target(column)),
        columns=comma(sql.Identifier("t", name) for name in names),
        xid=sql.Identifier(xid),
        table=e.table(column),
        after=sql.SQL("") if first else sql.SQL(" WHERE {}").format(scan.comes_after(column.key, source)),
        order=scan.in_order(column.key, source),
        limit=sql.Literal(scan.PAGE),
        same=e.same_key(column.key, [e.ledger_key(n) for n in range(len(column.key))], source),
        is_null=e.is_null(column),
        fit=fit(column, e.target(column)),
    )
