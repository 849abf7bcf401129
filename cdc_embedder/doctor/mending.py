"""Statements that make a configured column one that can be served again, as psql takes them.

The hints of the database's own checks are sentences for whoever configures a column, some with a statement in them.
What psql shall take as it stands is built from the catalog, by the SQLSTATE of the refusal, wherever that knows enough.
"""

from __future__ import annotations

import re
from typing import LiteralString

from cdc_embedder.catalog import EmbeddingColumn
from cdc_embedder.doctor.patient import Patient

_STATEMENT = re.compile(r"((?:ALTER |GRANT |SELECT cdc_embedder\.).*?)(?:[,;] (or .*?))?\.?$", re.DOTALL)


def split(hint: str) -> tuple[str, str]:
    """Why, and what is to be done: the statement that such a sentence ends with, or all of it as an SQL comment."""
    if (found := _STATEMENT.search(hint)) and "..." not in hint:
        why = hint[: found.start()].rstrip(": ")
        otherwise = f" -- {found[2]}" if found[2] else ""
        return why[:1].lower() + why[1:], f"{found[1]};{otherwise}"
    return "", f"-- {hint}" if hint else ""


async def mend(patient: Patient, column: EmbeddingColumn, sqlstate: str | None) -> str:
    """The statement against such a refusal of table, sources or key; nothing where only people can know."""
    match sqlstate:
        case "42P01":
            return await _built(patient, _REMOVAL, column.id)
        case "42P16":
            return await _built(patient, _KEY, column.id)
        case "42804":
            return await _built(patient, _SOURCES, column.id)
        case "55000":
            return await default_identity(patient, column)
    return ""


async def mend_target(patient: Patient, column: EmbeddingColumn, sqlstate: str | None) -> str:
    """The statement against such a refusal of the target; nothing where its hint has one, or only people can know."""
    match sqlstate:
        case "42703":
            return await _built(patient, _NEW_TARGET, column.id)
        case "42804":
            return await _built(patient, _TYPE_OF_TARGET, column.id)
    return ""


async def default_identity(patient: Patient, column: EmbeddingColumn) -> str:
    """For each relation of the table whose identity makes updates fail: of a publication of keys any but the default.

    An ALTER TABLE of a partitioned table does not reach its partitions.
    """
    broken = await _built(patient, _IDENTITIES, column.table_oid, "n")
    return (not column.keys_only and broken) or await _built(patient, _IDENTITIES, column.table_oid, "nif")


async def not_full(patient: Patient, column: EmbeddingColumn) -> tuple[str, str]:
    """The relations of the table that have REPLICA IDENTITY FULL, and the statements against it; nothing if none has.

    On a partitioned table itself it does nothing.
    """
    [names] = await patient.one(_FULL, column.table_oid)
    return names or "", await _built(patient, _IDENTITIES, column.table_oid, "f") if names else ""


async def _built(patient: Patient, query: LiteralString, *parameters: object) -> str:
    return "\n".join(row[0] for row in await patient.rows(query, *parameters) if row[0])


_REMOVAL = """
SELECT format('DELETE FROM cdc_embedder.embedding_column WHERE id = %s;', c.id)
  FROM cdc_embedder.embedding_column c
 WHERE c.id = $1 AND NOT EXISTS (SELECT FROM pg_class t WHERE t.oid = c.source_table)
"""

# the columns of the key that there is (deferrable), or of the one that there was
_KEY = """
SELECT format('ALTER TABLE %s %sADD PRIMARY KEY (%s); -- under a lock, while its index is built', t.oid::regclass,
              coalesce('DROP CONSTRAINT ' || quote_ident(k.conname) || ', ', ''),
              string_agg(quote_ident(a.attname), ', ' ORDER BY w.position))
  FROM cdc_embedder.embedding_column c
  JOIN pg_class t ON t.oid = c.source_table
  LEFT JOIN pg_constraint k ON k.conrelid = t.oid AND k.contype = 'p'
 CROSS JOIN LATERAL unnest(coalesce(k.conkey, c.key_attnums)) WITH ORDINALITY AS w(attnum, position)
  LEFT JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum = w.attnum AND NOT a.attisdropped
 WHERE c.id = $1
 GROUP BY t.oid, k.conname
HAVING count(a.attnum) = count(*)
"""

_SOURCES = """
SELECT format('ALTER TABLE %s %s; -- or name other source_columns', c.source_table,
              string_agg(format('ALTER COLUMN %I TYPE text', a.attname), ', ' ORDER BY a.attnum))
  FROM cdc_embedder.embedding_column c
  JOIN pg_attribute a ON a.attrelid = c.source_table AND a.attnum = ANY (c.source_attnums) AND NOT a.attisdropped
 WHERE c.id = $1 AND NOT cdc_embedder._is_text_like(a.atttypid)
 GROUP BY c.source_table
"""

# an UPDATE of the row resolves the column anew
_NEW_TARGET = """
SELECT format(E'ALTER TABLE %s ADD COLUMN %I %s;\\n'
              'UPDATE cdc_embedder.embedding_column SET target_column = %L WHERE id = %s;',
              c.source_table, c.target_column, cdc_embedder._target_type(m.dimensions), c.target_column,
              c.id)
  FROM cdc_embedder.embedding_column c JOIN cdc_embedder.model m ON m.name = c.model
 WHERE c.id = $1 AND NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.source_table
                                    AND a.attname = c.target_column AND NOT a.attisdropped)
"""

# vectors of other dimensions cannot be kept; those of a column without any may be right
_TYPE_OF_TARGET = """
SELECT format('ALTER TABLE %s ALTER COLUMN %I TYPE %s USING NULL; -- its vectors go, all are made anew; or name another'
              ' model', c.source_table, a.attname,
              CASE WHEN v.kind IN ('vector', 'halfvec') THEN format('%s(%s)', format_type(a.atttypid, NULL),
                                                                    m.dimensions)
                   ELSE cdc_embedder._target_type(m.dimensions) END)
  FROM cdc_embedder.embedding_column c
  JOIN cdc_embedder.model m ON m.name = c.model
  JOIN pg_attribute a ON a.attrelid = c.source_table AND a.attnum = c.target_attnum AND NOT a.attisdropped
  LEFT JOIN LATERAL cdc_embedder._vector_type(a.atttypid, a.atttypmod) v ON true
 WHERE c.id = $1 AND (v.kind IS NULL OR v.dimensions IS NOT NULL)
"""

# $2: kinds of identity, where an index that is gone counts as NOTHING
_IDENTITIES = """
SELECT format('ALTER TABLE %s REPLICA IDENTITY DEFAULT;', r.oid::regclass)
  FROM pg_class r
 WHERE r.oid IN (SELECT $1::oid UNION SELECT relid FROM pg_partition_tree($1::oid))
   AND strpos($2, CASE WHEN r.relreplident = 'i'
                        AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = r.oid AND i.indisreplident)
                       THEN 'n' ELSE r.relreplident::text END) > 0
 ORDER BY r.oid
"""

_FULL = """
SELECT string_agg(oid::regclass::text, ', ' ORDER BY oid) FROM pg_class
 WHERE relreplident = 'f' AND relkind = 'r'
   AND oid IN (SELECT $1::oid UNION SELECT relid FROM pg_partition_tree($1::oid))
"""
