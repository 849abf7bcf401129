"""`cdc-embedder plan`: its figures beside what a real backfill does, its warnings beside tables that earn them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from cdc_embedder import planned_table
from cdc_embedder.embedded import Server
from cdc_embedder.growing import growth
from cdc_embedder.planned_table import LONGEST_TEXT
from tests import servers
from tests.commands import answers, asked, cli, fails, succeeds
from tests.servers import Bench, bench_with
from tests.service import running, wait_caught_up

DIMENSIONS = 384


def make_model(bench: Bench, dimensions: int = DIMENSIONS, **options: Any) -> None:
    bench.admin.execute(
        "INSERT INTO cdc_embedder.model (name, backend, dimensions, max_tokens, options)"
        " VALUES ('fake', 'fake', %s, 20, %s)",
        (dimensions, json.dumps(options)),
    )


def make_documents(bench: Bench, rows: int, *, body: str = "'some text ' || n", target: str = "") -> None:
    """Every tenth row has no text."""
    bench.admin.execute(f"CREATE TABLE documents (id bigint PRIMARY KEY, title text, body text{target})")
    bench.admin.execute(
        f"INSERT INTO documents SELECT n, 't', CASE WHEN n % 10 <> 0 THEN {body} END FROM generate_series(1, {rows}) n"
    )


def test_a_plan_counts_rows_and_tokens_and_measures_the_model(installed: Bench) -> None:
    make_model(installed, delay_per_text_s=0.002)
    body = "repeat('word ', CASE WHEN n % 4 = 0 THEN 30 ELSE 10 END)"
    make_documents(installed, 400, body=body)
    plan = answers(installed, "plan", "documents", "body", "--model", "fake")
    assert (plan["table"], plan["sources"], plan["model"], plan["engine"]) == (
        "public.documents",
        ["body"],
        "fake",
        "fake",
    )
    assert (plan["rows"], plan["rows_estimated"], plan["sampled"]) == (400, False, 400)
    assert plan["null_share"] == pytest.approx(0.1)
    assert plan["embedded"] == 360
    assert plan["share_over_limit"] == pytest.approx(80 / 360)
    assert plan["tokens_per_text"] == pytest.approx((280 * 10 + 80 * 20) / 360)
    assert plan["max_tokens"] == 20
    assert plan["share_refused"] == 0
    assert 0 < plan["rows_per_s"] <= 500  # the delay allows no more
    assert plan["minutes"] == pytest.approx(360 / plan["rows_per_s"] / 60)
    assert plan["target_type"] == (f"vector({DIMENSIONS})" if installed.has_vector else "real[]")
    assert plan["vector_bytes"] == (8 if installed.has_vector else 24) + 4 * DIMENSIONS
    assert plan["warnings"] == []
    [index] = plan["indexes"]
    assert (index["name"], index["method"], index["on_target"]) == ("documents_pkey", "btree", False)


def test_a_plan_can_write_nothing(bench18: Bench) -> None:
    with planned_table.connect(bench18.dsn_admin) as session, pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        session.execute("CREATE TABLE written (n int)")


def test_the_text_of_several_columns_is_that_which_would_be_embedded(bench18: Bench) -> None:
    make_model(bench18)
    make_documents(bench18, 20, body="'two words'")
    plan = answers(bench18, "plan", "documents", "title, body", "--model", "fake")
    assert plan["null_share"] == 0
    assert plan["tokens_per_text"] == pytest.approx((18 * 3 + 2 * 1) / 20)


def test_what_the_model_refuses_is_told_and_not_counted_as_embedded(bench18: Bench) -> None:
    make_model(bench18, reject="7")
    make_documents(bench18, 50)
    plan = answers(bench18, "plan", "documents", "body", "--model", "fake")
    assert plan["share_refused"] == pytest.approx(5 / 45)
    assert plan["embedded"] == 40
    assert "they would be recorded as failed" in succeeds(bench18, "plan", "documents", "body", "--model", "fake")


def test_of_a_large_table_rows_are_estimated_and_a_sample_is_drawn_from_some_pages(bench18: Bench) -> None:
    make_model(bench18, 8)
    make_documents(bench18, 120_000)
    bench18.admin.execute("ANALYZE documents")
    plan = answers(bench18, "plan", "documents", "body", "--model", "fake", "--sample", "50")
    assert plan["rows_estimated"]
    assert plan["rows"] == pytest.approx(120_000, rel=0.02)
    assert plan["sampled"] == 50
    shown = succeeds(bench18, "plan", "documents", "body", "--model", "fake", "--sample", "50")
    assert "about 1" in shown


def test_a_large_table_whose_rows_are_in_few_pages_is_sampled_all_the_same(bench18: Bench) -> None:
    make_model(bench18, 8)
    make_documents(bench18, 110_000)
    bench18.admin.execute("ANALYZE documents")
    bench18.admin.execute("DELETE FROM documents WHERE id <> 77777")
    plan = answers(bench18, "plan", "documents", "body", "--model", "fake", "--sample", "1")
    assert plan["sampled"] == 1


def test_a_partitioned_table_is_planned_as_a_whole(bench18: Bench) -> None:
    make_model(bench18)
    bench18.admin.execute(
        "CREATE TABLE documents (id int PRIMARY KEY, body text) PARTITION BY RANGE (id);"
        "CREATE TABLE low PARTITION OF documents FOR VALUES FROM (0) TO (100);"
        "CREATE TABLE high PARTITION OF documents FOR VALUES FROM (100) TO (1000);"
        "INSERT INTO documents SELECT n, 'text' FROM generate_series(1, 300) n"
    )
    plan = answers(bench18, "plan", "documents", "body", "--model", "fake")
    assert (plan["rows"], plan["sampled"], plan["warnings"]) == (300, 300, [])
    assert len(plan["indexes"]) == 1
    assert plan["table_growth_bytes"] > 300 * 4 * DIMENSIONS
    [warning] = answers(bench18, "plan", "low", "body", "--model", "fake")["warnings"]
    assert "it is a partition" in warning


@pytest.fixture
def bare(pg18: Server) -> Iterator[str]:
    """The DSN of a database without our schema."""
    with psycopg.connect(pg18.dsn(), autocommit=True) as connection:
        connection.execute("CREATE DATABASE bare_plan")
        try:
            yield pg18.dsn("bare_plan")
        finally:
            connection.execute("DROP DATABASE bare_plan WITH (FORCE)")


def test_a_plan_with_a_real_model_needs_no_schema_of_ours(bare: str) -> None:
    with psycopg.connect(bare, autocommit=True) as connection:
        connection.execute("CREATE TABLE documents (id int PRIMARY KEY, body text)")
        connection.execute(
            "INSERT INTO documents VALUES (1, 'a cat'), (2, repeat('many words of a long text ', 200)), (3, NULL)"
        )
    done = cli("plan", "documents", "body", "--json", CDC_EMBEDDER_DSN=bare, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["share_over_limit"] == pytest.approx(0.5)
    assert 3 < plan["tokens_per_text"] < 300
    assert plan["minutes"] > 0
    assert "cpu" in plan["engine"]
    done = cli("plan", "documents", "body", "--model", "unheard-of", CDC_EMBEDDER_DSN=bare)
    assert done.returncode == 1
    assert done.stderr == "cdc-embedder: there is no model unheard-of. INSERT it INTO cdc_embedder.model\n"


@pytest.mark.parametrize(
    ("table", "arguments", "warning"),
    [
        ("CREATE TABLE t (id int, body text)", [], "it has no primary key"),
        ("CREATE TABLE t (id int PRIMARY KEY DEFERRABLE, body text)", [], "it has no primary key"),
        ("CREATE UNLOGGED TABLE t (id int PRIMARY KEY, body text)", [], "scans alone feed the column"),
        ("CREATE VIEW t AS SELECT 1 AS id, 'a'::text AS body", [], "it is no table"),
        (
            "CREATE TABLE t (id int PRIMARY KEY, body text); ALTER TABLE t REPLICA IDENTITY NOTHING",
            [],
            "its replica identity is NOTHING",
        ),
        (
            "CREATE TABLE t (id int PRIMARY KEY, body text); CREATE TABLE child () INHERITS (t)",
            [],
            "children by inheritance",
        ),
        (
            "CREATE TABLE t (id int PRIMARY KEY, body text, v vector(384)); CREATE INDEX near ON t USING hnsw (v"
            " vector_cosine_ops)",
            ["--target", "v"],
            "the index near (hnsw) is on the target: drop it, embed",
        ),
        (
            "CREATE TABLE t (id int PRIMARY KEY, body text, v vector(384)); CREATE INDEX near ON t USING ivfflat (v"
            " vector_cosine_ops)",
            [],
            "the index near (ivfflat) is on another column, and still written to",
        ),
        (
            "CREATE TABLE t (id int PRIMARY KEY, body text); CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS"
            " 'BEGIN RETURN NEW; END'; CREATE TRIGGER g BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION f()",
            [],
            "its UPDATE triggers fire",
        ),
        ("CREATE TABLE t (id int PRIMARY KEY, body text)", ["--target", "v"], "it has no column v"),
        ("CREATE TABLE t (id int PRIMARY KEY, body text, v text)", ["--target", "v"], "which cannot hold a vector"),
        ("CREATE TABLE t (id int PRIMARY KEY, body text, v vector(3))", ["--target", "v"], "has 384 dimensions"),
        ("CREATE TABLE t (id int PRIMARY KEY, body text, v vector)", ["--target", "v"], "without a dimension"),
        (
            "CREATE TABLE t (id int PRIMARY KEY, body text, v real[] NOT NULL)",
            ["--target", "v"],
            "v is NOT NULL",
        ),
        (
            "CREATE TABLE t (id int PRIMARY KEY, body text, v real[] GENERATED ALWAYS AS ('{1}') STORED)",
            ["--target", "v"],
            "v is generated",
        ),
        ("CREATE TABLE t (id int PRIMARY KEY, body text)", ["--target", "body"], "is a source column as well"),
        (
            "CREATE TABLE t (id int PRIMARY KEY, body text, v real[]); INSERT INTO t VALUES (1, 'a', '{1}')",
            ["--target", "v"],
            "1 of the sampled rows hold a vector already",
        ),
        ("CREATE TABLE t (id int PRIMARY KEY, body text)", [], "no sampled row has a text"),
    ],
)
def test_what_will_stand_in_the_way_is_told_before(
    bench18: Bench, table: str, arguments: list[str], warning: str
) -> None:
    make_model(bench18)
    bench18.admin.execute(table)  # type: ignore[arg-type]
    told = answers(bench18, "plan", "t", "body", "--model", "fake", *arguments)["warnings"]
    assert [said for said in told if warning in said], told
    assert f"warning: {told[0]}" in succeeds(bench18, "plan", "t", "body", "--model", "fake", *arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "body"], 'relation "nowhere" does not exist'),
        (["documents", "bdy"], "documents has no column bdy. Its columns that hold text:"),
        (["documents", "id"], "is of type bigint, which is no text"),
        (["documents", "body", "--target", "a.b"], "the table is an argument of its own"),
        (["documents", "body,"], "quote it as in SQL"),
        (["documents", "body", "--model", "unheard-of"], "INSERT it INTO cdc_embedder.model"),
        (["documents", "body", "--model", "down"], "is down"),
    ],
)
def test_what_cannot_be_planned_is_a_sentence(bench18: Bench, arguments: list[str], said: str) -> None:
    make_model(bench18)
    bench18.admin.execute(
        "INSERT INTO cdc_embedder.model (name, backend, dimensions, options)"
        " VALUES ('down', 'fake', 8, '{\"down\": true}')"
    )
    make_documents(bench18, 10)
    assert said in fails(bench18, "plan", "--model", "fake", *arguments)


def test_row_security_that_would_hide_rows_is_an_error_and_no_wrong_figure(bench18: Bench) -> None:
    make_model(bench18)
    make_documents(bench18, 10)
    bench18.admin.execute("ALTER TABLE documents ENABLE ROW LEVEL SECURITY; GRANT SELECT ON documents TO cdc_service")
    refused = fails(bench18, "plan", "documents", "body", "--model", "fake", CDC_EMBEDDER_DSN=bench18.dsn_service)
    assert "row-level security" in refused


def test_a_very_long_text_is_read_in_part(bench18: Bench) -> None:
    make_model(bench18)
    make_documents(bench18, 3, body=f"repeat('word ', {LONGEST_TEXT})")
    plan = answers(bench18, "plan", "documents", "body", "--model", "fake")
    assert plan["share_over_limit"] == 1


@pytest.mark.parametrize(
    ("kind", "dimensions", "body", "indexes", "full_page_writes"),
    [
        ("vector(384)", 384, "repeat('word ', 10 + n % 50)", "", "off"),
        ("vector(384)", 384, "repeat('word ', 10 + n % 50)", "CREATE INDEX ON documents (body)", "on"),
        ("vector(1024)", 1024, "repeat('word ', 10 + n % 50)", "", "off"),
        ("real[]", 384, "repeat(md5(n::text), 11)", "", "on"),
        ("halfvec(8)", 8, "md5(n::text)", "CREATE INDEX ON documents (title)", "off"),
    ],
)
def test_the_growth_that_was_planned_is_the_growth_of_a_real_backfill(
    kind: str, dimensions: int, body: str, indexes: str, full_page_writes: str
) -> None:
    settings = {"full_page_writes": full_page_writes, "autovacuum": "off"}
    with bench_with(servers.bindir_18(), "pgoutput", settings) as bench:
        make_model(bench, dimensions)
        make_documents(bench, 3000, body=body, target=f", embedding {kind}")
        bench.admin.execute(indexes or "SELECT")  # type: ignore[arg-type]
        bench.grant("documents", ["id"], ["body"], "embedding")
        bench.admin.execute("CHECKPOINT")
        plan = answers(bench, "plan", "documents", "body", "--model", "fake", "--target", "embedding")
        assert plan["warnings"] == []
        before = sizes(bench)
        bench.admin.execute(
            "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
            " VALUES ('documents', '{body}', 'embedding', 'fake')"
        )
        with running(bench) as service:
            wait_caught_up(bench)
            assert service.stop() == 0
        after = sizes(bench)
        [ledger] = bench.admin.execute("SELECT pg_total_relation_size('cdc_embedder.ledger_1')").fetchone() or [0]
    grown = [now - then for now, then in zip(after, before, strict=True)]
    names = ["table_growth_bytes", "index_growth_bytes", "wal_bytes", "ledger_bytes"]
    for name, real in zip(names, [*grown, ledger], strict=True):
        assert 0.6 < plan[name] / real < 2, (name, plan[name], real)


def sizes(bench: Bench) -> list[int]:
    """Table with its TOAST, indexes, WAL written so far; bytes."""
    row = bench.admin.execute(
        "SELECT pg_table_size('documents'), pg_indexes_size('documents'), (pg_current_wal_insert_lsn() - '0/0')::int8"
    ).fetchone()
    assert row is not None
    return list(row)


def test_a_vector_that_does_not_fit_beside_its_row_goes_out_of_line() -> None:
    """2,700 rows of 200 bytes and 1,024 dimensions took 15,613,952 bytes of a PostgreSQL 18, and its TOAST table."""
    grown = growth(2700, 2700, 1024, "vector", 540_000, [], full_pages=False)
    assert grown.table == pytest.approx(15_613_952, rel=0.03)


def test_a_fillfactor_costs_room_and_an_empty_table_nothing() -> None:
    given = {"rows": 1000, "to_embed": 1000, "dimensions": 384, "kind": "vector", "heap_bytes": 100_000}
    full, half = (growth(**given, index_bytes=[], fillfactor=f, full_pages=False) for f in (100, 50))  # type: ignore[arg-type]
    assert half.table > 1.5 * full.table
    assert half.wal == full.wal
    nothing = growth(0, 0, 384, "vector", 0, [], full_pages=True)
    assert (nothing.table, nothing.indexes, nothing.ledger, nothing.wal, nothing.wal_of_pages) == (0, 0, 0, 0, 0)


def test_a_measurement_stops_when_its_time_is_over(bench18: Bench) -> None:
    """Batches grow from eight texts, so that a slow model is measured with the first of them."""
    make_model(bench18, delay_s=0.2)
    make_documents(bench18, 2000)
    program = (
        "import cdc_embedder.planning as p; p.MEASURED_SECONDS = 0.1; from cdc_embedder.cli import app;"
        "app(['plan', 'documents', 'body', '--model', 'fake', '--json'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {"CDC_EMBEDDER_DSN": bench18.dsn_admin},
        check=True,
    )
    plan = json.loads(done.stdout)
    assert plan["sampled"] == 1000
    assert plan["embedded"] == 8 + 16
    assert plan["minutes"] > 0


def test_a_plan_is_readable(bench18: Bench) -> None:
    make_model(bench18)
    make_documents(bench18, 100)
    done = asked(bench18, "plan", "documents", "body", "--model", "fake", "--target", "embedding")
    assert done.returncode == 0
    assert done.stderr == ""
    for part in ("public.documents, body → embedding vector(384)", "100; 10.0% of 100 sampled have no text",
                 "over 20 tokens", "minutes on this device", "1,544 bytes a row", "documents_pkey (btree)",
                 "warning: it has no column embedding"):  # fmt: skip
        assert part in done.stdout
