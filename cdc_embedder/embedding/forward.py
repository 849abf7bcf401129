"""How texts get through a model: three ways with one face, and the choice of the fastest that proves right.

`Library` is sentence-transformers' own `encode`, right for whatever it loads. `Padded` gives the same model token ids
that are there already, so that nothing is tokenized twice. The third, without padding, is in `packed`. Each is tried
against the first at loading; one that differs, or that the model's code refuses, is not used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Normalize, Pooling, Transformer

from cdc_embedder.embedding.base import InputType, Vectors
from cdc_embedder.embedding.tokenizing import Ids
from cdc_embedder.embedding.transfer import Finish, Transfer

_log = logging.getLogger(__name__)


class Unsuited(Exception):
    """This model cannot go this way; the message says why."""


@dataclass(frozen=True, slots=True)
class Work:
    """The texts of one call. `lengths` is in tokens, estimated where there are no `ids`."""

    texts: list[str]
    ids: list[Ids] | None
    lengths: NDArray[np.int64]
    input_type: InputType

    def ids_of(self, rows: NDArray[np.intp]) -> list[Ids]:
        if self.ids is None:
            raise Unsuited("its tokenizer is not a fast one")
        return [self.ids[i] for i in rows]


class Forward(Protocol):
    """One way through a model. Not for two threads at once."""

    @property
    def name(self) -> str:
        """`packed` or `padded`."""
        ...

    def tokens(self, lengths: NDArray[np.int64]) -> int:
        """What a batch of texts of these lengths (longest first) costs, padding included."""
        ...

    def fit(self, lengths: NDArray[np.int64], budget: int) -> int:
        """How many of the texts of these lengths (longest first) a batch of `budget` tokens takes: at least one."""
        ...

    def start(self, work: Work, rows: NDArray[np.intp]) -> Finish:
        """Start the texts `rows` of `work` as one batch, in inference mode."""
        ...

    def close(self) -> None:
        """Leave the model as it was found."""
        ...


class _Rectangle:
    """Batches that are padded to their longest text."""

    name = "padded"

    def tokens(self, lengths: NDArray[np.int64]) -> int:
        return int(lengths[0]) * len(lengths)

    def fit(self, lengths: NDArray[np.int64], budget: int) -> int:
        return min(max(budget // max(int(lengths[0]), 1), 1), len(lengths))

    def close(self) -> None:
        """Nothing is held."""


class Library(_Rectangle):
    """`encode`, `encode_document`, `encode_query`: a model with a route for each takes the right one."""

    def __init__(self, model: SentenceTransformer, prompts: Mapping[InputType, str]) -> None:
        self._model = model
        self._prompts = prompts
        self._routes = {InputType.DOCUMENT: model.encode_document, InputType.QUERY: model.encode_query}
        # A model that also reads images takes a text that looks like a path or URL for one, and would open it.
        self._reads_text_only = list(model.modalities) == ["text"]

    def start(self, work: Work, rows: NDArray[np.intp]) -> Finish:
        texts = [work.texts[i] for i in rows]
        inputs: list[Any] = list(texts) if self._reads_text_only else [{"text": text} for text in texts]
        encode = self._routes.get(work.input_type, self._model.encode)
        prompt = self._prompts[work.input_type]
        tensor = encode(inputs, prompt=prompt, batch_size=len(inputs), show_progress_bar=False, convert_to_tensor=True)
        vectors = cast("Vectors", tensor.to("cpu", torch.float32).numpy())
        return lambda: vectors


class Padded(_Rectangle):
    """The whole model on a rectangle of ids, padded on the side that its tokenizer pads."""

    def __init__(self, model: SentenceTransformer, transfer: Transfer, truncate_dim: int | None) -> None:
        plain(model)
        self._model = model
        self._transfer = transfer
        self._truncate_dim = truncate_dim
        tokenizer = model.tokenizer
        if tokenizer.pad_token_id is None:
            raise Unsuited("its tokenizer has no token for padding")
        self._pad = int(tokenizer.pad_token_id)
        self._pads_left = tokenizer.padding_side == "left"
        self._typed = "token_type_ids" in tokenizer.model_input_names

    def start(self, work: Work, rows: NDArray[np.intp]) -> Finish:
        ids = work.ids_of(rows)
        shape = (len(ids), max(map(len, ids)))
        rectangle = np.full((2, *shape), self._pad, dtype=np.int64)
        rectangle[1] = 0
        for row, own in enumerate(ids):
            place = slice(shape[1] - len(own), None) if self._pads_left else slice(len(own))
            rectangle[0, row, place] = own
            rectangle[1, row, place] = 1

        def compute(numbers: torch.Tensor) -> torch.Tensor:
            inputs, mask = numbers.view(2, *shape)
            features: dict[str, Any] = {"input_ids": inputs, "attention_mask": mask}
            if self._typed:
                features["token_type_ids"] = torch.zeros_like(inputs)
            out: dict[str, torch.Tensor] = self._model(features)
            return out["sentence_embedding"][:, : self._truncate_dim]

        return self._transfer.run(rectangle.reshape(-1), compute)


def plain(model: SentenceTransformer) -> None:
    """Raise Unsuited for a model that does more with a text than its token ids say."""
    transformer: Any = model[0]
    if type(transformer) is not Transformer:
        raise Unsuited(f"its first module is a {type(transformer).__name__}")
    if strange := [m for m in model if type(m) not in (Transformer, Pooling, Dense, LayerNorm, Normalize)]:
        raise Unsuited(f"it has a module {type(strange[0]).__name__}")
    if list(model.modalities) != ["text"] or transformer.modality_config["text"]["method"] != "forward":
        raise Unsuited("it reads more than plain text")
    special = ("processing_kwargs", "query_length", "document_length", "query_expansion")
    if found := [name for name in special if getattr(transformer, name, None)]:
        raise Unsuited(f"its files set {found[0]}")
    if any(isinstance(m, Pooling) and not m.include_prompt for m in model):
        raise Unsuited("its pooling leaves the prompt out")


def fastest_that_is_right(
    candidates: Iterable[Callable[[], Forward]], reference: Forward, work: Work, *, least_cosine: float
) -> tuple[Forward, list[str]]:
    """The first of `candidates` whose vectors of `work` are `reference`'s, else `reference`; why others are not.

    `least_cosine` is how near each vector must be.
    """
    rows = np.argsort(-work.lengths, kind="stable")
    expected = _unit(reference.start(work, rows)())
    reasons: list[str] = []
    for build in candidates:
        forward: Forward | None = None
        try:
            forward = build()
            cosine = float((_unit(forward.start(work, rows)()) * expected).sum(axis=1).min())
            if cosine >= least_cosine:
                return forward, reasons
            reason = f"its vectors differ: cosine {cosine:.6f}"
        except torch.AcceleratorError:
            raise
        except Exception as error:
            # Whatever a model's code raises on what it was not written for.
            said = (str(error).splitlines() or [""])[0][:200]
            reason = said if isinstance(error, Unsuited) else f"{type(error).__name__}: {said}"
        if forward is not None:
            forward.close()
        reasons.append(reason)
    return reference, reasons


def _unit(vectors: Vectors) -> NDArray[np.float64]:
    wide = vectors.astype(np.float64)
    # NaN where a vector is zero: no cosine with it passes.
    with np.errstate(invalid="ignore"):
        return cast("NDArray[np.float64]", wide / np.linalg.norm(wide, axis=1, keepdims=True))
