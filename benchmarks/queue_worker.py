"""The worker of the trigger + queue table design, which `price` measures as a peer: `python -m benchmarks.queue_worker
DSN TABLE`, until it is ended.

A good one: it takes up to 500 ids at once, embeds with the same `fake` model, and writes by the same binary arrays.
"""

from __future__ import annotations

import sys
import time

import psycopg

from benchmarks.stage import DIMENSIONS
from cdc_embedder.embedding.base import InputType, ModelSpec
from cdc_embedder.embedding.fake import FakeEmbedder
from cdc_embedder.rows import binary
from cdc_embedder.rows.binary import BinaryArray, _BinaryArrayDumper

MOST = 500


def trigger(table: str) -> list[str]:
    """The statements that make the queue, and the trigger that fills it."""
    return [
        f"CREATE TABLE {table}_queue (n bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, id bigint NOT NULL)",
        f"CREATE FUNCTION {table}_enqueue() RETURNS trigger LANGUAGE plpgsql AS"
        f" 'BEGIN INSERT INTO {table}_queue (id) VALUES (new.id); RETURN NULL; END'",
        f"CREATE TRIGGER enqueue AFTER INSERT OR UPDATE OF body ON {table}"
        f" FOR EACH ROW EXECUTE FUNCTION {table}_enqueue()",
    ]


def work(dsn: str, table: str) -> None:
    """Take, embed, write, for ever; sleeps 10 ms when there is nothing."""
    embedder = FakeEmbedder(ModelSpec("fake", DIMENSIONS, backend="fake"))
    take = (
        f"WITH taken AS (DELETE FROM {table}_queue WHERE n IN (SELECT n FROM {table}_queue ORDER BY n LIMIT {MOST}"
        f" FOR UPDATE SKIP LOCKED) RETURNING id) SELECT DISTINCT t.id, t.body FROM {table} t JOIN taken USING (id)"
        " ORDER BY t.id"
    )
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SET plan_cache_mode = force_generic_plan")
        row = connection.execute("SELECT 'vector'::regtype::oid::int").fetchone()
        assert row is not None
        put = psycopg.RawCursor(connection)
        put.adapters.register_dumper(BinaryArray, _BinaryArrayDumper)
        while True:
            with connection.transaction():
                rows = connection.execute(take, prepare=True).fetchall()
                if rows:
                    vectors = embedder.embed([text or "" for _, text in rows], InputType.DOCUMENT).vectors
                    put.execute(
                        f"UPDATE {table} t SET embedding = i.v FROM unnest($1::bigint[], $2::vector[]) i(id, v)"
                        " WHERE t.id = i.id",
                        [[id for id, _ in rows], binary.vectors(vectors, "vector", row[0])],
                        prepare=True,
                    )
            if len(rows) < MOST:
                time.sleep(0.01)


if __name__ == "__main__":
    work(*sys.argv[1:3])
