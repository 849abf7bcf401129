"""The model in actors of a Ray cluster: the same vectors, a lost actor costs no row, a lost cluster is waited for."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from cdc_embedder.embedding.base import Embedder, InputType, ModelSpec
from cdc_embedder.embedding.fake import fake_vector
from cdc_embedder.embedding.isolation import embed_isolating
from cdc_embedder.embedding.ray_pool import ray_embedder
from cdc_embedder.embedding.registry import Embedders, load_here
from cdc_embedder.errors import EmbedderDown, ModelFault

NONE = InputType.NONE
SOURCE = "sentence-transformers/all-MiniLM-L6-v2"


class Cluster:
    """A head with two CPU cores."""

    def __init__(self, folder: Path) -> None:
        self.port, self.client_port = _free_port(), _free_port()
        self.folder = folder

    def start(self) -> None:
        self._head = subprocess.Popen(
            [
                *(Path(sys.executable).with_name("ray"), "start", "--head", "--block", f"--port={self.port}"),
                *(f"--ray-client-server-port={self.client_port}", "--min-worker-port=0", "--max-worker-port=0"),
                *("--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={self.folder}"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
        )

    @property
    def running(self) -> bool:
        return self._head.poll() is None

    def stop(self) -> None:
        """All of its processes know its folder, and no other process does."""
        while found := [pid for pid, line in processes() if str(self.folder) in line]:
            for pid in found:
                kill(pid)
            time.sleep(0.05)
        self._head.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def processes() -> Iterator[tuple[int, str]]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            yield int(folder.name), (folder / "cmdline").read_text(errors="replace").replace("\0", " ")
        except OSError:
            continue


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        """It was faster."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_MODE", "disabled")
        # A driver gives up its cluster after so long; the default is a minute.
        environment.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "3")
        cluster = Cluster(Path("/tmp") / f"ray-{os.getpid()}")  # a socket's path is short
        cluster.start()
        yield cluster
        cluster.stop()
        shutil.rmtree(cluster.folder, ignore_errors=True)


def reached(cluster: Cluster, spec: ModelSpec) -> Embedder:
    """The model in the cluster's actors, as soon as that answers."""
    while True:
        try:
            return ray_embedder(spec, load_here)
        except EmbedderDown:
            assert cluster.running, "the head did not start"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def embedder(cluster: Cluster) -> Iterator[Embedder]:
    options = {"address": f"127.0.0.1:{cluster.port}", "actors": 2, "num_cpus": 0.5}
    fakes = {"exit": "deadly", "delay_per_text_s": 0.01}
    spec = ModelSpec("m", 8, backend="fake", options=options | fakes)
    embedder = reached(cluster, spec)
    yield embedder
    embedder.close()


def right(texts: list[str]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.stack([fake_vector("m", text, 8) for text in texts])


def embed_for_ever(embedder: Embedder) -> NoReturn:
    while True:
        embedder.embed(["a"], NONE)


def test_a_ray_of_our_own_gives_the_vectors_of_this_process() -> None:
    texts = ["read a csv file", "", "the cat", "ünknown wörds", "日本語", "word " * 400]
    embedders = Embedders(device="cpu")
    try:
        one = embedders.get(ModelSpec("local", 384, source=SOURCE))
        options = {"actors": 2, "num_cpus": 0.5}
        two = embedders.get(ModelSpec("ray", 384, source=SOURCE, backend="ray", options=options))
        assert (two.identity, two.engine) == (one.identity, f"2 Ray actors: {one.engine}")
        assert two.concurrency >= 3
        with ThreadPoolExecutor(3) as threads:
            calls = [threads.submit(two.embed, texts, InputType.DOCUMENT) for _ in range(3)]
            theirs = one.embed(texts, InputType.DOCUMENT)
            for call in calls:
                ours = call.result()
                np.testing.assert_allclose(ours.vectors, theirs.vectors, atol=1e-5)
                assert (ours.truncated.tolist(), ours.tokens) == (theirs.truncated.tolist(), theirs.tokens)
    finally:
        embedders.close()


def test_a_row_that_is_wrong_is_refused() -> None:
    for options, word in (({"address": 7}, "address"), ({"actors": 0}, "actors"), ({"num_gpus": -1}, "num_gpus")):
        with pytest.raises(ModelFault, match=word):
            Embedders().get(ModelSpec("m", 8, backend="ray", options=options))
    with pytest.raises(ModelFault, match="code of its own"):
        Embedders().get(ModelSpec("m", 8, backend="ray", trust_remote_code=True))


def test_an_actor_that_is_killed_under_a_batch_costs_no_vector(embedder: Embedder) -> None:
    texts = [f"text {i}" for i in range(200)]
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(embedder.embed, texts, NONE)
        while not (busy := [pid for pid, line in processes() if line.startswith("ray::_Host.embed")]):
            assert not call.done()
        kill(busy[0])
        np.testing.assert_array_equal(call.result().vectors, right(texts))


def test_a_text_that_ends_the_actor_is_set_aside_and_its_neighbour_is_embedded(embedder: Embedder) -> None:
    outcome = embed_isolating(embedder, ModelSpec("m", 8), ["deadly", "a"], NONE)
    assert list(outcome.errors) == [0]
    np.testing.assert_allclose(outcome.vectors[1], right(["a"])[0], atol=1e-6)


@pytest.mark.usefixtures("embedder")
def test_a_cluster_is_reached_through_the_ray_client_too(cluster: Cluster) -> None:
    options = {"address": f"ray://127.0.0.1:{cluster.client_port}", "actors": 1, "num_cpus": 0.25}
    remote = reached(cluster, ModelSpec("m", 8, backend="fake", options=options))
    try:
        assert remote.engine == "1 Ray actor: fake"
        np.testing.assert_array_equal(remote.embed(["a", "b"], NONE).vectors, right(["a", "b"]))
    finally:
        remote.close()


def test_a_cluster_that_is_gone_is_waited_for(cluster: Cluster, embedder: Embedder) -> None:
    np.testing.assert_array_equal(embedder.embed(["a"], NONE).vectors, right(["a"]))
    cluster.stop()
    with pytest.raises(EmbedderDown):
        embed_for_ever(embedder)  # its actors outlive it for a moment
    cluster.start()
    while True:
        try:
            found = embedder.embed(["a"], NONE)
            break
        except EmbedderDown:
            time.sleep(0.5)
    np.testing.assert_array_equal(found.vectors, right(["a"]))
