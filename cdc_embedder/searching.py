"""`embed` and `search` from the command line: one model, loaded here, no service needed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql
from rich.console import Console
from rich.table import Table

from cdc_embedder.asking import Row, session
from cdc_embedder.catalog import model_spec
from cdc_embedder.embedding.base import InputType, ModelSpec, Vectors
from cdc_embedder.embedding.isolation import embed_isolating
from cdc_embedder.embedding.registry import Embedders, builtin_spec
from cdc_embedder.errors import Misconfigured, Problem
from cdc_embedder.identifiers import join, split
from cdc_embedder.settings import Settings


@dataclass(frozen=True, slots=True)
class Found:
    """A row near the question: its key by column name, the cosine similarity, the first line of its text."""

    key: dict[str, str]
    score: float
    text: str


def embed_texts(settings: Settings, model: str, texts: list[str], input_type: str) -> list[list[float]]:
    """The vectors of `texts`; the model is a row of the database where there is one, else a pre-filled one."""
    try:
        kind = InputType(input_type)
    except ValueError:
        raise Problem(f"the input type {input_type} is not one of none, query, document") from None
    spec = builtin_spec(model)
    if settings.dsn.get_secret_value() or spec is None:
        spec = _spec_of_database(settings.dsn.get_secret_value(), model)
    vectors: list[list[float]] = _embed(settings, spec, texts, kind).tolist()
    return vectors


def search_column(settings: Settings, table: str, target: str, question: str, k: int) -> list[Found]:
    """The `k` rows of `table` whose `target` is nearest to the question. Raises Problem."""
    with session(settings.dsn.get_secret_value(), "search", "searching") as connection:
        found_table = connection.execute("SELECT $1::regclass::oid::int8 AS oid", (table,)).fetchone()
        assert found_table is not None
        # The operator's search path is for the table's name alone: a function in it may fit a call better than ours.
        connection.execute("SET search_path = pg_catalog")
        column = connection.execute(_COLUMN, (found_table["oid"], target)).fetchone()
        if column is None:
            raise Problem(
                f"{join([*split(table), target])} is not a configured column", hint="see: cdc-embedder status"
            )
        vector = _embed(settings, model_spec(column["model"]), [question], InputType.QUERY)[0].tolist()
        if column["kind"] in ("vector", "halfvec"):
            _let_indexes_find(connection, column, k)
        connection.execute("SET extra_float_digits = 3")
        found = connection.execute(_nearest(column, k), [vector]).fetchall()
    return [
        Found({name: row[f"key_{n}"] for n, name in enumerate(column["keys"])}, row["score"], _first_line(row["text"]))
        for row in sorted(found, key=lambda row: -row["score"])  # an index may give them almost in order
    ]


def print_found(found: list[Found], console: Console, *, as_json: bool) -> None:
    """As a table, or as JSON: a list of {key, score, text}."""
    if as_json:
        print(json.dumps([{"key": row.key, "score": row.score, "text": row.text} for row in found]))
        return
    if not found:
        console.print("no row has a vector yet")
        return
    out = Table(box=None, header_style="bold")
    for name in (*found[0].key, "score", "text"):
        out.add_column(name, justify="right" if name == "score" else "left", overflow="ellipsis", no_wrap=True)
    for row in found:
        out.add_row(*map(_shown, row.key.values()), f"{row.score:.3f}", _shown(row.text))
    console.print(out)


_COLUMN = """
SELECT to_jsonb(m) AS model, n.nspname AS schema, t.relname AS table, c.source_columns AS sources,
       c.target_column AS target, c.key_columns AS keys, y.typname AS kind, yn.nspname AS kind_schema
  FROM cdc_embedder.embedding_column c
  JOIN cdc_embedder.model m ON m.name = c.model
  JOIN pg_class t ON t.oid = c.source_table
  JOIN pg_namespace n ON n.oid = t.relnamespace
  JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum = c.target_attnum
  JOIN pg_type y ON y.oid = a.atttypid
  JOIN pg_namespace yn ON yn.oid = y.typnamespace
 WHERE c.source_table = $1::int8::oid AND c.target_column = $2
"""


def _let_indexes_find(connection: psycopg.Connection[Row], column: Row, k: int) -> None:
    """Have an index look as far as `k` rows take: hnsw stops at 40 otherwise, ivfflat in one list.

    The settings are there once the extension's library is loaded, and which are there depends on its version.
    """
    kind = sql.Identifier(column["kind_schema"], column["kind"])
    connection.execute(sql.SQL("SELECT CAST('[1]' AS {})").format(kind))
    connection.execute(
        "SELECT set_config(name, CASE name WHEN 'hnsw.ef_search' THEN greatest(setting::int, least($1, 1000))::text"
        "                             WHEN 'hnsw.iterative_scan' THEN 'strict_order' ELSE 'relaxed_order' END, false)"
        "  FROM pg_settings WHERE name IN ('hnsw.ef_search', 'hnsw.iterative_scan', 'ivfflat.iterative_scan')",
        (k,),
    )


def _nearest(column: dict[str, Any], k: int) -> sql.Composed:
    """By pgvector's cosine operator where the target is of its types, so that an index can serve; else by `_COSINE`.

    A vector of zeros has no direction: its score is no number, and its row is left out, as in cdc_embedder.search.
    """
    target = sql.Identifier("t", column["target"])
    keys = sql.SQL(", ").join(
        sql.SQL("CAST({} AS text) AS {}").format(sql.Identifier("t", name), sql.Identifier(f"key_{n}"))
        for n, name in enumerate(column["keys"])
    )
    text = sql.SQL(", ").join(sql.SQL("CAST({} AS text)").format(sql.Identifier("t", s)) for s in column["sources"])
    table = sql.Identifier(column["schema"], column["table"])
    if column["kind"] in ("vector", "halfvec"):
        schema = column["kind_schema"]
        operator = sql.SQL("OPERATOR({}.<=>)").format(sql.Identifier(schema))
        question = sql.SQL("CAST({} AS {})").format(sql.SQL("$1::real[]"), sql.Identifier(schema, column["kind"]))
        distance = sql.SQL("{} {} {}").format(target, operator, question)
        score = sql.SQL("1 - ({})").format(distance)
        chosen = sql.SQL("{} IS NOT NULL ORDER BY {} LIMIT {}").format(target, distance, sql.Literal(k))
    else:
        element = sql.SQL(_IN_RANGE if column["kind"] == "_float8" else "v.a")
        score = sql.SQL(_COSINE).format(target=target, element=element)
        chosen = sql.SQL(_COMPARABLE).format(target=target)
    return sql.SQL(
        "SELECT * FROM (SELECT {keys}, {score} AS score, concat_ws(' ', {text}) AS text FROM {table} t"
        " WHERE {chosen}) f WHERE f.score <> 'NaN' ORDER BY f.score DESC LIMIT {k}"
    ).format(keys=keys, score=score, text=text, table=table, chosen=chosen, k=sql.Literal(k))


# As in sql/functions/search.sql: no right is needed but to read the table, and no row can fail the statement, whatever
# somebody wrote into it.
_COSINE = """
(SELECT sum(u.a * u.b) / nullif(sqrt(sum(u.a * u.a)) * (SELECT sqrt(sum(q * q)) FROM unnest($1::float8[]) AS q), 0)
   FROM (SELECT {element} AS a, v.b
           FROM (SELECT unnest({target})::float8 AS a, unnest($1::float8[]) AS b) v) u)
"""

_IN_RANGE = "CASE WHEN abs(v.a) < 1e-100 THEN 0 WHEN abs(v.a) < 1e100 THEN v.a ELSE 'NaN' END"
"""An element of which the square is in range: beyond it a row is left out, where the statement would fail."""

_COMPARABLE = """
CASE WHEN array_ndims({target}) = 1 AND cardinality({target}) = cardinality($1::float8[])
     THEN array_position({target}, NULL) IS NULL END
OFFSET 0
"""
"""One dimension and the question's length, no NULL: in this order. OFFSET 0 has the score computed once a row, and
only of these."""


def _spec_of_database(dsn: str, model: str) -> ModelSpec:
    with session(dsn, "embed", "reading the model") as connection:
        row = connection.execute(
            "SELECT to_jsonb(m) AS model FROM cdc_embedder.model m WHERE name = $1", (model,)
        ).fetchone()
    if row is None:
        raise Misconfigured(f"there is no model {model}", hint="INSERT it INTO cdc_embedder.model")
    return model_spec(row["model"])


def _embed(settings: Settings, spec: ModelSpec, texts: list[str], kind: InputType) -> Vectors:
    embedders = Embedders(
        device=settings.device,
        allow_remote_code=settings.allow_remote_code,
        api_key_envs=tuple(settings.allowed_api_key_envs),
        base_urls=settings.allowed_base_urls,
    )
    try:
        outcome = embed_isolating(embedders.get(spec), spec, texts, kind)
    finally:
        embedders.close()
    for index, sentence in outcome.errors.items():
        raise Problem(f"text {index + 1}: {sentence}")
    return outcome.vectors


def _shown(text: str) -> str:
    """Text of rows as a terminal may have it: without what would steer it."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def _first_line(text: str | None) -> str:
    return next(iter((text or "").strip().splitlines()), "")
