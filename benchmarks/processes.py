"""CPU time and cores of processes, read from /proc: our service, and the server's backends by what they do. Linux."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads of `pid`; 0 where there is no such process any more."""
    try:
        # the name in parentheses may hold blanks
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) * _TICK_S


def server_cpu(bench: Any) -> dict[str, float]:
    """CPU seconds so far of every backend that is there, by its application's name or by its kind; not our own."""
    rows = bench.admin.execute(
        "SELECT pid, CASE WHEN backend_type IN ('client backend', 'walsender') THEN application_name"
        " ELSE backend_type END FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
    ).fetchall()
    spent: dict[str, float] = {}
    for pid, name in rows:
        role = (name or "unnamed").removeprefix("cdc-embedder ")
        spent[role] = spent.get(role, 0.0) + cpu_seconds(pid)
    return spent


def children(pid: int) -> list[int]:
    """The processes that `pid` started and that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def pin(pids: Iterable[int], cores: set[int]) -> None:
    """Let these processes, with every thread they have, run on `cores` only; what they start inherits it."""
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("*"):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(task.name), cores)


def postmaster(bench: Any) -> int:
    """The pid of the server's first process."""
    return int((bench.server.data / "postmaster.pid").read_text().split()[0])
