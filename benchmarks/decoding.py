"""Decoding by itself: what the server spends on a change, and what we spend on its message.

The log holds inserts of the application and then our own write-backs under a replication origin, as it does in
production. Each variant reads it from a slot of its own: text of all columns, of the key alone (a column list), in
binary form where our decoder takes it; wal2json with and without the server's filter by origin.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

from psycopg import sql

from benchmarks import stage
from cdc_embedder.errors import ProtocolError
from cdc_embedder.wal import pgoutput, wal2json
from cdc_embedder.wal.pgoutput import PgOutputDecoder
from cdc_embedder.wal.wal2json import Wal2JsonDecoder
from tests.servers import Bench

_SLOT, _ORIGIN = "decoded", "decoded_origin"


def decoding(bench: Bench, rows: int) -> Mapping[str, Callable[[], dict[str, float]]]:
    """The variants that `bench`'s plugin has; each measures the same log."""
    slot, origin = f"{_SLOT}_{bench.database}", f"{_ORIGIN}_{bench.database}"
    execute = bench.admin.execute
    stage.make_table(bench, "decoded")
    execute("CREATE PUBLICATION decoded_all FOR TABLE decoded WITH (publish = 'insert, update')")
    execute("CREATE PUBLICATION decoded_keys FOR TABLE decoded (id) WITH (publish = 'insert, update')")
    execute("SELECT pg_create_logical_replication_slot(%s, %s)", (slot, bench.plugin))
    stage.fill(bench, "decoded", rows)
    identity = _write_under_origin(bench, origin)
    read = partial(_read, bench, slot, rows)
    if bench.plugin == "wal2json":
        tables = [("public", "decoded")]
        return {
            "decode wal2json": partial(read, wal2json.options(tables)),
            "decode wal2json, origin filter": partial(read, wal2json.options(tables, filter_origins=[identity])),
        }
    everything, keys = pgoutput.options("decoded_all"), pgoutput.options("decoded_keys")
    ours = {"origin": "none"} if bench.admin.info.server_version >= 160000 else {}
    variants = {
        "decode pgoutput": partial(read, everything),
        "decode pgoutput, key alone": partial(read, keys),
        "decode pgoutput, binary": partial(read, everything | {"binary": "true"}),
    }
    if ours:
        variants["decode pgoutput, origin filter"] = partial(read, everything | ours)
        variants["decode pgoutput, key alone, origin filter"] = partial(read, keys | ours)
    return variants


def _write_under_origin(bench: Bench, origin: str) -> int:
    """A vector for every row, as our sessions write them; the origin's numeric id."""
    row = bench.admin.execute("SELECT pg_replication_origin_create(%s)", (origin,)).fetchone()
    assert row is not None
    bench.admin.execute("SELECT pg_replication_origin_session_setup(%s)", (origin,))
    kind = "vector" if bench.has_vector else "real[]"
    bench.admin.execute(
        sql.SQL(
            "UPDATE decoded SET embedding = (SELECT array_agg((random() + g)::real) FROM generate_series(1, {}) g"
            " WHERE id > 0)::{}"
        ).format(sql.Literal(stage.DIMENSIONS), sql.SQL(kind))
    )
    bench.admin.execute("SELECT pg_replication_origin_session_reset()")
    return int(row[0])


def _read(bench: Bench, slot: str, rows: int, options: Mapping[str, str]) -> dict[str, float]:
    """Server microseconds a change in the log (of which there are two a row), ours a message that arrived."""
    binary = bench.plugin == "pgoutput"
    source = sql.SQL("{}({}, NULL, NULL, VARIADIC {}::text[])").format(
        sql.SQL("pg_logical_slot_peek_binary_changes" if binary else "pg_logical_slot_peek_changes"),
        sql.Literal(slot),
        sql.Literal([part for pair in options.items() for part in pair]),
    )
    began = time.perf_counter()
    bench.admin.execute(sql.SQL("SELECT count(*) FROM {}").format(source))
    seconds = time.perf_counter() - began
    cursor = bench.admin.execute(sql.SQL("SELECT data FROM {}").format(source), binary=True)
    payloads = [memoryview(data.encode() if isinstance(data, str) else data) for (data,) in cursor.fetchall()]
    found = {
        "server_us": seconds / (2 * rows) * 1e6,
        "messages": len(payloads),
        "bytes_per_message": sum(map(len, payloads)) / len(payloads),
    }
    decoder = PgOutputDecoder() if binary else Wal2JsonDecoder()
    began = time.thread_time()
    try:
        for payload in payloads:
            decoder.decode(payload)
    except ProtocolError:
        return found | {"decoder_takes_it": 0}
    spent = time.thread_time() - began
    return found | {"client_us": spent / len(payloads) * 1e6, "messages_per_s": len(payloads) / spent}
