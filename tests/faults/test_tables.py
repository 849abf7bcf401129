"""Tables of every kind with the service running: their keys, names, partitions, identities and texts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from psycopg import sql

from cdc_embedder.embedding.fake import fake_vector
from tests.documents import make_documents, make_model, target_type
from tests.servers import SERVICE_ROLE
from tests.service import (
    assert_every_vector_is_of_its_text,
    running,
    status,
    until,
    wait_caught_up,
)

both_plugins = pytest.mark.parametrize("bench", ["15-wal2json", "18-pgoutput"], indirect=True)


def configure(bench: Any, table: str, target: str = "v", model: str = "fake", source: str = "body") -> None:
    bench.admin.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
        " VALUES (%s, ARRAY[%s], %s, %s)",
        (table, source, target, model),
    )


ODD = (
    "",
    " ",
    "NULL",
    "null",
    '"',
    "''",
    "\\",
    "\\N",
    "\\.",
    "a\nb",
    "a\r\nb\tc",
    "{1,2}",
    '{"a": null}',
    ",",
    "%s %% %(x)s $1",
    "\x01\x02\x1f\x7f",
    "e\u0301 is not \u00e9",
    "\u202eright to left\u202c \u05e9\u05dc\u05d5\u05dd",
    "\u200bzero\u200d\ufeffwidth",
    "\ufffe and \uffff are no characters",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0010ffff \U0001fffe",
    "\u2028line\u2029paragraph\x85",
    "\u1e9e\u0130\u0131",
    "日本語",
    "x" * 2600,  # as long as a key can be, and moved out of line with another column beside it
)


@both_plugins
def test_keys_and_texts_of_any_characters_are_followed(bench: Any) -> None:
    """The same strings as keys and as texts; among the keys are pairs that differ in one code point only."""
    admin = bench.admin
    make_model(bench)
    admin.execute("CREATE TABLE strings (k text PRIMARY KEY, body text, n int DEFAULT 0, v real[])")
    admin.execute("ALTER TABLE strings ALTER k SET STORAGE EXTERNAL")
    bench.grant("strings", ["k"], ["body"], "v")
    insert = "INSERT INTO strings (k, body) VALUES (%s, %s)"
    admin.cursor().executemany(insert, list(zip(ODD[::2], reversed(ODD[::2]), strict=True)))
    configure(bench, "strings")
    with running(bench):
        wait_caught_up(bench)
        admin.cursor().executemany(insert, [(key, key) for key in ODD[1::2]])
        wait_caught_up(bench)
        admin.execute("UPDATE strings SET n = 1")  # a key that is not sent, as it is out of line and did not change
        admin.cursor().executemany("UPDATE strings SET body = %s WHERE k = %s", zip(ODD, reversed(ODD), strict=True))
        wait_caught_up(bench)
        admin.execute("UPDATE strings SET k = 'k' || left(k, 2599)")
        admin.execute("DELETE FROM strings WHERE k = 'kNULL'")
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench, "strings", "body", "v") == len(ODD) - 1


VALUES = {
    "bigints": ("bigint", ["-9223372036854775808", "-1", "0", "9007199254740993", "9223372036854775807"]),
    "times": (
        "timestamptz",
        ["'-infinity'", "'infinity'", "'0044-03-15 12:00+00 BC'", "'2024-02-03 04:05:06.000001+09'",
         "'2024-10-27 02:30+02'", "'2024-10-27 02:30+01'", "'12345-01-01 UTC'"],
    ),
    "days": ("date", ["'infinity'", "'0001-01-01'", "'2024-02-29'"]),
    "numbers": ("numeric", ["1.0", "2", "-0.10", "1e100", "1e-100", "12345678901234567890.123456789"]),
    "floats": ("float8", ["0", "-1.5", "1e308", "5e-324", "0.1", "1e15", "123456789012345680"]),
    "texts_in_a_domain": ("label", ["'a'", "'A'", "'\u00e4'"]),
    "octets": ("bytea", ["''", "'\\x00'", "'\\x5c27ff'"]),
    "bits": ("bit varying", ["B''", "B'0'", "B'0101'"]),
    "networks": ("inet", ["'10.0.0.1'", "'10.0.0.0/8'", "'::1'"]),
    "ranges": ("int4range", ["'empty'", "'[1,5)'", "'(,3)'"]),
    "booleans": ("boolean", ["true", "false"]),
    "lists": ("text[]", ["'{}'", "'{NULL,\"NULL\",\"a,b\",\"\\\\\"}'", "'{{1,2},{3,4}}'"]),
}  # fmt: skip
"""Key type → keys whose text form has its pitfalls."""


@both_plugins
def test_keys_whose_text_form_has_pitfalls_are_followed(bench: Any) -> None:
    """Each type in a table of its own, as the key alone and as the middle of three key columns."""
    admin = bench.admin
    make_model(bench)
    admin.execute("CREATE DOMAIN label AS text CHECK (VALUE <> '')")
    tables = []
    for name, (type, values) in VALUES.items():
        for table, columns, key in (
            (name, f"k {type} PRIMARY KEY", "k"),
            (f"{name}_of_three", f"a int DEFAULT 1, k {type}, c date DEFAULT '2024-01-01', PRIMARY KEY (c, k, a)", ""),
        ):
            admin.execute(f"CREATE TABLE {table} ({columns}, body text, n int DEFAULT 0, v real[])")
            bench.grant(table, [key] if key else ["a", "k", "c"], ["body"], "v")
            admin.execute(f"INSERT INTO {table} (k, body) VALUES ({values[0]}, '{table} 0')")
            configure(bench, table)
            tables.append((table, values))
    with running(bench) as service:
        wait_caught_up(bench)
        for table, values in tables:
            for n, value in enumerate(values[1:]):
                admin.execute(f"INSERT INTO {table} (k, body) VALUES ({value}, '{table} {n + 1}')")
            admin.execute(f"UPDATE {table} SET body = body || ' changed' WHERE k = {values[0]}")
            admin.execute(f"UPDATE {table} SET n = 1")
        wait_caught_up(bench)
        for table, values in tables:
            admin.execute(f"UPDATE {table} SET body = body || ' again'")
            admin.execute(f"DELETE FROM {table} WHERE k = {values[-1]}")
            admin.execute(f"UPDATE {table} SET k = {values[-1]}, body = 'under another key' WHERE k = {values[0]}")
        wait_caught_up(bench)
        for table, values in tables:
            assert assert_every_vector_is_of_its_text(bench, table, "body", "v") == len(values) - 1, table
        assert service.log.count("streaming from the slot") == 1


@both_plugins
def test_two_spellings_of_one_number_are_one_key(bench: Any) -> None:
    admin = bench.admin
    make_model(bench, delay_s=0.3)
    admin.execute("CREATE TABLE prices (k numeric PRIMARY KEY, body text, v real[])")
    bench.grant("prices", ["k"], ["body"], "v")
    configure(bench, "prices")
    with running(bench) as service:
        wait_caught_up(bench)
        for number in ("1", "1.0", "1.00"):
            admin.execute("INSERT INTO prices VALUES (2, 'keeps the model busy ' || random()) ON CONFLICT DO NOTHING")
            admin.execute(
                "INSERT INTO prices VALUES (%s, %s) ON CONFLICT (k) DO UPDATE SET k = excluded.k, body = excluded.body",
                (number, f"spelled {number}"),
            )
        wait_caught_up(bench)
        ledger = "SELECT embedded_at FROM cdc_embedder.ledger_1 WHERE key_1 = 1"
        before = admin.execute(ledger).fetchone()
        admin.execute("UPDATE prices SET k = 1.000 WHERE k = 1")
        wait_caught_up(bench)
        assert admin.execute(ledger).fetchone() == before, "another spelling costs no call of the model"
        assert assert_every_vector_is_of_its_text(bench, "prices", "body", "v") == 2
        assert admin.execute("SELECT count(*) FROM cdc_embedder.ledger_1").fetchone() == (2,)
        assert service.exit_status is None


@both_plugins
def test_keys_that_json_cannot_carry_mean_the_other_plugin(bench: Any) -> None:
    """NaN and infinity arrive as null in wal2json's output; PostgreSQL takes NaN for equal to itself."""
    admin = bench.admin
    make_model(bench)
    kinds = ("numeric", "float8", "float4")
    for kind in kinds:
        admin.execute(f"CREATE TABLE of_{kind} (k {kind} PRIMARY KEY, body text, v real[])")
        bench.grant(f"of_{kind}", ["k"], ["body"], "v")
        configure(bench, f"of_{kind}")
        admin.execute(f"INSERT INTO of_{kind} VALUES ('NaN', 'there before'), (1, 'one')")
    with running(bench, CDC_EMBEDDER_OUTPUT_PLUGIN="auto") as service:
        if bench.plugin == "wal2json":  # heard of first by the echo of the write-back
            service.wait_for_log("is made anew")
            until(
                lambda: all("ADD TABLE" in (row["reason"] or "") for row in status(bench)),
                "what the tables' owner has to run is not named",
                lambda: (status(bench), service.log),
            )
            for kind in kinds:
                admin.execute(f'ALTER PUBLICATION "{bench.slot}" ADD TABLE of_{kind}')
            until(lambda: all(row["state"] == "live" for row in status(bench)), "not live", lambda: service.log)
        wait_caught_up(bench)
        for kind in kinds:
            admin.execute(f"INSERT INTO of_{kind} VALUES ('Infinity', 'live'), ('-Infinity', 'live as well')")
            admin.execute(f"UPDATE of_{kind} SET body = 'not a number' WHERE k = 'NaN'")
        wait_caught_up(bench)
        for kind in kinds:
            assert assert_every_vector_is_of_its_text(bench, f"of_{kind}", "body", "v") == 4


@both_plugins
def test_identity_and_domain_keys_are_followed(bench: Any) -> None:
    admin = bench.admin
    make_model(bench)
    admin.execute("CREATE SCHEMA types; CREATE DOMAIN types.short AS smallint; CREATE DOMAIN types.tiny AS types.short")
    admin.execute(f"GRANT USAGE ON SCHEMA types TO {SERVICE_ROLE}")
    admin.execute(
        "CREATE TABLE counted"
        " (id int GENERATED ALWAYS AS IDENTITY, d types.tiny, body text, v real[], PRIMARY KEY (id, d))"
    )
    bench.grant("counted", ["id", "d"], ["body"], "v")
    configure(bench, "counted")
    with running(bench):
        wait_caught_up(bench)
        admin.execute("INSERT INTO counted (d, body) SELECT n, 'text ' || n FROM generate_series(1, 20) n")
        admin.execute("UPDATE counted SET d = 0 - d, body = 'changed' WHERE id % 3 = 0")
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench, "counted", "body", "v") == 20


NAMES = (
    ("public", "Documents", "Id", "Body", "Vector"),
    ("public", "documents", "id", "body", "vector"),
    ("Documents", "documents", "ID", "iD", "Id"),
    ("select", "table", "primary", "from", "user"),
    ("Größe", "Straße", "schlüssel", "täxt", "vektör"),
    ("日本語", "表", "鍵", "本文", "埋め込み"),
    ("a.b", "c.d,e", "f g", "h\\i", "j*"),
    ("x\ty", "new\nline", "tab\tkey", 'quote"', "apostrophe's"),
    ("s" * 63, "t" * 63, "k" * 63, "b" * 63, "v" * 63),
    ("🙂", "👩‍👧", "$1", "%s", "{0}"),
)


@both_plugins
def test_names_of_every_kind_are_followed(bench: Any) -> None:
    """Mixed case, keywords, Unicode, what plugins escape, the greatest length; one name in several schemas."""
    admin = bench.admin
    make_model(bench)
    for schema, table, key, body, vector in NAMES:
        name = sql.Identifier(schema, table)
        s, k, b, v = (sql.Identifier(part) for part in (schema, key, body, vector))
        for statement in (
            "CREATE SCHEMA IF NOT EXISTS {s}",
            "GRANT USAGE ON SCHEMA {s} TO cdc_service",
            "CREATE TABLE {name} ({k} int PRIMARY KEY, {b} text, {v} real[])",
            "GRANT SELECT ({k}, {b}, {v}), UPDATE ({v}) ON {name} TO cdc_service",
            "INSERT INTO {name} VALUES (1, 'there before'), (2, NULL)",
        ):
            admin.execute(sql.SQL(statement).format(s=s, name=name, k=k, b=b, v=v))
        configure(bench, name.as_string(admin), vector, source=body)
    with running(bench) as service:
        wait_caught_up(bench)
        for schema, table, _, body, _ in NAMES:
            name, b = sql.Identifier(schema, table), sql.Identifier(body)
            admin.execute(sql.SQL("INSERT INTO {} VALUES (3, {})").format(name, f"text {schema}, {table}"))
            admin.execute(sql.SQL("UPDATE {} SET {} = {} WHERE {} IS NULL").format(name, b, f"text {table}", b))
        wait_caught_up(bench)
        for schema, table, _, body, vector in NAMES:
            name = sql.Identifier(schema, table)
            quoted = [part.as_string(admin) for part in (name, sql.Identifier(body), sql.Identifier(vector))]
            assert assert_every_vector_is_of_its_text(bench, *quoted) == 3
        assert service.log.count("streaming from the slot") == 1


@both_plugins
def test_partitions_of_several_levels_come_and_go(bench: Any) -> None:
    """Rows move between leaves of different column orders; filled leaves are attached and detached."""
    admin = bench.admin
    make_model(bench)
    admin.execute(
        "CREATE TABLE parts (region int, day date, id int, body text, v real[], PRIMARY KEY (region, day, id))"
        " PARTITION BY LIST (region);"
        "CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN (1) PARTITION BY RANGE (day);"
        "CREATE TABLE parts_1_old PARTITION OF parts_1 FOR VALUES FROM (MINVALUE) TO ('2024-01-01');"
        "CREATE TABLE parts_1_new"
        " (v real[], gone int, body text, id int NOT NULL, day date NOT NULL, region int NOT NULL);"
        "ALTER TABLE parts_1_new DROP gone;"
        "ALTER TABLE parts_1 ATTACH PARTITION parts_1_new FOR VALUES FROM ('2024-01-01') TO (MAXVALUE);"
        "CREATE TABLE parts_rest PARTITION OF parts DEFAULT;"
        "INSERT INTO parts SELECT n % 3, date '2023-12-25' + n, n, 'text ' || n FROM generate_series(1, 30) n"
    )
    bench.grant("parts", ["region", "day", "id"], ["body"], "v")
    configure(bench, "parts")
    with running(bench) as service:
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench, "parts", "body", "v") == 30
        admin.execute("UPDATE parts SET region = 1, body = 'moved ' || id WHERE region = 0")
        admin.execute("UPDATE parts SET day = day - 20 WHERE region = 1")
        admin.execute("UPDATE parts SET region = 2 - region WHERE id % 2 = 0")
        admin.execute("UPDATE parts_1_new SET body = 'by the leaf'")
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench, "parts", "body", "v") == 30

        admin.execute(
            "CREATE TABLE parts_7 (body text, v real[], id int, day date, region int, PRIMARY KEY (region, day, id))"
            " PARTITION BY RANGE (id);"
            "CREATE TABLE parts_7_a PARTITION OF parts_7 FOR VALUES FROM (0) TO (100);"
            "INSERT INTO parts_7 SELECT 'attached ' || n, NULL, n, '2024-07-01', 7 FROM generate_series(1, 20) n;"
            "ALTER TABLE parts ATTACH PARTITION parts_7 FOR VALUES IN (7)"
        )
        until(
            lambda: admin.execute("SELECT count(*) FROM parts WHERE v IS NULL").fetchone() == (0,),
            "the attached rows were not found",
            lambda: service.log,
        )
        admin.execute("UPDATE parts SET body = 'known by now' WHERE id = 5 AND region = 7")
        admin.execute("INSERT INTO parts VALUES (7, '2024-07-02', 21, 'into the attached one')")
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench, "parts", "body", "v") == 51

        admin.execute("ALTER TABLE parts DETACH PARTITION parts_7")
        admin.execute("INSERT INTO parts_7 VALUES ('nobody asked for this', NULL, 50, '2024-07-02', 7)")
        admin.execute("UPDATE parts SET body = body || '!' WHERE region = 1")
        until(
            lambda: admin.execute("SELECT count(*) FROM cdc_embedder.ledger_1 WHERE key_1 = 7").fetchone() == (0,),
            "the ledger still holds the rows of the detached partition",
            lambda: service.log,
        )
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench, "parts", "body", "v") == 30
        assert admin.execute("SELECT count(*) FROM parts_7 WHERE v IS NULL").fetchone() == (1,)


@both_plugins
def test_every_replica_identity_that_can_be_served_is(bench: Any) -> None:
    """DEFAULT, FULL and an index of other columns than the key; keys, texts and other columns change under each."""
    admin = bench.admin
    make_model(bench)
    identities = {"by_default": "DEFAULT", "in_full": "FULL", "by_index": "USING INDEX by_index_code_key"}
    for table, identity in identities.items():
        admin.execute(
            f"CREATE TABLE {table}"
            " (id int PRIMARY KEY, code text NOT NULL UNIQUE, body text, n int DEFAULT 0, v real[]);"
            f"ALTER TABLE {table} ALTER body SET STORAGE EXTERNAL, REPLICA IDENTITY {identity};"
            f"INSERT INTO {table} SELECT n, 'c' || n, repeat('text ' || n, 1000) FROM generate_series(1, 8) n"
        )
        bench.grant(table, ["id"], ["body"], "v")
        configure(bench, table)
    with running(bench):
        wait_caught_up(bench)
        for table in identities:
            admin.execute(f"UPDATE {table} SET n = 1")
            admin.execute(f"UPDATE {table} SET code = 'd' || id WHERE id <= 3")
            admin.execute(f"UPDATE {table} SET id = id + 100 WHERE id <= 2")
            admin.execute(f"UPDATE {table} SET body = repeat('other ' || id, 1000) WHERE id = 4")
            admin.execute(f"UPDATE {table} SET body = 'short' WHERE id = 5")
            admin.execute(f"UPDATE {table} SET body = NULL WHERE id = 6")
            admin.execute(f"DELETE FROM {table} WHERE id = 7")
        wait_caught_up(bench)
        for table in identities:
            assert assert_every_vector_is_of_its_text(bench, table, "body", "v") == 7


@both_plugins
def test_a_table_without_an_identity_is_refused_and_one_that_loses_it_says_so_and_heals(bench: Any) -> None:
    """Published without one, the application's updates would fail: the table leaves the publication by itself."""
    admin = bench.admin
    make_model(bench)
    make_documents(bench, 5)
    admin.execute(
        "CREATE TABLE closed (id int PRIMARY KEY, body text, v real[]); ALTER TABLE closed REPLICA IDENTITY NOTHING"
    )
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="no usable replica identity"):
        configure(bench, "closed")
    admin.execute(
        f"CREATE TABLE parts (id int PRIMARY KEY, body text, v {target_type(bench)}) PARTITION BY RANGE (id);"
        "CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (100);"
        "INSERT INTO parts SELECT n, 'part ' || n FROM generate_series(1, 5) n"
    )
    bench.grant("parts", ["id"], ["body"], "v")
    configure(bench, "parts")
    with running(bench) as service:
        wait_caught_up(bench)
        admin.execute("ALTER TABLE documents REPLICA IDENTITY NOTHING")
        admin.execute("ALTER TABLE parts_1 REPLICA IDENTITY NOTHING")
        until(
            lambda: ["REPLICA IDENTITY NOTHING" in (row["reason"] or "") for row in status(bench)] == [True, True],
            "not told",
            lambda: status(bench),
        )
        admin.execute("UPDATE documents SET body = 'the application goes on'")
        admin.execute("UPDATE parts SET body = 'and here' WHERE id = 1")
        admin.execute("ALTER TABLE documents REPLICA IDENTITY DEFAULT")
        admin.execute("ALTER TABLE parts_1 REPLICA IDENTITY FULL")
        if bench.plugin == "pgoutput":
            until(
                lambda: all("ADD TABLE" in (row["reason"] or "") for row in status(bench)),
                "the remedy is not named",
                lambda: status(bench),
            )
            admin.execute(f'ALTER PUBLICATION "{bench.slot}" ADD TABLE documents, parts')
        until(
            lambda: all(row["state"] == "live" for row in status(bench)),
            "not healed",
            lambda: (status(bench), service.log),
        )
        wait_caught_up(bench)
        admin.execute("UPDATE documents SET body = 'heard again' WHERE id = 2")
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench) == 5
        assert assert_every_vector_is_of_its_text(bench, "parts", "body", "v") == 5


@both_plugins
def test_keys_that_change_while_they_are_with_the_model_keep_their_texts(bench: Any) -> None:
    """Changed, swapped, moved in a row, given to another row: whatever the model is doing with the old key."""
    admin = bench.admin
    make_model(bench, delay_s=0.4)
    make_documents(bench)
    with running(bench) as service:
        wait_caught_up(bench)
        admin.execute("INSERT INTO documents (id, body) SELECT n, 'text ' || n FROM generate_series(1, 20) n")
        for _ in range(3):
            admin.execute("SELECT pg_sleep(0.15)")  # into a call of the model
            admin.execute("UPDATE documents SET id = id + 1000 WHERE id BETWEEN 1 AND 3")
            admin.execute("UPDATE documents SET id = id - 1000, body = body || '.' WHERE id BETWEEN 1001 AND 1002")
            with admin.transaction():  # 5 and 6 swap their keys
                admin.execute("UPDATE documents SET id = -5 WHERE id = 5")
                admin.execute("UPDATE documents SET id = 5 WHERE id = 6")
                admin.execute("UPDATE documents SET id = 6 WHERE id = -5")
            with admin.transaction():  # 7 goes, 8 becomes 7, 9 becomes 8
                admin.execute("DELETE FROM documents WHERE id = 7")
                admin.execute("UPDATE documents SET id = 7 WHERE id = 8")
                admin.execute("UPDATE documents SET id = 8 WHERE id = 9")
                admin.execute("INSERT INTO documents (id, body) VALUES (9, 'new ' || random())")
            admin.execute(
                "UPDATE documents SET body = CASE id WHEN 10 THEN 'text 11' ELSE 'text 10' END WHERE id IN (10, 11)"
            )
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench) == 20
        assert service.log.count("streaming from the slot") == 1


@both_plugins
def test_rows_that_are_deleted_and_inserted_again_while_they_are_with_the_model(bench: Any) -> None:
    """With the same text, another text, no text, and with a vector that somebody else put there."""
    admin = bench.admin
    make_model(bench, delay_s=0.4)
    make_documents(bench)
    with running(bench):
        wait_caught_up(bench)
        for round in range(3):
            admin.execute("DELETE FROM documents")
            admin.execute("INSERT INTO documents (id, body) SELECT n, 'text ' || n FROM generate_series(1, 10) n")
            if round:
                admin.execute("SELECT pg_sleep(0.25)")  # into a call of the model
            admin.execute("DELETE FROM documents WHERE id <= 8")
            admin.execute("INSERT INTO documents (id, body) VALUES (1, 'text 1'), (2, 'another'), (3, NULL)")
            with admin.transaction():
                admin.execute("INSERT INTO documents (id, body) VALUES (4, 'for a moment')")
                admin.execute("DELETE FROM documents WHERE id = 4")
                admin.execute("INSERT INTO documents (id, body) VALUES (4, 'text 4')")
            strange = "[1,2,3,4,5,6,7,8]" if bench.has_vector else "{1,2,3,4,5,6,7,8}"
            admin.execute("INSERT INTO documents (id, body, embedding) VALUES (5, 'text 5', %s)", (strange,))
            wait_caught_up(bench)
            assert assert_every_vector_is_of_its_text(bench) == 7


@both_plugins
def test_a_text_of_a_hundred_megabytes_is_embedded_and_memory_comes_back(bench: Any) -> None:
    admin = bench.admin
    make_model(bench)
    make_documents(bench, 5)
    with running(bench) as service:
        wait_caught_up(bench)
        before = memory_mb(service.pid, "VmHWM")
        admin.execute("INSERT INTO documents (id, body) VALUES (100, repeat('0123456789', 10000000))")
        admin.execute("INSERT INTO documents (body) VALUES ('a small one behind it')")
        until(
            lambda: admin.execute("SELECT embedding IS NOT NULL FROM documents WHERE id = 100").fetchone() == (True,),
            "never embedded",
            lambda: service.log,
        )
        admin.execute("UPDATE documents SET views = 1")
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench) == 7
        high = memory_mb(service.pid, "VmHWM")
        print(f"\n{bench.plugin}: peak {before} MB before, {high} MB with a text of 100 MB;"
              f" {memory_mb(service.pid, 'VmRSS')} MB afterwards")  # fmt: skip
        assert high < before + 1024
        assert service.log.count("streaming from the slot") == 1


def memory_mb(pid: int, field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) // 1024


@both_plugins
def test_rows_that_a_subscription_applies_are_embedded(bench: Any) -> None:
    """They carry the origin of the other database; only what carries ours is passed over."""
    admin = bench.admin
    make_model(bench)
    make_documents(bench, 5)
    admin.execute(
        "GRANT EXECUTE ON FUNCTION pg_replication_origin_create(text), pg_replication_origin_oid(text),"
        " pg_replication_origin_session_setup(text) TO cdc_service"
    )
    origin = f"elsewhere_{bench.slot}"
    admin.execute("SELECT pg_replication_origin_create(%s)", (origin,))
    try:
        with running(bench) as service:
            wait_caught_up(bench)
            admin.execute("SELECT pg_replication_origin_session_setup(%s)", (origin,))
            admin.execute("SET session_replication_role = replica")
            with admin.transaction():
                admin.execute("SELECT pg_replication_origin_xact_setup('0/1234', now())")
                admin.execute("INSERT INTO documents (body) SELECT 'applied ' || n FROM generate_series(1, 5) n")
                admin.execute("UPDATE documents SET body = 'applied as well' WHERE id = 1")
            admin.execute("SELECT pg_replication_origin_session_reset()")
            wait_caught_up(bench)
            assert assert_every_vector_is_of_its_text(bench) == 10
            assert service.stop() == 0
    finally:
        admin.execute("SELECT pg_replication_origin_drop(%s)", (origin,))


def test_one_model_that_is_down_leaves_the_columns_of_the_others_alone(bench18: Any, tmp_path: Path) -> None:
    """Two columns of one table with models of their own, and another table: two lanes work, one waits."""
    bench, sign = bench18, tmp_path / "down"
    sign.touch()
    make_model(bench)
    make_model(bench, "down", dimensions=16, down_while_exists=str(sign))
    bench.admin.execute(
        "CREATE TABLE pages (id int PRIMARY KEY, title text, body text, t vector(8), b vector(16));"
        "INSERT INTO pages SELECT n, 'title ' || n, 'body ' || n FROM generate_series(1, 30) n"
    )
    bench.grant("pages", ["id"], ["title"], "t")
    bench.grant("pages", ["id"], ["body"], "b")
    configure(bench, "pages", "t", source="title")
    configure(bench, "pages", "b", "down")
    make_documents(bench, 5)

    def titles_are_right() -> bool:
        rows = bench.admin.execute("SELECT title, t::real[] FROM pages").fetchall()
        return all(v is not None and np.allclose(v, fake_vector("fake", text, 8), atol=2e-3) for text, v in rows)

    with running(bench) as service:
        until(
            lambda: [row["circuit_breaker"] for row in status(bench)] == ["closed", "open", "closed"],
            "not told apart",
            lambda: status(bench),
        )
        bench.admin.execute("UPDATE pages SET title = title || ' changed', body = body || ' changed' WHERE id <= 10")
        until(titles_are_right, "the model that works was held up", lambda: (status(bench), service.log))
        assert bench.admin.execute("SELECT count(b) FROM pages").fetchone() == (0,)
        sign.unlink()
        wait_caught_up(bench)
        assert titles_are_right()
        assert assert_every_vector_is_of_its_text(bench, "pages", "body", "b", "down") == 30
        assert assert_every_vector_is_of_its_text(bench) == 5
