"""What an embedder is: texts in, unit vectors out, in one blocking call made from a worker thread.

The protocol, the description of a model as its row in the `model` table says, and the one check that every
vector passes before it may be stored (rule 13). No torch, no database.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
"""Shape (texts, dimensions), float32, C-contiguous."""


class InputType(StrEnum):
    """Which of the model's prompts is put before the text."""

    NONE = "none"
    QUERY = "query"
    DOCUMENT = "document"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One row of the `model` table. None means: as the model's own files say."""

    name: str
    dimensions: int
    backend: str = "local"
    source: str | None = None
    revision: str | None = None
    max_tokens: int | None = None
    document_prompt: str | None = None
    query_prompt: str | None = None
    normalize: bool = True
    dtype: str = "auto"
    trust_remote_code: bool = False
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Spent:
    """What a call cost beside its tokens: `padding` tokens, seconds of tokenizing, and seconds that the device was busy
    with it and with no other call (None: it cannot tell)."""

    padding: int = 0
    tokenizing_s: float = 0.0
    device_s: float | None = None

    def __add__(self, other: Spent) -> Spent:
        device = [part for part in (self.device_s, other.device_s) if part is not None]
        return Spent(
            self.padding + other.padding, self.tokenizing_s + other.tokenizing_s, sum(device) if device else None
        )


@dataclass(frozen=True, slots=True)
class Embedded:
    """What a call gave: `vectors` as the model made them, which texts lost their tail, and how many tokens it was."""

    vectors: Vectors
    truncated: NDArray[np.bool_]
    tokens: int
    spent: Spent = Spent()


class Embedder(Protocol):
    """A loaded model. Calls come from worker threads and block."""

    @property
    def identity(self) -> str:
        """What exactly is loaded: a hub commit, or the SHA-256 of the weights. Another one is another model."""
        ...

    @property
    def engine(self) -> str:
        """How it runs, in a few words for the log and `status`."""
        ...

    @property
    def concurrency(self) -> int:
        """How many calls at once are worth it: while one is with the device, another may be tokenized."""
        ...

    def embed(self, texts: Sequence[str], input_type: InputType) -> Embedded:
        """Embed `texts` in order, in `concurrency` threads at once.

        Raises TextRejected, EmbedderDown or ModelFault (see `errors`).
        """
        ...

    def close(self) -> None:
        """Free the device, the connections. Idempotent."""
        ...


def finish(vectors: NDArray[Any], spec: ModelSpec) -> tuple[Vectors, NDArray[np.bool_]]:
    """Rule 13: make rows unit length in float32; say which rows may be stored.

    Returns `(vectors, good)`: float32 of shape (n, dimensions), and a boolean per row. A row is not good when it
    holds NaN or infinity, or when it is zero and was to be normalized. Raises ValueError on a wrong shape.
    """
    out = np.ascontiguousarray(vectors, dtype=np.float32)
    if out.ndim != 2 or out.shape[1] != spec.dimensions:
        raise ValueError(f"expected vectors of {spec.dimensions} dimensions, got an array of shape {out.shape}")
    norms = np.sqrt(np.einsum("ij,ij->i", out, out, dtype=np.float64))  # in float64 no finite row overflows
    good: NDArray[np.bool_] = np.isfinite(norms)
    if spec.normalize:
        good &= norms > 0
        out = out / np.where(good, norms, 1.0).astype(np.float32)[:, None]
    return out, good
