"""The demo as a newcomer starts it: what it shows, what it leaves behind, and what it says when something breaks."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from cdc_embedder.embedded import Server
from tests.service import until


class Demo:
    """`cdc-embedder demo` as a process, its output in a file, its files in a folder of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder / "files"
        self.folder.mkdir(mode=0o755)
        self._output = folder / "output"
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("CDC_EMBEDDER_", "PG"))}
        environment |= {"TMPDIR": str(self.folder), "COLUMNS": "120", "PYTHONUNBUFFERED": "1"}
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cdc_embedder", "demo", *arguments],
                stdout=output,
                stderr=output,
                env=environment,
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def wait_for(self, text: str) -> None:
        """Wait for each of the numbered steps with the usual patience, until one has said `text`."""
        ended = self.process.poll
        for step in (*(f"\n{number} " for number in range(2, 7)), text):
            until(lambda s=step: s in self.output or text in self.output or ended() is not None,
                  f"never said {step!r}", lambda: self.output)  # fmt: skip
        assert text in self.output, self.output

    def wait(self) -> int:
        return self.process.wait(timeout=100)

    def service_pid(self) -> int:
        self.wait_for("as process ")
        until(lambda: re.search(r"as process \d+\n", self.output), "no whole line", lambda: self.output)
        return int(re.findall(r"as process (\d+)\n", self.output)[0])

    def service_and_port(self) -> tuple[int, int]:
        """The service's process and the server's port (fourth line of its pid file), while both run."""
        service = self.service_pid()
        [file] = self.folder.glob("cdc-embedder-demo-*/server/data/postmaster.pid")
        return service, int(file.read_text().splitlines()[3])

    def files(self) -> list[str]:
        """Those of ours: torch has caches of its own."""
        return [path.name for path in self.folder.iterdir() if path.name.startswith("cdc-embedder")]


@pytest.fixture
def folder(pg18: Server) -> Iterator[Path]:
    """`pg18` only for what it says where the wheel is missing."""
    with tempfile.TemporaryDirectory(prefix="cdc-embedder-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def demos(folder: Path) -> Iterator[list[Demo]]:
    """Every demo that a test starts, ended in any case."""
    started: list[Demo] = []
    yield started
    for demo in started:
        if demo.process.poll() is None:
            demo.process.terminate()
            demo.wait()


@pytest.mark.timeout(300)
def test_the_demo_embeds_follows_changes_searches_and_can_be_tried_in_psql(folder: Path, demos: list[Demo]) -> None:
    demo = Demo(folder, "keep a journal of what the program did", "--rows", "100", "--keep")
    demos.append(demo)
    demo.wait_for("The service's log")
    output = demo.output
    assert "100/100" in output
    assert len(re.findall(r"INSERT +\S+ +\d+ ms", output)) == 3
    assert len(re.findall(r"UPDATE +\S+ +\d+ ms", output)) == 2
    scores = [float(score) for score in re.findall(r" (0\.\d{3}) ", output)]
    assert len(scores) == 8
    assert scores == sorted(scores, reverse=True)
    _try_what_it_proposes(output)
    service, port = demo.service_and_port()
    demo.process.send_signal(signal.SIGTERM)
    assert demo.wait() == 0
    assert not _runs(service)
    assert not _listens(port)
    assert demo.files() == []


def test_a_demo_whose_service_is_killed_says_so_and_leaves_nothing_behind(folder: Path, demos: list[Demo]) -> None:
    demo = Demo(folder, "--rows", "100")
    demos.append(demo)
    service, port = demo.service_and_port()
    os.kill(service, signal.SIGKILL)
    assert demo.wait() == 1
    assert "the service left with status -9" in demo.output
    assert "Traceback" not in demo.output
    assert not _runs(service)
    assert not _listens(port)
    assert demo.files() == []


def _try_what_it_proposes(output: str) -> None:
    """The DSN and the statements as printed, in the order in which a reader would paste them."""
    command, *statements = re.findall(r"^  (\S*psql .*|[A-Z]+ .*;)$", output.split("Ctrl-C")[1], re.MULTILINE)
    assert len(statements) == 3
    with psycopg.connect(shlex.split(command)[1], autocommit=True) as connection:
        status, update, neighbours = statements
        cursor = connection.execute(status)
        assert cursor.description is not None
        assert [column.name for column in cursor.description][:2] == ["state", "rows"]
        assert cursor.fetchall()[0][:2] == ("live", 103)
        assert connection.execute(update).rowcount == 1
        assert len(connection.execute(neighbours).fetchall()) == 5


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
