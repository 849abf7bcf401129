"""What systemd hears of the real process, over a real socket; and what `/healthz` says when it gets nowhere."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from cdc_embedder.notifying import Notifier
from cdc_embedder.pipeline import STUCK_SECONDS
from cdc_embedder.rows.session import GRACE_SECONDS, PINS
from tests.documents import make_documents, make_model
from tests.servers import Bench
from tests.service import Service, running, until, wait_caught_up


class Systemd:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        self._socket.setblocking(False)
        self.lines: list[str] = []

    def heard(self, line: str) -> bool:
        """Whether this line has come, now or before."""
        self.listen()
        return any(re.fullmatch(line, each) for each in self.lines)

    def listen(self) -> None:
        while True:
            try:
                self.lines += self._socket.recv(65536).decode().splitlines()
            except BlockingIOError:
                return

    def wait_for(self, line: str) -> None:
        until(lambda: self.heard(line), f"{line} never came", lambda: self.lines)

    def silent_about(self, line: str, seconds: float) -> bool:
        """Whether nothing of the kind comes for so long, but what was on its way."""
        time.sleep(0.2)
        self.listen()
        known = len(self.lines)
        time.sleep(seconds)
        self.listen()
        return line not in self.lines[known:]

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    end = Systemd(str(tmp_path / "notify"))
    yield end
    end.close()


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    return {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1500000"} | more


def test_it_is_ready_once_says_how_it_is_feeds_the_watchdog_and_says_when_it_stops(
    bench18: Bench, systemd: Systemd, tmp_path: Path
) -> None:
    make_model(bench18)
    make_documents(bench18, 5)
    with running(bench18, **environment(tmp_path)) as service:
        systemd.wait_for("READY=1")
        systemd.wait_for("STATUS=columns: 1 live; keys waiting: 0; rows failed: 0")
        systemd.lines.clear()
        until(lambda: systemd.heard("WATCHDOG=1") and systemd.lines.count("WATCHDOG=1") > 3, "it stopped")
        assert "READY=1" not in systemd.lines
        with running(bench18, **environment(tmp_path)) as other:
            systemd.wait_for("STATUS=waiting: another instance serves the slot .*")
            systemd.wait_for("READY=1")
            assert other.stop() == 0
        systemd.wait_for("STOPPING=1")
        systemd.lines.clear()
        assert service.stop() == 0
        systemd.wait_for("STOPPING=1")


def test_a_server_that_is_not_there_does_not_keep_it_from_being_ready(
    bench18: Bench, systemd: Systemd, tmp_path: Path
) -> None:
    """Otherwise systemd would end it at every reboot where the database comes later."""
    nowhere = "host=127.0.0.1 port=1 user=nobody dbname=nothing"
    with running(bench18, **environment(tmp_path, CDC_EMBEDDER_DSN=nowhere)) as service:
        systemd.wait_for("READY=1")
        systemd.wait_for("STATUS=none: connecting.*")
        systemd.lines.clear()
        systemd.wait_for("WATCHDOG=1")
        assert service.stop() == 0


def test_an_open_transaction_that_the_slot_has_to_wait_for_does_not_keep_it_from_being_ready(
    bench18: Bench, systemd: Systemd, tmp_path: Path
) -> None:
    """Otherwise systemd would end it, and the next one would wait from the beginning, for ever."""
    make_model(bench18)
    make_documents(bench18, 5)
    with psycopg.connect(bench18.dsn_admin) as holder:
        holder.execute("SELECT pg_current_xact_id()")
        with running(bench18, **environment(tmp_path)) as service:
            systemd.wait_for("READY=1")
            systemd.wait_for(f"STATUS=none: waiting for the slot {bench18.slot}: the log says what for")
            service.wait_for_log(f"making the slot waits: a transaction of pid {holder.info.backend_pid}")
            holder.rollback()
            systemd.wait_for("STATUS=columns: 1 live; keys waiting: 0; rows failed: 0")
            assert service.stop() == 0


def test_a_schema_that_takes_long_to_bring_up_to_date_does_not_keep_it_from_being_ready(
    bench18: Bench, systemd: Systemd, tmp_path: Path
) -> None:
    bench18.admin.execute("DELETE FROM cdc_embedder.migration WHERE version = 3")  # which changes nothing here
    with psycopg.connect(bench18.dsn_admin) as holder:
        holder.execute("LOCK TABLE cdc_embedder.migration IN SHARE MODE")
        with running(bench18, **environment(tmp_path)) as service:
            systemd.wait_for("STATUS=none: bringing the schema up to date")
            systemd.wait_for("READY=1")
            holder.rollback()
            service.wait_for_log("applied migration 003")
            systemd.wait_for("STATUS=columns: none configured; .*")
            assert service.stop() == 0


STUCK = """
import pathlib
from cdc_embedder import pipeline
pipeline.STUCK_SECONDS = 1.0
sign, choose = pathlib.Path(__file__).with_name("stuck"), pipeline.Pipeline._choose
pipeline.Pipeline._choose = lambda self: None if sign.exists() else choose(self)
"""


def healthz(service: Service) -> tuple[int, str]:
    [port] = re.findall(r"health is served at http://127\.0\.0\.1:(\d+)/", service.log)
    with closing(http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)) as connection:
        connection.request("GET", "/healthz")
        response = connection.getresponse()
        return response.status, json.loads(response.read())["status"]


def test_one_that_is_stuck_is_given_to_the_watchdog_and_one_with_a_slow_model_is_not(
    bench18: Bench, systemd: Systemd, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(STUCK)
    make_model(bench18, delay_s=8)
    make_documents(bench18, 4)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with running(bench18, **environment(tmp_path, PYTHONPATH=path, CDC_EMBEDDER_HTTP="127.0.0.1:0")) as service:
        service.wait_for_log("streaming from the slot")
        until(lambda: one(bench18, "SELECT count(*) FROM cdc_embedder.in_flight"), "the model was never asked")
        for id in (1, 2, 3):  # more than are with the model at once: some wait for it
            bench18.admin.execute("UPDATE documents SET body = 'more for it' WHERE id = %s", (id,))
            time.sleep(0.5)
        systemd.lines.clear()
        systemd.wait_for("WATCHDOG=1")
        assert one(bench18, "SELECT count(*) FROM cdc_embedder.in_flight"), "it is with the model still"
        assert healthz(service) == (200, "alive")
        wait_caught_up(bench18)
        (tmp_path / "stuck").touch()
        bench18.admin.execute("UPDATE documents SET body = 'nobody takes it'")
        until(lambda: healthz(service) == (503, "stuck"), "it was never stuck")
        assert systemd.silent_about("WATCHDOG=1", 2.0)
        (tmp_path / "stuck").unlink()
        systemd.lines.clear()
        systemd.wait_for("WATCHDOG=1")
        assert healthz(service) == (200, "alive")


UNENDING = """
import asyncio
from cdc_embedder import answering, working
working.STUCK_SECONDS = 1.0
async def run(self):
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            pass
answering.Answering.run = run
"""


def test_one_in_which_something_does_not_end_is_given_to_the_watchdog(
    bench18: Bench, systemd: Systemd, tmp_path: Path
) -> None:
    """A bug of that kind would otherwise hold the slot for ever, behind an instance that seems to work."""
    (tmp_path / "sitecustomize.py").write_text(UNENDING)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with running(bench18, **environment(tmp_path, PYTHONPATH=path, CDC_EMBEDDER_HTTP="127.0.0.1:0")) as service:
        service.wait_for_log("streaming from the slot")
        systemd.wait_for("WATCHDOG=1")
        bench18.admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND backend_type = 'walsender'"
        )
        until(lambda: healthz(service) == (503, "stuck"), "it was never stuck", lambda: service.log)
        assert systemd.silent_about("WATCHDOG=1", 2.0)


def test_one_that_is_frozen_is_silent(bench18: Bench, systemd: Systemd, tmp_path: Path) -> None:
    with running(bench18, **environment(tmp_path)) as service:
        systemd.wait_for("WATCHDOG=1")
        service.signal(signal.SIGSTOP)
        assert systemd.silent_about("WATCHDOG=1", 2.0)
        service.signal(signal.SIGCONT)
        systemd.lines.clear()
        systemd.wait_for("WATCHDOG=1")


def test_a_statement_may_take_its_time_before_it_counts_as_stuck() -> None:
    assert int(PINS["statement_timeout"]) / 1000 + GRACE_SECONDS < STUCK_SECONDS


def one(bench: Bench, statement: str) -> int:
    row = bench.admin.execute(statement).fetchone()  # type: ignore[arg-type]
    assert row is not None
    return int(row[0])


@pytest.mark.parametrize(
    ("given", "watchdog_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "3000000"}, None),
        ({"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "3000000"}, 3.0),
        ({"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "0"}, None),
        ({"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
        ({"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 3.0),
    ],
)
def test_the_watchdog_is_fed_where_it_was_asked_for_of_this_process(
    given: dict[str, str], watchdog_s: float | None
) -> None:
    notifier = Notifier(given)
    assert notifier.watchdog_s == watchdog_s
    notifier.say("READY=1")  # nobody listens, and nothing is raised


def test_an_abstract_socket_is_one_too() -> None:
    name = f"@cdc-embedder-{os.getpid()}"
    systemd = Systemd("\0" + name[1:])
    Notifier({"NOTIFY_SOCKET": name}).say("READY=1", "STATUS=works")
    systemd.listen()
    assert systemd.lines == ["READY=1", "STATUS=works"]
    systemd.close()
