"""The engine on a GPU: texts a second, tokens a second, and the share of the device's peak that is used.

No database, no network: random weights in the shape of the true models. Per shape, at fixed lengths and at a mixture:
our engine without padding, the same engine padded, and `SentenceTransformer.encode` in fp16 at its best batch size, in
turn, from text, tokenizing included. MFU counts the operations of the texts without padding over the best rate of a
plain matrix multiplication, measured first. Then the latency of one small call.
"""

from __future__ import annotations

import importlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import shapes
from benchmarks.results import Result
from benchmarks.shapes import SHAPES, TINY, TINY_GATED, Shape

SETTINGS: dict[str, dict[str, Any]] = {
    "standard": {"shapes": list(SHAPES.values()), "lengths": shapes.LENGTHS, "tokens": {384: 1_500_000, 1024: 300_000},
                 "repetitions": 3, "batch_sizes": [32, 128, 512], "matmul": 8192, "rows": [1, 8, 64]},
    "quick": {"shapes": list(SHAPES.values()), "lengths": (64, 256), "tokens": {384: 200_000, 1024: 40_000},
              "repetitions": 1, "batch_sizes": [128], "matmul": 4096, "rows": [1, 64]},
    "tiny": {"shapes": [TINY, TINY_GATED], "lengths": (16,), "tokens": {32: 400}, "repetitions": 1, "batch_sizes": [8],
             "matmul": 128, "rows": [1, 2], "idle_s": 0.0},
}  # fmt: skip

LATENCY_TOKENS = 64
GOALS = {
    "e5-small-v2": ">= 0.35",
    "all-MiniLM-L6-v2": "",
    "mxbai-embed-large-v1": ">= 0.55",
    "gte-large-en-v1.5": ">= 0.55",
}


def lacking(device: str) -> str | None:
    """Why nothing can be measured on `device`; None where it can."""
    try:
        import torch
    except ImportError:
        return "gpu: torch is not installed, so nothing was measured"
    if device.startswith("cuda") and not torch.cuda.is_available():
        return "gpu: torch sees no CUDA device here, so nothing was measured (--device cpu --tiny tries the code)"
    return None


def run(settings: dict[str, Any]) -> Result:
    import torch

    device = settings["device"]
    shown = settings | {"shapes": [shape.name for shape in settings["shapes"]]}
    result = Result("gpu", "The engine on a GPU", shown)
    if device.startswith("cuda"):
        result.environment["gpu"] = torch.cuda.get_device_name(device)
        result.environment["cuda"] = torch.version.cuda
    peak = _matmul_peak(device, settings["matmul"])
    result.settings = shown | {"matmul_peak_tflops": peak / 1e12}
    print(f"  matmul {peak / 1e12:.1f} TFLOP/s", flush=True)
    for shape in settings["shapes"]:
        with tempfile.TemporaryDirectory(prefix="cdc-embedder-shape-") as folder:
            try:
                saved = shapes.build(shape, Path(folder))
            except ImportError as error:
                result.notes.append(f"{shape.name}: not measured, {error}")
                continue
            _shape(result, shape, saved, device, settings, peak)
    result.notes.append(
        "from text to vectors in memory, one call for all texts; MFU over the matmul peak measured here"
    )
    return result


def _shape(result: Result, shape: Shape, saved: Path, device: str, settings: dict[str, Any], peak: float) -> None:
    cases = {str(length): [length] * _number(settings, shape, length) for length in settings["lengths"]}
    cases["mixed"] = shapes.mixed(_number(settings, shape, 90), max(settings["lengths"]))
    with _engines(saved, shape, device, settings["batch_sizes"]) as engines:
        for case, lengths in cases.items():
            texts = shapes.texts(lengths, shape.vocabulary)
            # an even order, as texts arrive: sorting is the engine's work
            variants = {
                f"{shape.name}, {case}, {name}": partial(_rate, engine, texts, lengths, shape, peak, device)
                for name, engine in engines.items()
            }
            result.measure(variants, settings["repetitions"])
            best = _best(result, f"{shape.name}, {case}, encode")
            packed, padded = f"{shape.name}, {case}, packed", f"{shape.name}, {case}, padded"
            goal = ">= 5" if shape.name == "e5-small-v2" and case == "mixed" else ""
            result.ratio(f"{shape.name}, {case}: packed / best encode", "docs_per_s", packed, best, goal)
            result.ratio(f"{shape.name}, {case}: packed / padded", "docs_per_s", packed, padded)
        for rows in settings["rows"]:
            texts = shapes.texts([LATENCY_TOKENS] * rows, shape.vocabulary)
            result.measure(
                {f"{shape.name}, latency of {rows}, {name}": partial(_latency, engine, texts, device)
                 for name, engine in engines.items() if not name.startswith("encode")}, 1
            )  # fmt: skip


def _number(settings: dict[str, Any], shape: Shape, length: int) -> int:
    return max(2, int(settings["tokens"][shape.hidden] // length))


Engine = Callable[[list[str]], "np.ndarray[Any, Any]"]


@contextmanager
def _engines(saved: Path, shape: Shape, device: str, batch_sizes: list[int]) -> Iterator[dict[str, Engine]]:
    """Every way through the same model, by name: `packed` only where the model goes that way."""
    import torch
    from sentence_transformers import SentenceTransformer

    from cdc_embedder.embedding.base import InputType, ModelSpec
    from cdc_embedder.embedding.local import LocalEmbedder

    spec = ModelSpec(shape.name, shape.hidden, source=str(saved))
    ours = LocalEmbedder(spec, device)
    engines: dict[str, Engine] = {
        ours.engine.split()[0]: lambda texts: ours.embed(texts, InputType.DOCUMENT).vectors,
    }
    padded = _padded(spec, device)
    if padded is not None:
        engines.setdefault("padded", lambda texts: padded.embed(texts, InputType.DOCUMENT).vectors)
    half = torch.float16 if device.startswith("cuda") else torch.float32
    model = SentenceTransformer(str(saved), device=device, model_kwargs={"dtype": half})
    for size in batch_sizes:
        engines[f"encode, batches of {size}"] = partial(
            model.encode, batch_size=size, normalize_embeddings=True, show_progress_bar=False
        )
    try:
        yield engines
    finally:
        ours.close()
        if padded is not None:
            padded.close()


def _padded(spec: Any, device: str) -> Any:
    """The same engine with the way without padding taken away, so that it chooses the next."""
    from cdc_embedder.embedding.forward import Unsuited

    local: Any = importlib.import_module("cdc_embedder.embedding.local")

    def refuse(*_: object) -> Any:
        raise Unsuited("the benchmark wants it padded")

    packed = local.Packed
    local.Packed = refuse
    try:
        return local.LocalEmbedder(spec, device)
    finally:
        local.Packed = packed


def _rate(
    engine: Engine, texts: list[str], lengths: list[int], shape: Shape, peak: float, device: str
) -> dict[str, float]:
    engine(texts[: max(1, len(texts) // 8)])  # shapes that were not seen yet are slow once
    seconds = _timed(lambda: engine(texts), device)
    done = shapes.operations(shape, lengths)
    return {
        "docs_per_s": len(texts) / seconds,
        "tokens_per_s": sum(lengths) / seconds,
        "mfu": done / seconds / peak,
        "tflops": done / seconds / 1e12,
    }


def _latency(engine: Engine, texts: list[str], device: str) -> dict[str, float]:
    """Milliseconds of one call of these few texts, from text to vectors."""
    for _ in range(3):
        engine(texts)
    times = sorted(_timed(lambda: engine(texts), device) for _ in range(20))
    return {"p50_ms": statistics.median(times) * 1e3, "p99_ms": times[-1] * 1e3}


def _timed(call: Callable[[], object], device: str) -> float:
    _wait_for(device)
    began = time.perf_counter()
    call()
    _wait_for(device)
    return time.perf_counter() - began


def _wait_for(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def _matmul_peak(device: str, size: int) -> float:
    """Operations a second of the best of twenty products of two square matrices, in the engine's number format."""
    import torch

    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = [_timed(lambda: left @ right, device) for _ in range(20)]
    return 2 * size**3 / min(times)


def _best(result: Result, prefix: str) -> str:
    rates: dict[str, list[float]] = {}
    for measured in result.measurements:
        if measured.variant.startswith(prefix):
            rates.setdefault(measured.variant, []).append(measured.values["docs_per_s"])
    return max(rates, key=lambda name: statistics.median(rates[name]))
