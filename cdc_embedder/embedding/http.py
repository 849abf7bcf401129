"""An embedding service that speaks OpenAI's embeddings API: TEI, vLLM, Infinity, Ollama, llama.cpp, OpenAI itself.

What may be trusted in a reply is little: vectors may come as base64 or as lists whatever was asked, in any order, too
few, of another size. All of it is checked. The key never shows, and neither does a reply's body, which may quote a
row's text: errors say the status and no more. The service truncates as it is configured and does not tell.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import numpy as np

from cdc_embedder.embedding.base import Embedded, InputType, ModelSpec, Vectors
from cdc_embedder.embedding.modelrow import check_options, number_option, prompted
from cdc_embedder.errors import EmbedderDown, ModelFault, TextRejected

OPTIONS = {
    "base_url": "where the API is, by default https://api.openai.com/v1",
    "api_key_env": "name of the environment variable that holds the key (none: no key is sent)",
    "max_requests": "requests at once, by default 4",
    "max_batch_rows": "texts in one request, by default 256",
    "timeout_s": "seconds to wait for an answer, by default 30",
}
DEFAULT_BASE_URL = "https://api.openai.com/v1"

_ATTEMPTS = 4
_LONGEST_PAUSE_S = 10.0
"""A service that asks for more patience than this is down: the caller has better things to do than to sit here."""

_REFUSES_THE_TEXT = frozenset({400, 413, 422})
_PASSES_BY_ITSELF = frozenset({408, 409, 425, 429})


class HttpEmbedder:
    """The model `source` of the service at `options.base_url`. Nothing is asked of it before the first call."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        allowed_key_envs: frozenset[str],
        allowed_base_urls: tuple[str, ...] | None,
        pause_s: float = 0.5,
    ) -> None:
        check_options(spec, OPTIONS)
        self._spec = spec
        self._model = spec.source or spec.name
        self._rows = int(number_option(spec, "max_batch_rows", 256, least=1))
        self._pause_s = pause_s
        self._requests = int(number_option(spec, "max_requests", 4, least=1))
        self._closing = threading.Event()
        self._url = _base_url(spec, allowed_base_urls)
        headers = {"User-Agent": "cdc-embedder"}
        if (key := _api_key(spec, allowed_key_envs)) is not None:
            headers["Authorization"] = f"Bearer {key}"
        self._client = httpx.Client(headers=headers, timeout=number_option(spec, "timeout_s", 30, least=0.001))

    @property
    def identity(self) -> str:
        """The model's id: what weights stand behind it only its operator knows."""
        return f"openai:{self._model}"

    @property
    def engine(self) -> str:
        return f"the API at {self._url}"

    @property
    def concurrency(self) -> int:
        return self._requests

    def embed(self, texts: Sequence[str], input_type: InputType) -> Embedded:
        """Embed `texts` in order, `max_batch_rows` a request."""
        sent = prompted(self._spec, texts, input_type)
        vectors: Vectors = np.empty((len(sent), self._spec.dimensions), dtype=np.float32)
        tokens = 0
        for start in range(0, len(sent), self._rows):
            part = sent[start : start + self._rows]
            reply = self._ask(part)
            vectors[start : start + len(part)] = reply.vectors
            tokens += reply.tokens
        return Embedded(vectors, np.zeros(len(sent), dtype=np.bool_), tokens)

    def close(self) -> None:
        """Give up what waits, close the connections."""
        self._closing.set()
        self._client.close()

    def _ask(self, texts: list[str]) -> _Reply:
        """One request, repeated while that makes sense."""
        body = json.dumps({"model": self._model, "input": texts, "encoding_format": "base64"}).encode()
        for attempt in range(1, _ATTEMPTS + 1):
            if self._closing.is_set():
                raise EmbedderDown(f"the connection to {self._url} has been closed")
            answer = self._post(body, last=attempt == _ATTEMPTS)
            if answer is None:
                pause = self._backoff(attempt)
            elif answer.status_code == 200:
                return _read(answer.content, texts, self._spec)
            else:
                pause = self._judge(answer, attempt)
            self._closing.wait(pause)
        raise AssertionError("the last attempt returns or raises")

    def _post(self, body: bytes, *, last: bool) -> httpx.Response | None:
        """The answer, or None where the connection broke and another attempt makes sense."""
        headers = {"Content-Type": "application/json"}
        try:
            return self._client.post(f"{self._url}/embeddings", content=body, headers=headers)
        except httpx.TimeoutException as error:
            raise EmbedderDown(
                f"{self._url} did not answer within {self._client.timeout.read:g} s",
                hint="Look at the embedding service; `timeout_s` among the model's options sets the limit",
            ) from error
        except (httpx.HTTPError, RuntimeError) as error:
            # httpx raises RuntimeError on a client that close() has closed meanwhile.
            if last or self._closing.is_set():
                raise EmbedderDown(
                    f"{self._url} cannot be reached ({type(error).__name__})", hint="Look at the embedding service"
                ) from error
            return None

    def _judge(self, answer: httpx.Response, attempt: int) -> float:
        """Seconds to wait before the next attempt; raises where there should be none."""
        status = answer.status_code
        said = f"{self._url} answered {status}"
        if status in _PASSES_BY_ITSELF or status >= 500:
            asked = _retry_after(answer.headers.get("Retry-After"))
            pause = self._backoff(attempt) if asked is None else asked
            if attempt == _ATTEMPTS or pause > _LONGEST_PAUSE_S:
                raise EmbedderDown(said, hint="It is overloaded or failing", retry_after=asked)
            return pause
        if status in _REFUSES_THE_TEXT:
            raise TextRejected(f"{said}: the service refuses the text")
        raise ModelFault(f"the model {self._spec.name}: {said}", hint=_hint(status, self._model))

    def _backoff(self, attempt: int) -> float:
        return float(min(_LONGEST_PAUSE_S, self._pause_s * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0))


@dataclass(frozen=True, slots=True)
class _Reply:
    vectors: Vectors
    tokens: int


def _read(content: bytes, texts: list[str], spec: ModelSpec) -> _Reply:
    """The vectors of a reply, in the order of `texts`.

    Another number of vectors than of texts is TextRejected: a service that leaves out one text (an empty one, say) is
    found out by halving, and one that always does so fails on the canary too.
    """
    try:
        reply = json.loads(content)
        items = reply["data"]
        places = [int(item.get("index", place)) for place, item in enumerate(items)]
        rows = [_vector(item["embedding"]) for item in items]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise EmbedderDown(
            f"the service of the model {spec.name} answered with something else than embeddings",
            hint="Check base_url: it must end where /embeddings begins, usually in /v1",
        ) from None
    if sorted(places) != list(range(len(texts))):
        raise TextRejected(
            f"the service answered {len(texts)} texts with {len(rows)} vectors, or numbered them wrongly"
        )
    vectors: Vectors = np.empty((len(texts), spec.dimensions), dtype=np.float32)
    for place, row in zip(places, rows, strict=True):
        if row.shape != (spec.dimensions,):
            raise ModelFault(
                f"the model {spec.name}: the service gave {row.size} dimensions, its row says {spec.dimensions}",
                hint="Correct `dimensions` in its row, or its `source`",
            )
        vectors[place] = row
    return _Reply(vectors, _tokens(reply, texts))


def _vector(embedding: Any) -> Vectors:
    if isinstance(embedding, str):
        try:
            return np.frombuffer(base64.b64decode(embedding, validate=True), dtype="<f4")
        except binascii.Error as error:
            raise ValueError("not base64") from error
    if not isinstance(embedding, list):
        raise TypeError("neither base64 nor a list")
    # null, as some services write NaN, becomes NaN and is found by the check that every vector passes.
    return np.array(embedding, dtype=np.float32)


def _tokens(reply: dict[str, Any], texts: list[str]) -> int:
    """What the service says it read; a guess where it does not say."""
    usage = reply.get("usage")
    told = usage.get("prompt_tokens") or usage.get("total_tokens") if isinstance(usage, dict) else None
    return told if isinstance(told, int) else sum(len(text) // 4 + 1 for text in texts)


def _retry_after(header: str | None) -> float | None:
    """Seconds, from either of the two forms that HTTP allows; None where there is none that can be read."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(header)
    except ValueError:
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())


def _hint(status: int, model: str) -> str:
    match status:
        case 401 | 403:
            return "Check the key in the variable that api_key_env names, and what it may use"
        case 404:
            return f"Check base_url (usually it ends in /v1) and that the service has a model {model}"
        case _:
            return "Check base_url among the model's options"


def _base_url(spec: ModelSpec, allowed: tuple[str, ...] | None) -> str:
    text = spec.options.get("base_url", DEFAULT_BASE_URL)
    url = _parsed(text) if isinstance(text, str) else None
    if url is None or url.userinfo or url.query or url.fragment:
        raise ModelFault(
            f"the model {spec.name}: base_url must be an http or https URL without user, query and fragment",
            hint="For example http://127.0.0.1:8080/v1; a key goes into a variable that api_key_env names",
        )
    if allowed is not None and not any(_within(url, _parsed(prefix)) for prefix in allowed):
        raise ModelFault(
            f"the model {spec.name}: its base_url is not among those allowed here",
            hint="Add it to CDC_EMBEDDER_BASE_URLS and restart the service",
        )
    return str(url).rstrip("/")


def _parsed(text: str) -> httpx.URL | None:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        return None
    return url if url.scheme in ("http", "https") and url.host else None


def _within(url: httpx.URL, prefix: httpx.URL | None) -> bool:
    """Compared by parts: a prefix of characters would let api.openai.com.example.org pass for api.openai.com."""
    if prefix is None or (url.scheme, url.host, url.port) != (prefix.scheme, prefix.host, prefix.port):
        return False
    inside = f"{url.path.rstrip('/')}/".startswith(f"{prefix.path.rstrip('/')}/")
    return inside and ".." not in url.path.split("/")  # `path` is decoded: %2e%2e is caught too


def _api_key(spec: ModelSpec, allowed: frozenset[str]) -> str | None:
    name = spec.options.get("api_key_env")
    if name is None:
        return None
    if name not in allowed:
        raise ModelFault(
            f"the model {spec.name}: the variable {name} may not be read as a key here",
            hint="Add it to CDC_EMBEDDER_API_KEY_ENVS and restart the service",
        )
    key = os.environ.get(name, "").strip()
    if not key:
        raise ModelFault(
            f"the model {spec.name}: the variable {name} is not set", hint="Set it for the service and restart it"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        # Checked here because the HTTP library would quote it in its error.
        raise ModelFault(f"the model {spec.name}: the variable {name} holds something that cannot be a key")
    return key
