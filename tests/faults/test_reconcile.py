"""Rule 10: whatever was missed is found by a scan, which begins by itself and costs no more than what differs."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from cdc_embedder.embedding.fake import fake_vector
from tests.documents import configure_documents, make_documents, make_model
from tests.embedding_api import Server, api
from tests.servers import SERVICE_ROLE, Bench, bench_with, bindir_15, bindir_18
from tests.service import (
    Service,
    assert_every_vector_is_of_its_text,
    running,
    status,
    until,
    wait_caught_up,
)


def make_api_model(bench: Bench, server: Server) -> None:
    options = {"base_url": f"http://127.0.0.1:{server.server_port}/v1", "max_batch_rows": 1000}
    bench.admin.execute(
        "INSERT INTO cdc_embedder.model (name, backend, source, dimensions, options)"
        " VALUES ('api', 'openai', 'some/model', 8, %s)",
        (Jsonb(options),),
    )


def drop_slot(bench: Bench) -> None:
    def dropped() -> bool:
        try:
            bench.admin.execute("SELECT pg_drop_replication_slot(%s)", (bench.slot,))
        except psycopg.errors.ObjectInUse:
            return False
        return True

    until(dropped, "the slot stays in use")


def change_seventy(bench: Bench) -> None:
    """50 texts change, 10 rows go, 20 come."""
    bench.admin.execute("UPDATE documents SET body = 'changed ' || id WHERE id % 100 = 3")
    bench.admin.execute("DELETE FROM documents WHERE id % 500 = 7")
    bench.admin.execute("INSERT INTO documents (body) SELECT 'new ' || n FROM generate_series(1, 20) n")


def orphans(bench: Bench) -> int:
    row = bench.admin.execute(
        "SELECT count(*) FROM cdc_embedder.ledger_1 l LEFT JOIN documents d ON d.id = l.key_1 WHERE d.id IS NULL"
    ).fetchone()
    assert row is not None
    return int(row[0])


def assert_seventy(bench: Bench, server: Server) -> None:
    wait_caught_up(bench)
    assert len(server.texts) == 70
    assert sorted(server.texts) == sorted(
        row[0] for row in bench.admin.execute("SELECT body FROM documents WHERE body ~ '^(changed|new) '").fetchall()
    )
    assert assert_every_vector_is_of_its_text(bench, model="api") == 5010
    until(lambda: orphans(bench) == 0, "orphans stay in the ledger")


def test_a_slot_that_was_dropped_while_the_service_was_down_costs_what_changed_and_no_more(bench: Any) -> None:
    with api() as server:
        make_api_model(bench, server)
        make_documents(bench, 5000, model="api")
        with running(bench, OPENAI_API_KEY="x") as service:
            wait_caught_up(bench)
            assert len(server.texts) == 5000
            assert service.stop() == 0
            drop_slot(bench)
            server.texts.clear()
            change_seventy(bench)
            service.start()
            assert_seventy(bench, server)


def test_a_slot_that_the_server_gave_up_costs_what_changed_and_no_more() -> None:
    limits = {"max_slot_wal_keep_size": "1MB", "wal_keep_size": "0", "max_wal_size": "32MB", "min_wal_size": "32MB"}
    with api() as server, bench_with(bindir_18(), "pgoutput", limits) as bench:
        make_api_model(bench, server)
        make_documents(bench, 5000, model="api")
        with running(bench, OPENAI_API_KEY="x") as service:
            wait_caught_up(bench)
            assert service.stop() == 0
            server.texts.clear()
            change_seventy(bench)
            bench.admin.execute("CREATE TABLE filler (x text)")

            def lost() -> bool:
                bench.admin.execute("INSERT INTO filler SELECT repeat('x', 1000) FROM generate_series(1, 20000)")
                bench.admin.execute("SELECT pg_switch_wal()")
                bench.admin.execute("CHECKPOINT")
                row = bench.admin.execute("SELECT wal_status FROM pg_replication_slots").fetchone()
                return bool(row and row[0] == "lost")

            until(lost, "the slot is never given up")
            service.start()
            assert_seventy(bench, server)
            assert "was invalidated" in service.log


def test_a_scan_goes_on_after_a_kill_where_it_was(bench18: Any) -> None:
    """What was judged before is neither read nor embedded again, and the rows are counted once."""
    make_model(bench18, delay_per_text_s=0.0007)
    make_documents(bench18, 20_000)
    service = Service(bench18).start()
    try:
        until(
            lambda: bench18.admin.execute("SELECT unfinished FROM cdc_embedder.scan").fetchone()[0],
            "no checkpoint",
            lambda: service.log,
        )
        service.kill()
        noted = bench18.admin.execute("SELECT (unfinished -> 'counts' ->> 0)::int FROM cdc_embedder.scan").fetchone()[0]
        below = bench18.admin.execute(
            "SELECT count(*) FROM documents d LEFT JOIN cdc_embedder.ledger_1 l ON l.key_1 = d.id"
            " WHERE l.key_1 IS NULL"
            " AND d.id <= (SELECT (unfinished -> 'position' ->> 0)::bigint FROM cdc_embedder.scan)"
        ).fetchone()
        assert below == (0,), "the position is past rows that were not judged"
        # found by the stream, not by the scan: the row lies before the position
        bench18.admin.execute("UPDATE documents SET body = 'changed behind the scan' WHERE id = 1")
        service.start()
        service.wait_for_log(f"goes on after {noted} rows")
        wait_caught_up(bench18)
        assert assert_every_vector_is_of_its_text(bench18) == 20_000
        assert "complete: 20000 rows" in service.log
    finally:
        service.end()


def test_a_reconcile_that_is_asked_for_again_begins_at_the_beginning(bench18: Any) -> None:
    make_model(bench18)
    make_documents(bench18, 10)
    with running(bench18) as service:
        wait_caught_up(bench18)
        bench18.admin.execute(
            "UPDATE cdc_embedder.scan SET unfinished = jsonb_build_object('request', requested_at::text, 'generation',"
            " 1, 'key', '[\"id bigint\"]'::jsonb, 'position', '[\"9\"]'::jsonb, 'sound', true,"
            " 'counts', '[9,0,9,0,0]'::jsonb)"
        )
        vector = "[" + ", ".join(["0.1"] * 8) + "]"
        with bench18.admin.transaction():
            # as if our own session had spoiled it: the stream passes it over
            bench18.admin.execute("SELECT pg_replication_origin_create(%s)", (f"{bench18.slot}_1",))
        with bench18.admin.transaction():
            bench18.admin.execute("SELECT pg_replication_origin_session_setup(%s)", (f"{bench18.slot}_1",))
            bench18.admin.execute("UPDATE documents SET embedding = %s WHERE id = 1", (vector,))
        bench18.admin.execute("SELECT pg_replication_origin_session_reset()")
        bench18.admin.execute("SELECT cdc_embedder.reconcile('documents')")
        wait_caught_up(bench18)
        until(lambda: np_close(bench18, 1), "the row before an old position was passed over", lambda: service.log)


def np_close(bench: Bench, id: int) -> bool:
    row = bench.admin.execute("SELECT body, embedding::real[] FROM documents WHERE id = %s", (id,)).fetchone()
    assert row is not None
    return bool(abs(fake_vector("fake", row[0], 8) - row[1]).max() < 2e-3)


@pytest.mark.parametrize("stopped", [False, True])
def test_a_table_that_is_rewritten_is_scanned_by_itself(bench: Any, stopped: bool) -> None:
    """ALTER TYPE … USING changes every text, and a partition that is attached brings rows, without one event."""
    make_model(bench)
    make_documents(bench, 30)
    bench.admin.execute(
        "CREATE TABLE parts (id int, body text, embedding real[], PRIMARY KEY (id)) PARTITION BY RANGE (id)"
    )
    bench.admin.execute("CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (100)")
    bench.grant("parts", ["id"], ["body"], "embedding")
    bench.admin.execute("INSERT INTO parts SELECT n, 'part ' || n FROM generate_series(1, 30) n")
    bench.admin.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
        " VALUES ('parts', '{body}', 'embedding', 'fake')"
    )
    with running(bench) as service:
        wait_caught_up(bench)
        if stopped:
            assert service.stop() == 0
        bench.admin.execute("ALTER TABLE documents ALTER body TYPE text USING upper(body)")
        bench.admin.execute("CREATE TABLE parts_2 (id int PRIMARY KEY, body text, embedding real[])")
        bench.admin.execute("INSERT INTO parts_2 SELECT n, 'attached ' || n FROM generate_series(100, 120) n")
        bench.admin.execute("ALTER TABLE parts ATTACH PARTITION parts_2 FOR VALUES FROM (100) TO (200)")
        if stopped:
            service.start()
        until(
            lambda: bench.admin.execute("SELECT count(*) FROM parts WHERE embedding IS NULL").fetchone() == (0,),
            "the attached rows are not found",
            lambda: service.log,
        )
        until(lambda: np_close(bench, 30), "the rewritten rows are not found", lambda: service.log)
        bench.admin.execute("UPDATE parts SET body = 'after ' || id WHERE id = 110")
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench) == 30
        assert assert_every_vector_is_of_its_text(bench, "parts") == 51


@pytest.mark.parametrize(("bindir", "plugin"), [(bindir_15, "pgoutput"), (bindir_18, "pgoutput")])
@pytest.mark.parametrize("stopped", [False, True])
def test_a_publication_that_is_dropped_is_made_anew_and_what_was_missed_is_found(
    request: pytest.FixtureRequest, bindir: Any, plugin: str, stopped: bool
) -> None:
    """14 to 17 stick at the first change without it, 18 passes changes over with a warning: both must end in a scan."""
    with bench_with(bindir(), plugin, {}) as bench:
        make_model(bench)
        make_documents(bench, 30)
        bench.admin.execute(f'GRANT CREATE ON DATABASE "{bench.database}" TO {SERVICE_ROLE}')
        bench.admin.execute(f"ALTER TABLE documents OWNER TO {SERVICE_ROLE}")
        with running(bench) as service:
            wait_caught_up(bench)
            if stopped:
                assert service.stop() == 0
            bench.admin.execute(f'DROP PUBLICATION "{bench.slot}"')
            bench.admin.execute("UPDATE documents SET body = 'without a publication ' || id WHERE id < 5")
            if stopped:
                service.start()
            until(
                lambda: bench.admin.execute(f"SELECT 1 FROM pg_publication WHERE pubname = '{bench.slot}'").fetchone(),
                "no publication",
                lambda: service.log,
            )
            until(lambda: np_close(bench, 1), "the change was passed over", lambda: service.log)
            bench.admin.execute("UPDATE documents SET body = 'afterwards ' || id WHERE id > 25")
            wait_caught_up(bench)
            assert assert_every_vector_is_of_its_text(bench) == 30
            assert status(bench)[0]["state"] == "live"


def test_the_endless_scan_finds_what_nothing_told_of_and_sweeps_orphans(bench: Any) -> None:
    """Somebody else moves our slot on: no event, no sign. The column is live all the while."""
    make_model(bench)
    make_documents(bench, 200)
    with running(bench) as service:
        wait_caught_up(bench)
        assert service.stop() == 0
    bench.admin.execute("UPDATE documents SET body = 'unheard ' || id WHERE id % 10 = 3")
    bench.admin.execute("DELETE FROM documents WHERE id % 50 = 7")

    def moved_on() -> bool:
        try:
            bench.admin.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_lsn())", (bench.slot,))
        except psycopg.errors.ObjectInUse:
            return False
        return True

    until(moved_on, "the slot stays in use")
    states = set()
    with running(bench, CDC_EMBEDDER_SCAN_PERIOD_S="2") as service:
        service.wait_for_log("streaming from")

        def found() -> bool:
            states.add(status(bench)[0]["state"])
            return np_close(bench, 3) and orphans(bench) == 0

        until(found, "never found", lambda: service.log)
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench) == 196
    assert "backfilling" not in states


def test_another_timeline_is_a_reason_to_scan_everything(bench18: Any) -> None:
    """As after a failover: the slot came along, and what it confirmed may have been lost with the old primary."""
    make_model(bench18)
    make_documents(bench18, 20)
    with running(bench18) as service:
        wait_caught_up(bench18)
        assert service.stop() == 0
        bench18.admin.execute("UPDATE cdc_embedder.progress SET timeline = timeline + 1")
        bench18.admin.execute("UPDATE documents SET body = 'unheard' WHERE id = 3")
        bench18.admin.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_lsn())", (bench18.slot,))
        service.start()
        until(lambda: np_close(bench18, 3), "never found", lambda: service.log)
        wait_caught_up(bench18)
        assert "another timeline" in service.log
        assert assert_every_vector_is_of_its_text(bench18) == 20
        assert service.stop() == 0
        before = service.log.count("everything is scanned")
        service.start()
        wait_caught_up(bench18)
        assert service.log.count("everything is scanned") == before == 1


def test_a_dump_that_is_restored_on_another_server_is_resolved_by_name_and_reconciled(
    bench18: Any, tmp_path: Path
) -> None:
    """Column numbers differ there (a column was dropped), oids too; one row was changed before the service came."""
    make_model(bench18)
    bench18.admin.execute("CREATE TABLE documents (gone int, id bigint PRIMARY KEY, body text, embedding vector(8))")
    bench18.admin.execute("ALTER TABLE documents DROP gone")
    bench18.grant("documents", ["id"], ["body"], "embedding")
    bench18.admin.execute("INSERT INTO documents SELECT n, 'text ' || n FROM generate_series(1, 30) n")
    configure_documents(bench18)
    with running(bench18) as service:
        wait_caught_up(bench18)
        assert service.stop() == 0
    dump = tmp_path / "dump.sql"
    subprocess.run(
        [bench18.server.bindir / "pg_dump", "--dbname", bench18.dsn_admin, "--file", dump], check=True, timeout=60
    )
    with bench_with(bindir_18(), "pgoutput", {}) as other:
        other.admin.execute("DROP SCHEMA cdc_embedder CASCADE")
        other.admin.execute(f'DROP PUBLICATION "{other.slot}"')
        restored = subprocess.run(
            [other.server.bindir / "psql", "--dbname", other.dsn_admin, "--file", dump, "--quiet"],
            check=True, timeout=60, capture_output=True, text=True,
        )  # fmt: skip
        other.slot = bench18.slot
        other.admin.execute("UPDATE documents SET body = 'changed in the copy' WHERE id = 3")
        before = other.admin.execute("SELECT key_1, embedded_at FROM cdc_embedder.ledger_1").fetchall()
        assert len(before) == 30, restored.stderr
        with running(other) as service:
            until(lambda: np_close(other, 3), "never found", lambda: service.log)
            wait_caught_up(other)
            assert assert_every_vector_is_of_its_text(other) == 30
        after = dict(other.admin.execute("SELECT key_1, embedded_at FROM cdc_embedder.ledger_1").fetchall())
        assert [id for id, at in before if after[id] != at] == [3], "what was right is not embedded again"
        other.admin.execute("SELECT pg_drop_replication_slot(%s)", (other.slot,))
