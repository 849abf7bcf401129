"""Fixtures for every folder, and the list of what this machine lacks.

A missing server is a failure with `CI=true`; elsewhere its tests are skipped and named at the end of the run.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from cdc_embedder.embedded import Server
from cdc_embedder.errors import Misconfigured
from tests import servers
from tests.lacking import lacks
from tests.servers import Bench

hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job, and in all that it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _server(bindir: Callable[[], Path]) -> Iterator[Server]:
    try:
        found = bindir()
    except Misconfigured as missing:
        lacks(str(missing))
    yield from servers.serve(found)


@pytest.fixture(scope="session")
def pg15() -> Iterator[Server]:
    """PostgreSQL 15 from Debian: wal2json and contrib, no pgvector."""
    yield from _server(servers.bindir_15)


@pytest.fixture(scope="session")
def pg18() -> Iterator[Server]:
    """PostgreSQL 18 from the wheel: pgvector and contrib, no wal2json."""
    yield from _server(servers.bindir_18)


@pytest.fixture(params=["15-wal2json", "15-pgoutput", "18-pgoutput"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """A fresh database on each server with each of its plugins."""
    major, plugin = request.param.split("-")
    if plugin == "wal2json" and not servers.WAL2JSON_15.exists():
        lacks("wal2json (package postgresql-15-wal2json)")
    yield from servers.make_bench(request.getfixturevalue(f"pg{major}"), plugin)


@pytest.fixture
def listing15(pg15: Server) -> Server:
    """PostgreSQL 15 that refuses what `output_plugin_libraries` does not list, as it does from 15.19 on."""
    return pg15 if servers.lists_plugins(pg15.bindir) else lacks("PostgreSQL 15.19 or later")


@pytest.fixture
def listing(bench: Bench) -> Bench:
    """`bench` on a server that refuses what `output_plugin_libraries` does not list."""
    if not servers.lists_plugins(bench.server.bindir):
        lacks("PostgreSQL 15.19 or later")
    return bench


@pytest.fixture
def bench18(pg18: Server) -> Iterator[Bench]:
    """A fresh database on PostgreSQL 18 with pgvector."""
    yield from servers.make_bench(pg18, "pgoutput")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Cheap folders first."""
    order = {"unit": 0, "integration": 1, "faults": 2, "acceptance": 3}
    items.sort(key=lambda item: order.get(Path(str(item.path)).parent.name, 4))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run in which no test ran is no success, though every skip had its reason."""
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    ran = terminal is None or any(terminal.stats.get(outcome) for outcome in ("passed", "failed", "error"))
    if session.exitstatus == pytest.ExitCode.OK and not ran and not session.config.option.collectonly:
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name what was not run."""
    reasons = {str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", []) if report.longrepr}
    for reason in sorted(reasons):
        terminalreporter.write_line(f"not run: {reason.removeprefix('Skipped: ')}")
