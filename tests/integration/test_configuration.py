"""What follows from a row of the configuration table: derived columns, scans, requests, word to the service."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import sql
from psycopg.types.json import Jsonb

from tests.configuring import DOCUMENTS, Connection, column, configure, one, published
from tests.servers import Bench

DERIVED = (
    "source_schema, source_name, key_columns::text[], key_attnums, key_types, source_attnums, target_attnum,"
    " generation, publication_statement"
)


def test_text_of_every_kind_is_a_source(admin: Connection) -> None:
    admin.execute("CREATE DOMAIN short AS varchar(9); CREATE DOMAIN shorter AS short CHECK (length(VALUE) < 5)")
    admin.execute("CREATE EXTENSION citext")
    admin.execute(
        "CREATE TABLE documents (id int PRIMARY KEY, a text, b varchar(5), c char(3), d shorter,"
        " e text GENERATED ALWAYS AS (a || b) STORED, f citext, embedding real[])"
    )
    configure(admin, columns="{f,e,d,c,b,a}")
    assert column(admin, "source_attnums") == [7, 6, 5, 4, 3, 2]


def test_only_the_triggers_fill_what_is_derived(admin: Connection) -> None:
    admin.execute(DOCUMENTS)
    configure(admin, source_schema="x", source_name="x", key_columns="{body}", generation=9, target_attnum=1,
              publication_statement="DROP TABLE documents", system_identifier=1, database_oid=1)  # fmt: skip
    wanted = ("public", "documents", ["id"], [1], ["bigint"], [3], 5, 1, None)
    assert column(admin, DERIVED) == wanted
    assert column(admin, "database_oid = (SELECT oid FROM pg_database WHERE datname = current_database())")
    assert column(admin, "system_identifier = (SELECT system_identifier FROM pg_control_system())")
    admin.execute(
        "UPDATE cdc_embedder.embedding_column SET source_schema = 'x', generation = 7, target_attnum = 1,"
        " key_types = '{text}', publication_statement = 'DROP'"
    )
    assert column(admin, DERIVED) == wanted


def test_an_id_cannot_change_and_truncate_is_refused(admin: Connection) -> None:
    admin.execute(DOCUMENTS)
    configure(admin)
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="the id"):
        admin.execute("UPDATE cdc_embedder.embedding_column SET id = DEFAULT")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="TRUNCATE"):
        admin.execute("TRUNCATE cdc_embedder.embedding_column CASCADE")


def test_renamed_tables_and_columns_are_followed(admin: Connection) -> None:
    admin.execute(DOCUMENTS)
    configure(admin)
    admin.execute("ALTER TABLE documents RENAME body TO content; ALTER TABLE documents RENAME embedding TO vec")
    admin.execute("ALTER TABLE documents RENAME TO papers")
    admin.execute("UPDATE cdc_embedder.embedding_column SET source_table = source_table")
    assert column(admin, "source_columns, target_column, source_name") == (["content"], "vec", "papers")


def test_resume_binds_a_column_to_the_table_that_took_the_name(admin: Connection) -> None:
    admin.execute(DOCUMENTS)
    configure(admin)
    admin.execute("ALTER TABLE documents RENAME TO documents_old;" + DOCUMENTS)
    assert one(admin, "SELECT state FROM cdc_embedder.status") == "error"
    assert one(admin, "SELECT cdc_embedder.resume('documents')") == 1
    assert column(admin, "source_table = 'documents'::regclass")
    assert one(admin, "SELECT reason, counted FROM cdc_embedder.scan") == ("another table", False)
    assert published(admin) == ["documents"]
    admin.execute("DROP TABLE documents; ALTER TABLE documents_old RENAME TO documents")
    assert one(admin, "SELECT state FROM cdc_embedder.status") == "error"
    admin.execute("SELECT cdc_embedder.resume('documents')")
    assert one(admin, "SELECT state FROM cdc_embedder.status") == "stopped"


def test_add_embedding_column_adds_the_target_where_it_is_missing(installed: Bench, admin: Connection) -> None:
    admin.execute("CREATE TABLE documents (id int PRIMARY KEY, body text)")
    made = one(
        admin, "SELECT cdc_embedder.add_embedding_column('documents', '{body}', 'The Vector', 'tiny', priority => 3)"
    )
    assert column(admin, "id, target_column, priority, separator") == (made, "The Vector", 3, "\n\n")
    added = "SELECT format_type(atttypid, atttypmod) FROM pg_attribute WHERE attname = 'The Vector'"
    assert one(admin, added) == ("vector(4)" if installed.has_vector else "real[]")
    admin.execute("SELECT cdc_embedder.remove_embedding_column('documents', 'The Vector')")
    assert one(admin, "SELECT count(*) FROM cdc_embedder.embedding_column") == 0
    assert one(admin, added) is not None, "vectors stay"
    with pytest.raises(psycopg.errors.UndefinedObject):
        admin.execute("SELECT cdc_embedder.remove_embedding_column('documents', 'The Vector')")


def test_a_refused_add_leaves_no_column_behind(installed: Bench, admin: Connection) -> None:
    admin.execute("CREATE TABLE documents (id int PRIMARY KEY, n int)")
    add = sql.SQL("SELECT cdc_embedder.add_embedding_column('documents', '{{n}}', 'embedding', {})")
    with pytest.raises(psycopg.errors.DatatypeMismatch):
        admin.execute(add.format("tiny"))
    with pytest.raises(psycopg.errors.UndefinedObject, match="huge"):
        admin.execute(add.format("huge"))
    with psycopg.connect(installed.dsn_admin) as holder:
        holder.execute("LOCK TABLE documents IN ACCESS SHARE MODE")
        with pytest.raises(psycopg.errors.LockNotAvailable, match="was not added"):
            admin.execute(add.format("tiny"))
    assert one(admin, "SELECT count(*) FROM pg_attribute WHERE attname = 'embedding'") == 0


def test_scans_are_requested_for_one_table_or_all(admin: Connection) -> None:
    admin.execute(DOCUMENTS + "; CREATE TABLE others (LIKE documents INCLUDING ALL)")
    configure(admin)
    configure(admin, "others")
    assert one(admin, "SELECT count(*) FROM cdc_embedder.scan WHERE reason = 'first scan' AND NOT counted") == 2
    admin.execute("UPDATE cdc_embedder.scan SET finished_at = clock_timestamp(), counted = true")
    assert one(admin, "SELECT cdc_embedder.reconcile('documents')") == 1
    assert one(admin, "SELECT count(*) FROM cdc_embedder.scan WHERE requested_at > finished_at AND counted") == 1
    assert one(admin, "SELECT cdc_embedder.reconcile()") == 2
    with pytest.raises(psycopg.errors.UndefinedObject, match="no embedding column"):
        admin.execute("SELECT cdc_embedder.reconcile('pg_class')")


def test_paused_columns_are_scanned_when_they_resume(admin: Connection) -> None:
    admin.execute(DOCUMENTS)
    configure(admin)
    assert one(admin, "SELECT cdc_embedder.pause('documents')") == 1
    assert column(admin, "enabled") is False
    assert one(admin, "SELECT cdc_embedder.resume('documents')") == 1
    assert column(admin, "enabled") is True
    assert one(admin, "SELECT reason FROM cdc_embedder.scan") == "resumed"
    for function in ("pause", "resume", "retry_failed"):
        with pytest.raises(psycopg.errors.UndefinedObject, match="no embedding column"):
            admin.execute(sql.SQL("SELECT cdc_embedder.{}('pg_class')").format(sql.Identifier(function)))


def test_a_column_whose_table_is_gone_can_be_paused_and_removed(admin: Connection) -> None:
    admin.execute(DOCUMENTS)
    configure(admin)
    admin.execute("DROP TABLE documents")
    admin.execute("UPDATE cdc_embedder.embedding_column SET enabled = false")
    with pytest.raises(psycopg.errors.UndefinedTable):
        admin.execute("UPDATE cdc_embedder.embedding_column SET enabled = true")
    admin.execute("DELETE FROM cdc_embedder.embedding_column")
    assert one(admin, "SELECT count(*) FROM pg_class WHERE relname ~ '^ledger'") == 0


def test_every_change_that_the_service_must_know_of_is_announced(admin: Connection) -> None:
    admin.execute(DOCUMENTS)
    admin.execute("LISTEN cdc_embedder")
    statements = {
        "INSERT INTO cdc_embedder.model (name, backend, dimensions) VALUES ('other', 'fake', 4)": {"model"},
        "SELECT cdc_embedder.add_embedding_column('documents', '{body}', 'embedding', 'other')": {
            "embedding_column",
            "scan",
        },
        "SELECT cdc_embedder.reconcile()": {"scan"},
        "SELECT cdc_embedder.retry_failed('documents')": {"retry"},
        "UPDATE cdc_embedder.scan SET unfinished = '{}', rows = 1": set(),
        "SELECT cdc_embedder.remove_embedding_column('documents', 'embedding')": {"embedding_column"},
    }
    for statement, announced in statements.items():
        admin.execute(statement)
        assert {notice.payload for notice in admin.notifies(timeout=0)} == announced, statement


def test_failed_rows_are_shown_and_retried(admin: Connection) -> None:
    admin.execute(
        "CREATE DOMAIN sku AS text; CREATE TABLE documents (id int, part sku, at date, body text, embedding real[],"
        " PRIMARY KEY (part, id, at))"
    )
    made = configure(admin)
    ledger = sql.Identifier("cdc_embedder", f"ledger_{made}")
    admin.execute(
        sql.SQL(
            "INSERT INTO {} (key_1, key_2, key_3, fingerprint, generation, state, attempts, error, retry_at) VALUES"
            " ('a%b', 7, '2026-01-02', '', 1, 'failed', 2, 'too long', now() + interval '1 h'),"
            " ('x', 8, '2026-01-02', '', 1, 'current', 0, NULL, NULL)"
        ).format(ledger)
    )
    shown = one(admin, "SELECT column_id, source_table, target_column, key, error, attempts FROM cdc_embedder.failed")
    key = {"part": "a%b", "id": 7, "at": "2026-01-02"}
    assert shown == (made, "public.documents", "embedding", key, "too long", 2)
    assert one(admin, "SELECT cdc_embedder.retry_failed('documents')") == 1
    assert one(admin, "SELECT retry_at <= clock_timestamp() FROM cdc_embedder.failed")
    admin.execute("UPDATE cdc_embedder.model SET options = %s WHERE name = 'tiny'", (Jsonb({"truncate_dim": 1}),))
    assert one(admin, "SELECT count(*) FROM cdc_embedder.failed") == 0, "of an earlier generation it is only work"
