"""The status view: what it counts, what it says of a column, and that no table can make it fail."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from decimal import Decimal

import psycopg
import pytest
from psycopg import sql

from tests.configuring import DOCUMENTS, Connection, configure, one, wait_until_blocked
from tests.servers import Bench
from tests.service import until


@contextmanager
def held_slot(installed: Bench) -> Iterator[None]:
    """The slot as a running service holds it."""
    installed.admin.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (installed.slot,))
    with closing(psycopg.connect(installed.dsn_service, autocommit=True, replication="database")) as stream:
        options = f"proto_version '1', publication_names '{installed.slot}'"
        stream.execute(f"START_REPLICATION SLOT {installed.slot} LOGICAL 0/0 ({options})")
        yield


def state(conn: Connection) -> tuple[str, str | None]:
    found: tuple[str, str | None] = one(conn, "SELECT state, reason FROM cdc_embedder.status")
    return found


@pytest.fixture
def documents(installed: Bench, admin: Connection) -> int:
    """A configured table that the service may read; the column's id."""
    admin.execute(DOCUMENTS)
    installed.grant("documents", ["id"], ["title", "body"], "embedding")
    return configure(admin, columns="{title,body}")


def remember(conn: Connection, column: int, *rows: tuple[int, str, int, int | None]) -> None:
    """Ledger rows: (key, state, generation, digest)."""
    ledger = sql.Identifier("cdc_embedder", f"ledger_{column}")
    insert = sql.SQL(
        "INSERT INTO {} (key_1, fingerprint, state, generation, vector_digest) VALUES (%s, '', %s, %s, %s)"
    )
    with conn.cursor() as cursor:
        cursor.executemany(insert.format(ledger), rows)


COUNTS = 'rows, rows_estimated, "null", current, pending, failed, truncated, coverage'


def test_nothing_configured_is_no_row(admin: Connection) -> None:
    assert one(admin, "SELECT count(*) FROM cdc_embedder.status") == 0


def test_an_empty_table_is_covered(admin: Connection, documents: int) -> None:
    assert one(admin, f"SELECT {COUNTS} FROM cdc_embedder.status") == (0, False, 0, 0, 0, 0, 0, 100)


def test_a_small_table_is_counted_beside_its_ledger(admin: Connection, documents: int) -> None:
    admin.execute(
        "INSERT INTO documents (id, title, body) VALUES (1, 'a', NULL), (2, NULL, 'b'), (3, 'c', 'c'), (4, 'd', 'd'),"
        " (5, 'e', ''), (6, NULL, NULL), (7, 'g', 'g'), (8, 'h', 'h')"
    )
    remember(
        admin, documents, (1, "current", 1, 9), (2, "truncated", 1, 9), (3, "failed", 1, None), (4, "current", 0, 9),
        (5, "current", 1, None), (6, "current", 1, None), (100, "current", 1, 9), (101, "failed", 1, None),
    )  # fmt: skip
    counted = one(admin, f"SELECT {COUNTS} FROM cdc_embedder.status")
    # 4 is of another generation, 5 lacks its vector, 7 and 8 were never seen; 100 and 101 are no rows of the table.
    assert counted == (8, False, 1, 2, 4, 1, 1, Decimal("28.57"))


def test_coverage_is_not_100_before_the_last_row(admin: Connection, documents: int) -> None:
    admin.execute("INSERT INTO documents (id, body) SELECT n, 'x' FROM generate_series(1, 30000) n")
    remember(admin, documents, *((n, "current", 1, 9) for n in range(2, 30001)))
    coverage = "SELECT coverage < 100, coverage FROM cdc_embedder.status"
    assert one(admin, coverage)[0] is True
    remember(admin, documents, (1, "current", 1, 9))
    assert one(admin, coverage)[1] == 100


def test_a_large_table_is_estimated_and_never_scanned(installed: Bench, admin: Connection, documents: int) -> None:
    admin.execute("INSERT INTO documents (id, body) VALUES (1, 'a')")
    admin.execute("UPDATE pg_class SET reltuples = 5000000, relpages = 1 WHERE oid = 'documents'::regclass")
    assert one(admin, f"SELECT {COUNTS} FROM cdc_embedder.status") == (
        5_000_000, True, None, None, None, None, None, None)  # fmt: skip
    admin.execute(
        'INSERT INTO cdc_embedder.column_state (column_id, state, rows, "null", current, failed, truncated, pending,'
        " rows_per_s) VALUES (%s, 'backfilling', 4000000, 1000000, 1500000, 0, 3, 7, 100)",
        (documents,),
    )
    with held_slot(installed):
        assert one(admin, f"SELECT {COUNTS}, eta_s FROM cdc_embedder.status") == (
            4_000_000, True, 1_000_000, 1_500_000, 7, 0, 3, 50, 15_000)  # fmt: skip
    with psycopg.connect(installed.dsn_admin) as holder:
        holder.execute("LOCK TABLE documents IN ACCESS EXCLUSIVE MODE")
        assert one(admin, "SELECT rows FROM cdc_embedder.status") == 4_000_000, "no lock on the table was wanted"


def test_partitions_are_counted_through_their_root(installed: Bench, admin: Connection) -> None:
    admin.execute(
        "CREATE TABLE documents (id int PRIMARY KEY, body text, embedding real[]) PARTITION BY RANGE (id);"
        "CREATE TABLE low PARTITION OF documents FOR VALUES FROM (0) TO (10);"
        "CREATE TABLE high PARTITION OF documents FOR VALUES FROM (10) TO (20);"
        "INSERT INTO documents VALUES (1, 'a'), (11, 'b'), (12, NULL)"
    )
    installed.grant("documents", ["id"], ["body"], "embedding")
    configure(admin)
    assert one(admin, 'SELECT rows, "null", pending FROM cdc_embedder.status') == (3, 1, 2)
    admin.execute("UPDATE pg_class SET reltuples = 90000, relpages = 1 WHERE relname IN ('low', 'high')")
    assert one(admin, "SELECT rows, rows_estimated FROM cdc_embedder.status") == (180_000, True)


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("REVOKE ALL ON documents FROM cdc_service", "permission denied"),
        ("ALTER TABLE documents ENABLE ROW LEVEL SECURITY", "row-level security"),
        ("ALTER TABLE documents DROP COLUMN body", "cannot be counted"),
        ("ALTER TABLE documents DROP CONSTRAINT documents_pkey", "cannot be counted"),
    ],
)
def test_a_table_that_cannot_be_counted_gives_nulls_and_the_reason(
    installed: Bench, admin: Connection, documents: int, trouble: str, reason: str
) -> None:
    with held_slot(installed):
        admin.execute(trouble)
        found = one(admin, "SELECT state, reason, rows, coverage FROM cdc_embedder.status")
    assert (found[0], found[2], found[3]) == ("backfilling", None, None)
    assert reason in found[1]


def test_a_locked_table_is_not_waited_for(installed: Bench, admin: Connection, documents: int) -> None:
    with psycopg.connect(installed.dsn_admin) as holder, held_slot(installed):
        holder.execute("LOCK TABLE documents IN ACCESS EXCLUSIVE MODE")
        assert "lock timeout" in str(state(admin)[1])


def test_a_column_is_stopped_where_nobody_holds_its_slot(installed: Bench, admin: Connection, documents: int) -> None:
    assert state(admin) == ("stopped", f"no service runs for slot {installed.slot}")
    admin.execute("INSERT INTO cdc_embedder.column_state (column_id, state) VALUES (%s, 'live')", (documents,))
    assert state(admin)[0] == "stopped", "what a service said last does not outlive it"


def test_a_slot_that_is_being_made_is_read_by_nobody(installed: Bench, admin: Connection, documents: int) -> None:
    """It shows as active, by the session that makes it, for as long as that waits for older transactions."""
    admin.execute("INSERT INTO cdc_embedder.column_state (column_id, state) VALUES (%s, 'live')", (documents,))
    with (
        psycopg.connect(installed.dsn_admin, autocommit=True) as maker,
        psycopg.connect(installed.dsn_admin) as holder,
    ):
        holder.execute("SELECT pg_current_xact_id()")
        make = "SELECT pg_create_logical_replication_slot(%s, 'pgoutput')"
        making = threading.Thread(target=maker.execute, args=(make, (installed.slot,)), daemon=True)
        making.start()
        active = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s AND active"
        until(lambda: one(admin, active, installed.slot) == 1, "the slot is not being made")
        found = one(admin, "SELECT state, reason, lag_bytes, embedded_through FROM cdc_embedder.status")
        assert found[0] == "stopped"
        assert f"the slot {installed.slot} is being made" in found[1]
        assert found[2:] == (None, None), "no lag is known, which is not the same as none"
        holder.rollback()
        making.join()
    assert state(admin) == ("stopped", f"no service runs for slot {installed.slot}")


def test_what_a_service_said_of_its_pace_does_not_outlive_it(
    installed: Bench, admin: Connection, documents: int
) -> None:
    admin.execute("INSERT INTO documents (id, body) VALUES (1, 'a'), (2, 'b'), (3, 'c')")
    remember(admin, documents, (1, "current", 1, 9))
    admin.execute(
        "INSERT INTO cdc_embedder.column_state (column_id, state, pending, rows_per_s, oldest_pending_s,"
        " circuit_breaker, engine) VALUES (%s, 'backfilling', 3, 0.5, 7, 'open', 'packed')",
        (documents,),
    )
    pace = "SELECT current, pending, rows_per_s, eta_s, oldest_pending_s, circuit_breaker, engine, lag_bytes"
    assert one(admin, f"{pace} FROM cdc_embedder.status") == (1, 2, None, None, None, None, "packed", None)
    with held_slot(installed):
        assert one(admin, f"{pace} FROM cdc_embedder.status")[:-1] == (1, 3, 0.5, 4, 7, "open", "packed")


def test_a_running_service_is_quoted(installed: Bench, admin: Connection, documents: int) -> None:
    with held_slot(installed):
        assert state(admin) == ("backfilling", None)
        lag = one(admin, "SELECT lag_bytes >= 0, embedded_through > '0/0' FROM cdc_embedder.status")
        assert lag == (True, True)
        said = "INSERT INTO cdc_embedder.column_state (column_id, state, reason, pending, last_error, oldest_pending_s)"
        admin.execute(f"{said} VALUES (%s, 'live', 'because', 12, 'oh', 1.5)", (documents,))
        found = one(admin, "SELECT state, reason, pending, last_error, oldest_pending_s FROM cdc_embedder.status")
        assert found == ("live", "because", 12, "oh", 1.5)
        admin.execute("UPDATE cdc_embedder.column_state SET state = 'paused', reason = 'it holds vectors'")
        assert state(admin) == ("paused", "it holds vectors")


def test_a_paused_column_says_so(admin: Connection, documents: int) -> None:
    admin.execute("SELECT cdc_embedder.pause('documents')")
    assert state(admin) == ("paused", "paused")
    said = "INSERT INTO cdc_embedder.column_state (column_id, state, reason) VALUES (%s, 'paused', 'it holds vectors')"
    admin.execute(said, (documents,))
    assert state(admin) == ("paused", "it holds vectors")


def test_a_table_that_is_not_the_one_configured_is_an_error(admin: Connection, documents: int) -> None:
    admin.execute("ALTER TABLE documents RENAME TO papers")
    assert state(admin)[0] == "stopped", "a rename alone is followed"
    assert one(admin, "SELECT source_table FROM cdc_embedder.status") == "public.papers"
    admin.execute(DOCUMENTS)
    found, reason = state(admin)
    assert found == "error"
    assert "resume('public.documents')" in str(reason)
    admin.execute("DROP TABLE papers, documents")
    found, reason = state(admin)
    assert found == "error"
    assert "public.documents is gone" in str(reason)
    assert one(admin, "SELECT source_table, rows FROM cdc_embedder.status") == ("public.documents", None)


def test_a_column_that_scans_alone_feed_says_why(installed: Bench, admin: Connection, application: Connection) -> None:
    configure(application)
    admin.execute("CREATE UNLOGGED TABLE notes (LIKE documents INCLUDING ALL)")
    configure(admin, "notes")
    admin.execute("GRANT SELECT ON documents, notes TO cdc_service")
    reasons = "SELECT array_agg(reason ORDER BY id) FROM cdc_embedder.status"
    with held_slot(installed):
        statement = f"ALTER PUBLICATION {installed.slot} ADD TABLE public.documents"
        assert one(admin, reasons) == [
            f"fed by scans alone until somebody runs: {statement}",
            "fed by scans alone: the table is unlogged",
        ]
        admin.execute(statement)
        assert one(admin, reasons)[0] is None


def test_a_reader_needs_the_view_and_its_function(installed: Bench, admin: Connection, documents: int) -> None:
    role = sql.Identifier(f"reader_{installed.database}")
    admin.execute(sql.SQL("CREATE ROLE {}; GRANT USAGE ON SCHEMA cdc_embedder TO {}").format(role, role))
    admin.execute(sql.SQL("GRANT SELECT ON cdc_embedder.status, cdc_embedder.failed TO {}").format(role))
    try:
        admin.execute(sql.SQL("SET ROLE {}").format(role))
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            admin.execute("SELECT * FROM cdc_embedder.status")
        admin.execute("RESET ROLE")
        functions = "cdc_embedder._status(), cdc_embedder._failed()"
        admin.execute(sql.SQL("GRANT EXECUTE ON FUNCTION {} TO {}").format(sql.SQL(functions), role))
        admin.execute(sql.SQL("SET ROLE {}").format(role))
        assert one(admin, "SELECT rows FROM cdc_embedder.status") == 0
        assert one(admin, "SELECT count(*) FROM cdc_embedder.failed") == 0
    finally:
        admin.execute(sql.SQL("RESET ROLE; DROP OWNED BY {0}; DROP ROLE {0}").format(role))


def test_a_column_that_is_removed_while_somebody_looks_is_no_error(installed: Bench, admin: Connection) -> None:
    """The reader waits for the lock of the transaction that removes it."""
    admin.execute(DOCUMENTS)
    id = configure(admin)
    found: list[object] = []
    with psycopg.connect(installed.dsn_admin, autocommit=True) as reader:
        look = threading.Thread(
            target=lambda: found.append(one(reader, "SELECT cdc_embedder._spilled_from(%s)", id)), daemon=True
        )
        with psycopg.connect(installed.dsn_admin) as remover:
            remover.execute("SELECT cdc_embedder.remove_embedding_column('documents', 'embedding')")
            look.start()
            wait_until_blocked(admin, reader)
        look.join()
    assert found == [None]
