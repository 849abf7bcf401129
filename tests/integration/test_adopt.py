"""Vectors that are there already are taken over where the user says so: no model call for those that may be."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from cdc_embedder.catalog import load
from cdc_embedder.embedding.fake import fake_vector
from cdc_embedder.rows import adoption
from cdc_embedder.rows.session import connect
from cdc_embedder.rows.writeback import Term
from tests.commands import answers, fails, succeeds
from tests.configuring import DOCUMENTS, configure, one
from tests.embedding_api import Server, api
from tests.servers import SERVICE_ROLE, Bench
from tests.service import assert_every_vector_is_of_its_text, running, status, until, wait_caught_up


def make_api_model(bench: Bench, server: Server, **more: Any) -> None:
    options = {"base_url": f"http://127.0.0.1:{server.server_port}/v1", "max_batch_rows": 1000}
    row = {"name": "api", "backend": "openai", "source": "m", "dimensions": 8, "options": Jsonb(options)} | more
    bench.admin.execute(
        f"INSERT INTO cdc_embedder.model ({', '.join(row)}) VALUES ({', '.join(['%s'] * len(row))})",  # type: ignore[arg-type]
        list(row.values()),
    )


def vector_of(text: str, model: str = "api") -> list[float]:
    return [float(x) for x in fake_vector(model, text, 8)]


def make_vectors(bench: Bench, kind: str, rows: int, *, parts: bool = False) -> None:
    """`documents` (a composite key) with `rows` texts, every thousandth NULL, and the vectors that the model gives."""
    bench.admin.execute(
        f"CREATE TABLE documents (part int, id bigint, body text, views int DEFAULT 0, embedding {kind},"  # type: ignore[arg-type]
        f" PRIMARY KEY (part, id)) {'PARTITION BY LIST (part)' if parts else ''}"
    )
    if parts:
        for part in (0, 1):
            bench.admin.execute(f"CREATE TABLE documents_{part} PARTITION OF documents FOR VALUES IN ({part})")  # type: ignore[arg-type]
    bench.grant("documents", ["part", "id"], ["body"], "embedding")
    bench.admin.execute(f"GRANT SELECT (xmin) ON documents TO {SERVICE_ROLE}")  # type: ignore[arg-type]
    with bench.admin.cursor() as cursor, cursor.copy("COPY documents (part, id, body, embedding) FROM STDIN") as copy:
        for n in range(1, rows + 1):
            text = None if n % 1000 == 0 else f"text {n}"
            vector = str([round(x, 9) for x in vector_of(text or "")])
            copy.write_row((n % 2, n, text, "{" + vector[1:-1] + "}" if kind.endswith("[]") else vector))
    settle(bench)


def settle(bench: Bench) -> None:
    """Until every transaction so far has ended, by the account that configuring a column takes of them."""
    [now] = bench.admin.execute("SELECT pg_current_xact_id()::text::bigint").fetchone() or [0]
    until(
        lambda: one(bench.admin, "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint") > now,
        "an older transaction never ended",
    )


def configure_documents(bench: Bench, on_existing: str = "adopt") -> int:
    return configure(bench.admin, model="api", on_existing=on_existing)


def spoil(bench: Bench, kind: str) -> set[int]:
    """Ten rows lose their vectors, five (arrays: eight) hold what could not have been written back; which."""
    bench.admin.execute("UPDATE documents SET embedding = NULL WHERE id BETWEEN 11 AND 20")
    wrong = {21: [0.5] * 8, 22: [0.0] * 8, 23: [1.0] + [0.1] * 7, 24: [2.0] + [0.0] * 7, 25: [1e-30] * 8}
    forms = {id: ("{" + str(v)[1:-1] + "}" if kind.endswith("[]") else str(v)) for id, v in wrong.items()}
    if kind.endswith("[]"):
        forms |= {26: "{1,0,0}", 27: "{}", 28: "{1,0,0,0,0,0,0,NULL}", 29: "{1,0,0,0,0,0,0,NaN}"}
        forms |= {30: "{{1,0,0,0},{0,0,0,0}}", 31: "{Infinity,0,0,0,0,0,0,0}", 32: "{1,0,0,0,0,0,0,0,0}"}
    if kind.startswith("double"):
        forms |= {33: "{1e300,0,0,0,0,0,0,0}", 34: "{1e-300,0,0,0,0,0,0,0}"}
    for id, form in forms.items():
        bench.admin.execute("UPDATE documents SET embedding = %s WHERE id = %s", (form, id))
    settle(bench)
    return set(range(11, 21)) | set(forms)


def stored(bench: Bench) -> dict[int, str]:
    return dict(bench.admin.execute("SELECT id, embedding::text FROM documents").fetchall())


@pytest.mark.parametrize(
    ("kind", "parts", "rows"),
    [
        ("vector(8)", False, 5015),
        ("halfvec(8)", True, 1100),
        ("real[]", True, 1100),
        ("double precision[]", False, 1100),
    ],
)
def test_what_may_be_stored_is_adopted_and_the_rest_embedded(bench18: Bench, kind: str, parts: bool, rows: int) -> None:
    with api() as server:
        make_api_model(bench18, server)
        make_vectors(bench18, kind, rows, parts=parts)
        spoiled = spoil(bench18, kind)
        before = stored(bench18)
        configure_documents(bench18)
        with running(bench18, OPENAI_API_KEY="x") as service:
            wait_caught_up(bench18)
            assert sorted(server.texts) == sorted(f"text {id}" for id in spoiled)
            assert assert_every_vector_is_of_its_text(bench18, model="api") == rows
            after = stored(bench18)
            assert {id for id in before if before[id] != after[id]} == spoiled | set(range(1000, rows, 1000))
            server.texts.clear()
            bench18.admin.execute("UPDATE documents SET body = 'changed' WHERE id = 7")
            bench18.admin.execute("UPDATE documents SET views = 1 WHERE id = 8")
            wait_caught_up(bench18)
            assert server.texts == ["changed"]
            assert service.stop() == 0
        assert assert_every_vector_is_of_its_text(bench18, model="api") == rows
        server.texts.clear()
        [report] = answers(bench18, "verify", OPENAI_API_KEY="x")
        assert (report["rows"], report["null"], report["current"]) == (rows, rows // 1000, rows - rows // 1000)
        assert len(server.texts) == report["current"], "verify recomputes adopted vectors as it does others"


def test_a_row_that_was_written_since_the_column_was_configured_is_embedded(bench: Bench) -> None:
    """Its vector is its text's no more, if nobody keeps it so: whether a stream told of the change or not."""
    kind = "vector(8)" if bench.has_vector else "real[]"
    with api() as server, psycopg.connect(bench.dsn_admin) as open_then:
        make_api_model(bench, server)
        make_vectors(bench, kind, 60)
        open_then.execute("CREATE TABLE other (id int)")  # assigns the transaction
        configure_documents(bench)
        bench.admin.execute("UPDATE documents SET body = 'changed before the service came' WHERE id = 5")
        open_then.execute("UPDATE documents SET body = 'changed by an older transaction' WHERE id = 6")
        open_then.commit()
        bench.admin.execute(
            "INSERT INTO documents SELECT 0, 62, 'inserted with another vector', 0, d.embedding"
            "  FROM documents d WHERE d.id = 1"
        )
        with running(bench, OPENAI_API_KEY="x"):
            wait_caught_up(bench)
            assert sorted(server.texts) == [
                "changed before the service came", "changed by an older transaction", "inserted with another vector",
            ]  # fmt: skip
            assert assert_every_vector_is_of_its_text(bench, model="api") == 61


def test_adopting_goes_on_after_a_kill(bench18: Bench) -> None:
    killing = {
        "CDC_TEST_SET": "cdc_embedder.rows.scan.PAGE=50 cdc_embedder.scanning.CHECKPOINT_SECONDS=0.02",
        "CDC_TEST_KILL_AT": "scanned",
        "CDC_TEST_KILL_AFTER": "6",
    }
    with api() as server:
        make_api_model(bench18, server)
        make_vectors(bench18, "vector(8)", 1000)
        configure_documents(bench18)
        before = stored(bench18)
        with running(bench18, module="tests.faults.failing", OPENAI_API_KEY="x", **killing) as killed:
            until(lambda: killed.exit_status is not None, "never killed", lambda: killed.log)
        assert one(bench18.admin, "SELECT count(*) FROM cdc_embedder.ledger_1") == 300
        with running(bench18, OPENAI_API_KEY="x"):
            wait_caught_up(bench18)
            assert server.texts == []
            assert one(bench18.admin, "SELECT count(*) FROM cdc_embedder.ledger_1 WHERE state = 'current'") == 1000
        assert {id for id, vector in stored(bench18).items() if vector != before[id]} == {1000}


def test_adopting_is_over_with_the_first_scan(bench18: Bench) -> None:
    with api() as server:
        make_api_model(bench18, server)
        make_vectors(bench18, "vector(8)", 40)
        configure_documents(bench18)
        assert one(bench18.admin, "SELECT adopting FROM cdc_embedder.generation")
        with running(bench18, OPENAI_API_KEY="x") as service:
            wait_caught_up(bench18)
            assert server.texts == []
            assert not one(bench18.admin, "SELECT adopting FROM cdc_embedder.generation")
            assert service.stop() == 0
            bench18.admin.execute("DELETE FROM cdc_embedder.ledger_1 WHERE key_2 = 3")
            bench18.admin.execute("SELECT cdc_embedder.reconcile()")
            service.start()
            until(lambda: server.texts == ["text 3"], "a row without a ledger row is embedded", lambda: service.log)
            wait_caught_up(bench18)
            bench18.admin.execute("UPDATE cdc_embedder.embedding_column SET on_existing = 'ask'")
            with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="first scan of the column is over"):
                bench18.admin.execute("UPDATE cdc_embedder.embedding_column SET on_existing = 'adopt'")
            server.texts.clear()
            bench18.admin.execute("UPDATE cdc_embedder.model SET document_prompt = 'passage: ' WHERE name = 'api'")
            until(lambda: len(server.texts) == 40, "another generation is embedded as a whole", lambda: service.log)
            assert set(server.texts) == {f"passage: text {n}" for n in range(1, 41)}


def test_what_is_said_of_one_generation_is_not_said_of_the_next(installed: Bench) -> None:
    admin = installed.admin
    admin.execute("INSERT INTO cdc_embedder.model (name, backend, dimensions) VALUES ('tiny', 'fake', 4)")
    admin.execute(DOCUMENTS)

    def adopting() -> list[tuple[int, bool]]:
        return admin.execute("SELECT generation, adopting FROM cdc_embedder.generation ORDER BY 1").fetchall()

    configure(admin, on_existing="adopt")
    assert adopting() == [(1, True)]
    admin.execute("UPDATE cdc_embedder.model SET document_prompt = 'x' WHERE name = 'tiny'")
    assert adopting() == [(1, True), (2, False)]
    admin.execute("UPDATE cdc_embedder.embedding_column SET on_existing = 'replace'")
    admin.execute("UPDATE cdc_embedder.embedding_column SET on_existing = 'adopt', separator = ' '")
    assert adopting() == [(1, False), (2, False), (3, True)]
    configured = one(admin, "SELECT adoptable_before::text FROM cdc_embedder.scan")
    admin.execute("ALTER TABLE documents RENAME TO documents_old;" + DOCUMENTS)
    admin.execute("SELECT cdc_embedder.resume('documents')")
    assert adopting() == [(1, False), (2, False), (3, False)]
    assert one(admin, "SELECT adoptable_before::text FROM cdc_embedder.scan") > configured


def test_nothing_is_adopted_for_a_term_a_generation_or_a_time_that_is_past(bench18: Bench) -> None:
    bench18.admin.execute("INSERT INTO cdc_embedder.model (name, backend, dimensions) VALUES ('api', 'fake', 8)")
    make_vectors(bench18, "vector(8)", 10)
    configure_documents(bench18)
    bench18.admin.execute("INSERT INTO cdc_embedder.leader (slot, term, service) VALUES (%s, 7, 'me')", (bench18.slot,))

    async def adopted(term: int) -> int:
        async with await connect(bench18.dsn_service, "test") as connection:
            [column] = await load(connection, bench18.slot)
            found = await adoption.page(connection, column, Term(bench18.slot, term), None)
        bench18.admin.execute("TRUNCATE cdc_embedder.ledger_1")
        return found

    def found(term: int = 7) -> int:
        return asyncio.run(adopted(term))

    assert found() == 10
    assert found(term=6) == 0
    assert one(bench18.admin, "SELECT pg_current_xact_id()::text::int8 < 4294967296"), "no epoch has passed here"
    since = {
        "pg_snapshot_xmin(pg_current_snapshot())": 10,
        "'3'::xid8": 0,  # every row was written since
        "NULL": 0,
    }
    for before, rows in since.items():
        bench18.admin.execute(f"UPDATE cdc_embedder.scan SET adoptable_before = {before}")  # type: ignore[arg-type]
        assert found() == rows, before
    bench18.admin.execute("UPDATE cdc_embedder.scan SET adoptable_before = DEFAULT")
    bench18.admin.execute("INSERT INTO cdc_embedder.ledger_1 SELECT part, id, '', 1, 0, 'failed' FROM documents")
    assert found() == 0, "what the ledger knows of is not taken over"
    bench18.admin.execute("UPDATE cdc_embedder.generation SET superseded_at = now()")
    assert found() == 0


def test_the_right_that_is_missing_is_told(bench18: Bench) -> None:
    with api() as server:
        make_api_model(bench18, server)
        make_vectors(bench18, "vector(8)", 10)
        bench18.admin.execute(f"REVOKE SELECT (xmin) ON documents FROM {SERVICE_ROLE}")  # type: ignore[arg-type]
        hints: list[str | None] = []
        bench18.admin.add_notice_handler(lambda notice: hints.append(notice.message_hint))
        configure_documents(bench18)
        grant = f"GRANT SELECT (xmin) ON public.documents TO {SERVICE_ROLE}"
        assert f"{grant}." in hints
        soon = {"CDC_TEST_SET": "cdc_embedder.following.HEAL_SECONDS=0.5"}
        with running(bench18, module="tests.faults.failing", OPENAI_API_KEY="x", **soon):
            until(lambda: status(bench18)[0]["state"] == "error", "not told", lambda: status(bench18))
            assert "permission denied" in status(bench18)[0]["reason"]
            assert f'GRANT SELECT (xmin) ON "public"."documents" TO "{SERVICE_ROLE}"' in status(bench18)[0]["reason"]
            bench18.admin.execute(grant)  # type: ignore[arg-type]
            wait_caught_up(bench18)
        assert server.texts == []


def test_adopt_compares_a_sample_before_it_says_so(installed: Bench) -> None:
    kind = "vector(8)" if installed.has_vector else "double precision[]"
    with api() as server:
        make_api_model(installed, server, document_prompt="passage: ")
        make_vectors(installed, kind, 50)
        installed.admin.execute("UPDATE documents SET embedding = NULL WHERE id <= 4")
        settle(installed)
        configure_documents(installed, "ask")
        with running(installed, OPENAI_API_KEY="x") as service:
            until(lambda: status(installed)[0]["state"] == "paused", "not paused", lambda: service.log)
            reason = status(installed)[0]["reason"]
            assert "'replace'" in reason
            assert "'adopt'" in reason
            refused = fails(installed, "adopt", "documents.embedding", OPENAI_API_KEY="x")
            assert "46 vectors compared with the model's, cosine at least -" in refused
            assert "46 below 0.99. The model's row does not say how they were made" in refused
            assert status(installed)[0]["state"] == "paused"
            assert len(server.texts) == 46
            installed.admin.execute("UPDATE cdc_embedder.model SET document_prompt = NULL WHERE name = 'api'")
            server.texts.clear()
            said = succeeds(installed, "adopt", "Documents.embedding", "--sample", "20", OPENAI_API_KEY="x")
            assert "20 vectors compared with the model's, cosine at least 1.000000, 1.000000 on average" in said
            wait_caught_up(installed)
            assert len(server.texts) == 24
            assert sorted(server.texts[20:]) == ["text 1", "text 2", "text 3", "text 4"]
            assert assert_every_vector_is_of_its_text(installed, model="api") == 50
            assert 'the first scan of "documents"."embedding" is over' in fails(
                installed, "adopt", "documents.embedding", OPENAI_API_KEY="x"
            )
            assert "is not a configured column" in fails(installed, "adopt", "documents.body")
            assert service.stop() == 0


def test_vectors_of_which_none_can_be_kept_are_refused_with_the_reason(bench18: Bench) -> None:
    with api() as server:
        make_api_model(bench18, server)
        make_vectors(bench18, "real[]", 9)
        configure_documents(bench18, "ask")
        bench18.admin.execute("UPDATE documents SET embedding = (SELECT array_agg(2 * x) FROM unnest(embedding) x)")
        refused = fails(bench18, "adopt", "documents.embedding", OPENAI_API_KEY="x")
        assert "0 vectors compared with the model's; 9 more cannot be kept" in refused
        assert "one with normalize = false" in refused
        assert server.texts == []
        bench18.admin.execute("UPDATE cdc_embedder.model SET normalize = false WHERE name = 'api'")
        refused = fails(bench18, "adopt", "documents.embedding", OPENAI_API_KEY="x")
        assert "9 vectors compared with the model's, cosine at least 1.000000, 1.000000 on average, 0 below" in refused
        assert "lengths off by 1.000000 at most, 9 by more than 0.01. They have the directions" in refused
        assert one(bench18.admin, "SELECT on_existing FROM cdc_embedder.embedding_column") == "ask"
        halved = "UPDATE documents SET embedding = (SELECT array_agg(x * 0.505) FROM unnest(embedding) x)"
        bench18.admin.execute(halved)
        near = ("adopt", "documents.embedding", "--threshold")
        assert "9 by more than 0.005" in fails(bench18, *near, "0.995", OPENAI_API_KEY="x")
        said = succeeds(bench18, *near, "0.985", OPENAI_API_KEY="x")
        assert "lengths off by 0.010000 at most, 0 by more than 0.015" in said
        bench18.admin.execute("UPDATE documents SET embedding = NULL")
        assert "there is nothing to adopt" in fails(bench18, "adopt", "documents.embedding", OPENAI_API_KEY="x")
        assert one(bench18.admin, "SELECT on_existing FROM cdc_embedder.embedding_column") == "adopt"


def test_add_adopts_what_it_is_told_to_unchecked(bench18: Bench) -> None:
    with api() as server:
        make_api_model(bench18, server)
        make_vectors(bench18, "vector(8)", 9)
        succeeds(bench18, "add", "documents", "body", "embedding", "--model", "api", "--on-existing", "adopt")
        with running(bench18, OPENAI_API_KEY="x"):
            wait_caught_up(bench18)
        assert server.texts == []
