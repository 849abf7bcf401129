"""LSN: a position in the write-ahead log, and its text form as psql prints it. No I/O."""

from __future__ import annotations


class LSN(int):
    """A byte position in the WAL: an unsigned 64-bit integer that prints as `16/B374D848`.

    Arithmetic on an LSN gives a plain int on purpose: an LSN that was computed instead of received must
    never be confirmed (rule 1).
    """

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> LSN:
        """Read `16/B374D848`. Raises ValueError for anything else."""
        high, slash, low = text.partition("/")
        if not slash or not 1 <= len(high) <= 8 or not 1 <= len(low) <= 8:
            raise ValueError(f"not an LSN: {text!r}")
        return cls((int(high, 16) << 32) | int(low, 16))

    def __str__(self) -> str:
        return f"{int(self) >> 32:X}/{int(self) & 0xFFFFFFFF:X}"

    def __repr__(self) -> str:
        return f"LSN({self})"


ZERO = LSN(0)
"""Confirms nothing, and asks the server to start where the slot stands."""
