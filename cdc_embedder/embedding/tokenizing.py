"""Texts to token ids, in several threads and outside of the device's lock.

The tokenizer is a copy of the model's: that one is switched between padding and truncation at every call, which no
second thread may see. This one is set once and never changed, so that threads share it; encoding releases the GIL.
How many texts a thread takes at a time is bounded in texts and in characters, because what a tokenizer holds for a
group may be many times its size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

Ids = NDArray[np.int64]
"""Token ids of one text, special tokens included, shape (tokens,)."""

MOST_CHARACTERS = 1_000_000
"""Of a longer text only so much is tokenized where the model has a length limit (at most some 10,000 tokens): the
rest could not reach it. The tokenizer takes hundreds of bytes a token, and ends the process where it gets none."""

_GROUP = 64

# The library would start threads of its own in every call, beside ours, and warn at every fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@dataclass(frozen=True, slots=True)
class Tokenized:
    """Token ids of each text, cut to the limit, and which texts were cut."""

    ids: list[Ids]
    truncated: NDArray[np.bool_]


class Tokenizing:
    """The tokenizer `theirs`, cut at `limit` tokens (None: never), in up to `threads` threads."""

    def __init__(self, theirs: Tokenizer, limit: int | None, *, direction: str, threads: int) -> None:
        self._tokenizer = Tokenizer.from_str(theirs.to_str())
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        if limit is not None:
            self._tokenizer.enable_truncation(limit, direction=direction)
        self._limit = limit
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="tokenize")

    def encode(self, texts: Sequence[str]) -> Tokenized:
        """Raises TypeError for a text that is no Unicode (a lone surrogate), RuntimeError after `close`."""
        groups = list(_groups(texts))
        # A single group gains nothing from another thread, and a live row would wait for the switch.
        made = [self._group(group) for group in groups] if len(groups) < 2 else self._threads.map(self._group, groups)
        ids: list[Ids] = []
        truncated: list[bool] = []
        for part in made:
            for found, cut in part:
                ids.append(found)
                truncated.append(cut)
        return Tokenized(ids, np.array(truncated, dtype=np.bool_))

    def close(self) -> None:
        """Let the threads end. Idempotent."""
        self._threads.shutdown(wait=False)

    def single_segment(self) -> bool:
        """Whether a text alone has tokens of type 0 only, and even an empty one has a token."""
        return all(e.ids and not any(e.type_ids) for e in self._tokenizer.encode_batch(["", "a b"]))

    def _group(self, texts: list[str]) -> list[tuple[Ids, bool]]:
        # encode_batch_fast leaves out the offsets, which nobody reads.
        return [(np.array(e.ids, dtype=np.int64), self._was_cut(e)) for e in self._tokenizer.encode_batch_fast(texts)]

    def _was_cut(self, encoding: Any) -> bool:
        return self._limit is not None and len(encoding) >= self._limit and bool(encoding.overflowing)


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for text in texts:
        if group and (len(group) == _GROUP or size + len(text) > MOST_CHARACTERS):
            yield group
            group, size = [], 0
        group.append(text)
        size += len(text)
    if group:
        yield group
