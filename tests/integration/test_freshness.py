"""The freshness contract with the real service: vectors that are cleared, protected, waited for, and told apart."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from tests.documents import make_documents, make_model, target_type
from tests.servers import Bench, standby_of
from tests.service import (
    assert_every_vector_is_of_its_text,
    confirmed,
    fake_vector,
    running,
    standby_gone,
    until,
    wait_caught_up,
    waiting_for_standby,
)


def one(bench: Bench, statement: str, *parameters: object) -> Any:
    row = bench.admin.execute(statement, parameters or None).fetchone()  # type: ignore[arg-type]
    return None if row is None else row[0]


def make(bench: Bench, rows: int = 0, **options: object) -> None:
    """The documents, configured as `options` say."""
    make_documents(bench, rows, configure=False)
    chosen = {"when_stale": "keep", "protect": False} | options
    bench.admin.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model, when_stale,"
        " protect) VALUES ('documents', '{body}', 'embedding', 'fake', %(when_stale)s, %(protect)s)",
        chosen,
    )


def make_column(bench: Bench, target: str = "embedding") -> None:
    bench.admin.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
        " VALUES ('documents', '{body}', %s, 'fake')",
        (target,),
    )


def has_vector(bench: Bench, id: int = 1) -> bool:
    return bool(one(bench, "SELECT embedding IS NOT NULL FROM documents WHERE id = %s", id))


# when_stale = 'clear'


def test_a_text_that_changes_has_no_vector_until_it_has_its_own(installed: Bench) -> None:
    """Readers under load, in snapshots of their own: never the old vector beside the new text."""
    make_model(installed, delay_s=0.02)
    make(installed, 20, when_stale="clear")
    wrong: list[tuple[int, str]] = []
    seen = {"none": 0, "own": 0}
    ends = threading.Event()

    def read() -> None:
        with psycopg.connect(installed.dsn_admin) as session:
            session.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            while not ends.is_set():
                for id, body, vector in session.execute("SELECT id, body, embedding::real[] FROM documents"):
                    if vector is None:
                        seen["none"] += 1
                    elif abs(sum(a * b for a, b in zip(vector, fake_vector("fake", body, 8), strict=True)) - 1) < 1e-5:
                        seen["own"] += 1
                    else:
                        wrong.append((id, body))
                session.commit()

    with running(installed):
        wait_caught_up(installed)
        reader = threading.Thread(target=read)
        reader.start()
        try:
            for turn in range(40):
                installed.admin.execute("UPDATE documents SET body = 'turn ' || %s || ' of ' || id", (turn,))
                time.sleep(0.02)
            wait_caught_up(installed)
        finally:
            ends.set()
            reader.join()
        assert wrong == []
        assert seen["none"] > 0
        assert seen["own"] > 0
        assert assert_every_vector_is_of_its_text(installed) == 20


CHANGES = {
    "UPDATE documents SET body = 'TEXT 1' WHERE id = 1": False,
    "UPDATE documents SET body = NULL WHERE id = 1": False,
    "UPDATE documents SET body = body, views = views + 1 WHERE id = 1": True,
    "UPDATE documents SET views = 7, embedding = embedding WHERE id = 1": True,
    "INSERT INTO documents (id, body) VALUES (1, 'again') ON CONFLICT (id) DO UPDATE SET body = excluded.body": False,
    "INSERT INTO documents (id, body) VALUES (1, 'text 1') ON CONFLICT (id) DO UPDATE SET body = excluded.body": True,
    "ALTER TABLE documents RENAME body TO content; ALTER TABLE documents RENAME embedding TO v;"
    "ALTER TABLE documents RENAME TO papers; UPDATE papers SET content = 'other' WHERE id = 1;"
    "ALTER TABLE papers RENAME TO documents; ALTER TABLE documents RENAME v TO embedding": False,
}


@pytest.mark.parametrize("statement", CHANGES)
def test_what_clears_a_vector_and_what_does_not(installed: Bench, statement: str) -> None:
    """No service is needed for it: the trigger stands in the application's own transaction."""
    make_model(installed)
    make(installed, 1, when_stale="clear")
    installed.admin.execute(f"UPDATE documents SET embedding = '{'{' if target_type(installed) == 'real[]' else '['}"
                            f"1,0,0,0,0,0,0,0{'}' if target_type(installed) == 'real[]' else ']'}'")  # fmt: skip
    installed.admin.execute(statement)  # type: ignore[call-overload]
    assert has_vector(installed) is CHANGES[statement]


@pytest.mark.parametrize("installed", ["15-wal2json"], indirect=True)  # the other has no ICU
def test_texts_that_a_collation_calls_equal_are_others(installed: Bench) -> None:
    make_model(installed)
    make_documents(installed, configure=False)
    installed.admin.execute(
        "CREATE COLLATION caseless (provider = icu, locale = 'und-u-ks-level2', deterministic = false);"
        "ALTER TABLE documents ALTER body TYPE text COLLATE caseless;"
        "INSERT INTO documents (id, body, embedding) VALUES (1, 'hello', '{1,0,0,0,0,0,0,0}');"
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model, when_stale)"
        " VALUES ('documents', '{body}', 'embedding', 'fake', 'clear')"
    )
    assert one(installed, "SELECT body = 'HELLO' FROM documents") is True
    installed.admin.execute("UPDATE documents SET body = 'HELLO'")
    assert not has_vector(installed)


def test_it_sees_the_row_as_the_users_own_triggers_leave_it(installed: Bench) -> None:
    make_model(installed)
    make(installed, 2, when_stale="clear")
    installed.admin.execute(
        "CREATE FUNCTION shout() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN IF NEW.views = 1 THEN NEW.body := 'shouted'; END IF; RETURN NEW; END $$;"
        "CREATE TRIGGER zzz_shout BEFORE UPDATE ON documents FOR EACH ROW EXECUTE FUNCTION shout()"
    )
    with running(installed):
        wait_caught_up(installed)
        installed.admin.execute("SET session_replication_role = replica")  # ours is ENABLE ALWAYS
        installed.admin.execute("UPDATE documents SET body = 'as a replica' WHERE id = 2")
        assert not has_vector(installed, 2)
        installed.admin.execute("RESET session_replication_role")
        with installed.admin.transaction():
            installed.admin.execute("UPDATE documents SET views = 1 WHERE id = 1")
            assert not has_vector(installed, 1)
        wait_caught_up(installed)
        assert assert_every_vector_is_of_its_text(installed) == 2


def test_rows_of_partitions_are_cleared_and_move_between_them(installed: Bench) -> None:
    make_model(installed)
    installed.admin.execute(
        f"CREATE TABLE documents (id bigint, body text, embedding {target_type(installed)}, PRIMARY KEY (id))"
        " PARTITION BY RANGE (id);"
        "CREATE TABLE low PARTITION OF documents FOR VALUES FROM (0) TO (100);"
        f"CREATE TABLE high (dropped int, embedding {target_type(installed)}, body text, id bigint PRIMARY KEY);"
        "ALTER TABLE high DROP dropped;"
        "INSERT INTO documents SELECT n, 'text ' || n FROM generate_series(1, 5) n"
    )
    installed.grant("documents", ["id"], ["body"], "embedding")
    installed.admin.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model, when_stale)"
        " VALUES ('documents', '{body}', 'embedding', 'fake', 'clear');"
        "ALTER TABLE documents ATTACH PARTITION high FOR VALUES FROM (100) TO (200)"
    )
    with running(installed):
        wait_caught_up(installed)
        installed.admin.execute("UPDATE documents SET id = 101 WHERE id = 1")
        wait_caught_up(installed)
        with installed.admin.transaction():
            installed.admin.execute("UPDATE documents SET body = 'changed in high' WHERE id = 101")
            assert not has_vector(installed, 101)
            installed.admin.execute("UPDATE documents SET body = 'changed and moved', id = 102 WHERE id = 2")
            assert not has_vector(installed, 102)
        wait_caught_up(installed)
        assert assert_every_vector_is_of_its_text(installed) == 5


def test_columns_that_a_condition_names_stay_as_they_are(installed: Bench) -> None:
    """As those of a generated column do."""
    make_model(installed)
    make(installed, 1, when_stale="clear")
    with pytest.raises(psycopg.errors.DependentObjectsStillExist):
        installed.admin.execute("ALTER TABLE documents DROP COLUMN body")
    with pytest.raises(psycopg.errors.FeatureNotSupported, match="trigger"):
        installed.admin.execute("ALTER TABLE documents ALTER body TYPE varchar(100)")
    installed.admin.execute("UPDATE cdc_embedder.embedding_column SET when_stale = 'keep'")
    installed.admin.execute("ALTER TABLE documents ALTER body TYPE varchar(100)")


def test_clear_and_protect_are_switched_while_it_runs(installed: Bench) -> None:
    make_model(installed)
    make(installed, 3)
    ours = "SELECT count(*) FROM pg_trigger WHERE tgrelid = 'documents'::regclass AND NOT tgisinternal"
    with running(installed):
        wait_caught_up(installed)
        installed.admin.execute("UPDATE cdc_embedder.embedding_column SET when_stale = 'clear', protect = true")
        assert one(installed, ours) == 3
        installed.admin.execute("UPDATE documents SET body = 'changed ' || id")
        wait_caught_up(installed)
        assert assert_every_vector_is_of_its_text(installed) == 3
        installed.admin.execute("UPDATE cdc_embedder.embedding_column SET when_stale = 'keep', protect = false")
        assert one(installed, ours) == 0
        with installed.admin.transaction():
            installed.admin.execute("UPDATE documents SET body = 'again ' || id")
            assert has_vector(installed)
        installed.admin.execute("UPDATE cdc_embedder.embedding_column SET when_stale = 'clear'")
        installed.admin.execute("SELECT cdc_embedder.remove_embedding_column('documents', 'embedding')")
        assert one(installed, ours) == 0


def test_what_cannot_be_cleared_is_refused(installed: Bench, application: psycopg.Connection[Any]) -> None:
    admin = installed.admin
    admin.execute("CREATE TABLE foreign_table (id int PRIMARY KEY, body text, embedding real[])")
    configure = (
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model, when_stale)"
        " VALUES (%s, '{body}', 'embedding', 'tiny', 'clear')"
    )
    with pytest.raises(psycopg.errors.InsufficientPrivilege) as refusal:
        application.execute(configure, ("foreign_table",))
    assert "postgres" in (refusal.value.diag.message_hint or "")
    application.execute(configure, ("documents",))  # its own table
    admin.execute(
        "CREATE TABLE computed (id int PRIMARY KEY, a text, body text GENERATED ALWAYS AS (a || '!') STORED,"
        " embedding real[])"
    )
    with pytest.raises(psycopg.errors.FeatureNotSupported, match="generated source column"):
        admin.execute(configure, ("computed",))


# protect = true


def test_the_application_cannot_write_the_target_and_the_service_can(installed: Bench) -> None:
    make_model(installed)
    make(installed, 3, protect=True, when_stale="clear")
    admin = installed.admin
    with running(installed):
        wait_caught_up(installed)
        other = "[0,1,0,0,0,0,0,0]" if installed.has_vector else "{0,1,0,0,0,0,0,0}"
        for statement in (
            f"UPDATE documents SET embedding = '{other}' WHERE id = 1",
            "UPDATE documents SET embedding = NULL WHERE id = 1",
            f"UPDATE documents SET body = 'both', embedding = '{other}' WHERE id = 1",
            f"INSERT INTO documents (body, embedding) VALUES ('with a vector', '{other}')",
        ):
            with pytest.raises(psycopg.errors.GeneratedAlways, match="filled by cdc-embedder") as refusal:
                admin.execute(statement)  # type: ignore[call-overload]
            assert refusal.value.sqlstate == "428C9"
        admin.execute("UPDATE documents SET body = 'new', embedding = embedding WHERE id = 1")
        admin.execute("INSERT INTO documents (body) VALUES ('without one')")
        wait_caught_up(installed)
        assert assert_every_vector_is_of_its_text(installed) == 4


def test_a_setting_alone_does_not_make_a_writer(installed: Bench, application: psycopg.Connection[Any]) -> None:
    application.execute("INSERT INTO documents (id, body) VALUES (1, 'a')")
    application.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model, protect)"
        " VALUES ('documents', '{body}', 'embedding', 'tiny', true)"
    )
    application.execute("SET cdc_embedder.writer = on")
    with pytest.raises(psycopg.errors.GeneratedAlways):
        application.execute("UPDATE documents SET embedding = '{1,0,0,0}'")


def vector(bench: Bench, *numbers: int) -> str:
    elements = ",".join(map(str, (numbers + (0,) * 8)[:8]))
    return f"[{elements}]" if bench.has_vector else f"{{{elements}}}"


def as_service(bench: Bench, statement: str) -> None:
    """As the service writes: here in the superuser's name."""
    with bench.admin.transaction():
        bench.admin.execute("SET LOCAL cdc_embedder.writer = on")
        bench.admin.execute(statement)  # type: ignore[call-overload]


BRINGING = {
    "INSERT INTO documents (id, body, embedding) VALUES (9, 'x', '{other}')": True,
    "INSERT INTO documents (id, body, embedding) VALUES (9, 'x', DEFAULT)": False,
    "INSERT INTO documents (id, body, embedding) VALUES (9, 'x', NULL)": False,
    "INSERT INTO documents (id, body, embedding) VALUES (1, 'x', '{other}') ON CONFLICT (id) DO NOTHING": True,
    "INSERT INTO documents (id) VALUES (1) ON CONFLICT (id) DO UPDATE SET embedding = '{other}'": True,
    "INSERT INTO documents (id) VALUES (1) ON CONFLICT (id) DO UPDATE SET embedding = DEFAULT": True,
    "INSERT INTO documents (id, body) VALUES (1, 'x') ON CONFLICT (id) DO UPDATE SET body = excluded.body": False,
    "UPDATE documents SET embedding = DEFAULT": True,
    "MERGE INTO documents USING (VALUES (1)) v (n) ON id = n WHEN MATCHED THEN UPDATE SET embedding = '{other}'": True,
    "MERGE INTO documents USING (VALUES (1)) v (n) ON id = n WHEN MATCHED THEN UPDATE SET body = 'merged'": False,
    "MERGE INTO documents USING (VALUES (9)) v (n) ON id = n"
    " WHEN NOT MATCHED THEN INSERT (id, body, embedding) VALUES (n, 'x', '{other}')": True,
    "MERGE INTO documents USING (VALUES (9)) v (n) ON id = n"
    " WHEN NOT MATCHED THEN INSERT (id, body) VALUES (n, 'x')": False,
    "DELETE FROM documents": False,
}


@pytest.mark.parametrize("partitioned", [False, True])
def test_by_whichever_statement_a_vector_is_brought_it_is_refused(installed: Bench, partitioned: bool) -> None:
    make_model(installed)
    if partitioned:
        make_partitions(installed, key="(id)", by="id")
    else:
        make(installed, 5, protect=True)
    as_service(installed, f"UPDATE documents SET embedding = '{vector(installed, 1)}'")
    refused = {}
    for statement in BRINGING:
        try:
            with installed.admin.transaction():
                installed.admin.execute(statement.replace("{other}", vector(installed, 0, 1)))  # type: ignore[call-overload]
                raise psycopg.Rollback
        except psycopg.errors.GeneratedAlways:
            refused[statement] = True
        else:
            refused[statement] = False
    assert refused == BRINGING
    for columns, row in (("(id, body, embedding)", (9, "x", vector(installed, 0, 1))), ("(id, body)", (9, "x"))):
        if len(row) == 2:
            copy(installed, columns, row)
        else:
            with pytest.raises(psycopg.errors.GeneratedAlways):
                copy(installed, columns, row)


def copy(bench: Bench, columns: str, row: tuple[object, ...]) -> None:
    with bench.admin.cursor().copy(f"COPY documents {columns} FROM STDIN") as rows:  # type: ignore[arg-type]
        rows.write_row(row)


def make_partitions(bench: Bench, key: str = "(id, region)", by: str = "region", **options: object) -> None:
    """Two levels, the second by another column where `key` has two; columns in another order in one partition."""
    inner = "" if by == "id" else " PARTITION BY RANGE (id)"
    first, second = ("(0) TO (100)", "(100) TO (200)") if by == "id" else ("('a') TO ('n')", "('n') TO ('z')")
    bench.admin.execute(
        f"CREATE TABLE documents (id bigint, region text NOT NULL DEFAULT 'b', body text,"
        f" embedding {target_type(bench)}, PRIMARY KEY {key}) PARTITION BY RANGE ({by});"
        f"CREATE TABLE first PARTITION OF documents FOR VALUES FROM {first}{inner};"
        f"CREATE TABLE second (dropped int, embedding {target_type(bench)}, body text,"
        f" region text NOT NULL DEFAULT 'b', id bigint, PRIMARY KEY {key});"
        "ALTER TABLE second DROP dropped;"
        f"ALTER TABLE documents ATTACH PARTITION second FOR VALUES FROM {second}"
    )
    if inner:
        bench.admin.execute(
            "CREATE TABLE first_low PARTITION OF first FOR VALUES FROM (0) TO (100);"
            "CREATE TABLE first_high PARTITION OF first FOR VALUES FROM (100) TO (200)"
        )
    bench.admin.execute("INSERT INTO documents (id, body) SELECT n, 'text ' || n FROM generate_series(1, 5) n")
    bench.grant("documents", ["id", "region"], ["body"], "embedding")
    bench.admin.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model,"
        " when_stale, protect, on_existing)"
        " VALUES ('documents', '{body}', 'embedding', 'fake', %(when_stale)s, true, 'replace')",
        {"when_stale": "keep"} | options,
    )


MOVES = (
    "UPDATE documents SET id = 101 WHERE id = 1",  # within the inner level
    "UPDATE documents SET region = 'q' WHERE id = 101",
    "UPDATE documents SET region = 'c', id = id + 10 WHERE id = 101",
    "UPDATE documents SET id = id + 100 WHERE id IN (2, 3, 4)",  # row by row
    "UPDATE documents SET id = id - 100 WHERE id > 100",
    "WITH moved AS (UPDATE documents SET id = id + 100 WHERE id < 100 RETURNING *) SELECT count(*) FROM moved",
    "MERGE INTO documents USING (VALUES (105)) v (n) ON id = n WHEN MATCHED THEN UPDATE SET region = 'r'",
    "DO $$ BEGIN UPDATE documents SET region = 'b' WHERE id = 105; UPDATE documents SET id = 5 WHERE id = 105; END $$",
    "UPDATE documents SET id = 50 WHERE id = 5",  # which moves no row
)


def test_a_row_moves_between_partitions_and_its_vector_with_it(installed: Bench) -> None:
    """As one with a generated column does: the INSERT that it ends as is none of the application's."""
    make_model(installed)
    make_partitions(installed)
    with running(installed):
        wait_caught_up(installed)
        before = installed.admin.execute("SELECT body, embedding::real[] FROM documents ORDER BY body").fetchall()
        for statement in MOVES:
            installed.admin.execute(statement)  # type: ignore[call-overload]
        # vectors went along: none was NULL until the service came by
        assert (
            installed.admin.execute("SELECT body, embedding::real[] FROM documents ORDER BY body").fetchall() == before
        )
        wait_caught_up(installed)
        installed.admin.execute("UPDATE cdc_embedder.embedding_column SET when_stale = 'clear'")
        with installed.admin.transaction():
            installed.admin.execute("UPDATE documents SET region = 's', body = 'new ' || id")
            assert one(installed, "SELECT count(embedding) FROM documents") == 0
        wait_caught_up(installed)
        assert assert_every_vector_is_of_its_text(installed) == 5


def test_a_move_gives_no_leave_to_what_comes_after_it(installed: Bench) -> None:
    make_model(installed)
    make_partitions(installed)
    admin = installed.admin
    mine, other = vector(installed, 1), vector(installed, 0, 1)
    as_service(installed, f"UPDATE documents SET embedding = '{mine}'")
    move = "UPDATE documents SET id = 101 WHERE id = 1"
    insert = f"INSERT INTO documents (id, region, body, embedding) VALUES (60, 'q', 'x', '{mine}')"
    for statements in (
        [f"UPDATE documents SET id = 101, embedding = '{other}' WHERE id = 1"],
        [move, insert],
        [f"DO $$ BEGIN {move}; {insert}; END $$"],
        [f"WITH gone AS (DELETE FROM documents WHERE id = 1) {insert}"],
        [f"SELECT set_config('cdc_embedder.moving_1', '{mine}', true)", insert],
    ):
        with pytest.raises(psycopg.errors.GeneratedAlways):
            in_one_transaction(installed, statements)
    admin.execute(
        "CREATE FUNCTION look() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " PERFORM set_config('app.seen', current_setting('cdc_embedder.moving_1'), false); RETURN OLD; END $$;"
        "CREATE TRIGGER look BEFORE DELETE ON first_low FOR EACH ROW EXECUTE FUNCTION look()"
    )
    in_one_transaction(installed, [move, "UPDATE documents SET id = 1 WHERE id = 101"])
    assert one(installed, "SELECT length(current_setting('app.seen'))") == 64, "what a move could show was not seen"
    again = "SELECT set_config('cdc_embedder.moving_1', current_setting('app.seen'), true)"
    with pytest.raises(psycopg.errors.GeneratedAlways):
        in_one_transaction(installed, [move, again, insert])


def in_one_transaction(bench: Bench, statements: list[str]) -> None:
    with bench.admin.transaction():
        for statement in statements:
            bench.admin.execute(statement)  # type: ignore[call-overload]


# wait_until_embedded


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("to_regclass('nothing')", "source_table"),
        ("'documents', NULL", "timeout"),
        ("'documents', ignore_failed => NULL", "ignore_failed"),
    ],
)
def test_an_argument_that_is_null_is_refused(installed: Bench, arguments: str, named: str) -> None:
    make_model(installed)
    make(installed, 1)
    with pytest.raises(psycopg.errors.NullValueNotAllowed, match=named) as refusal:
        installed.admin.execute(f"SELECT cdc_embedder.wait_until_embedded({arguments})")  # type: ignore[call-overload]
    assert refusal.value.diag.message_hint


def test_a_lock_that_a_stranger_keeps_to_himself_holds_nobody_up(installed: Bench) -> None:
    """Any role may take those by which the service knows that somebody waits."""
    make_model(installed)
    make(installed, 3)
    held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
    with running(installed), psycopg.connect(installed.dsn_admin, autocommit=True) as stranger:
        wait_caught_up(installed)
        stranger.execute("SELECT pg_advisory_lock(1667523429, 1), pg_advisory_lock(1667523429, 2)")
        installed.admin.execute("SET statement_timeout = '100s'")
        for turn in range(3):
            installed.admin.execute("UPDATE documents SET body = %s WHERE id = 1", (f"turn {turn}",))
            installed.admin.execute("SELECT cdc_embedder.wait_until_embedded('documents', '90 s')")
            assert embedded(installed, fake_vector("fake", f"turn {turn}", 8))
        with psycopg.connect(installed.dsn_admin) as holder:
            installed.admin.execute("UPDATE documents SET body = 'locked' WHERE id = 1")
            holder.execute("SELECT FROM documents WHERE id = 1 FOR UPDATE")
            with pytest.raises(psycopg.errors.CannotConnectNow, match="was not embedded within"):
                installed.admin.execute("SELECT cdc_embedder.wait_until_embedded('documents', '1 s')")
            stranger.execute("SELECT pg_advisory_unlock_all()")
            with pytest.raises(psycopg.errors.CannotConnectNow, match="was not embedded within"):
                installed.admin.execute("SELECT cdc_embedder.wait_until_embedded('documents', '1 s')")
        assert one(installed, held) == 0


def test_a_table_that_scans_alone_feed_is_not_waited_for(installed: Bench) -> None:
    make_model(installed)
    make_documents(installed, 3, configure=False)
    installed.admin.execute("ALTER TABLE documents SET UNLOGGED")
    make_column(installed)
    wait = "SELECT cdc_embedder.wait_until_embedded('documents', '150 s')"
    with running(installed) as service:
        until(lambda: one(installed, "SELECT count(embedding) FROM documents") == 3, "no scan", lambda: service.log)
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="the table is unlogged") as refusal:
            installed.admin.execute(wait)
        assert "SET LOGGED" in (refusal.value.diag.message_hint or "")
        installed.admin.execute("ALTER TABLE documents SET LOGGED")
        installed.admin.execute("UPDATE cdc_embedder.embedding_column SET source_table = source_table")  # publishes it
        until(lambda: waited(installed, wait), "for ever refused", lambda: service.log)


def waited(bench: Bench, statement: str) -> bool:
    try:
        bench.admin.execute(statement)  # type: ignore[call-overload]
    except psycopg.errors.ObjectNotInPrerequisiteState:
        return False
    return True


def test_a_standby_refuses_to_wait_and_to_ask(bench18: Bench) -> None:
    make_model(bench18)
    make(bench18, 1)
    with standby(bench18) as session:
        until(lambda: followed(session), "the standby never follows")
        for statement in (
            "SELECT cdc_embedder.wait_until_embedded('documents')",
            "SELECT cdc_embedder.embed('fake', 'a')",
        ):
            with pytest.raises(psycopg.errors.ReadOnlySqlTransaction, match="a standby cannot") as refusal:
                session.execute(statement)  # type: ignore[call-overload]
            assert "Ask the primary" in (refusal.value.diag.message_hint or "")


@contextmanager
def standby(bench: Bench) -> Iterator[psycopg.Connection[Any]]:
    with tempfile.TemporaryDirectory(prefix="cdc-embedder-", ignore_cleanup_errors=True) as directory:
        Path(directory).chmod(0o755)
        with (
            standby_of(bench.server, Path(directory)) as server,
            psycopg.connect(server.dsn(bench.database), autocommit=True) as session,
        ):
            yield session


def followed(session: psycopg.Connection[Any]) -> bool:
    return session.execute("SELECT FROM cdc_embedder.embedding_column").fetchone() is not None


@pytest.mark.parametrize("spill", ["10", "0.05"])
def test_what_was_committed_before_the_call_is_embedded_when_it_returns(installed: Bench, spill: str) -> None:
    """Hundreds of times, while another session keeps the model busy, and with keys that go through the backlog."""
    make_model(installed, delay_s=0.01)
    make(installed, 200)
    ends = threading.Event()

    def disturb() -> None:
        with psycopg.connect(installed.dsn_admin, autocommit=True) as session:
            while not ends.is_set():
                session.execute("UPDATE documents SET body = body || '.' WHERE id = 1 + (random() * 199)::int")
                time.sleep(0.01)

    with running(installed, CDC_EMBEDDER_SPILL_AFTER_S=spill) as service:
        wait_caught_up(installed)
        other = threading.Thread(target=disturb)
        other.start()
        try:
            for turn in range(40):
                installed.admin.execute("SET synchronous_commit = %s" % ("off" if turn % 2 else "on"))  # type: ignore[call-overload]
                id = one(installed, "INSERT INTO documents (body) VALUES ('turn ' || %s) RETURNING id", turn)
                installed.admin.execute("SELECT cdc_embedder.wait_until_embedded('documents', '150 s')")
                assert has_vector(installed, id), turn
        finally:
            ends.set()
            other.join()
        installed.admin.execute("SET synchronous_commit = on")
        wait_caught_up(installed)
        assert service.stop() == 0


def test_an_idle_service_answers_and_a_role_needs_execute_alone(installed: Bench) -> None:
    make_model(installed)
    make(installed, 3)
    role = sql.Identifier(f"waiter_{installed.database}")
    installed.admin.execute(
        sql.SQL(
            "CREATE ROLE {0} LOGIN; GRANT USAGE ON SCHEMA cdc_embedder TO {0}; GRANT EXECUTE ON FUNCTION"
            " cdc_embedder.wait_until_embedded(regclass, interval, boolean), cdc_embedder.embedded_through(regclass)"
            " TO {0}"
        ).format(role)
    )
    try:
        with running(installed):
            wait_caught_up(installed)
            dsn = installed.server.dsn(installed.database, f"waiter_{installed.database}")
            with psycopg.connect(dsn) as session:  # in an open transaction
                for _ in range(3):
                    session.execute("SELECT cdc_embedder.wait_until_embedded('documents', '150 s')")
                through = session.execute("SELECT cdc_embedder.embedded_through('documents') <= pg_current_wal_lsn()")
                assert through.fetchone() == (True,)
    finally:
        installed.admin.execute(sql.SQL("DROP OWNED BY {0} CASCADE; DROP ROLE {0}").format(role))


@pytest.mark.parametrize("spill", ["10", "0"])
def test_it_waits_for_what_is_locked_and_says_how_far_it_is(installed: Bench, spill: str) -> None:
    """Spilled, the key does not hold the slot any more: its row of the backlog is what tells."""
    make_model(installed, delay_s=1)
    make(installed, 3)
    with running(installed, CDC_EMBEDDER_SPILL_AFTER_S=spill):
        wait_caught_up(installed)
        with psycopg.connect(installed.dsn_admin) as holder:
            installed.admin.execute("UPDATE documents SET body = 'changed, then locked' WHERE id = 1")
            holder.execute("SELECT FROM documents WHERE id = 1 FOR UPDATE")
            changed = one(installed, "SELECT pg_current_wal_insert_lsn()")
            if spill == "0":
                until(lambda: confirmed(installed, changed), "it was not spilled")
            assert not embedded(installed, vector := fake_vector("fake", "changed, then locked", 8))
            with pytest.raises(psycopg.errors.CannotConnectNow, match="was not embedded within") as late:
                installed.admin.execute("SELECT cdc_embedder.wait_until_embedded('documents', '2 s')")
            assert "Embedded through" in (late.value.diag.message_detail or "")
            assert not embedded(installed, vector)
            assert one(installed, "SELECT cdc_embedder.embedded_through('documents') < %s", changed)
        installed.admin.execute("SELECT cdc_embedder.wait_until_embedded('documents', '150 s')")
        assert embedded(installed, vector)


def embedded(bench: Bench, vector: Any) -> bool:
    found = one(bench, "SELECT embedding::real[] FROM documents WHERE id = 1")
    return found is not None and abs(float(sum(a * b for a, b in zip(found, vector, strict=True))) - 1) < 1e-5


def test_a_commit_that_is_not_visible_yet_is_not_waited_past(installed: Bench) -> None:
    """It hangs for a standby: decoded, and seen by nobody. What the service cannot judge holds the position."""
    make_model(installed)
    make(installed, 3)
    with running(installed):
        wait_caught_up(installed)
        writer = psycopg.connect(installed.dsn_admin, autocommit=True)
        with standby_gone(installed):
            commit = threading.Thread(target=writer.execute, args=("UPDATE documents SET body = 'late' WHERE id = 1",))
            commit.start()
            until(lambda: waiting_for_standby(installed), "no wait")
            installed.admin.execute("SET synchronous_commit = local")
            with pytest.raises(psycopg.errors.CannotConnectNow, match="was not embedded within"):
                installed.admin.execute("SELECT cdc_embedder.wait_until_embedded('documents', '500 ms')")
        commit.join()
        writer.close()
        installed.admin.execute("SELECT cdc_embedder.wait_until_embedded('documents', '150 s')")
        assert assert_every_vector_is_of_its_text(installed) == 3


def test_what_would_prove_nothing_is_refused_at_once(installed: Bench) -> None:
    make_model(installed, reject="poison", delay_per_text_s=0.005)
    admin = installed.admin
    wait = "SELECT cdc_embedder.wait_until_embedded('documents', '150 s')"
    admin.execute("CREATE TABLE unknown (id int)")
    with pytest.raises(psycopg.errors.UndefinedObject, match="no embedding column"):
        admin.execute("SELECT cdc_embedder.wait_until_embedded('unknown')")
    with pytest.raises(psycopg.errors.UndefinedObject, match="no embedding column"):
        admin.execute("SELECT cdc_embedder.embedded_through('unknown')")
    make(installed, 1000)
    with pytest.raises(psycopg.errors.CannotConnectNow, match="no service runs"):
        admin.execute(wait)
    admin.execute("SET default_transaction_isolation = 'repeatable read'")
    with pytest.raises(psycopg.errors.InvalidTransactionState, match="REPEATABLE READ"):
        admin.execute(wait)
    admin.execute("RESET default_transaction_isolation")
    with running(installed) as service:
        until(lambda: one(installed, "SELECT state FROM cdc_embedder.status") == "backfilling", "never backfills")
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="is being backfilled"):
            admin.execute(wait)
        wait_caught_up(installed)
        admin.execute(wait)
        admin.execute("UPDATE documents SET body = 'poison' WHERE id = 1")
        until(lambda: one(installed, "SELECT failed FROM cdc_embedder.status") == 1, "never fails", lambda: service.log)
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="cannot be embedded"):
            admin.execute(wait)
        admin.execute("SELECT cdc_embedder.wait_until_embedded('documents', '150 s', ignore_failed => true)")
        admin.execute("UPDATE documents SET body = 'harmless' WHERE id = 1")
        admin.execute("UPDATE cdc_embedder.model SET document_prompt = 'of another generation: '")
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="is being backfilled"):
            admin.execute(wait)
        admin.execute("SELECT cdc_embedder.pause('documents')")
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="is not served"):
            admin.execute(wait)


# Which rows are current


def test_current_rows_are_told_from_others(installed: Bench) -> None:
    make_model(installed)
    admin = installed.admin
    admin.execute(
        f"CREATE TABLE papers (a text, n int, title text, body varchar(60), embedding {target_type(installed)},"
        " PRIMARY KEY (n, a));"
        "INSERT INTO papers (a, n, title, body) SELECT 'k' || n, n, CASE WHEN n % 3 > 0 THEN 'größe ' || n END,"
        " CASE WHEN n % 2 > 0 THEN E'tab\\t{brace}' || n END FROM generate_series(1, 12) n"
    )
    installed.grant("papers", ["a", "n"], ["title", "body"], "embedding")
    admin.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
        " VALUES ('papers', '{title,body}', 'embedding', 'fake')"
    )
    current = "SELECT array_agg(n ORDER BY n) FROM cdc_embedder.fresh(NULL::papers, 'embedding')"
    renamed = "SELECT array_agg(n ORDER BY n) FROM cdc_embedder.fresh(NULL::papers, 'The Vector')"
    with running(installed) as service:
        wait_caught_up(installed)
        assert one(installed, current) == list(range(1, 13)), "6 and 12 have no text, and no vector"
        assert service.stop() == 0
    admin.execute("UPDATE papers SET title = 'changed' WHERE n = 1; UPDATE papers SET embedding = NULL WHERE n = 2;"
                  "UPDATE papers SET body = '' WHERE n = 4; UPDATE papers SET title = 'now' WHERE n = 6;"
                  "UPDATE papers SET embedding = p.embedding FROM papers p WHERE p.n = 5 AND papers.n = 3")  # fmt: skip
    assert one(installed, current) == [5, 7, 8, 9, 10, 11, 12]
    where = "SELECT array_agg(n ORDER BY n) FROM papers p WHERE NOT cdc_embedder.is_current(p, 'embedding')"
    assert one(installed, where) == [1, 2, 3, 4, 6]
    with pytest.raises(psycopg.errors.UndefinedObject, match="is not configured"):
        admin.execute("SELECT cdc_embedder.is_current(p, 'title') FROM papers p")
    admin.execute('ALTER TABLE papers RENAME embedding TO "The Vector"')
    assert one(installed, renamed) == [5, 7, 8, 9, 10, 11, 12]
    assert one(installed, current) == [5, 7, 8, 9, 10, 11, 12], "by the name that embedding_column shows"
    admin.execute('ALTER TABLE papers RENAME "The Vector" TO embedding')
    admin.execute("UPDATE cdc_embedder.embedding_column SET separator = ' '")
    assert one(installed, current) == [12], "of another generation"


def test_columns_that_swapped_their_names_are_known_by_those_they_have(installed: Bench) -> None:
    make_model(installed)
    make_documents(installed, 3, configure=False)
    admin = installed.admin
    admin.execute(f"ALTER TABLE documents ADD other {target_type(installed)}")
    installed.grant("documents", ["id"], ["body"], "other")
    make_column(installed)
    make_column(installed, "other")
    with running(installed):
        wait_caught_up(installed)
    admin.execute(
        "ALTER TABLE documents RENAME embedding TO e; ALTER TABLE documents RENAME other TO embedding;"
        "ALTER TABLE documents RENAME e TO other"
    )
    admin.execute("UPDATE documents SET other = NULL")
    fresh = "SELECT count(*) FROM cdc_embedder.fresh(NULL::documents, %s)"
    assert [one(installed, fresh, name) for name in ("embedding", "other")] == [3, 0]
    searched = "SELECT statement FROM cdc_embedder._search_column('documents', %s)"
    assert "t.other" in one(installed, searched, "other")
    first = one(installed, "SELECT id FROM cdc_embedder.embedding_column WHERE target_column = 'embedding'")
    admin.execute("SELECT cdc_embedder.remove_embedding_column('documents', 'other')")
    assert one(installed, "SELECT count(*) FROM cdc_embedder.embedding_column WHERE id = %s", first) == 0
    admin.execute('ALTER TABLE documents RENAME embedding TO "The Vector"')
    admin.execute("SELECT cdc_embedder.remove_embedding_column('documents', 'The Vector')")
    assert one(installed, "SELECT count(*) FROM cdc_embedder.embedding_column") == 0


def test_what_is_fresh_is_read_with_the_callers_rights(bench18: Bench) -> None:
    make_model(bench18)
    make(bench18, 4)
    role = sql.Identifier(f"reader_{bench18.database}")
    bench18.admin.execute(
        sql.SQL(
            "CREATE ROLE {0} LOGIN; GRANT USAGE ON SCHEMA cdc_embedder TO {0}; GRANT EXECUTE ON FUNCTION"
            " cdc_embedder.fresh(anyelement, name), cdc_embedder.is_current(anyelement, name) TO {0};"
            "GRANT SELECT ON documents TO {0}; CREATE POLICY few ON documents TO {0} USING (id <= 2)"
        ).format(role)
    )
    try:
        with running(bench18):
            wait_caught_up(bench18)
        bench18.admin.execute("ALTER TABLE documents ENABLE ROW LEVEL SECURITY")
        dsn = bench18.server.dsn(bench18.database, f"reader_{bench18.database}")
        with psycopg.connect(dsn, autocommit=True) as session:
            found = session.execute("SELECT id FROM cdc_embedder.fresh(NULL::documents, 'embedding') ORDER BY id")
            assert found.fetchall() == [(1,), (2,)]
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                session.execute("SELECT * FROM cdc_embedder.ledger_1")
    finally:
        bench18.admin.execute(sql.SQL("DROP OWNED BY {0} CASCADE; DROP ROLE {0}").format(role))
