"""Health over real sockets: what is answered, what is refused, and that nobody who asks can hold up anybody else."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import pytest

from cdc_embedder import web
from cdc_embedder.errors import Misconfigured
from cdc_embedder.web import Health, address, serving

pytestmark = pytest.mark.asyncio


@asynccontextmanager
async def served(health: Health, host: str = "127.0.0.1") -> AsyncIterator[int]:
    """Health on a free port."""
    async with serving((host, 0), health, "my_slot", explicit=True) as addresses:
        yield addresses[0][1]


async def ask(port: int, path: str, method: str = "GET", host: str = "127.0.0.1") -> tuple[int, dict[str, Any], Any]:
    """Status, body and headers, as the standard library's client understands the answer."""

    def request() -> tuple[int, dict[str, Any], Any]:
        with closing(HTTPConnection(host, port, timeout=30)) as connection:
            connection.request(method, path)
            response: HTTPResponse = connection.getresponse()
            content = response.read()
            return response.status, json.loads(content) if content else {}, response.headers

    return await asyncio.to_thread(request)


async def raw(port: int, request: bytes) -> bytes:
    """All that is answered to these bytes, until the server closes or cuts."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody else listens on."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


async def test_the_process_is_alive_whatever_the_service_does() -> None:
    health = Health()
    async with served(health) as port:
        assert (await ask(port, "/healthz"))[:2] == (200, {"status": "alive"})
        health.stopping()
        status, body, headers = await ask(port, "/healthz?probe=1")
        assert (status, body) == (200, {"status": "alive"})
        assert headers["Connection"] == "close"
        assert headers["Content-Type"] == "application/json"


async def test_it_is_ready_while_it_works_and_while_it_waits_ready() -> None:
    health = Health()
    async with served(health) as port:

        async def ready() -> tuple[int, str, str, str]:
            status, body, _ = await ask(port, "/readyz")
            assert body.keys() == {"status", "role", "slot", "reason"}
            assert body["slot"] == "my_slot"
            return status, body["status"], body["role"], body["reason"]

        assert await ready() == (503, "not ready", "none", "starting")
        health.waiting("another instance serves the slot")
        assert await ready() == (200, "ready", "waiting", "another instance serves the slot")
        health.working()
        assert await ready() == (200, "ready", "working", "")
        health.away("the server is “away”")
        assert await ready() == (503, "not ready", "none", "the server is “away”")
        health.stopping()
        health.working()
        assert await ready() == (503, "not ready", "none", "stopping")


async def test_head_is_get_without_the_body() -> None:
    async with served(Health()) as port:
        status, body, headers = await ask(port, "/readyz", "HEAD")
        assert (status, body) == (503, {})
        answer = await raw(port, b"GET /readyz HTTP/1.1\r\nHost: h\r\n\r\n")
        assert int(headers["Content-Length"]) == len(answer.partition(b"\r\n\r\n")[2]) > 0
        assert (await raw(port, b"HEAD /nowhere HTTP/1.1\r\n\r\n")).endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET / HTTP/1.1", 404),
        ("GET /healthz/ HTTP/1.1", 404),
        ("POST /nowhere HTTP/1.1", 404),
        ("POST /healthz HTTP/1.1", 405),
        ("DELETE /readyz HTTP/1.1", 405),
        ("get /readyz HTTP/1.1", 405),
        ("GET /healthz", 400),
        ("GET  /healthz HTTP/1.1", 400),
        ("GET /healthz HTTP/2.0", 400),
        (" /healthz HTTP/1.1", 400),
        ("", 400),
        ("GET /h\xe4lthz HTTP/1.1", 400),
        ("\x16\x03\x01\x02\x00\x01", 400),
        ("GET /healthz HTTP/1.0", 200),
    ],
)
async def test_only_get_and_head_of_two_paths_are_understood(request_line: str, status: int) -> None:
    async with served(Health()) as port:
        answer = await raw(port, request_line.encode("latin-1") + b"\r\nHost: h\r\n\r\n")
        head = answer.partition(b"\r\n\r\n")[0].decode().split("\r\n")
        assert head[0].startswith(f"HTTP/1.1 {status} ")
        assert ("Allow: GET, HEAD" in head) == (status == 405)
        assert (await ask(port, "/healthz"))[0] == 200


async def test_a_request_that_is_too_long_is_refused_and_one_without_end_is_cut() -> None:
    async with served(Health()) as port:
        long = b"GET /healthz HTTP/1.1\r\nA: " + b"a" * (web.REQUEST_BYTES + 1) + b"\r\n\r\n"
        assert (await raw(port, long)).startswith(b"HTTP/1.1 400 ")

        def without_end() -> None:
            with socket.create_connection(("127.0.0.1", port)) as client:
                while True:
                    client.sendall(b"a" * 65536)

        with pytest.raises(ConnectionError):
            await asyncio.to_thread(without_end)
        assert (await ask(port, "/healthz"))[0] == 200


async def test_a_client_that_is_too_slow_is_sent_away_and_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "REQUEST_SECONDS", 0.5)
    async with served(Health()) as port:
        slow = asyncio.create_task(raw(port, b"GET /healthz HTTP/1.1\r\n"))
        assert (await ask(port, "/healthz"))[0] == 200
        assert (await slow).startswith(b"HTTP/1.1 408 ")


async def test_a_client_that_goes_away_in_the_middle_is_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    async with served(Health()) as port:
        for linger in (b"", b"GET /hea", b"GET /healthz HTTP/1.1\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
                client.sendall(linger)
        assert (await ask(port, "/healthz"))[0] == 200
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []


async def test_no_more_than_so_many_connections_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "CONNECTIONS", 2)
    async with served(Health()) as port:
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        assert await raw(port, b"GET /healthz HTTP/1.1\r\n\r\n") == b""
        idle[0][1].write(b"GET /healthz HTTP/1.1\r\n\r\n")
        assert (await idle[0][0].read()).startswith(b"HTTP/1.1 200 ")
        assert (await ask(port, "/healthz"))[0] == 200
        for _, writer in idle:
            writer.close()


async def test_the_end_cuts_who_is_still_connected() -> None:
    async with served(Health()) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert (await ask(port, "/healthz"))[0] == 200
    assert len(asyncio.all_tasks()) == 1
    with pytest.raises((EOFError, ConnectionError)):
        await reader.readexactly(1)
    writer.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


async def test_what_the_service_raises_comes_through_and_the_port_is_free_again() -> None:
    with pytest.raises(KeyError, match="of the service"):
        async with served(Health()) as port:
            raise KeyError("of the service")
    async with serving(("127.0.0.1", port), Health(), "s", explicit=True) as addresses:
        assert addresses == [("127.0.0.1", port)]


async def test_ipv6_is_served_and_logged_with_brackets(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    where = address("[::1]:0")
    async with serving(where, Health(), "s", explicit=True) as [(host, port)]:
        assert host == "::1"
        assert (await ask(port, "/healthz", host="::1"))[0] == 200
        assert caplog.messages == [f"health is served at http://[::1]:{port}/healthz and /readyz"]


async def test_off_listens_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with serving(address("off"), Health(), "s", explicit=True) as addresses:
        assert addresses == []
    assert caplog.messages == []


async def test_the_default_address_in_use_is_a_warning(taken: int, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(("127.0.0.1", taken), Health(), "s", explicit=False) as addresses:
        assert addresses == []
    assert [(record.levelname, record.message) for record in caplog.records] == [
        (
            "WARNING",
            f"health cannot be served at http://127.0.0.1:{taken}: Address already in use; going on without."
            " CDC_EMBEDDER_HTTP names another address, or off",
        )
    ]


async def test_an_explicit_address_in_use_is_a_mistake_with_a_remedy(taken: int) -> None:
    with pytest.raises(Misconfigured, match="Address already in use") as refused:
        async with serving(("127.0.0.1", taken), Health(), "s", explicit=True):
            pytest.fail("it was taken")
    assert "CDC_EMBEDDER_HTTP" in refused.value.hint


@pytest.mark.parametrize("host", ["x" * 64 + ".invalid", "192.0.2.1"])
async def test_an_explicit_host_that_is_not_this_one_is_a_mistake(host: str) -> None:
    with pytest.raises(Misconfigured, match="health cannot be served"):
        async with serving((host, 0), Health(), "s", explicit=True):
            pytest.fail("it is not ours")


async def test_answers_do_not_wait_for_threads_that_work() -> None:
    """A model call runs in a thread; health is answered meanwhile."""
    release = threading.Event()
    async with served(Health()) as port:
        working = asyncio.create_task(asyncio.to_thread(release.wait))
        assert (await ask(port, "/healthz"))[0] == 200
        release.set()
        await working


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("127.0.0.1:8700", ("127.0.0.1", 8700)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),
        ("localhost:65535", ("localhost", 65535)),
        ("[::1]:8700", ("::1", 8700)),
        ("off", None),
    ],
)
async def test_an_address_is_host_and_port(text: str, parsed: tuple[str, int] | None) -> None:
    assert address(text) == parsed


@pytest.mark.parametrize(
    "text",
    ["", "8700", ":8700", "h:", "h:x", "h:65536", "h:-1", "h:٣", "::1:8700", "[::1]", "[]:1", "on", "http://h:1"],
)
async def test_anything_else_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:8700|\[::1\]:8700"):
        address(text)


def start(*arguments: str) -> subprocess.Popen[str]:
    """The service as a process, where no database can be."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CDC_EMBEDDER_", "PG"))}
    command = [sys.executable, "-m", "cdc_embedder", "run", "--dsn", "host=/nowhere port=1", *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


async def test_without_a_database_the_process_is_alive_and_not_ready() -> None:
    with start("--http", "127.0.0.1:0") as process:
        assert process.stderr is not None
        line = await asyncio.to_thread(process.stderr.readline)
        found = re.search(r"health is served at http://127\.0\.0\.1:(\d+)/healthz", line)
        assert found is not None, line
        assert (await ask(int(found[1]), "/healthz"))[0] == 200
        status, body, _ = await ask(int(found[1]), "/readyz")
        assert (status, body["role"], body["slot"]) == (503, "none", "cdc_embedder")
        process.terminate()
        await asyncio.to_thread(process.communicate)
    assert process.returncode == 0


async def test_a_process_that_cannot_listen_where_it_was_told_to_leaves_with_a_sentence(taken: int) -> None:
    with start("--http", f"127.0.0.1:{taken}") as process:
        _, log = await asyncio.to_thread(process.communicate)
    assert process.returncode == 1
    [line] = log.splitlines()
    assert "Address already in use. give CDC_EMBEDDER_HTTP another address, or off" in line
