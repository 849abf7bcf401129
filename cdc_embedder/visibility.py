"""Rule 2: a key may be judged only by a snapshot that sees its transaction. Xid and snapshot arithmetic, no I/O.

The stream names transactions by 32-bit xids; snapshots speak of 64-bit ones. The epoch is taken from the snapshot:
of all 64-bit values with the same low half, the transaction's is the one nearest to the snapshot's `xmax`
(transactions further than 2^31 apart cannot coexist in one cluster).
"""

from __future__ import annotations

from dataclasses import dataclass

_EPOCH = 1 << 32
_HALF = 1 << 31


def widen(xid: int, near: int) -> int:
    """The 64-bit form of the 32-bit `xid` that lies nearest to the 64-bit `near`; never negative."""
    wide = (near & ~(_EPOCH - 1)) | (xid & (_EPOCH - 1))
    if wide - near > _HALF and wide >= _EPOCH:
        return wide - _EPOCH
    if near - wide >= _HALF:
        return wide + _EPOCH
    return wide


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`pg_current_snapshot()`: transactions at or after `xmax`, and those in `in_progress`, are not visible."""

    xmin: int
    xmax: int
    in_progress: frozenset[int]

    @classmethod
    def parse(cls, text: str) -> Snapshot:
        """Read `xmin:xmax:xip,xip,…`. Raises ValueError for anything else.

        Source: https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-INFO-SNAPSHOT
        """
        xmin, xmax, in_progress = text.split(":")
        return cls(int(xmin), int(xmax), frozenset(int(xid) for xid in in_progress.split(",") if xid))

    def sees(self, xid: int) -> bool:
        """Whether the committed top-level transaction with the 32-bit `xid` is visible."""
        wide = widen(xid, self.xmax)
        return wide < self.xmin or (wide < self.xmax and wide not in self.in_progress)
