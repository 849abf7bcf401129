"""What makes the stream cheaper with pgoutput, without losing anything: binary values, and keys alone."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from tests.documents import make_documents, make_model
from tests.service import assert_every_vector_is_of_its_text, running, status, until, wait_caught_up

LISTED = (
    "SELECT array_agg(a.attname::text ORDER BY a.attnum) FROM pg_publication_rel r"
    " JOIN pg_attribute a ON a.attrelid = r.prrelid AND a.attnum = ANY (r.prattrs::int2[])"
)


def test_a_key_that_cannot_be_read_in_binary_has_the_stream_started_again_in_text(bench18: Any) -> None:
    make_model(bench18)
    make_documents(bench18, 5)
    bench18.admin.execute("CREATE TABLE others (id numeric PRIMARY KEY, body text, embedding real[])")
    bench18.grant("others", ["id"], ["body"], "embedding")
    with running(bench18) as service:
        wait_caught_up(bench18)
        assert "(pgoutput, binary)" in service.log
        assert "(pgoutput)" not in service.log
        bench18.admin.execute(
            "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
            " VALUES ('others', '{body}', 'embedding', 'fake')"
        )
        service.wait_for_log("(pgoutput)")
        wait_caught_up(bench18)
        bench18.admin.execute("INSERT INTO others VALUES (1.50, 'one and a half'), ('NaN', 'no number')")
        bench18.admin.execute("INSERT INTO documents (body) VALUES ('beside it')")
        wait_caught_up(bench18)
        assert bench18.admin.execute("SELECT count(embedding) FROM others").fetchone() == (2,)
        assert assert_every_vector_is_of_its_text(bench18) == 6


def test_a_type_whose_binary_form_fails_does_not_hold_the_slot(bench18: Any) -> None:
    make_model(bench18)
    make_documents(bench18, 5)
    admin = bench18.admin
    admin.execute("CREATE EXTENSION citext")
    admin.execute(
        "CREATE FUNCTION refuses(citext) RETURNS bytea LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'there is no binary form'; END $$"
    )
    admin.execute("ALTER TYPE citext SET (SEND = refuses)")
    admin.execute("ALTER TABLE documents ADD note citext")
    with running(bench18) as service:
        wait_caught_up(bench18)
        admin.execute("INSERT INTO documents (body, note) VALUES ('with a note', 'a note')")
        wait_caught_up(bench18)
        assert "there is no binary form" in service.log
        assert "made the slot" in service.log
        assert service.log.count("made the slot") == 1, "the slot need not be made anew"
        assert assert_every_vector_is_of_its_text(bench18) == 6


def test_keys_only_publishes_the_key_alone_and_every_row_is_embedded(bench18: Any) -> None:
    make_model(bench18)
    make_documents(bench18, 5, configure=False)
    admin = bench18.admin
    admin.execute(
        "SELECT cdc_embedder.add_embedding_column('documents', '{body}', 'embedding', 'fake', keys_only => true)"
    )
    assert admin.execute(LISTED).fetchone() == (["id"],)
    with running(bench18):
        wait_caught_up(bench18)
        admin.execute("UPDATE documents SET body = body || ' changed' WHERE id < 3")
        admin.execute("UPDATE documents SET id = 100, body = 'moved' WHERE id = 4")
        admin.execute("INSERT INTO documents (body) VALUES ('new')")
        wait_caught_up(bench18)
        assert assert_every_vector_is_of_its_text(bench18) == 6
        # Changed while it runs: the table is published anew in one transaction, and no change is missed.
        admin.execute("UPDATE cdc_embedder.embedding_column SET keys_only = false")
        assert admin.execute(LISTED).fetchone() == (None,)
        admin.execute("UPDATE documents SET body = body || ' again'")
        wait_caught_up(bench18)
        assert assert_every_vector_is_of_its_text(bench18) == 6
        assert "fed by scans" not in (status(bench18)[0]["reason"] or "")


@pytest.mark.parametrize("identity", ["FULL", "USING INDEX other"])
def test_rule_11_keys_only_and_another_identity_do_not_stop_the_application(bench18: Any, identity: str) -> None:
    make_model(bench18)
    make_documents(bench18, 5, configure=False)
    admin = bench18.admin
    admin.execute("ALTER TABLE documents ADD CONSTRAINT positive CHECK (views >= 0)")
    admin.execute("CREATE UNIQUE INDEX other ON documents (id, views)")
    add = "SELECT cdc_embedder.add_embedding_column('documents', '{body}', 'embedding', 'fake', keys_only => true)"
    admin.execute(f"ALTER TABLE documents REPLICA IDENTITY {identity}")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="another replica identity"):
        admin.execute(add)
    admin.execute("ALTER TABLE documents REPLICA IDENTITY DEFAULT")
    admin.execute(add)
    with running(bench18):
        wait_caught_up(bench18)
        admin.execute(f"ALTER TABLE documents REPLICA IDENTITY {identity}")
        until(lambda: status(bench18)[0]["state"] == "error", "never noticed", lambda: status(bench18))
        assert "beyond the keys" in status(bench18)[0]["reason"]
        admin.execute("UPDATE documents SET body = 'the application goes on'")  # fails where still published
        admin.execute("ALTER TABLE documents REPLICA IDENTITY DEFAULT")
        until(lambda: '("id")' in (status(bench18)[0]["reason"] or ""), "no remedy", lambda: status(bench18))
        admin.execute(f"ALTER PUBLICATION {bench18.slot} ADD TABLE documents (id)")
        wait_caught_up(bench18)
        assert assert_every_vector_is_of_its_text(bench18) == 5
