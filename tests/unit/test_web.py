"""Health over real sockets: what is answered, what is refused, and that nobody who asks can hold up anybody else."""

from __future__ import annotations

import asyncio
import base64
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

import numpy as np
import pytest

from cdc_embedder import listening, openai_api
from cdc_embedder.embedding.base import ModelSpec
from cdc_embedder.embedding.fake import fake_vector
from cdc_embedder.embedding.registry import Embedders
from cdc_embedder.errors import Misconfigured
from cdc_embedder.querying import Queries
from cdc_embedder.web import Health, address, serving
from tests.service import until

pytestmark = pytest.mark.asyncio


FREE = ("127.0.0.1", 0)
HALF_A_REQUEST = (
    b"POST /v1/embeddings HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
)

PLAIN = ModelSpec("plain", 8, "fake", query_prompt="q: ", document_prompt="d: ")
RAW = ModelSpec("raw", 8, "fake", normalize=False)
SLOW = ModelSpec("slow", 8, "fake", options={"delay_s": 0.3})
FUSSY = ModelSpec("fussy", 8, "fake", options={"reject": "poison"})
DOWN = ModelSpec("down", 8, "fake", options={"down": True})
BROKEN = ModelSpec("broken", 8, "no such backend")


async def nothing() -> None:
    """What the working instance does about an unknown name, where the table has not changed."""


@asynccontextmanager
async def answering(
    where: tuple[str, int] | None = FREE,
    health: Health | None = None,
    *,
    explicit: bool = True,
    token: str | None = None,
    max_bytes: int = 8 << 20,
    ready: bool = True,
) -> AsyncIterator[tuple[list[tuple[str, int]], Queries]]:
    """The addresses served, and the queries behind them: of an instance that works, or of one that is not `ready`."""
    embedders = Embedders()
    queries = Queries(embedders)
    queries.models = {spec.name: spec for spec in (PLAIN, RAW, SLOW, FUSSY, DOWN, BROKEN)}
    queries.refresh = nothing if ready else None
    health = health or Health()
    try:
        async with serving(
            where,
            health,
            "my_slot",
            queries,
            lambda: b"metrics 1\n",
            explicit=explicit,
            token=token,
            max_bytes=max_bytes,
        ) as addresses:
            yield addresses, queries
    finally:
        await queries.close()
        embedders.close()


@asynccontextmanager
async def served(health: Health | None = None, **options: Any) -> AsyncIterator[int]:
    """A free port."""
    async with answering(health=health, **options) as (addresses, _):
        yield addresses[0][1]


async def ask(
    port: int,
    path: str,
    method: str = "GET",
    host: str = "127.0.0.1",
    body: bytes | Iterator[bytes] | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, dict[str, Any], Any]:
    """Status, body and headers, as the standard library's client understands the answer."""

    def request() -> tuple[int, dict[str, Any], Any]:
        with closing(HTTPConnection(host, port, timeout=30)) as connection:
            connection.request(method, path, body, headers or {})
            response: HTTPResponse = connection.getresponse()
            content = response.read()
            return response.status, json.loads(content) if content else {}, response.headers

    return await asyncio.to_thread(request)


async def post(port: int, fields: object, **headers: str) -> tuple[int, dict[str, Any], Any]:
    """What is answered to these fields."""
    sent = {"Content-Type": "application/json"} | headers
    return await ask(port, "/v1/embeddings", "POST", body=json.dumps(fields).encode(), headers=sent)


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
    async with served() as port:
        status, body, headers = await ask(port, "/readyz", "HEAD")
        assert (status, body) == (503, {})
        answer = await raw(port, b"GET /readyz HTTP/1.1\r\nHost: h\r\n\r\n")
        assert int(headers["Content-Length"]) == len(answer.partition(b"\r\n\r\n")[2]) > 0
        assert (await raw(port, b"HEAD /nowhere HTTP/1.1\r\nHost: h\r\n\r\n")).endswith(b"\r\n\r\n")


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
        ("GET /healthz HTTP/2.0", 200),
        (" /healthz HTTP/1.1", 400),
        ("", 400),
        ("GET /h\xe4lthz HTTP/1.1", 400),
        ("\x16\x03\x01\x02\x00\x01", 400),
        ("GET /healthz HTTP/1.0", 200),
    ],
)
async def test_only_get_and_head_of_two_paths_are_understood(request_line: str, status: int) -> None:
    async with served() as port:
        answer = await raw(port, request_line.encode("latin-1") + b"\r\nHost: h\r\n\r\n")
        head = answer.partition(b"\r\n\r\n")[0].decode().split("\r\n")
        assert head[0].startswith(f"HTTP/1.1 {status} ")
        assert ("allow: GET, HEAD" in head) == (status == 405)
        assert (await ask(port, "/healthz"))[0] == 200


async def test_a_request_that_is_too_long_is_refused_and_one_without_end_is_cut() -> None:
    async with served() as port:
        long = b"GET /healthz HTTP/1.1\r\nHost: h\r\nA: " + b"a" * (listening.HEAD_BYTES + 1)
        assert (await raw(port, long)).startswith(b"HTTP/1.1 400 ")

        def without_end() -> None:
            with socket.create_connection(("127.0.0.1", port)) as client:
                while True:
                    client.sendall(b"a" * 65536)

        with pytest.raises(ConnectionError):
            await asyncio.to_thread(without_end)
        assert (await ask(port, "/healthz"))[0] == 200


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HTTP/1.1\r\n"])
async def test_a_client_that_is_too_slow_is_sent_away_and_holds_up_nobody(
    sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "HEAD_SECONDS", 0.5)
    async with served() as port:
        slow = asyncio.create_task(raw(port, sent))
        assert (await ask(port, "/healthz"))[0] == 200
        assert (await slow).startswith(b"HTTP/1.1 408 ")


async def test_a_client_that_goes_away_in_the_middle_is_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    async with served() as port:
        for linger in (b"", b"GET /hea", b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
                client.sendall(linger)
        assert (await ask(port, "/healthz"))[0] == 200
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []


async def test_no_more_than_so_many_connections_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "CONNECTIONS", 2)
    async with served() as port:
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        assert await raw(port, b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n") == b""
        idle[0][1].write(b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n")
        assert (await idle[0][0].read()).startswith(b"HTTP/1.1 200 ")
        assert (await ask(port, "/healthz"))[0] == 200
        for _, writer in idle:
            writer.close()


@pytest.mark.parametrize("sent", [b"", b"GET /hea", HALF_A_REQUEST])
async def test_the_end_cuts_who_is_still_connected(sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async with served() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        assert (await ask(port, "/healthz"))[0] == 200
    assert len(asyncio.all_tasks()) == 1
    with pytest.raises((EOFError, ConnectionError)):
        await reader.readexactly(1)
    writer.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    assert [record.message for record in caplog.records if record.levelno > logging.INFO] == []


async def test_what_the_service_raises_comes_through_and_the_port_is_free_again() -> None:
    with pytest.raises(KeyError, match="of the service"):
        async with served() as port:
            raise KeyError("of the service")
    async with answering(("127.0.0.1", port)) as (addresses, _):
        assert addresses == [("127.0.0.1", port)]


async def test_ipv6_is_served_and_logged_with_brackets(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    where = address("[::1]:0")
    async with answering(where) as ([(host, port)], _):
        assert host == "::1"
        assert (await ask(port, "/healthz", host="::1"))[0] == 200
        assert caplog.messages == [
            f"health is served at http://[::1]:{port}/healthz and /readyz, /metrics, embeddings at /v1/embeddings"
        ]


async def test_off_listens_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with answering(address("off")) as (addresses, _):
        assert addresses == []
    assert caplog.messages == []


async def test_the_default_address_in_use_is_a_warning(taken: int, caplog: pytest.LogCaptureFixture) -> None:
    async with answering(("127.0.0.1", taken), explicit=False) as (addresses, _):
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
        async with answering(("127.0.0.1", taken)):
            pytest.fail("it was taken")
    assert "CDC_EMBEDDER_HTTP" in refused.value.hint


@pytest.mark.parametrize("host", ["x" * 64 + ".invalid", "192.0.2.1"])
async def test_an_explicit_host_that_is_not_this_one_is_a_mistake(host: str) -> None:
    with pytest.raises(Misconfigured, match="health cannot be served"):
        async with answering((host, 0)):
            pytest.fail("it is not ours")


async def test_answers_do_not_wait_for_threads_that_work() -> None:
    """A model call runs in a thread; health is answered meanwhile."""
    release = threading.Event()
    async with served() as port:
        working = asyncio.create_task(asyncio.to_thread(release.wait))
        assert (await ask(port, "/healthz"))[0] == 200
        release.set()
        await working


def right(body: dict[str, Any], model: str, *texts: str) -> bool:
    """The fake model's vectors of these texts, in order, as lists of numbers."""
    data = body["data"]
    assert [each["index"] for each in data] == list(range(len(texts)))
    return all(
        np.allclose(e["embedding"], fake_vector(model, t, 8), atol=1e-6) for e, t in zip(data, texts, strict=True)
    )


async def test_a_text_and_a_list_of_texts_are_embedded() -> None:
    async with served() as port:
        status, body, headers = await post(port, {"model": "plain", "input": "one text", "user": "x"})
        assert (status, headers["Content-Type"], headers["Server"]) == (200, "application/json", None)
        assert body.keys() == {"object", "data", "model", "usage"}
        assert (body["object"], body["model"], body["data"][0]["object"]) == ("list", "plain", "embedding")
        assert body["usage"] == {"prompt_tokens": 2, "total_tokens": 2}
        assert right(body, "plain", "one text")
        texts = [f"größe {n}" for n in range(50)]
        nulls = {"encoding_format": None, "dimensions": None, "input_type": None}
        assert right((await post(port, {"model": "plain", "input": texts} | nulls))[1], "plain", *texts)


async def test_prompts_are_put_before_the_text_where_it_says_what_it_is() -> None:
    async with served() as port:
        for input_type, prompt in (("none", ""), ("query", "q: "), ("document", "d: ")):
            _, body, _ = await post(port, {"model": "plain", "input": ["a", "b"], "input_type": input_type})
            assert right(body, "plain", prompt + "a", prompt + "b")


async def test_base64_is_the_same_numbers_in_little_endian_single_precision() -> None:
    async with served() as port:
        _, body, _ = await post(port, {"model": "plain", "input": ["a", "b"], "encoding_format": "base64"})
        for each in body["data"]:
            each["embedding"] = np.frombuffer(base64.b64decode(each["embedding"]), "<f4")
        assert right(body, "plain", "a", "b")


async def test_fewer_dimensions_are_the_first_ones_normalized_again() -> None:
    async with served() as port:
        for model, scale in (("plain", True), ("raw", False)):
            _, body, _ = await post(port, {"model": model, "input": "a", "dimensions": 3})
            expected = fake_vector(model, "a", 8)[:3]
            expected = expected / np.linalg.norm(expected) if scale else expected
            assert np.allclose(body["data"][0]["embedding"], expected, atol=1e-6)
        assert right((await post(port, {"model": "plain", "input": "a", "dimensions": 8}))[1], "plain", "a")
        status, body, _ = await post(port, {"model": "plain", "input": "a", "dimensions": 9})
        assert (status, body["error"]["param"]) == (400, "dimensions")
    zero = np.array([[0, 0, 1]], np.float32)
    assert not openai_api._cut(zero, 2, normalize=False).any()
    with pytest.raises(openai_api.Refusal, match="text 1: nothing is left"):
        openai_api._cut(zero, 2, normalize=True)


SECRET = "what nobody else may read"


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ([SECRET], 400, None, None),
        ({"input": SECRET}, 400, "model", None),
        ({"input": SECRET, "model": 5}, 400, "model", None),
        ({"input": SECRET, "model": "other"}, 404, "model", "model_not_found"),
        ({"model": "plain"}, 400, "input", None),
        ({"model": "plain", "input": ""}, 400, "input", None),
        ({"model": "plain", "input": []}, 400, "input", None),
        ({"model": "plain", "input": None}, 400, "input", None),
        ({"model": "plain", "input": {"text": SECRET}}, 400, "input", None),
        ({"model": "plain", "input": [SECRET, ""]}, 400, "input", None),
        ({"model": "plain", "input": [SECRET, None]}, 400, "input", None),
        ({"model": "plain", "input": [1, 2]}, 400, "input", None),
        ({"model": "plain", "input": [[1, 2], [3]]}, 400, "input", None),
        ({"model": "plain", "input": [SECRET] * 2049}, 400, "input", None),
        ({"model": "plain", "input": SECRET, "encoding_format": SECRET}, 400, "encoding_format", None),
        ({"model": "plain", "input": SECRET, "encoding_format": 1}, 400, "encoding_format", None),
        ({"model": "plain", "input": SECRET, "input_type": "passage"}, 400, "input_type", None),
        ({"model": "plain", "input": SECRET, "dimensions": 0}, 400, "dimensions", None),
        ({"model": "plain", "input": SECRET, "dimensions": True}, 400, "dimensions", None),
        ({"model": "plain", "input": SECRET, "dimensions": "8"}, 400, "dimensions", None),
        ({"model": "plain", "input": SECRET, "input_typ": "query"}, 400, "input_typ", None),
        ({"model": "plain", "input": SECRET, SECRET: 1}, 400, None, None),
        ({"model": "fussy", "input": ["fine", SECRET + " poison"]}, 400, "input", None),
        ({"model": "down", "input": SECRET}, 503, None, "service_unavailable"),
        ({"model": "broken", "input": SECRET}, 500, None, "model_fault"),
    ],
)
async def test_a_mistake_is_an_error_in_openais_form_that_holds_no_text(
    fields: object, status: int, param: str | None, code: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with served() as port:
        answered, body, headers = await post(port, fields)
    assert answered == status
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    kind = "invalid_request_error" if status < 500 else "server_error"
    assert (body["error"]["type"], body["error"]["param"], body["error"]["code"]) == (kind, param, code)
    assert (headers["Retry-After"] is not None) == (status == 503)
    assert SECRET not in str(body) + caplog.text


@pytest.mark.parametrize("body", [b"", b"{", b'"\xff"', b'{"model": "plain", "input": "\\ud800"}', b"[" * 100_000])
async def test_what_is_not_json_is_refused(body: bytes) -> None:
    async with served() as port:
        json_type = {"Content-Type": "application/json; charset=utf-8"}
        status, answer, _ = await ask(port, "/v1/embeddings", "POST", body=body, headers=json_type)
        assert (status, answer["error"]["message"]) == (400, "the body is not JSON")
        status, answer, _ = await ask(
            port, "/v1/embeddings", "POST", body=b"{}", headers={"Content-Type": "text/plain"}
        )
        assert (status, answer["error"]["type"]) == (415, "invalid_request_error")


async def test_a_token_is_asked_for_by_all_but_the_probes() -> None:
    token = "a-token-of-some-length"
    fields = {"model": "plain", "input": "a"}
    async with served(token=token) as port:
        for wrong in ("", "Bearer", f"Bearer {token}x", f"Bearer {token[:-1]}", f"Basic {token}", token, "Bearer ü"):
            status, body, headers = await post(port, fields, Authorization=wrong)
            assert (status, body["error"]["code"]) == (401, "invalid_api_key")
            assert headers["WWW-Authenticate"] == "Bearer"
            assert token not in str(body)
        assert (await ask(port, "/v1/models"))[0] == 401
        assert (await post(port, {"model": "plain", "input": "x" * 5_000_000}))[0] == 401, "though it was not read"
        assert right((await post(port, fields, Authorization=f"Bearer {token}"))[1], "plain", "a")
        assert (await ask(port, "/healthz"))[0] == 200
        assert (await ask(port, "/readyz"))[0] == 503


async def test_embeddings_are_closed_where_others_reach_them_and_no_token_is_set(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fields = {"model": "plain", "input": "a"}
    async with answering(("0.0.0.0", 0)) as ([(_, port)], _):
        status, body, _ = await post(port, fields, Authorization="Bearer guessed")
        assert (status, body["error"]["code"]) == (403, "http_token_missing")
        assert "CDC_EMBEDDER_HTTP_TOKEN" in body["error"]["message"]
        assert (await ask(port, "/v1/models"))[0] == 403
        assert (await ask(port, "/healthz"))[0] == 200
    assert ["CDC_EMBEDDER_HTTP_TOKEN" in record.message for record in caplog.records] == [True]
    async with answering(("0.0.0.0", 0), token="a-token-of-some-length") as ([(_, port)], _):
        assert (await post(port, fields, Authorization="bearer a-token-of-some-length"))[0] == 200


@pytest.mark.parametrize("times", [1.5, 100])
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_that_is_too_large_is_refused_however_it_comes(times: float, chunked: bool) -> None:
    async with served(max_bytes=100_000) as port:
        pieces = [b"x" * 10_000] * int(10 * times)
        body = iter(pieces) if chunked else b"".join(pieces)
        headers = {"Content-Type": "application/json"}
        try:
            status, answer, _ = await ask(port, "/v1/embeddings", "POST", body=body, headers=headers)
            assert (status, answer["error"]["type"]) == (413, "invalid_request_error")
        except ConnectionError:
            assert times == 100  # cut off while it still sent
        assert (await post(port, {"model": "plain", "input": "x" * 99_000}))[0] == 200


@pytest.mark.parametrize("header", ["Content-Length: 2000000", "Content-Length: 90000000\r\nExpect: 100-continue"])
async def test_a_body_that_is_announced_too_large_is_refused_unread(header: str) -> None:
    async with served(max_bytes=100_000) as port:
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n{header}\r\n\r\n"
        assert (await raw(port, head.encode())).startswith(b"HTTP/1.1 413 ")


async def test_a_body_that_is_not_what_was_announced_harms_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(openai_api, "BODY_SECONDS", 0.5)
    monkeypatch.setattr(listening, "IDLE_SECONDS", 1)
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
    body = b'{"model": "plain", "input": "a"}'
    async with served() as port:
        more = await raw(port, head + b"Content-Length: 500\r\n\r\n" + body)
        assert more.startswith(b"HTTP/1.1 408 ")
        fewer = await raw(port, head + b"Content-Length: 5\r\n\r\n" + body)
        assert fewer.startswith(b"HTTP/1.1 400 ")
        chunks = await raw(port, head + b"Transfer-Encoding: chunked\r\n\r\nno size\r\n" + body)
        assert chunks.startswith(b"HTTP/1.1 400 ")
        for length in (b"-1", b"x", b"5, 6"):
            assert (await raw(port, head + b"Content-Length: " + length + b"\r\n\r\n" + body)).startswith(
                b"HTTP/1.1 400 "
            )
        assert (await ask(port, "/healthz"))[0] == 200
    assert [record.message for record in caplog.records if record.levelno > logging.INFO] == []


async def test_one_connection_serves_one_request_after_another() -> None:
    async with served() as port:

        def requests() -> list[int]:
            with closing(HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
                connection.connect()
                sock, found = connection.sock, []
                for text in ("a", "", "b"):
                    body = json.dumps({"model": "plain", "input": text})
                    connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
                    response = connection.getresponse()
                    response.read()
                    found.append(response.status)
                    assert connection.sock is sock
                return found

        assert await asyncio.to_thread(requests) == [200, 400, 200]


async def test_the_next_request_of_a_connection_has_to_come_in_time_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "HEAD_SECONDS", 0.5)
    async with served() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /v1/models HTTP/1.1\r\nHost: h\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
        await reader.readuntil(b"]}\n")
        writer.write(b"GET /v1/mod")
        async with asyncio.timeout(60):
            assert (await reader.read()).startswith(b"HTTP/1.1 408 ")
        writer.close()


async def test_too_many_at_once_are_asked_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_api, "REQUESTS_AT_ONCE", 2)
    async with served() as port:
        answers = await asyncio.gather(*(post(port, {"model": "slow", "input": "a"}) for _ in range(4)))
        assert sorted(status for status, _, _ in answers) == [200, 200, 429, 429]
        refused = next((body, headers) for status, body, headers in answers if status == 429)
        assert (refused[0]["error"]["code"], refused[1]["Retry-After"]) == ("rate_limit_exceeded", "1")
        assert (await post(port, {"model": "slow", "input": "a"}))[0] == 200


async def test_an_instance_that_is_not_ready_says_so_and_when_to_come_again() -> None:
    async with served(ready=False) as port:
        status, body, headers = await post(port, {"model": "plain", "input": "a"})
        assert (status, body["error"]["type"], headers["Retry-After"]) == (503, "server_error", "1")
        assert headers["Connection"] == "close", "another one may lead to the instance that works"


async def begun(queries: Queries) -> None:
    await asyncio.to_thread(until, lambda: queries._queues, "nothing was asked for")


async def test_whoever_hangs_up_is_not_worked_for() -> None:
    async with answering() as (addresses, queries):
        body = json.dumps({"model": "slow", "input": ["a"] * 2000}).encode()
        _, writer = await asyncio.open_connection(*addresses[0])
        head = (
            f"POST /v1/embeddings HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        writer.write(head.encode() + b"\r\n\r\n" + body)
        await begun(queries)
        [queue] = queries._queues.values()
        [request] = queue.requests
        writer.close()
        await asyncio.wait({request.answer})
        assert request.answer.cancelled()
        assert request.taken < 2000


async def test_the_end_of_the_service_does_not_wait_for_who_asks() -> None:
    async with answering() as (addresses, queries):
        asked = asyncio.create_task(post(addresses[0][1], {"model": "slow", "input": ["a"] * 2000}))
        await begun(queries)
        await queries.close()
        status, body, _ = await asked
        assert (status, body["error"]["message"]) == (503, "the service is stopping")


async def test_models_are_listed() -> None:
    async with served() as port:
        status, body, _ = await ask(port, "/v1/models")
        assert (status, body["object"]) == (200, "list")
        assert [each["id"] for each in body["data"]] == ["broken", "down", "fussy", "plain", "raw", "slow"]
        assert body["data"][0] == {"id": "broken", "object": "model", "created": 0, "owned_by": "cdc-embedder"}


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/v1/embeddings", 405, "POST"),
        ("POST", "/v1/models", 405, "GET, HEAD"),
        ("POST", "/v1/completions", 404, None),
        ("POST", "/v1/embeddings/", 404, None),
    ],
)
async def test_what_openai_has_besides_is_an_error_in_its_form(
    method: str, path: str, status: int, allow: str | None
) -> None:
    async with served() as port:
        answered, body, headers = await ask(port, path, method)
        assert (answered, headers["Allow"]) == (status, allow)
        assert body["error"].keys() == {"message", "type", "param", "code"}


async def test_an_error_of_ours_is_told_without_the_text_that_it_quotes(caplog: pytest.LogCaptureFixture) -> None:
    async with answering() as (addresses, queries):

        async def fail() -> None:
            raise ValueError(SECRET)

        queries.refresh = fail
        status, body, _ = await post(addresses[0][1], {"model": "other", "input": SECRET})
    assert (status, body["error"]["code"]) == (500, "internal_error")
    assert "ValueError at" in caplog.text
    assert "in fail" in caplog.text
    assert SECRET not in str(body) + caplog.text.replace("raise ValueError(SECRET)", "")


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
