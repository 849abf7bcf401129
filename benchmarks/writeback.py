"""Writing vectors: strategies side by side on one session, what each leaves in the log and in the heap.

`ours, guarded` is the statement of the package: it locks the rows whose text is still the one that was embedded,
updates them, and records them in the ledger; the others only update. Each strategy writes the same vectors into its own
table: a first time, then five times more with VACUUM in between, as autovacuum would have it. With an HNSW index there
are far fewer rows, and one time more.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import psycopg

from benchmarks import stage
from benchmarks.results import Result
from cdc_embedder import catalog
from cdc_embedder.embedding.base import Vectors
from cdc_embedder.rows import binary
from cdc_embedder.rows.binary import BinaryArray, _BinaryArrayDumper
from cdc_embedder.rows.fetch import Fetch
from cdc_embedder.rows.session import connect
from cdc_embedder.rows.writeback import Term, Write, WriteBack
from tests.servers import Bench

SETTINGS: dict[str, dict[str, Any]] = {
    "standard": {"rows": 10_000, "indexed_rows": 1_000, "batch": 512, "again": 5, "repetitions": 3},
    "quick": {"rows": 2_000, "indexed_rows": 200, "batch": 512, "again": 2, "repetitions": 1},
    "tiny": {"rows": 300, "indexed_rows": 20, "batch": 128, "again": 1, "repetitions": 1},
}

Put = Callable[[Sequence[int], Vectors], None]
Strategy = Callable[[Bench, str], "Open"]


class Open:
    """A strategy that is ready for its table."""

    def __init__(self, put: Put, close: Callable[[], object]) -> None:
        self.put, self.close = put, close


def run(settings: dict[str, Any]) -> Result:
    result = Result("writeback", "Writing vectors back", settings)
    strategies: dict[str, Strategy] = {
        "ours, guarded": _ours,
        "unnest, numpy": _unnest,
        "COPY, staged": _copied,
        "executemany": _many,
    }
    again, batch = settings["again"], settings["batch"]
    with stage.database() as bench:
        stage.make_model(bench, "fake")
        variants = {
            name: partial(_measured, bench, strategy, settings["rows"], batch, again, "")
            for name, strategy in strategies.items()
        }
        variants["ours, guarded, fillfactor 50"] = partial(
            _measured, bench, _ours, settings["rows"], batch, again, "ALTER TABLE {table} SET (fillfactor = 50)"
        )
        index = "CREATE INDEX ON {table} USING hnsw (embedding vector_cosine_ops)"
        for name, strategy in list(strategies.items())[:2]:
            variants[f"{name}, HNSW"] = partial(
                _measured, bench, strategy, settings["indexed_rows"], batch, min(again, 1), index
            )
        result.measure(variants, settings["repetitions"])
    for peer in ("unnest, numpy", "COPY, staged", "executemany"):
        result.ratio(f"ours, guarded / {peer}", "rows_per_s", "ours, guarded", peer)
    result.ratio("with HNSW / without", "rows_per_s", "ours, guarded, HNSW", "ours, guarded")
    result.notes.append("one session, 384 dimensions, 300 bytes of text, fsync on; `again_…`: rows that held a vector")
    return result


def _measured(bench: Bench, strategy: Strategy, rows: int, batch: int, again: int, prepare: str) -> dict[str, float]:
    table = f"written_{time.monotonic_ns()}"
    stage.make_table(bench, table)
    if prepare:
        bench.admin.execute(prepare.format(table=table))
    stage.fill(bench, table, rows)
    bench.admin.execute(f"VACUUM ANALYZE {table}")
    opened = strategy(bench, table)
    try:
        opened.put([1], _vectors(1, 0))  # prepares the statement
        stage.settle(bench)
        found = _pass(bench, opened.put, rows, batch, 1)
        bench.admin.execute(f"VACUUM {table}")
        first_size, hot = _size(bench, table), _updates(bench, table)
        passes = []
        for turn in range(again):
            passes.append(_pass(bench, opened.put, rows, batch, 2 + turn))
            bench.admin.execute(f"VACUUM {table}")
        found |= {f"again_{key}": sorted(p[key] for p in passes)[len(passes) // 2] for key in passes[0]}
        updates = _updates(bench, table)
        found["again_hot_share"] = (updates[1] - hot[1]) / max(updates[0] - hot[0], 1)
        found["heap_growth"] = _size(bench, table) / first_size
    finally:
        opened.close()
    stage.drop(bench, table)
    return found


def _pass(bench: Bench, put: Put, rows: int, batch: int, seed: int) -> dict[str, float]:
    vectors = _vectors(rows, seed)
    position = _position(bench)
    began, spent = time.perf_counter(), time.thread_time()
    for start in range(0, rows, batch):
        put(range(start + 1, min(start + batch, rows) + 1), vectors[start : start + batch])
    seconds, spent = time.perf_counter() - began, time.thread_time() - spent
    row = bench.admin.execute("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), %s)", (position,)).fetchone()
    assert row is not None
    return {"rows_per_s": rows / seconds, "client_us": spent / rows * 1e6, "wal_bytes_per_row": float(row[0]) / rows}


def _ours(bench: Bench, table: str) -> Open:
    column_id = stage.configure(bench, table, "fake")
    bench.admin.execute(
        "INSERT INTO cdc_embedder.leader (slot, term, service) VALUES (%s, 1, 'benchmark') ON CONFLICT DO NOTHING",
        (bench.slot,),
    )
    runner = asyncio.Runner()

    async def opened() -> tuple[WriteBack, Fetch, Any]:
        session = await connect(bench.dsn_service, "write")
        column = next(c for c in await catalog.load(session, bench.slot) if c.id == column_id)
        return WriteBack(session, column, Term(bench.slot, 1)), Fetch(session, column), session

    writer, fetcher, session = runner.run(opened())
    prints: dict[int, bytes] = {}

    def put(ids: Sequence[int], vectors: Vectors) -> None:
        writes = [Write((str(id),), prints[id], True) for id in ids]
        done = runner.run(writer.write(writes, vectors))
        if len(done) != len(writes):
            raise RuntimeError(f"{len(writes) - len(done)} rows were not written")

    rows = bench.admin.execute(f"SELECT id FROM {table} ORDER BY id").fetchall()
    read = runner.run(fetcher.rows([(str(id),) for (id,) in rows]))
    prints |= {id: row.fingerprint or b"" for (id,), (_, row) in zip(rows, read, strict=True)}

    def close() -> None:
        runner.run(session.close())
        runner.close()

    return Open(put, close)


def _plain(bench: Bench) -> psycopg.Connection:
    connection = psycopg.connect(bench.dsn_admin, autocommit=True)
    connection.execute("SET plan_cache_mode = force_generic_plan")
    connection.adapters.register_dumper(BinaryArray, _BinaryArrayDumper)
    return connection


def _vector_oid(connection: psycopg.Connection) -> int:
    row = connection.execute("SELECT 'vector'::regtype::oid::int").fetchone()
    assert row is not None
    return int(row[0])


def _unnest(bench: Bench, table: str) -> Open:
    connection = _plain(bench)
    oid = _vector_oid(connection)
    statement = (
        f"UPDATE {table} t SET embedding = i.v FROM unnest(%s::bigint[], %s::vector[]) i(id, v) WHERE t.id = i.id"
    )

    def put(ids: Sequence[int], vectors: Vectors) -> None:
        connection.execute(statement, (list(ids), binary.vectors(vectors, "vector", oid)), prepare=True)

    return Open(put, connection.close)


def _copied(bench: Bench, table: str) -> Open:
    connection = _plain(bench)
    connection.execute(f"CREATE TEMP TABLE staged (id bigint, v vector({stage.DIMENSIONS}))")
    size = 4 * stage.DIMENSIONS
    layout = [("n", ">i2"), ("l1", ">i4"), ("id", ">i8"), ("l2", ">i4"), ("d", ">u2"), ("u", ">u2"),
              ("v", ">f4", (stage.DIMENSIONS,))]  # fmt: skip

    def put(ids: Sequence[int], vectors: Vectors) -> None:
        body = np.zeros(len(ids), dtype=layout)
        body["n"], body["l1"], body["l2"], body["d"] = 2, 8, 4 + size, stage.DIMENSIONS
        body["id"], body["v"] = np.asarray(ids), vectors
        with connection.transaction(), connection.cursor() as cursor:
            cursor.execute("TRUNCATE staged")
            with cursor.copy("COPY staged FROM STDIN (FORMAT binary)") as copy:
                copy.write(b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0) + body.tobytes() + b"\xff\xff")
            cursor.execute(f"UPDATE {table} t SET embedding = s.v FROM staged s WHERE t.id = s.id", prepare=True)

    return Open(put, connection.close)


def _many(bench: Bench, table: str) -> Open:
    connection = _plain(bench)
    oid = _vector_oid(connection)
    head = struct.pack(">HH", stage.DIMENSIONS, 0)

    class OneVector(bytes):
        """A vector in its binary form."""

    class Dumper(_BinaryArrayDumper):
        pass

    Dumper.oid = oid
    connection.adapters.register_dumper(OneVector, Dumper)

    def put(ids: Sequence[int], vectors: Vectors) -> None:
        sent = [(OneVector(head + row.astype(">f4").tobytes()), id) for id, row in zip(ids, vectors, strict=True)]
        with connection.transaction(), connection.cursor() as cursor:
            cursor.executemany(f"UPDATE {table} SET embedding = %s WHERE id = %s", sent)

    return Open(put, connection.close)


def _vectors(rows: int, seed: int) -> Vectors:
    made = np.random.default_rng(seed).standard_normal((rows, stage.DIMENSIONS), dtype=np.float32)
    unit: Vectors = made / np.linalg.norm(made, axis=1, keepdims=True)
    return unit


def _position(bench: Bench) -> str:
    row = bench.admin.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
    assert row is not None
    return str(row[0])


def _size(bench: Bench, table: str) -> int:
    row = bench.admin.execute("SELECT pg_table_size(%s::regclass)", (table,)).fetchone()
    assert row is not None
    return int(row[0])


def _updates(bench: Bench, table: str) -> tuple[int, int]:
    """Updates and HOT updates so far. A session reports its own only when it is idle for a moment, or asked to."""
    time.sleep(1.1)
    row = bench.admin.execute(
        "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relid = %s::regclass", (table,)
    ).fetchone()
    assert row is not None
    return int(row[0]), int(row[1])
