"""Row-level security on the source: an error with its remedy, never silently fewer rows; and what it does not hide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from cdc_embedder.doctor import Finding, examine
from cdc_embedder.settings import Settings
from tests.configuring import one
from tests.documents import make_documents, make_model
from tests.servers import SERVICE_ROLE, Bench, make_bench
from tests.service import assert_every_vector_is_of_its_text, running, status, until, wait_caught_up

POLICIES = {
    "one that hides rows": "CREATE POLICY p ON documents USING (id <= 5)",
    "one that hides nothing from the role": f"CREATE POLICY p ON documents TO {SERVICE_ROLE} USING (true)",
    "one that is about others": "CREATE POLICY p ON documents TO postgres USING (true)",
    "none": "SELECT 1",
}


@pytest.fixture(params=["15-wal2json", "18-pgoutput"])
def secured(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Ten documents under row-level security, without any policy."""
    major, plugin = request.param.split("-")
    for bench in make_bench(request.getfixturevalue(f"pg{major}"), plugin):
        make_model(bench)
        make_documents(bench, 10)
        bench.admin.execute("ALTER TABLE documents ENABLE ROW LEVEL SECURITY")
        try:
            yield bench
        finally:
            bench.admin.execute(f"ALTER ROLE {SERVICE_ROLE} NOBYPASSRLS")


def found(bench: Bench, check: str) -> Finding:
    settings = Settings(dsn=bench.dsn_service, slot=bench.slot, output_plugin=bench.plugin)
    [finding] = [finding for finding in examine(settings, model=False) if finding.check == check]
    return finding


def wait_for_the_error(bench: Bench) -> None:
    until(lambda: status(bench)[0]["state"] == "error", "it was never noticed", lambda: status(bench))
    assert "query would be affected by row-level security policy" in status(bench)[0]["reason"]


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_any_policy_or_none_is_an_error_before_a_row_is_judged(secured: Bench, policy: str) -> None:
    secured.admin.execute(policy)
    with running(secured):
        wait_for_the_error(secured)
    assert one(secured.admin, "SELECT count(*) FROM documents WHERE embedding IS NOT NULL") == 0
    assert one(secured.admin, "SELECT count(*) FROM cdc_embedder.ledger_1") == 0


def test_bypassrls_mends_it_and_what_was_missed_meanwhile_is_found(secured: Bench) -> None:
    secured.admin.execute(POLICIES["one that hides rows"])
    with running(secured):
        wait_for_the_error(secured)
        secured.admin.execute("UPDATE documents SET body = 'changed meanwhile' WHERE id IN (1, 9)")
        secured.admin.execute("INSERT INTO documents (body) VALUES ('new meanwhile')")
        finding = found(secured, "column-rights")
        assert finding.level == "error"
        assert "row-level security" in finding.sentence
        assert finding.remedy == f"ALTER ROLE {SERVICE_ROLE} BYPASSRLS;"
        secured.admin.execute(finding.remedy)
        until(lambda: status(secured)[0]["state"] == "live", "never healed", lambda: status(secured))
        wait_caught_up(secured)
        assert assert_every_vector_is_of_its_text(secured) == 11
        assert found(secured, "column-rights").level == "ok"


def test_a_policy_that_comes_while_the_service_runs_stops_the_column_and_takes_no_vector_away(secured: Bench) -> None:
    secured.admin.execute("ALTER TABLE documents DISABLE ROW LEVEL SECURITY")
    with running(secured):
        wait_caught_up(secured)
        secured.admin.execute(POLICIES["one that hides rows"])
        secured.admin.execute("ALTER TABLE documents ENABLE ROW LEVEL SECURITY")
        secured.admin.execute("UPDATE documents SET body = 'hidden now' WHERE id = 9")
        wait_for_the_error(secured)
        assert one(secured.admin, "SELECT count(*) FROM documents WHERE embedding IS NOT NULL") == 10
        secured.admin.execute("ALTER TABLE documents DISABLE ROW LEVEL SECURITY")
        until(lambda: status(secured)[0]["state"] == "live", "never healed", lambda: status(secured))
        wait_caught_up(secured)
        assert assert_every_vector_is_of_its_text(secured) == 10


def test_it_concerns_the_tables_owner_only_where_it_is_forced(secured: Bench) -> None:
    secured.admin.execute(f"ALTER TABLE documents OWNER TO {SERVICE_ROLE}")
    assert found(secured, "column-rights").level == "ok"
    secured.admin.execute("ALTER TABLE documents FORCE ROW LEVEL SECURITY")
    assert found(secured, "column-rights").level == "error"


def test_a_policy_hides_vectors_from_readers_as_it_hides_rows(secured: Bench) -> None:
    secured.admin.execute(f"ALTER ROLE {SERVICE_ROLE} BYPASSRLS")
    reader = f"reader_{secured.database}"
    secured.admin.execute(f"CREATE ROLE {reader} LOGIN; GRANT SELECT ON documents TO {reader}")
    secured.admin.execute(POLICIES["one that hides rows"])
    try:
        with running(secured):
            wait_caught_up(secured)
        with psycopg.connect(secured.server.dsn(secured.database, reader)) as session:
            assert one(session, "SELECT count(*) FROM documents WHERE embedding IS NOT NULL") == 5
    finally:
        secured.admin.execute(f"DROP OWNED BY {reader}; DROP ROLE {reader}")


def test_who_may_read_slots_reads_rows_that_policies_and_grants_hide(secured: Bench) -> None:
    slot: Any = f"{secured.slot}_peek"
    secured.admin.execute("SELECT pg_create_logical_replication_slot(%s, 'test_decoding')", (slot,))
    secured.admin.execute("CREATE TABLE other (secret text); INSERT INTO other VALUES ('for nobody')")
    with psycopg.connect(secured.dsn_service, autocommit=True) as session:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            session.execute("SELECT * FROM other")
        read = session.execute("SELECT data FROM pg_logical_slot_peek_changes(%s, NULL, NULL)", (slot,)).fetchall()
        assert any("for nobody" in data for (data,) in read)
