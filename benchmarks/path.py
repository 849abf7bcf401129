"""The path alone: `fake` vectors, so that reading, fetching and writing are all that costs.

Rows a second and CPU microseconds a row, of our process and of each of the server's backends, for rows that were
inserted while the service was stopped (the log is read) and for a backfill (the table is read), with both plugins.
Then decoding by itself. Measured from the first vectors to the last: starting up is not in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks import stage
from benchmarks.decoding import decoding
from benchmarks.processes import cpu_seconds, server_cpu
from benchmarks.results import Result
from cdc_embedder.embedding.base import InputType, ModelSpec
from cdc_embedder.embedding.fake import FakeEmbedder
from cdc_embedder.errors import Misconfigured
from cdc_embedder.rows import binary
from tests.servers import Bench
from tests.service import Service

SETTINGS: dict[str, dict[str, Any]] = {
    "standard": {"rows": 60_000, "repetitions": 3, "decoded_rows": 20_000},
    "quick": {"rows": 10_000, "repetitions": 1, "decoded_rows": 3_000},
    "tiny": {"rows": 1_500, "repetitions": 1, "decoded_rows": 500, "servers": ["18 pgoutput"]},
}


def run(settings: dict[str, Any]) -> Result:
    result = Result("path", "The path alone, without a model", settings)
    for server in settings.get("servers", stage.SERVERS):
        try:
            _on(server, result, settings)
        except Misconfigured as missing:
            result.notes.append(f"{server}: this machine lacks {missing}")
    result.measure({"in our process, alone": partial(alone, min(settings["rows"], 20_000))}, settings["repetitions"])
    result.notes.append(
        "rows: 300 bytes of text, 384 dimensions; `server …` is each backend's CPU a row by its application_name;"
        " `in our process, alone` is what the fake embedder's hash and the arrays cost, which are part of the client's"
    )
    return result


def _on(server: str, result: Result, settings: dict[str, Any]) -> None:
    """The whole path and decoding; then the path once more without the right to mark what is written."""
    rows, repetitions = settings["rows"], settings["repetitions"]
    with stage.database(server) as bench:
        stage.make_model(bench, "fake")
        variants: dict[str, Callable[[], Any]] = {
            f"{server}, inserts": Inserts(bench, rows).measure,
            f"{server}, backfill": Backfills(bench, rows).measure,
        }
        result.measure(variants, repetitions)
        result.measure(decoding(bench, settings["decoded_rows"]), repetitions)
    with stage.database(server, origins=False) as bench:
        stage.make_model(bench, "fake")
        result.measure({f"{server}, inserts, no origins": Inserts(bench, rows).measure}, 1)


class Inserts:
    """Rows that the log tells of: inserted while the service was stopped, its slot being there."""

    def __init__(self, bench: Bench, rows: int) -> None:
        self._bench, self._rows = bench, rows
        self._turn = 0

    def measure(self) -> dict[str, float]:
        bench, table = self._bench, f"inserted_{self._turn}"
        self._turn += 1
        stage.make_table(bench, table)
        column = stage.configure(bench, table, "fake")
        with stage.serving(bench):
            stage.wait_live(bench, column)
        stage.fill(bench, table, self._rows)
        stage.settle(bench)
        with stage.serving(bench) as service:
            found = watched(bench, service, column, self._rows)
            stage.drop(bench, table)
        return found


class Backfills:
    """Rows that a new column finds in its table."""

    def __init__(self, bench: Bench, rows: int) -> None:
        self._bench, self._rows = bench, rows
        self._turn = 0

    def measure(self) -> dict[str, float]:
        bench, table = self._bench, f"filled_{self._turn}"
        self._turn += 1
        stage.make_table(bench, table, self._rows)
        bench.admin.execute(f"VACUUM ANALYZE {table}")
        stage.settle(bench)
        with stage.serving(bench) as service:
            service.wait_for_log("streaming from the slot")
            column = stage.configure(bench, table, "fake")
            found = watched(bench, service, column, self._rows)
            stage.drop(bench, table)
        return found


def watched(bench: Bench, service: Service, column: int, rows: int) -> dict[str, float]:
    """From the first vectors that are seen to the last of `rows`."""
    before, began = stage.wait_started(bench, column)
    client, server = cpu_seconds(service.pid), server_cpu(bench)
    stage.wait_written(bench, column, rows, rows)
    client, after = cpu_seconds(service.pid) - client, server_cpu(bench)
    done = max(rows - before, 1)
    a_row = 1e6 / done
    spent = {name: (seconds - server.get(name, 0.0)) * a_row for name, seconds in after.items()}
    found = {
        "rows_per_s": done / max(stage.last_written(bench, column) - began, 1e-3),
        "client_us": client * a_row,
        "server_us": sum(spent.values()),
    }
    return found | {f"server {name}_us": value for name, value in sorted(spent.items()) if value >= 0.1}


def alone(rows: int) -> dict[str, float]:
    """What of the client's CPU is neither reading nor waiting: the fake vectors, and their form on the wire."""
    embedder = FakeEmbedder(ModelSpec("fake", stage.DIMENSIONS, backend="fake"))
    texts = [(f"{n:032x} " * 10)[:300] for n in range(512)]
    hashing = arrays = 0.0
    for _ in range(0, rows, len(texts)):
        began = time.thread_time()
        vectors = embedder.embed(texts, InputType.DOCUMENT).vectors
        hashed = time.thread_time()
        binary.vectors(vectors, "vector", 1)
        hashing, arrays = hashing + hashed - began, arrays + time.thread_time() - hashed
    made = -(-rows // len(texts)) * len(texts)
    return {"fake_hash_us": hashing / made * 1e6, "arrays_us": arrays / made * 1e6}
