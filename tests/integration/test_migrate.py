"""`cdc-embedder migrate pgml`, with a schema pgml whose functions are immutable SQL over vectors made beforehand."""

from __future__ import annotations

import re
from typing import Any

import psycopg
import pytest

from cdc_embedder.embedding.fake import fake_vector
from cdc_embedder.install import install
from tests.commands import answers, asked, fails, succeeds
from tests.configuring import one
from tests.embedding_api import Server, api
from tests.servers import SERVICE_ROLE, Bench
from tests.service import running, until, wait_caught_up

MODEL = "intfloat/e5-small-v2"

PGML = """
CREATE SCHEMA pgml;
CREATE TABLE pgml.vectors (text text PRIMARY KEY, vector real[] NOT NULL);
CREATE FUNCTION pgml.embed(transformer text, text text, kwargs jsonb DEFAULT '{}') RETURNS real[]
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
AS $$ SELECT v.vector FROM pgml.vectors v WHERE v.text = coalesce(kwargs ->> 'prompt', '') || $2 $$;
CREATE FUNCTION pgml.normalize_l2(vector real[]) RETURNS real[]
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
AS $$ SELECT array_agg((x / sqrt((SELECT sum(y * y) FROM unnest($1) y)))::real ORDER BY n)
        FROM unnest($1) WITH ORDINALITY AS u(x, n) $$
"""
"""Made before the servers of the tests: what PostgresML's functions look like, and what they give."""


def make_pgml(
    bench: Bench, server: Server | None = None, *, prompt: str = "", rows: int = 60, times: float = 3.0
) -> None:
    """The stand-in gives `times` the vector that the model gives to `prompt` and the text."""
    bench.admin.execute(PGML)
    with bench.admin.cursor() as cursor, cursor.copy("COPY pgml.vectors FROM STDIN") as copy:
        for n in range(1, rows + 1):
            vector = [float(x) * times for x in fake_vector("api", f"{prompt}text {n}", 8)]
            copy.write_row((f"{prompt}text {n}", "{" + ",".join(map(repr, vector)) + "}"))
    if server is not None:
        make_model(bench, server)


def make_model(bench: Bench, server: Server, name: str = MODEL, **more: Any) -> None:
    """A row of the model as it may be there already: an API that gives what `fake_vector` gives."""
    options = psycopg.types.json.Jsonb({"base_url": f"http://127.0.0.1:{server.server_port}/v1"})
    bench.admin.execute("DELETE FROM cdc_embedder.model WHERE name = %s", (name,))
    row = {"name": name, "backend": "openai", "source": "m", "dimensions": 8, "options": options} | more
    bench.admin.execute(
        f"INSERT INTO cdc_embedder.model ({', '.join(row)}) VALUES ({', '.join(['%s'] * len(row))})",  # type: ignore[arg-type]
        list(row.values()),
    )


def make_documents(
    bench: Bench, expression: str, kind: str = "float[]", *, name: str = "documents", rows: int = 60, more: str = ""
) -> None:
    bench.admin.execute(
        f"CREATE TABLE {name} (id int PRIMARY KEY, body text, views int DEFAULT 0,"  # type: ignore[arg-type]
        f" embedding {kind} GENERATED ALWAYS AS ({expression}) STORED{more})"
    )
    bench.grant(name, ["id"], ["body"], "embedding")
    bench.admin.execute(f"GRANT SELECT (xmin) ON {name} TO {SERVICE_ROLE}")  # type: ignore[arg-type]
    bench.admin.execute(
        f"INSERT INTO {name} SELECT n, CASE WHEN n % 10 <> 0 THEN 'text ' || n END FROM generate_series(1, {rows}) n"  # type: ignore[arg-type]
    )
    settle(bench)


def settle(bench: Bench) -> None:
    now = one(bench.admin, "SELECT pg_current_xact_id()::text::bigint")
    until(
        lambda: one(bench.admin, "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint") > now,
        "an older transaction never ended",
    )


def content(bench: Bench, table: str = "documents") -> list[Any]:
    """Files and rows, byte by byte."""
    files = bench.admin.execute(
        "SELECT p.relid::regclass::text, pg_relation_filenode(p.relid) FROM pg_partition_tree(%s) p ORDER BY 1",
        (table,),
    ).fetchall()
    rows = bench.admin.execute(
        f"SELECT id, embedding::text, ctid::text FROM {table} ORDER BY id"  # type: ignore[arg-type]
    ).fetchall()
    return [files, rows]


def generated(bench: Bench, table: str = "documents") -> bool:
    return bool(
        one(
            bench.admin,
            "SELECT attgenerated <> '' FROM pg_attribute WHERE attrelid = %s::regclass AND attname = 'embedding'",
            table,
        )
    )


def configured(bench: Bench) -> list[Any]:
    return bench.admin.execute(
        "SELECT c.source_table::text, c.source_columns, c.target_column::text, c.on_existing, m.name, m.source,"
        " m.document_prompt, m.query_prompt, m.normalize FROM cdc_embedder.embedding_column c"
        " JOIN cdc_embedder.model m ON m.name = c.model ORDER BY c.id"
    ).fetchall()


NORMALIZED = f"pgml.normalize_l2(pgml.embed('{MODEL}', body))"


def test_a_generated_column_becomes_one_that_the_service_fills_and_no_vector_is_made_anew(installed: Bench) -> None:
    bench = installed
    with api() as server:
        make_pgml(bench, server, prompt="passage: ")
        expression = f"pgml.normalize_l2(pgml.embed('{MODEL}', body, '{{\"prompt\": \"passage: \"}}'))"
        make_documents(bench, expression)
        bench.admin.execute("CREATE INDEX documents_first ON documents ((embedding[1]))")
        bench.admin.execute("CREATE VIEW found AS SELECT id, embedding FROM documents")
        before = content(bench)
        plan = succeeds(bench, "migrate", "pgml", OPENAI_API_KEY="x")
        assert "documents.embedding: double precision[], " in plan
        assert "stays: index public.documents_first\n" in plan
        assert "stays: view public.found\n" in plan
        assert [line.strip() for line in plan.splitlines() if line.endswith(";")] == [
            'INSERT INTO cdc_embedder.model ("name", "dimensions", "backend", "source", "document_prompt",'
            f""" "query_prompt", "options") VALUES ('{MODEL} (pgml)', 8, 'openai', 'm', 'passage: ', '',"""
            f""" '{{"base_url": "http://127.0.0.1:{server.server_port}/v1"}}'::jsonb);""",
            'ALTER TABLE "public"."documents" ALTER COLUMN "embedding" DROP EXPRESSION;',
            "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model,"
            f""" on_existing) VALUES ('"public"."documents"', '{{body}}', 'embedding', '{MODEL} (pgml)', 'adopt');""",
        ]
        assert server.texts == []
        assert generated(bench)
        assert configured(bench) == []
        bench.admin.execute(
            "CREATE OR REPLACE FUNCTION pgml.embed(transformer text, text text, kwargs jsonb DEFAULT '{}')"
            " RETURNS real[] LANGUAGE plpgsql IMMUTABLE STRICT"
            " AS $$ BEGIN RAISE 'the library of PostgresML is gone'; END $$"
        )
        said = succeeds(bench, "migrate", "pgml", "--apply", "--sample", "20", OPENAI_API_KEY="x")
        assert "20 vectors compared with the model's, cosine at least 1.000000" in said
        assert len(server.texts) == 20
        assert content(bench) == before
        assert not generated(bench)
        row = ("documents", ["body"], "embedding", "adopt", f"{MODEL} (pgml)", "m", "passage: ", "", True)
        assert configured(bench) == [row]
        assert succeeds(bench, "migrate", "pgml", "--apply") == "no generated column calls pgml.embed\n"
        bench.admin.execute("DROP SCHEMA pgml CASCADE")
        bench.admin.execute("UPDATE documents SET body = 'changed before the service came' WHERE id = 2")
        server.texts.clear()
        with running(bench, OPENAI_API_KEY="x") as service:
            wait_caught_up(bench)
            assert server.texts == ["passage: changed before the service came"]
            bench.admin.execute("UPDATE documents SET body = 'changed' WHERE id = 7")
            bench.admin.execute("INSERT INTO documents (id, body, embedding) VALUES (61, 'new', DEFAULT)")
            wait_caught_up(bench)
            assert sorted(server.texts[1:]) == ["passage: changed", "passage: new"]
            assert service.stop() == 0
        changed = [new for new in content(bench)[1] if new[:2] not in [old[:2] for old in before[1]]]
        assert [id for id, _, _ in changed] == [2, 7, 61]
        [report] = answers(bench, "verify", OPENAI_API_KEY="x")
        assert (report["rows"], report["null"], report["current"]) == (61, 6, 55)


@pytest.mark.parametrize(
    ("kind", "normalized"), [("real[]", True), ("float[]", False), ("vector(8)", False), ("halfvec(8)", True)]
)
def test_vectors_of_every_type_and_length_stay_as_they_are(bench18: Bench, kind: str, normalized: bool) -> None:
    with api() as server:
        make_pgml(bench18, server, times=3.0 if normalized else 1.0)
        make_documents(bench18, NORMALIZED if normalized else f"pgml.embed('{MODEL}', body)", kind)
        before = content(bench18)
        succeeds(bench18, "migrate", "pgml", "documents.embedding", "--apply", OPENAI_API_KEY="x")
        assert configured(bench18)[0][4:] == (f"{MODEL} (pgml)", "m", "", "", normalized)
        server.texts.clear()
        with running(bench18, OPENAI_API_KEY="x") as service:
            wait_caught_up(bench18)
            assert service.stop() == 0
        assert server.texts == []
        assert content(bench18) == before
        [report] = answers(bench18, "verify", OPENAI_API_KEY="x")
        assert (report["current"], report["null"]) == (54, 6)


def test_a_row_of_the_model_that_says_the_same_is_used(bench18: Bench) -> None:
    with api() as server:
        make_pgml(bench18, server, times=1.0)
        make_model(bench18, server, document_prompt="", query_prompt="question: ")
        make_documents(bench18, NORMALIZED)
        make_documents(bench18, f"pgml.embed('{MODEL}', body)", name="others")
        succeeds(bench18, "migrate", "pgml", "--apply", OPENAI_API_KEY="x")
        models = [(row[0], *row[4:]) for row in configured(bench18)]
        assert models == [
            ("documents", MODEL, "m", "", "question: ", True),
            ("others", f"{MODEL} (pgml)", "m", "", "", False),
        ]


def test_a_sample_that_is_not_the_models_is_refused_with_its_numbers_and_nothing_is_changed(installed: Bench) -> None:
    with api() as server:
        make_pgml(installed, server)
        make_documents(installed, NORMALIZED)
        installed.admin.execute("UPDATE pgml.vectors SET vector = '{1,0,0,0,0,0,0,0}'")
        installed.admin.execute("CREATE TABLE others (id int PRIMARY KEY, body text)")
        installed.admin.execute(
            f"ALTER TABLE others ADD embedding real[] GENERATED ALWAYS AS ({NORMALIZED}) STORED"  # type: ignore[arg-type]
        )
        installed.admin.execute("INSERT INTO others SELECT n, 'text ' || n FROM generate_series(1, 60) n")
        before = content(installed), content(installed, "others")
        for sample, threshold, below in (("60", "0.99", 60), ("7", "0.99", 7), ("60", "-0.99", 0)):
            done = asked(installed, "migrate", "pgml", "documents.embedding", "others.embedding", "--apply",
                         "--sample", sample, "--threshold", threshold, OPENAI_API_KEY="x")  # fmt: skip
            assert done.returncode == (1 if below else 0), done.stdout
            said = done.stderr if below else done.stdout
            assert f"public.others.embedding: {sample} vectors compared with the model's, cosine at least " in said
            assert f"{below} below {threshold}" in said
            assert (content(installed), content(installed, "others")) == before
            assert [generated(installed), generated(installed, "others")] == [bool(below)] * 2
            assert len(configured(installed)) == (0 if below else 2)
        assert "60 of them are kept, but cdc-embedder verify will call them wrong: below 0.9999" in done.stdout


def test_a_sample_of_another_length_than_the_models_is_refused_and_nothing_is_changed(bench18: Bench) -> None:
    with api() as server:
        make_pgml(bench18, server, times=1.02)
        make_documents(bench18, f"pgml.embed('{MODEL}', body)")
        before = content(bench18)
        said = fails(bench18, "migrate", "pgml", "--apply", OPENAI_API_KEY="x")
        assert "cosine at least 1.000000, 1.000000 on average, 0 below 0.99, lengths off by 0.020000 at most" in said
        assert "54 by more than 0.01. They have the directions that the model gives, but not the lengths" in said
        assert (content(bench18), generated(bench18), configured(bench18)) == (before, True, [])


def test_columns_that_our_own_pgml_filled_keep_the_lengths_that_it_gave_them(
    installed: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What kwargs do not say, our pgml.embed takes from the model's row, PostgresML from the model itself."""
    bench = installed
    monkeypatch.setattr("tests.embedding_api.fake_vector", lambda *given: 3 * fake_vector(*given))
    install(bench.dsn_admin, bench.slot, owner=SERVICE_ROLE, pgml=True)
    lengths = {"usual": 1.0, "kept": 3.0, "told": 3.0, "made": 1.0}
    with api() as server:
        make_model(bench, server, "unit")
        make_model(bench, server, "raw", normalize=False)
        with running(bench, OPENAI_API_KEY="x", CDC_EMBEDDER_SQL_EMBED="on") as service:
            service.wait_for_log("SQL is answered")
            bench.admin.execute("SET cdc_embedder.embed_timeout = '60s'")
            make_documents(bench, "pgml.embed('unit', body)", "real[]", name="usual", rows=3)
            make_documents(bench, "pgml.embed('raw', body)", name="kept", rows=3)
            no = """'{"normalize_embeddings": false}'"""
            make_documents(bench, f"pgml.embed('unit', body, {no})", name="told", rows=3)
            make_documents(bench, "pgml.normalize_l2(pgml.embed('raw', body))", name="made", rows=3)
            said = succeeds(bench, "migrate", "pgml", "--apply", OPENAI_API_KEY="x")
            assert said.count("3 vectors compared with the model's, cosine at least 1.000000") == 4
            assert said.count("lengths off by 0.00000") == 2
            for table, length in lengths.items():
                bench.admin.execute(f"INSERT INTO {table} (id, body) VALUES (9, 'new')")  # type: ignore[arg-type]
                normalized = {row[0]: row[-1] for row in configured(bench)}
                assert normalized[table] is (length == 1.0), table
            wait_caught_up(bench)
            for table, length in lengths.items():
                found = bench.admin.execute(f"SELECT cdc_embedder.norm_l2(embedding) FROM {table}").fetchall()  # type: ignore[arg-type]
                assert [norm for (norm,) in found] == pytest.approx([length] * 4, rel=1e-5), table
            assert service.stop() == 0


def test_a_column_of_our_own_pgml_whose_models_row_is_gone_is_left_alone(bench18: Bench) -> None:
    install(bench18.dsn_admin, bench18.slot, owner=SERVICE_ROLE, pgml=True)
    for table, expression in {
        "a": "pgml.embed('gone', body)",
        "b": "pgml.normalize_l2(pgml.embed('gone', body))",
    }.items():
        bench18.admin.execute(
            f"CREATE TABLE {table} (id int PRIMARY KEY, body text,"  # type: ignore[arg-type]
            f" embedding vector(8) GENERATED ALWAYS AS ({expression}) STORED)"
        )
    said = succeeds(bench18, "migrate", "pgml")
    assert "public.a.embedding: left alone: the row of the model gone, which said whether vectors have unit" in said
    assert "public.b.embedding: public.vector(8)" in said


def test_what_is_not_understood_is_listed_with_the_reason_and_left_alone(bench18: Bench) -> None:
    with api() as server:
        make_pgml(bench18, server)
        make_documents(bench18, NORMALIZED)
        strange = {
            "a": (f"pgml.embed('{MODEL}', title || body)", "joined of more than a literal and one column"),
            "b": (f"pgml.embed('{MODEL}', coalesce(body, ''))", "the text goes through COALESCE"),
            "c": ("pgml.embed(body, body)", "the model is not a literal"),
            "d": (f"""pgml.embed('{MODEL}', body, '{{"prompt_name": "x"}}')""", 'kwargs hold "prompt_name": "x"'),
            "e": (f"(pgml.embed('{MODEL}', body))[1:4]", "is not understood"),
            "f": ("pgml.embed('unknown', body)", "it holds no vector to tell the model's dimensions by"),
        }
        for name, (expression, _) in strange.items():
            bench18.admin.execute(
                f"CREATE TABLE {name} (id int PRIMARY KEY, title text, body text,"  # type: ignore[arg-type]
                f" embedding real[] GENERATED ALWAYS AS ({expression}) STORED)"
            )
        bench18.admin.execute(
            f"CREATE TABLE g (body text, embedding real[] GENERATED ALWAYS AS ({NORMALIZED}) STORED);"  # type: ignore[arg-type]
            f"CREATE TABLE h (id int PRIMARY KEY, body text, e numeric[] GENERATED ALWAYS AS ({NORMALIZED}) STORED);"
            f"CREATE TABLE i (id int PRIMARY KEY, body text, e real[] GENERATED ALWAYS AS ({NORMALIZED}) STORED);"
            "CREATE TABLE j () INHERITS (i);"
            "CREATE TABLE k (id int PRIMARY KEY, body text, n int GENERATED ALWAYS AS (length(body)) STORED);"
            f"CREATE TABLE l (id int, body text, e real[] GENERATED ALWAYS AS ({NORMALIZED}) STORED, PRIMARY KEY (id))"
            " PARTITION BY RANGE (id); CREATE TABLE l_1 PARTITION OF l"
            f" (e GENERATED ALWAYS AS (pgml.embed('{MODEL}', body)) STORED) FOR VALUES FROM (0) TO (9)"
        )
        reasons = {f"{name}.embedding": reason for name, (_, reason) in strange.items()} | {
            "g.embedding": "no primary key",
            "h.e": "numeric[] cannot hold a vector",
            "i.e": "inheritance is not served",
            "l.e": "the partition public.l_1 makes its vectors in another way",
        }
        before = generated_columns(bench18)
        done = asked(bench18, "migrate", "pgml", "--apply", OPENAI_API_KEY="x")
        assert done.returncode == 1
        assert done.stderr == ""
        told = dict(re.findall(r"^public\.(\S+): left alone: (.*)$", done.stdout, re.MULTILINE))
        assert told.keys() == reasons.keys()
        for name, reason in reasons.items():
            assert reason in told[name], name
        assert [row[0] for row in configured(bench18)] == ["documents"]
        assert before - generated_columns(bench18) == {("documents", "embedding")}
        for name, refused in {
            "k.n": "the vector goes through length",
            "l_1.e": "the table is a partition",
        }.items():
            named = asked(bench18, "migrate", "pgml", name)
            assert named.returncode == 1
            assert refused in named.stdout
        assert "is no generated column" in fails(bench18, "migrate", "pgml", "k.body")
        assert "there is no column k.nothing" in fails(bench18, "migrate", "pgml", "k.nothing")


def generated_columns(bench: Bench) -> set[tuple[str, str]]:
    return set(
        bench.admin.execute(
            "SELECT attrelid::regclass::text, attname::text FROM pg_attribute WHERE attgenerated <> ''"
        ).fetchall()
    )


def test_a_partitioned_table_is_migrated_by_its_root(installed: Bench) -> None:
    with api() as server:
        make_pgml(installed, server)
        installed.admin.execute(
            'CREATE TABLE "Doc ""s" (id int PRIMARY KEY, "The Body" varchar, embedding real[] NOT NULL'
            f""" GENERATED ALWAYS AS (pgml.normalize_l2(pgml.embed('{MODEL}', 'text ' || "The Body"))) STORED)"""  # type: ignore[arg-type]
            " PARTITION BY RANGE (id);"
            'CREATE TABLE part_1 PARTITION OF "Doc ""s" FOR VALUES FROM (0) TO (31);'
            'CREATE TABLE part_2 PARTITION OF "Doc ""s" FOR VALUES FROM (31) TO (99)'
        )
        installed.grant('"Doc ""s"', ["id"], ["The Body"], "embedding")
        installed.admin.execute(f'GRANT SELECT (xmin) ON "Doc ""s" TO {SERVICE_ROLE}')  # type: ignore[arg-type]
        installed.admin.execute('INSERT INTO "Doc ""s" SELECT n, n FROM generate_series(1, 60) n')
        settle(installed)
        before = content(installed, '"Doc ""s"')
        said = succeeds(installed, "migrate", "pgml", "--apply", OPENAI_API_KEY="x")
        assert "its NOT NULL goes" in said
        assert content(installed, '"Doc ""s"') == before
        assert generated_columns(installed) == set()
        server.texts.clear()
        with running(installed, OPENAI_API_KEY="x") as service:
            wait_caught_up(installed)
            assert server.texts == []
            installed.admin.execute("""UPDATE "Doc ""s" SET "The Body" = 'another' WHERE id = 40""")
            installed.admin.execute("""INSERT INTO "Doc ""s" VALUES (70, 'new')""")
            wait_caught_up(installed)
            assert sorted(server.texts) == ["text another", "text new"]
            assert service.stop() == 0


def test_a_table_in_use_is_not_waited_for_long_and_not_half_migrated(bench18: Bench) -> None:
    with api() as server:
        make_pgml(bench18, server)
        make_documents(bench18, NORMALIZED)
        before = content(bench18)
        models = one(bench18.admin, "SELECT count(*) FROM cdc_embedder.model")
        with psycopg.connect(bench18.dsn_admin) as reader:
            reader.execute("SELECT FROM documents")
            done = asked(bench18, "migrate", "pgml", "--apply", OPENAI_API_KEY="x")
        assert done.returncode == 1
        assert "public.documents.embedding was not migrated: its table is in use" in done.stderr
        assert generated(bench18)
        assert content(bench18) == before
        assert configured(bench18) == []
        assert one(bench18.admin, "SELECT count(*) FROM cdc_embedder.model") == models


def test_who_does_not_own_the_table_is_told_before_anything_is_changed(bench18: Bench) -> None:
    with api() as server:
        make_pgml(bench18, server)
        make_documents(bench18, NORMALIZED)
        plan = succeeds(bench18, "migrate", "pgml", CDC_EMBEDDER_DSN=bench18.dsn_service)
        owner = one(bench18.admin, "SELECT current_user::text")
        assert f"to be applied as the table's owner, {owner}, or as a superuser" in plan
        done = asked(bench18, "migrate", "pgml", "--apply", CDC_EMBEDDER_DSN=bench18.dsn_service, OPENAI_API_KEY="x")
        assert done.returncode == 1
        assert f"public.documents.embedding belongs to {owner}" in done.stderr
        assert generated(bench18)
        assert server.texts == []
