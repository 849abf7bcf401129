"""Numbers to the device and vectors back: at once on a CPU, without waiting on a GPU.

On a GPU a batch travels through pinned memory that is allocated once and used again, its ids on a stream of their
own, so that they arrive while the batch before is computed. The host waits once a batch, for the event behind the
vectors' copy, and by then it has queued the next batch.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from cdc_embedder.embedding.base import Vectors

Finish = Callable[[], Vectors]
"""Waits for a batch that has been started and gives its vectors. To be called once."""

Compute = Callable[[torch.Tensor], torch.Tensor]
"""From a batch's numbers on the device, int64 of shape (count,), to its vectors there, of shape (texts, dimensions)."""


class Transfer(Protocol):
    """How a batch gets to the device and back."""

    def run(self, numbers: NDArray[np.int64], compute: Compute) -> Finish:
        """Start `compute` over `numbers`."""
        ...


def transfer_to(device: torch.device) -> Transfer:
    """What suits `device`."""
    return Staged(device) if device.type == "cuda" else Direct(device)


class Direct:
    """A device that computes while the caller waits."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def run(self, numbers: NDArray[np.int64], compute: Compute) -> Finish:
        vectors = compute(torch.from_numpy(numbers).to(self._device)).to("cpu", torch.float32).numpy()
        return lambda: vectors


class Staged:
    """A CUDA device. As many slots as there ever were batches under way at once: two a call."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._idle: queue.SimpleQueue[_Slot] = queue.SimpleQueue()

    def run(self, numbers: NDArray[np.int64], compute: Compute) -> Finish:
        try:
            slot = self._idle.get_nowait()
        except queue.Empty:
            slot = _Slot(self._device, self._copies)
        # A slot whose batch fails is not used again: kernels that were queued may still read it.
        slot.take(compute(slot.send(numbers)))

        def finish() -> Vectors:
            vectors = slot.vectors()
            self._idle.put(slot)
            return vectors

        return finish


class _Slot:
    """Pinned buffers of one batch under way, and their twin on the device."""

    def __init__(self, device: torch.device, copies: torch.cuda.Stream) -> None:
        self._device = device
        self._copies = copies
        self._numbers = torch.empty(0, dtype=torch.int64)
        self._twin = torch.empty(0, dtype=torch.int64, device=device)
        self._out = torch.empty(0, dtype=torch.float32)
        self._shape = (0, 0)
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def send(self, numbers: NDArray[np.int64]) -> torch.Tensor:
        """The batch before has been waited for, so both buffers are free."""
        count = len(numbers)
        if count > len(self._numbers):
            self._numbers = torch.empty(_roomy(count), dtype=torch.int64, pin_memory=True)
            self._twin = torch.empty(_roomy(count), dtype=torch.int64, device=self._device)
            # The allocator may hand out memory that kernels on the computing stream have not left yet.
            self._copies.wait_stream(torch.cuda.current_stream(self._device))
        self._numbers[:count].numpy()[:] = numbers
        with torch.cuda.stream(self._copies):
            self._twin[:count].copy_(self._numbers[:count], non_blocking=True)
        torch.cuda.current_stream(self._device).wait_stream(self._copies)
        return self._twin[:count]

    def take(self, vectors: torch.Tensor) -> None:
        found = vectors.to(torch.float32)
        self._shape = (found.shape[0], found.shape[1])
        if found.numel() > len(self._out):
            self._out = torch.empty(_roomy(found.numel()), dtype=torch.float32, pin_memory=True)
        self._out[: found.numel()].view(self._shape).copy_(found, non_blocking=True)
        self._done.record(torch.cuda.current_stream(self._device))

    def vectors(self) -> Vectors:
        self._done.synchronize()
        rows, dimensions = self._shape
        found: Vectors = self._out[: rows * dimensions].view(self._shape).numpy().copy()
        return found


def _roomy(count: int) -> int:
    return count + count // 4
