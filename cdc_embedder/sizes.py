"""Numbers of bytes for people."""

from __future__ import annotations


def size(count: float) -> str:
    """As pg_size_pretty has it: `512 bytes`, `40 MB`."""
    unit = "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if abs(count) < 10_240:
            break
        count, unit = count / 1024, larger
    return f"{count:.0f} {unit}"
