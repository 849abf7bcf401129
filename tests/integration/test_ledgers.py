"""The ledger of a column has the key of its table, whatever that is."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import sql

from tests.configuring import DOCUMENTS, Connection, column, configure, one, published

KEYS = {
    "bigint": ("", "bigint"),
    "uuid": ("", "uuid"),
    "text": ("", "text"),
    "text with a collation": ("", 'text COLLATE "C"'),
    "text with a collation of one's own": ("", "text COLLATE shop.blind"),
    "varchar(20)": ("", "varchar(20)"),
    "char(3)": ("", "char(3)"),
    "numeric(10,2)": ("", "numeric(10,2)"),
    "timestamptz(3)": ("", "timestamptz(3)"),
    "bytea": ("", "bytea"),
    "boolean": ("", "boolean"),
    "a domain": ("CREATE DOMAIN shop.sku AS text CHECK (VALUE <> '')", "shop.sku"),
    "an enum": ("CREATE TYPE shop.size AS ENUM ('s', 'm')", "shop.size"),
    "citext": ("CREATE EXTENSION citext", "citext"),
    "an array": ("", "int[]"),
}

KEY_OF = sql.SQL(
    "SELECT format_type(atttypid, atttypmod), attcollation::regcollation::text, attnotnull"
    "  FROM pg_attribute WHERE attrelid = {}::regclass AND attname = {}"
)


def make_blind_collation(conn: Connection) -> None:
    """A collation that calls HELLO and hello equal, where the server was built with ICU."""
    try:
        conn.execute("CREATE COLLATION shop.blind (provider = icu, locale = 'und-u-ks-level2', deterministic = false)")
    except psycopg.errors.FeatureNotSupported:
        conn.execute("CREATE COLLATION shop.blind (provider = libc, locale = 'C')")


@pytest.mark.parametrize("key", KEYS.values(), ids=[name.replace(" ", "_") for name in KEYS])
def test_a_ledger_has_the_key_of_the_table(admin: Connection, key: tuple[str, str]) -> None:
    setup, key_type = key
    admin.execute("CREATE SCHEMA shop; GRANT USAGE ON SCHEMA shop TO cdc_service")
    make_blind_collation(admin)
    if setup:
        admin.execute(setup)
    admin.execute(f"CREATE TABLE documents (id {key_type} PRIMARY KEY, body text, embedding real[])")
    ledger = f"cdc_embedder.ledger_{configure(admin)}"
    assert one(admin, KEY_OF.format(ledger, "key_1")) == one(admin, KEY_OF.format("documents", "id"))
    assert (
        one(admin, "SELECT pg_get_userbyid(relowner) FROM pg_class WHERE oid = %s::regclass", ledger) == "cdc_service"
    )
    assert one(admin, "SELECT rows, pending FROM cdc_embedder.status") == (None, None), "not yet granted"
    admin.execute("GRANT SELECT ON documents TO cdc_service")
    assert one(admin, "SELECT rows, pending, coverage FROM cdc_embedder.status") == (0, 0, 100)


def test_a_composite_key_keeps_its_order_and_quoted_names(admin: Connection) -> None:
    admin.execute('CREATE SCHEMA "My Shop"; GRANT USAGE ON SCHEMA "My Shop" TO cdc_service')
    admin.execute(
        'CREATE TABLE "My Shop"."Order""s" ("The Text" text, "b""B" uuid, a numeric(10,2), c text COLLATE "C",'
        ' "Vec" double precision[], PRIMARY KEY (c, "b""B", a) INCLUDE ("The Text"))'
    )
    made = configure(admin, '"My Shop"."Order""s"', '{"The Text"}', target_column="Vec")
    assert column(admin, "key_columns::text[], key_types") == (["c", 'b"B', "a"], ["text", "uuid", "numeric(10,2)"])
    assert column(admin, "source_schema, source_name") == ("My Shop", 'Order"s')
    keys = [one(admin, KEY_OF.format(f"cdc_embedder.ledger_{made}", f"key_{n}")) for n in (1, 2, 3)]
    assert keys == [("text", '"C"', True), ("uuid", "-", True), ("numeric(10,2)", "-", True)]
    assert published(admin) == ['"My Shop"."Order""s"']
    admin.execute('GRANT SELECT ON "My Shop"."Order""s" TO cdc_service')
    admin.execute("""INSERT INTO "My Shop"."Order""s" VALUES ('t', gen_random_uuid(), 1.00, 'c')""")
    shown = one(admin, "SELECT source_table, rows, pending FROM cdc_embedder.status")
    assert shown == ('"My Shop"."Order""s"', 1, 1)


def test_a_key_type_that_the_service_may_not_use_is_named(admin: Connection) -> None:
    admin.execute("CREATE SCHEMA shop; CREATE DOMAIN shop.sku AS text")
    admin.execute("CREATE TABLE documents (id shop.sku PRIMARY KEY, body text, embedding real[])")
    with pytest.raises(psycopg.errors.InsufficientPrivilege) as refused:
        configure(admin)
    assert "role cdc_service needs USAGE" in str(refused.value.diag.message_hint)


def test_a_key_of_another_type_or_of_other_columns_makes_the_ledger_anew(admin: Connection) -> None:
    admin.execute(DOCUMENTS)
    made = configure(admin)
    assert one(admin, "SELECT cdc_embedder._make_ledger(%s)", made) is False
    admin.execute("ALTER TABLE documents ALTER id TYPE numeric(10,2)")
    assert one(admin, "SELECT cdc_embedder._make_ledger(%s)", made) is True
    assert one(admin, "SELECT cdc_embedder._make_ledger(%s)", made) is False
    admin.execute("UPDATE cdc_embedder.scan SET counted = true")
    admin.execute("ALTER TABLE documents DROP CONSTRAINT documents_pkey, ADD PRIMARY KEY (n, id)")
    admin.execute("UPDATE cdc_embedder.embedding_column SET source_table = source_table")
    assert column(admin, "key_columns::text[], key_types") == (["n", "id"], ["integer", "numeric(10,2)"])
    assert one(admin, "SELECT reason, counted FROM cdc_embedder.scan") == ("another key", False)
    assert one(admin, KEY_OF.format(f"cdc_embedder.ledger_{made}", "key_2")) == ("numeric(10,2)", "-", True)


def test_a_key_of_other_columns_of_the_same_type_empties_the_ledger(admin: Connection) -> None:
    admin.execute(DOCUMENTS + "; ALTER TABLE documents ALTER n TYPE bigint")
    ledger = sql.Identifier("cdc_embedder", f"ledger_{configure(admin)}")
    insert = sql.SQL("INSERT INTO {} (key_1, fingerprint, generation, state) VALUES (1, '', 1, 'current')")
    admin.execute(insert.format(ledger))
    admin.execute("ALTER TABLE documents DROP CONSTRAINT documents_pkey, ADD PRIMARY KEY (n)")
    admin.execute("UPDATE cdc_embedder.embedding_column SET source_table = source_table")
    assert one(admin, sql.SQL("SELECT count(*) FROM {}").format(ledger)) == 0


def test_a_ledger_goes_with_its_column(admin: Connection) -> None:
    admin.execute(DOCUMENTS)
    made = configure(admin)
    admin.execute("DROP TABLE documents; DELETE FROM cdc_embedder.embedding_column")
    assert one(admin, "SELECT to_regclass(%s)", f"cdc_embedder.ledger_{made}") is None
    assert one(admin, "SELECT count(*) FROM cdc_embedder.generation") == 0
