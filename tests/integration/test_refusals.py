"""What the configuration table refuses, with which error and which advice."""

from __future__ import annotations

from typing import Any, NamedTuple

import psycopg
import pytest
from psycopg import errors

from tests.configuring import DOCUMENTS, Connection, configure, one, published
from tests.servers import Bench


class Refusal(NamedTuple):
    """After `setup` the INSERT of `row` fails with this class, and these words in message and hint."""

    setup: str
    row: dict[str, Any]
    error: type[psycopg.Error]
    message: str
    hint: str


def table(columns: str) -> str:
    return f"CREATE TABLE documents ({columns})"


REFUSALS = {
    "no such column": Refusal(
        DOCUMENTS, {"columns": "{bdy}"}, errors.UndefinedColumn, "no column bdy", "title, body"),
    "no such column in this case": Refusal(
        DOCUMENTS, {"columns": "{Body}"}, errors.UndefinedColumn, 'no column "Body"', "Case counts"),
    "no column at all": Refusal(
        DOCUMENTS, {"columns": "{}"}, errors.InvalidParameterValue, "names no column", "title,body"),
    "a NULL among the columns": Refusal(
        DOCUMENTS, {"columns": "{body,NULL}"}, errors.InvalidParameterValue, "NULL", "title,body"),
    "a column twice": Refusal(
        DOCUMENTS, {"columns": "{body,body}"}, errors.DuplicateColumn, "twice", "once"),
    "a dropped column": Refusal(
        DOCUMENTS + "; ALTER TABLE documents DROP body", {}, errors.UndefinedColumn, "no column body", "title"),
    "a system column": Refusal(
        DOCUMENTS, {"columns": "{ctid}"}, errors.UndefinedColumn, "no column ctid", "title"),
    "a number as text": Refusal(
        DOCUMENTS, {"columns": "{body,n}"}, errors.DatatypeMismatch, "type integer", "citext"),
    "a domain over a number as text": Refusal(
        "CREATE DOMAIN points AS int;" + table("id int PRIMARY KEY, body points, embedding real[]"),
        {}, errors.DatatypeMismatch, "points", "citext"),
    "no primary key": Refusal(
        table("id int, body text, embedding real[]"),
        {}, errors.InvalidTableDefinition, "no primary key", "ADD PRIMARY KEY"),
    "a unique index is no primary key": Refusal(
        table("id int NOT NULL UNIQUE, body text, embedding real[]"),
        {}, errors.InvalidTableDefinition, "no primary key", "ADD PRIMARY KEY"),
    "a deferrable primary key": Refusal(
        table("id int PRIMARY KEY DEFERRABLE, body text, embedding real[]"),
        {}, errors.InvalidTableDefinition, "deferrable", "NOT DEFERRABLE"),
    "replica identity NOTHING": Refusal(
        DOCUMENTS + "; ALTER TABLE documents REPLICA IDENTITY NOTHING",
        {}, errors.ObjectNotInPrerequisiteState, "replica identity", "REPLICA IDENTITY DEFAULT"),
    "a replica identity whose index is gone": Refusal(
        DOCUMENTS + "; ALTER TABLE documents ALTER n SET NOT NULL; CREATE UNIQUE INDEX u ON documents (n);"
        " ALTER TABLE documents REPLICA IDENTITY USING INDEX u; DROP INDEX u",
        {}, errors.ObjectNotInPrerequisiteState, "replica identity", "REPLICA IDENTITY DEFAULT"),
    "replica identity NOTHING of one partition": Refusal(
        table("id int PRIMARY KEY, body text, embedding real[]") + " PARTITION BY LIST (id);"
        " CREATE TABLE leaf PARTITION OF documents DEFAULT; ALTER TABLE leaf REPLICA IDENTITY NOTHING",
        {}, errors.ObjectNotInPrerequisiteState, "public.leaf has no usable", "ALTER TABLE public.leaf"),
    "no target": Refusal(
        DOCUMENTS, {"target_column": "vector"}, errors.UndefinedColumn, "does not exist", "ADD COLUMN vector"),
    "the target among the sources": Refusal(
        DOCUMENTS, {"target_column": "body"}, errors.InvalidParameterValue, "source column as well", "of its own"),
    "the target in the key": Refusal(
        table("embedding real[] PRIMARY KEY, body text"),
        {}, errors.InvalidColumnDefinition, "primary key", "of its own"),
    "a target NOT NULL": Refusal(
        table("id int PRIMARY KEY, body text, embedding real[] NOT NULL"),
        {}, errors.InvalidColumnDefinition, "NOT NULL", "DROP NOT NULL"),
    "a generated target": Refusal(
        table("id int PRIMARY KEY, body text, embedding real[] GENERATED ALWAYS AS ('{1}'::real[]) STORED"),
        {}, errors.GeneratedAlways, "generated", "DROP EXPRESSION"),
    "a target of text": Refusal(
        table("id int PRIMARY KEY, body text, embedding text"),
        {}, errors.DatatypeMismatch, "type text", "halfvec(n)"),
    "a target of numbers that are no floats": Refusal(
        table("id int PRIMARY KEY, body text, embedding numeric[]"),
        {}, errors.DatatypeMismatch, "type numeric[]", "double precision[]"),
    "a type called vector that is not pgvector's": Refusal(
        "CREATE SCHEMA other; CREATE DOMAIN other.vector AS real[];"
        + table("id int PRIMARY KEY, body text, embedding other.vector"),
        {}, errors.DatatypeMismatch, "other.vector", "real[]"),
    "no such model": Refusal(
        DOCUMENTS, {"model": "huge"}, errors.UndefinedObject, '"huge"', "all-MiniLM-L6-v2"),
    "a view": Refusal(
        DOCUMENTS + "; CREATE VIEW shown AS SELECT * FROM documents",
        {"table": "shown"}, errors.WrongObjectType, "is a view", "table that holds the text"),
    "a materialized view": Refusal(
        DOCUMENTS + "; CREATE MATERIALIZED VIEW shown AS SELECT * FROM documents",
        {"table": "shown"}, errors.WrongObjectType, "materialized view", "table that holds the text"),
    "an index": Refusal(
        DOCUMENTS, {"table": "documents_pkey"}, errors.WrongObjectType, "an index", "table"),
    "a foreign table": Refusal(
        "CREATE FOREIGN DATA WRAPPER nowhere; CREATE SERVER away FOREIGN DATA WRAPPER nowhere;"
        " CREATE FOREIGN TABLE documents (id int, body text, embedding real[]) SERVER away",
        {}, errors.WrongObjectType, "foreign table", "table that holds the text"),
    "a temporary table": Refusal(
        "CREATE TEMP TABLE documents (id int PRIMARY KEY, body text, embedding real[])",
        {}, errors.WrongObjectType, "temporary", "ordinary table"),
    "a system table": Refusal(
        "", {"table": "pg_catalog.pg_class"}, errors.WrongObjectType, "system table", "of the application"),
    "a table of ours": Refusal(
        "", {"table": "cdc_embedder.model"}, errors.WrongObjectType, "system table", "of the application"),
    "an inheritance parent": Refusal(
        DOCUMENTS + "; CREATE TABLE child () INHERITS (documents)",
        {}, errors.WrongObjectType, "inheritance parent", "partitioning"),
    "an oid of nothing": Refusal(
        "", {"table": "4000000000"}, errors.UndefinedTable, "4000000000", "source_table"),
    "no table given": Refusal(
        "", {"table": None}, errors.NotNullViolation, "must be given", "VALUES ('documents'"),
    "no model given": Refusal(
        DOCUMENTS, {"model": None}, errors.NotNullViolation, "must be given", "VALUES ('documents'"),
    "a slot that cannot be": Refusal(
        DOCUMENTS, {"slot": "My-Slot"}, errors.InvalidName, "My-Slot", "Lower-case"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS.values(), ids=[name.replace(" ", "_") for name in REFUSALS])
def test_what_cannot_be_served_is_refused_with_what_to_do(admin: Connection, case: Refusal) -> None:
    if case.setup:
        admin.execute(case.setup)
    with pytest.raises(case.error) as refused:
        configure(admin, **case.row)
    assert case.message in str(refused.value.diag.message_primary)
    assert case.hint in str(refused.value.diag.message_hint)
    assert one(admin, "SELECT count(*) FROM cdc_embedder.embedding_column") == 0


def test_options_that_do_not_exist_are_refused(admin: Connection) -> None:
    admin.execute(DOCUMENTS)
    with pytest.raises(errors.CheckViolation):
        configure(admin, on_existing="perhaps")
    with pytest.raises(errors.CheckViolation):
        configure(admin, when_stale="never")


def test_a_table_that_is_not_there_is_refused(admin: Connection) -> None:
    with pytest.raises(errors.UndefinedTable):
        configure(admin, "no_such_table")


@pytest.mark.parametrize("kind", ["vector", "halfvec"])
def test_a_pgvector_column_needs_the_dimensions_of_the_model(installed: Bench, admin: Connection, kind: str) -> None:
    if not installed.has_vector:  # then the advice is an array
        admin.execute(DOCUMENTS)
        with pytest.raises(errors.UndefinedColumn) as refused:
            configure(admin, target_column="missing")
        assert "real[]" in str(refused.value.diag.message_hint)
        return
    admin.execute(table(f"id int PRIMARY KEY, body text, a {kind}, b {kind}(5), embedding {kind}(4)"))
    with pytest.raises(errors.DatatypeMismatch, match="without a dimension") as refused_too:
        configure(admin, target_column="a")
    assert f"TYPE public.{kind}(4)" in str(refused_too.value.diag.message_hint)
    with pytest.raises(errors.DatatypeMismatch, match="the model tiny has 4 dimensions"):
        configure(admin, target_column="b")
    configure(admin)


def test_the_same_target_twice_is_refused(admin: Connection) -> None:
    admin.execute(DOCUMENTS)
    configure(admin)
    with pytest.raises(errors.UniqueViolation) as refused:
        configure(admin, columns="{title}")
    assert "UPDATE its row" in str(refused.value.diag.message_hint)


def test_a_partition_and_its_root_exclude_each_other(admin: Connection) -> None:
    admin.execute(
        "CREATE TABLE root (id int PRIMARY KEY, body text, embedding real[]) PARTITION BY RANGE (id);"
        "CREATE TABLE middle PARTITION OF root FOR VALUES FROM (0) TO (9) PARTITION BY RANGE (id);"
        "CREATE TABLE leaf PARTITION OF middle FOR VALUES FROM (0) TO (5)"
    )
    configure(admin, "root")
    for name in ("leaf", "middle"):
        with pytest.raises(errors.WrongObjectType, match="partitions of one another"):
            configure(admin, name)
    admin.execute("DELETE FROM cdc_embedder.embedding_column")
    configure(admin, "leaf")
    with pytest.raises(errors.WrongObjectType, match="partitions of one another"):
        configure(admin, "root")


def test_a_slot_of_another_database_is_refused(installed: Bench, admin: Connection) -> None:
    admin.execute(DOCUMENTS)
    taken = f"{installed.slot}_elsewhere"
    with psycopg.connect(installed.server.dsn("postgres"), autocommit=True) as elsewhere:
        elsewhere.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (taken,))
        try:
            with pytest.raises(errors.ObjectInUse, match='the database "postgres"'):
                configure(admin, slot=taken)
        finally:
            elsewhere.execute("SELECT pg_drop_replication_slot(%s)", (taken,))


def test_a_primary_key_without_overlaps_is_refused(admin: Connection) -> None:
    if admin.info.server_version < 180000:
        return  # such keys came with 18
    admin.execute("CREATE EXTENSION btree_gist")
    admin.execute(table("id int, at daterange, body text, embedding real[], PRIMARY KEY (id, at WITHOUT OVERLAPS)"))
    with pytest.raises(errors.FeatureNotSupported, match="WITHOUT OVERLAPS"):
        configure(admin)


@pytest.mark.parametrize("identity", ["DEFAULT", "FULL", "USING INDEX documents_pkey"])
def test_every_replica_identity_that_lets_updates_pass_is_taken(admin: Connection, identity: str) -> None:
    admin.execute(DOCUMENTS + f"; ALTER TABLE documents REPLICA IDENTITY {identity}")
    configure(admin)
    admin.execute("INSERT INTO documents VALUES (1, 't', 'b'); UPDATE documents SET body = 'c'; DELETE FROM documents")
    assert published(admin) == ["documents"]
