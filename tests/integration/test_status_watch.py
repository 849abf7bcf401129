"""`cdc-embedder status --watch`: in place on a terminal, line by line elsewhere, and gone on Ctrl-C with status 0."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cdc_embedder.sizes import size
from cdc_embedder.status import show_rows, table
from tests.commands import cli
from tests.documents import make_documents, make_model
from tests.servers import Bench, bench_with, bindir_18
from tests.service import PATIENCE_S, running, wait_caught_up

ROOT = Path(__file__).parents[2]


@contextmanager
def watching(bench: Bench, *arguments: str, output: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The command as a child in a session of its own, which is ended."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("CDC_EMBEDDER_", "PG"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "cdc_embedder", "status", "--watch", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=inherited | {"CDC_EMBEDDER_DSN": bench.dsn_admin, "TERM": "xterm", "COLUMNS": "200", "LINES": "40"},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def interrupted(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """Exit status and what it said on standard error, after Ctrl-C."""
    process.send_signal(signal.SIGINT)
    status = process.wait(timeout=PATIENCE_S)
    assert process.stderr is not None
    return status, process.stderr.read().decode()


def read_until(file: int, true: Callable[[str], bool]) -> str:
    """What the descriptor gives until `true` of all of it."""
    seen = b""
    while not seen or not true(seen.decode(errors="replace")):
        ready, _, _ = select.select([file], [], [], PATIENCE_S)
        assert ready, seen
        more = os.read(file, 65536)
        assert more, seen  # its end
        seen += more
    return seen.decode(errors="replace")


@pytest.fixture
def watched(bench18: Bench) -> Bench:
    make_model(bench18)
    make_documents(bench18, 5)
    return bench18


def test_where_there_is_no_terminal_a_table_follows_the_other_and_ctrl_c_leaves_with_zero(watched: Bench) -> None:
    with watching(watched, output=subprocess.PIPE) as process:
        assert process.stdout is not None
        seen = read_until(process.stdout.fileno(), lambda text: text.count("public.documents.embedding") >= 4)
        assert interrupted(process) == (0, "")
    for name in ("rate", "ETA", "lag", "backlog", "breaker", "pending", "coverage"):
        assert name in seen
    assert "\x1b" not in seen
    assert f"no service runs for slot {watched.slot}" in seen
    assert seen.count("Z\n") >= 2


def test_on_a_terminal_the_table_is_shown_in_place_and_ctrl_c_leaves_with_zero(watched: Bench) -> None:
    ours, theirs = pty.openpty()
    try:
        with watching(watched, output=theirs) as process:
            seen = read_until(ours, lambda text: text.count("public.documents.embedding") >= 6)
            assert interrupted(process) == (0, "")
            seen += read_until(ours, lambda text: text.endswith("\x1b[?25h"))
    finally:
        os.close(theirs)
        os.close(ours)
    assert "\x1b[?25l" in seen
    assert "\x1b[1A" in seen  # back to where the table began


def test_what_is_watched_changes_while_the_service_works(watched: Bench) -> None:
    with watching(watched, "--json", output=subprocess.PIPE) as process:
        assert process.stdout is not None
        file = process.stdout.fileno()
        first = read_until(file, lambda text: True)
        assert first.endswith("\n")  # each line is sent as it is made, not when a buffer is full
        [before] = json.loads(first.splitlines()[0])
        assert (before["state"], before["current"]) == ("stopped", 0)
        with running(watched) as service:
            wait_caught_up(watched)
            read_until(file, lambda text: '"current": 5,' in text)
            assert service.stop() == 0
        assert interrupted(process) == (0, "")


def test_a_server_that_goes_away_is_asked_again_until_it_is_back() -> None:
    with bench_with(bindir_18(), "pgoutput", {}) as bench:
        make_model(bench)
        make_documents(bench, 5)
        with watching(bench, output=subprocess.PIPE) as process:
            assert process.stdout is not None
            file = process.stdout.fileno()
            read_until(file, lambda text: "public.documents.embedding" in text)
            bench.admin.close()
            bench.server.stop("immediate")
            read_until(file, lambda text: "\nconnecting: " in text)
            bench.server.start()
            bench.restart()
            read_until(file, lambda text: "public.documents.embedding" in text)
            assert interrupted(process) == (0, "")


def test_a_server_that_never_was_there_is_a_sentence() -> None:
    done = cli("status", "--watch", CDC_EMBEDDER_DSN="host=/nowhere port=1")
    assert done.returncode == 1
    assert done.stderr.startswith("cdc-embedder: connecting: ")


def test_a_reader_that_goes_away_ends_it_without_a_word(watched: Bench) -> None:
    """As `| head` does."""
    with watching(watched, output=subprocess.PIPE) as process:
        assert process.stdout is not None
        read_until(process.stdout.fileno(), lambda text: "public.documents.embedding" in text)
        process.stdout.close()
        assert process.wait(timeout=PATIENCE_S) == 1
        assert process.stderr is not None
        assert process.stderr.read() == b""


ROW = {
    "source_table": "public.documents", "target_column": "embedding", "model": "fake", "state": "backfilling",
    "reason": None, "rows": 1234567, "rows_estimated": True, "current": 1000, "pending": 20, "backlog": 7, "failed": 3,
    "coverage": 0.08, "rows_per_s": 123.4, "eta_s": 9999.0, "lag_bytes": 123456789, "circuit_breaker": "half-open",
}  # fmt: skip


def shown(row: dict[str, Any]) -> str:
    console = Console(width=200, force_terminal=False)
    with console.capture() as capture:
        console.print(table([row]))
    return capture.get().splitlines()[1]


def test_a_line_has_rate_eta_lag_backlog_and_breaker() -> None:
    assert shown(ROW).split()[3:] == [
        "~1,234,567", "1,000", "20", "7", "3", "0.08", "%", "123/s", "3", "h", "118", "MB", "half-open",
    ]  # fmt: skip


def test_on_a_narrow_terminal_nothing_is_cut_off() -> None:
    found = ROW | {"reason": "a reason"}
    console = Console(width=80, force_terminal=True, color_system=None)
    with console.capture() as capture:
        show_rows([found], console)
    assert capture.get().splitlines() == [
        "public.documents.embedding  backfilling  fake",
        "  ~1,234,567 rows, 0.08 % current, 20 pending, 3 failed",
        "  123/s, ETA 3 h, backlog 7, lag 118 MB, breaker half-open",
        "public.documents.embedding is backfilling: a reason",
    ]


def test_where_there_is_no_terminal_a_line_is_never_broken_in_two() -> None:
    console = Console(width=80, force_terminal=False)
    with console.capture() as capture:
        show_rows([ROW], console)
    heading, line = capture.get().splitlines()
    assert heading.split()[0] == "column"
    assert line.split()[0] == "public.documents.embedding"
    assert line.split()[-1] == "half-open"


def test_what_is_not_known_is_a_dash() -> None:
    names = ("rows", "current", "pending", "backlog", "failed", "coverage", "rows_per_s", "eta_s", "lag_bytes",
             "circuit_breaker")  # fmt: skip
    unknown = ROW | dict.fromkeys(names) | {"rows_estimated": False}
    assert shown(unknown).split()[3:] == ["-"] * 10


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 bytes"),
        (9_999, "9999 bytes"),
        (10_240, "10 kB"),
        (1 << 30, "1024 MB"),
        (50 << 40, "50 TB"),
        (1 << 60, "1048576 TB"),
    ],
)
def test_bytes_are_told_in_units_that_can_be_read(number: int, text: str) -> None:
    assert size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7_200, "2 h"), (200_000, "2 d")]
)
def test_a_duration_is_told_in_units_that_can_be_read(seconds: float, text: str) -> None:
    assert " ".join(shown(ROW | {"eta_s": seconds}).split()[-5:-3]) == text
