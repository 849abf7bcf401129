"""The machine a result was measured on, as every results file carries it. Linux."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("cdc-embedder", "numpy", "psycopg", "sentence-transformers", "tokenizers", "torch", "transformers")


def environment() -> dict[str, Any]:
    """Machine, versions, commit and date (UTC)."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": _field("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(_field("/proc/meminfo", "MemTotal").split()[0] or 0) / 2**20, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def commit() -> str:
    """The git commit, with `-dirty` where files differ from it; empty outside of a checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude", "*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return ""
    return done.stdout.strip()


def idle_share(seconds: float = 0.5) -> float:
    """How much of the machine was idle during the next `seconds`, from 0 to 1."""
    before = _ticks()
    time.sleep(seconds)
    passed = [now - then for now, then in zip(_ticks(), before, strict=True)]
    return round((passed[3] + passed[4]) / max(sum(passed), 1), 3)


def _ticks() -> list[int]:
    """User, nice, system, idle, iowait, irq, softirq, steal; what guests take is in user already."""
    return [int(number) for number in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]


def _field(file: str, name: str) -> str:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return "0"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "0")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
