"""Embedding from SQL: the real service answers real sessions, on servers with and without a flush argument."""

from __future__ import annotations

import re
import threading
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import psycopg
import pytest
from psycopg import sql

from tests.documents import make_documents, make_model
from tests.servers import Bench
from tests.service import fake_vector, running, until, wait_caught_up


def same(found: list[float], text: str, model: str = "fake") -> bool:
    return bool(np.allclose(found, fake_vector(model, text, 8), atol=1e-6))


def answers(bench: Bench) -> int:
    return bench.admin.execute("SELECT count(*) FROM cdc_embedder.answer").fetchone()[0]  # type: ignore[index]


@pytest.fixture
def served(installed: Bench) -> Iterator[Bench]:
    """A service that answers SQL, with a model that has prompts."""
    make_model(installed)
    installed.admin.execute(
        "UPDATE cdc_embedder.model SET query_prompt = 'query: ', document_prompt = 'passage: ' WHERE name = 'fake'"
    )
    installed.admin.execute("SET cdc_embedder.embed_timeout = '60s'")  # a busy machine's patience
    with running(installed, CDC_EMBEDDER_SQL_EMBED="on") as service:
        until(lambda: "SQL is answered" in service.log, "never answered", lambda: service.log)
        yield installed


@pytest.fixture
def stranger(served: Bench) -> Iterator[psycopg.Connection[Any]]:
    """A role that may call the functions and nothing else."""
    role = sql.Identifier(f"asker_{served.database}")
    served.admin.execute(sql.SQL("CREATE ROLE {} LOGIN").format(role))
    served.admin.execute(sql.SQL("GRANT USAGE ON SCHEMA cdc_embedder TO {}").format(role))
    served.admin.execute(
        sql.SQL(
            "GRANT EXECUTE ON FUNCTION cdc_embedder.embed(text, text), cdc_embedder.embed(text, text[]),"
            " cdc_embedder.embed_query(text, text), cdc_embedder.embed_document(text, text) TO {}"
        ).format(role)
    )
    dsn = served.server.dsn(served.database, f"asker_{served.database}")
    try:
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("SET cdc_embedder.embed_timeout = '60s'")
            yield connection
    finally:
        served.admin.execute(sql.SQL("DROP OWNED BY {0} CASCADE; DROP ROLE {0}").format(role))


def test_a_text_is_embedded_with_the_prompt_that_was_asked_for(stranger: psycopg.Connection[Any]) -> None:
    for function, prompt in (("embed", ""), ("embed_query", "query: "), ("embed_document", "passage: ")):
        [(found,)] = stranger.execute(f"SELECT cdc_embedder.{function}('fake', 'a text')").fetchall()
        assert same(found, prompt + "a text"), function
    found = stranger.execute("SELECT * FROM cdc_embedder.embed('fake', ARRAY['one', 'two', 'one'])").fetchall()
    assert [same(row[0], text) for row, text in zip(found, ("one", "two", "one"), strict=True)] == [True] * 3
    assert stranger.execute("SELECT * FROM cdc_embedder.embed('fake', '{}'::text[])").fetchall() == []


def test_null_gives_null_and_types_that_become_text_are_taken(stranger: psycopg.Connection[Any]) -> None:
    assert stranger.execute("SELECT cdc_embedder.embed('fake', NULL::text)").fetchone() == (None,)
    assert stranger.execute("SELECT cdc_embedder.embed(NULL, 'a')").fetchone() == (None,)
    assert stranger.execute("SELECT * FROM cdc_embedder.embed('fake', NULL::text[])").fetchall() == []
    stranger.execute(
        "CREATE TEMPORARY TABLE questions (q varchar(40),"
        " e real[] DEFAULT cdc_embedder.embed('fake', 'what is asked by default'))"
    )
    stranger.execute("INSERT INTO questions (q) VALUES ('größe ½ 東京')")
    found, default = stranger.execute("SELECT cdc_embedder.embed('fake', q), e FROM questions").fetchone()  # type: ignore[misc]
    assert same(found, "größe ½ 東京")
    assert same(default, "what is asked by default")


def test_it_works_in_an_open_transaction_that_only_reads(served: Bench, stranger: psycopg.Connection[Any]) -> None:
    with stranger.transaction():
        stranger.execute("SET TRANSACTION READ ONLY")
        [(found,)] = stranger.execute("SELECT cdc_embedder.embed('fake', 'inside')").fetchall()
    assert same(found, "inside")
    with served.admin.transaction():  # nor does a transaction of the asker's own hold its answer back
        served.admin.execute("CREATE TABLE made_here (id int)")
        [(found,)] = served.admin.execute("SELECT cdc_embedder.embed('fake', 'after DDL')").fetchall()
    assert same(found, "after DDL")


@pytest.mark.parametrize(
    ("statement", "state", "says"),
    [
        ("SELECT cdc_embedder.embed('nothing', 'a')", "42704", "there is no model"),
        ("SELECT cdc_embedder.embed('fake', ARRAY['a', NULL])", "22004", "NULL"),
        ("SELECT cdc_embedder.embed('fake', ARRAY[['a', 'b'], ['c', NULL]])", "2202E", "2 dimensions"),
        ("SELECT cdc_embedder.embed('fake', repeat('a', 8388609))", "54000", "too large"),
        ("SELECT cdc_embedder.embed('fake', array_fill('a'::text, ARRAY[10001]))", "54000", "too large"),
    ],
)
def test_what_cannot_be_answered_is_refused_at_once(
    stranger: psycopg.Connection[Any], statement: str, state: str, says: str
) -> None:
    with pytest.raises(psycopg.Error, match=says) as refusal:
        stranger.execute(statement)  # type: ignore[call-overload]
    assert refusal.value.sqlstate == state
    assert refusal.value.diag.message_hint


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_snapshot_that_would_never_see_the_answer_is_refused(stranger: psycopg.Connection[Any], level: str) -> None:
    stranger.execute(f"SET default_transaction_isolation = '{level}'")
    with pytest.raises(psycopg.errors.InvalidTransactionState, match=level):
        stranger.execute("SELECT cdc_embedder.embed('fake', 'a')")


def test_a_text_that_the_model_refuses_is_told_and_its_neighbours_are_answered(served: Bench) -> None:
    make_model(served, "fussy", reject="poison")
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="refuses a text"):
        served.admin.execute("SELECT cdc_embedder.embed('fussy', 'a poison')")
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="text 2:"):
        served.admin.execute("SELECT cdc_embedder.embed('fussy', ARRAY['fine', 'poison'])")
    [(found,)] = served.admin.execute("SELECT cdc_embedder.embed('fussy', 'fine')").fetchall()
    assert same(found, "fine", "fussy")
    make_model(served, "gone", down=True)
    with pytest.raises(psycopg.errors.CannotConnectNow, match="down"):
        served.admin.execute("SELECT cdc_embedder.embed('gone', 'a')")


def test_many_sessions_at_once_share_calls_of_the_model(installed: Bench) -> None:
    """64 questions of eight sessions: alone each would be a call of its own."""
    make_model(installed, "slow", delay_s=0.3)
    found: dict[int, Any] = {}

    def ask(first: int) -> None:
        with psycopg.connect(installed.dsn_admin, autocommit=True) as session:
            session.execute("SET cdc_embedder.embed_timeout = '60s'")
            for n in range(first, first + 8):
                [(found[n],)] = session.execute("SELECT cdc_embedder.embed('slow', %s)", (f"text {n}",)).fetchall()

    askers = [threading.Thread(target=ask, args=(n * 8,)) for n in range(8)]
    with running(installed, CDC_EMBEDDER_SQL_EMBED="on", CDC_EMBEDDER_HTTP="127.0.0.1:0") as service:
        service.wait_for_log("SQL is answered")
        service.wait_for_log("health is served at")
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
        [url] = re.findall(r"health is served at (http://\S+)/healthz", service.log)
        metrics = urllib.request.urlopen(url + "/metrics", timeout=60).read().decode()
    assert len(found) == 64
    assert all(same(value, f"text {n}", "slow") for n, value in found.items())
    [calls] = re.findall(r'^cdc_embedder_model_calls_total\{model="slow"\} (\S+)$', metrics, re.MULTILINE)
    assert 8 <= float(calls) <= 32, "a session asks again when it is answered, and each call may answer all of them"


def test_answers_are_read_by_their_asker_alone_and_swept(served: Bench, stranger: psycopg.Connection[Any]) -> None:
    stranger.execute("SELECT cdc_embedder.embed('fake', 'a')")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        stranger.execute("SELECT * FROM cdc_embedder.answer")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        stranger.execute("SELECT cdc_embedder._embed('fake', ARRAY['a'], 'none')")
    assert answers(served) > 0
    served.admin.execute("UPDATE cdc_embedder.answer SET made_at = made_at - interval '1 minute'")
    until(lambda: answers(served) == 0, "never swept")


def test_answers_that_nobody_is_left_to_read_are_swept_by_whoever_comes_next(installed: Bench) -> None:
    """Of a service that was killed, or one that is told not to answer any more."""
    make_model(installed)
    leave = (
        "INSERT INTO cdc_embedder.answer (id, vectors, dimensions, made_at)"
        " VALUES (gen_random_uuid(), '{1}', 1, clock_timestamp() - interval '%s')"
    )
    installed.admin.execute(leave % "1 minute")  # type: ignore[call-overload]
    with running(installed, CDC_EMBEDDER_SQL_EMBED="on"):
        until(lambda: answers(installed) == 0, "never swept at the start")
    installed.admin.execute(leave % "5 seconds")  # type: ignore[call-overload]
    with running(installed):
        until(lambda: answers(installed) == 0, "never swept while it is off")


def test_a_request_that_nobody_signed_is_no_work(served: Bench, stranger: psycopg.Connection[Any]) -> None:
    """Any role may emit a message: only the function knows how to sign one."""
    request = (
        '{"id": "00000000-0000-0000-0000-000000000001", "slot": "' + served.slot + '_embed", "until": 9999999999,'
        ' "model": "fake", "texts": ["forged"], "input_type": "none", "prompt": null, "normalize": null}'
    )
    for content in (request, "x" * 32 + request, "", "short"):
        stranger.execute("SELECT pg_logical_emit_message(true, 'cdc_embedder.embed', %s::text)", (content,))
    stranger.execute("SELECT cdc_embedder.embed('fake', 'a')")  # which the service hears of after those
    assert answers(served) == 1
    secret = served.admin.execute("SELECT secret FROM cdc_embedder.sql_embed").fetchone()[0]  # type: ignore[index]
    served.admin.execute(
        "SELECT pg_logical_emit_message(true, 'cdc_embedder.embed',"
        " sha256(%(s)s || sha256(%(s)s || convert_to(%(r)s, 'UTF8'))) || convert_to(%(r)s, 'UTF8'))",
        {"s": secret, "r": request},
    )
    until(lambda: answers(served) == 2, "the same request, signed, is not answered: nothing was shown")


def test_a_request_that_makes_no_sense_is_answered_all_the_same(served: Bench) -> None:
    """Signed, and so ours: a moment that JSON has no number for."""
    request = (
        '{"id": "00000000-0000-0000-0000-000000000001", "slot": "' + served.slot + '_embed", "until": "Infinity",'
        ' "model": "fake", "texts": ["that nobody should read"], "input_type": "none", "prompt": null,'
        ' "normalize": null}'
    )
    secret = served.admin.execute("SELECT secret FROM cdc_embedder.sql_embed").fetchone()[0]  # type: ignore[index]
    served.admin.execute(
        "SELECT pg_logical_emit_message(true, 'cdc_embedder.embed',"
        " sha256(%(s)s || sha256(%(s)s || convert_to(%(r)s, 'UTF8'))) || convert_to(%(r)s, 'UTF8'))",
        {"s": secret, "r": request},
    )
    until(lambda: answers(served) == 1, "never answered")
    said = served.admin.execute("SELECT sqlstate, message FROM cdc_embedder.answer").fetchone()
    assert said == ("55000", "the service could not embed this: its log says more")


def test_a_model_that_was_changed_is_used_as_it_is_from_the_commit_on(served: Bench) -> None:
    for turn in range(10):
        served.admin.execute("UPDATE cdc_embedder.model SET query_prompt = %s", (f"{turn}: ",))
        [(found,)] = served.admin.execute("SELECT cdc_embedder.embed_query('fake', 'a')").fetchall()
        assert same(found, f"{turn}: a"), turn
    with served.admin.transaction():  # what nobody else can see yet is of no effect
        served.admin.execute("UPDATE cdc_embedder.model SET query_prompt = 'later: '")
        [(found,)] = served.admin.execute("SELECT cdc_embedder.embed_query('fake', 'a')").fetchall()
        assert same(found, "9: a")


def test_so_many_texts_a_second_and_no_more(served: Bench) -> None:
    served.admin.execute("UPDATE cdc_embedder.sql_embed SET max_texts_per_s = 1")
    until(lambda: refused(served), "never refused")
    served.admin.execute("UPDATE cdc_embedder.sql_embed SET max_texts_per_s = 5000")
    until(lambda: not refused(served), "for ever refused")


def refused(bench: Bench) -> bool:
    try:
        bench.admin.execute("SELECT cdc_embedder.embed('fake', array_fill('a'::text, ARRAY[20]))")
    except psycopg.errors.ConfigurationLimitExceeded as error:
        return "texts a second" in str(error)
    return False


def test_it_is_off_until_it_is_turned_on_and_its_slot_goes_when_it_is_turned_off(installed: Bench) -> None:
    make_model(installed)
    admin = installed.admin
    slots = f"SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{installed.slot}_embed'"
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="turned off"):
        admin.execute("SELECT cdc_embedder.embed('fake', 'a')")
    with running(installed) as service:
        until(lambda: "streaming from" in service.log, "never streams", lambda: service.log)
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="turned off"):
            admin.execute("SELECT cdc_embedder.embed('fake', 'a')")
        admin.execute("UPDATE cdc_embedder.sql_embed SET enabled = true")
        admin.execute("SET cdc_embedder.embed_timeout = '60s'")
        [(found,)] = admin.execute("SELECT cdc_embedder.embed('fake', 'a')").fetchall()
        assert same(found, "a")
        admin.execute("UPDATE cdc_embedder.sql_embed SET enabled = false")
        until(lambda: admin.execute(slots).fetchone() == (0,), "the slot stays", lambda: service.log)  # type: ignore[arg-type]


def test_without_a_service_the_timeout_says_so(installed: Bench) -> None:
    make_model(installed)
    admin = installed.admin
    with running(installed, CDC_EMBEDDER_SQL_EMBED="on") as service:
        service.wait_for_log("SQL is answered")
        service.stop()
    admin.execute("SET cdc_embedder.embed_timeout = '300ms'")
    with pytest.raises(psycopg.errors.CannotConnectNow, match="no service answers") as refusal:
        admin.execute("SELECT cdc_embedder.embed('fake', 'a')")
    assert refusal.value.diag.message_hint == "Start it: cdc-embedder run."
    admin.execute("SET cdc_embedder.embed_timeout = 60000")
    asked: list[Any] = []
    asker = threading.Thread(
        target=lambda: asked.extend(admin.execute("SELECT cdc_embedder.embed('fake', 'patient')").fetchone())  # type: ignore[arg-type]
    )
    asker.start()
    with running(installed, CDC_EMBEDDER_SQL_EMBED="on"):
        asker.join()
    assert same(asked[0], "patient")


def test_a_request_is_heard_on_a_server_where_nothing_else_happens(served: Bench) -> None:
    """Before PostgreSQL 17 it lies in the server's buffers until the service has it flushed."""
    served.admin.execute("SET cdc_embedder.embed_timeout = DEFAULT")
    for n in range(3):
        [(found,)] = served.admin.execute("SELECT cdc_embedder.embed('fake', %s)", (f"quiet {n}",)).fetchall()
        assert same(found, f"quiet {n}")


def test_the_timeout_is_a_duration(served: Bench) -> None:
    make_model(served, "sleepy", delay_s=2)
    served.admin.execute("SET cdc_embedder.embed_timeout = 300")
    with pytest.raises(psycopg.errors.CannotConnectNow, match=r"no service answered within 00:00:00\.3"):
        served.admin.execute("SELECT cdc_embedder.embed('sleepy', 'a')")
    for wrong in ("soon", "9999999 years", "999999999999999999", "0", "-5s", "25h", "infinity"):
        served.admin.execute("SELECT set_config('cdc_embedder.embed_timeout', %s, false)", (wrong,))
        with pytest.raises(psycopg.errors.InvalidParameterValue, match=r"no duration|out of range") as refusal:
            served.admin.execute("SELECT cdc_embedder.embed('fake', 'a')")
        assert refusal.value.diag.message_hint, wrong


def test_a_lock_that_a_stranger_keeps_to_himself_holds_no_asker_up(served: Bench) -> None:
    """Any role may take that by which the service knows, before PostgreSQL 17, that somebody waits."""
    with psycopg.connect(served.dsn_admin, autocommit=True) as stranger:
        stranger.execute("SELECT pg_advisory_lock(1667523429, 1)")
        served.admin.execute("SET statement_timeout = '100s'")
        for n in range(3):
            [(found,)] = served.admin.execute("SELECT cdc_embedder.embed('fake', %s)", (f"q {n}",)).fetchall()
            assert same(found, f"q {n}")
    assert served.admin.execute(
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
    ).fetchone() == (0,)


def test_a_cancelled_request_leaves_no_lock(served: Bench) -> None:
    """Before PostgreSQL 17 an asker holds one, by which the service knows that requests are to be flushed."""
    make_model(served, "sleepy", delay_s=2)
    served.admin.execute("SET statement_timeout = '300ms'")
    with pytest.raises(psycopg.errors.QueryCanceled):
        served.admin.execute("SELECT cdc_embedder.embed('sleepy', 'a')")
    served.admin.execute("RESET statement_timeout")
    assert served.admin.execute(
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
    ).fetchone() == (0,)


def test_the_service_may_die_and_its_slot_be_lost_and_sql_is_answered_again(installed: Bench) -> None:
    make_model(installed)
    make_documents(installed, 10)
    admin = installed.admin
    admin.execute("SET cdc_embedder.embed_timeout = '60s'")
    with running(installed, CDC_EMBEDDER_SQL_EMBED="on", CDC_EMBEDDER_WAL_SENDER_TIMEOUT_S="3") as service:
        service.wait_for_log("SQL is answered")
        service.kill()
        service.start()
        [(found,)] = admin.execute("SELECT cdc_embedder.embed('fake', 'after a kill')").fetchall()
        assert same(found, "after a kill")
        drop = (
            "SELECT pg_terminate_backend(active_pid), pg_drop_replication_slot(slot_name) FROM pg_replication_slots"
            f" WHERE slot_name = '{installed.slot}_embed'"
        )
        until(lambda: done(admin, drop), "it cannot be dropped")
        [(found,)] = until_answered(admin)
        assert same(found, "after a loss")
        wait_caught_up(installed)  # rows were not troubled by any of this


def done(admin: psycopg.Connection[Any], statement: str) -> bool:
    """Whether it went through: a walsender that was just ended may still hold its slot."""
    try:
        admin.execute(statement)  # type: ignore[call-overload]
    except psycopg.errors.ObjectInUse:
        return False
    return True


def until_answered(admin: psycopg.Connection[Any]) -> list[Any]:
    """An answer, as soon as there is a slot again."""
    found: list[Any] = []

    def ask() -> bool:
        try:
            found[:] = admin.execute("SELECT cdc_embedder.embed('fake', 'after a loss')").fetchall()
        except psycopg.errors.ObjectNotInPrerequisiteState:
            return False
        return True

    until(ask, "never answered again")
    return found


def test_queries_are_answered_while_a_backfill_runs(installed: Bench) -> None:
    """Ahead of it: whoever stands behind the rows that wait is answered when nearly all of them are embedded."""
    make_model(installed, delay_per_text_s=0.002)
    make_documents(installed, 10_000)
    installed.admin.execute("SET cdc_embedder.embed_timeout = '60s'")
    with running(installed, CDC_EMBEDDER_SQL_EMBED="on") as service:
        service.wait_for_log("SQL is answered")
        done = [embedded(installed)]
        for n in range(20):
            [(found,)] = installed.admin.execute("SELECT cdc_embedder.embed('fake', %s)", (f"q {n}",)).fetchall()
            assert same(found, f"q {n}")
            done.append(embedded(installed))
        assert done[-1] < 10_000, "the backfill was over: nothing was shown"
        assert max(after - before for before, after in pairwise(done)) <= 2_000


def embedded(bench: Bench) -> int:
    return bench.admin.execute("SELECT count(embedding) FROM documents").fetchone()[0]  # type: ignore[index]
