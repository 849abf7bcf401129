"""What `cdc-embedder migrate pgml` would do: which generated columns, with which models, by which statements.

Read from the catalog, and from one stored vector where nothing else tells the dimensions; nothing is changed here. What
stands against a column is found now, as far as the catalog tells, rather than under the lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from cdc_embedder.asking import Row
from cdc_embedder.catalog import model_spec
from cdc_embedder.embedding.base import ModelSpec
from cdc_embedder.errors import Problem
from cdc_embedder.generated import NotUnderstood, Recipe, read
from cdc_embedder.identifiers import join_plain, split

Connection = psycopg.Connection[Row]


@dataclass(frozen=True, slots=True)
class Step:
    """One column, and what is to be done about it: `row` is what the catalog says of it, see `_COLUMNS`.

    `spec` is its model; `new` says that there is no row of it yet. `unclear`: why the column is left alone.
    """

    row: Row
    spec: ModelSpec | None = None
    new: bool = False
    recipe: Recipe | None = None
    unclear: str = ""

    @property
    def label(self) -> str:
        return join_plain([self.row["schema"], self.row["table"], self.row["name"]])


def resolve(connection: Connection, table: str, column: str) -> tuple[int, int]:
    """The oid and attnum of a generated column by its name. Raises Problem."""
    row = connection.execute(
        "SELECT attrelid::int8 AS oid, attnum, attgenerated FROM pg_attribute"
        " WHERE attrelid = $1::regclass AND attname = $2 AND attnum > 0 AND NOT attisdropped",
        (table, column),
    ).fetchone()
    name = join_plain([*split(table), column])
    if row is None:
        raise Problem(f"there is no column {name}")
    if row["attgenerated"] != "s":
        raise Problem(
            f"{name} is no generated column", hint="a plain column with vectors: cdc-embedder add, then adopt"
        )
    return row["oid"], row["attnum"]


def plan(connection: Connection, wanted: Sequence[tuple[int, int]]) -> list[Step]:
    """What is to be done about the columns `wanted`, or about every one that calls pgml.embed.

    On a session with nothing but pg_catalog on its search path.
    """
    parameters = ([oid for oid, _ in wanted], [attnum for _, attnum in wanted]) if wanted else (None, None)
    models = {
        row["model"]["name"]: model_spec(row["model"])
        for row in connection.execute("SELECT to_jsonb(m) AS model FROM cdc_embedder.model m").fetchall()
    }
    ours = connection.execute(_OURS).fetchone() is not None
    steps = []
    for row in connection.execute(_COLUMNS, parameters).fetchall():
        step = _step(connection, row, models, ours)
        if step.spec is not None:
            models[step.spec.name] = step.spec
        steps.append(step)
    return steps


def _step(connection: Connection, row: Row, models: dict[str, ModelSpec], ours: bool) -> Step:
    try:
        recipe = read(row["expression"])
    except NotUnderstood as reason:
        return Step(row, unclear=f"{reason}: {row['expression']}")
    if unclear := _obstacle(row):
        return Step(row, recipe=recipe, unclear=unclear)
    dimensions = row["width"] or _dimensions(connection, row)
    known = models.get(recipe.transformer)
    if recipe.normalize is None:
        if ours and known is None:
            unclear = f"the row of the model {recipe.transformer}, which said whether vectors have unit length, is gone"
            return Step(row, recipe=recipe, unclear=unclear)
        # PostgresML left the length to the model; our pgml.embed, to the model's row.
        recipe = replace(recipe, normalize=ours and known is not None and known.normalize)
    if dimensions is None and known is not None:
        dimensions = known.dimensions
    if dimensions is None:
        unclear = "it holds no vector to tell the model's dimensions by; make a row of the model first"
        return Step(row, recipe=recipe, unclear=unclear)
    if known is not None and known.dimensions != dimensions:
        unclear = f"it holds {dimensions} dimensions, the row of the model {known.name} says {known.dimensions}"
        return Step(row, recipe=recipe, unclear=unclear)
    spec = _model(recipe, dimensions, models)
    return Step(row, spec, spec.name not in models, recipe)


def _obstacle(row: Row) -> str:
    """What keeps the column from being configured, as far as the catalog tells; the rest is refused by the INSERT."""
    if row["kind"] not in ("float4", "float8", "vector", "halfvec"):
        return f"{row['type']} cannot hold a vector"
    if row["kind"] in ("vector", "halfvec") and row["width"] == -1:
        return f"it is a {row['type']} without a dimension"
    if row["relispartition"] or (row["relkind"] == "r" and row["has_children"]):
        return "the table is a partition, or has children: migrate the partitioned table; inheritance is not served"
    if row["other_partition"] is not None:
        return f"the partition {row['other_partition']} makes its vectors in another way"
    if not row["keyed"]:
        return "the table has no primary key, by which rows are addressed"
    return ""


def _dimensions(connection: Connection, row: Row) -> int | None:
    found = connection.execute(
        sql.SQL("SELECT cardinality({0}) AS n FROM {1} t WHERE {0} IS NOT NULL LIMIT 1").format(
            sql.Identifier("t", row["name"]), sql.Identifier(row["schema"], row["table"])
        )
    ).fetchone()
    return None if found is None else found["n"]


def _model(recipe: Recipe, dimensions: int, models: dict[str, ModelSpec]) -> ModelSpec:
    """The row that makes the same vectors: one that is there, a copy of it with other prompts, or a new one.

    No prompt was put before a text but the one that was given.
    """
    known = models.get(recipe.transformer)
    based = known or ModelSpec(recipe.transformer, dimensions)
    spec = replace(
        based,
        source=based.source or recipe.transformer,
        document_prompt=recipe.prompt,
        query_prompt="",
        normalize=bool(recipe.normalize),
        trust_remote_code=based.trust_remote_code or recipe.trust_remote_code,
    )
    number = 0
    while True:
        name = recipe.transformer + ("" if number == 0 else " (pgml)" if number == 1 else f" (pgml {number})")
        taken = models.get(name)
        if taken is None:
            return replace(spec, name=name, source=None if name == spec.source else spec.source)
        if _same(taken, spec):
            return taken
        number += 1


def _same(taken: ModelSpec, spec: ModelSpec) -> bool:
    """Whether both make the same vectors of documents; prompts for queries may differ."""
    return replace(
        taken, name=spec.name, source=taken.source or taken.name, query_prompt=spec.query_prompt
    ) == spec and dict(taken.options) == dict(spec.options)


def statements(connection: Connection, step: Step) -> list[sql.Composed]:
    """What is run for one column, in this order, in one transaction."""
    assert step.spec is not None
    assert step.recipe is not None
    table = sql.Identifier(step.row["schema"], step.row["table"])
    column = sql.Identifier(step.row["name"])
    told = []
    if step.new:
        given = _given(step.spec)
        told.append(
            sql.SQL("INSERT INTO cdc_embedder.model ({}) VALUES ({})").format(
                sql.SQL(", ").join(map(sql.Identifier, given)), sql.SQL(", ").join(map(sql.Literal, given.values()))
            )
        )
    told.append(sql.SQL("ALTER TABLE {} ALTER COLUMN {} DROP EXPRESSION").format(table, column))
    if step.row["not_null"]:
        told.append(sql.SQL("ALTER TABLE {} ALTER COLUMN {} DROP NOT NULL").format(table, column))
    told.append(
        sql.SQL(
            "INSERT INTO cdc_embedder.embedding_column"
            " (source_table, source_columns, target_column, model, on_existing) VALUES ({}, {}, {}, {}, 'adopt')"
        ).format(
            sql.Literal(table.as_string(connection)),
            sql.Literal([step.recipe.column]),
            sql.Literal(step.row["name"]),
            sql.Literal(step.spec.name),
        )
    )
    return told


def _given(spec: ModelSpec) -> dict[str, Any]:
    """What an INSERT of the row has to say; the rest is the table's defaults."""
    usual = ModelSpec("", 0)
    given = {name: getattr(spec, name) for name in ModelSpec.__slots__ if getattr(spec, name) != getattr(usual, name)}
    if "options" in given:
        given["options"] = Jsonb(given["options"])
    return given


_OURS = """
SELECT WHERE starts_with(obj_description(to_regnamespace('pgml'), 'pg_namespace'), 'cdc-embedder')
"""
"""A row where the schema pgml is that of `init --pgml`."""

_COLUMNS = """
SELECT t.oid::int8 AS oid, n.nspname AS schema, t.relname AS table, a.attnum, a.attname AS name,
       format_type(a.atttypid, a.atttypmod) AS type, a.attnotnull AS not_null, t.relkind, t.relispartition,
       coalesce(e.typname, y.typname) AS kind,
       CASE WHEN y.typname IN ('vector', 'halfvec') THEN a.atttypmod END AS width,
       pg_get_expr(d.adbin, d.adrelid) AS expression,
       EXISTS (SELECT FROM pg_index i WHERE i.indrelid = t.oid AND i.indisprimary) AS keyed,
       EXISTS (SELECT FROM pg_inherits i WHERE i.inhparent = t.oid) AS has_children,
       (SELECT min(p.oid::regclass::text) FROM pg_partition_tree(t.oid) tree
          JOIN pg_class p ON p.oid = tree.relid
          JOIN pg_attribute pa ON pa.attrelid = p.oid AND pa.attname = a.attname
          LEFT JOIN pg_attrdef pd ON pd.adrelid = p.oid AND pd.adnum = pa.attnum
         WHERE p.oid <> t.oid
           AND pg_get_expr(pd.adbin, pd.adrelid) IS DISTINCT FROM pg_get_expr(d.adbin, d.adrelid)) AS other_partition,
       pg_get_userbyid(t.relowner) AS owner, pg_has_role(t.relowner, 'USAGE') AS owned,
       (SELECT sum(c.reltuples)::int8 FROM pg_class c
         WHERE c.oid IN (SELECT t.oid UNION SELECT relid FROM pg_partition_tree(t.oid))
           AND c.relkind = 'r' AND c.reltuples >= 0) AS rows,
       (SELECT array_agg(DISTINCT CASE o.classid WHEN 'pg_rewrite'::regclass
                   THEN (SELECT pg_describe_object('pg_class'::regclass, r.ev_class, 0)
                           FROM pg_rewrite r WHERE r.oid = o.objid)
                   ELSE pg_describe_object(o.classid, o.objid, o.objsubid) END)
          FROM pg_depend o
         WHERE o.refclassid = 'pg_class'::regclass AND o.refobjid = t.oid AND o.refobjsubid = a.attnum
           AND o.classid IN ('pg_class'::regclass, 'pg_rewrite'::regclass, 'pg_constraint'::regclass,
                             'pg_trigger'::regclass, 'pg_statistic_ext'::regclass, 'pg_policy'::regclass)) AS dependents
  FROM pg_attrdef d
  JOIN pg_attribute a ON a.attrelid = d.adrelid AND a.attnum = d.adnum AND a.attgenerated = 's'
  JOIN pg_class t ON t.oid = d.adrelid
  JOIN pg_namespace n ON n.oid = t.relnamespace
  JOIN pg_type y ON y.oid = a.atttypid
  LEFT JOIN pg_type e ON e.oid = y.typelem AND y.typlen = -1
 WHERE ($1::int8[] IS NULL AND a.attinhcount = 0
        AND EXISTS (SELECT FROM pg_depend x
                      JOIN pg_proc f ON x.refclassid = 'pg_proc'::regclass AND f.oid = x.refobjid
                      JOIN pg_namespace fn ON fn.oid = f.pronamespace
                     WHERE x.classid = 'pg_attrdef'::regclass AND x.objid = d.oid
                       AND (fn.nspname, f.proname) = ('pgml', 'embed')))
    OR (t.oid, a.attnum) IN (SELECT w.oid, w.attnum FROM unnest($1::int8[], $2::int2[]) AS w(oid, attnum))
 ORDER BY n.nspname, t.relname, a.attnum
"""
