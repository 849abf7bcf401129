"""No text of a row, of a prompt or of a question is ever logged, nor kept beside a failed row, whatever goes wrong.

Every text that passes through the service holds a marker, its keys another one; the log is at its most talkative. Run
as a module, this file is the service with a bug in it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from psycopg.types.json import Jsonb

from cdc_embedder import cli, failpoints
from cdc_embedder.embedded import Server
from cdc_embedder.embedding.base import Embedded, InputType
from cdc_embedder.embedding.fake import FakeEmbedder
from tests.configuring import one
from tests.documents import target_type
from tests.embedding_api import Api, api
from tests.faults.test_encodings import database
from tests.faults.test_encodings import insert as insert_bytes
from tests.servers import Bench
from tests.service import Service, running, status, until, wait_caught_up

TEXT = "zqtext7"
KEY = "zqkey7"
PROMPT = "zqprompt7"
TEMPLATE = "zqtemplate7"
QUESTION = "zqquestion7"
BESIDE = "zqbeside7"
ECHO = "zqecho7"
MARKERS = re.compile(r"zq[a-z]+7")

FORMS = ("text", "json")


def assert_silent(bench: Bench, service: Service) -> None:
    """Nothing in the log, in what is told of failures, or in what is told over HTTP."""
    assert len(service.log.splitlines()) > 5
    told = service.log
    for where in ("failed", "status"):
        for (row,) in bench.admin.execute(f"SELECT to_jsonb(f) - 'key' FROM cdc_embedder.{where} f").fetchall():  # type: ignore[arg-type]
            told += json.dumps(row)
    for table in ("column_state", "scan", "progress", "leader", "answer"):
        for (row,) in bench.admin.execute(f"SELECT to_jsonb(f) FROM cdc_embedder.{table} f").fetchall():  # type: ignore[arg-type]
            told += json.dumps(row)
    found = re.findall(r"health is served at (http://[^/]+)/healthz", service.log)
    if found and service.exit_status is None:
        told += "".join(httpx.get(found[-1] + path).text for path in ("/healthz", "/readyz", "/metrics"))
    lines = [line for line in told.splitlines() if MARKERS.search(line)]
    assert not lines, lines


def make_table(bench: Bench, model: str = "fake", **options: Any) -> None:
    bench.admin.execute(
        "INSERT INTO cdc_embedder.model (name, backend, dimensions, options, document_prompt, query_prompt)"
        " VALUES (%s, %s, 8, %s, %s, %s)",
        (model, "fake" if model == "fake" else "openai", Jsonb(options), f"{PROMPT} ", f"{PROMPT} "),
    )
    bench.admin.execute(
        f"CREATE TABLE documents (id text PRIMARY KEY, beside text DEFAULT '{BESIDE}', title text, body text,"  # type: ignore[arg-type]
        f" embedding {target_type(bench)}, CONSTRAINT fair CHECK (embedding IS NULL OR body NOT LIKE '%unfair%'))"
    )
    bench.grant("documents", ["id"], ["title", "body"], "embedding")
    insert(bench, 0, 40)
    bench.admin.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, target_column, model, template)"
        " VALUES ('documents', 'embedding', %s, %s)",
        (model, f"{TEMPLATE} {{title}} {TEMPLATE}: {{body}}"),
    )


def insert(bench: Bench, begin: int, end: int, word: str = "fine") -> None:
    bench.admin.execute(
        f"INSERT INTO documents (id, title, body) SELECT '{KEY} ' || n, '{TEXT} title ' || n,"  # type: ignore[arg-type]
        f" '{TEXT} {word} ' || n || repeat(' {TEXT}', 300) FROM generate_series(%s::int, %s::int) n",
        (begin + 1, end),
    )


def failed(bench: Bench, rows: int, service: Service) -> None:
    until(
        lambda: status(bench)[0]["failed"] == rows, "never so many failed", lambda: (status(bench), service.log[-5000:])
    )


LOUD = f"""
CREATE FUNCTION loud() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.body LIKE '%notice%' THEN
        RAISE WARNING 'a warning about {ECHO} %', NEW.body USING DETAIL = NEW.body, HINT = NEW.title;
    ELSIF NEW.body LIKE '%raise%' THEN
        RAISE EXCEPTION 'refused: {ECHO} %', NEW.body USING DETAIL = NEW.body, HINT = NEW.title;
    ELSIF NEW.body LIKE '%number%' THEN
        PERFORM NEW.body::int;
    ELSIF NEW.body LIKE '%denied%' THEN
        RAISE EXCEPTION 'denied: {ECHO} %', NEW.body USING ERRCODE = 'insufficient_privilege';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER loud BEFORE UPDATE ON documents FOR EACH ROW EXECUTE FUNCTION loud();
ALTER TABLE documents ENABLE ALWAYS TRIGGER loud;
"""
"""A trigger of the application's that says aloud what it sees."""


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_model_or_database_refuse_are_not_quoted(installed: Bench, form: str) -> None:
    make_table(installed, reject="poison", nan="nothing")
    with running(installed, CDC_EMBEDDER_LOG_FORMAT=form, CDC_EMBEDDER_HTTP="127.0.0.1:0") as service:
        wait_caught_up(installed)
        insert(installed, 100, 104, "poison")
        insert(installed, 110, 112, "nothing")
        insert(installed, 120, 124, "unfair")
        failed(installed, 10, service)
        installed.admin.execute(LOUD)
        insert(installed, 200, 202, "notice")
        insert(installed, 210, 213, "raise")
        failed(installed, 13, service)
        insert(installed, 220, 223, "number")
        failed(installed, 16, service)
        installed.admin.execute("SELECT cdc_embedder.retry_failed('documents')")
        until(lambda: one(installed.admin, "SELECT min(attempts) FROM cdc_embedder.failed") >= 2, "never again")
        assert_silent(installed, service)
        assert service.stop() == 0
        assert_silent(installed, service)


@pytest.mark.parametrize("form", FORMS)
def test_an_error_that_concerns_the_column_is_not_quoted_either(installed: Bench, form: str) -> None:
    """The database's message is what an operator needs, where it is the server's own; a trigger's may hold anything."""
    make_table(installed)
    installed.admin.execute(LOUD)
    with running(installed, CDC_EMBEDDER_LOG_FORMAT=form, CDC_EMBEDDER_HTTP="127.0.0.1:0") as service:
        wait_caught_up(installed)
        insert(installed, 200, 203, "denied")
        until(lambda: status(installed)[0]["last_error"], "no error", lambda: service.log)
        assert_silent(installed, service)
    installed.admin.execute("DROP TRIGGER loud ON documents")


@pytest.mark.parametrize("form", FORMS)
def test_questions_are_not_logged_whether_answered_refused_or_too_late(bench18: Bench, form: str) -> None:
    make_table(bench18, reject="poison")
    limits = {"CDC_EMBEDDER_HTTP": "127.0.0.1:0", "CDC_EMBEDDER_HTTP_MAX_BYTES": "20000"}
    with running(bench18, CDC_EMBEDDER_LOG_FORMAT=form, CDC_EMBEDDER_SQL_EMBED="on", **limits) as service:
        service.wait_for_log("SQL is answered")
        wait_caught_up(bench18)
        with psycopg.connect(bench18.dsn_admin, autocommit=True) as session:
            session.execute("SET cdc_embedder.embed_timeout = '60s'")
            for function in ("embed", "embed_query", "embed_document"):
                session.execute(f"SELECT cdc_embedder.{function}('fake', %s)", (QUESTION,))  # type: ignore[arg-type]
            with pytest.raises(psycopg.Error):
                session.execute("SELECT cdc_embedder.embed('fake', %s)", (f"{QUESTION} poison",))
            with pytest.raises(psycopg.Error):
                session.execute("SELECT cdc_embedder.embed(%s, %s)", (f"{QUESTION} model", QUESTION))
            session.execute(
                "SELECT pg_logical_emit_message(false, 'cdc_embedder.embed', %s::text)", (f"{QUESTION} forged " * 9,)
            )
            session.execute("SET cdc_embedder.embed_timeout = '0s'")
            with pytest.raises(psycopg.Error):
                session.execute("SELECT cdc_embedder.embed('fake', %s)", (QUESTION,))
        found = re.search(r"health is served at (http://[^/]+)/healthz", service.log)
        assert found is not None
        url = found[1] + "/v1/embeddings"
        for body in (
            {"model": "fake", "input": QUESTION},
            {"model": "fake", "input": [QUESTION, f"{QUESTION} poison"]},
            {"model": f"{QUESTION} model", "input": QUESTION},
            {"model": "fake", "input": QUESTION, QUESTION: QUESTION},
            {"model": "fake", "input": QUESTION * 10_000},
            {"model": "fake", "input": [[QUESTION]]},
        ):
            httpx.post(url, json=body, timeout=60)
        httpx.post(url, content=f'{{"model": "{QUESTION}', headers={"Content-Type": "application/json"})
        httpx.get(f"{found[1]}/v1/{QUESTION}?{QUESTION}", headers={"X": QUESTION})
        assert_silent(bench18, service)
        assert service.stop() == 0
        assert_silent(bench18, service)


class Garbled(Api):
    """Answers with something else than embeddings, which quotes what was asked."""

    def _answer(self, code: int, body: object) -> None:
        super()._answer(code, [f"{ECHO} {body}"])


def test_a_service_that_fails_garbles_and_goes_is_not_quoted(bench18: Bench) -> None:
    with api() as server:
        base = f"http://127.0.0.1:{server.server_port}/v1"
        make_table(bench18, "api", base_url=base, timeout_s=2)
        with running(bench18, CDC_EMBEDDER_LOG_FORMAT="json", CDC_EMBEDDER_HTTP="127.0.0.1:0") as service:
            wait_caught_up(bench18)
            insert(bench18, 100, 103, "poison")
            failed(bench18, 3, service)
            server.down = True
            insert(bench18, 110, 120)
            until(lambda: "503" in (status(bench18)[0]["reason"] or ""), "no outage", lambda: status(bench18))
            server.down = False
            server.RequestHandlerClass = Garbled
            until(lambda: "something else than embeddings" in service.log, "never garbled", lambda: service.log)
            server.RequestHandlerClass = Api
            server.pause_s = 4.0
            until(lambda: "did not answer within" in service.log, "never too late", lambda: service.log)
            server.pause_s = 0.0
            until(lambda: status(bench18)[0]["pending"] == 0, "never again", lambda: service.log)
            insert(bench18, 130, 140)
            server.shutdown()
            server.server_close()
            insert(bench18, 140, 150)
            until(lambda: "cannot be reached" in service.log, "never gone", lambda: service.log)
            assert_silent(bench18, service)


def test_a_crash_and_what_is_done_about_it_are_not_quoted(bench18: Bench) -> None:
    make_table(bench18, exit="deadly")
    environment = {"CDC_EMBEDDER_LOG_FORMAT": "text", "CDC_EMBEDDER_HTTP": "127.0.0.1:0"}
    with running(
        bench18, "tests.faults.failing", CDC_TEST_SET="cdc_embedder.pipeline.TRIAL_SECONDS=0.5", **environment
    ) as service:
        wait_caught_up(bench18)
        insert(bench18, 100, 101, "deadly")
        for _ in range(2):
            assert service.wait() == 139
            assert_silent(bench18, service)
            service.start()
        failed(bench18, 1, service)
        assert_silent(bench18, service)


def test_bytes_that_are_no_text_are_not_quoted(pg18: Server) -> None:
    with database(pg18, "pgoutput", "SQL_ASCII") as bench:
        insert_bytes(bench, KEY.encode(), TEXT.encode(), BESIDE.encode())
        with Service(bench) as service:
            service.start()
            wait_caught_up(bench)
            for number, wrong in enumerate((b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xe2\x82")):
                insert_bytes(bench, b"%s %d" % (KEY.encode(), number), TEXT.encode() + wrong, BESIDE.encode())
            failed(bench, 4, service)
            insert_bytes(bench, KEY.encode() + b"\xff", TEXT.encode(), BESIDE.encode())
            until(lambda: len(service.log.splitlines()) > 5, "silent")
            assert_silent(bench, service)


# Bugs: exceptions that quote what they choked on

RAISED = {"a ValueError": ValueError, "a RuntimeError": RuntimeError, "an OSError": OSError, "a KeyError": KeyError,
          "an odd one": type("Odd", (Exception,), {})}  # fmt: skip

PLACES = ("received", "fetched", "embedded", "written", "confirmed")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("raised", RAISED)
def test_an_exception_inside_a_model_is_not_quoted(bench18: Bench, form: str, raised: str, tmp_path: Path) -> None:
    make_table(bench18)
    switch = tmp_path / "on"
    environment = {"CDC_TEST_RAISE": raised, "CDC_TEST_WHEN": str(switch), "CDC_EMBEDDER_HTTP": "127.0.0.1:0",
                   "CDC_EMBEDDER_LOG_FORMAT": form, "CDC_EMBEDDER_SQL_EMBED": "on"}  # fmt: skip
    with running(bench18, "tests.integration.test_log_silence", **environment) as service:
        service.wait_for_log("SQL is answered")
        wait_caught_up(bench18)
        switch.touch()
        insert(bench18, 100, 103, "buggy")
        until(lambda: status(bench18)[0]["last_error"], "no error", lambda: service.log)
        with psycopg.connect(bench18.dsn_admin, autocommit=True) as session:
            session.execute("SET cdc_embedder.embed_timeout = '20s'")
            with pytest.raises(psycopg.Error) as refusal:
                session.execute("SELECT cdc_embedder.embed('fake', %s)", (f"{QUESTION} buggy",))
            assert not MARKERS.search(str(refusal.value))
        found = re.search(r"health is served at (http://[^/]+)/healthz", service.log)
        assert found is not None
        answer = httpx.post(
            found[1] + "/v1/embeddings", json={"model": "fake", "input": f"{QUESTION} buggy"}, timeout=60
        )
        assert answer.status_code >= 400
        assert not MARKERS.search(answer.text)
        assert_silent(bench18, service)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", PLACES)
def test_a_bug_is_told_by_its_place_and_not_by_its_message(bench18: Bench, form: str, place: str) -> None:
    make_table(bench18)
    environment = {"CDC_TEST_RAISE_AT": place, "CDC_EMBEDDER_LOG_FORMAT": form}
    with running(bench18, "tests.integration.test_log_silence", **environment) as service:
        assert service.wait() == 1
        assert "a bug, please report it" in service.log
        assert "Error" in service.log
        assert_silent(bench18, service)


def test_the_markers_would_be_found(bench18: Bench) -> None:
    """What looks for them sees the log, the failures and the states."""
    make_table(bench18)
    with running(bench18) as service:
        wait_caught_up(bench18)
        assert_silent(bench18, service)
        bench18.admin.execute(
            "UPDATE cdc_embedder.ledger_1 SET state = 'failed', error = %s", (f"cannot embed {TEXT}",)
        )
        with pytest.raises(AssertionError, match=TEXT):
            assert_silent(bench18, service)
    service._log.write_text("line\n" * 10 + f"2026-01-01 info {QUESTION}\n")
    bench18.admin.execute("UPDATE cdc_embedder.ledger_1 SET error = ''")
    with pytest.raises(AssertionError, match=QUESTION):
        assert_silent(bench18, service)
    service.end()


def choke(kind: type[Exception], switch: Path) -> None:
    """A model that raises, quoting every text, as soon as there is the file `switch`."""
    embed = FakeEmbedder.embed

    def quoting(self: FakeEmbedder, texts: Sequence[str], input_type: InputType) -> Embedded:
        if switch.exists() and any("buggy" in text for text in texts):
            raise kind(f"{ECHO}: cannot digest {list(texts)}")
        return embed(self, texts, input_type)

    FakeEmbedder.embed = quoting  # type: ignore[method-assign]


def stumble(place: str) -> None:
    """A bug at a place, whose exception and its cause quote."""

    def hook(reached: str) -> None:
        if reached == place:
            raise LookupError(f"{ECHO}: {TEXT} {KEY}") from ValueError(f"{ECHO} as a cause")

    failpoints.hook = hook


if __name__ == "__main__":
    if raised := os.environ.get("CDC_TEST_RAISE"):
        choke(RAISED[raised], Path(os.environ["CDC_TEST_WHEN"]))
    if at := os.environ.get("CDC_TEST_RAISE_AT"):
        stumble(at)
    sys.exit(cli.main())  # type: ignore[func-returns-value]
