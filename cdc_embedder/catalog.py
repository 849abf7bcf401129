"""What to embed: the configuration table and pg_catalog, read in one statement, as frozen values.

Tables are followed by oid and columns by attribute number, so a rename is followed too; what cannot be served as
things are carries its reason in `fault`. Nothing here changes anything in the database.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from psycopg.rows import dict_row

from cdc_embedder.embedding.base import ModelSpec
from cdc_embedder.identifiers import join_plain
from cdc_embedder.rows.session import Connection


@dataclass(frozen=True, slots=True)
class KeyColumn:
    """A column of the primary key. `less`, `equal`, `greater`: (schema, name) of its own index's operators."""

    name: str
    type: str
    less: tuple[str, str]
    equal: tuple[str, str]
    greater: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Target:
    """The vector column: `kind` is vector, halfvec, float4 or float8; `type` as SQL writes it, with its dimension."""

    name: str
    kind: str
    type: str
    oid: int


@dataclass(frozen=True, slots=True)
class EmbeddingColumn:
    """One row of `cdc_embedder.embedding_column` with all that the catalog says about it.

    `fires_triggers`: an UPDATE fires triggers or rules of the user's; `fires_always`: it does so even in a session with
    session_replication_role = replica. `refuses_updates`: it has no replica identity, or one beyond the publication's
    column list, so an UPDATE fails as long as it is published. `moved`: it was configured in another cluster or
    database. `storage`: a hash of the files that hold the rows, another one after a rewrite, a TRUNCATE, or when a
    partition comes or goes.
    """

    id: int
    table_oid: int
    schema: str
    table: str
    stored_name: tuple[str, str]
    relations: frozenset[tuple[str, str]]
    key: tuple[KeyColumn, ...]
    sources: tuple[str, ...]
    separator: str
    template: tuple[str | int, ...] | None
    target: Target | None
    model: ModelSpec
    generation: int
    enabled: bool
    on_existing: str
    priority: int
    partitioned: bool
    unlogged: bool
    published: bool
    keys_only: bool
    refuses_updates: bool
    fires_triggers: bool
    fires_always: bool
    moved: bool
    storage: int
    fault: str | None

    @property
    def label(self) -> str:
        """`schema.table.column`, for people."""
        return f"{self.schema}.{self.table}.{self.target.name if self.target else '?'}"

    @property
    def renamed(self) -> bool:
        """Whether the table has another name now than when it was configured."""
        return self.stored_name != (self.schema, self.table)


@dataclass(frozen=True, slots=True)
class SqlEmbed:
    """The row of `cdc_embedder.sql_embed`, as far as it concerns the service."""

    enabled: bool
    secret: bytes
    max_texts_per_s: int


_COLUMNS = """
WITH ours AS MATERIALIZED (SELECT oid FROM pg_proc WHERE pronamespace = 'cdc_embedder'::regnamespace)
SELECT c.id, c.source_table::oid::int8 AS table_oid, c.source_schema, c.source_name,
       (SELECT o.oid::int8 FROM pg_class o JOIN pg_namespace m ON m.oid = o.relnamespace
         WHERE (m.nspname, o.relname) = (c.source_schema, c.source_name)) AS named_oid,
       c.source_table::text AS shown, n.nspname AS schema, t.relname AS table,
       t.relkind, t.relpersistence, t.relhasrules,
       c.separator, cdc_embedder._template_parts(c.template, c.source_columns) AS template,
       c.generation, c.enabled, c.on_existing, c.priority, to_jsonb(m) AS model,
       (SELECT jsonb_agg(jsonb_build_object(
                   'name', a.attname, 'text', cdc_embedder._is_text_like(a.atttypid)) ORDER BY s.position)
          FROM unnest(c.source_attnums) WITH ORDINALITY AS s(attnum, position)
          JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum = s.attnum AND NOT a.attisdropped) AS sources,
       cardinality(c.source_attnums) AS source_count,
       (SELECT jsonb_build_object('name', a.attname, 'type', format_type(a.atttypid, a.atttypmod),
                                  'oid', a.atttypid::int8, 'typmod', a.atttypmod, 'element', e.typname,
                                  -- not any type that is only called so
                                  'kind', coalesce((SELECT y.typname
                                                      FROM cdc_embedder._vector_type(a.atttypid, a.atttypmod)), ''))
          FROM pg_attribute a JOIN pg_type y ON y.oid = a.atttypid
          LEFT JOIN pg_type e ON e.oid = y.typelem AND y.typlen = -1
         WHERE a.attrelid = t.oid AND a.attnum = c.target_attnum AND NOT a.attisdropped) AS target,
       (SELECT jsonb_agg(jsonb_build_object('name', a.attname, 'type', format_type(a.atttypid, a.atttypmod),
                                            'operators', (
                   SELECT jsonb_agg(jsonb_build_array(pn.nspname, p.oprname) ORDER BY m.amopstrategy)
                     FROM pg_amop m
                     JOIN pg_operator p ON p.oid = m.amopopr
                     JOIN pg_namespace pn ON pn.oid = p.oprnamespace
                    WHERE m.amopfamily = o.opcfamily AND m.amopstrategy IN (1, 3, 5)
                      AND m.amoplefttype = o.opcintype AND m.amoprighttype = o.opcintype)) ORDER BY k.position)
          FROM pg_index i
          CROSS JOIN LATERAL unnest(i.indkey::int2[], i.indclass::oid[]) WITH ORDINALITY AS k(attnum, class, position)
          JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum = k.attnum
          JOIN pg_opclass o ON o.oid = k.class
         WHERE i.indrelid = t.oid AND i.indisprimary AND i.indimmediate AND k.position <= i.indnkeyatts) AS key,
       (SELECT jsonb_agg(jsonb_build_array(pn.nspname, p.relname))
          FROM pg_class p JOIN pg_namespace pn ON pn.oid = p.relnamespace
         WHERE p.oid IN (SELECT t.oid UNION SELECT relid FROM pg_partition_tree(t.oid))) AS relations,
       (SELECT hashtextextended(string_agg(p.oid || ':' || p.relfilenode, ' ' ORDER BY p.oid), 0) FROM pg_class p
         WHERE p.oid IN (SELECT t.oid UNION SELECT relid FROM pg_partition_tree(t.oid))) AS storage,
       (c.database_oid, c.system_identifier) IS DISTINCT FROM (here.database_oid, here.system_identifier) AS moved,
       (SELECT min(p.oid::regclass::text) FROM pg_class p
         WHERE p.oid IN (SELECT t.oid UNION SELECT relid FROM pg_partition_tree(t.oid)) AND p.relkind = 'r'
           AND (p.relreplident = 'n'
                OR p.relreplident <> 'f' AND NOT EXISTS (
                    SELECT FROM pg_index i WHERE i.indrelid = p.oid AND i.indimmediate
                       AND CASE p.relreplident WHEN 'd' THEN i.indisprimary ELSE i.indisreplident END)))
           AS unidentified,
       (SELECT min(p.oid::regclass::text) FROM pg_class p
          LEFT JOIN (SELECT to_jsonb(r) -> 'prattrs' AS attnums FROM pg_publication_rel r -- from 15 on
                       JOIN pg_publication b ON b.oid = r.prpubid
                      WHERE b.pubname = c.slot AND r.prrelid = t.oid) list ON jsonb_typeof(list.attnums) = 'array'
         WHERE p.oid IN (SELECT t.oid UNION SELECT relid FROM pg_partition_tree(t.oid))
           AND (p.relreplident <> 'd' AND (c.keys_only OR list.attnums IS NOT NULL)
                OR NOT (SELECT list.attnums @> to_jsonb(i.indkey) FROM pg_index i
                         WHERE i.indrelid = t.oid AND i.indisprimary))) AS beyond_list,
       c.keys_only,
       EXISTS (SELECT FROM pg_publication_rel r JOIN pg_publication b ON b.oid = r.prpubid
                WHERE b.pubname = c.slot AND r.prrelid = t.oid) AS published,
       EXISTS (SELECT FROM pg_trigger g
                WHERE (g.tgrelid = t.oid OR g.tgrelid IN (SELECT relid FROM pg_partition_tree(t.oid)))
                  AND NOT g.tgisinternal AND g.tgtype & 16 <> 0 AND g.tgenabled IN ('O', 'A')
                  AND g.tgfoid NOT IN (SELECT oid FROM ours)) AS fires_triggers,
       EXISTS (SELECT FROM pg_trigger g
                WHERE (g.tgrelid = t.oid OR g.tgrelid IN (SELECT relid FROM pg_partition_tree(t.oid)))
                  AND NOT g.tgisinternal AND g.tgtype & 16 <> 0 AND g.tgenabled IN ('R', 'A')
                  AND g.tgfoid NOT IN (SELECT oid FROM ours)) AS fires_always
  FROM cdc_embedder.embedding_column c
  JOIN cdc_embedder.model m ON m.name = c.model
  LEFT JOIN pg_class t ON t.oid = c.source_table
  LEFT JOIN pg_namespace n ON n.oid = t.relnamespace
 CROSS JOIN (SELECT d.oid AS database_oid, s.system_identifier
               FROM pg_database d, pg_control_system() s WHERE d.datname = current_database()) AS here
 WHERE c.slot = $1
 ORDER BY c.id
"""


async def load(connection: Connection, slot: str) -> list[EmbeddingColumn]:
    """Every configured column that `slot` serves, in order of id."""
    cursor = connection.cursor(row_factory=dict_row)
    await cursor.execute(_COLUMNS, (slot,))
    return [_column(row) for row in await cursor.fetchall()]


async def offered(connection: Connection) -> tuple[dict[str, ModelSpec], SqlEmbed]:
    """Every model by name, and on which terms SQL may ask for vectors."""
    cursor = await connection.execute(
        "SELECT coalesce((SELECT jsonb_object_agg(m.name, to_jsonb(m)) FROM cdc_embedder.model m), '{}'),"
        "       e.enabled, e.secret, e.max_texts_per_s FROM cdc_embedder.sql_embed e"
    )
    [(models, *terms)] = await cursor.fetchall()
    return {name: model_spec(row) for name, row in models.items()}, SqlEmbed(*terms)


def model_spec(row: Mapping[str, Any]) -> ModelSpec:
    """A row of the `model` table as the embedders take it."""
    return ModelSpec(**dict(row))


def _column(row: Mapping[str, Any]) -> EmbeddingColumn:
    stored = (row["source_schema"], row["source_name"])
    model = model_spec(row["model"])
    target = _target(row["target"])
    return EmbeddingColumn(
        id=row["id"],
        table_oid=row["table_oid"],
        schema=row["schema"] or stored[0],
        table=row["table"] or stored[1],
        stored_name=stored,
        relations=frozenset((schema, table) for schema, table in row["relations"] or []) | {stored},
        key=tuple(
            KeyColumn(key["name"], key["type"], *(tuple(operator) for operator in key["operators"]))
            for key in row["key"] or []
        ),
        sources=tuple(source["name"] for source in row["sources"] or []),
        separator=row["separator"],
        template=None if row["template"] is None else tuple(row["template"]),
        target=target,
        model=model,
        generation=row["generation"],
        enabled=row["enabled"],
        on_existing=row["on_existing"],
        priority=row["priority"],
        partitioned=row["relkind"] == "p",
        unlogged=row["relpersistence"] == "u",
        published=row["published"],
        keys_only=row["keys_only"],
        refuses_updates=row["unidentified"] is not None or row["beyond_list"] is not None,
        fires_triggers=row["fires_triggers"] or bool(row["relhasrules"]),
        fires_always=row["fires_always"] or bool(row["relhasrules"]),
        moved=row["moved"],
        storage=row["storage"] or 0,
        fault=_fault(row, target, model),
    )


def _target(row: Mapping[str, Any] | None) -> Target | None:
    if row is None:
        return None
    kind = row["element"] if row["kind"] in ("_float4", "_float8") else row["kind"]
    return Target(row["name"], kind, row["type"], row["oid"])


def _fault(row: Mapping[str, Any], target: Target | None, model: ModelSpec) -> str | None:
    """Why the column cannot be served as the catalog stands now; None where it can."""
    if row["table"] is None:
        name = join_plain([row["source_schema"], row["source_name"]])
        statement = f"DELETE FROM cdc_embedder.embedding_column WHERE id = {row['id']}"
        return f"the table {name} was dropped; remove the column: {statement}"
    if row["named_oid"] not in (None, row["table_oid"]):
        name = join_plain([row["source_schema"], row["source_name"]])
        called = name.replace("'", "''")
        return f"{name} is another table than the one that was configured; SELECT cdc_embedder.resume('{called}')"
    if not row["key"]:
        return f"{row['shown']} has no usable primary key any more; add one"
    if row["beyond_list"]:
        return f"{row['beyond_list']} has an identity beyond the keys that are published; set it to DEFAULT"
    if row["unidentified"]:
        return f"{row['unidentified']} has REPLICA IDENTITY NOTHING, or an index that is gone; set it to DEFAULT"
    sources = row["sources"] or []
    if len(sources) != row["source_count"]:
        return "a source column was dropped; change source_columns or remove the column"
    for source in sources:
        if not source["text"]:
            return f"the source column {source['name']} is not of a text type any more"
    if target is None:
        return "the target column was dropped; remove the column or add it again"
    if target.kind not in ("vector", "halfvec", "float4", "float8"):
        return f"the target column is of type {target.type}, which cannot hold a vector"
    if target.kind in ("vector", "halfvec") and row["target"]["typmod"] != model.dimensions:
        return f"the target column is {target.type}, the model {model.name} has {model.dimensions} dimensions"
    return None
