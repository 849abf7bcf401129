"""Named places where a test may stop, kill or disturb the process. In production `hook` is None and nothing is called.

The places, in the order of a key's way: received, fetched, embedded, written, confirmed; spilling, spilled, settled for
the backlog; scanned, checkpoint for a scan. Each stands right after what its name says, but for *spilling*.
"""

from __future__ import annotations

from collections.abc import Callable

hook: Callable[[str], None] | None = None


def reached(place: str) -> None:
    """Tell the test, where there is one."""
    if hook is not None:
        hook(place)
