"""The three statements on a user's table, one by one; each rule they keep is broken from outside."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import psycopg
import pytest
import pytest_asyncio

from cdc_embedder import catalog
from cdc_embedder.catalog import EmbeddingColumn
from cdc_embedder.rows import requests, scan
from cdc_embedder.rows.fetch import TEXT_BYTES, Fetch, Row, Verdict
from cdc_embedder.rows.session import Connection, connect
from cdc_embedder.rows.writeback import CHANGED_BY_TRIGGER, REFUSED_BY_TRIGGER, Term, Write, WriteBack
from tests.servers import SERVICE_ROLE, Bench

pytestmark = pytest.mark.asyncio

DIMENSIONS = 4


@pytest_asyncio.fixture
async def session(bench: Bench) -> AsyncIterator[Connection]:
    """A pinned session of the service's role."""
    connection = await connect(bench.dsn_service, "test")
    yield connection
    await connection.close()


def documents(bench: Bench, *texts: str | None, target: str = "real[]") -> None:
    bench.admin.execute(f"CREATE TABLE documents (id int PRIMARY KEY, body text, embedding {target})")
    bench.grant("documents", ["id"], ["body"], "embedding")
    for n, text in enumerate(texts):
        bench.admin.execute("INSERT INTO documents VALUES (%s, %s)", (n, text))
    configure(bench, "documents", "{body}", "embedding")


def configure(bench: Bench, table: str, sources: str, target: str) -> None:
    bench.admin.execute(
        "INSERT INTO cdc_embedder.model (name, backend, dimensions) VALUES ('fake', 'fake', %s) ON CONFLICT DO NOTHING",
        (DIMENSIONS,),
    )
    bench.admin.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
        " VALUES (%s, %s, %s, 'fake')",
        (table, sources, target),
    )


async def configured(session: Connection, bench: Bench) -> EmbeddingColumn:
    [column] = await catalog.load(session, bench.slot)
    assert column.fault is None
    return column


async def judged(session: Connection, column: EmbeddingColumn, *keys: str) -> list[Row]:
    return [row for _, row in await Fetch(session, column).rows([(key,) for key in keys])]


def vectors(count: int) -> Any:
    out = np.random.default_rng(7).standard_normal((count, DIMENSIONS)).astype(np.float32)
    return out / np.linalg.norm(out, axis=1, keepdims=True)


async def term(session: Connection) -> Term:
    return Term("test", await requests.take_term(session, "test", "a test"))


async def write(session: Connection, column: EmbeddingColumn, rows: dict[str, Row], **how: Any) -> tuple[set[int], Any]:
    """Write a vector for each key, as if it had just been embedded from `rows`."""
    writes = [Write((key,), row.fingerprint or b"", **({"has_vector": True} | how)) for key, row in rows.items()]
    made = vectors(len(writes))
    return await WriteBack(session, column, await term(session)).write(writes, made), made


def stored(bench: Bench, key: int = 0) -> Any:
    return bench.admin.execute("SELECT embedding::real[] FROM documents WHERE id = %s", (key,)).fetchone()[0]  # type: ignore[index]


def ledger(bench: Bench) -> dict[int, tuple[Any, ...]]:
    found = bench.admin.execute("SELECT key_1, state, attempts, error FROM cdc_embedder.ledger_1").fetchall()
    return {key: tuple(rest) for key, *rest in found}


async def test_a_row_is_work_until_it_is_written_and_done_afterwards(bench: Bench, session: Connection) -> None:
    documents(bench, "one", None, "")
    column = await configured(session, bench)
    rows = await judged(session, column, "0", "1", "2", "999")
    assert [row.verdict for row in rows] == [Verdict.EMBED, Verdict.DONE, Verdict.EMBED, Verdict.DONE]
    assert [row.text for row in rows] == [b"one", None, b"", None]
    done, made = await write(session, column, {"0": rows[0], "2": rows[2]})
    assert done == {0, 1}
    assert stored(bench, 0) == pytest.approx(made[0].tolist())
    assert stored(bench, 2) == pytest.approx(made[1].tolist())
    assert [row.verdict for row in await judged(session, column, "0", "1", "2")] == [Verdict.DONE] * 3


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE documents SET body = 'other'",
        "UPDATE documents SET body = ''",
        "UPDATE documents SET embedding = NULL",
        "UPDATE documents SET embedding = '{1,0,0,0}'",
        "UPDATE cdc_embedder.embedding_column SET separator = 'x'",
        "UPDATE cdc_embedder.model SET document_prompt = 'passage: '",
        "DELETE FROM cdc_embedder.ledger_1",
    ],
)
async def test_rule_6_anything_that_differs_from_the_ledger_is_work(
    bench: Bench, session: Connection, change: str
) -> None:
    documents(bench, "one")
    column = await configured(session, bench)
    await write(session, column, {"0": (await judged(session, column, "0"))[0]})
    assert [row.verdict for row in await judged(session, column, "0")] == [Verdict.DONE]
    bench.admin.execute(change)
    column = await configured(session, bench)
    assert [row.verdict for row in await judged(session, column, "0")] == [Verdict.EMBED]


async def test_rule_6_null_in_null_out_without_a_ledger_row_for_what_never_had_a_text(
    bench: Bench, session: Connection
) -> None:
    documents(bench, "one", None)
    column = await configured(session, bench)
    await write(session, column, {"0": (await judged(session, column, "0"))[0]})
    bench.admin.execute("UPDATE documents SET body = NULL")
    [row, never] = await judged(session, column, "0", "1")
    assert (row.verdict, never.verdict) == (Verdict.CLEAR, Verdict.DONE)
    await write(session, column, {"0": row}, has_vector=False)
    assert stored(bench) is None
    assert [row.verdict for row in await judged(session, column, "0", "1")] == [Verdict.DONE] * 2
    assert set(ledger(bench)) == {0}


async def test_rule_4_a_text_that_changed_while_it_was_embedded_is_not_written(
    bench: Bench, session: Connection
) -> None:
    documents(bench, "one", "two")
    column = await configured(session, bench)
    rows = await judged(session, column, "0", "1")
    bench.admin.execute("UPDATE documents SET body = 'changed' WHERE id = 0")
    done, _ = await write(session, column, {"0": rows[0], "1": rows[1]})
    assert done == {1}
    assert stored(bench, 0) is None
    assert set(ledger(bench)) == {1}


async def test_rule_4_a_row_that_is_changed_while_the_statement_waits_to_see_it_is_not_written(
    bench: Bench, session: Connection
) -> None:
    documents(bench, "HELLO")
    bench.admin.execute("UPDATE documents SET body = 'hello'")  # equal to a case-insensitive collation, other bytes
    column = await configured(session, bench)
    [row] = await judged(session, column, "0")
    bench.admin.execute("UPDATE documents SET body = 'HELLO'")
    assert (await write(session, column, {"0": row}))[0] == set()


async def test_rule_4_nothing_is_written_under_a_generation_that_is_superseded(
    bench: Bench, session: Connection
) -> None:
    documents(bench, "one")
    column = await configured(session, bench)
    [row] = await judged(session, column, "0")
    bench.admin.execute("UPDATE cdc_embedder.model SET document_prompt = 'passage: '")
    assert (await write(session, column, {"0": row}))[0] == set()
    assert stored(bench) is None


async def test_rule_5_a_locked_row_is_passed_over_and_holds_nobody_up(bench: Bench, session: Connection) -> None:
    documents(bench, "one", "two")
    column = await configured(session, bench)
    rows = await judged(session, column, "0", "1")
    with psycopg.connect(bench.dsn_admin) as holder:
        holder.execute("SELECT FROM documents WHERE id = 0 FOR UPDATE")
        done, _ = await write(session, column, {"0": rows[0], "1": rows[1]})
        assert done == {1}
        holder.execute("SELECT FROM documents WHERE id = 1 FOR KEY SHARE")  # a foreign key's lock is no obstacle
        bench.admin.execute("UPDATE documents SET embedding = NULL WHERE id = 1")
        assert (await write(session, column, {"1": rows[1]}))[0] == {0}


async def test_two_spellings_of_one_key_meet_one_row(bench: Bench, session: Connection) -> None:
    bench.admin.execute("CREATE TABLE priced (price numeric PRIMARY KEY, body text, v real[])")
    bench.grant("priced", ["price"], ["body"], "v")
    bench.admin.execute("INSERT INTO priced VALUES (1.00, 'one')")
    configure(bench, "priced", "{body}", "v")
    column = await configured(session, bench)
    rows = await judged(session, column, "1.00", "1.0", "1")
    assert [row.verdict for row in rows] == [Verdict.EMBED] * 3
    done, _ = await write(session, column, dict(zip(("1.00", "1.0", "1"), rows, strict=True)))
    assert len(done) >= 1
    assert [row.verdict for row in await judged(session, column, "1.00", "1.0", "1")] == [Verdict.DONE] * 3


async def test_what_a_trigger_altered_or_refused_is_failed_and_rests(bench: Bench, session: Connection) -> None:
    documents(bench, "one", "two", "three")
    bench.admin.execute(
        "CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF NEW.id = 0 THEN NEW.embedding := '{0,0,0,1}'; END IF;"
        " IF NEW.id = 1 THEN RETURN NULL; END IF; RETURN NEW; END $$;"
        "CREATE TRIGGER meddle BEFORE UPDATE ON documents FOR EACH ROW EXECUTE FUNCTION meddle()"
    )
    column = await configured(session, bench)
    assert column.fires_triggers
    rows = await judged(session, column, "0", "1", "2")
    done, _ = await write(session, column, {"0": rows[0], "1": rows[1], "2": rows[2]})
    assert done == {0, 1, 2}
    assert ledger(bench) == {
        0: ("failed", 1, CHANGED_BY_TRIGGER),
        1: ("failed", 1, REFUSED_BY_TRIGGER),
        2: ("current", 0, None),
    }
    assert [row.verdict for row in await judged(session, column, "0", "1", "2")] == [Verdict.DONE] * 3


async def test_a_session_that_must_fire_no_trigger_writes_nothing_where_one_was_made_meanwhile(
    bench: Bench, session: Connection
) -> None:
    documents(bench, "one")
    column = await configured(session, bench)
    [row] = await judged(session, column, "0")
    marked = WriteBack(session, column, await term(session), without_triggers="OA")
    write = [Write(("0",), row.fingerprint or b"", has_vector=True)]
    bench.admin.execute(
        "CREATE FUNCTION other() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$;"
        "CREATE TRIGGER other AFTER UPDATE ON documents FOR EACH ROW EXECUTE FUNCTION other()"
    )
    assert await marked.write(write, vectors(1)) == set()
    bench.admin.execute("DROP TRIGGER other ON documents")
    assert await marked.write(write, vectors(1)) == {0}


async def test_rule_7_a_failure_keeps_the_old_vector_once_and_clears_it_the_second_time(
    bench: Bench, session: Connection
) -> None:
    documents(bench, "one")
    column = await configured(session, bench)
    [row] = await judged(session, column, "0")
    await write(session, column, {"0": row})
    bench.admin.execute("UPDATE documents SET body = 'poison'")
    old = stored(bench)
    [row] = await judged(session, column, "0")
    assert row.failures == 0
    await write(session, column, {"0": row}, has_vector=False, keep=True, error="refused")
    assert stored(bench) == old
    assert ledger(bench) == {0: ("failed", 1, "refused")}
    assert [row.verdict for row in await judged(session, column, "0")] == [Verdict.DONE]
    bench.admin.execute("UPDATE cdc_embedder.ledger_1 SET retry_at = now() - interval '1 second'")
    assert await scan.due(session, column, 10) == [("0",)]
    [row] = await judged(session, column, "0")
    assert (row.verdict, row.failures) == (Verdict.EMBED, 1)
    await write(session, column, {"0": row}, has_vector=False, error="refused")
    assert stored(bench) is None
    assert ledger(bench) == {0: ("failed", 2, "refused")}
    first = bench.admin.execute("SELECT retry_at > now() + interval '10 s' FROM cdc_embedder.ledger_1").fetchone()
    assert first == (True,)
    bench.admin.execute("UPDATE documents SET body = 'harmless'")
    [row] = await judged(session, column, "0")
    assert (row.verdict, row.failures) == (Verdict.EMBED, 0)
    await write(session, column, {"0": row})
    assert ledger(bench) == {0: ("current", 0, None)}


async def test_texts_beyond_a_batch_are_not_read_yet(bench: Bench, session: Connection) -> None:
    documents(bench, "small", None, None, None)
    bench.admin.execute("UPDATE documents SET body = repeat('x', %s) WHERE id IN (1, 2)", (TEXT_BYTES,))
    bench.admin.execute("UPDATE documents SET body = 'last' WHERE id = 3")
    column = await configured(session, bench)
    rows = await judged(session, column, "0", "1", "2", "3")
    assert [row.verdict for row in rows] == [Verdict.EMBED, Verdict.EMBED, Verdict.LATER, Verdict.LATER]
    assert [len(row.text or b"") for row in rows] == [5, TEXT_BYTES, 0, 0]


@pytest.mark.parametrize("target", ["real[]", "double precision[]"])
async def test_every_kind_of_array_holds_what_was_sent(bench: Bench, session: Connection, target: str) -> None:
    documents(bench, *("text",) * 20, target=target)
    column = await configured(session, bench)
    keys = [str(n) for n in range(20)]
    rows = dict(zip(keys, await judged(session, column, *keys), strict=True))
    done, made = await write(session, column, rows)
    assert done == set(range(20))
    for n in range(20):
        assert stored(bench, n) == pytest.approx(made[n].tolist())
    bounds = bench.admin.execute("SELECT DISTINCT array_dims(embedding) FROM documents").fetchall()
    assert bounds == [(f"[1:{DIMENSIONS}]",)]


@pytest.mark.parametrize("target", ["vector(4)", "halfvec(4)"])
async def test_every_kind_of_pgvector_column_holds_what_was_sent(bench18: Bench, target: str) -> None:
    documents(bench18, *("text",) * 20, target=target)
    session = await connect(bench18.dsn_service, "test")
    column = await configured(session, bench18)
    keys = [str(n) for n in range(20)]
    rows = dict(zip(keys, await judged(session, column, *keys), strict=True))
    done, made = await write(session, column, rows)
    assert done == set(range(20))
    for n in range(20):
        assert stored(bench18, n) == pytest.approx(made[n].tolist(), abs=1e-3)
    assert [row.verdict for row in await judged(session, column, *keys)] == [Verdict.DONE] * 20
    await session.close()


async def test_the_fingerprint_depends_on_no_setting_and_no_collation(bench: Bench, session: Connection) -> None:
    try:
        bench.admin.execute(
            "CREATE COLLATION blind (provider = icu, locale = 'und-u-ks-level1', deterministic = false)"
        )
    except psycopg.errors.FeatureNotSupported:  # the wheel is built without ICU
        bench.admin.execute('CREATE COLLATION blind FROM "C"')
    bench.admin.execute("CREATE TABLE words (id int PRIMARY KEY, a text COLLATE blind, b text, v real[])")
    bench.grant("words", ["id"], ["a", "b"], "v")
    texts = [("HELLO", "x"), ("hello", "x"), ("a|b", "c"), ("a", "b|c"), (None, "x"), ("", "x"), ("x", None), ("x", "")]
    for n, (a, b) in enumerate(texts):
        bench.admin.execute("INSERT INTO words VALUES (%s, %s, %s)", (n, a, b))
    configure(bench, "words", "{a,b}", "v")
    column = await configured(session, bench)
    keys = [str(n) for n in range(len(texts))]
    first = [row.fingerprint for row in await judged(session, column, *keys)]
    assert len(set(first)) == len(texts)
    await session.execute("SET client_encoding = 'LATIN1'; SET bytea_output = 'escape'; SET DateStyle = 'German'")
    assert [row.fingerprint for row in await judged(session, column, *keys)] == first


async def test_a_scan_meets_every_row_once_and_names_those_that_are_not_current(
    bench: Bench, session: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "PAGE", 7)
    bench.admin.execute(
        'CREATE TABLE words (k text COLLATE "C", n int, body text, v real[]);'
        "CREATE UNIQUE INDEX by_pattern ON words (k text_pattern_ops, n);"
        "ALTER TABLE words ALTER k SET NOT NULL, ALTER n SET NOT NULL"
    )
    bench.admin.execute("ALTER TABLE words ADD PRIMARY KEY (k, n)")
    bench.grant("words", ["k", "n"], ["body"], "v")
    bench.admin.execute(
        "INSERT INTO words SELECT chr(65 + n % 3), n, CASE WHEN n % 5 > 0 THEN 'text' END FROM generate_series(1, 40) n"
    )
    configure(bench, "words", "{body}", "v")
    column = await configured(session, bench)
    wanted, rows, null, after = [], 0, 0, None
    while True:
        page = await scan.page(session, column, after)
        wanted += page.wanted
        rows, null, after = rows + page.rows, null + page.null, page.last
        if after is None:
            break
    assert (rows, null) == (40, 8)
    assert len(wanted) == len(set(wanted)) == 32


async def test_a_sweep_removes_exactly_the_ledger_rows_whose_source_is_gone(
    bench: Bench, session: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "PAGE", 3)
    documents(bench, *("text",) * 10)
    column = await configured(session, bench)
    keys = [str(n) for n in range(10)]
    await write(session, column, dict(zip(keys, await judged(session, column, *keys), strict=True)))
    bench.admin.execute("DELETE FROM documents WHERE id IN (2, 3, 9)")
    after, removed = None, 0
    while True:
        after, count = await scan.sweep(session, column, after)
        removed += count
        if after is None:
            break
    assert removed == 3
    assert set(ledger(bench)) == {0, 1, 4, 5, 6, 7, 8}


async def test_the_role_needs_no_more_than_the_columns_it_was_granted(bench: Bench, session: Connection) -> None:
    documents(bench, "one")
    bench.admin.execute("ALTER TABLE documents ADD secret text DEFAULT 'secret'")
    allowed = bench.admin.execute(
        "SELECT has_column_privilege(%s, 'documents', 'secret', 'SELECT'),"
        " has_table_privilege(%s, 'documents', 'SELECT')",
        (SERVICE_ROLE, SERVICE_ROLE),
    ).fetchone()
    assert allowed == (False, False)
    column = await configured(session, bench)
    await write(session, column, {"0": (await judged(session, column, "0"))[0]})
    assert (await scan.page(session, column, None)).current == 1
