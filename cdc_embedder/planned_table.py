"""The table that `cdc-embedder plan` is asked about: what the catalog says, a sample of rows, what stands against it.

It reads, on a session that can do nothing else. Of our schema it needs nothing; the table of models is read if it is
there.
"""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import RowFactory, dict_row

from cdc_embedder.asking import Row
from cdc_embedder.catalog import model_spec
from cdc_embedder.conninfo import pinned
from cdc_embedder.database_errors import from_database
from cdc_embedder.embedding.base import ModelSpec
from cdc_embedder.embedding.registry import builtin_spec
from cdc_embedder.errors import Misconfigured, Problem
from cdc_embedder.identifiers import join

Connection = psycopg.Connection[Row]

MANY_ROWS = 100_000
"""From here on rows are not counted, and a sample is drawn from some of the table's pages."""

LONGEST_TEXT = 200_000
"""Characters of a text that are read: no model's limit lies beyond, and a sample has to fit into memory."""

SEPARATOR = "\n\n"


APPROXIMATE = ("hnsw", "ivfflat")


_ROW: RowFactory[Row] = dict_row


def connect(dsn: str) -> Connection:
    """The operator's own session, which can write nothing. Raises Problem."""
    pins = {"default_transaction_read_only": "on", "row_security": "off", "statement_timeout": "0"}
    try:
        return psycopg.connect(
            pinned(dsn, "plan", pins, client_encoding="UTF8"),
            autocommit=True,
            row_factory=_ROW,
            cursor_factory=psycopg.RawCursor,  # identifiers may hold percent signs
        )
    except psycopg.Error as error:
        raise from_database(error, "connecting") from error


def look(connection: Connection, table: str, sources: list[str], target: str | None) -> Row:
    """What the catalog says of the table, then with nothing but pg_catalog on the search path. Raises Problem."""
    [found] = connection.execute(_TABLE, (table, target)).fetchall()
    columns: dict[str, Any] = found["columns"]
    texts = ", ".join(join([name]) for name, column in columns.items() if column["text"]) or "none"
    for name in sources:
        if name not in columns:
            raise Problem(f"{table} has no column {name}", hint=f"Its columns that hold text: {texts}")
        if not columns[name]["text"]:
            raise Problem(
                f"the source column {name} of {table} is of type {columns[name]['type']}, which is no text",
                hint=f"Its columns that hold text: {texts}",
            )
    connection.execute("SET search_path = pg_catalog")
    return found


def model(connection: Connection, name: str) -> ModelSpec:
    row = None
    if connection.execute("SELECT to_regclass('cdc_embedder.model') IS NOT NULL AS yes").fetchall()[0]["yes"]:
        row = connection.execute(
            "SELECT to_jsonb(m) AS model FROM cdc_embedder.model m WHERE m.name = $1", (name,)
        ).fetchone()
    spec = builtin_spec(name) if row is None else model_spec(row["model"])
    if spec is None:
        raise Misconfigured(f"there is no model {name}", hint="INSERT it INTO cdc_embedder.model")
    return spec


def count(connection: Connection, found: Row) -> tuple[int, bool]:
    """How many rows, and whether that is an estimate."""
    if found["estimated"] >= MANY_ROWS:
        return found["estimated"], True
    statement = sql.SQL("SELECT count(*) AS n FROM {}").format(sql.Identifier(found["schema"], found["name"]))
    return connection.execute(statement).fetchall()[0]["n"], False


def draw(connection: Connection, found: Row, sources: list[str], target: str | None, rows: int, size: int) -> list[Row]:
    """`size` rows by chance: their text, and whether the target holds something. Of a large table from some pages."""
    share = 100.0 * min(1.0, 20 * size / rows) if rows >= MANY_ROWS else 100.0
    drawn = connection.execute(_sample(found, sources, target, size, share)).fetchall()
    if not drawn and share < 100:
        drawn = connection.execute(_sample(found, sources, target, size, 100.0)).fetchall()
    return drawn


def _sample(found: Row, sources: list[str], target: str | None, size: int, share: float) -> sql.Composed:
    parts = [sql.SQL("CAST({} AS text)").format(sql.Identifier("t", name)) for name in sources]
    text: sql.Composable = parts[0]
    if len(parts) > 1:
        text = sql.SQL("CASE WHEN NOT ({} IS NULL) THEN concat_ws({}, {}) END").format(
            sql.SQL(" IS NULL AND ").join(parts), sql.Literal(SEPARATOR), sql.SQL(", ").join(parts)
        )
    held: sql.Composable = sql.SQL("false")
    read = dict.fromkeys(sources)
    if target is not None and found["target_type"] is not None:
        held = sql.SQL("{} IS NOT NULL").format(sql.Identifier("t", target))
        read[target] = None
    return sql.SQL(
        "SELECT convert_to(left({text}, {longest}), 'UTF8') AS text, {held} AS held FROM ("
        " SELECT {names} FROM {table} t{part} ORDER BY random() LIMIT {size}) t"
    ).format(
        text=text,
        longest=sql.Literal(LONGEST_TEXT),
        held=held,
        names=sql.SQL(", ").join(sql.Identifier("t", name) for name in read),
        table=sql.Identifier(found["schema"], found["name"]),
        part=sql.SQL(" TABLESAMPLE SYSTEM ({})").format(sql.Literal(share)) if share < 100 else sql.SQL(""),
        size=sql.Literal(size),
    )


def warnings(found: Row, spec: ModelSpec, sources: list[str], target: str | None, texts: int, held: int) -> list[str]:
    """What will stand against the column, or make it slow; each with its remedy."""
    said = []
    if found["relkind"] not in ("r", "p"):
        said.append("it is no table: a view or a foreign table cannot be embedded")
    if found["relpersistence"] == "t":
        said.append("it is a temporary table, which no other session sees: it will be refused")
    if found["relpersistence"] == "u":
        said.append("it is unlogged: no change is heard of, scans alone feed the column")
    if found["is_partition"]:
        said.append("it is a partition: configure the partitioned table above it")
    if found["has_children"]:
        said.append("it has children by inheritance: it will be refused")
    if not found["keyed"]:
        said.append("it has no primary key, by which rows are addressed: ALTER TABLE … ADD PRIMARY KEY first")
    if found["unidentified"]:
        said.append("its replica identity is NOTHING: its updates would fail when published; set it to DEFAULT")
    for index in found["indexes"]:
        if index["method"] in APPROXIMATE:
            which = "on the target" if index["on_target"] else "on another column, and still written to by each update"
            said.append(
                f"the index {index['name']} ({index['method']}) is {which}: drop it, embed, and make it anew with"
                " CREATE INDEX CONCURRENTLY; with it each row costs many times as much"
            )
    if found["fires_triggers"]:
        said.append(
            "its UPDATE triggers fire for each vector, unless the service's role may set session_replication_role"
        )
    if target is not None and found["target_type"] is None:
        said.append(f"it has no column {target}: cdc-embedder add makes it")
    elif target is not None:
        said += _against_target(found, spec, target)
    if target in sources:
        said.append("the target is a source column as well: the vector needs a column of its own")
    if held:
        said.append(
            f"{held} of the sampled rows hold a vector already: the column is paused until on_existing is"
            " replace or adopt"
        )
    if not texts:
        said.append("no sampled row has a text: nothing was measured; a larger --sample may find some")
    return said


def _against_target(found: Row, spec: ModelSpec, target: str) -> list[str]:
    said = []
    if found["target_kind"] is None:
        said.append(f"{target} is of type {found['target_type']}, which cannot hold a vector")
    elif found["target_dimensions"] not in (None, spec.dimensions):
        said.append(f"{target} is {found['target_type']}, the model {spec.name} has {spec.dimensions} dimensions")
    elif found["target_dimensions"] is None and found["target_kind"] in ("vector", "halfvec"):
        said.append(f"{target} is a {found['target_kind']} without a dimension: give it one")
    if found["target_generated"]:
        said.append(f"{target} is generated: ALTER COLUMN … DROP EXPRESSION, or cdc-embedder migrate pgml")
    if found["target_not_null"]:
        said.append(f"{target} is NOT NULL, and a row has no vector until it is embedded: ALTER COLUMN … DROP NOT NULL")
    return said


_TABLE = """
WITH leaf AS (
    SELECT c.* FROM pg_class c
     WHERE c.relkind IN ('r', 'm')
       AND c.oid IN (SELECT relid FROM pg_partition_tree($1::regclass) UNION SELECT $1::regclass)
)
SELECT n.nspname AS schema, t.relname AS name, t.relkind::text, t.relpersistence::text,
       t.relispartition AS is_partition,
       EXISTS (SELECT FROM pg_inherits i WHERE i.inhparent = t.oid) AND t.relkind = 'r' AS has_children,
       EXISTS (SELECT FROM pg_index i WHERE i.indrelid = t.oid AND i.indisprimary AND i.indimmediate) AS keyed,
       EXISTS (SELECT FROM leaf l WHERE l.relreplident = 'n') AS unidentified,
       EXISTS (SELECT FROM pg_trigger g WHERE g.tgrelid = t.oid AND NOT g.tgisinternal AND g.tgtype & 16 <> 0
                  AND g.tgenabled IN ('O', 'A')) AS fires_triggers,
       coalesce((SELECT CASE WHEN sum(l.reltuples) FILTER (WHERE l.reltuples > 0) >= 100000 THEN sum(l.reltuples)
                    ELSE sum(CASE WHEN l.reltuples > 0 AND l.relpages > 0
                                  THEN l.reltuples / l.relpages * (pg_relation_size(l.oid) / 8192)
                                  ELSE pg_relation_size(l.oid) / 640.0 END) END FROM leaf l), 0)::int8 AS estimated,
       coalesce((SELECT sum(pg_relation_size(l.oid)) FROM leaf l), 0)::int8 AS heap_bytes,
       (SELECT min(o.option_value::int) FROM pg_options_to_table(t.reloptions) o WHERE o.option_name = 'fillfactor')
           AS fillfactor,
       coalesce((SELECT jsonb_agg(jsonb_build_object('name', i.name, 'method', i.method, 'bytes', i.bytes,
                                                     'on_target', i.on_target) ORDER BY i.name)
          FROM (SELECT min(x.indexrelid::regclass::text) AS name, a.amname AS method,
                       sum(pg_relation_size(x.indexrelid))::int8 AS bytes,
                       bool_or(c.attname IS NOT NULL) AS on_target
                  FROM leaf l JOIN pg_index x ON x.indrelid = l.oid
                  JOIN pg_class ic ON ic.oid = x.indexrelid JOIN pg_am a ON a.oid = ic.relam
                  LEFT JOIN pg_attribute c ON c.attrelid = l.oid AND c.attname = $2
                                          AND c.attnum = ANY (x.indkey::int2[])
                 GROUP BY coalesce((SELECT h.inhparent FROM pg_inherits h WHERE h.inhrelid = x.indexrelid),
                                   x.indexrelid), a.amname) i), '[]') AS indexes,
       (SELECT jsonb_object_agg(a.attname, jsonb_build_object(
                   'type', format_type(a.atttypid, a.atttypmod),
                   'text', y.typcategory = 'S' AND y.typname NOT IN ('name', 'char') AND y.typtype IN ('b', 'd'))
                   ORDER BY a.attnum)
          FROM pg_attribute a JOIN pg_type y ON y.oid = a.atttypid
         WHERE a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped) AS columns,
       target.type AS target_type, target.kind AS target_kind, target.dimensions AS target_dimensions,
       coalesce(target.attnotnull, false) AS target_not_null,
       coalesce(target.attgenerated <> '', false) AS target_generated,
       CASE WHEN EXISTS (SELECT FROM pg_extension WHERE extname = 'vector') THEN 'vector' ELSE 'float4' END
           AS default_kind,
       current_setting('full_page_writes') AS full_page_writes
  FROM pg_class t
  JOIN pg_namespace n ON n.oid = t.relnamespace
  LEFT JOIN LATERAL (
      SELECT a.attnotnull, a.attgenerated, format_type(a.atttypid, a.atttypmod) AS type,
             CASE WHEN y.typname IN ('vector', 'halfvec') THEN y.typname
                  WHEN y.typname IN ('_float4', '_float8') THEN ltrim(y.typname, '_') END AS kind,
             CASE WHEN y.typname IN ('vector', 'halfvec') THEN nullif(a.atttypmod, -1) END AS dimensions
        FROM pg_attribute a JOIN pg_type y ON y.oid = a.atttypid
       WHERE a.attrelid = t.oid AND a.attname = $2 AND a.attnum > 0 AND NOT a.attisdropped) target ON true
 WHERE t.oid = $1::regclass
"""
