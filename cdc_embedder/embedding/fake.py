"""A deterministic embedder for tests and benchmarks, usable as `backend = 'fake'`: real code, no model.

The same model name and text give the same unit vector in every process, on every machine, with every numpy: the
numbers are the bytes of an extendable hash. Its options make it slow, fussy or absent. It knows nothing of meaning.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cdc_embedder.embedding.base import Embedded, InputType, ModelSpec, Vectors
from cdc_embedder.embedding.modelrow import check_options, number_option, prompted
from cdc_embedder.errors import EmbedderDown, TextRejected

OPTIONS = {
    "delay_s": "seconds that every call takes",
    "delay_per_text_s": "seconds that every text adds to a call",
    "reject": "a text that contains this is refused, and its batch with it",
    "nan": "a text that contains this gets a vector of NaN",
    "down": "true: every call fails as if the device were gone",
    "down_while_exists": "the same for as long as this file exists",
    "exit": "a text that contains this ends the process, as a crash inside a library does",
}


class FakeEmbedder:
    """Unit vectors from a hash. A token is a word; `max_tokens` cuts a text after so many of them."""

    def __init__(self, spec: ModelSpec) -> None:
        check_options(spec, OPTIONS)
        self._spec = spec
        self._delay_s = number_option(spec, "delay_s", 0, least=0)
        self._delay_per_text_s = number_option(spec, "delay_per_text_s", 0, least=0)
        self._device = threading.Lock()

    @property
    def identity(self) -> str:
        return f"fake:{self._spec.name}"

    @property
    def engine(self) -> str:
        return "fake"

    @property
    def concurrency(self) -> int:
        """As a device has it: one call sleeps while the other hashes."""
        return 2

    def embed(self, texts: Sequence[str], input_type: InputType) -> Embedded:
        options = self._spec.options
        with self._device:
            time.sleep(self._delay_s + len(texts) * self._delay_per_text_s)
        sign = options.get("down_while_exists")
        if options.get("down") or (sign and Path(sign).exists()):
            raise EmbedderDown("the fake embedder is down, as its options say")
        sent = prompted(self._spec, texts, input_type)
        if (deadly := options.get("exit")) and any(deadly in text for text in sent):
            os._exit(139)
        if (refused := options.get("reject")) and any(refused in text for text in sent):
            raise TextRejected("the fake embedder refuses a text, as its options say")
        limit = self._spec.max_tokens
        tokens = np.array([len(text.split()) for text in sent], dtype=np.int64)
        truncated = tokens > limit if limit is not None else np.zeros(len(sent), dtype=np.bool_)
        kept = [" ".join(text.split()[:limit]) if cut else text for text, cut in zip(sent, truncated, strict=True)]
        vectors = _vectors(self._spec.name, kept, self._spec.dimensions)
        if marker := options.get("nan"):
            vectors[[marker in text for text in sent]] = np.nan
        return Embedded(vectors, truncated, int(np.minimum(tokens, limit).sum() if limit else tokens.sum()))

    def close(self) -> None:
        """Nothing is held."""


def fake_vector(name: str, text: str, dimensions: int) -> Vectors:
    """What the model `name` gives to `text` (its prompt included), shape (dimensions,): the oracle of tests."""
    vector: Vectors = _vectors(name, [text], dimensions)[0]
    return vector


def _vectors(name: str, texts: Sequence[str], dimensions: int) -> Vectors:
    seed = hashlib.shake_256(name.encode() + b"\0")
    digests = []
    for text in texts:
        hashed = seed.copy()
        hashed.update(text.encode())
        digests.append(hashed.digest(2 * dimensions))
    # Odd integers: no component is ever zero, so neither is a vector.
    raw = np.frombuffer(b"".join(digests), dtype="<i2").reshape(len(texts), dimensions).astype(np.float32) * 2 + 1
    return np.ascontiguousarray(raw / np.linalg.norm(raw, axis=1, keepdims=True), dtype=np.float32)
