"""The real command line, which kills itself at a place of `cdc_embedder.failpoints`: `python -m tests.faults.failing`.

CDC_TEST_KILL_AT names the place, CDC_TEST_KILL_AFTER says at which time (1: the first) it is reached there; with
CDC_TEST_KILL_WHEN nothing counts before that file exists. CDC_TEST_SET changes numbers that a test cannot wait for:
`module.NAME=value`, several of them apart by blanks.
"""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

from cdc_embedder import failpoints
from cdc_embedder.cli import main


def kill_at(place: str, after: int, when: Path | None) -> Callable[[str], None]:
    """A hook that ends the process, with nothing flushed and nothing closed, when it is there for the n-th time."""
    left = after

    def hook(reached: str) -> None:
        nonlocal left
        if reached == place and (when is None or when.exists()):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


def change(setting: str) -> None:
    name, value = setting.split("=")
    module, attribute = name.rsplit(".", 1)
    before = getattr(importlib.import_module(module), attribute)
    setattr(importlib.import_module(module), attribute, type(before)(value))


if __name__ == "__main__":
    for setting in os.environ.get("CDC_TEST_SET", "").split():
        change(setting)
    if place := os.environ.get("CDC_TEST_KILL_AT"):
        when = os.environ.get("CDC_TEST_KILL_WHEN")
        failpoints.hook = kill_at(place, int(os.environ["CDC_TEST_KILL_AFTER"]), Path(when) if when else None)
    main()
