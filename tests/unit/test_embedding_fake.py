"""The fake embedder: the same vectors everywhere, and trouble on request."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cdc_embedder.embedding.base import InputType, ModelSpec
from cdc_embedder.embedding.fake import FakeEmbedder, fake_vector
from cdc_embedder.errors import EmbedderDown, ModelFault, TextRejected

DOCUMENT = InputType.DOCUMENT


def test_vectors_are_of_unit_length_and_of_the_declared_dimensions() -> None:
    vectors = (
        FakeEmbedder(ModelSpec("m", 7, backend="fake")).embed(["", "a", "ünï 😀", "a" * 100_000], DOCUMENT).vectors
    )
    assert vectors.shape == (4, 7)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)


def test_another_process_makes_the_same_vector() -> None:
    code = "from cdc_embedder.embedding.fake import fake_vector; print(fake_vector('m', 'text', 5).tobytes().hex())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert printed == fake_vector("m", "text", 5).tobytes().hex()


def test_the_vector_of_a_text_is_pinned_for_ever() -> None:
    np.testing.assert_allclose(fake_vector("m", "text", 3), [-0.25727513, 0.37548113, 0.89040631], atol=1e-7)


def test_name_text_and_prompt_decide_the_vector() -> None:
    embedder = FakeEmbedder(ModelSpec("m", 8, backend="fake", document_prompt="d: ", query_prompt="q: "))
    for input_type, sent in ((DOCUMENT, "d: t"), (InputType.QUERY, "q: t"), (InputType.NONE, "t")):
        np.testing.assert_array_equal(embedder.embed(["t"], input_type).vectors[0], fake_vector("m", sent, 8))
    distinct = {fake_vector(name, text, 8).tobytes() for name in ("m", "n") for text in ("a", "b", "")}
    assert len(distinct) == 6


def test_a_text_beyond_max_tokens_loses_its_tail_and_says_so() -> None:
    embedder = FakeEmbedder(ModelSpec("m", 8, backend="fake", max_tokens=2))
    got = embedder.embed(["one  two", "one two three"], DOCUMENT)
    assert got.truncated.tolist() == [False, True]
    assert got.tokens == 4
    np.testing.assert_array_equal(got.vectors[1], fake_vector("m", "one two", 8))
    np.testing.assert_array_equal(got.vectors[0], fake_vector("m", "one  two", 8))


def test_a_refused_text_takes_its_batch_along() -> None:
    embedder = FakeEmbedder(ModelSpec("m", 8, backend="fake", options={"reject": "bad"}))
    with pytest.raises(TextRejected):
        embedder.embed(["good", "a bad one"], DOCUMENT)
    assert len(embedder.embed(["good"], DOCUMENT).vectors) == 1


def test_an_outage_lasts_as_long_as_its_file_exists(tmp_path: Path) -> None:
    sign = tmp_path / "down"
    embedder = FakeEmbedder(ModelSpec("m", 8, backend="fake", options={"down_while_exists": str(sign)}))
    sign.touch()
    with pytest.raises(EmbedderDown):
        embedder.embed(["a"], DOCUMENT)
    sign.unlink()
    assert len(embedder.embed(["a"], DOCUMENT).vectors) == 1


@pytest.mark.parametrize("options", [{"delay": 1}, {"delay_s": "1"}, {"delay_s": -1}, {"delay_per_text_s": True}])
def test_an_option_that_is_misspelt_or_no_number_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ModelFault):
        FakeEmbedder(ModelSpec("m", 8, backend="fake", options=options))
