"""A batch as one run of tokens, without padding: attention that stays inside each text.

transformers lets an attention function be registered by name and hands it whatever arguments a model's forward
passes down. Ours is told where each text lies: on CUDA it is torch's variable-length kernel, elsewhere one call of
scaled_dot_product_attention for each run of texts of the same length. Bidirectional encoders only; whatever else a
model asks of attention (causality, a window, relative positions, a bias) is refused, lest it be left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function

from cdc_embedder.embedding.forward import Unsuited, Work, plain
from cdc_embedder.embedding.pooling import MODES, pool
from cdc_embedder.embedding.tokenizing import Ids
from cdc_embedder.embedding.transfer import Finish, Transfer

_NAME = "cdc_embedder_packed"

_HARMLESS = frozenset({"position_ids", "output_attentions", "output_hidden_states", "return_dict", "use_cache"})
"""Arguments that models pass down to attention and that say nothing about how to attend."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each text lies in the run. `offsets` is int32 on the device, shape (texts + 1,)."""

    lengths: list[int]
    offsets: torch.Tensor

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """First token, length and number of neighbours of equal length."""
        start = 0
        for length, neighbours in groupby(self.lengths):
            count = len(list(neighbours))
            yield start, length, count
            start += length * count


class Packed:
    """The transformer on a run of tokens, then pooling over segments, then the model's further modules."""

    name = "packed"

    def __init__(self, model: SentenceTransformer, transfer: Transfer, truncate_dim: int | None) -> None:
        plain(model)
        modules: list[Any] = list(model)
        if len(modules) < 2:
            raise Unsuited("it has no pooling")
        first, second, *tail = modules
        if type(first) is not Transformer or type(second) is not Pooling or any(type(m) is Pooling for m in tail):
            raise Unsuited("its modules are not a transformer, a pooling and what follows")
        modes = (second.pooling_mode,) if isinstance(second.pooling_mode, str) else tuple(second.pooling_mode)
        if unknown := sorted(set(modes) - MODES):
            raise Unsuited(f"it pools by {unknown[0]}")
        if first.modality_config["text"]["method_output_name"] not in ("last_hidden_state", ("last_hidden_state",)):
            raise Unsuited("what it pools is not its last hidden state")
        if first.unpad_inputs is False:
            raise Unsuited("its files say that it must be padded")
        self._encoder: Any = first.model
        if not type(self._encoder).__module__.startswith("transformers.") or not self._encoder.is_backend_compatible():
            raise Unsuited(f"{type(self._encoder).__name__} does not take another attention function")
        self._modes = modes
        self._tail = [(module, next((p.dtype for p in module.parameters()), torch.float32)) for module in tail]
        self._transfer = transfer
        self._truncate_dim = truncate_dim
        self._padding_idx = padding_idx(model)
        self._attention_before = self._encoder.config._attn_implementation
        self._encoder.set_attn_implementation(_NAME)

    def tokens(self, lengths: NDArray[np.int64]) -> int:
        return int(lengths.sum())

    def fit(self, lengths: NDArray[np.int64], budget: int) -> int:
        return max(int(np.searchsorted(lengths[:budget].cumsum(), budget, side="right")), 1)

    def start(self, work: Work, rows: NDArray[np.intp]) -> Finish:
        ids = work.ids_of(rows)
        lengths = [len(own) for own in ids]
        tokens = sum(lengths)
        offsets = np.cumsum([0, *lengths], dtype=np.int64)
        numbers = np.concatenate([*ids, positions(ids, self._padding_idx), offsets])

        def compute(on_device: torch.Tensor) -> torch.Tensor:
            layout = Layout(lengths, on_device[2 * tokens :].to(torch.int32))
            return self._vectors(on_device[:tokens], on_device[tokens : 2 * tokens], on_device[2 * tokens :], layout)

        return self._transfer.run(numbers, compute)

    def close(self) -> None:
        """Give the model its own attention back."""
        self._encoder.set_attn_implementation(self._attention_before)

    def _vectors(self, ids: torch.Tensor, places: torch.Tensor, offsets: torch.Tensor, layout: Layout) -> torch.Tensor:
        # No mask and no token types: a model's default for both is what a text alone has.
        out = self._encoder(input_ids=ids[None], position_ids=places[None], attention_mask=None, packing=layout)
        vectors = pool(out.last_hidden_state[0], offsets, self._modes)
        for module, dtype in self._tail:
            vectors = module({"sentence_embedding": vectors.to(dtype)})["sentence_embedding"]
        return vectors[:, : self._truncate_dim]


def padding_idx(model: SentenceTransformer) -> int | None:
    """The id that RoBERTa's kin (XLM-R, CamemBERT) leave out when they count positions; None for all others."""
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        padding = getattr(module, "padding_idx", None)
        if isinstance(table, torch.nn.Embedding) and isinstance(padding, int):
            return padding
    return None


def positions(ids: list[Ids], padding: int | None) -> NDArray[np.int64]:
    """The position of every token in its text: from 0, or as RoBERTa counts.

    That is from `padding + 1`, not counting tokens that are `padding` (a text may spell it), which have `padding`.
    Source: `create_position_ids_from_input_ids` of transformers' RoBERTa.
    """
    if padding is None:
        return np.concatenate([np.arange(len(own), dtype=np.int64) for own in ids])
    real = [own != padding for own in ids]
    return np.concatenate([np.cumsum(counted) * counted + padding for counted in real])


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: Layout | None = None,
    **asked: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of shape (1, heads, tokens, size), its result (1, tokens, heads, size), as transformers wants it."""
    if packing is None:
        raise Unsuited("it does not pass arguments down to attention")
    if attention_mask is not None or dropout or query.shape != key.shape:
        raise Unsuited("it asks attention for a mask, dropout or grouped heads")
    if getattr(module, "is_causal", False):
        raise Unsuited("its attention is causal")
    for name, argument in asked.items():
        if name not in _HARMLESS and argument is not None and argument is not False:
            raise Unsuited(f"it asks attention for {name}")
    attend = _variable_length if query.is_cuda else _by_runs
    return attend(query[0], key[0], value[0], packing, scaling)[None], None


def _mask(*_: object, mask_function: object = None, **__: object) -> None:
    """No mask: what a bidirectional one would hide is not there."""
    if mask_function is not bidirectional_mask_function:
        raise Unsuited("its attention has a mask of its own")


def _variable_length(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Layout, scaling: float | None
) -> torch.Tensor:
    # Not in every torch that we run with.
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (tensor.transpose(0, 1) for tensor in (query, key, value))
    offsets, longest = packing.offsets, packing.longest
    if scaling is None or scaling == query.shape[-1] ** -0.5:
        # The function's own default; the argument `scale` came later than the function.
        return cast("torch.Tensor", varlen_attn(q, k, v, offsets, offsets, longest, longest))
    return cast("torch.Tensor", varlen_attn(q, k, v, offsets, offsets, longest, longest, scale=scaling))


def _by_runs(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Layout, scaling: float | None
) -> torch.Tensor:
    heads, tokens, size = query.shape
    out = query.new_empty((tokens, heads, size))
    for start, length, count in packing.runs():
        stop = start + length * count
        q, k, v = (t[:, start:stop].view(heads, count, length, size).transpose(0, 1) for t in (query, key, value))
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scaling)
        out[start:stop].view(count, length, heads, size).copy_(found.transpose(1, 2))
    return out


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)
