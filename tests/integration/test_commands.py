"""Pause, resume, retry, failed, doctor: what an operator types, and what the running service then does."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.commands import answers, asked, cli, fails, succeeds
from tests.documents import configure_documents, make_documents, make_model, target_type
from tests.servers import Bench, bench_with, bindir_18
from tests.service import running, status, until, wait_caught_up

ENABLED = "SELECT target_column::text, enabled FROM cdc_embedder.embedding_column ORDER BY id"


def add_second(bench: Bench) -> None:
    """Another column of the same table."""
    bench.admin.execute(f"ALTER TABLE documents ADD second {target_type(bench)}")  # type: ignore[arg-type]
    bench.grant("documents", ["id"], ["body"], "second")
    bench.admin.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
        " VALUES ('documents', '{body}', 'second', 'fake')"
    )


def enabled(bench: Bench) -> list[Any]:
    return bench.admin.execute(ENABLED).fetchall()


def test_a_column_is_paused_and_resumed_alone_or_with_its_table(bench18: Bench) -> None:
    make_model(bench18)
    make_documents(bench18)
    add_second(bench18)
    said = succeeds(bench18, "pause", "Public.Documents.second")
    assert said == "1 column(s) paused until: cdc-embedder resume Public.Documents.second\n"
    assert enabled(bench18) == [("embedding", True), ("second", False)]
    assert succeeds(bench18, "pause", "documents").startswith("2 column(s) paused")
    assert enabled(bench18) == [("embedding", False), ("second", False)]
    said = succeeds(bench18, "resume", "documents.embedding")
    assert said == "1 column(s) go on; a scan finds what changed meanwhile\n"
    assert enabled(bench18) == [("embedding", True), ("second", False)]
    assert succeeds(bench18, "resume", "public.documents").startswith("2 column(s) go on")
    assert enabled(bench18) == [("embedding", True), ("second", True)]


def test_what_changed_while_a_column_was_paused_is_embedded_when_it_goes_on(bench: Bench) -> None:
    make_model(bench)
    make_documents(bench, 5)
    with running(bench) as service:
        wait_caught_up(bench)
        succeeds(bench, "pause", "documents.embedding")
        until(lambda: status(bench)[0]["state"] == "paused", "the column was never paused")
        bench.admin.execute("UPDATE documents SET body = 'another' WHERE id = 1; DELETE FROM documents WHERE id = 2")
        shown = succeeds(bench, "status")
        assert "paused" in shown
        succeeds(bench, "resume", "documents.embedding")
        wait_caught_up(bench)
        [report] = answers(bench, "verify")
        assert (report["current"], report["stale"], report["missing"]) == (4, 0, 0)
        assert service.stop() == 0


def test_a_name_is_a_column_where_one_is_configured_and_else_a_table(bench18: Bench) -> None:
    """`documents.embedding` may be a table of a schema, too."""
    make_model(bench18)
    make_documents(bench18)
    bench18.admin.execute(
        f"CREATE SCHEMA documents; CREATE TABLE documents.other (id int PRIMARY KEY, body text,"
        f" embedding {target_type(bench18)}); CREATE TABLE documents.embedding (id int PRIMARY KEY)"  # type: ignore[arg-type]
    )
    bench18.admin.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
        " VALUES ('documents.other', '{body}', 'embedding', 'fake')"
    )
    succeeds(bench18, "pause", "documents.embedding")
    assert enabled(bench18) == [("embedding", False), ("embedding", True)]
    succeeds(bench18, "pause", "documents.other")
    assert enabled(bench18) == [("embedding", False), ("embedding", False)]
    succeeds(bench18, "resume", "documents.other.embedding")
    assert enabled(bench18) == [("embedding", False), ("embedding", True)]


@pytest.mark.parametrize("command", ["pause", "resume", "failed"])
@pytest.mark.parametrize("name", ["nowhere", "nowhere.embedding", "documents.embeding", "a.b.c", "a.b.c.d"])
def test_a_name_that_means_nothing_is_told(bench18: Bench, command: str, name: str) -> None:
    make_model(bench18)
    make_documents(bench18)
    assert fails(bench18, command, name) == (
        f"cdc-embedder: {name} is neither a table nor a configured column. see: cdc-embedder status\n"
    )


@pytest.mark.parametrize("command", ["pause", "resume", "retry"])
def test_a_table_without_configured_columns_is_told(bench18: Bench, command: str) -> None:
    bench18.admin.execute("CREATE TABLE others (id int)")
    assert "no embedding column of public.others is configured" in fails(bench18, command, "public.others").replace(
        "of others", "of public.others"
    )


def test_a_column_whose_table_was_replaced_is_bound_to_the_one_of_its_name_by_resume(bench18: Bench) -> None:
    make_model(bench18)
    make_documents(bench18)
    add_second(bench18)
    bench18.admin.execute(
        "CREATE TABLE anew (LIKE documents INCLUDING ALL); ALTER TABLE documents RENAME TO old;"
        " ALTER TABLE anew RENAME TO documents"
    )
    succeeds(bench18, "resume", "documents.embedding")
    assert bench18.admin.execute(
        "SELECT target_column::text, source_table::text FROM cdc_embedder.embedding_column ORDER BY id"
    ).fetchall() == [("embedding", "documents"), ("second", "old")]


def test_a_column_whose_table_was_dropped_is_removed_by_the_name_that_status_shows(bench18: Bench) -> None:
    make_model(bench18)
    make_documents(bench18)
    bench18.admin.execute(f'CREATE SCHEMA "Shop"; CREATE TABLE "Shop".t2 (id int PRIMARY KEY, body text,'
                          f' embedding {target_type(bench18)}, "Vec Tor" {target_type(bench18)})')  # type: ignore[arg-type]  # fmt: skip
    for target in ("embedding", "Vec Tor"):
        bench18.admin.execute(
            "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
            " VALUES ('\"Shop\".t2', '{body}', %s, 'fake')",
            (target,),
        )
    bench18.admin.execute('DROP SCHEMA "Shop" CASCADE; DROP TABLE documents')
    for name in ('"Shop".documents.embedding', "public.t2.embedding", "t2.embedding", '"Shop".t2.vec'):
        assert "is not configured" in fails(bench18, "remove", name)
    shown = succeeds(bench18, "status")
    for name in ('"Shop".t2.embedding', '"Shop".t2."Vec Tor"', "public.documents.embedding"):
        assert name in shown
    assert succeeds(bench18, "remove", "documents.embedding") == (
        "documents.embedding is not filled any more; its vectors stay\n"
    )
    done = asked(bench18, "remove", '"Shop".t2."Vec Tor"')
    assert (done.returncode, done.stderr) == (0, "")
    assert enabled(bench18) == [("embedding", True)]


def test_what_else_is_asked_of_a_table_that_was_dropped_is_told_that_it_was(bench18: Bench) -> None:
    make_model(bench18)
    make_documents(bench18)
    bench18.admin.execute("DROP TABLE documents")
    for name in ("documents", "documents.embedding", "public.documents.embedding"):
        for command in ("pause", "resume"):
            assert fails(bench18, command, name) == (
                "cdc-embedder: the table public.documents was dropped. cdc-embedder remove ends that; or make a table"
                " of that name, and resume it\n"
            )
        assert succeeds(bench18, "failed", name) == "no row failed, of those that were asked for\n"
    make_documents(bench18, configure=False)
    assert succeeds(bench18, "resume", "documents").startswith("1 column(s) go on")


def test_of_two_columns_of_one_name_none_is_removed_by_it(bench18: Bench) -> None:
    """The table was dropped, made anew and configured anew: status shows both."""
    make_model(bench18)
    make_documents(bench18)
    bench18.admin.execute("DROP TABLE documents")
    make_documents(bench18)
    sentence = fails(bench18, "remove", "documents.embedding")
    assert "2 configured columns are called documents.embedding" in sentence
    [statement] = re.findall(r"DELETE FROM .*", sentence)
    assert statement.endswith("id = 1")
    bench18.admin.execute(statement)
    succeeds(bench18, "remove", "documents.embedding")
    assert enabled(bench18) == []


def test_a_column_is_not_removed_by_the_name_that_its_table_had_before_another_took_it(bench18: Bench) -> None:
    make_model(bench18)
    make_documents(bench18)
    bench18.admin.execute("ALTER TABLE documents RENAME TO old")
    make_documents(bench18)
    succeeds(bench18, "remove", "documents.embedding")
    assert bench18.admin.execute("SELECT source_table::text FROM cdc_embedder.embedding_column").fetchall() == [
        ("old",)
    ]
    succeeds(bench18, "remove", "old.embedding")
    assert enabled(bench18) == []


def test_a_schema_that_is_older_than_the_program_is_told_where_something_of_it_is_missing(bench18: Bench) -> None:
    older = "the schema is older than this cdc-embedder: run cdc-embedder init"
    bench18.admin.execute("DROP FUNCTION cdc_embedder.take_slot_again")
    assert older not in fails(bench18, "resume", "--slot")
    bench18.admin.execute("DELETE FROM cdc_embedder.migration WHERE version > 1")
    assert older in fails(bench18, "resume", "--slot")
    assert older not in fails(bench18, "reconcile", "pg_class")  # it is there, and says what is wrong
    bench18.admin.execute("INSERT INTO cdc_embedder.migration (version, name) VALUES (1000, 'of tomorrow')")
    assert "newer than this cdc-embedder: install the newer one" in fails(bench18, "resume", "--slot")


def test_resume_wants_a_name_or_the_slot(bench18: Bench) -> None:
    for arguments in ([], ["documents", "--slot"]):
        assert "name a table or a column, or give --slot alone" in fails(bench18, "resume", *arguments)
    assert succeeds(bench18, "resume", "--slot") == "no slot was given up: nothing to do\n"


def test_a_slot_that_was_given_up_is_taken_again(bench18: Bench) -> None:
    make_model(bench18)
    make_documents(bench18, 3)
    bench18.admin.execute("INSERT INTO cdc_embedder.given_up (slot, retained_bytes) VALUES (%s, 1)", (bench18.slot,))
    with running(bench18) as service:
        service.wait_for_log("was given up")
        assert "was given up" in succeeds(bench18, "status")
        assert succeeds(bench18, "resume", "--slot") == (
            "the running service makes the slot anew, and scans every table\n"
        )
        wait_caught_up(bench18)
        assert service.stop() == 0


@pytest.fixture
def refused(bench18: Bench) -> Bench:
    """Rows 1 to 3 and their text are refused by the model, row 4 of another table by another's sentence."""
    make_model(bench18, reject="bad", nan="odd")
    make_documents(bench18)
    bench18.admin.execute("INSERT INTO documents (body) VALUES ('bad 1'), ('bad 2'), ('odd'), ('good')")
    bench18.admin.execute(
        f'CREATE TABLE others (a text, "B" int, body text, embedding {target_type(bench18)}, PRIMARY KEY (a, "B"))'
    )  # type: ignore[arg-type]
    bench18.grant("others", ["a", "B"], ["body"], "embedding")
    bench18.admin.execute("INSERT INTO others VALUES ('k [b]' || chr(27) || 'x', 7, 'bad')")
    bench18.admin.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
        " VALUES ('others', '{body}', 'embedding', 'fake')"
    )
    with running(bench18) as service:
        until(lambda: count_failed(bench18) == 4, "the rows never failed", lambda: status(bench18))
        assert service.stop() == 0
    return bench18


def count_failed(bench: Bench) -> int:
    row = bench.admin.execute("SELECT count(*) FROM cdc_embedder.failed").fetchone()
    assert row is not None
    return int(row[0])


def test_failed_lists_filters_and_shows_the_rows_that_could_not_be_embedded(refused: Bench) -> None:
    rows = answers(refused, "failed")
    assert len(rows) == 4
    view = refused.admin.execute("SELECT * FROM cdc_embedder.failed LIMIT 0").description
    assert view is not None
    assert list(rows[0]) == [field.name for field in view]
    assert sorted(row["retry_at"] for row in rows) == [row["retry_at"] for row in rows]
    of_documents = answers(refused, "failed", "documents")
    assert {row["key"]["id"] for row in of_documents} == {1, 2, 3}
    assert answers(refused, "failed", "documents.embedding") == of_documents
    assert [row["key"]["id"] for row in answers(refused, "failed", "--error", "NOT FINITE")] == [3]
    assert [row["key"]["id"] for row in answers(refused, "failed", "--key", "2")] == [2]
    assert [row["key"]["B"] for row in answers(refused, "failed", "--key", "7")] == [7]
    assert answers(refused, "failed", "others", "--error", "not finite") == []
    assert len(answers(refused, "failed", "--limit", "2")) == 2


def test_failed_is_a_line_a_row_or_a_line_a_field_and_a_key_cannot_steer_the_terminal(refused: Bench) -> None:
    shown = succeeds(refused, "failed")
    assert shown.splitlines()[0].split() == ["column", "key", "attempts", "next", "try", "error"]
    assert "public.documents.embedding" in shown
    assert '"id": 1' in shown
    assert "k [b]" in shown
    assert "and 3 more: --limit shows them" in succeeds(refused, "failed", "--limit", "1")
    whole = succeeds(refused, "failed", "others", "--show")
    fields = [line.split()[0] for line in whole.splitlines() if line]
    assert fields == ["column_id", "source_table", "target_column", "key", "error", "attempts", "retry_at"]
    for text in (shown, whole):
        assert "\x1b" not in text
        assert "bad" not in text
    assert succeeds(refused, "failed", "documents", "--key", "4") == "no row failed, of those that were asked for\n"


def test_a_key_with_what_would_steer_a_terminal_is_shown_without_it(refused: Bench) -> None:
    refused.admin.execute("UPDATE cdc_embedder.ledger_2 SET key_1 = chr(155) || '31m' || chr(8238) || 'x'")
    for text in (succeeds(refused, "failed", "others"), succeeds(refused, "failed", "others", "--show")):
        assert "\x9b" not in text
        assert "\u202e" not in text
        assert "\N{REPLACEMENT CHARACTER}31m" in text


def test_a_row_that_is_not_tried_again_by_itself_is_told_so(refused: Bench) -> None:
    refused.admin.execute("UPDATE cdc_embedder.ledger_1 SET retry_at = NULL WHERE key_1 = 1")
    assert "not by itself: cdc-embedder retry" in succeeds(refused, "failed", "--show", "--key", "1")
    assert answers(refused, "failed")[-1]["retry_at"] is None


def test_retry_has_the_failed_rows_tried_at_once(refused: Bench) -> None:
    refused.admin.execute("UPDATE cdc_embedder.ledger_1 SET retry_at = '2999-01-01' WHERE state = 'failed'")
    refused.admin.execute("UPDATE cdc_embedder.ledger_2 SET retry_at = '2999-01-01' WHERE state = 'failed'")

    def attempts(table: str) -> set[int]:
        return {row["attempts"] for row in answers(refused, "failed", table)}

    before = attempts("others")
    with running(refused) as service:
        until(lambda: status(refused)[0]["state"] == "live", "the column was never live")
        assert succeeds(refused, "retry", "documents") == "3 failed row(s) of documents are tried again\n"
        until(lambda: min(attempts("documents")) > 1, "the rows were not tried again")
        assert attempts("others") == before
        assert service.stop() == 0


def test_a_reader_who_may_see_the_view_may_list_it(refused: Bench) -> None:
    role = f"reader_{refused.database}"
    refused.admin.execute(f"CREATE ROLE {role} LOGIN; GRANT USAGE ON SCHEMA cdc_embedder TO {role}")  # type: ignore[arg-type]
    refused.admin.execute(
        f"GRANT SELECT ON cdc_embedder.failed TO {role}; GRANT EXECUTE ON FUNCTION cdc_embedder._failed() TO {role};"  # type: ignore[arg-type]
        f"GRANT SELECT ON cdc_embedder.embedding_column TO {role}"
    )
    try:
        dsn = refused.server.dsn(refused.database, role)
        assert len(answers(refused, "failed", CDC_EMBEDDER_DSN=dsn)) == 4
        assert len(answers(refused, "failed", "documents", CDC_EMBEDDER_DSN=dsn)) == 3
        assert "permission denied" in fails(refused, "pause", "documents", CDC_EMBEDDER_DSN=dsn)
    finally:
        refused.admin.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "command", [["pause", "t"], ["resume", "t"], ["resume", "--slot"], ["retry", "t"], ["failed"], ["plan", "t", "b"]]
)
def test_without_a_server_or_without_our_schema_each_is_a_sentence(bench18: Bench, command: list[str]) -> None:
    done = cli(*command, CDC_EMBEDDER_DSN="host=/nowhere port=1")
    assert done.returncode == 1
    assert done.stderr.startswith("cdc-embedder: connecting: ")
    assert done.stderr.count("\n") == 1
    postgres = psycopg.conninfo.make_conninfo(bench18.dsn_admin, dbname="postgres")
    sentence = fails(bench18, *command, CDC_EMBEDDER_DSN=postgres)
    assert "run: cdc-embedder init" in sentence or command[0] == "plan"


def test_doctor_says_by_its_exit_status_whether_anything_is_wrong(bench18: Bench) -> None:
    make_model(bench18)
    make_documents(bench18, 1, configure=False)
    sane = asked(bench18, "doctor", "--json", "--no-model")
    findings = json.loads(sane.stdout)
    assert sane.returncode == int(any(finding["level"] == "error" for finding in findings))
    configure_documents(bench18)
    bench18.admin.execute("ALTER TABLE documents DROP CONSTRAINT documents_pkey")
    broken = asked(bench18, "doctor", "--no-model")
    assert broken.returncode == 1, broken.stdout
    assert "primary key" in broken.stdout


def test_a_bug_of_ours_is_told_without_a_row_text_and_with_exit_status_one() -> None:
    program = (
        "import sys; from cdc_embedder import cli; import cdc_embedder.status as s\n"
        "def broken(*a, **k): raise ValueError('the planted ' + 'text')\n"
        "s.show = broken; sys.argv = ['cdc-embedder', 'status']; cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"}, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("cdc-embedder: a bug, please report it: ValueError at")
    assert "the planted text" not in done.stderr


OPERATIONS = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", OPERATIONS, re.MULTILINE | re.DOTALL)


def test_every_statement_and_command_that_the_operations_page_prints_can_be_run() -> None:
    """The slot is one of that name, which nobody reads; `uninstall` goes last."""
    with bench_with(bindir_18(), "pgoutput", {}) as bench:
        make_model(bench)
        make_documents(bench, 10)
        bench.admin.execute("SELECT pg_create_logical_replication_slot('cdc_embedder', 'pgoutput')")
        statements = [
            part for block in blocks("sql") for part in re.sub(r" +--.*", "", block).split(";\n") if part.strip()
        ]
        assert len(statements) > 15
        for statement in statements:
            try:
                bench.admin.execute(statement)  # type: ignore[arg-type]
            except psycopg.errors.UndefinedObject:  # it was dropped by an earlier one
                assert "pg_drop_replication_slot" in statement
        lines = [line for block in blocks("console") for line in block.splitlines()]
        assert all(line.startswith("$ ") for line in lines)
        commands = [shlex.split(line)[2:] for line in dict.fromkeys(lines) if line.startswith("$ cdc-embedder ")]
        assert {line.split()[1] for line in lines} == {"cdc-embedder", "export", "curl"}
        assert len(commands) > 12
        with running(bench) as service:
            wait_caught_up(bench)
            for command in sorted(commands, key=lambda command: command[0] == "uninstall"):
                if command[0] == "uninstall":
                    assert service.stop() == 0
                done = asked(bench, *command, HF_HUB_OFFLINE="1")
                # doctor finds a superuser, or a disk, to its dislike
                assert done.returncode == 0 or command[0] == "doctor", (command, done.stderr)
                assert done.stdout, command


def test_every_alert_has_a_section_and_every_section_an_alert() -> None:
    rules = (Path(__file__).parents[2] / "deploy" / "monitoring" / "alerts.yaml").read_text()
    names = re.findall(r"- alert: (\w+)", rules)
    assert names
    sections = re.findall(r"^### (CdcEmbedder\w+)\n\n(.*?)(?=^##|\Z)", OPERATIONS, re.MULTILINE | re.DOTALL)
    assert sorted(names) == sorted(name for name, _ in sections)
    for name, text in sections:
        assert f"docs/operations.md#{name.lower()}" in rules
        for part in ("*Means:*", "*Lost:*", "*Look", "o:* "):
            assert part in text.replace("*Look and do:*", "*Look and do:* "), (name, part)


def test_every_link_within_the_page_leads_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", OPERATIONS, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([\w-]+)\)", OPERATIONS)) <= anchors
    for page in set(re.findall(r"\]\((\w[\w-]*\.md)", OPERATIONS)):
        assert (Path(__file__).parents[2] / "docs" / page).exists()
