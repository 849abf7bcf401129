"""Which text of a batch is at fault (rule 7): halving until it is alone, and never blaming a text for a sick embedder.

Rows at their own fault get a sentence each; everybody else gets a finished vector. Trouble of the device or the
network leaves as EmbedderDown and counts against nobody. No sentence made here holds any of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cdc_embedder.embedding.base import Embedded, Embedder, InputType, ModelSpec, Spent, Vectors, finish
from cdc_embedder.embedding.crossing import in_our_words
from cdc_embedder.errors import EmbedderDown, ModelFault, TextRejected

CANARY = "canary"
"""A text that every working embedder takes."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of each text. `vectors[i]` may be stored unless `i` is in `errors`, where it is zero."""

    vectors: Vectors
    errors: dict[int, str]
    truncated: NDArray[np.bool_]
    tokens: int
    spent: Spent


def embed_isolating(embedder: Embedder, spec: ModelSpec, texts: Sequence[str], input_type: InputType) -> Outcome:
    """Embed `texts`, setting aside those that cannot be. Raises EmbedderDown or ModelFault for all of them together."""
    vectors: Vectors = np.zeros((len(texts), spec.dimensions), dtype=np.float32)
    truncated = np.zeros(len(texts), dtype=np.bool_)
    errors: dict[int, str] = {}
    tokens, spent = 0, Spent()
    parts = [range(len(texts))] if texts else []
    while parts:
        part = parts.pop()
        try:
            embedded = _call(embedder, [texts[i] for i in part], input_type)
        except TextRejected as rejection:
            if len(part) > 1:
                middle = len(part) // 2
                parts += [part[middle:], part[:middle]]
            else:
                _prove_healthy(embedder, input_type, rejection)
                errors[part[0]] = rejection.sentence
            continue
        finished, good = _finish(embedded, spec)
        vectors[part.start : part.stop] = finished if good.all() else np.where(good[:, None], finished, 0)
        truncated[part.start : part.stop] = embedded.truncated
        tokens += embedded.tokens
        spent += embedded.spent
        for bad in np.flatnonzero(~good):
            errors[part[int(bad)]] = "the model gave this text a vector that is zero or not finite"
    return Outcome(vectors, errors, truncated, tokens, spent)


def _call(embedder: Embedder, texts: list[str], input_type: InputType) -> Embedded:
    """One call, its exceptions reduced to ours."""
    try:
        embedded = embedder.embed(texts, input_type)
    except Exception as error:
        problem = in_our_words(error, texts)
        if problem is error:
            raise
        raise problem from None if isinstance(problem, TextRejected) else error
    if len(embedded.vectors) != len(texts):
        raise TextRejected(f"the embedder gave {len(embedded.vectors)} vectors for {len(texts)} texts")
    return embedded


def _prove_healthy(embedder: Embedder, input_type: InputType, rejection: TextRejected) -> None:
    """An embedder that refuses even the canary is broken, and the text beside it is innocent."""
    try:
        _call(embedder, [CANARY], input_type)
    except TextRejected:
        raise EmbedderDown(
            f"the embedder refuses every text, even a harmless one: {rejection}",
            hint="Look at the embedding service or the model: rows are tried again when it answers",
        ) from rejection


def _finish(embedded: Embedded, spec: ModelSpec) -> tuple[Vectors, NDArray[np.bool_]]:
    try:
        return finish(embedded.vectors, spec)
    except ValueError as error:
        raise ModelFault(
            f"the model {spec.name}: {error}", hint="Correct `dimensions` in its row, or its `source`"
        ) from None
