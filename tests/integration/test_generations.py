"""Which changes make a new generation, and when it begins (rule 4)."""

from __future__ import annotations

import threading

import psycopg
import pytest

from tests.configuring import DOCUMENTS, Connection, column, configure, generations, one, wait_until_blocked
from tests.servers import Bench


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE cdc_embedder.embedding_column SET model = 'other'",
        "UPDATE cdc_embedder.embedding_column SET source_columns = '{title}'",
        "UPDATE cdc_embedder.embedding_column SET source_columns = '{title,body}'",
        "UPDATE cdc_embedder.embedding_column SET separator = ' '",
        "UPDATE cdc_embedder.model SET source = 'x'",
        "UPDATE cdc_embedder.model SET revision = 'x'",
        "UPDATE cdc_embedder.model SET backend = 'local'",
        "UPDATE cdc_embedder.model SET dimensions = 5",
        "UPDATE cdc_embedder.model SET max_tokens = 5",
        "UPDATE cdc_embedder.model SET document_prompt = 'passage: '",
        "UPDATE cdc_embedder.model SET normalize = false",
        "UPDATE cdc_embedder.model SET dtype = 'bfloat16'",
        """UPDATE cdc_embedder.model SET options = '{"truncate_dim": 3}'""",
    ],
)
def test_a_setting_that_decides_the_vector_makes_a_new_generation(admin: Connection, change: str) -> None:
    admin.execute("INSERT INTO cdc_embedder.model (name, backend, dimensions) VALUES ('other', 'fake', 4)")
    admin.execute(DOCUMENTS)
    configure(admin)
    admin.execute("UPDATE cdc_embedder.scan SET requested_at = NULL")
    admin.execute(change)
    assert generations(admin) == [(1, False), (2, True)]
    assert column(admin, "generation") == 2
    assert one(admin, "SELECT requested_at IS NOT NULL, reason FROM cdc_embedder.scan") == (True, "settings changed")
    assert one(admin, "SELECT count(DISTINCT settings) FROM cdc_embedder.generation") == 2


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE cdc_embedder.model SET query_prompt = 'query: '",
        "UPDATE cdc_embedder.model SET trust_remote_code = true",
        """UPDATE cdc_embedder.model SET options = '{"base_url": "http://b/v1", "timeout_s": 9}'""",
        "UPDATE cdc_embedder.embedding_column SET priority = 5",
        "UPDATE cdc_embedder.embedding_column SET enabled = false",
        "UPDATE cdc_embedder.embedding_column SET on_existing = 'replace'",
        "UPDATE cdc_embedder.embedding_column SET slot = 'another'",
        "ALTER TABLE documents RENAME body TO content; UPDATE cdc_embedder.embedding_column SET separator = separator",
    ],
)
def test_a_setting_that_leaves_the_vector_alone_makes_none(admin: Connection, change: str) -> None:
    admin.execute(DOCUMENTS)
    configure(admin)
    admin.execute(change)
    assert generations(admin) == [(1, True)]


def test_a_generation_is_superseded_only_after_the_write_back_that_holds_it(
    installed: Bench, admin: Connection
) -> None:
    admin.execute(DOCUMENTS)
    configure(admin)
    change = "UPDATE cdc_embedder.embedding_column SET separator = ' '"
    with (
        psycopg.connect(installed.dsn_service) as writer,
        psycopg.connect(installed.dsn_admin, autocommit=True) as watcher,
    ):
        writer.execute("SELECT FROM cdc_embedder.generation WHERE superseded_at IS NULL FOR SHARE")
        changer = threading.Thread(target=admin.execute, args=(change,))
        changer.start()
        wait_until_blocked(watcher, admin)
        assert generations(watcher) == [(1, True)]
        writer.commit()
        changer.join()
    assert generations(admin) == [(1, False), (2, True)]


def test_a_column_configured_while_its_model_changes_has_the_new_settings(installed: Bench, admin: Connection) -> None:
    admin.execute(DOCUMENTS)
    with (
        psycopg.connect(installed.dsn_admin) as changer,
        psycopg.connect(installed.dsn_admin, autocommit=True) as watcher,
    ):
        changer.execute("UPDATE cdc_embedder.model SET max_tokens = 7 WHERE name = 'tiny'")
        inserter = threading.Thread(target=configure, args=(admin,))
        inserter.start()
        wait_until_blocked(watcher, admin)
        changer.commit()
        inserter.join()
    assert one(admin, "SELECT settings -> 'max_tokens' FROM cdc_embedder.generation") == 7


def test_a_model_that_cannot_be_is_refused(installed: Bench, admin: Connection) -> None:
    with pytest.raises(psycopg.errors.CheckViolation, match="backend"):
        admin.execute("UPDATE cdc_embedder.model SET backend = 'rai' WHERE name = 'tiny'")
    admin.execute("INSERT INTO cdc_embedder.model (name, backend, dimensions) VALUES ('r', 'ray', 4)")
    if installed.has_vector:  # an array declares no dimensions
        admin.execute("CREATE TABLE documents (id int PRIMARY KEY, body text, embedding vector(4))")
        configure(admin)
        with pytest.raises(psycopg.errors.DatatypeMismatch, match=r"vector\(4\)"):
            admin.execute("UPDATE cdc_embedder.model SET dimensions = 5 WHERE name = 'tiny'")


def test_a_renamed_model_takes_its_columns_along(admin: Connection) -> None:
    admin.execute(DOCUMENTS)
    configure(admin)
    admin.execute("UPDATE cdc_embedder.model SET name = 'small' WHERE name = 'tiny'")
    assert column(admin, "model, generation") == ("small", 2)
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        admin.execute("DELETE FROM cdc_embedder.model WHERE name = 'small'")
