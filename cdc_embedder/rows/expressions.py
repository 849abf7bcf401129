"""The SQL that every statement on a configured column shares: its text, fingerprint, vector digest and key.

The fingerprint is computed by the server on both sides of every comparison. It is SHA-256 over an injective encoding
of the source columns: for each, one byte for NULL or not and, unless it is the only one, its length in bytes; then
the bytes themselves in the database's own encoding. It depends on no collation and no setting, tells NULL from empty,
and works on FIPS builds (`md5()` does not). The vector's digest is 64 bits of the server's array hash: it notices
somebody else's write, it is no protection against one.
"""

from __future__ import annotations

from collections.abc import Sequence

from psycopg import sql

from cdc_embedder.catalog import EmbeddingColumn, KeyColumn

Composed = sql.Composable


def table(column: EmbeddingColumn) -> Composed:
    """The source table, schema-qualified."""
    return sql.Identifier(column.schema, column.table)


def ledger(column: EmbeddingColumn) -> Composed:
    """The column's ledger."""
    return sql.Identifier("cdc_embedder", f"ledger_{column.id}")


def target(column: EmbeddingColumn, alias: str = "t") -> Composed:
    """The vector column of the row `alias`."""
    assert column.target is not None
    return sql.Identifier(alias, column.target.name)


def ledger_key(position: int, alias: str = "l") -> Composed:
    """The ledger's n-th key column, counted from 0."""
    return sql.Identifier(alias, f"key_{position + 1}")


def operator(name: tuple[str, str]) -> Composed:
    """An operator by schema and name: sessions have nothing but pg_catalog on their search path."""
    return sql.SQL("OPERATOR({}.{})").format(sql.Identifier(name[0]), sql.SQL(name[1]))


def source_key(column: EmbeddingColumn, alias: str = "t") -> list[Composed]:
    """The key columns of the source row `alias`."""
    return [sql.Identifier(alias, key.name) for key in column.key]


def same_key(keys: Sequence[KeyColumn], left: Sequence[Composed], right: Sequence[Composed]) -> Composed:
    """`left` and `right` are the same key by the equality of the primary key's own index."""
    return sql.SQL(" AND ").join(
        sql.SQL("{} {} {}").format(a, operator(key.equal), b) for key, a, b in zip(keys, left, right, strict=True)
    )


def typed(keys: Sequence[KeyColumn], texts: Sequence[Composed]) -> list[Composed]:
    """Key columns that travelled as text, cast to the types of the key."""
    return [sql.SQL("CAST({} AS {})").format(text, sql.SQL(key.type)) for key, text in zip(keys, texts, strict=True)]


def key_text(column: EmbeddingColumn, alias: str = "t") -> Composed:
    """The key of the source row `alias` as text[]."""
    parts = [sql.SQL("CAST({} AS text)").format(key) for key in source_key(column, alias)]
    return sql.SQL("ARRAY[{}]").format(sql.SQL(", ").join(parts))


def text(column: EmbeddingColumn, alias: str = "t") -> Composed:
    """The text to embed: NULL when every source column is NULL; else those that are not, joined by the separator, or
    put into the template, where a column that is NULL leaves nothing."""
    parts = _parts(column, alias)
    if column.template is not None:
        filled = [
            sql.Literal(part) if isinstance(part, str) else sql.SQL("coalesce({}, '')").format(parts[part])
            for part in column.template
        ]
        return sql.SQL("CASE WHEN NOT {} THEN {} END").format(is_null(column, alias), sql.SQL(" || ").join(filled))
    if len(parts) == 1:
        return parts[0]
    return sql.SQL("CASE WHEN {} THEN NULL ELSE concat_ws({}, {}) END").format(
        is_null(column, alias), sql.Literal(column.separator), sql.SQL(", ").join(parts)
    )


def is_null(column: EmbeddingColumn, alias: str = "t") -> Composed:
    """Whether the row has no text."""
    return sql.SQL("({})").format(
        sql.SQL(" AND ").join(sql.SQL("{} IS NULL").format(part) for part in _parts(column, alias))
    )


def fingerprint(column: EmbeddingColumn, alias: str = "t") -> Composed:
    """32 bytes that are equal exactly when the source columns are, byte for byte."""
    parts = _parts(column, alias)
    octets = "convert_to({0}, getdatabaseencoding())"
    if len(parts) == 1:
        one = "CASE WHEN {0} IS NULL THEN '\\x00'::bytea ELSE '\\x01'::bytea || " + octets + " END"
    else:
        one = (
            "CASE WHEN {0} IS NULL THEN '\\x00'::bytea "
            "ELSE '\\x01'::bytea || int4send(octet_length({0})) || " + octets + " END"
        )
    encoded = sql.SQL(" || ").join(sql.SQL(one).format(part) for part in parts)
    return sql.SQL("sha256({})").format(encoded)


def digest(column: EmbeddingColumn, vector: Composed) -> Composed:
    """64 bits of the vector; NULL for no vector."""
    assert column.target is not None
    if column.target.kind in ("vector", "halfvec"):
        vector = sql.SQL("CAST({} AS real[])").format(vector)
    return sql.SQL("hash_array_extended({}, 0)").format(vector)


def _parts(column: EmbeddingColumn, alias: str) -> list[Composed]:
    return [sql.SQL("CAST({} AS text)").format(sql.Identifier(alias, name)) for name in column.sources]
