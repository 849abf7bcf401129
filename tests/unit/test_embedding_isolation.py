"""Rule 7: the culprit alone pays, and nobody pays for a sick embedder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc_embedder.embedding.base import Embedded, InputType, ModelSpec
from cdc_embedder.embedding.fake import FakeEmbedder, fake_vector
from cdc_embedder.embedding.isolation import CANARY, embed_isolating
from cdc_embedder.errors import EmbedderDown, ModelFault, TextRejected

SPEC = ModelSpec("m", 8, backend="fake", options={"reject": "BAD", "nan": "NAN"})
DOCUMENT = InputType.DOCUMENT


class Troubled:
    """A fake embedder with a say before and after each call; it remembers what it was asked."""

    identity = "troubled"

    def __init__(
        self,
        before: Callable[[Sequence[str]], None] = lambda texts: None,
        after: Callable[[Embedded], Embedded] = lambda embedded: embedded,
    ) -> None:
        self._inner = FakeEmbedder(SPEC)
        self._before, self._after = before, after
        self.asked: list[list[str]] = []

    def embed(self, texts: Sequence[str], input_type: InputType) -> Embedded:
        self.asked.append(list(texts))
        self._before(texts)
        return self._after(self._inner.embed(texts, input_type))

    def close(self) -> None:
        self._inner.close()


def raising(error: Exception, when: str) -> Callable[[Sequence[str]], None]:
    def say(texts: Sequence[str]) -> None:
        if any(when in text for text in texts):
            raise error

    return say


@given(st.lists(st.sampled_from(["one", "two words", "", "BAD", "NAN", "BAD NAN"]), max_size=40))
def test_exactly_the_culprits_get_an_error_and_all_others_their_own_vector(texts: list[str]) -> None:
    outcome = embed_isolating(FakeEmbedder(SPEC), SPEC, texts, DOCUMENT)
    assert set(outcome.errors) == {i for i, text in enumerate(texts) if "BAD" in text or "NAN" in text}
    assert outcome.vectors.shape == (len(texts), 8)
    for i, text in enumerate(texts):
        expected = np.zeros(8) if i in outcome.errors else fake_vector("m", text, 8)
        np.testing.assert_allclose(outcome.vectors[i], expected, atol=1e-6)


def test_one_culprit_in_a_batch_of_256_costs_few_calls() -> None:
    embedder = Troubled()
    embed_isolating(embedder, SPEC, ["good"] * 200 + ["BAD"] + ["good"] * 55, DOCUMENT)
    assert len(embedder.asked) <= 2 * 8 + 2
    assert [CANARY] in embedder.asked


def test_an_embedder_that_refuses_the_canary_too_is_down_and_nobody_is_blamed() -> None:
    with pytest.raises(EmbedderDown, match="refuses every text"):
        embed_isolating(Troubled(raising(TextRejected("400"), "")), SPEC, ["a", "b"], DOCUMENT)


@pytest.mark.parametrize("kind", [ValueError, TypeError, IndexError])
def test_a_model_that_stumbles_over_a_text_blames_it_without_quoting_it(kind: type[Exception]) -> None:
    embedder = Troubled(raising(kind("the secret text"), "secret"))
    outcome = embed_isolating(embedder, SPEC, ["a", "the secret text", "b"], DOCUMENT)
    assert outcome.errors == {1: f"the model failed on the text ({kind.__name__})"}


def test_a_lone_surrogate_is_the_texts_own_fault() -> None:
    assert set(embed_isolating(FakeEmbedder(SPEC), SPEC, ["a", "\ud800", "b"], DOCUMENT).errors) == {1}


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), OSError("gone"), KeyError("x"), EmbedderDown("away")])
def test_trouble_of_the_device_is_never_counted_against_a_text(error: Exception) -> None:
    embedder = Troubled(raising(error, "b"))
    with pytest.raises(EmbedderDown):
        embed_isolating(embedder, SPEC, ["a", "b", "c"], DOCUMENT)
    assert len(embedder.asked) == 1, "no halving: it would find a row to blame"


def test_an_unknown_error_is_named_with_its_message_only_where_it_cannot_quote_a_text() -> None:
    with pytest.raises(EmbedderDown, match=r"RuntimeError: CUDA error: launch failure"):
        embed_isolating(Troubled(raising(RuntimeError("CUDA error: launch failure\nmore"), "")), SPEC, ["a"], DOCUMENT)
    with pytest.raises(EmbedderDown) as raised:
        embed_isolating(Troubled(raising(KeyError("secret"), "")), SPEC, ["a"], DOCUMENT)
    assert "secret" not in raised.value.sentence


def test_a_missing_vector_is_hunted_down_to_the_text_that_has_none() -> None:
    def drop(embedded: Embedded) -> Embedded:
        kept = [i for i, vector in enumerate(embedded.vectors) if not np.allclose(vector, fake_vector("m", "", 8))]
        return Embedded(embedded.vectors[kept], embedded.truncated[kept], embedded.tokens)

    outcome = embed_isolating(Troubled(after=drop), SPEC, ["a", "b", "", "c"], DOCUMENT)
    assert outcome.errors == {2: "the embedder gave 0 vectors for 1 texts"}
    np.testing.assert_allclose(outcome.vectors[3], fake_vector("m", "c", 8), atol=1e-6)


def test_vectors_of_another_size_are_the_models_fault() -> None:
    narrow = Troubled(after=lambda e: Embedded(e.vectors[:, :5].copy(), e.truncated, e.tokens))
    with pytest.raises(ModelFault, match="dimensions"):
        embed_isolating(narrow, SPEC, ["a"], DOCUMENT)


def test_vectors_come_out_with_unit_length_unless_the_row_says_otherwise() -> None:
    double = Troubled(after=lambda e: Embedded(e.vectors * 2, e.truncated, e.tokens))
    for normalize, length in ((True, 1.0), (False, 2.0)):
        spec = ModelSpec("m", 8, backend="fake", normalize=normalize)
        outcome = embed_isolating(double, spec, ["a"], DOCUMENT)
        assert np.linalg.norm(outcome.vectors[0]) == pytest.approx(length, abs=1e-6)


def test_truncation_and_tokens_are_reported_per_text_also_after_halving() -> None:
    spec = ModelSpec("m", 8, backend="fake", max_tokens=2, options={"reject": "BAD"})
    outcome = embed_isolating(FakeEmbedder(spec), spec, ["a b c", "BAD", "a"], DOCUMENT)
    assert outcome.truncated.tolist() == [True, False, False]
    assert outcome.tokens == 3
