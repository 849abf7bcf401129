"""The HTTP embedder against a real server that speaks OpenAI's embeddings API, well and badly."""

from __future__ import annotations

import base64
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from cdc_embedder.embedding.base import InputType, ModelSpec
from cdc_embedder.embedding.fake import fake_vector
from cdc_embedder.embedding.http import DEFAULT_BASE_URL, HttpEmbedder
from cdc_embedder.embedding.isolation import embed_isolating
from cdc_embedder.errors import EmbedderDown, ModelFault, TextRejected

DIMENSIONS = 6
KEY = "sk-very-secret"
DOCUMENT = InputType.DOCUMENT


@dataclass
class Answer:
    """What the server says next. `body` None: embeddings as they should be."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    hang: bool = False
    hang_up: bool = False


@dataclass
class Service:
    """The server's side: `answers` are used up first, then `rule` decides."""

    url: str
    answers: list[Answer] = field(default_factory=list)
    rule: Callable[[dict[str, Any]], Answer] = lambda request: Answer()
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    release: threading.Event = field(default_factory=threading.Event)
    opened: list[HttpEmbedder] = field(default_factory=list)

    @property
    def sizes(self) -> list[int]:
        return [len(request["input"]) for request in self.requests]

    def spec(self, **options: Any) -> ModelSpec:
        return ModelSpec(
            "m", DIMENSIONS, backend="openai", source="text-embedding", options={"base_url": self.url, **options}
        )

    def embedder(self, **options: Any) -> HttpEmbedder:
        self.opened.append(connect(self.spec(**options)))
        return self.opened[-1]


def connect(spec: ModelSpec, base_urls: tuple[str, ...] | None = None) -> HttpEmbedder:
    return HttpEmbedder(spec, allowed_key_envs=frozenset({"TEST_KEY"}), allowed_base_urls=base_urls, pause_s=0.001)


def vector_of(text: str) -> list[float]:
    return [float(x) for x in fake_vector("served", text, DIMENSIONS)]


def as_base64(vector: list[float]) -> str:
    return base64.b64encode(np.array(vector, dtype="<f4").tobytes()).decode()


def reply(texts: list[str], encode: Callable[[list[float]], Any] = as_base64) -> dict[str, Any]:
    data = [{"object": "embedding", "index": i, "embedding": encode(vector_of(text))} for i, text in enumerate(texts)]
    return {"object": "list", "data": data, "usage": {"prompt_tokens": 3 * len(texts), "total_tokens": 3 * len(texts)}}


@pytest.fixture
def service() -> Iterator[Service]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            served.requests.append(request)
            served.keys.append(self.headers.get("Authorization"))
            answer = served.answers.pop(0) if served.answers else served.rule(request)
            if answer.hang:
                served.release.wait(30)
            if answer.hang or answer.hang_up:
                self.close_connection = True
                return
            if self.path != "/v1/embeddings":
                answer = Answer(404, {"error": {"message": "no such path"}})
            body = reply(request["input"]) if answer.body is None else answer.body
            payload = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(answer.status)
            for name, value in {"Content-Length": str(len(payload)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, format: str, *args: Any) -> None:
            """Silence: what was asked is in `requests`."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Service(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield served
    for embedder in served.opened:
        embedder.close()
    served.release.set()
    server.shutdown()
    thread.join()
    server.server_close()


def assert_right(vectors: np.ndarray, texts: list[str]) -> None:
    np.testing.assert_allclose(vectors, [vector_of(text) for text in texts], atol=1e-6)


def test_base64_is_asked_for_and_read(service: Service) -> None:
    got = service.embedder().embed(["a", "b"], DOCUMENT)
    assert_right(got.vectors, ["a", "b"])
    assert got.tokens == 6
    assert not got.truncated.any()
    assert service.requests == [{"model": "text-embedding", "input": ["a", "b"], "encoding_format": "base64"}]


def test_float_lists_are_read_too(service: Service) -> None:
    service.rule = lambda request: Answer(body=reply(request["input"], list))
    assert_right(service.embedder().embed(["a", "b"], DOCUMENT).vectors, ["a", "b"])


def test_vectors_are_put_into_order_by_their_index(service: Service) -> None:
    def shuffled(request: dict[str, Any]) -> Answer:
        body = reply(request["input"])
        body["data"] = body["data"][::-1]
        return Answer(body=body)

    service.rule = shuffled
    assert_right(service.embedder().embed(["a", "b", "c"], DOCUMENT).vectors, ["a", "b", "c"])


def test_without_index_and_usage_the_order_of_the_texts_holds(service: Service) -> None:
    service.rule = lambda request: Answer(
        body={"data": [{"embedding": vector_of(text)} for text in request["input"]], "usage": None}
    )
    got = service.embedder().embed(["a", "b"], DOCUMENT)
    assert_right(got.vectors, ["a", "b"])
    assert got.tokens > 0


def test_no_request_holds_more_texts_than_max_batch_rows(service: Service) -> None:
    texts = [str(i) for i in range(10)]
    assert_right(service.embedder(max_batch_rows=4).embed(texts, DOCUMENT).vectors, texts)
    assert service.sizes == [4, 4, 2]


def test_no_texts_are_no_request(service: Service) -> None:
    assert service.embedder().embed([], DOCUMENT).vectors.shape == (0, DIMENSIONS)
    assert service.requests == []


def test_the_rows_prompts_are_put_before_the_text(service: Service) -> None:
    spec = ModelSpec(
        "m", DIMENSIONS, backend="openai", document_prompt="d: ", query_prompt="q: ", options={"base_url": service.url}
    )
    embedder = connect(spec)
    service.opened.append(embedder)
    for input_type in (DOCUMENT, InputType.QUERY, InputType.NONE):
        embedder.embed(["t"], input_type)
    assert [request["input"] for request in service.requests] == [["d: t"], ["q: t"], ["t"]]
    assert service.requests[0]["model"] == "m"


def test_texts_of_any_script_arrive_as_they_are(service: Service) -> None:
    texts = ["naïve", "日本語", "😀", 'quote " and \\ and \n', "", "null \x01"]
    assert_right(service.embedder().embed(texts, DOCUMENT).vectors, texts)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 529])
def test_a_passing_trouble_is_waited_out(service: Service, status: int) -> None:
    service.answers = [Answer(status, {"error": "busy"}), Answer(status, {"error": "busy"})]
    assert_right(service.embedder().embed(["a"], DOCUMENT).vectors, ["a"])
    assert len(service.requests) == 3


def test_a_lasting_trouble_is_the_services_after_a_bounded_number_of_attempts(service: Service) -> None:
    service.rule = lambda request: Answer(500, {"error": "broken"})
    with pytest.raises(EmbedderDown, match="500"):
        service.embedder().embed(["a"], DOCUMENT)
    assert len(service.requests) == 4


def test_a_short_retry_after_is_obeyed_and_a_long_one_is_handed_to_the_caller(service: Service) -> None:
    service.answers = [Answer(429, {}, {"Retry-After": "0"})]
    assert_right(service.embedder().embed(["a"], DOCUMENT).vectors, ["a"])
    service.answers = [Answer(429, {}, {"Retry-After": "120"})]
    with pytest.raises(EmbedderDown) as down:
        service.embedder().embed(["a"], DOCUMENT)
    assert down.value.retry_after == 120
    assert len(service.requests) == 3, "no attempt against the service's wish"


def test_retry_after_may_be_a_date_and_nonsense_is_ignored(service: Service) -> None:
    service.answers = [Answer(503, {}, {"Retry-After": formatdate(time.time() + 3600, usegmt=True)})]
    with pytest.raises(EmbedderDown) as down:
        service.embedder().embed(["a"], DOCUMENT)
    assert down.value.retry_after == pytest.approx(3600, abs=60)
    service.answers = [Answer(503, {}, {"Retry-After": "soon"})]
    assert_right(service.embedder().embed(["a"], DOCUMENT).vectors, ["a"])


def test_one_text_that_the_service_refuses_is_found_and_its_neighbours_are_embedded(service: Service) -> None:
    service.rule = lambda request: (
        Answer(400, {"error": {"message": f"cannot take {request['input']}"}})
        if any("forbidden" in text for text in request["input"])
        else Answer()
    )
    texts = ["a", "b", "a forbidden word", "c", "d"]
    outcome = embed_isolating(service.embedder(), service.spec(), texts, DOCUMENT)
    assert set(outcome.errors) == {2}
    assert "forbidden" not in outcome.errors[2]
    assert_right(outcome.vectors[[0, 1, 3, 4]], ["a", "b", "c", "d"])


def test_a_request_that_is_too_large_is_halved(service: Service) -> None:
    service.rule = lambda request: Answer(413, {}) if len(request["input"]) > 2 else Answer()
    texts = [str(i) for i in range(7)]
    outcome = embed_isolating(service.embedder(), service.spec(), texts, DOCUMENT)
    assert not outcome.errors
    assert_right(outcome.vectors, texts)


def test_a_service_that_refuses_everything_is_down(service: Service) -> None:
    service.rule = lambda request: Answer(400, {"error": "no such model"})
    with pytest.raises(EmbedderDown, match="400"):
        embed_isolating(service.embedder(), service.spec(), ["a", "b"], DOCUMENT)


def test_a_service_that_leaves_out_empty_texts_costs_only_those(service: Service) -> None:
    service.rule = lambda request: Answer(body=reply([text for text in request["input"] if text]))
    outcome = embed_isolating(service.embedder(), service.spec(), ["a", "", "b"], DOCUMENT)
    assert set(outcome.errors) == {1}
    assert_right(outcome.vectors[[0, 2]], ["a", "b"])


@pytest.mark.parametrize("places", [[0, 0], [1, 2], [0, None], ["x", "y"], [0], [0, 1, 2]])
def test_a_wrong_numbering_is_never_guessed_at(service: Service, places: list[Any]) -> None:
    body = {"data": [{"index": place, "embedding": vector_of("a")} for place in places]}
    service.answers = [Answer(body=body)]
    with pytest.raises((TextRejected, EmbedderDown)):
        service.embedder().embed(["a", "b"], DOCUMENT)


@pytest.mark.parametrize("encode", [as_base64, list])
def test_another_number_of_dimensions_is_the_models_fault(
    service: Service, encode: Callable[[list[float]], Any]
) -> None:
    service.rule = lambda request: Answer(body=reply(request["input"], lambda vector: encode(vector[:4])))
    with pytest.raises(ModelFault, match="4 dimensions, its row says 6"):
        service.embedder().embed(["a"], DOCUMENT)


@pytest.mark.parametrize("bad", ["null", "NaN", "Infinity"])
def test_a_vector_that_is_not_finite_is_its_texts_error(service: Service, bad: str) -> None:
    numbers = ", ".join([bad] + ["0.5"] * (DIMENSIONS - 1))
    service.answers = [Answer(body=b'{"data": [{"index": 0, "embedding": [' + numbers.encode() + b"]}]}")]
    outcome = embed_isolating(service.embedder(), service.spec(), ["a"], DOCUMENT)
    assert list(outcome.errors) == [0]


@pytest.mark.parametrize(
    "body",
    [
        b"<html>hello</html>",
        b"",
        b"[1]",
        b"{}",
        b'{"data": null}',
        b'{"data": [1]}',
        b'{"data": [{"index": 0}]}',
        b'{"data": [{"index": 0, "embedding": "not base64!"}]}',
        b'{"data": [{"index": 0, "embedding": "AAAA"}]}',
        b'{"data": [{"index": 0, "embedding": {"a": 1}}]}',
        b'{"data": [{"index": 0, "embedding": ["a"]}]}',
        b'{"data": [{"index": 0, "embedding": [[1], [1, 2]]}]}',
        b'{"data": [{"index": 0, "embedding": null}]}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_an_answer_that_is_no_embeddings_means_that_the_service_is_down(service: Service, body: bytes) -> None:
    service.answers = [Answer(body=body)]
    with pytest.raises(EmbedderDown, match="something else"):
        service.embedder().embed(["a"], DOCUMENT)


@pytest.mark.parametrize("status", [401, 403, 404, 405, 301])
def test_a_wrong_key_or_address_is_the_models_fault_with_a_hint(service: Service, status: int) -> None:
    service.rule = lambda request: Answer(status, {"error": "x"}, {"Location": "/elsewhere"})
    with pytest.raises(ModelFault, match=str(status)) as fault:
        service.embedder().embed(["a"], DOCUMENT)
    assert fault.value.hint
    assert len(service.requests) == 1


def test_a_service_that_does_not_answer_is_down(service: Service) -> None:
    service.rule = lambda request: Answer(hang=True)
    with pytest.raises(EmbedderDown, match=r"0\.2 s"):
        service.embedder(timeout_s=0.2).embed(["a"], DOCUMENT)


def test_a_connection_that_breaks_is_tried_again(service: Service) -> None:
    service.answers = [Answer(hang_up=True), Answer(hang_up=True)]
    assert_right(service.embedder().embed(["a"], DOCUMENT).vectors, ["a"])


def test_a_service_that_is_not_there_is_down() -> None:
    spec = ModelSpec("m", DIMENSIONS, backend="openai", options={"base_url": "http://127.0.0.1:1/v1"})
    with pytest.raises(EmbedderDown, match="ConnectError"):
        connect(spec).embed(["a"], DOCUMENT)


def test_closing_ends_a_call_that_waits_for_better_times(service: Service) -> None:
    asked = threading.Event()

    def busy(request: dict[str, Any]) -> Answer:
        asked.set()
        return Answer(503, {}, {"Retry-After": "9"})

    service.rule = busy
    embedder = service.embedder()
    caught: list[BaseException] = []

    def call() -> None:
        try:
            embedder.embed(["a"], DOCUMENT)
        except EmbedderDown as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    assert asked.wait(30)
    embedder.close()
    thread.join()
    assert len(caught) == 1
    assert len(service.requests) == 1


def test_the_key_is_sent_and_shows_nowhere(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TEST_KEY", f" {KEY}\n")
    caplog.set_level(logging.DEBUG)
    service.answers = [Answer(), Answer(401, {"error": f"bad key {KEY}"})]
    embedder = service.embedder(api_key_env="TEST_KEY")
    embedder.embed(["a"], DOCUMENT)
    with pytest.raises(ModelFault) as fault:
        embedder.embed(["a"], DOCUMENT)
    assert service.keys == [f"Bearer {KEY}"] * 2
    assert KEY not in fault.value.sentence + caplog.text + repr(vars(embedder)) + embedder.identity


@pytest.mark.parametrize("status", [200, 400, 401, 404, 500])
def test_what_a_service_echoes_of_a_text_reaches_no_error_and_no_log(
    service: Service, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    service.rule = lambda request: Answer(status, {"error": {"message": f"cannot embed {request['input']}"}})
    with pytest.raises((TextRejected, ModelFault, EmbedderDown)) as raised:
        service.embedder().embed(["the patient's name"], DOCUMENT)
    assert "patient" not in raised.value.sentence + caplog.text


def test_only_listed_variables_may_be_sent_as_keys(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", "x")
    with pytest.raises(ModelFault) as fault:
        service.embedder(api_key_env="PGPASSWORD")
    assert "CDC_EMBEDDER_API_KEY_ENVS" in fault.value.hint


@pytest.mark.parametrize("value", [None, "", "two words", "a\nb", "schlüssel"])
def test_a_key_that_cannot_be_one_is_refused_without_showing_it(
    service: Service, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    if value is None:
        monkeypatch.delenv("TEST_KEY", raising=False)
    else:
        monkeypatch.setenv("TEST_KEY", value)
    with pytest.raises(ModelFault, match="TEST_KEY") as fault:
        service.embedder(api_key_env="TEST_KEY")
    assert not value or value not in fault.value.sentence


@pytest.mark.parametrize(
    "base_url",
    ["", "ftp://h/v1", "h:80/v1", "file:///etc/passwd", "http://user:pw@h/v1", "http://h/v1?key=x", "http:///v1", 7],
)
def test_a_base_url_that_is_none_or_carries_a_secret_is_refused(base_url: object) -> None:
    with pytest.raises(ModelFault, match="base_url"):
        connect(ModelSpec("m", DIMENSIONS, backend="openai", options={"base_url": base_url}))


@pytest.mark.parametrize(
    ("base_url", "allowed"),
    [
        ("https://api.example.com/v1", True),
        ("https://api.example.com/v1/", True),
        ("https://api.example.com/v1/team", True),
        ("https://API.example.com:443/v1", True),
        ("https://api.example.com.evil.org/v1", False),
        ("https://api.example.com:8443/v1", False),
        ("http://api.example.com/v1", False),
        ("https://other.example.com/any", True),
        ("https://other.example.com.evil.org/v1", False),
        ("https://api.example.com/v11", False),
        ("https://api.example.com/v1/../v2", False),
        ("https://api.example.com/v1/%2e%2e/v2", False),
        (DEFAULT_BASE_URL, False),
    ],
)
def test_base_urls_are_compared_by_their_parts(base_url: str, allowed: bool) -> None:
    spec = ModelSpec("m", DIMENSIONS, backend="openai", options={"base_url": base_url})
    if allowed:
        connect(spec, ("https://other.example.com", "https://api.example.com/v1"))
    else:
        with pytest.raises(ModelFault, match="not among those allowed"):
            connect(spec, ("https://other.example.com", "https://api.example.com/v1"))


def test_an_unknown_option_is_refused_by_name(service: Service) -> None:
    with pytest.raises(ModelFault, match="max_batch_size"):
        service.embedder(max_batch_size=3)
