"""Rule 1: how far the slot may be confirmed. No I/O.

1. Only the end LSN of a commit, as it arrived, is ever confirmed; nothing is computed.
2. A commit is passed only when no work remains that it, or any commit before it in stream order, asked for.
3. The position never moves back.
4. With nothing outstanding and no transaction open, the position follows the server's keepalives.

Work is counted by commit: `hold` says that a piece of work was asked for by the transaction that is being
read, `release` that it is done, durably. A piece of work is held once, by the oldest commit that asked for it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from cdc_embedder.lsn import LSN, ZERO


@dataclass(slots=True, eq=False)
class Position:
    """One transaction of the stream: how much work it still holds, where its commit record begins (never confirmed,
    only noted beside spilled keys) and where it ends, once its commit was read. `at`: when it committed, as told."""

    order: int
    commit: LSN = ZERO
    at: float | None = None
    held: int = 0
    end: LSN | None = None


class Watermark:
    """The positions of one connection, oldest first."""

    def __init__(self) -> None:
        self._positions: deque[Position] = deque()
        self._flushed: LSN = ZERO
        self._next = 0

    @property
    def flushed(self) -> LSN:
        """The LSN that may be confirmed now."""
        return self._flushed

    @property
    def outstanding(self) -> int:
        """Transactions that are open, or whose work is not finished."""
        return len(self._positions)

    def begin(self, commit: LSN = ZERO, at: float | None = None) -> Position:
        """A transaction starts to arrive, whose commit record begins at `commit`."""
        position = Position(self._next, commit, at)
        self._next += 1
        self._positions.append(position)
        return position

    def hold(self, position: Position) -> None:
        """The transaction asked for one more piece of work."""
        position.held += 1

    def release(self, position: Position) -> None:
        """One piece of its work is done and durable."""
        if position.held == 0:
            raise AssertionError("released more often than held")
        position.held -= 1
        self._advance()

    def commit(self, position: Position, end: LSN) -> None:
        """The transaction was read to its end; `end` is the end LSN that its commit message carried."""
        position.end = end
        self._advance()

    def idle(self, server_end: LSN) -> None:
        """A keepalive said that decoding has come to `server_end`; it counts only when nothing is outstanding."""
        if not self._positions and server_end > self._flushed:
            self._flushed = server_end

    def _advance(self) -> None:
        positions = self._positions
        while positions and positions[0].held == 0 and (end := positions[0].end) is not None:
            positions.popleft()
            if end > self._flushed:
                self._flushed = end
