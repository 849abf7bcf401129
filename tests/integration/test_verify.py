"""`cdc-embedder verify` finds each kind of difference, planted by hand while the service stands still, and no other."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from io import StringIO
from typing import Any

import psycopg
import pytest
from pydantic import SecretStr
from rich.console import Console

from cdc_embedder.asking import session
from cdc_embedder.catalog import EmbeddingColumn, load
from cdc_embedder.errors import Misconfigured
from cdc_embedder.rows.session import connect
from cdc_embedder.settings import Settings
from cdc_embedder.verifying import LEAST_COSINE, LEAST_COSINE_HALF, Sample, least_cosine, progress_bar, verify
from cdc_embedder.waiting import wait_for_pending
from tests.commands import answers, asked, fails
from tests.servers import Bench, make_bench
from tests.service import running, until, wait_caught_up

KEYS = [
    "id", "source_table", "target_column", "rows", "null", "current", "pending", "failed", "missing", "stale", "wrong",
    "orphaned",
]  # fmt: skip

ROWS = 40


def make_documents(bench: Bench, *, target: str | None = None, rows: int = ROWS, table: str = "documents") -> None:
    """Texts, every tenth of them NULL, and a column configured on them."""
    kind = target or ("vector(8)" if bench.has_vector else "real[]")
    bench.admin.execute(
        "INSERT INTO cdc_embedder.model (name, backend, dimensions, options) VALUES ('fake', 'fake', 8, %s)"
        " ON CONFLICT DO NOTHING",
        (json.dumps({"reject": "refused"}),),
    )
    bench.admin.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, body text, embedding {kind})")
    bench.grant(table, ["id"], ["body"], "embedding")
    bench.admin.execute(
        f"INSERT INTO {table} SELECT n, CASE WHEN n % 10 <> 0 THEN 'text ' || n END FROM generate_series(1, {rows}) n"
    )
    bench.admin.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
        " VALUES (%s, '{body}', 'embedding', 'fake')",
        (table,),
    )


def embed_all(bench: Bench) -> None:
    """The real service does its work, and is stopped."""
    with running(bench) as service:
        wait_caught_up(bench)
        assert service.stop() == 0


@pytest.fixture(scope="module", params=["15-wal2json", "18-pgoutput"])
def embedded_once(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Forty rows, four of them without text, embedded by the real service, which is stopped; on each server."""
    major, plugin = request.param.split("-")
    for bench in make_bench(request.getfixturevalue(f"pg{major}"), plugin):
        make_documents(bench)
        embed_all(bench)
        bench.admin.execute("CREATE TABLE documents_then AS TABLE documents")
        bench.admin.execute("CREATE TABLE ledger_then AS TABLE cdc_embedder.ledger_1")
        yield bench


@pytest.fixture
def embedded(embedded_once: Bench) -> Bench:
    """The same, as the service left it."""
    embedded_once.admin.execute(
        "TRUNCATE documents; INSERT INTO documents TABLE documents_then;"
        "TRUNCATE cdc_embedder.ledger_1; INSERT INTO cdc_embedder.ledger_1 TABLE ledger_then"
    )
    return embedded_once


def reports(bench: Bench, *names: tuple[str, str], sample: int | None = None) -> list[dict[str, Any]]:
    """What `verify` finds, as the service's role."""
    settings = Settings(dsn=SecretStr(bench.dsn_service))
    found = verify(settings, names, wait=False, sample=sample, advance=lambda name, done, total: None)
    return [report.as_object() for report in found]


def differences(bench: Bench, *, sample: int | None = None) -> dict[str, int]:
    """The numbers of the only report that are not 0, but for those that wait by the view's account."""
    [report] = reports(bench, sample=sample)
    return {name: report[name] for name in KEYS[3:] if report[name] and name != "pending"}


@pytest.mark.parametrize("bench_target", ["vector(8)", "halfvec(8)", "real[]", "double precision[]"])
def test_after_a_run_of_the_service_nothing_differs(bench18: Bench, bench_target: str) -> None:
    make_documents(bench18, target=bench_target)
    embed_all(bench18)
    [report] = answers(bench18, "verify", CDC_EMBEDDER_DSN=bench18.dsn_service)
    expected = {"id": 1, "source_table": "public.documents", "target_column": "embedding", "pending": 0}
    assert report == dict.fromkeys(KEYS, 0) | expected | {"rows": 40, "null": 4, "current": 36}


PLANTED = {
    "a text that was changed": (
        "UPDATE documents SET body = 'another text' WHERE id = 1", {"current": 35, "stale": 1}),
    "a text that came to be": (
        "UPDATE documents SET body = 'a text at last' WHERE id = 10", {"null": 3, "current": 36, "missing": 1}),
    "a text that was emptied": (
        "UPDATE documents SET body = '' WHERE id = 1", {"current": 35, "stale": 1}),
    "a text that went": (
        "UPDATE documents SET body = NULL WHERE id = 1", {"null": 5, "current": 35, "stale": 1}),
    "a text that went with its vector": (
        "UPDATE documents SET body = NULL, embedding = NULL WHERE id = 1", {"null": 5, "current": 35, "stale": 1}),
    "a vector without a text": (
        "UPDATE documents SET embedding = (SELECT d.embedding FROM documents d WHERE id = 2) WHERE id = 10",
        {"current": 36, "wrong": 1}),
    "a vector that was removed": (
        "UPDATE documents SET embedding = NULL WHERE id IN (1, 2)", {"current": 34, "missing": 2}),
    "a row that was inserted": (
        "INSERT INTO documents VALUES (41, 'a new text')", {"rows": 41, "current": 36, "missing": 1}),
    "another row's vector": (
        "UPDATE documents SET embedding = (SELECT d.embedding FROM documents d WHERE id = 2) WHERE id = 1",
        {"current": 35, "wrong": 1}),
    "a ledger row that was removed": (
        "DELETE FROM cdc_embedder.ledger_1 WHERE key_1 = 1", {"current": 35, "missing": 1}),
    "a generation of the past": (
        "UPDATE cdc_embedder.ledger_1 SET generation = 0 WHERE key_1 IN (1, 10)", {"current": 35, "stale": 1}),
    "a row that failed": (
        "UPDATE cdc_embedder.ledger_1 SET state = 'failed', retry_at = now() WHERE key_1 = 1",
        {"current": 35, "failed": 1}),
    "a row that failed with another text": (
        "UPDATE cdc_embedder.ledger_1 SET state = 'failed', fingerprint = '\\x00' WHERE key_1 = 1",
        {"current": 35, "stale": 1}),
    "a row that was deleted": (
        "DELETE FROM documents WHERE id IN (1, 10)", {"rows": 38, "null": 3, "current": 35, "orphaned": 1}),
}  # fmt: skip


@pytest.mark.parametrize(("statement", "found"), PLANTED.values(), ids=PLANTED)
def test_a_difference_is_found_and_called_by_its_name(embedded: Bench, statement: str, found: dict[str, int]) -> None:
    embedded.admin.execute(statement)
    assert differences(embedded) == {"rows": 40, "null": 4} | found


@pytest.mark.parametrize(
    ("statement", "status"),
    [
        ("SELECT", 0),
        ("DELETE FROM documents WHERE id = 1", 0),
        ("UPDATE cdc_embedder.ledger_1 SET state = 'failed' WHERE key_1 = 1", 0),
        ("UPDATE documents SET embedding = NULL WHERE id = 1", 1),
        ("UPDATE documents SET body = 'another text' WHERE id = 1", 1),
        ("DELETE FROM cdc_embedder.ledger_1 WHERE key_1 = 1", 1),
        ("UPDATE documents SET embedding = (SELECT d.embedding FROM documents d WHERE id = 2) WHERE id = 1", 1),
    ],
)
def test_the_exit_status_says_whether_a_vector_is_missing_stale_or_wrong(
    embedded: Bench, statement: str, status: int
) -> None:
    embedded.admin.execute(statement)  # type: ignore[arg-type]
    done = asked(embedded, "verify", "--json", CDC_EMBEDDER_DSN=embedded.dsn_service)
    assert (done.returncode, done.stderr) == (status, "")
    [report] = json.loads(done.stdout)
    assert list(report) == KEYS
    assert report == reports(embedded)[0]


def forge(bench: Bench, row: int, change: str) -> None:
    """Change a vector, and have the ledger vouch for it: only the model can tell."""
    kind = "vector(8)" if bench.has_vector else "real[]"
    bench.admin.execute(
        f"UPDATE documents SET embedding = (SELECT array_agg({change} ORDER BY n) FROM"
        f" unnest(embedding::real[]) WITH ORDINALITY AS u(x, n))::real[]::{kind} WHERE id = %s",  # type: ignore[arg-type]
        (row,),
    )
    bench.admin.execute(
        "UPDATE cdc_embedder.ledger_1 SET vector_digest = (SELECT hash_array_extended(embedding::real[], 0)"
        " FROM documents WHERE id = key_1) WHERE key_1 = %s",
        (row,),
    )


def test_every_vector_is_recomputed_whatever_the_ledger_says(embedded: Bench) -> None:
    forge(embedded, 1, "-x")
    forge(embedded, 2, "x")
    forge(embedded, 3, "x * 1.00001")
    forge(embedded, 4, "x + CASE n WHEN 1 THEN 0.02 ELSE 0 END")
    assert differences(embedded) == {"rows": 40, "null": 4, "current": 34, "wrong": 2}


def test_an_array_of_another_shape_is_wrong_though_the_ledger_vouches_for_it(bench18: Bench) -> None:
    make_documents(bench18, target="real[]")
    embed_all(bench18)
    for row, shape in enumerate(("{1,0}", "{1,0,0,0,0,0,0,NULL}", "{{1,0},{0,1},{0,0},{0,0}}", "{}"), start=1):
        bench18.admin.execute("UPDATE documents SET embedding = %s WHERE id = %s", (shape, row))
    bench18.admin.execute(
        "UPDATE cdc_embedder.ledger_1 SET vector_digest = hash_array_extended(embedding, 0)"
        "  FROM documents WHERE id = key_1 AND id <= 4"
    )
    assert differences(bench18) == {"rows": 40, "null": 4, "current": 32, "wrong": 4}


def test_a_text_that_the_model_refuses_now_is_wrong(embedded: Bench) -> None:
    """Its fingerprint is forged too: the ledger says that it was embedded."""
    embedded.admin.execute("UPDATE documents SET body = 'refused' WHERE id = 1")
    embedded.admin.execute(
        "UPDATE cdc_embedder.ledger_1 SET fingerprint = sha256('\\x01'::bytea || 'refused'::bytea) WHERE key_1 = 1"
    )
    assert differences(embedded) == {"rows": 40, "null": 4, "current": 35, "wrong": 1}


def test_a_sample_recomputes_so_many_rows_and_compares_the_others_with_the_ledger(embedded: Bench) -> None:
    for row in range(1, 41):
        if row % 10:
            forge(embedded, row, "-x")
    embedded.admin.execute("UPDATE documents SET embedding = NULL WHERE id = 1")
    assert differences(embedded, sample=5) == {"rows": 40, "null": 4, "current": 30, "missing": 1, "wrong": 5}
    assert differences(embedded, sample=1000) == {"rows": 40, "null": 4, "missing": 1, "wrong": 35}
    assert differences(embedded) == {"rows": 40, "null": 4, "missing": 1, "wrong": 35}


def test_verify_changes_nothing(embedded: Bench) -> None:
    state = (
        "SELECT (SELECT array_agg(d ORDER BY id)::text FROM documents d),"
        " (SELECT array_agg(l ORDER BY key_1)::text FROM cdc_embedder.ledger_1 l)"
    )
    embedded.admin.execute(
        "UPDATE documents SET body = 'another text' WHERE id = 1; DELETE FROM documents WHERE id = 2"
    )
    before = embedded.admin.execute(state).fetchone()
    assert differences(embedded)["stale"] == 1
    assert embedded.admin.execute(state).fetchone() == before


def test_a_real_models_vectors_are_found_again_in_batches_of_another_shape(bench18: Bench) -> None:
    bench18.admin.execute("CREATE TABLE documents (id int PRIMARY KEY, body text, embedding vector(384))")
    bench18.grant("documents", ["id"], ["body"], "embedding")
    bench18.admin.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
        " VALUES ('documents', '{body}', 'embedding', 'all-MiniLM-L6-v2')"
    )
    with running(bench18, HF_HUB_OFFLINE="1") as service:
        for part in range(4):
            bench18.admin.execute(
                "INSERT INTO documents SELECT n, repeat('a text about number ' || n || ', ', n)"
                "  FROM generate_series(1 + 15 * %s, 15 + 15 * %s) n",
                (part, part),
            )
            wait_caught_up(bench18)
        assert service.stop() == 0
    assert differences(bench18) == {"rows": 60, "current": 60}
    bench18.admin.execute("UPDATE cdc_embedder.model SET document_prompt = 'passage: ' WHERE name = 'all-MiniLM-L6-v2'")
    assert differences(bench18) == {"rows": 60, "stale": 60}
    bench18.admin.execute("UPDATE cdc_embedder.ledger_1 SET generation = 2")
    assert differences(bench18, sample=20) == {"rows": 60, "current": 40, "wrong": 20}


def test_columns_are_verified_by_name_or_all_in_order(bench18: Bench) -> None:
    make_documents(bench18)
    make_documents(bench18, table='"Other ""docs"" %s"', rows=3)
    found = asked(bench18, "verify", "--json")
    assert found.returncode == 1
    assert [(row["id"], row["missing"]) for row in json.loads(found.stdout)] == [(1, 36), (2, 3)]
    named = asked(bench18, "verify", "--json", '"Other ""docs"" %s".embedding')
    assert [(row["id"], row["rows"]) for row in json.loads(named.stdout)] == [(2, 3)]
    shown = asked(bench18, "verify").stdout.splitlines()
    assert shown[0].split() == ["column", *KEYS[3:]]
    assert shown[1].split() == ["public.documents.embedding", "40", "4", "0", "36", "0", "36", "0", "0", "0"]
    assert "is not a configured column" in fails(bench18, "verify", "documents.body")
    assert "not of the form" in fails(bench18, "verify", "documents")


def test_keys_of_several_columns_and_several_pages_are_verified_row_by_row(bench18: Bench) -> None:
    """256 of these texts are more than one statement brings."""
    bench18.admin.execute("INSERT INTO cdc_embedder.model (name, backend, dimensions) VALUES ('fake', 'fake', 8)")
    bench18.admin.execute(
        'CREATE TABLE documents ("Part" text, n numeric(9, 2), title varchar(20), body text, embedding real[],'
        ' PRIMARY KEY ("Part", n)) PARTITION BY LIST ("Part")'
    )
    for part in ("a", "b"):
        bench18.admin.execute(f"CREATE TABLE documents_{part} PARTITION OF documents FOR VALUES IN ('{part}')")
        bench18.admin.execute(
            "INSERT INTO documents SELECT %s, n, 'title ' || n, repeat('text ', 14500) || n"
            "  FROM generate_series(1, 600) n",
            (part,),
        )
    bench18.grant("documents", ["Part", "n"], ["title", "body"], "embedding")
    bench18.admin.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
        " VALUES ('documents', '{title,body}', 'embedding', 'fake')"
    )
    embed_all(bench18)
    assert differences(bench18) == {"rows": 1200, "current": 1200}
    bench18.admin.execute("UPDATE documents SET embedding = NULL WHERE n = 600")
    bench18.admin.execute("DELETE FROM documents WHERE n BETWEEN 350 AND 549")
    assert differences(bench18) == {"rows": 800, "current": 798, "missing": 2, "orphaned": 400}


def test_a_column_that_cannot_be_verified_is_told_with_the_reason(bench18: Bench) -> None:
    make_documents(bench18)
    bench18.admin.execute("ALTER TABLE documents DROP body")
    assert "documents.embedding cannot be verified: a source column was dropped" in fails(bench18, "verify")


def test_a_right_that_is_missing_is_told(bench18: Bench) -> None:
    make_documents(bench18)
    bench18.admin.execute(
        "REVOKE ALL ON documents FROM cdc_service; REVOKE SELECT (body) ON documents FROM cdc_service"
    )
    sentence = fails(bench18, "verify", CDC_EMBEDDER_DSN=bench18.dsn_service)
    assert "permission denied for table documents" in sentence


def test_a_column_that_cannot_be_verified_is_in_the_way_of_no_other(bench18: Bench) -> None:
    for table in ("dropped", "denied", "documents"):
        make_documents(bench18, table=table)
    bench18.admin.execute("DROP TABLE dropped")
    bench18.admin.execute("REVOKE ALL ON denied FROM cdc_service; REVOKE SELECT (body) ON denied FROM cdc_service")
    done = asked(bench18, "verify", "--json", CDC_EMBEDDER_DSN=bench18.dsn_service)
    assert done.returncode == 1
    found = {report["source_table"]: report for report in json.loads(done.stdout)}
    assert list(found) == ["public.dropped", "public.denied", "public.documents"]
    assert list(found["public.documents"]) == KEYS
    assert found["public.documents"]["missing"] == 36
    for table, reason in {"dropped": "the table public.dropped was dropped", "denied": "permission denied"}.items():
        assert list(found[f"public.{table}"]) == [*KEYS, "error"]
        assert reason in found[f"public.{table}"]["error"]
        assert {found[f"public.{table}"][name] for name in KEYS[3:]} == {None}
        assert f"cdc-embedder: public.{table}.embedding cannot be verified: " in done.stderr
    shown = asked(bench18, "verify", CDC_EMBEDDER_DSN=bench18.dsn_service)
    assert shown.returncode == 1
    assert [line.split()[0] for line in shown.stdout.splitlines()] == ["column", "public.documents.embedding"]
    assert "was dropped" in fails(bench18, "verify", "dropped.embedding")


def test_where_there_is_no_terminal_nothing_is_cut_off(bench18: Bench) -> None:
    """80 columns are what is assumed of a pipe."""
    name = "a_table_of_a_name_that_is_quite_long"
    make_documents(bench18, table=name)
    bench18.admin.execute("UPDATE cdc_embedder.model SET options = '{\"reject\": \"text\"}' WHERE name = 'fake'")
    for command in ("verify", "failed"):
        if command == "failed":
            with running(bench18) as service:
                until(lambda: answers(bench18, "failed"), "no row failed", lambda: service.log)
                assert service.stop() == 0
        lines = asked(bench18, command, COLUMNS="").stdout.splitlines()
        assert f"public.{name}.embedding" in [line.split()[0] for line in lines]
        assert len(lines) == (2 if command == "verify" else 37)


def test_names_are_shown_as_commands_take_them(bench18: Bench) -> None:
    make_documents(bench18, table='"Odd Name"')
    bench18.admin.execute('ALTER TABLE "Odd Name" RENAME embedding TO "Vec Tor"')
    bench18.admin.execute("UPDATE cdc_embedder.embedding_column SET target_column = 'Vec Tor'")
    name = 'public."Odd Name"."Vec Tor"'
    for command in ("status", "verify"):
        assert name in asked(bench18, command).stdout
    assert asked(bench18, "verify", name).stdout == asked(bench18, "verify").stdout


def test_a_column_that_its_operator_paused_is_not_waited_for(bench18: Bench) -> None:
    for table in ("documents", "dropped"):
        make_documents(bench18, table=table)
    bench18.admin.execute("SELECT cdc_embedder.pause('documents')")
    bench18.admin.execute("DROP TABLE dropped")
    told: list[str] = []
    with session(bench18.dsn_service, "verify", "verifying") as connection:
        wait_for_pending(connection, [1, 2], standstill=0.0, tell=told.append)
    assert told == []
    assert "paused: paused" not in asked(bench18, "status").stdout


def test_what_is_waited_for_is_told_when_it_changes(bench18: Bench) -> None:
    make_documents(bench18)
    told: list[str] = []
    with (
        session(bench18.dsn_service, "verify", "verifying") as connection,
        pytest.raises(Misconfigured, match="is not waited for, it is stopped"),
    ):
        wait_for_pending(connection, [1], standstill=0.5, tell=told.append)
    assert told == ["waiting for public.documents.embedding"]


def waited(bench: Bench) -> dict[str, int]:
    """What is found after waiting; nothing is wrong."""
    [report] = answers(bench, "verify", "--wait", "documents.embedding", CDC_EMBEDDER_DSN=bench.dsn_service)
    assert report["pending"] == 0
    return {name: report[name] for name in KEYS[3:] if report[name]}


def test_wait_returns_when_what_was_committed_is_embedded(bench: Bench) -> None:
    """A model that takes a second leaves the time to see rows that are not done: changed ones, then scanned ones."""
    make_documents(bench, rows=300)
    with running(bench) as service:
        assert waited(bench) == {"rows": 300, "null": 30, "current": 270}
        bench.admin.execute("""UPDATE cdc_embedder.model SET options = '{"reject": "refused", "delay_s": 1}'""")
        bench.admin.execute("UPDATE documents SET body = 'changed ' || id WHERE id <= 5")
        assert waited(bench) == {"rows": 300, "null": 30, "current": 270}
        bench.admin.execute("UPDATE cdc_embedder.ledger_1 SET fingerprint = '\\x00' WHERE key_1 <= 5")
        with session(bench.dsn_service, "verify", "verifying") as connection:
            bench.admin.execute("SELECT cdc_embedder.reconcile('documents')")
            wait_for_pending(connection, [1])
        assert differences(bench) == {"rows": 300, "null": 30, "current": 270}
        assert service.stop() == 0


def test_a_lock_of_a_stranger_s_does_not_keep_it_waiting(bench18: Bench) -> None:
    make_documents(bench18, rows=10)
    with running(bench18) as service, psycopg.connect(bench18.dsn_admin, autocommit=True) as stranger:
        stranger.execute("SELECT pg_advisory_lock(1667523429, 2)")
        assert waited(bench18) == {"rows": 10, "null": 1, "current": 9}
        assert service.stop() == 0


def test_a_column_that_stands_still_is_not_waited_for(bench18: Bench) -> None:
    make_documents(bench18)
    with (
        session(bench18.dsn_service, "verify", "verifying") as connection,
        pytest.raises(Misconfigured, match=f"it is stopped: no service runs for slot {bench18.slot}"),
    ):
        wait_for_pending(connection, [1], standstill=0.5)


@pytest.mark.parametrize(
    ("kind", "dtype", "engine", "least"),
    [
        ("vector(8)", "auto", "packed on cpu, float32", LEAST_COSINE),
        ("vector(8)", "auto", "packed on cuda:0, bfloat16", LEAST_COSINE_HALF),
        ("vector(8)", "auto", "2 workers: padded on cuda:0+cuda:1, float16", LEAST_COSINE_HALF),
        ("real[]", "float32", "", LEAST_COSINE),
        ("halfvec(8)", "auto", "", LEAST_COSINE_HALF),
        ("vector(8)", "bfloat16", "", LEAST_COSINE_HALF),
        ("double precision[]", "float16", "", LEAST_COSINE_HALF),
    ],
)
def test_half_precision_is_judged_by_its_own_measure(
    bench18: Bench, kind: str, dtype: str, engine: str, least: float
) -> None:
    make_documents(bench18, target=kind)
    bench18.admin.execute("UPDATE cdc_embedder.model SET dtype = %s WHERE name = 'fake'", (dtype,))

    async def columns() -> list[EmbeddingColumn]:
        async with await connect(bench18.dsn_service, "test") as connection:
            return await load(connection, bench18.slot)

    [column] = asyncio.run(columns())
    assert least_cosine(column, engine) == least


def test_a_bar_is_drawn_on_a_terminal_and_nowhere_else() -> None:
    shown = {}
    for terminal in (True, False):
        console = Console(file=StringIO(), force_terminal=terminal, width=100)
        with progress_bar(console) as advance:
            advance("public.documents.embedding", 5, 10)
        assert isinstance(console.file, StringIO)
        shown[terminal] = console.file.getvalue()
    assert "public.documents.embedding" in shown[True]
    assert "50%" in shown[True]
    assert shown[False] == ""


def test_a_sample_is_drawn_from_all_keys_alike() -> None:
    keys = [(str(n),) for n in range(1000)]
    drawn: set[tuple[str, ...]] = set()
    for _ in range(200):
        sample = Sample(50)
        sample.offer(keys[:10])
        sample.offer(keys[10:])
        assert len(set(sample.drawn)) == 50
        drawn |= set(sample.drawn)
    assert len(drawn) > 990
    few = Sample(50)
    few.offer(keys[:20])
    assert few.drawn == keys[:20]
