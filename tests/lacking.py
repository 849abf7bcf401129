"""What a machine lacks: a failure with `CI=true`; elsewhere the test is skipped, and named at the end of the run."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest


def lacks(what: str) -> NoReturn:
    """This test cannot run here."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"this machine lacks {what}")
    pytest.skip(f"this machine lacks {what}")


def tool(name: str, package: str) -> str:
    """Where a program is, which Debian's `package` has."""
    return shutil.which(name) or lacks(f"{name} (package {package})")
