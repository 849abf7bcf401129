"""The application's price: pgbench's throughput and latency on the source table, with and without embedding it.

The server and pgbench have one core; our service and the other designs' workers have the other, as if they ran
elsewhere. Transactions come at half of what the bare table takes at most (`pgbench --rate`), so latency is that of a
server with room; saturation is reported by itself. Variants in turn, a fresh table each; ratios carry intervals.

Peers: a trigger that fills a queue table, with a good worker; pgai's trigger as it ships, where its SQL is at hand
(its worker does not run: it would only add to it); a model called in the trigger, as a generated column with
PostgresML does: a sleep of what one text takes MiniLM here, without the CPU that it would take from the server.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import queue_worker, stage
from benchmarks.measuring import percentile
from benchmarks.processes import children, cpu_seconds, pin, postmaster, server_cpu
from benchmarks.results import Result
from cdc_embedder.embedding.base import InputType
from cdc_embedder.embedding.registry import builtin_spec, load_here
from tests.servers import Bench

SETTINGS: dict[str, dict[str, Any]] = {
    "standard": {"seconds": 3, "repetitions": 4, "clients": 4, "rows": 20_000},
    "quick": {"seconds": 1, "repetitions": 1, "clients": 4, "rows": 1_000, "call_s": 0.01},
    "tiny": {"seconds": 1, "repetitions": 1, "clients": 2, "rows": 500, "variants": ["bare", "ours"], "call_s": 0.005},
}

SCRIPTS = {
    "insert": "INSERT INTO {table} (body) VALUES (left(repeat(md5(random()::text) || ' ', 10), 300));\n",
    "update": "\\set id random(1, {rows})\n"
    "UPDATE {table} SET body = left(repeat(md5(random()::text) || ' ', 10), 300) WHERE id = :id;\n",
}

GOAL = ">= 0.97"

_AS_MINILM = ", as long as MiniLM takes for one text here"

PGAI = Path(__file__).parents[1] / "build" / "pgai"
"""Where `make bench` unpacks pgai's wheel, of which only its SQL is used."""

Design = Callable[[Bench, str], Any]
"""Sets a table up for its variant; a context manager around the measurement."""


def run(settings: dict[str, Any]) -> Result:
    result = Result("price", "The application's price", settings)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        result.notes.append("one core only: the server shares it with everything else")
    here, elsewhere = {cores[0]}, {cores[-1]}
    call_s = settings.get("call_s") or _one_text()
    result.notes.append(
        f"the call in the trigger sleeps {call_s * 1e3:.1f} ms" + _AS_MINILM * ("call_s" not in settings)
    )
    designs = _designs(call_s, result)
    chosen = settings.get("variants", list(designs))
    with stage.database(max_connections="50") as bench:
        stage.make_model(bench, "fake")
        pin([postmaster(bench), *children(postmaster(bench))], here)
        own = os.sched_getaffinity(0)
        os.sched_setaffinity(0, elsewhere)
        try:
            for kind in SCRIPTS:
                for name in ("bare", "ours"):
                    variant = f"{kind}, {name}, saturated"
                    result.measure({variant: partial(_measured, bench, kind, designs[name], settings, here, None)}, 2)
                fastest = max(m.values["tps"] for m in result.measurements if m.variant == f"{kind}, bare, saturated")
                rate = max(1, int(fastest / 2))
                result.measure(
                    {
                        f"{kind}, {name}": partial(_measured, bench, kind, designs[name], settings, here, rate)
                        for name in chosen
                    },
                    settings["repetitions"],
                )
                for name in chosen[1:]:
                    of, to = f"{kind}, {name}", f"{kind}, bare"
                    result.ratio(f"{kind}, {name}: throughput / bare", "tps", of, to, GOAL if name == "ours" else "")
                    goal = "<= 1.03" if name == "ours" else ""
                    result.ratio(f"{kind}, {name}: mean latency / bare", "mean_ms", of, to, goal)
                    result.ratio(f"{kind}, {name}: p50 latency / bare", "p50_ms", of, to, goal)
        finally:
            os.sched_setaffinity(0, own)
    result.notes.append(
        "latency is that of the transaction itself; how late it began is `lag_ms`. Throughput at a fixed rate falls"
        " short of it only where the server cannot keep up"
    )
    return result


def _designs(call_s: float, result: Result) -> dict[str, Design]:
    designs: dict[str, Design] = {
        "bare": _bare,
        "ours": _ours,
        "trigger + queue": _queue,
        "call in trigger": partial(_call, call_s),
    }
    found = next(iter(sorted(PGAI.rglob("ai.sql"))), None)
    if found is None:
        result.notes.append(f"pgai: not measured, its SQL is not in {PGAI.name}/")
    else:
        designs["pgai's trigger"] = partial(_pgai, found)
        result.notes.append("pgai: the trigger and queue of its 0.12.1 as shipped, without its worker")
    return designs


@contextmanager
def _bare(bench: Bench, table: str) -> Iterator[None]:
    yield


@contextmanager
def _ours(bench: Bench, table: str) -> Iterator[None]:
    column = stage.configure(bench, table, "fake")
    with stage.serving(bench):
        stage.wait_live(bench, column)
        yield
    bench.admin.execute("DELETE FROM cdc_embedder.embedding_column WHERE id = %s", (column,))


@contextmanager
def _queue(bench: Bench, table: str) -> Iterator[None]:
    for statement in queue_worker.trigger(table):
        bench.admin.execute(statement)
    worker = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.queue_worker", bench.dsn_admin, table], cwd=Path(__file__).parents[1]
    )
    try:
        stage.wait(lambda: cpu_seconds(worker.pid) > 0.3 or worker.poll() is not None, "no worker")
        yield
        if worker.poll() is not None:
            raise RuntimeError("the queue's worker ended")
    finally:
        worker.kill()
        worker.wait()


@contextmanager
def _call(seconds: float, bench: Bench, table: str) -> Iterator[None]:
    vector = ",".join(["0.05"] * stage.DIMENSIONS)
    bench.admin.execute(
        f"CREATE FUNCTION {table}_embed() RETURNS trigger LANGUAGE plpgsql AS"
        f" 'BEGIN PERFORM pg_sleep({seconds}); new.embedding := ''[{vector}]''; RETURN new; END'"
    )
    bench.admin.execute(
        f"CREATE TRIGGER embed BEFORE INSERT OR UPDATE OF body ON {table} FOR EACH ROW EXECUTE FUNCTION {table}_embed()"
    )
    yield


@contextmanager
def _pgai(script: Path, bench: Bench, table: str) -> Iterator[None]:
    if bench.admin.execute("SELECT FROM pg_namespace WHERE nspname = 'ai'").rowcount == 0:
        bench.admin.execute(script.read_text().replace("@extschema:vector@", "public").encode())
    bench.admin.execute(f"ALTER TABLE {table} DROP COLUMN embedding")  # pgai wants to add it
    row = bench.admin.execute(
        f"SELECT ai.create_vectorizer('{table}'::regclass, loading => ai.loading_column('body'),"
        f" embedding => ai.embedding_ollama('all-minilm', {stage.DIMENSIONS}), chunking => ai.chunking_none(),"
        f" destination => ai.destination_column('embedding'), scheduling => ai.scheduling_none(),"
        " enqueue_existing => false)"
    ).fetchone()
    assert row is not None
    yield
    bench.admin.execute("SELECT ai.drop_vectorizer(%s, drop_all => true)", (row[0],))


def _measured(
    bench: Bench, kind: str, design: Design, settings: dict[str, Any], cores: set[int], rate: int | None
) -> dict[str, float]:
    """One run of pgbench, on `cores`, against a fresh table in `design`."""
    table, rows = f"priced_{time.monotonic_ns()}", settings["rows"]
    stage.make_table(bench, table, rows)
    # inserted texts have vectors by then in no variant: the backfill of `ours` is over before pgbench starts
    bench.admin.execute(f"VACUUM ANALYZE {table}")
    with design(bench, table):
        stage.settle(bench)
        before = server_cpu(bench)
        elsewhere = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores)  # pgbench inherits it
        try:
            found = _pgbench(bench, SCRIPTS[kind].format(table=table, rows=rows), settings, rate)
        finally:
            os.sched_setaffinity(0, elsewhere)
        done = found["tps"] * settings["seconds"]
        # of sessions that outlive pgbench's own: ours, or a worker's
        found |= {
            f"server {name}_us": (seconds - before[name]) / done * 1e6
            for name, seconds in server_cpu(bench).items()
            if seconds - before.get(name, seconds) > 0.02
        }
    bench.admin.execute(f"DROP TABLE {table} CASCADE")
    return found


def _pgbench(bench: Bench, script: str, settings: dict[str, Any], rate: int | None) -> dict[str, float]:
    """Transactions a second and their latencies, from pgbench's log of every transaction."""
    with tempfile.TemporaryDirectory(prefix="cdc-embedder-pgbench-") as folder:
        (Path(folder) / "script").write_text(script)
        done = subprocess.run(
            [
                str(bench.server.bindir / "pgbench"), "--no-vacuum", "--file", "script", "--protocol", "prepared",
                "--client", str(settings["clients"]), "--jobs", "1", "--time", str(settings["seconds"]), "--log",
                "--host", "127.0.0.1", "--port", str(bench.server.port), "--username", "postgres",
                *([] if rate is None else ["--rate", str(rate)]), bench.database,
            ],
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"pgbench failed: {done.stderr[-2000:]}")
        logged = [path.read_text().splitlines() for path in Path(folder).glob("pgbench_log.*")]
    tps = re.search(r"^tps = ([0-9.]+)", done.stdout, re.MULTILINE)
    assert tps is not None
    return {"tps": float(tps[1]), "offered": rate or 0.0} | latencies([line for lines in logged for line in lines])


def latencies(lines: list[str]) -> dict[str, float]:
    """From lines of pgbench's transaction log: client, number, microseconds, script, epoch, microseconds[, lag].

    With a rate the time includes the lag, which is how late the transaction began; here it is taken out.
    """
    took, lags = [], []
    for line in lines:
        fields = line.split()
        lag = int(fields[6]) if len(fields) > 6 else 0
        took.append((int(fields[2]) - lag) / 1e3)
        lags.append(lag / 1e3)
    return {
        "mean_ms": sum(took) / len(took),
        "p50_ms": percentile(took, 0.5),
        "p99_ms": percentile(took, 0.99),
        "lag_ms": percentile(lags, 0.5),
    }


def _one_text() -> float:
    """Seconds that MiniLM takes for one text of some 20 words, the median of ten."""
    spec = builtin_spec("all-MiniLM-L6-v2")
    assert spec is not None
    import torch

    torch.set_num_threads(1)
    embedder = load_here(spec, "cpu")
    times = []
    for text in stage.texts(10, seed=4):
        began = time.perf_counter()
        embedder.embed([" ".join(text.split()[:20])], InputType.DOCUMENT)
        times.append(time.perf_counter() - began)
    embedder.close()
    return sorted(times)[5]
