"""The publication: who may change it, what happens where the caller may not, and what is left alone (rule 11)."""

from __future__ import annotations

import psycopg
from psycopg import sql

from tests.configuring import DOCUMENTS, Connection, column, configure, one, published
from tests.servers import Bench

IN_ANY = "SELECT array_agg(prrelid::regclass::text ORDER BY 1) FROM pg_publication_rel"


def test_a_table_is_published_with_its_first_column_and_taken_out_with_its_last(
    installed: Bench, admin: Connection
) -> None:
    admin.execute(
        DOCUMENTS + "; ALTER TABLE documents ADD second real[]; CREATE TABLE others (LIKE documents INCLUDING ALL)"
    )
    admin.execute(sql.SQL("ALTER PUBLICATION {} ADD TABLE others").format(sql.Identifier(installed.slot)))
    configure(admin)
    configure(admin, target_column="second")
    assert published(admin) == ["documents", "others"]
    admin.execute("DELETE FROM cdc_embedder.embedding_column WHERE target_column = 'second'")
    assert published(admin) == ["documents", "others"]
    admin.execute("SELECT cdc_embedder.pause('documents')")
    assert published(admin) == ["documents", "others"]
    admin.execute("DELETE FROM cdc_embedder.embedding_column")
    assert one(admin, IN_ANY) == ["others"], "what others put there is theirs"


def test_a_caller_without_the_right_keeps_the_row_and_learns_the_statement(
    installed: Bench, admin: Connection, application: Connection
) -> None:
    notices: list[str] = []
    application.add_notice_handler(lambda notice: notices.append(str(notice.message_primary)))
    made = configure(application)
    statement = f"ALTER PUBLICATION {installed.slot} ADD TABLE public.documents"
    assert column(admin, "publication_statement") == statement
    assert any(statement in notice for notice in notices)
    assert any("cannot serve public.documents yet" in notice for notice in notices)
    assert one(admin, IN_ANY) is None
    ledger = f"cdc_embedder.ledger_{made}"
    assert (
        one(admin, "SELECT pg_get_userbyid(relowner) FROM pg_class WHERE oid = %s::regclass", ledger) == "cdc_service"
    )
    admin.execute("SELECT cdc_embedder.resume('documents')")
    assert column(admin, "publication_statement") is None
    assert one(admin, IN_ANY) == ["documents"]
    application.execute("DELETE FROM cdc_embedder.embedding_column")
    assert one(admin, IN_ANY) == ["documents"], "who may not change the publication may still remove the column"
    assert one(admin, "SELECT to_regclass(%s)", ledger) is None


def test_a_member_of_both_owners_publishes(admin: Connection, application: Connection) -> None:
    admin.execute(sql.SQL("GRANT cdc_service TO {}").format(sql.Identifier(application.info.user)))
    configure(application)
    assert published(admin) == ["documents"]
    application.execute("DELETE FROM cdc_embedder.embedding_column")
    assert one(admin, IN_ANY) is None


def test_a_locked_table_is_not_waited_for(installed: Bench, admin: Connection) -> None:
    admin.execute(DOCUMENTS)
    with psycopg.connect(installed.dsn_admin) as holder:
        holder.execute("LOCK TABLE documents IN SHARE UPDATE EXCLUSIVE MODE")
        configure(admin)
    assert column(admin, "publication_statement").startswith("ALTER PUBLICATION")
    assert one(admin, "SHOW lock_timeout") == "0", "the caller's own setting is as it was"
    admin.execute("UPDATE cdc_embedder.embedding_column SET enabled = true")
    assert column(admin, "publication_statement") is None


def test_a_missing_publication_keeps_the_row(admin: Connection) -> None:
    admin.execute(DOCUMENTS)
    configure(admin, slot="unheard_of")
    assert column(admin, "publication_statement") == "ALTER PUBLICATION unheard_of ADD TABLE public.documents"


def test_a_wal2json_slot_needs_no_publication(bench: Bench) -> None:
    bench.admin.execute("SELECT pg_create_logical_replication_slot(%s, %s)", (bench.slot, bench.plugin))
    bench.admin.execute(DOCUMENTS)
    configure(bench.admin, model="all-MiniLM-L6-v2")
    assert published(bench.admin) == ([] if bench.plugin == "wal2json" else ["documents"])
    assert column(bench.admin, "publication_statement") is None


def test_another_slot_takes_the_table_from_one_publication_to_the_other(admin: Connection) -> None:
    admin.execute(DOCUMENTS)
    configure(admin)
    admin.execute("UPDATE cdc_embedder.scan SET counted = true, finished_at = clock_timestamp(), unfinished = '{}'")
    admin.execute("CREATE PUBLICATION another WITH (publish = 'insert, update')")
    admin.execute("UPDATE cdc_embedder.embedding_column SET slot = 'another'")
    scan = one(admin, "SELECT requested_at > finished_at, counted, unfinished, reason FROM cdc_embedder.scan")
    assert scan == (True, False, None, "another slot")
    rows = admin.execute("SELECT p.pubname FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid")
    assert rows.fetchall() == [("another",)]


def test_an_unlogged_table_is_taken_and_not_published(admin: Connection) -> None:
    admin.execute(DOCUMENTS.replace("TABLE", "UNLOGGED TABLE"))
    notices: list[str] = []
    admin.add_notice_handler(lambda notice: notices.append(str(notice.message_primary)))
    configure(admin)
    assert any("unlogged" in notice for notice in notices)
    assert one(admin, IN_ANY) is None
    assert column(admin, "publication_statement") is None
