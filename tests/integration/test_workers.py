"""Several processes with one model: the same vectors, calls side by side, and a process that ends costs no row."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cdc_embedder.embedding.base import InputType, ModelSpec
from cdc_embedder.embedding.fake import fake_vector
from cdc_embedder.embedding.isolation import embed_isolating
from cdc_embedder.embedding.registry import Embedders, load_here
from cdc_embedder.embedding.workers import WorkerPool
from cdc_embedder.errors import EmbedderDown, Misconfigured, ModelFault, TextRejected

NONE = InputType.NONE
MINILM = ModelSpec("all-MiniLM-L6-v2", 384, source="sentence-transformers/all-MiniLM-L6-v2")
TEXTS = ["read a csv file", "", "the cat", "ünknown wörds", "日本語", "word " * 400]


def fake(**options: object) -> ModelSpec:
    return ModelSpec("m", 8, backend="fake", options=options)


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(fake(exit="deadly", delay_per_text_s=0.01), ["cpu", "cpu"], load_here)
    yield pool
    pool.close()


def workers(parent: int) -> list[int]:
    """Worker processes that a process has started."""
    with open(f"/proc/{parent}/task/{parent}/children") as children:
        found = [int(pid) for pid in children.read().split()]
    for task in Path(f"/proc/{parent}/task").iterdir():
        found += [int(pid) for pid in (task / "children").read_text().split()]
    return sorted({pid for pid in found if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()})


def segments() -> list[str]:
    return [name for name in os.listdir("/dev/shm") if name.startswith("psm_")]


def right(texts: list[str]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.stack([fake_vector("m", text, 8) for text in texts])


def test_two_workers_give_the_vectors_of_one_process() -> None:
    alone, together = Embedders(device="cpu"), Embedders(device="cpu,cpu")
    try:
        one, two = alone.get(MINILM), together.get(MINILM)
        assert isinstance(two, WorkerPool)
        assert (two.identity, two.engine) == (one.identity, f"2 workers: {one.engine}")
        assert two.concurrency >= 3
        ours, theirs = two.embed(TEXTS, InputType.DOCUMENT), one.embed(TEXTS, InputType.DOCUMENT)
        np.testing.assert_allclose(ours.vectors, theirs.vectors, atol=1e-5)
        assert ours.truncated.tolist() == theirs.truncated.tolist()
        assert ours.tokens == theirs.tokens
        assert ours.spent.tokenizing_s > 0, "what it cost comes back from the other process, too"
        assert (ours.spent.device_s or 0) > 0
        outcome = embed_isolating(two, MINILM, ["cat", "\ud800", "dog"], NONE)
        assert outcome.errors == {1: "the model failed on the text (TypeError)"}
    finally:
        alone.close()
        together.close()


def test_calls_at_once_run_in_two_processes_and_buffers_grow(pool: WorkerPool) -> None:
    texts = [f"{'x' * 40_000} {i}" for i in range(60)]
    times = [_cpu(pid) for pid in workers(os.getpid())]
    with ThreadPoolExecutor(3) as threads:
        calls = [threads.submit(pool.embed, texts, NONE) for _ in range(3)]
        for call in calls:
            np.testing.assert_array_equal(call.result().vectors, right(texts))
    assert all(after > before for before, after in zip(times, map(_cpu, workers(os.getpid())), strict=True))
    assert pool.embed([], NONE).vectors.shape == (0, 8)
    assert not segments(), "names go as soon as both sides have the memory"


def _cpu(pid: int) -> int:
    """Clock ticks of the process, which it takes for hashing megabytes."""
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))


def test_a_worker_that_is_killed_under_a_batch_costs_no_vector(pool: WorkerPool) -> None:
    texts = [f"text {i}" for i in range(60)]
    before = workers(os.getpid())
    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(pool.embed, texts, NONE) for _ in range(2)]
        time.sleep(0.2)
        os.kill(before[0], signal.SIGKILL)
        for call in calls:
            np.testing.assert_array_equal(call.result().vectors, right(texts))
    while len(now := workers(os.getpid())) < 2:
        time.sleep(0.01)
    assert len({*before} & {*now}) == 1, "another was made, and the dead one left no zombie"


def test_a_text_that_ends_the_process_is_set_aside_and_its_neighbours_are_embedded(pool: WorkerPool) -> None:
    texts = ["a", "b", "deadly", "c"]
    with pytest.raises(TextRejected, match="status 139"):
        pool.embed(texts, NONE)
    outcome = embed_isolating(pool, fake(), texts, NONE)
    assert list(outcome.errors) == [2]
    assert "deadly" not in outcome.errors[2]
    np.testing.assert_allclose(outcome.vectors[[0, 1, 3]], right(["a", "b", "c"]), atol=1e-6)


def end(spec: ModelSpec, device: str) -> WorkerPool:
    os._exit(3)


def differ(spec: ModelSpec, device: str) -> object:
    return load_here(ModelSpec(device, 8, backend="fake"), device)


def test_what_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    with pytest.raises(EmbedderDown, match=r"worker 1 on x ended while it loaded the model m \(status 3\)"):
        WorkerPool(fake(), ["x"], end)
    with pytest.raises(ModelFault, match="misspelt"):
        WorkerPool(fake(misspelt=1), ["x", "y"], load_here)
    with pytest.raises(ModelFault, match="another model"):
        WorkerPool(fake(), ["x", "y"], differ)  # type: ignore[arg-type]
    assert not workers(os.getpid())
    with pytest.raises(Misconfigured, match="no device nonsense"):
        Embedders(device="cpu,nonsense").get(MINILM)


def test_a_device_that_fails_takes_its_process_with_it_and_a_new_one_takes_over(tmp_path: Path) -> None:
    sign = tmp_path / "down"
    pool = WorkerPool(fake(down_while_exists=str(sign)), ["cpu"], load_here)
    [before] = workers(os.getpid())
    sign.touch()
    with pytest.raises(EmbedderDown):
        embed_isolating(pool, fake(), ["a"], NONE)
    sign.unlink()
    np.testing.assert_array_equal(pool.embed(["a"], NONE).vectors, right(["a"]))
    assert before not in workers(os.getpid())
    pool.close()
    pool.close()
    with pytest.raises(EmbedderDown, match="closed"):
        pool.embed(["a"], NONE)
    assert not workers(os.getpid())


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_and_their_memory_go_with_the_service(how: signal.Signals) -> None:
    code = """
import sys, threading
from cdc_embedder.embedding.base import InputType, ModelSpec
from cdc_embedder.embedding.registry import load_here
from cdc_embedder.embedding.workers import WorkerPool
pool = WorkerPool(ModelSpec("m", 8, backend="fake", options={"delay_per_text_s": 60}), ["cpu", "cpu"], load_here)
threading.Thread(target=pool.embed, args=(["a"], InputType.NONE), daemon=True).start()
print("ready", flush=True)
threading.Event().wait()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as service:
        assert service.stdout is not None
        service.stdout.readline()
        started = workers(service.pid)
        assert len(started) == 2
        time.sleep(0.2)
        for pid in started:
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.2)
        assert workers(service.pid) == started, "what is sent to the whole group is the service's to answer"
        os.kill(started[0], signal.SIGSTOP)  # as one that hangs, and reads no pipe
        service.send_signal(how)
        service.wait()
        while any(Path(f"/proc/{pid}").exists() for pid in started):
            time.sleep(0.01)
    assert not segments()
