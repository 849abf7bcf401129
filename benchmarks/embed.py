"""A call of `cdc_embedder.embed` in SQL: how long a session waits for one text's vector, one call after another.

The request goes through the WAL and the service's slot for it, the answer comes back through a table. What of that time
is the model's own is measured beside it, in this process, with one torch thread as the service has.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import psycopg

from benchmarks import stage
from benchmarks.measuring import percentile
from benchmarks.results import Result
from cdc_embedder.catalog import model_spec
from cdc_embedder.embedding.base import InputType
from cdc_embedder.embedding.registry import Embedders
from tests.servers import Bench

SETTINGS: dict[str, dict[str, Any]] = {
    "standard": {
        "servers": list(stage.SERVERS),
        "models": ["fake", "all-MiniLM-L6-v2"],
        "calls": 200,
        "repetitions": 3,
    },
    "quick": {"servers": list(stage.SERVERS), "models": ["fake", "all-MiniLM-L6-v2"], "calls": 30, "repetitions": 1},
    "tiny": {"servers": ["18 pgoutput"], "models": ["fake"], "calls": 5, "repetitions": 1},
}

WARM = 20
"""Calls before the first that counts: the model is loaded then, and the statement prepared."""

Call = Callable[[str], object]


def run(settings: dict[str, Any]) -> Result:
    result = Result("embed", "embed in SQL, one text", settings)
    texts = [text for text in stage.texts(4000, seed=2) if len(text) < 100][: settings["calls"]]
    variants: dict[str, Callable[[], dict[str, float]]] = {}
    with ExitStack() as stack:
        for server in settings["servers"]:
            bench = stack.enter_context(stage.database(server))
            stage.make_model(bench, "fake")
            bench.admin.execute("UPDATE cdc_embedder.sql_embed SET enabled = true")
            stack.enter_context(stage.serving(bench))
            session = stack.enter_context(psycopg.connect(bench.dsn_admin, autocommit=True))
            session.execute("SET cdc_embedder.embed_timeout = '120s'")
            for model in settings["models"]:
                variants[f"{server}, {model}"] = _measuring(partial(_in_sql, session, model), texts)
        embedders = Embedders(device="cpu")
        stack.callback(embedders.close)
        for model in settings["models"]:
            variants[f"{model} alone"] = _measuring(_alone(embedders, bench, model), texts)
        result.measure(variants, settings["repetitions"])
    for server in settings["servers"]:
        for model in set(settings["models"]) - {"fake"}:
            result.ratio(f"{server}, {model}: p50 / alone", "p50_ms", f"{server}, {model}", f"{model} alone")
    result.notes.append("texts below 100 bytes, one a call; from the call to its vector in the client")
    return result


def _in_sql(session: psycopg.Connection[Any], model: str, text: str) -> object:
    return session.execute("SELECT cdc_embedder.embed(%s, %s)", (model, text), prepare=True).fetchone()


def _alone(embedders: Embedders, bench: Bench, model: str) -> Call:
    """The same engine, without a service."""
    row = bench.admin.execute("SELECT to_jsonb(m) FROM cdc_embedder.model m WHERE name = %s", (model,)).fetchone()
    assert row is not None
    spec = model_spec(row[0])
    if spec.backend == "local":
        import torch

        torch.set_num_threads(1)
    embedder = embedders.get(spec)
    return lambda text: embedder.embed([text], InputType.NONE)


def _measuring(call: Call, texts: list[str]) -> Callable[[], dict[str, float]]:
    for text in texts[:WARM]:
        call(text)

    def measured() -> dict[str, float]:
        seconds = []
        for text in texts:
            began = time.perf_counter()
            call(text)
            seconds.append(time.perf_counter() - began)
        return {f"p{share}_ms": percentile(seconds, share / 100) * 1e3 for share in (50, 95, 99)}

    return measured
