"""The service as a process against real servers: every way in which a row can change, on each server and plugin."""

from __future__ import annotations

import signal
import threading
from typing import Any

import psycopg
import pytest

from tests.documents import configure_documents, embedded_at, make_documents, make_model, target_type
from tests.service import (
    assert_every_vector_is_of_its_text,
    confirmed,
    running,
    standby_gone,
    status,
    until,
    wait_caught_up,
    waiting_for_standby,
)


def test_rows_that_exist_are_backfilled_and_every_kind_of_change_is_followed(bench: Any) -> None:
    make_model(bench)
    make_documents(bench, 700)
    with running(bench) as service:
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench) == 700
        admin = bench.admin
        admin.execute("INSERT INTO documents (body) SELECT 'more ' || n FROM generate_series(1, 50) n")
        admin.execute("UPDATE documents SET body = 'changed ' || id WHERE id <= 40")
        admin.execute("DELETE FROM documents WHERE id BETWEEN 30 AND 60")
        with admin.cursor().copy("COPY documents (body) FROM STDIN") as copy:
            for n in range(100):
                copy.write_row((f"copied {n}",))
        admin.execute("UPDATE documents SET id = id + 100000 WHERE id BETWEEN 100 AND 110")
        admin.execute("DELETE FROM documents WHERE id = 200")
        admin.execute("INSERT INTO documents (id, body) VALUES (200, 'the key is used again')")
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench) == 700 + 50 - 31 + 100
        assert service.stop() == 0


def test_one_transaction_over_several_tables_is_followed_in_all_of_them(bench: Any) -> None:
    make_model(bench)
    make_documents(bench)
    bench.admin.execute("CREATE TABLE notes (owner int, number int, note text, v real[], PRIMARY KEY (number, owner))")
    bench.grant("notes", ["owner", "number"], ["note"], "v")
    bench.admin.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
        " VALUES ('notes', '{note}', 'v', 'fake')"
    )
    with running(bench):
        with bench.admin.transaction():
            bench.admin.execute("INSERT INTO documents (body) SELECT 'a ' || n FROM generate_series(1, 30) n")
            bench.admin.execute("INSERT INTO notes SELECT n % 3, n, 'b ' || n FROM generate_series(1, 30) n")
            bench.admin.execute("SAVEPOINT s")
            bench.admin.execute("INSERT INTO notes SELECT 9, n, 'never' FROM generate_series(1, 5) n")
            bench.admin.execute("ROLLBACK TO s")
            bench.admin.execute("UPDATE documents SET body = 'c ' || id WHERE id < 10")
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench) == 30
        assert assert_every_vector_is_of_its_text(bench, "notes", "note", "v") == 30


def test_null_clears_the_vector_and_an_emptied_text_is_a_text(bench: Any) -> None:
    make_model(bench)
    make_documents(bench, 5)
    with running(bench):
        wait_caught_up(bench)
        bench.admin.execute("UPDATE documents SET body = NULL WHERE id <= 2")
        bench.admin.execute("UPDATE documents SET body = '' WHERE id = 3")
        wait_caught_up(bench)
        assert_every_vector_is_of_its_text(bench)
        bench.admin.execute("UPDATE documents SET body = 'back' WHERE id = 1")
        wait_caught_up(bench)
        assert_every_vector_is_of_its_text(bench)
        [row] = status(bench)
        assert (row["rows"], row["null"], row["current"], row["failed"]) == (5, 1, 4, 0)


def test_a_change_of_another_column_costs_no_model_call_and_a_spoiled_vector_does(bench: Any) -> None:
    make_model(bench)
    make_documents(bench, 20)
    with running(bench):
        wait_caught_up(bench)
        before = embedded_at(bench)
        bench.admin.execute("UPDATE documents SET views = views + 1")
        bench.admin.execute("UPDATE documents SET body = body WHERE id < 5")
        wait_caught_up(bench)
        assert embedded_at(bench) == before
        bench.admin.execute(
            "UPDATE documents SET embedding = (SELECT embedding FROM documents WHERE id = 1) WHERE id = 2"
        )
        bench.admin.execute("UPDATE documents SET embedding = NULL WHERE id = 3")
        until(lambda: len(changed := {k for k, v in embedded_at(bench).items() if v != before[k]}) == 2
              and changed == {2, 3}, "the vectors were not mended")  # fmt: skip
        wait_caught_up(bench)
        assert_every_vector_is_of_its_text(bench)


def test_an_unchanged_toasted_text_is_not_taken_for_a_missing_one(bench: Any) -> None:
    make_model(bench)
    make_documents(bench)
    bench.admin.execute("ALTER TABLE documents ALTER body SET STORAGE EXTERNAL")
    bench.admin.execute(
        "INSERT INTO documents (body) SELECT repeat('long ' || n || ' ', 2000) FROM generate_series(1, 4) n"
    )
    with running(bench):
        wait_caught_up(bench)
        bench.admin.execute("UPDATE documents SET views = 1")
        bench.admin.execute("UPDATE documents SET embedding = NULL WHERE id = 2")
        bench.admin.execute("UPDATE documents SET id = 77 WHERE id = 3")
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench) == 4


def test_the_echo_of_a_write_back_ends_and_an_idle_service_writes_nothing(bench: Any) -> None:
    make_model(bench)
    make_documents(bench, 300)
    with running(bench):
        wait_caught_up(bench)
        until(lambda: all(row["pending"] == 0 for row in status(bench)), "keys kept coming back")
        positions: list[str] = []

        def stands_still() -> bool:
            positions.append(bench.admin.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()[0])
            bench.admin.execute("SELECT pg_sleep(0.5)")
            return len(positions) > 8 and len(set(positions[-8:])) == 1

        # the server itself logs a snapshot of running transactions after 15 seconds, and checkpoints
        until(stands_still, "the server's WAL position never stood still", lambda: positions[-10:])
        versions = bench.admin.execute("SELECT count(*) FROM cdc_embedder.ledger_1").fetchone()[0]
        assert versions == 300


def test_rule_2_a_row_that_is_decoded_but_not_visible_is_not_judged(bench: Any) -> None:
    make_model(bench)
    make_documents(bench, 3)
    with running(bench):
        wait_caught_up(bench)
        writer = psycopg.connect(bench.dsn_admin, autocommit=True)
        with standby_gone(bench):
            insert = "INSERT INTO documents (id, body) VALUES (100, 'waits for a standby')"
            waiting = threading.Thread(target=writer.execute, args=(insert,))
            waiting.start()
            until(lambda: waiting_for_standby(bench), "the INSERT never waited for its standby")
            bench.admin.execute("SET synchronous_commit = local")
            bench.admin.execute("UPDATE documents SET body = 'later, and visible' WHERE id = 1")
            until(
                lambda: 1 in _with_text(bench, "later, and visible"),
                "a later commit was held up by an invisible one",
            )
            assert bench.admin.execute("SELECT count(*) FROM documents WHERE id = 100").fetchone()[0] == 0
            until(lambda: [row["pending"] for row in status(bench)] == [1], "the key was not kept")
        waiting.join()
        writer.close()
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench) == 4


def _with_text(bench: Any, text: str) -> set[int]:
    from tests.service import fake_vector  # the oracle

    vector = [float(x) for x in fake_vector("fake", text, 8)]
    found = bench.admin.execute("SELECT id, embedding::real[] FROM documents WHERE embedding IS NOT NULL").fetchall()
    return {id for id, stored in found if all(abs(a - b) < 1e-3 for a, b in zip(stored, vector, strict=True))}


def test_keepalives_are_answered_while_the_model_takes_longer_than_the_timeout(bench: Any) -> None:
    make_model(bench, delay_s=10)
    make_documents(bench, 1)
    with running(bench, CDC_EMBEDDER_WAL_SENDER_TIMEOUT_S="3") as service:
        service.wait_for_log("streaming from the slot")
        first = bench.admin.execute("SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s", (bench.slot,))
        sender = first.fetchone()[0]
        wait_caught_up(bench)
        bench.admin.execute("INSERT INTO documents (body) VALUES ('while it works')")
        wait_caught_up(bench)
        now = bench.admin.execute("SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s", (bench.slot,))
        assert now.fetchone()[0] == sender
        assert service.log.count("streaming from the slot") == 1
        assert_every_vector_is_of_its_text(bench)


def test_an_idle_service_confirms_what_another_database_writes(bench: Any) -> None:
    make_model(bench)
    make_documents(bench, 1)
    with running(bench):
        wait_caught_up(bench)
        with psycopg.connect(bench.server.dsn("postgres"), autocommit=True) as other:
            other.execute("CREATE TABLE IF NOT EXISTS busy_neighbour (n int)")
            other.execute("INSERT INTO busy_neighbour SELECT generate_series(1, 20000)")
            target = other.execute("SELECT pg_current_wal_insert_lsn()").fetchone()[0]  # type: ignore[index]
            other.execute("DROP TABLE busy_neighbour")
        until(lambda: confirmed(bench, target), "the neighbour's WAL stayed pinned")


def test_sigterm_finishes_the_batch_in_hand_and_nothing_is_done_twice(bench: Any) -> None:
    make_model(bench, delay_s=1)
    make_documents(bench, 0)
    with running(bench) as service:
        wait_caught_up(bench)
        bench.admin.execute("INSERT INTO documents (body) SELECT 'text ' || n FROM generate_series(1, 5) n")
        with_the_model = "SELECT count(*) FROM cdc_embedder.in_flight"
        until(lambda: bench.admin.execute(with_the_model).fetchone()[0], "the rows never arrived")
        assert service.stop() == 0
        assert "stopped, confirmed through" in service.log
    before = embedded_at(bench)
    assert before, "the batch in hand was dropped"
    with running(bench):
        wait_caught_up(bench)
        after = embedded_at(bench)
        assert len(after) == 5
        assert {key: after[key] for key in before} == before
        assert_every_vector_is_of_its_text(bench)


def test_a_server_restart_is_survived(bench: Any) -> None:
    make_model(bench)
    make_documents(bench, 10)
    with running(bench) as service:
        wait_caught_up(bench)
        bench.restart()
        bench.admin.execute("INSERT INTO documents (body) VALUES ('after the restart')")
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench) == 11
        assert service.exit_status is None


def test_every_change_of_the_configuration_is_followed_without_a_restart(bench: Any) -> None:
    make_model(bench)
    make_model(bench, "other")
    with running(bench) as service:
        make_documents(bench, 30)
        wait_caught_up(bench)
        assert_every_vector_is_of_its_text(bench)
        bench.admin.execute("UPDATE cdc_embedder.embedding_column SET model = 'other'")
        until(lambda: status(bench)[0]["model"] == "other", "the change was never seen")
        wait_caught_up(bench)
        assert_every_vector_is_of_its_text(bench, model="other")
        bench.admin.execute("SELECT cdc_embedder.pause('documents')")
        until(lambda: status(bench)[0]["state"] == "paused", "never paused")
        bench.admin.execute("UPDATE documents SET body = 'while paused' WHERE id = 1")
        target = bench.admin.execute("SELECT pg_current_wal_insert_lsn()").fetchone()[0]
        until(lambda: confirmed(bench, target), "a paused column held the slot back")
        bench.admin.execute("SELECT cdc_embedder.resume('documents')")
        until(lambda: status(bench)[0]["state"] == "live", "never resumed", lambda: service.log)
        wait_caught_up(bench)
        assert_every_vector_is_of_its_text(bench, model="other")
        bench.admin.execute("DELETE FROM cdc_embedder.embedding_column")
        until(lambda: "is not configured any more" in service.log, "the column was never let go")
        assert bench.admin.execute("SELECT to_regclass('cdc_embedder.ledger_1')").fetchone()[0] is None


def test_a_model_that_is_changed_while_the_column_is_paused_is_the_one_that_embeds_when_it_goes_on(bench: Any) -> None:
    """And that the service looked meanwhile, when there was nothing to do about it, makes no difference."""
    make_model(bench)
    make_model(bench, "other")
    make_documents(bench, 10)
    with running(bench) as service:
        wait_caught_up(bench)
        bench.admin.execute("SELECT cdc_embedder.pause('documents')")
        until(lambda: status(bench)[0]["state"] == "paused", "never paused")
        bench.admin.execute("UPDATE cdc_embedder.embedding_column SET model = 'other'")
        bench.admin.execute("CREATE TABLE later (id int PRIMARY KEY, body text, embedding real[])")
        bench.grant("later", ["id"], ["body"], "embedding")
        bench.admin.execute(
            "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
            " VALUES ('later', '{body}', 'embedding', 'fake')"
        )
        until(lambda: "public.later.embedding is served" in service.log, "it never looked", lambda: service.log)
        bench.admin.execute("SELECT cdc_embedder.resume('documents')")
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench, model="other") == 10


def test_the_same_text_under_two_columns_and_models_is_embedded_in_both(bench: Any) -> None:
    make_model(bench)
    make_model(bench, "wide", dimensions=16)
    make_documents(bench, 10)
    bench.admin.execute("ALTER TABLE documents ADD wide double precision[]")
    bench.admin.execute("GRANT SELECT (wide), UPDATE (wide) ON documents TO cdc_service")
    bench.admin.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
        " VALUES ('documents', '{body}', 'wide', 'wide')"
    )
    with running(bench):
        wait_caught_up(bench)
        bench.admin.execute("UPDATE documents SET body = 'both' WHERE id = 3")
        wait_caught_up(bench)
        assert_every_vector_is_of_its_text(bench)
        assert_every_vector_is_of_its_text(bench, target="wide", model="wide")


def test_rule_5_a_locked_row_delays_nobody_and_is_written_afterwards(bench: Any) -> None:
    make_model(bench)
    make_documents(bench, 20)
    with running(bench):
        wait_caught_up(bench)
        with psycopg.connect(bench.dsn_admin) as holder:
            bench.admin.execute("UPDATE documents SET body = 'new ' || id")
            holder.execute("SELECT 1 FROM documents WHERE id = 7 FOR UPDATE")
            bench.admin.execute("UPDATE documents SET views = 1 WHERE id <> 7")
            until(lambda: len(_current_ids(bench)) >= 19, "a locked row held the others up", lambda: status(bench))
            holder.rollback()
        wait_caught_up(bench)
        assert_every_vector_is_of_its_text(bench)


def _current_ids(bench: Any) -> set[int]:
    from tests.service import fake_vector

    found = bench.admin.execute(
        "SELECT id, body, embedding::real[] FROM documents WHERE embedding IS NOT NULL"
    ).fetchall()
    return {
        id
        for id, body, stored in found
        if all(abs(a - b) < 1e-3 for a, b in zip(stored, fake_vector("fake", body, 8), strict=True))
    }


def test_rule_12_hostile_settings_of_the_role_change_nothing(bench: Any) -> None:
    make_model(bench)
    bench.admin.execute(
        "CREATE TABLE events (at timestamptz, weight double precision, tag bytea, span interval, body text, v real[],"
        " PRIMARY KEY (at, weight, tag, span))"
    )
    bench.grant("events", ["at", "weight", "tag", "span"], ["body"], "v")
    for setting in (
        "DateStyle = 'German'", "TimeZone = 'Asia/Tokyo'", "extra_float_digits = -15", "bytea_output = 'escape'",
        "IntervalStyle = 'sql_standard'", "client_encoding = 'LATIN1'", "search_path = 'nowhere'",
        "default_transaction_isolation = 'serializable'", "default_transaction_read_only = 'on'",
        "idle_session_timeout = '1s'", "statement_timeout = '1s'", "lock_timeout = '1ms'",
        "synchronous_commit = 'off'", "row_security = 'on'", "standard_conforming_strings = 'on'",
    ):  # fmt: skip
        bench.admin.execute(f"ALTER ROLE cdc_service IN DATABASE {bench.database} SET {setting}")
    bench.admin.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
        " VALUES ('events', '{body}', 'v', 'fake')"
    )
    rows = (
        "('2024-02-03 13:05:06.123456+09', 0.1::float8 + 0.2, '\\x00ff5c27', '1 year 2 days 03:04:05', 'grüße'),"
        "('2024-02-04 13:05:06+00', 1e-300, '\\x', '-1 day', '日本語')"
    )
    bench.admin.execute(f"INSERT INTO events SELECT * FROM (VALUES {rows}) r(a, b, c, d, e)".replace(
        "SELECT *", "SELECT a::timestamptz, b, c::bytea, d::interval, e"))  # fmt: skip
    with running(bench) as service:
        wait_caught_up(bench)
        bench.admin.execute("UPDATE events SET body = body || ' again'")
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench, "events", "body", "v") == 2
        bench.admin.execute("SELECT pg_sleep(2.5)")  # longer than the role's idle_session_timeout
        assert service.log.count("streaming from the slot") == 1


KEYS = {
    "int": ("int", "n"),
    "uuid": ("uuid", "md5(n::text)::uuid"),
    "text": ("text", "E'k\\n\"{},\\\\ ''%s ä ' || n"),
    "numeric": ("numeric(12,2)", "n + 0.10"),
    "boolean and date": ("boolean, {0}2 date", "n % 2 = 0, date '2024-01-01' + n"),
    "enum": ("mood", "(enum_range(NULL::mood))[n % 3 + 1], n"),
    "domain": ("positive", "n"),
    "char": ("char(10)", "'c' || n"),
    "array": ("int[]", "ARRAY[n, n + 1]"),
}


@pytest.mark.parametrize("kind", KEYS)
def test_keys_of_every_type_are_followed(bench: Any, kind: str) -> None:
    type, value = KEYS[kind]
    admin = bench.admin
    admin.execute("CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy'); CREATE DOMAIN positive AS int CHECK (VALUE > 0)")
    make_model(bench)
    columns = {"boolean and date": "k boolean, k2 date", "enum": "k mood, k2 int"}.get(kind, f"k {type}")
    names = [column.split()[0] for column in columns.split(", ")]
    admin.execute(f"CREATE TABLE things ({columns}, body text, v real[], PRIMARY KEY ({', '.join(names)}))")
    bench.grant("things", names, ["body"], "v")
    admin.execute(f"INSERT INTO things SELECT {value}, 'text ' || n FROM generate_series(1, 12) n")
    admin.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
        " VALUES ('things', '{body}', 'v', 'fake')"
    )
    with running(bench):
        wait_caught_up(bench)
        admin.execute(f"INSERT INTO things SELECT {value}, 'live ' || n FROM generate_series(13, 20) n")
        admin.execute("UPDATE things SET body = body || ' changed'")
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench, "things", "body", "v") == 20


def test_citext_keys_and_texts_meet_their_row_whatever_the_case(bench: Any) -> None:
    admin = bench.admin
    admin.execute("CREATE SCHEMA ext; CREATE EXTENSION citext SCHEMA ext")
    admin.execute("GRANT USAGE ON SCHEMA ext TO cdc_service")
    make_model(bench)
    admin.execute("CREATE TABLE words (k ext.citext PRIMARY KEY, body ext.citext, v real[])")
    bench.grant("words", ["k"], ["body"], "v")
    admin.execute("INSERT INTO words VALUES ('Alpha', 'One'), ('BETA', 'Two')")
    admin.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
        " VALUES ('words', '{body}', 'v', 'fake')"
    )
    with running(bench):
        wait_caught_up(bench)
        admin.execute("UPDATE words SET body = 'ONE' WHERE k::text = 'Alpha'")  # equal to citext, other bytes
        admin.execute("UPDATE words SET k = 'beta', body = 'three' WHERE k::text = 'BETA'")
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench, "words", "body::text", "v") == 2


def test_names_that_need_quoting_are_quoted_everywhere(bench: Any) -> None:
    admin = bench.admin
    make_model(bench)
    admin.execute('CREATE SCHEMA "My ""Schema"""')
    admin.execute('GRANT USAGE ON SCHEMA "My ""Schema""" TO cdc_service')
    name = '"My ""Schema"""."select, 100%% {x} *.ü"'
    plain = name.replace("%%", "%")
    admin.execute(f'CREATE TABLE {plain} ("The Key%" int PRIMARY KEY, "Body {{0}}" text, "from" real[])'.encode())
    admin.execute(f'GRANT SELECT, UPDATE ("from") ON {plain} TO cdc_service'.encode())
    admin.execute(f"INSERT INTO {plain} SELECT n, 'text ' || n FROM generate_series(1, 5) n".encode())
    admin.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
        " VALUES (%s::regclass, ARRAY['Body {0}'], 'from', 'fake')",
        (plain,),
    )
    with running(bench):
        wait_caught_up(bench)
        admin.execute(f"INSERT INTO {plain} VALUES (6, 'live')".encode())
        admin.execute(f"""UPDATE {plain} SET "Body {{0}}" = 'changed' WHERE "The Key%" = 1""".encode())
        wait_caught_up(bench)
        found = admin.execute(f'SELECT "Body {{0}}", "from" FROM {plain}'.encode()).fetchall()
        assert len(found) == 6
        from tests.service import fake_vector

        for text, stored in found:
            assert stored == pytest.approx(fake_vector("fake", text, 8).tolist(), abs=1e-6)


def test_a_partitioned_table_is_served_through_its_root(bench: Any) -> None:
    admin = bench.admin
    make_model(bench)
    admin.execute(
        "CREATE TABLE parts (region int, id int, body text, v real[], PRIMARY KEY (region, id))"
        " PARTITION BY LIST (region)"
    )
    admin.execute("CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN (1)")
    admin.execute(
        "CREATE TABLE parts_2 (v real[], body text, id int NOT NULL, region int NOT NULL, PRIMARY KEY (region, id))"
    )
    admin.execute("ALTER TABLE parts ATTACH PARTITION parts_2 FOR VALUES IN (2)")
    bench.grant("parts", ["region", "id"], ["body"], "v")
    admin.execute("INSERT INTO parts SELECT n % 2 + 1, n, 'text ' || n FROM generate_series(1, 40) n")
    admin.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
        " VALUES ('parts', '{body}', 'v', 'fake')"
    )
    with running(bench):
        wait_caught_up(bench)
        admin.execute("INSERT INTO parts SELECT n % 2 + 1, n, 'live ' || n FROM generate_series(41, 60) n")
        admin.execute("UPDATE parts SET region = 3 - region WHERE id < 10")
        admin.execute("UPDATE parts_2 SET body = 'by the leaf ' || id WHERE id > 50")
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench, "parts", "body", "v") == 60


def test_several_source_columns_are_one_text_and_their_nulls_are_left_out(bench: Any) -> None:
    admin = bench.admin
    make_model(bench)
    admin.execute("CREATE TABLE pages (id int PRIMARY KEY, title text, body varchar(50), v real[])")
    bench.grant("pages", ["id"], ["title", "body"], "v")
    admin.execute(
        "INSERT INTO pages VALUES (1, 'a|b', 'c'), (2, 'a', 'b|c'), (3, NULL, 'x'), (4, 'y', NULL), (5, NULL, NULL),"
        " (6, '', '')"
    )
    admin.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model, separator)"
        " VALUES ('pages', '{title,body}', 'v', 'fake', '|')"
    )
    text = "CASE WHEN title IS NULL AND body IS NULL THEN NULL ELSE concat_ws('|', title, body) END"
    with running(bench):
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench, "pages", text, "v") == 6
        before = embedded_at(bench)
        admin.execute(
            "UPDATE pages SET title = 'a', body = 'b|c' WHERE id = 1"
        )  # the same joined text, another row text
        wait_caught_up(bench)
        assert embedded_at(bench)[1] != before[1]
        assert_every_vector_is_of_its_text(bench, "pages", text, "v")


def test_rule_7_a_text_that_is_refused_is_recorded_alone_and_tried_again_when_it_changes(bench: Any) -> None:
    make_model(bench, reject="poison")
    make_documents(bench, 20)
    with running(bench):
        wait_caught_up(bench)
        bench.admin.execute("UPDATE documents SET body = 'poison' WHERE id = 9")
        until(lambda: (rows := status(bench)) and rows[0]["failed"] == 1 and rows[0]["current"] == 19, "not isolated",
              lambda: status(bench))  # fmt: skip
        key, error, attempts = bench.admin.execute("SELECT key, error, attempts FROM cdc_embedder.failed").fetchone()
        assert key == {"id": 9}
        assert "poison" not in error
        kept = bench.admin.execute("SELECT embedding IS NOT NULL FROM documents WHERE id = 9").fetchone()
        assert (attempts, kept) == (1, (True,))
        bench.admin.execute("SELECT cdc_embedder.retry_failed('documents')")
        until(
            lambda: bench.admin.execute("SELECT attempts FROM cdc_embedder.failed").fetchone()[0] > attempts,
            "never tried again",
        )
        assert bench.admin.execute("SELECT embedding FROM documents WHERE id = 9").fetchone()[0] is None
        bench.admin.execute("UPDATE documents SET body = 'harmless' WHERE id = 9")
        wait_caught_up(bench)
        assert_every_vector_is_of_its_text(bench)


def test_rule_4_a_trigger_that_alters_or_refuses_the_row_makes_it_failed(bench: Any) -> None:
    make_model(bench)
    make_documents(bench, 6)
    bench.admin.execute(
        "CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF NEW.id = 2 THEN NEW.embedding := NULL; END IF; IF NEW.id = 3 THEN RETURN NULL; END IF;"
        " IF NEW.id = 4 THEN RAISE EXCEPTION 'secret text'; END IF; RETURN NEW; END $$;"
        "CREATE TRIGGER meddle BEFORE UPDATE OF embedding ON documents FOR EACH ROW EXECUTE FUNCTION meddle()"
    )
    with running(bench):
        until(lambda: (rows := status(bench)) and rows[0]["failed"] == 3 and rows[0]["current"] == 3, "not recorded",
              lambda: status(bench))  # fmt: skip
        found = bench.admin.execute("SELECT key ->> 'id', error FROM cdc_embedder.failed ORDER BY 1").fetchall()
        assert [key for key, _ in found] == ["2", "3", "4"]
        assert "changed by a trigger" in found[0][1]
        assert "changed by a trigger" in found[1][1]
        assert "P0001" in found[2][1]
        assert "secret" not in found[2][1]


def test_a_slot_that_was_dropped_is_made_anew_and_everything_scanned(bench: Any) -> None:
    make_model(bench)
    make_documents(bench, 100)
    with running(bench) as service:
        wait_caught_up(bench)
        assert service.stop() == 0
    before = embedded_at(bench)
    bench.admin.execute("SELECT pg_drop_replication_slot(%s)", (bench.slot,))
    bench.admin.execute("UPDATE documents SET body = 'unheard ' || id WHERE id <= 10")
    bench.admin.execute("INSERT INTO documents (body) VALUES ('unheard')")
    bench.admin.execute("DELETE FROM documents WHERE id = 50")
    with running(bench):
        until(lambda: (rows := status(bench)) and rows[0]["state"] == "live", "never live again")
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench) == 100
        after = embedded_at(bench)
        assert {key for key in after if after[key] != before.get(key)} == {*range(1, 11), 101}
        assert 50 not in after


def test_reconcile_finds_what_no_event_told(bench: Any) -> None:
    make_model(bench)
    make_documents(bench, 30)
    with running(bench):
        wait_caught_up(bench)
        bench.admin.execute("ALTER TABLE documents ALTER body TYPE text USING 'rewritten ' || id")
        assert bench.admin.execute("SELECT cdc_embedder.reconcile('documents')").fetchone()[0] == 1
        until(lambda: len(_current_ids(bench)) == 30, "the rewrite was never noticed", lambda: status(bench))
        wait_caught_up(bench)
        assert_every_vector_is_of_its_text(bench)


def test_rule_10_rows_of_a_transaction_that_was_open_at_registration_are_found(bench: Any) -> None:
    make_model(bench)
    make_documents(bench, 5, configure=False)
    with running(bench) as service:
        service.wait_for_log("streaming from the slot")
        with psycopg.connect(bench.dsn_admin) as early:
            early.execute("INSERT INTO documents (body) SELECT 'early ' || n FROM generate_series(1, 5) n")
            configure_documents(bench)
            until(lambda: (rows := status(bench)) and rows[0]["current"] == 5, "no head start", lambda: status(bench))
            until(
                lambda: (
                    status(bench)[0]["state"] == "backfilling"
                    and "transactions that were open" in (status(bench)[0]["reason"] or "")
                ),
                "the head start was taken for the whole",
                lambda: status(bench),
            )
            early.commit()
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench) == 10


def test_vectors_that_are_there_already_are_not_touched_before_the_user_says_so(bench: Any) -> None:
    make_model(bench)
    make_documents(bench, 3, configure=False)
    theirs = [1.0] + [0.0] * 7
    bench.admin.execute(f"UPDATE documents SET embedding = %s::real[]::{target_type(bench)} WHERE id = 2", (theirs,))
    configure_documents(bench)
    with running(bench):
        until(lambda: status(bench)[0]["state"] == "paused", "not paused", lambda: status(bench))
        assert "on_existing" in status(bench)[0]["reason"]
        assert bench.admin.execute("SELECT embedding::real[] FROM documents WHERE id = 2").fetchone()[0] == theirs
        bench.admin.execute("UPDATE cdc_embedder.embedding_column SET on_existing = 'replace'")
        until(lambda: status(bench)[0]["state"] == "live", "never went on", lambda: status(bench))
        wait_caught_up(bench)
        assert_every_vector_is_of_its_text(bench)


def test_rule_8_keys_that_do_not_fit_into_memory_go_to_the_backlog(bench: Any, tmp_path: Any) -> None:
    down = tmp_path / "down"
    tmp_path.chmod(0o755)
    down.touch()
    make_model(bench, down_while_exists=str(down))
    make_documents(bench)
    with running(bench, CDC_EMBEDDER_MAX_PENDING_KEYS="1000", CDC_EMBEDDER_WAL_SENDER_TIMEOUT_S="2") as service:
        until(lambda: (rows := status(bench)) and rows[0]["state"] == "live", "never live")
        bench.admin.execute("INSERT INTO documents (body) SELECT 'text ' || n FROM generate_series(1, 6000) n")
        until(lambda: status(bench)[0]["pending"] == 6000, "never read", lambda: status(bench))
        until(lambda: status(bench)[0]["backlog"] >= 5000, "never spilled", lambda: status(bench))
        assert status(bench)[0]["circuit_breaker"] != "closed"
        assert service.log.count("streaming from the slot") == 1
        down.unlink()
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench) == 6000
        assert bench.admin.execute("SELECT count(*) FROM cdc_embedder.failed").fetchone()[0] == 0


def test_rule_9_a_second_instance_waits_and_takes_over_when_the_first_is_killed(bench: Any) -> None:
    make_model(bench)
    make_documents(bench, 10)
    with running(bench) as first:
        wait_caught_up(bench)
        with running(bench) as second:
            second.wait_for_log("waiting: another instance serves the slot")
            first.kill()
            second.wait_for_log("streaming from the slot")
            bench.admin.execute("INSERT INTO documents (body) VALUES ('after the change of hands')")
            wait_caught_up(bench)
            assert assert_every_vector_is_of_its_text(bench) == 11
            assert second.stop() == 0


def test_a_second_signal_leaves_at_once(bench: Any) -> None:
    make_model(bench, delay_s=30)
    make_documents(bench, 1)
    with running(bench) as service:
        until(lambda: any((row["oldest_pending_s"] or 0) > 2 for row in status(bench)), "no work arrived")
        service.signal(signal.SIGTERM)
        service.wait_for_log("stopping: finishing the batch in hand")
        service.signal(signal.SIGTERM)
        assert service.wait() == 1


def test_a_table_that_loses_its_key_is_taken_out_of_the_publication_at_once(bench: Any) -> None:
    make_model(bench)
    make_documents(bench, 5)
    with running(bench):
        wait_caught_up(bench)
        bench.admin.execute("ALTER TABLE documents DROP CONSTRAINT documents_pkey")
        until(lambda: status(bench)[0]["state"] == "error", "never noticed")
        bench.admin.execute("UPDATE documents SET body = 'the application goes on'")  # fails where still published
        bench.admin.execute("ALTER TABLE documents ADD PRIMARY KEY (id)")
        if bench.plugin == "pgoutput":  # the service's role does not own the table: it says what its owner must run
            until(
                lambda: "ADD TABLE" in (status(bench)[0]["reason"] or ""),
                "the remedy is not named",
                lambda: status(bench),
            )
            bench.admin.execute(f"ALTER PUBLICATION {bench.slot} ADD TABLE documents")
        until(lambda: status(bench)[0]["state"] in ("live", "backfilling"), "never healed", lambda: status(bench))


@pytest.mark.parametrize("kind", ["vector", "halfvec"])
def test_pgvector_columns_hold_the_vectors(bench18: Any, kind: str) -> None:
    bench = bench18
    make_model(bench)
    bench.admin.execute(f"CREATE TABLE docs (id int PRIMARY KEY, body text, v {kind}(8))")
    bench.grant("docs", ["id"], ["body"], "v")
    bench.admin.execute("INSERT INTO docs SELECT n, 'text ' || n FROM generate_series(1, 50) n")
    bench.admin.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
        " VALUES ('docs', '{body}', 'v', 'fake')"
    )
    with running(bench):
        wait_caught_up(bench)
        bench.admin.execute("UPDATE docs SET body = NULL WHERE id = 1")
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench, "docs", "body", "v") == 50


def test_a_renamed_table_and_its_renamed_columns_are_followed(bench: Any) -> None:
    make_model(bench)
    make_documents(bench, 10)
    with running(bench) as service:
        wait_caught_up(bench)
        bench.admin.execute("ALTER TABLE documents RENAME body TO content")
        bench.admin.execute("ALTER TABLE documents RENAME embedding TO v")
        bench.admin.execute("ALTER TABLE documents RENAME id TO number")
        bench.admin.execute("ALTER TABLE documents RENAME TO papers")
        bench.admin.execute("UPDATE papers SET content = 'after the rename' WHERE number <= 3")
        until(lambda: "is called public.papers now" in service.log, "the rename was never noticed")
        bench.admin.execute("INSERT INTO papers (content) VALUES ('by its new name')")
        service.wait_for_log("scan of public.papers.v complete")
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench, "papers", "content", "v") == 11


def test_another_table_under_the_configured_name_is_an_error_and_never_taken_for_the_first(bench: Any) -> None:
    make_model(bench)
    make_documents(bench, 5)
    with running(bench):
        wait_caught_up(bench)
        with bench.admin.transaction():
            bench.admin.execute("ALTER TABLE documents RENAME TO documents_old")
            bench.admin.execute("CREATE TABLE documents (LIKE documents_old INCLUDING ALL)")
            bench.admin.execute("INSERT INTO documents (id, body) OVERRIDING SYSTEM VALUE VALUES (1, 'of that one')")
        until(lambda: status(bench)[0]["state"] == "error", "the swap was never noticed", lambda: status(bench))
        assert "resume" in status(bench)[0]["reason"]
        assert bench.admin.execute("SELECT embedding FROM documents").fetchone() == (None,)
        bench.grant("documents", ["id"], ["body"], "embedding")
        bench.admin.execute("SELECT cdc_embedder.resume('documents')")
        until(lambda: status(bench)[0]["state"] == "live", "never live again", lambda: status(bench))
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench) == 1


def test_our_own_changes_are_passed_over_where_the_role_may_mark_them(bench: Any) -> None:
    make_model(bench)
    make_documents(bench, 600)  # enough for both writers
    bench.admin.execute(
        "GRANT EXECUTE ON FUNCTION pg_replication_origin_create(text), pg_replication_origin_oid(text),"
        " pg_replication_origin_session_setup(text) TO cdc_service"
    )
    with running(bench) as service:
        wait_caught_up(bench)
        bench.admin.execute("UPDATE documents SET body = 'changed'")
        wait_caught_up(bench)
        assert_every_vector_is_of_its_text(bench)
        assert service.stop() == 0
        # wal2json filters on the server; pgoutput sends them with their origin
        passed_over = 0 if bench.plugin == "wal2json" else 1200
        assert f"{passed_over} changes of our own were passed over" in service.log
    names = bench.admin.execute(
        "SELECT array_agg(roname ORDER BY 1) FROM pg_replication_origin WHERE starts_with(roname, %s)", (bench.slot,)
    )
    assert names.fetchone() == ([f"{bench.slot}_1", f"{bench.slot}_2"],)


def test_a_row_level_security_policy_is_an_error_and_never_silently_fewer_rows(bench: Any) -> None:
    make_model(bench)
    make_documents(bench, 10)
    bench.admin.execute("ALTER TABLE documents ENABLE ROW LEVEL SECURITY")
    bench.admin.execute("CREATE POLICY half ON documents USING (id <= 5)")
    with running(bench):
        until(lambda: status(bench)[0]["state"] == "error", "the policy was never noticed", lambda: status(bench))
        assert "row-level security" in status(bench)[0]["reason"]
        bench.admin.execute("ALTER ROLE cdc_service BYPASSRLS")
        try:
            until(lambda: status(bench)[0]["state"] == "live", "never healed", lambda: status(bench))
            wait_caught_up(bench)
            assert assert_every_vector_is_of_its_text(bench) == 10
        finally:
            bench.admin.execute("ALTER ROLE cdc_service NOBYPASSRLS")


def test_each_of_our_sessions_may_be_terminated_and_the_service_goes_on(bench: Any) -> None:
    make_model(bench)
    make_documents(bench, 10)
    with running(bench) as service:
        wait_caught_up(bench)
        names = bench.admin.execute(
            "SELECT application_name FROM pg_stat_activity WHERE datname = current_database()"
            " AND application_name LIKE 'cdc-embedder %' ORDER BY 1"
        ).fetchall()
        assert len(names) == (13 if bench.admin.info.server_version < 170000 else 12)
        for n, (name,) in enumerate(names):
            until(lambda name=name: _terminated(bench, name), f"{name} was never there again", lambda: service.log)
            bench.admin.execute("INSERT INTO documents (body) VALUES (%s)", (f"after {name} {n}",))
            wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench) == 10 + len(names)
        assert service.exit_status is None


def test_every_stream_may_be_lost_at_once_and_the_service_goes_on(bench18: Any) -> None:
    """As when the server goes away, but for good: the stream of requests from SQL ends beside that of the rows."""
    make_model(bench18)
    make_documents(bench18, 10)
    with running(bench18, CDC_EMBEDDER_SQL_EMBED="on") as service:
        for n in range(8):
            until(lambda: _streams(bench18) == 2, "it does not go on", lambda: service.log)
            bench18.admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND backend_type = 'walsender'"
            )
            bench18.admin.execute("INSERT INTO documents (body) VALUES (%s)", (f"after loss {n}",))
        wait_caught_up(bench18)
        assert assert_every_vector_is_of_its_text(bench18) == 18
        assert service.stop() == 0


def _streams(bench: Any) -> int:
    """How many slots of ours are read."""
    row = bench.admin.execute(
        "SELECT count(*) FROM pg_replication_slots WHERE database = current_database() AND active"
    ).fetchone()
    assert row is not None
    return int(row[0])


def _terminated(bench: Any, name: str) -> bool:
    found = bench.admin.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name = %s",
        (name,),
    )
    return found.fetchone() is not None


def test_a_stopped_process_loses_the_slot_and_takes_up_its_work_when_it_goes_on(bench: Any) -> None:
    make_model(bench)
    make_documents(bench, 5)
    with running(bench, CDC_EMBEDDER_WAL_SENDER_TIMEOUT_S="2") as service:
        wait_caught_up(bench)
        service.signal(signal.SIGSTOP)
        until(
            lambda: (
                not bench.admin.execute(
                    "SELECT active FROM pg_replication_slots WHERE slot_name = %s", (bench.slot,)
                ).fetchone()[0]
            ),
            "the slot was never let go",
        )
        bench.admin.execute("UPDATE documents SET body = 'while it stood still'")
        service.signal(signal.SIGCONT)
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench) == 5


def test_what_changes_while_a_column_cannot_be_served_is_found_when_it_can_again(bench: Any) -> None:
    make_model(bench)
    make_documents(bench, 10)
    with running(bench) as service:
        wait_caught_up(bench)
        bench.admin.execute("REVOKE UPDATE (embedding) ON documents FROM cdc_service")
        bench.admin.execute("UPDATE documents SET body = 'not permitted' WHERE id = 1")
        until(
            lambda: status(bench)[0]["state"] == "error", "the missing right was never noticed", lambda: status(bench)
        )
        assert "permission denied" in status(bench)[0]["reason"]
        bench.admin.execute("UPDATE documents SET body = 'while in error' WHERE id = 2")
        target = bench.admin.execute("SELECT pg_current_wal_insert_lsn()").fetchone()[0]
        until(lambda: confirmed(bench, target), "a faulty column held the slot back")
        bench.admin.execute("GRANT UPDATE (embedding) ON documents TO cdc_service")
        until(lambda: len(_current_ids(bench)) == 10, "what was missed was never found", lambda: service.log)
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench) == 10
        assert bench.admin.execute("SELECT count(*) FROM cdc_embedder.failed").fetchone() == (0,)


def test_a_column_that_cannot_be_read_leaves_the_others_alone(bench: Any) -> None:
    make_model(bench)
    make_documents(bench, 20)
    bench.admin.execute("CREATE TABLE closed (id int PRIMARY KEY, body text, v real[])")
    bench.admin.execute("INSERT INTO closed VALUES (1, 'nobody may read this')")
    bench.admin.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
        " VALUES ('closed', '{body}', 'v', 'fake')"
    )
    with running(bench) as service:
        until(lambda: [row["state"] for row in status(bench)] == ["live", "error"], "not told apart",
              lambda: (status(bench), service.log))  # fmt: skip
        assert "permission denied" in status(bench)[1]["reason"]
        bench.admin.execute("UPDATE documents SET body = 'the others go on'")
        bench.admin.execute("UPDATE closed SET body = 'still not'")
        until(lambda: len(_current_ids(bench)) == 20, "the other column stood still", lambda: status(bench))
        assert service.log.count("streaming from the slot") == 1
        bench.grant("closed", ["id"], ["body"], "v")
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench, "closed", "body", "v") == 1
