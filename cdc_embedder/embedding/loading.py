"""What a model's row and its files say together: device, number format, length limit, tokenizer, prompts."""

from __future__ import annotations

from typing import cast

import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer

from cdc_embedder.embedding.base import InputType, ModelSpec
from cdc_embedder.embedding.modelrow import prompt_of
from cdc_embedder.embedding.packed import padding_idx
from cdc_embedder.embedding.tokenizing import Tokenizing
from cdc_embedder.errors import Misconfigured, ModelFault

_PROMPT_NAMES = {InputType.DOCUMENT: ("document", "passage", "corpus"), InputType.QUERY: ("query",)}


def device_called(wanted: str) -> torch.device:
    """`auto`, or a name that torch knows. Raises Misconfigured where it is not there."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Misconfigured(
            f"there is no device {wanted} here: {str(error).splitlines()[0]}",
            hint="Set CDC_EMBEDDER_DEVICE to auto, cpu or a device that torch knows, such as cuda:0",
        ) from error
    return device


def dtype_called(declared: str, device: torch.device) -> torch.dtype:
    """`auto` is float32 on CPUs and half precision on GPUs."""
    if declared != "auto":
        return cast("torch.dtype", getattr(torch, declared))
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def token_limit(spec: ModelSpec, model: SentenceTransformer) -> int | None:
    """How many tokens the model reads: the row's number or the files', never more than it has positions.

    Some files leave no room for the positions before the first (XLM-R counts from padding_idx + 1): a text at
    their limit would be an index error, which on a GPU ends the process's use of it.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    padding = padding_idx(model)
    room = None if positions is None or positions < 1 else int(positions) - (0 if padding is None else padding + 1)
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


def own_tokenizing(model: SentenceTransformer, limit: int | None, threads: int) -> Tokenizing | None:
    """A tokenizer of our own; None where the model's is written in Python."""
    tokenizer = getattr(model.tokenizer, "backend_tokenizer", model.tokenizer)
    if not isinstance(tokenizer, Tokenizer):
        return None
    direction = getattr(model.tokenizer, "truncation_side", "right")
    return Tokenizing(tokenizer, limit, direction=direction, threads=threads)


def prompt_for(spec: ModelSpec, model: SentenceTransformer, input_type: InputType) -> str:
    """The row's prompt, else the files': the library fills names that they lack with empty prompts, hence non-empty."""
    if (own := prompt_of(spec, input_type)) is not None:
        return own
    return next((prompt for name in _PROMPT_NAMES[input_type] if (prompt := model.prompts.get(name))), "")
