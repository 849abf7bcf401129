"""How many tokens a batch should have on this device: measured once, kept in a file.

Small batches leave a GPU idle between kernels, large ones only cost latency and memory. No torch: the caller says how
fast a batch of so many tokens goes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

_log = logging.getLogger(__name__)

CANDIDATES = (4_096, 8_192, 16_384, 32_768, 65_536)

_NEARLY = 0.97
"""Of the budgets that reach this share of the best rate the smallest is taken: it waits and holds less."""

Rate = Callable[[int], float | None]
"""Tokens a second in batches of so many tokens; None where memory does not suffice."""


def budget(key: str, rate: Rate, *, fallback: int) -> int:
    """The budget that was found for `key` before, else the one that is found now; `fallback` where none fits."""
    known = _read().get(key)
    if isinstance(known, int) and known > 0:
        return known
    found = choose(rate, CANDIDATES)
    if found is None:
        return fallback
    _log.info("calibrated: batch_tokens=%d for %s", found, key)
    _keep(key, found)
    return found


def choose(rate: Rate, candidates: Iterable[int]) -> int | None:
    """The smallest of `candidates`, which ascend, that is nearly as fast as the fastest; None where none fits."""
    rates: dict[int, float] = {}
    for tokens in candidates:
        measured = rate(tokens)
        if measured is None:
            break
        rates[tokens] = measured
    best = max(rates.values(), default=0.0)
    return next((tokens for tokens, measured in rates.items() if measured >= best * _NEARLY), None)


def cache_file() -> Path | None:
    """Where budgets are kept: below XDG_CACHE_HOME, by default ~/.cache; None for a user without a home."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    except RuntimeError:
        return None
    return home / "cdc-embedder" / "batch_tokens.json"


def _read() -> dict[str, object]:
    if (path := cache_file()) is None:
        return {}
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _keep(key: str, tokens: int) -> None:
    """Best effort: a service without a home measures at every start."""
    if (path := cache_file()) is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "w") as file:
                json.dump({**_read(), key: tokens}, file, indent=1, sort_keys=True)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        _log.warning("the calibration cannot be kept: file=%s reason=%s", path, error.strerror)
