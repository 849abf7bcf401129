"""Pipeline efficiency: a backfill with the real model ÷ the model by itself, on the same texts, with one torch thread.

By itself twice: the best plain use of sentence-transformers (`encode` sorts by length; the best of three batch sizes),
and our own engine in the service's batches. The first ratio says what it is worth to use this; the second, what
reading and writing rows take from the engine. A backfill counts from the configuring statement's commit to the last
vector's, the model being loaded.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import stage
from benchmarks.processes import cpu_seconds
from benchmarks.results import Result
from tests.servers import Bench
from tests.service import Service

SETTINGS: dict[str, dict[str, Any]] = {
    "standard": {"texts": 240, "batch_sizes": [16, 32, 64], "repetitions": 3},
    "quick": {"texts": 40, "batch_sizes": [32], "repetitions": 1},
    "tiny": {"texts": 20, "batch_sizes": [32], "repetitions": 1},
}

MODEL = "all-MiniLM-L6-v2"


def run(settings: dict[str, Any]) -> Result:
    result = Result("pipeline", "Pipeline efficiency with MiniLM", settings)
    texts = stage.texts(settings["texts"])
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cdc-embedder-texts-")))
        file = folder / "texts.json"
        file.write_text(json.dumps(texts))
        variants: dict[str, Callable[[], dict[str, float]]] = {}
        ways: dict[str, tuple[str, ...]] = {
            f"encode, batches of {size}": ("plain", str(file), str(size)) for size in settings["batch_sizes"]
        }
        ways["our engine alone"] = ("engine", str(file))
        processes = {name: stack.enter_context(_encoding(*way)) for name, way in ways.items()}
        for name, process in processes.items():
            _answer(process)
            variants[name] = partial(_encoded, process, len(texts))
        bench = stack.enter_context(stage.database())
        service = stack.enter_context(stage.serving(bench))
        _load_model(bench)
        variants["backfill"] = partial(_backfill, bench, service, texts)
        result.measure(variants, settings["repetitions"])
    best = _best(result)
    result.ratio("backfill / best encode", "rows_per_s", "backfill", best, ">= 1.3")
    result.ratio("backfill / our engine alone", "rows_per_s", "backfill", "our engine alone", ">= 0.95")
    result.notes.append(f"the best plain use here is {best}, by its median; one torch thread everywhere")
    return result


def _best(result: Result) -> str:
    rates: dict[str, list[float]] = {}
    for measured in result.measurements:
        if measured.variant.startswith("encode"):
            rates.setdefault(measured.variant, []).append(measured.values["rows_per_s"])
    return max(rates, key=lambda name: sorted(rates[name])[len(rates[name]) // 2])


@contextmanager
def _encoding(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.encoding", *arguments],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{process.args!r} ended")
    return line


def _encoded(process: subprocess.Popen[str], rows: int) -> dict[str, float]:
    assert process.stdin is not None
    before = cpu_seconds(process.pid)
    process.stdin.write("again\n")
    process.stdin.flush()
    seconds = float(_answer(process))
    return {"rows_per_s": rows / seconds, "cpu_ms_per_row": (cpu_seconds(process.pid) - before) / rows * 1e3}


def _load_model(bench: Bench) -> None:
    """A column that stays keeps the model loaded between repetitions."""
    stage.make_table(bench, "loads", 1)
    column = stage.configure(bench, "loads", MODEL)
    stage.wait_written(bench, column, 1, 1)


def _backfill(bench: Bench, service: Service, texts: list[str]) -> dict[str, float]:
    table = f"texts_{time.monotonic_ns()}"
    stage.make_table(bench, table)
    stage.fill_with(bench, table, texts)
    bench.admin.execute(f"VACUUM ANALYZE {table}")
    stage.settle(bench)
    before = cpu_seconds(service.pid)
    column = stage.configure(bench, table, MODEL)
    began = time.time()
    stage.wait_written(bench, column, len(texts), len(texts))
    seconds = stage.last_written(bench, column) - began
    spent = cpu_seconds(service.pid) - before
    stage.drop(bench, table)
    return {"rows_per_s": len(texts) / seconds, "cpu_ms_per_row": spent / len(texts) * 1e3}
