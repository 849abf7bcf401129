"""Texts and vectors in shared memory, so that only their sizes go through a pipe.

The service makes a segment, the worker attaches it by name, and as soon as it has, the name is removed: the memory
goes with the two processes then, however they end. In the moment before, multiprocessing's resource tracker answers
for it. A segment grows by being replaced.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np

from cdc_embedder.embedding.base import Embedded, Spent
from cdc_embedder.errors import EmbedderDown

_SMALLEST = 1 << 20
_LARGEST_KEPT = 1 << 26
"""Bytes; a segment that one call needed larger than this goes with the call."""

_LENGTH = np.dtype(np.int64)
_FOLDER = Path("/dev/shm")
_ENCODING = ("utf-8", "surrogatepass")
"""A lone surrogate reaches the model, which refuses it as it would in the service's own process."""


class Segment:
    """The service's side: memory of at least the size that was last asked for."""

    def __init__(self) -> None:
        self._memory: SharedMemory | None = None
        self._named = False

    @property
    def view(self) -> memoryview:
        return view(self._memory)

    def ensure(self, size: int) -> str | None:
        """Make room for `size` bytes: the name of a new segment for the worker to attach, None where the old one does.

        Raises EmbedderDown where the machine has no such room.
        """
        if self._memory is not None and self._memory.size >= size:
            return None
        self.free()
        wanted = max(_SMALLEST, 1 << (size - 1).bit_length())
        try:
            self._memory = SharedMemory(create=True, size=wanted)
            self._named = True
            _reserve(self._memory.name, wanted)
        except OSError as error:
            self.free()
            raise EmbedderDown(
                f"no shared memory of {wanted >> 20} MiB is to be had: {error.strerror}",
                hint="Give the container more of it: --shm-size, or a volume of medium Memory at /dev/shm",
            ) from error
        return self._memory.name

    def attached(self) -> None:
        """The worker has it: nobody else needs its name."""
        if self._memory is not None and self._named:
            self._memory.unlink()
            self._named = False

    def rest(self, *, keep: bool) -> None:
        """After a call: keep for the next what is not too large."""
        if not keep or (self._memory is not None and self._memory.size > _LARGEST_KEPT):
            self.free()

    def free(self) -> None:
        """Idempotent."""
        self.attached()
        if self._memory is not None:
            self._memory.close()
            self._memory = None


def view(memory: SharedMemory | None) -> memoryview:
    """Of memory that is attached and not closed."""
    assert memory is not None
    assert memory.buf is not None
    return memory.buf


def encode(texts: Sequence[str]) -> list[bytes]:
    """Texts as they lie in memory: their lengths in bytes, then the bytes."""
    encoded = [text.encode(*_ENCODING) for text in texts]
    return [np.array([len(text) for text in encoded], dtype=_LENGTH).tobytes(), *encoded]


def put_texts(view: memoryview, encoded: Sequence[bytes]) -> None:
    """`view` has room for them all."""
    joined = b"".join(encoded)
    view[: len(joined)] = joined


def get_texts(view: memoryview, count: int) -> list[str]:
    """The `count` texts that were put."""
    lengths = np.frombuffer(view, _LENGTH, count)
    ends = (count * _LENGTH.itemsize + np.cumsum(lengths)).tolist()
    return [str(view[end - length : end], *_ENCODING) for end, length in zip(ends, lengths.tolist(), strict=True)]


def vectors_size(count: int, dimensions: int) -> int:
    """Bytes that so many vectors take, with a byte for each that says whether its text was truncated."""
    return max(1, count * (4 * dimensions + 1))


def put_vectors(view: memoryview, embedded: Embedded) -> None:
    """Float32 vectors, then the flags."""
    count, dimensions = embedded.vectors.shape
    np.ndarray((count, dimensions), np.float32, view)[:] = embedded.vectors
    np.ndarray(count, np.bool_, view, 4 * count * dimensions)[:] = embedded.truncated


def get_vectors(view: memoryview, count: int, dimensions: int, tokens: int, spent: Spent) -> Embedded:
    """A copy of what was put."""
    vectors = np.ndarray((count, dimensions), np.float32, view).copy()
    truncated = np.ndarray(count, np.bool_, view, 4 * count * dimensions).copy()
    return Embedded(vectors, truncated, tokens, spent)


def _reserve(name: str, size: int) -> None:
    """Take the pages now: a full /dev/shm is an error here, and SIGBUS, the end of the service, at a write."""
    if not hasattr(os, "posix_fallocate") or not (_FOLDER / name).exists():
        return
    file = os.open(_FOLDER / name, os.O_RDWR)
    try:
        os.posix_fallocate(file, 0, size)
    finally:
        os.close(file)
