"""A sentence-transformers model in this process, on a GPU where there is one: the only module that imports torch.

Prompts, pooling, normalization and the length limit are as the model's files say, unless its row says otherwise.
Texts are sorted by length and cut by a budget of padded tokens, so that little of the device's work is padding; when
memory runs out the budget halves, and grows again as calls succeed. Where the model comes from, and what exactly was
loaded, is `model_source`.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from transformers.utils import logging as transformers_logging

from cdc_embedder.embedding import model_source
from cdc_embedder.embedding.base import Embedded, InputType, ModelSpec, Vectors
from cdc_embedder.embedding.modelrow import check_options, number_option, prompt_of
from cdc_embedder.errors import EmbedderDown, Misconfigured, ModelFault, TextRejected

_log = logging.getLogger(__name__)

OPTIONS = {
    "batch_tokens": "padded tokens in one forward pass, by default 4096 on a CPU and 32768 on a GPU",
    "truncate_dim": "how many leading dimensions to keep, for models trained so (Matryoshka)",
}
_BATCH_TOKENS = {"cpu": 4_096, "gpu": 32_768}

_MOST_CHARACTERS = 1_000_000
"""Of a longer text only so much is tokenized where the model has a length limit (at most some 10,000 tokens): the
rest could not reach it. The tokenizer takes hundreds of bytes a token, and ends the process where it gets none."""

_MEMORY_SIGNS = ("DefaultCPUAllocator: ", "not enough memory", "out of memory", "could not create a primitive")
"""What torch and oneDNN, which has no better word for it, say in a RuntimeError when memory runs out."""

_PROMPT_NAMES = {InputType.DOCUMENT: ("document", "passage", "corpus"), InputType.QUERY: ("query",)}

transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


class LocalEmbedder:
    """`spec`'s model on `device` (auto, cpu, cuda, cuda:1 …). Loading blocks for seconds.

    Raises ModelFault where the model is not what its row says, EmbedderDown where the hub cannot be reached,
    Misconfigured where there is no such device.
    """

    def __init__(self, spec: ModelSpec, device: str = "auto") -> None:
        check_options(spec, OPTIONS)
        self._spec = spec
        self._device = _device(device)
        self._lock = threading.Lock()
        source = model_source.locate(spec)
        with model_source.translated(spec, source):
            model = SentenceTransformer(
                source.name,
                revision=source.revision,
                device=str(self._device),
                trust_remote_code=spec.trust_remote_code,
                local_files_only=source.offline,
                model_kwargs={"dtype": _dtype(spec.dtype, self._device)},
                truncate_dim=int(number_option(spec, "truncate_dim", 0, least=0)) or None,
            )
        self._identity = model_source.identity(source)
        self._limit = _token_limit(spec, model)
        model.max_seq_length = self._limit
        self._tokenizer = _own_tokenizer(model)
        self._prompts = {input_type: _prompt(spec, model, input_type) for input_type in InputType}
        kind = "cpu" if self._device.type == "cpu" else "gpu"
        self._full_budget = int(number_option(spec, "batch_tokens", _BATCH_TOKENS[kind], least=1))
        self._budget = self._full_budget
        self._model: SentenceTransformer | None = model
        self._warm_up()

    @property
    def identity(self) -> str:
        """`commit:<hub commit>` or `sha256:<of the weights>`."""
        return self._identity

    def embed(self, texts: Sequence[str], input_type: InputType) -> Embedded:
        """Embed `texts` in order. Raises TextRejected for a text that does not fit into memory even alone."""
        with self._lock, torch.inference_mode():
            if self._model is None:
                raise EmbedderDown(f"the model {self._spec.name} has been closed")
            prompt = self._prompts[input_type]
            bounded = texts if self._limit is None else [text[:_MOST_CHARACTERS] for text in texts]
            lengths = self._lengths([prompt + text for text in bounded])
            truncated = np.array([len(b) < len(t) for b, t in zip(bounded, texts, strict=True)], dtype=np.bool_)
            if self._limit is not None:
                truncated |= lengths > self._limit
                lengths = np.minimum(lengths, self._limit)
            vectors = self._by_budget(self._model, bounded, lengths, input_type)
            return Embedded(vectors, truncated, int(lengths.sum()))

    def close(self) -> None:
        """Free the device's memory."""
        with self._lock:
            self._model = None
            self._free_memory()

    def _warm_up(self) -> None:
        """The first call of a device is slow, and shows how many dimensions the vectors really have."""
        found = self.embed(["warm-up"], InputType.NONE).vectors.shape[1]
        if found != self._spec.dimensions:
            self.close()
            raise ModelFault(
                f"the model {self._spec.name} has {found} dimensions, its row says {self._spec.dimensions}",
                hint="Correct `dimensions` in its row, or its `source`",
            )

    def _lengths(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Tokens of each text before truncation, special tokens included; estimated where the tokenizer is slow."""
        if self._tokenizer is None:
            return np.array([len(text) // 3 + 2 for text in texts], dtype=np.int64)
        lengths: list[int] = []
        while len(lengths) < len(texts):
            # A few at a time: what the tokenizer holds for them all at once may be many times their size.
            group = [texts[len(lengths)]]
            size = len(group[0])
            for text in texts[len(lengths) + 1 : len(lengths) + 64]:
                size += len(text)
                if size > _MOST_CHARACTERS:
                    break
                group.append(text)
            lengths += [len(encoding) for encoding in self._tokenizer.encode_batch_fast(group)]
        return np.array(lengths, dtype=np.int64)

    def _by_budget(
        self, model: SentenceTransformer, texts: Sequence[str], lengths: NDArray[np.int64], input_type: InputType
    ) -> Vectors:
        """Longest first, so that memory runs out at once if at all."""
        order = np.argsort(-lengths, kind="stable")
        rows: list[NDArray[np.float32]] = []
        start = 0
        while start < len(order):
            longest = max(int(lengths[order[start]]), 1)
            cut = order[start : start + max(self._budget // longest, 1)]
            vectors = self._forward(model, [texts[i] for i in cut], input_type)
            if vectors is not None:
                rows.append(vectors)
                start += len(cut)
                self._budget = min(self._full_budget, self._budget + self._budget // 8 + 1)
            elif len(cut) > 1:
                self._budget = len(cut) // 2 * longest
                _log.warning("out of memory: model=%s batch_tokens=%d from now on", self._spec.name, self._budget)
            else:
                raise TextRejected(
                    f"a text of {longest} tokens does not fit into the memory of {self._device}",
                    hint="Lower `max_tokens` of the model's row, or use a device with more memory",
                )
        out: Vectors = np.empty((len(order), rows[0].shape[1] if rows else self._spec.dimensions), dtype=np.float32)
        if rows:
            out[order] = np.concatenate(rows)
        return out

    def _forward(
        self, model: SentenceTransformer, texts: list[str], input_type: InputType
    ) -> NDArray[np.float32] | None:
        """One pass over the device; None where memory ran out (outside the except clause, which keeps the tensors)."""
        try:
            return _encode(model, texts, self._prompts[input_type], input_type)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, torch.AcceleratorError):
                raise EmbedderDown(
                    f"the device {self._device} failed: {str(error).splitlines()[0]}",
                    hint="An accelerator that failed so stays failed for this process: restart the service",
                ) from error
            if not _out_of_memory(error):
                raise
        self._free_memory()
        return None

    def _free_memory(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _encode(model: SentenceTransformer, texts: list[str], prompt: str, input_type: InputType) -> NDArray[np.float32]:
    """All of `texts` in one batch. A model with a route for queries and one for documents takes the right one."""
    # A model that also reads images takes a text that looks like a path or URL for one, and would open it.
    inputs: list[Any] = list(texts) if list(model.modalities) == ["text"] else [{"text": text} for text in texts]
    encode = {InputType.DOCUMENT: model.encode_document, InputType.QUERY: model.encode_query}.get(
        input_type, model.encode
    )
    tensor = encode(inputs, prompt=prompt, batch_size=len(inputs), show_progress_bar=False, convert_to_tensor=True)
    return cast("NDArray[np.float32]", tensor.to("cpu", torch.float32).numpy())


def _device(wanted: str) -> torch.device:
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Misconfigured(
            f"there is no device {wanted} here: {str(error).splitlines()[0]}",
            hint="Set CDC_EMBEDDER_DEVICE to auto, cpu or a device that torch knows, such as cuda:0",
        ) from error
    return device


def _dtype(declared: str, device: torch.device) -> torch.dtype:
    """`auto` is float32 on CPUs and half precision on GPUs."""
    if declared != "auto":
        return cast("torch.dtype", getattr(torch, declared))
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _token_limit(spec: ModelSpec, model: SentenceTransformer) -> int | None:
    """How many tokens the model reads: the row's number or the files', never more than it has positions.

    Some files leave no room for the positions before the first (XLM-R counts from padding_idx + 1): a text at
    their limit would be an index error, which on a GPU ends the process's use of it.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    room = None if positions is None or positions < 1 else int(positions) - _first_position(model)
    if spec.max_tokens is not None:
        if room is not None and spec.max_tokens > room:
            raise ModelFault(
                f"the model {spec.name} reads at most {room} tokens, its row says max_tokens {spec.max_tokens}",
                hint=f"Set max_tokens to at most {room}, or to NULL for what its files say",
            )
        return spec.max_tokens
    known = [n for n in (model.max_seq_length, room) if n is not None]
    # Tokenizers write "no limit" as 10 to the 30th.
    return min(known) if known and min(known) < 10**9 else None


def _first_position(model: SentenceTransformer) -> int:
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        padding = getattr(module, "padding_idx", None)
        if isinstance(table, torch.nn.Embedding) and isinstance(padding, int):
            return padding + 1
    return 0


def _own_tokenizer(model: SentenceTransformer) -> Tokenizer | None:
    """A copy that neither pads nor truncates: the model's own is switched between both at every call."""
    theirs = getattr(model.tokenizer, "backend_tokenizer", model.tokenizer)
    if not isinstance(theirs, Tokenizer):
        return None
    ours = Tokenizer.from_str(theirs.to_str())
    ours.no_padding()
    ours.no_truncation()
    return ours


def _prompt(spec: ModelSpec, model: SentenceTransformer, input_type: InputType) -> str:
    """The row's prompt, else the files': the library fills names that they lack with empty prompts, hence non-empty."""
    if (own := prompt_of(spec, input_type)) is not None:
        return own
    return next((prompt for name in _PROMPT_NAMES[input_type] if (prompt := model.prompts.get(name))), "")


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(sign in str(error) for sign in _MEMORY_SIGNS)
