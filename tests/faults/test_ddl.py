"""DDL while the service runs: the column follows, or pauses with a reason and heals; the others go on.

Many tables are altered under one process: each case has a table of its own, and one more, `others`, must be served
whatever happens to them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import psycopg
import pytest

from cdc_embedder.embedding.fake import fake_vector
from tests.documents import make_model
from tests.servers import SERVICE_ROLE
from tests.service import Service, confirmed, running, status, until, wait_caught_up

both_plugins = pytest.mark.parametrize("bench", ["15-wal2json", "18-pgoutput"], indirect=True)


@dataclass(frozen=True)
class Case:
    """What is done to a table `{t} (id, code, body, views, v)` of three rows, and how it looks afterwards.

    `reason`: what `status` says until `heal` was run; None where the column simply follows. `after`: what the
    application does then; everything before it happened without an event that names the rows.
    """

    ddl: str
    reason: str | None = None
    heal: str = ""
    after: str = (
        "INSERT INTO {t} (id, code, body) VALUES (4, 'c4', 'row four'); UPDATE {t} SET body = 'two' WHERE id = 2"
    )
    table: str = "{t}"
    body: str = "body"
    target: str = "v"
    rows: int = 4


CASES = {
    "another_column_added": Case("ALTER TABLE {t} ADD extra text DEFAULT 'constant'"),
    "another_column_added_with_a_volatile_default": Case("ALTER TABLE {t} ADD stamp uuid DEFAULT gen_random_uuid()"),
    "another_column_dropped": Case("ALTER TABLE {t} DROP views"),
    "another_column_renamed": Case("ALTER TABLE {t} RENAME views TO clicks"),
    "another_column_retyped": Case("ALTER TABLE {t} ALTER views TYPE numeric"),
    "source_renamed": Case(
        "ALTER TABLE {t} RENAME body TO content",
        after="INSERT INTO {t} (id, code, content) VALUES (4, 'c4', 'new'); UPDATE {t} SET content = 'x' WHERE id = 2",
        body="content",
    ),
    "names_of_two_columns_swapped": Case(
        "ALTER TABLE {t} RENAME body TO x; ALTER TABLE {t} RENAME note TO body; ALTER TABLE {t} RENAME x TO note",
        after="UPDATE {t} SET note = 'the source goes by this name now' WHERE id = 2",
        body="note",
        rows=3,
    ),
    "source_retyped_to_text": Case("ALTER TABLE {t} ALTER body TYPE text"),
    "source_cut_short": Case(
        "ALTER TABLE {t} ALTER body TYPE varchar(5) USING left(body, 5)", after="SELECT 1", rows=3
    ),
    "source_rewritten": Case("ALTER TABLE {t} ALTER body TYPE text USING upper(body)", after="SELECT 1", rows=3),
    "source_made_anew_in_one_transaction": Case(
        "BEGIN; ALTER TABLE {t} DROP body; ALTER TABLE {t} ADD body text DEFAULT 'filled by the default';"
        " GRANT SELECT (body) ON {t} TO cdc_service;"
        " UPDATE cdc_embedder.embedding_column SET source_columns = '{{body}}' WHERE source_table = '{t}'::regclass;"
        " COMMIT",
        after="SELECT 1",
        rows=3,
    ),
    "source_dropped": Case(
        "ALTER TABLE {t} DROP body",
        "source column was dropped",
        "UPDATE cdc_embedder.embedding_column SET source_columns = '{{note}}' WHERE source_table = '{t}'::regclass",
        after="INSERT INTO {t} (id, code, note) VALUES (4, 'c4', 'by the other column')",
        body="note",
    ),
    "source_no_text_any_more": Case(
        "ALTER TABLE {t} ALTER body TYPE int USING length(body)",
        "not of a text type any more",
        "ALTER TABLE {t} ALTER body TYPE text",
    ),
    "target_renamed": Case("ALTER TABLE {t} RENAME v TO vector_of_body", target="vector_of_body"),
    "target_retyped": Case("ALTER TABLE {t} ALTER v TYPE double precision[]"),
    "target_no_vector_any_more": Case(
        "ALTER TABLE {t} ALTER v TYPE text", "cannot hold a vector", "ALTER TABLE {t} ALTER v TYPE real[] USING NULL"
    ),
    "target_dropped": Case(
        "ALTER TABLE {t} DROP v",
        "target column was dropped",
        "ALTER TABLE {t} ADD v real[]; GRANT SELECT (v), UPDATE (v) ON {t} TO cdc_service;"
        " UPDATE cdc_embedder.embedding_column SET target_column = 'v' WHERE source_table = '{t}'::regclass",
    ),
    "key_renamed": Case(
        "ALTER TABLE {t} RENAME id TO number",
        after="INSERT INTO {t} (number, code, body) VALUES (4, 'c4', 'n'); UPDATE {t} SET body = 'x' WHERE number = 2",
    ),
    "key_retyped": Case("ALTER TABLE {t} ALTER id TYPE bigint"),
    "key_retyped_to_text": Case(
        "ALTER TABLE {t} ALTER id TYPE text",
        after="INSERT INTO {t} (id, code, body) VALUES ('four', 'c4', 'new'); UPDATE {t} SET body = 'x' WHERE id = '2'",
    ),
    "key_dropped_and_added_again": Case(
        "ALTER TABLE {t} DROP CONSTRAINT {t}_pkey",
        "no usable primary key",
        "ALTER TABLE {t} ADD PRIMARY KEY (id); {publish}",
    ),
    "key_dropped_and_another_added": Case(
        "ALTER TABLE {t} DROP CONSTRAINT {t}_pkey",
        "no usable primary key",
        "ALTER TABLE {t} ADD PRIMARY KEY (code); {publish}",
        after="INSERT INTO {t} (id, code, body) VALUES (1, 'c4', 'an id is used twice')",
    ),
    "key_replaced_in_one_transaction": Case(
        "BEGIN; ALTER TABLE {t} DROP CONSTRAINT {t}_pkey; ALTER TABLE {t} ADD PRIMARY KEY (code, id); COMMIT",
        after="INSERT INTO {t} (id, code, body) VALUES (1, 'c4', 'new'); UPDATE {t} SET body = 'x' WHERE code = 'c2'",
    ),
    "table_renamed": Case("ALTER TABLE {t} RENAME TO {t}_of_another_name", table="{t}_of_another_name"),
    "table_moved_to_another_schema": Case("ALTER TABLE {t} SET SCHEMA elsewhere", table="elsewhere.{t}"),
    "table_moved_where_the_service_may_not_go": Case(
        "ALTER TABLE {t} SET SCHEMA closed; UPDATE closed.{t} SET body = 'behind a door' WHERE id = 1",
        "permission denied for schema closed",
        "GRANT USAGE ON SCHEMA closed TO cdc_service",
        table="closed.{t}",
    ),
    "table_of_the_same_name_earlier_on_the_path": Case(
        "CREATE TABLE first.{t} (LIKE {t} INCLUDING ALL); INSERT INTO first.{t} (id, code) VALUES (1, 'other')",
        after="UPDATE {t} SET body = 'me' WHERE id = 1",
        table="public.{t}",
        rows=3,
    ),
    "table_truncated": Case(
        "TRUNCATE {t}", after="INSERT INTO {t} (id, code, body) VALUES (2, 'c2', 'another two')", rows=1
    ),
    "table_truncated_and_filled_in_one_transaction": Case(
        "BEGIN; TRUNCATE {t}; INSERT INTO {t} (id, code, body) VALUES (1, 'c1', 'first of the refilled'); COMMIT",
        after="SELECT 1",
        rows=1,
    ),
    "table_dropped_and_made_anew": Case(
        "DROP TABLE {t}",
        "gone",
        "CREATE TABLE {t} (id int PRIMARY KEY, code text, body text, v real[]);"
        " GRANT SELECT (id, body, v), UPDATE (v) ON {t} TO cdc_service; SELECT cdc_embedder.resume('{t}')",
        after="INSERT INTO {t} VALUES (1, 'c1', 'of the new table')",
        rows=1,
    ),
    "vacuum_full": Case("VACUUM FULL {t}"),
    "cluster": Case("CLUSTER {t} USING {t}_pkey"),
    "toast_settings": Case("ALTER TABLE {t} ALTER body SET STORAGE EXTERNAL, REPLICA IDENTITY FULL"),
}  # fmt: skip


UNTOUCHED = (
    "another_column_added_with_a_volatile_default",
    "another_column_retyped",
    "source_retyped_to_text",
    "target_renamed",
    "table_renamed",
    "table_moved_to_another_schema",
    "vacuum_full",
    "cluster",
)
"""Neither text nor vector of row 1 is another afterwards: it must not cost a call of the model."""


@both_plugins
def test_ddl_of_every_kind_is_followed_or_told_while_the_others_go_on(bench: Any) -> None:
    admin = bench.admin
    make_model(bench)
    for schema in ("elsewhere", "closed", "first"):
        admin.execute(f"CREATE SCHEMA {schema}")
    admin.execute(f"GRANT USAGE ON SCHEMA elsewhere, first TO {SERVICE_ROLE}")
    admin.execute(f'ALTER ROLE {SERVICE_ROLE} IN DATABASE "{bench.database}" SET search_path = first, public')
    tables = {name: f"t_{n}" for n, name in enumerate(CASES)}
    for table in (*tables.values(), "others"):
        make_table(bench, table)
    told = {name: case for name, case in CASES.items() if case.reason is not None}
    with running(bench) as service:
        wait_caught_up(bench)
        before = {name: embedded_at(bench, name) for name in UNTOUCHED}
        for name, case in CASES.items():
            run(bench, "UPDATE {t} SET body = 'just before' WHERE id = 3; " + case.ddl, tables[name])
        for name, case in told.items():
            until(partial(paused, bench, case, tables[name]), f"{name}: no reason", lambda: status(bench))
        others_are_embedded(bench, "while the columns are in error", service)
        for name, case in told.items():
            run(bench, case.heal, tables[name])
        for name, case in CASES.items():
            run(bench, case.after, case.table.format(t=tables[name]))
        for name, case in CASES.items():
            until(
                partial(right, bench, case, tables[name]),
                f"{name}: not every row has the vector of its text",
                partial(rows_of, bench, case, tables[name]),
            )
        others_are_embedded(bench, "in the end", service)
        until(lambda: all(row["state"] == "live" for row in status(bench)), "not healed", lambda: status(bench))
        target = admin.execute("SELECT pg_current_wal_insert_lsn()").fetchone()[0]
        until(lambda: confirmed(bench, target), "the slot stands still", lambda: status(bench))
        assert service.exit_status is None
        assert service.log.count("streaming from the slot") == 1 or bench.plugin == "wal2json", (
            "no session ended for it"
        )
        assert {name: embedded_at(bench, name) for name in UNTOUCHED} == before


def embedded_at(bench: Any, name: str) -> Any:
    """When row 1 of the case's table was embedded."""
    id = list(CASES).index(name) + 1
    return bench.admin.execute(f"SELECT embedded_at FROM cdc_embedder.ledger_{id} WHERE key_1 = 1").fetchone()


@pytest.mark.parametrize("stopped", [False, True])
def test_changes_before_and_after_a_ddl_in_one_transaction_are_followed(bench: Any, stopped: bool) -> None:
    """The stream tells what came before in the old names and the rest in the new; the catalog knows only the new."""
    make_model(bench)
    for table in ("renamed", "retyped", "others"):
        make_table(bench, table)
    with running(bench) as service:
        wait_caught_up(bench)
        if stopped:
            assert service.stop() == 0
        with bench.admin.transaction():
            bench.admin.execute("UPDATE renamed SET body = 'before' WHERE id = 1")
            bench.admin.execute("ALTER TABLE renamed RENAME id TO number")
            bench.admin.execute("ALTER TABLE renamed RENAME body TO content")
            bench.admin.execute("UPDATE renamed SET content = 'between' WHERE number = 2")
            bench.admin.execute("ALTER TABLE renamed RENAME TO renamed_as_well")
            bench.admin.execute("UPDATE renamed_as_well SET content = 'after' WHERE number = 3")
        with bench.admin.transaction():
            bench.admin.execute("UPDATE retyped SET body = 'before' WHERE id = 1")
            bench.admin.execute("ALTER TABLE retyped DROP CONSTRAINT retyped_pkey")
            bench.admin.execute("ALTER TABLE retyped ADD PRIMARY KEY (code)")
            bench.admin.execute("UPDATE retyped SET body = 'between' WHERE id = 2")
            bench.admin.execute("ALTER TABLE retyped ALTER code TYPE varchar(9)")
            bench.admin.execute("UPDATE retyped SET body = 'after' WHERE id = 3")
        if stopped:
            service.start()
        renamed, retyped = Case("", body="content", rows=3), Case("", rows=3)
        until(lambda: right(bench, renamed, "renamed_as_well"), "renamed: stale", lambda: service.log)
        until(lambda: right(bench, retyped, "retyped"), "retyped: stale", lambda: service.log)
        others_are_embedded(bench, "afterwards", service)
        wait_caught_up(bench)


@pytest.mark.parametrize("name", ["key_replaced_in_one_transaction", "target_dropped"])
def test_keys_that_come_while_a_column_takes_another_shape_are_taken_as_it_was(bench18: Any, name: str) -> None:
    """The service sees the DDL, and is made to wait for a lock before it has let go of the keys it holds."""
    bench, case = bench18, CASES[name]
    make_model(bench)
    make_table(bench, "t")
    with running(bench) as service, psycopg.connect(bench.dsn_admin) as other:
        wait_caught_up(bench)
        other.execute("SELECT FROM cdc_embedder.scan FOR UPDATE")
        run(bench, case.ddl, "t")
        bench.admin.execute("NOTIFY cdc_embedder")
        until(lambda: blocked_by(bench, other), "it never looked", lambda: service.log)
        while blocked_by(bench, other):  # until its patience is at an end
            bench.admin.execute("UPDATE t SET note = 'changed'")
            time.sleep(0.01)
        other.rollback()
        run(bench, case.heal or "SELECT 1", "t")
        run(bench, case.after, "t")
        until(lambda: right(bench, case, "t"), "not every row has the vector of its text", lambda: service.log)
        wait_caught_up(bench)
        assert service.exit_status is None


def test_a_column_that_is_removed_holds_nothing_back_while_the_same_look_waits(bench18: Any) -> None:
    """Changes that arrive for it between its removal and the end of that look are passed over."""
    bench = bench18
    make_model(bench)
    make_table(bench, "t")
    bench.admin.execute("ALTER TABLE t ADD w real[]")
    bench.grant("t", ["id"], ["body"], "w")
    configure(bench, "t", "w")
    with running(bench) as service, psycopg.connect(bench.dsn_admin) as other:
        wait_caught_up(bench)
        other.execute("SELECT FROM cdc_embedder.scan WHERE column_id = 2 FOR UPDATE")
        with bench.admin.transaction():
            run(
                bench,
                CASES["key_replaced_in_one_transaction"].ddl.removeprefix("BEGIN; ").removesuffix("; COMMIT"),
                "t",
            )
            bench.admin.execute("DELETE FROM cdc_embedder.embedding_column WHERE id = 1")
        until(lambda: blocked_by(bench, other), "the look never came to the other column", lambda: service.log)
        bench.admin.execute("UPDATE t SET body = 'meanwhile'")
        sent = bench.admin.execute("SELECT pg_current_wal_insert_lsn()").fetchone()[0]
        until(
            lambda: bench.admin.execute("SELECT bool_or(sent_lsn >= %s) FROM pg_stat_replication", (sent,)).fetchone()[
                0
            ],
            "never sent",
        )
        other.rollback()
        until(lambda: right(bench, Case("", target="w", rows=3), "t"), "stale", lambda: service.log)
        wait_caught_up(bench)


def blocked_by(bench: Any, session: psycopg.Connection[Any]) -> bool:
    """Whether another session waits for a lock that this one holds."""
    blocked = bench.admin.execute(
        "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE %s = ANY (pg_blocking_pids(pid)))",
        (session.info.backend_pid,),
    )
    return bool(blocked.fetchone()[0])


@both_plugins
def test_columns_that_swap_their_names_are_not_taken_for_one_another(bench: Any) -> None:
    """Until the catalog is looked at again, statements with the old names would read and write the other column."""
    make_model(bench)
    make_model(bench, "other")
    make_table(bench, "swapped")
    bench.admin.execute("ALTER TABLE swapped ADD w real[]")
    bench.grant("swapped", ["id"], ["body"], "w")
    configure(bench, "swapped", "w", "other")
    with running(bench) as service:
        wait_caught_up(bench)
        with bench.admin.transaction():
            bench.admin.execute("UPDATE swapped SET body = 'before the vectors are swapped' WHERE id = 1")
            run(bench, SWAP.format(t="{t}", a="v", b="w"), "swapped")
        until(
            lambda: right(bench, Case("", target="w", rows=3), "swapped") and right_of_other(bench, "body", "v"),
            "one is in the other's place",
            lambda: (bench.admin.execute("SELECT body, v, w FROM swapped").fetchall(), service.log),
        )
        wait_caught_up(bench)
        with bench.admin.transaction():
            bench.admin.execute("UPDATE swapped SET body = 'before the texts are swapped' WHERE id = 2")
            run(bench, SWAP.format(t="{t}", a="body", b="note"), "swapped")
        until(
            lambda: (
                right(bench, Case("", body="note", target="w", rows=3), "swapped")
                and right_of_other(bench, "note", "v")
            ),
            "one is taken for the other",
            lambda: (bench.admin.execute("SELECT body, note, v, w FROM swapped").fetchall(), service.log),
        )


SWAP = "ALTER TABLE {t} RENAME {a} TO away; ALTER TABLE {t} RENAME {b} TO {a}; ALTER TABLE {t} RENAME away TO {b}"


def right_of_other(bench: Any, body: str, target: str) -> bool:
    """Every row has the vector of the model `other` there."""
    rows = bench.admin.execute(f"SELECT {body}, {target} FROM swapped").fetchall()
    return all(is_vector_of(text, vector, "other") for text, vector in rows)


def test_a_vector_type_of_another_dimension_pauses_its_column_alone(bench18: Any) -> None:
    bench = bench18
    make_model(bench, dimensions=384)
    make_model(bench, "large", dimensions=1024)
    bench.admin.execute(
        "CREATE TABLE pages (id int PRIMARY KEY, body text, v vector(384), w vector(1024), x vector(384));"
        " INSERT INTO pages SELECT n, 'page ' || n FROM generate_series(1, 20) n"
    )
    for target, model in (("v", "fake"), ("w", "large"), ("x", "fake")):
        bench.grant("pages", ["id"], ["body"], target)
        configure(bench, "pages", target, model)

    def filled(target: str, model: str) -> bool:
        rows = bench.admin.execute(f"SELECT body, {target}::real[] FROM pages").fetchall()
        return all(is_vector_of(text, vector, model) for text, vector in rows)

    def reason(position: int) -> str:
        return str(status(bench)[position]["reason"])

    with running(bench) as service:
        wait_caught_up(bench)
        bench.admin.execute("ALTER TABLE pages ALTER v TYPE vector(1024) USING NULL")
        bench.admin.execute("ALTER TABLE pages ALTER x TYPE vector(1024) USING NULL")
        until(lambda: "the model fake has 384 dimensions" in reason(0), "not told", lambda: status(bench))
        until(lambda: "the model fake has 384 dimensions" in reason(2), "not told", lambda: status(bench))
        bench.admin.execute("UPDATE pages SET body = 'while two of three columns are paused' WHERE id = 1")
        until(lambda: filled("w", "large"), "the third column stands still", lambda: (status(bench), service.log))
        assert [row["state"] for row in status(bench)] == ["error", "live", "error"]
        bench.admin.execute("UPDATE cdc_embedder.embedding_column SET model = 'large' WHERE target_column = 'v'")
        bench.admin.execute("ALTER TABLE pages ALTER x TYPE vector(384) USING NULL")
        until(lambda: filled("v", "large"), "not healed by a model that fits", lambda: (status(bench), service.log))
        until(lambda: filled("x", "fake"), "not healed by the type set back", lambda: (status(bench), service.log))
        bench.admin.execute("UPDATE pages SET body = 'and live again' WHERE id = 2")
        wait_caught_up(bench)
        assert [filled("v", "large"), filled("w", "large"), filled("x", "fake")] == [True, True, True]


@both_plugins
def test_an_unlogged_table_is_fed_by_scans_until_it_is_logged_again(bench: Any) -> None:
    make_model(bench)
    for table in ("volatile", "others"):
        make_table(bench, table)
    every_row = Case("", rows=4)
    with running(bench) as service:
        wait_caught_up(bench)
        if bench.plugin == "pgoutput":  # as with any publication, the server refuses it first
            with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
                bench.admin.execute("ALTER TABLE volatile SET UNLOGGED")
            bench.admin.execute(f'ALTER PUBLICATION "{bench.slot}" DROP TABLE volatile')
        bench.admin.execute("ALTER TABLE volatile SET UNLOGGED")
        bench.admin.execute("INSERT INTO volatile (id, code, body) VALUES (4, 'c4', 'no event tells of this')")
        until(lambda: "the table is unlogged" in (status(bench)[0]["reason"] or ""), "not told", lambda: status(bench))
        bench.admin.execute("SELECT cdc_embedder.reconcile('volatile')")
        until(lambda: right(bench, every_row, "volatile"), "no scan came", lambda: service.log)
        others_are_embedded(bench, "while the table is unlogged", service)
        bench.admin.execute("ALTER TABLE volatile SET LOGGED")
        bench.admin.execute("UPDATE volatile SET body = 'logged again' WHERE id = 1")
        if bench.plugin == "pgoutput":
            until(lambda: "ADD TABLE" in (status(bench)[0]["reason"] or ""), "not told", lambda: status(bench))
            bench.admin.execute(f'ALTER PUBLICATION "{bench.slot}" ADD TABLE volatile')
        until(lambda: right(bench, every_row, "volatile"), "what came meanwhile is missing", lambda: service.log)
        until(
            lambda: status(bench)[0]["state"] == "live" and not status(bench)[0]["reason"],
            "not live again",
            lambda: status(bench),
        )
        bench.admin.execute("UPDATE volatile SET body = 'told by the stream' WHERE id = 2")
        wait_caught_up(bench)
        assert right(bench, every_row, "volatile")


def make_table(bench: Any, table: str) -> None:
    bench.admin.execute(
        f"CREATE TABLE {table} (id int PRIMARY KEY, code text NOT NULL, body varchar(40), note text DEFAULT 'a note',"
        f" views int DEFAULT 0, v real[])"
    )
    bench.grant(table, ["id", "code"], ["body", "note"], "v")
    bench.admin.execute(f"INSERT INTO {table} SELECT n, 'c' || n, 'text number ' || n FROM generate_series(1, 3) n")
    configure(bench, table)


def configure(bench: Any, table: str, target: str = "v", model: str = "fake") -> None:
    bench.admin.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
        " VALUES (%s, '{body}', %s, %s)",
        (table, target, model),
    )


def run(bench: Any, statements: str, table: str) -> None:
    """One by one: VACUUM cannot be part of a transaction, nor of a string of statements."""
    publish = f'ALTER PUBLICATION "{bench.slot}" ADD TABLE {table}' if bench.plugin == "pgoutput" else "SELECT 1"
    for statement in statements.format(t=table, publish=publish).split("; "):
        bench.admin.execute(statement)


def rows_of(bench: Any, case: Case, table: str) -> list[tuple[str, list[float]]]:
    name = case.table.format(t=table)
    return bench.admin.execute(f"SELECT {case.body}::text, {case.target}::real[] FROM {name}").fetchall()  # type: ignore[no-any-return]


def right(bench: Any, case: Case, table: str) -> bool:
    """Every row is there and has the vector of its present text."""
    rows = rows_of(bench, case, table)
    return len(rows) == case.rows and all(is_vector_of(text, vector) for text, vector in rows)


def is_vector_of(text: str, vector: list[float] | None, model: str = "fake") -> bool:
    return vector is not None and np.allclose(vector, fake_vector(model, text, len(vector)), atol=2e-3)


def paused(bench: Any, case: Case, table: str) -> bool:
    """The column says why it is not served."""
    assert case.reason is not None
    [row] = [row for row in status(bench) if row["source_table"].split(".")[-1] == table]
    return row["state"] == "error" and case.reason in row["reason"]


def others_are_embedded(bench: Any, text: str, service: Service) -> None:
    """The column that nobody touched is served."""
    bench.admin.execute("INSERT INTO others (id, code, body) SELECT max(id) + 1, 'x', %s FROM others", (text,))
    until(
        lambda: bench.admin.execute("SELECT v IS NOT NULL FROM others WHERE body = %s", (text,)).fetchone() == (True,),
        "the others stand still",
        lambda: service.log,
    )
