"""Search in SQL with the real service: the rows are those that numpy finds, and pgvector's index serves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import psycopg
import pytest
from psycopg import sql

from cdc_embedder.install import install
from cdc_embedder.searching import search_column
from cdc_embedder.settings import Settings
from tests.configuring import one
from tests.documents import make_documents, make_model, target_type
from tests.servers import Bench, make_bench
from tests.service import fake_vector, running, until

ROWS = 2000


@pytest.fixture(scope="module", params=["pg15", "pg18"])
def served(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """A table with vectors, an index on them where pgvector is, and a service that fills nothing but answers."""
    for bench in make_bench(request.getfixturevalue(request.param), "pgoutput"):
        install(bench.dsn_admin, bench.slot, pgml=True)
        make_model(bench)
        bench.admin.execute("UPDATE cdc_embedder.model SET query_prompt = 'query: ' WHERE name = 'fake'")
        make_documents(bench, ROWS, configure=False)
        with bench.admin.cursor() as cursor:
            cursor.executemany(
                f"UPDATE documents SET embedding = %s::real[]::{target_type(bench)} WHERE id = %s",  # type: ignore[arg-type]
                [(stored(n).tolist(), n) for n in range(1, ROWS + 1)],
            )
        bench.admin.execute("INSERT INTO documents (body) VALUES ('without a vector')")
        if bench.has_vector:
            bench.admin.execute("CREATE INDEX nearest ON documents USING hnsw (embedding vector_cosine_ops)")
        configure_column(bench, "documents", "embedding")
        bench.admin.execute("VACUUM ANALYZE documents")
        bench.admin.execute("SET cdc_embedder.embed_timeout = '60s'")
        with running(bench, CDC_EMBEDDER_SQL_EMBED="on") as service:
            until(lambda: "SQL is answered" in service.log, "never answered", lambda: service.log)
            yield bench


def configure_column(bench: Bench, table: str, target: str, model: str = "fake") -> None:
    """Paused, so that its vectors stay as the test has stored them."""
    bench.admin.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model, enabled)"
        " VALUES (%s, '{body}', %s, %s, false)",
        (table, target, model),
    )


def stored(number: int) -> Any:
    return fake_vector("fake", f"text {number}", 8)


def nearest(question: str, k: int) -> list[tuple[int, float]]:
    """Keys and cosine similarities, by brute force."""
    vectors = np.array([stored(n) for n in range(1, ROWS + 1)], np.float64)
    scores = vectors @ fake_vector("fake", question, 8).astype(np.float64)
    best = np.argsort(-scores)[:k]
    return [(int(n) + 1, float(scores[n])) for n in best]


def search(conn: psycopg.Connection[Any], question: str, *k: int) -> list[tuple[Any, float]]:
    marks = ", ".join(["%s"] * (1 + len(k)))
    statement = f"SELECT * FROM cdc_embedder.search('documents', 'embedding', {marks})"
    return conn.execute(statement, (question, *k)).fetchall()  # type: ignore[arg-type]


def assert_found(found: list[tuple[Any, float]], want: list[tuple[int, float]]) -> None:
    assert [key for key, _ in found] == [{"id": n} for n, _ in want]
    np.testing.assert_allclose([score for _, score in found], [score for _, score in want], atol=1e-6)


def test_search_finds_what_brute_force_finds(served: Bench) -> None:
    for question in ("text 7", "größe"):
        assert_found(search(served.admin, question), nearest(f"query: {question}", 10))
    assert_found(search(served.admin, "one", 1), nearest("query: one", 1))
    assert_found(search(served.admin, "many", 300), nearest("query: many", 300))
    everything = search(served.admin, "all", 5000)
    assert sorted(key["id"] for key, _ in everything) == list(range(1, ROWS + 1))
    scores = [score for _, score in everything]
    np.testing.assert_allclose(scores, [score for _, score in nearest("query: all", ROWS)], atol=1e-6)
    assert one(served.admin, "SELECT count(*) FROM cdc_embedder.search('documents', 'embedding', NULL)") == 0


def test_search_leaves_the_settings_of_the_session_as_they_were(served: Bench) -> None:
    settings = "SELECT jsonb_object_agg(name, setting) FROM pg_settings WHERE name ~ '^(hnsw|ivfflat)'"
    with psycopg.connect(served.dsn_admin) as conn:
        search(conn, "loads the library")
        if served.has_vector:
            conn.execute("SET hnsw.ef_search = 50")
        before = one(conn, settings)
        assert_found(search(conn, "many", 300), nearest("query: many", 300))
        assert one(conn, settings) == before


def test_the_index_serves_where_there_is_one(served: Bench) -> None:
    """In the statement inside search(), and in the forms that the documentation gives."""
    by = f"{'Index Scan using nearest' if served.has_vector else 'Seq Scan'} on documents"
    said: list[str] = []
    with psycopg.connect(served.dsn_admin, autocommit=True) as conn:
        conn.add_notice_handler(lambda notice: said.append(notice.message_primary or ""))
        conn.execute(
            "LOAD 'auto_explain'; SET auto_explain.log_min_duration = 0; SET auto_explain.log_nested_statements = on;"
            "SET client_min_messages = log"
        )
        search(conn, "text 7")
    [plan] = [text for text in said if " on documents t " in text]
    assert by in plan
    vector = "cdc_embedder.embed('fake', 'text 7')"
    if served.has_vector:
        orders = [
            f"embedding <=> {vector}::vector",
            f"embedding <=> (SELECT {vector}::vector)",
            "embedding <=> pgml.embed('fake', 'text 7')::vector",
        ]
    else:
        orders = [f"cdc_embedder.distance_l2(embedding, (SELECT {vector}))"]
        by = "distance_l2"
    for order in orders:
        statement = f"SELECT id FROM documents WHERE embedding IS NOT NULL ORDER BY {order} LIMIT 5"
        explained = served.admin.execute(f"EXPLAIN {statement}").fetchall()  # type: ignore[arg-type]
        assert by in "\n".join(row[0] for row in explained)
        found = served.admin.execute(statement).fetchall()  # type: ignore[arg-type]
        assert [key for (key,) in found] == [key for key, _ in nearest("text 7", 5)]


def test_every_type_of_vectors_and_any_names_can_be_searched(served: Bench) -> None:
    served.admin.execute(
        "INSERT INTO cdc_embedder.model (name, backend, dimensions, normalize) VALUES ('long', 'fake', 8, false)"
    )
    vectors = {n: stored(n).astype(np.float64) for n in range(1, 21)}
    question = fake_vector("fake", "query: text 3", 8), fake_vector("long", "text 3", 8)
    types = ["real[]", "double precision[]"] + ["vector(8)", "halfvec(8)"] * served.has_vector
    for number, (kind, model) in enumerate((kind, model) for kind in types for model in ("fake", "long")):
        table, target = f'"Odd ""[] {number}"', "Vector []"
        served.admin.execute(
            sql.SQL(
                'CREATE TABLE {} ("Key []" int, k date, body text, "Vector []" {}, PRIMARY KEY (k, "Key []"))'
            ).format(sql.SQL(table), sql.SQL(kind))  # type: ignore[arg-type]
        )
        length = 1.0 if model == "fake" else 3.0
        with served.admin.cursor() as cursor:
            cursor.executemany(
                sql.SQL("INSERT INTO {} VALUES (%s, '2026-01-31', 'text', %s::real[]::{})").format(
                    sql.SQL(table),
                    sql.SQL(kind),  # type: ignore[arg-type]
                ),
                [(n, (vector * length * n if length > 1 else vector).tolist()) for n, vector in vectors.items()],
            )
        configure_column(served, table, target, model)
        scores = {n: float(vector @ question[model == "long"]) for n, vector in vectors.items()}
        best = sorted(scores, key=lambda n: -scores[n])[:5]
        found = served.admin.execute(
            "SELECT * FROM cdc_embedder.search(%s, %s, 'text 3', 5)", (table, target)
        ).fetchall()
        assert [key for key, _ in found] == [{"k": "2026-01-31", "Key []": n} for n in best], (kind, model)
        tolerance = 2e-3 if kind.startswith("half") else 1e-6
        np.testing.assert_allclose([score for _, score in found], [scores[n] for n in best], atol=tolerance)


NOT_COMPARABLE = {
    "real[]": ["{1}", "{9,9,9,9,9,9,9,9,9}", "{}", "{{9,9,9,9},{9,9,9,9}}", "{1,2,3,4,5,6,7,NULL}",
               "{NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL}", "{0,0,0,0,0,0,0,0}", "{-0,0,0,0,0,0,0,0}",
               "{1,2,3,4,5,6,7,NaN}", "{Infinity,2,3,4,5,6,7,8}", "{-Infinity,Infinity,3,4,5,6,7,8}"],
    "double precision[]": ["{1e200,2,3,4,5,6,7,8}", "{1e-200,0,0,0,0,0,0,0}"],
    "vector(8)": ["[0,0,0,0,0,0,0,0]"],
    "halfvec(8)": ["[0,0,0,0,0,0,0,0]"],
}  # fmt: skip
"""What has no angle to another vector of eight dimensions. Those of real[] have none in double precision either."""

EXTREME = {
    "real[]": ["{3e38,-3e38,3e38,1e-45,0,3e38,3e38,3e38}", "{1e-45,0,-1e-45,0,0,0,0,0}", "[5:12]={1,2,3,4,5,6,7,8}"],
    "double precision[]": ["{1e90,-1e90,0,1e-90,1e-200,0,1e-90,1}", "{1e-90,0,0,0,0,0,0,1e-300}"],
    "vector(8)": ["[1e18,-1e18,1e18,1e-18,0,1e18,1e18,1e18]"],
    "halfvec(8)": ["[60000,-60000,60000,1e-5,0,0,0,1]"],
}


@pytest.mark.parametrize("normalize", [True, False])
def test_the_command_line_and_sql_find_the_same_and_neither_stumbles_over_a_vector_that_has_no_score(
    served: Bench, normalize: bool
) -> None:
    """By cosine, the nearest first: whatever the application wrote, and whatever the model's row says of lengths."""
    model = f"lengths {normalize}"
    served.admin.execute(
        "INSERT INTO cdc_embedder.model (name, backend, dimensions, normalize, query_prompt)"
        " VALUES (%s, 'fake', 8, %s, 'q: ')",
        (model, normalize),
    )
    question = fake_vector(model, "q: a question", 8).astype(np.float64)
    plain = [(stored(n).astype(np.float64) * 10.0 ** (n % 5 - 2)).tolist() for n in range(30)]
    for kind in ["real[]", "double precision[]"] + ["vector(8)", "halfvec(8)"] * served.has_vector:
        arrays = kind.endswith("[]")
        good = ["{" + str(vector)[1:-1] + "}" if arrays else str(vector) for vector in plain] + EXTREME[kind]
        bad = [*NOT_COMPARABLE[kind], None]
        if kind == "double precision[]":
            good, bad = good + EXTREME["real[]"], bad + NOT_COMPARABLE["real[]"]
        table = f"{kind[0]}_{normalize}".lower()
        served.admin.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, body text, embedding {kind})")  # type: ignore[arg-type]
        with served.admin.cursor() as cursor:
            cursor.executemany(
                f"INSERT INTO {table} VALUES (%s, 'text', %s)",  # type: ignore[arg-type]
                enumerate([*good, *bad]),
            )
        configure_column(served, table, "embedding", model)
        rows = served.admin.execute(
            f"SELECT id, embedding::{kind if arrays else 'real[]'} FROM {table} WHERE id < {len(good)}"  # type: ignore[arg-type]
        ).fetchall()
        scores = {id: np.array(v) @ question / np.linalg.norm(v) / np.linalg.norm(question) for id, v in rows}
        for indexed in [False] if arrays else [False, True]:
            if indexed:
                family = f"{kind.partition('(')[0]}_cosine_ops"
                served.admin.execute(f"CREATE INDEX ON {table} USING hnsw (embedding {family})")  # type: ignore[arg-type]
            for k in (7, 1000):
                assert_both_find(served, table, k, scores, "off" if indexed else "on")


def assert_both_find(served: Bench, table: str, k: int, scores: dict[int, float], seqscan: str) -> None:
    best = sorted(scores.values(), reverse=True)[:k]
    near = 2e-3 if table.startswith("h") else 1e-5
    by_sql = "SELECT (key ->> 'id')::int, score FROM cdc_embedder.search(%s, 'embedding', 'a question', %s)"
    with served.admin.transaction():
        served.admin.execute(f"SET LOCAL enable_seqscan = {seqscan}")  # type: ignore[arg-type]
        told = served.admin.execute(by_sql, (table, k)).fetchall()
    dsn = f"{served.dsn_admin} options='-c enable_seqscan={seqscan}'"
    shown = search_column(Settings(dsn=dsn), table, "embedding", "a question", k)  # type: ignore[arg-type]
    for found in (told, [(int(row.key["id"]), row.score) for row in shown]):
        assert {id for id, _ in found} <= scores.keys(), table
        np.testing.assert_allclose([score for _, score in found], best, atol=near, err_msg=table)
        np.testing.assert_allclose([scores[id] for id, _ in found], best, atol=near, err_msg=table)


def test_what_cannot_be_searched_is_refused(served: Bench) -> None:
    served.admin.execute("CREATE TABLE others (id int PRIMARY KEY, embedding real[])")
    for arguments, state in (
        ("'others', 'embedding', 'a'", "42704"),
        ("'documents', 'body', 'a'", "42704"),
        ("'documents', 'embedding', 'a', 0", "22023"),
        ("'nowhere', 'embedding', 'a'", "42P01"),
    ):
        with pytest.raises(psycopg.Error) as refused:
            served.admin.execute(f"SELECT * FROM cdc_embedder.search({arguments})")  # type: ignore[arg-type]
        assert refused.value.sqlstate == state, arguments


def test_the_rows_are_read_with_the_callers_rights(served: Bench) -> None:
    role = f"reader_{served.database}"
    served.admin.execute(
        f"CREATE ROLE {role}; GRANT USAGE ON SCHEMA cdc_embedder TO {role};"  # type: ignore[arg-type]
        "GRANT EXECUTE ON FUNCTION cdc_embedder.search(regclass, name, text, int),"
        f" cdc_embedder._search_column(regclass, name), cdc_embedder.embed_query(text, text) TO {role};"
        "CREATE POLICY own ON documents USING (id <= 3)"
    )
    try:
        with served.admin.transaction(force_rollback=True):
            served.admin.execute(f"SET LOCAL ROLE {role}")  # type: ignore[arg-type]
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match="documents"), served.admin.transaction():
                search(served.admin, "text 7")
        served.admin.execute(f"GRANT SELECT ON documents TO {role}; ALTER TABLE documents ENABLE ROW LEVEL SECURITY")  # type: ignore[arg-type]
        with served.admin.transaction(force_rollback=True):
            served.admin.execute(f"SET LOCAL ROLE {role}")  # type: ignore[arg-type]
            assert sorted(key["id"] for key, _ in search(served.admin, "text 7")) == [1, 2, 3]
        served.admin.execute(
            "ALTER POLICY own ON documents USING (coalesce(current_setting('hnsw.ef_search', true), '300') = '300')"
        )
        with served.admin.transaction(force_rollback=True):
            served.admin.execute(f"SET LOCAL ROLE {role}")  # type: ignore[arg-type]
            assert len(search(served.admin, "text 7", 300)) == 300, "a version without iterative scans finds as many"
    finally:
        served.admin.execute(
            "ALTER TABLE documents DISABLE ROW LEVEL SECURITY; DROP POLICY own ON documents;"
            f"DROP OWNED BY {role}; DROP ROLE {role}"  # type: ignore[arg-type]
        )
