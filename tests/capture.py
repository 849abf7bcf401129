"""Real streams for the decoders' tests: runs one workload on a server and keeps the bytes that its walsender sent.

    python -m tests.capture DSN {pgoutput,wal2json} tests/data

writes `capture-<plugin>-<major>.bin` (each CopyData payload behind its length, four bytes, big-endian) and the `.json`
beside it, which says what was asked of which server. The workload has every kind of message and every way a key can
look; `CHANGES` says by hand what must come out of either plugin. The server must be a throw-away one.
"""

from __future__ import annotations

import json
import select
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psycopg

from cdc_embedder.conninfo import pinned
from cdc_embedder.wal import pgoutput, wal2json
from cdc_embedder.wal.messages import (
    Begin,
    Commit,
    Delete,
    Insert,
    LogicalMessage,
    Message,
    Origin,
    Relation,
    Truncate,
    Update,
)
from cdc_embedder.wal.stream import PINS

DATA = Path(__file__).parent / "data"
CAPTURES = ["capture-pgoutput-15", "capture-pgoutput-18", "capture-wal2json-15"]
SLOT = "capture"
ODD = ("Odd, schema", 'Tab.le*1 \\ "q" é')
LONG = "0123456789" * 400
"""Long enough to be TOASTed, stored uncompressed, so that an update of another column leaves it out."""

TABLES = [
    ("public", "doc"),
    ("public", "composite"),
    ("public", "typed"),
    ("public", "toasted"),
    ("public", "whole"),
    ("public", "by_index"),
    ("public", "part"),
    ("public", "part_low"),
    ("public", "part_high"),
    ("public", "finished"),
    ODD,
]
LEAVES = {("public", "part_low"): ("public", "part"), ("public", "part_high"): ("public", "part")}
"""wal2json names leaves where pgoutput, asked to publish through the root, names the root."""

SETUP = r"""
CREATE TYPE colour AS ENUM ('red', 'green');
CREATE DOMAIN short_bytes AS bytea;
CREATE DOMAIN answer AS boolean;
CREATE TABLE doc (id bigint PRIMARY KEY, body text, embedding real[]);
CREATE TABLE composite (tenant integer, "Doc Id" text, body text, PRIMARY KEY (tenant, "Doc Id"));
CREATE TABLE typed (n numeric, b bytea, t timestamptz, yes boolean, f float8, i interval, c colour, u uuid,
                    sb short_bytes, a answer, PRIMARY KEY (n, b, t, yes, f, i, c, u, sb, a));
CREATE TABLE toasted (id integer PRIMARY KEY, body text, note text);
ALTER TABLE toasted ALTER body SET STORAGE EXTERNAL;
CREATE TABLE whole (id integer PRIMARY KEY, body text, note text);
ALTER TABLE whole ALTER body SET STORAGE EXTERNAL, REPLICA IDENTITY FULL;
CREATE TABLE by_index (id integer PRIMARY KEY, code text NOT NULL, body text);
CREATE UNIQUE INDEX by_index_code ON by_index (code);
ALTER TABLE by_index REPLICA IDENTITY USING INDEX by_index_code;
CREATE TABLE part (id integer PRIMARY KEY, body text) PARTITION BY RANGE (id);
CREATE TABLE part_low (body text, id integer NOT NULL);
ALTER TABLE part ATTACH PARTITION part_low FOR VALUES FROM (0) TO (100);
CREATE TABLE part_high PARTITION OF part FOR VALUES FROM (100) TO (200);
CREATE TABLE finished (id integer PRIMARY KEY);
CREATE SCHEMA "Odd, schema";
CREATE TABLE "Odd, schema"."Tab.le*1 \ ""q"" é" ("Key, 1" text PRIMARY KEY, "bo""dy" text);
CREATE TABLE unpublished (id integer PRIMARY KEY);
SELECT pg_replication_origin_create('capture_origin');
CREATE PUBLICATION capture FOR TABLE doc, composite, typed, toasted, whole, by_index, part, finished,
    "Odd, schema"."Tab.le*1 \ ""q"" é" WITH (publish_via_partition_root = true);
CREATE PUBLICATION changes FOR TABLE doc, composite, typed, toasted, whole, by_index, part, finished,
    "Odd, schema"."Tab.le*1 \ ""q"" é" WITH (publish = 'insert, update', publish_via_partition_root = true);
"""

WORKLOAD = [
    """INSERT INTO doc VALUES (9007199254740993, 'first', '{0.5,-0.25}'), (2, NULL, NULL), (3, '', '{}')""",
    """UPDATE doc SET body = 'été ☃ "quoted" \\ tab\t' WHERE id = 2""",
    """UPDATE doc SET id = 4 WHERE id = 3""",
    """DELETE FROM doc WHERE id = 4""",
    """INSERT INTO composite VALUES (1, 'a b', 'x'), (1, 'A,B', 'y')""",
    """UPDATE composite SET "Doc Id" = 'c' WHERE "Doc Id" = 'a b'""",
    """INSERT INTO typed VALUES (1.10, '\\x00ff5c', '2024-03-10 10:30:00.123456+01', true, 0.1::float8 + 0.2::float8,
        '1 day 2 hours', 'green', '6f9619ff-8b86-d011-b42d-00c04fc964ff', '\\xdead', false)""",
    """UPDATE typed SET n = 1.1000, yes = false""",
    f"""INSERT INTO toasted VALUES (1, '{LONG}', 'n')""",
    """UPDATE toasted SET note = 'm'""",
    """UPDATE toasted SET body = NULL""",
    f"""INSERT INTO whole VALUES (1, '{LONG}', NULL)""",
    """UPDATE whole SET note = ''""",
    """DELETE FROM whole""",
    """INSERT INTO by_index VALUES (1, 'k', 'x')""",
    """UPDATE by_index SET code = 'l'""",
    """UPDATE by_index SET id = 2""",
    """INSERT INTO part VALUES (1, 'low')""",
    """UPDATE part SET body = 'still low'""",
    """UPDATE part SET id = 101""",
    """INSERT INTO "Odd, schema"."Tab.le*1 \\ ""q"" é" VALUES ('k,"1\\', 'text')""",
    """BEGIN; INSERT INTO doc VALUES (5, 'kept'); SAVEPOINT s; INSERT INTO doc VALUES (6, 'lost'); ROLLBACK TO s;
        INSERT INTO doc VALUES (7, 'kept too'); COMMIT""",
    """BEGIN; INSERT INTO doc VALUES (8, 'never'); ROLLBACK""",
    """ALTER TABLE composite RENAME body TO words; INSERT INTO composite VALUES (2, 'z', 'w')""",
    """SELECT pg_logical_emit_message(true, 'capture', 'within é')""",
    """SELECT pg_logical_emit_message(false, 'capture', 'at once')""",
    """INSERT INTO unpublished VALUES (1)""",
    """SELECT pg_replication_origin_session_setup('capture_origin')""",
    """INSERT INTO doc VALUES (10, 'from elsewhere')""",
    """SELECT pg_replication_origin_session_reset()""",
    """TRUNCATE composite, toasted""",
    """INSERT INTO finished VALUES (1)""",
]

_TYPED = {
    "n": "1.10",
    "b": "\\x00ff5c",
    "t": "2024-03-10 09:30:00.123456+00",
    "yes": "t",
    "f": "0.30000000000000004",
    "i": "1 day 02:00:00",
    "c": "green",
    "u": "6f9619ff-8b86-d011-b42d-00c04fc964ff",
    "sb": "\\xdead",
    "a": "f",
}

CHANGES: list[tuple[Any, ...]] = [
    ("insert", "doc", {"id": "9007199254740993", "body": "first", "embedding": "{0.5,-0.25}"}),
    ("insert", "doc", {"id": "2", "body": None, "embedding": None}),
    ("insert", "doc", {"id": "3", "body": "", "embedding": "{}"}),
    ("commit",),
    ("update", "doc", {"id": "2", "body": 'été ☃ "quoted" \\ tab\t', "embedding": None}, {}),
    ("commit",),
    ("update", "doc", {"id": "4", "body": "", "embedding": "{}"}, {"id": "3"}),
    ("commit",),
    ("delete", "doc", {"id": "4"}),
    ("commit",),
    ("insert", "composite", {"tenant": "1", "Doc Id": "a b", "body": "x"}),
    ("insert", "composite", {"tenant": "1", "Doc Id": "A,B", "body": "y"}),
    ("commit",),
    ("update", "composite", {"tenant": "1", "Doc Id": "c", "body": "x"}, {"Doc Id": "a b"}),
    ("commit",),
    ("insert", "typed", _TYPED),
    ("commit",),
    ("update", "typed", _TYPED | {"n": "1.1000", "yes": "f"}, {"n": "1.10", "yes": "t"}),
    ("commit",),
    ("insert", "toasted", {"id": "1", "body": LONG, "note": "n"}),
    ("commit",),
    ("update", "toasted", {"id": "1", "note": "m"}, {}),
    ("commit",),
    ("update", "toasted", {"id": "1", "body": None, "note": "m"}, {}),
    ("commit",),
    ("insert", "whole", {"id": "1", "body": LONG, "note": None}),
    ("commit",),
    ("update", "whole", {"id": "1", "note": ""}, {"body": LONG, "note": None}),
    ("commit",),
    ("delete", "whole", {"id": "1", "body": LONG, "note": ""}),
    ("commit",),
    ("insert", "by_index", {"id": "1", "code": "k", "body": "x"}),
    ("commit",),
    ("update", "by_index", {"id": "1", "code": "l", "body": "x"}, {"code": "k"}),
    ("commit",),
    ("update", "by_index", {"id": "2", "code": "l", "body": "x"}, {}),
    ("commit",),
    ("insert", "part", {"id": "1", "body": "low"}),
    ("commit",),
    ("update", "part", {"id": "1", "body": "still low"}, {}),
    ("commit",),
    ("delete", "part", {"id": "1"}),
    ("insert", "part", {"id": "101", "body": "still low"}),
    ("commit",),
    ("insert", ODD[1], {"Key, 1": 'k,"1\\', 'bo"dy': "text"}),
    ("commit",),
    ("insert", "doc", {"id": "5", "body": "kept", "embedding": None}),
    ("insert", "doc", {"id": "7", "body": "kept too", "embedding": None}),
    ("commit",),
    ("insert", "composite", {"tenant": "2", "Doc Id": "z", "words": "w"}),
    ("commit",),
    ("message", True, "capture", "within é".encode()),
    ("commit",),
    ("message", False, "capture", b"at once"),
    ("origin",),
    ("insert", "doc", {"id": "10", "body": "from elsewhere", "embedding": None}),
    ("commit",),
    ("truncate", "composite"),
    ("truncate", "toasted"),
    ("commit",),
    ("insert", "finished", {"id": "1"}),
    ("commit",),
]
"""What the workload means, whichever plugin tells it: see `meaning`."""


def meaning(messages: Iterable[Message]) -> list[tuple[Any, ...]]:
    """The messages in the form of `CHANGES`: what the two plugins are allowed to say differently is taken out.

    Relations by name (wal2json has no oids and does not describe tables), leaves as their root, of an old identity only
    what the new row does not say as well (wal2json always sends one), a truncate of two tables as two, transactions
    without changes not at all (wal2json tells of them).
    """
    told: list[tuple[Any, ...]] = []
    for message in messages:
        match message:
            case Insert(relation, values):
                told.append(("insert", _name(relation), dict(values)))
            case Update(relation, values, identity):
                old = {name: value for name, value in identity.items() if values.get(name, ...) != value}
                told.append(("update", _name(relation), dict(values), old))
            case Delete(relation, identity):
                told.append(("delete", _name(relation), dict(identity)))
            case Truncate(relations):
                told.extend(sorted(("truncate", _name(relation)) for relation in relations))
            case LogicalMessage(transactional, _, prefix, content):
                told.append(("message", transactional, prefix, content))
            case Origin():
                told.append(("origin",))
            case Commit():
                if told and told[-1] != ("commit",) and told[-1][:2] != ("message", False):
                    told.append(("commit",))
            case Begin() | Relation():
                pass
    return told


def _name(relation: Relation) -> str:
    return LEAVES.get((relation.schema, relation.name), (relation.schema, relation.name))[1]


def options(plugin: str) -> dict[str, str]:
    """What is asked for: more than the service asks for, so that every kind of message comes."""
    if plugin == "pgoutput":
        return pgoutput.options("capture", messages=True)
    everything = {"actions": "insert,update,delete,truncate"}
    return wal2json.options(TABLES, message_prefixes=["capture"]) | everything


def run_workload(connection: psycopg.Connection[Any]) -> None:
    """A statement a transaction; the session's settings must not matter for the text of keys."""
    for statement in WORKLOAD:
        connection.execute(statement.encode())


def frames(stem: str) -> list[bytes]:
    """The CopyData payloads of a capture, as the walsender sent them."""
    data = (DATA / f"{stem}.bin").read_bytes()
    found, at = [], 0
    while at < len(data):
        end = at + 4 + int.from_bytes(data[at : at + 4], "big")
        found.append(data[at + 4 : end])
        at = end
    return found


def payloads(stem: str) -> list[bytes]:
    """The output plugin's messages of a capture."""
    return [frame[25:] for frame in frames(stem) if frame[:1] == b"w"]


def described(stem: str) -> Any:
    """What a capture's `.json` says about it."""
    return json.loads((DATA / f"{stem}.json").read_text("utf-8"))


def capture(dsn: str, plugin: str, folder: Path) -> None:
    """Run the workload in the database of `dsn` and write both files."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(SETUP.encode())
        connection.execute("SELECT pg_create_logical_replication_slot(%s, %s)", (SLOT, plugin))
        run_workload(connection)
        state = connection.execute("SELECT pg_current_wal_lsn() - '0/0', roident::int FROM pg_replication_origin")
        ((through, origin),) = state.fetchall()
        version = connection.info.server_version
    received = list(_read(dsn, plugin, int(through)))
    stem = f"capture-{plugin}-{version // 10000}"
    (folder / f"{stem}.bin").write_bytes(b"".join(len(frame).to_bytes(4, "big") + frame for frame in received))
    about = {"server_version": version, "plugin": plugin, "options": options(plugin), "origin_id": origin}
    (folder / f"{stem}.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _read(dsn: str, plugin: str, through: int) -> Iterator[bytes]:
    """Every frame until the server has decoded as far as `through`."""
    conninfo = pinned(dsn, "capture", PINS, replication="database", client_encoding="UTF8")
    connection = psycopg.connect(conninfo, autocommit=True)
    try:
        listed = ", ".join(f""""{name}" '{value.replace("'", "''")}'""" for name, value in options(plugin).items())
        connection.execute(f"START_REPLICATION SLOT {SLOT} LOGICAL 0/0 ({listed})".encode())
        while True:
            length, data = connection.pgconn.get_copy_data(1)
            if length == 0:
                select.select([connection.pgconn.socket], [], [], 30)
                connection.pgconn.consume_input()
                continue
            frame = bytes(data)
            yield frame
            if frame[:1] == b"k" and int.from_bytes(frame[1:9], "big") >= through:
                return
    finally:
        connection.close()


if __name__ == "__main__":
    capture(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
