"""Embeddings over HTTP in OpenAI's shape, and health: requests in, answers out. What listens is in `listening`.

A request is answered with vectors or with an error in OpenAI's form. No error and no line of the log holds a text.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import logging
import math
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import psycopg
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from cdc_embedder.embedding.base import InputType, Vectors
from cdc_embedder.errors import ModelFault, Problem, Temporary, TextRejected
from cdc_embedder.querying import LEAST_NORM, Answered, NotReady, Queries, TooManyRequests, UnknownModel
from cdc_embedder.web import Health

log = logging.getLogger(__name__)

MOST_INPUTS = 2048
"""As OpenAI's."""

REQUESTS_AT_ONCE = 256
BODY_SECONDS = 30.0

PASSED_OVER = 4
"""A body that is too large is read up to so many times the limit, for its sender to see the answer."""

FIELDS = ("model", "input", "input_type", "encoding_format", "dimensions", "user")


def application(
    health: Health,
    slot: str,
    queries: Queries,
    metrics: Callable[[], bytes],
    *,
    closed: str,
    token: str | None,
    max_bytes: int,
) -> Any:
    """`metrics` gives Prometheus' text. `closed`: why nothing but health is answered; empty where all is."""
    api = _Api(health, slot, queries, metrics, closed, token, max_bytes)
    routes = [
        Route("/healthz", api.healthz),
        Route("/readyz", api.readyz),
        Route("/metrics", api.metrics),
        Route("/v1/models", api.models),
        Route("/v1/embeddings", api.embeddings, methods=["POST"]),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _no_route})
    app.router.redirect_slashes = False
    return app


class Refusal(Exception):
    """An answer that is an error in OpenAI's form; `last`: nothing more is taken on this connection."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        param: str | None = None,
        kind: str = "invalid_request_error",
        retry_after: float | None = None,
        last: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.error = {"message": message, "type": kind, "param": param, "code": code}
        self.headers = {} if retry_after is None else {"Retry-After": str(max(1, math.ceil(retry_after)))}
        if last:
            self.headers["Connection"] = "close"

    @property
    def response(self) -> Response:
        return _json(self.status, {"error": self.error}, self.headers)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that has been understood."""

    model: str
    texts: list[str]
    input_type: InputType
    as_base64: bool
    dimensions: int | None


class _Api:
    def __init__(
        self,
        health: Health,
        slot: str,
        queries: Queries,
        metrics: Callable[[], bytes],
        closed: str,
        token: str | None,
        max_bytes: int,
    ) -> None:
        self._health = health
        self._slot = slot
        self._queries = queries
        self._metrics = metrics
        self._closed = closed
        self._token = None if token is None else token.encode()
        self._max_bytes = max_bytes
        self._under_way = 0

    async def healthz(self, _: Request) -> Response:
        stuck = self._health.stuck()
        return _json(503 if stuck else 200, {"status": "stuck" if stuck else "alive"}, {"Connection": "close"})

    async def metrics(self, request: Request) -> Response:
        try:
            self._authorize(request)
        except Refusal as refusal:
            return refusal.response
        return Response(self._metrics(), media_type="text/plain; version=0.0.4")

    async def readyz(self, _: Request) -> Response:
        health = self._health
        state = "ready" if health.ready else "not ready"
        body = {"status": state, "role": health.role, "slot": self._slot, "reason": health.reason}
        return _json(200 if health.ready else 503, body, {"Connection": "close"})

    async def models(self, request: Request) -> Response:
        try:
            self._authorize(request)
        except Refusal as refusal:
            return refusal.response
        known = sorted(self._queries.models)
        listed = [{"id": name, "object": "model", "created": 0, "owned_by": "cdc-embedder"} for name in known]
        return _json(200, {"object": "list", "data": listed})

    async def embeddings(self, request: Request) -> Response:
        try:
            self._authorize(request)
            if self._under_way >= REQUESTS_AT_ONCE:
                raise _rate_limited(f"{REQUESTS_AT_ONCE} requests are under way already", 1.0)
            self._under_way += 1
            try:
                asked = understood(await self._body(request))
                return await self._answer(request, asked)
            finally:
                self._under_way -= 1
        except Refusal as refusal:
            return refusal.response
        except ClientDisconnect:
            return Response()  # nobody reads it
        except Exception as error:  # its message may quote the text
            frames = "".join(traceback.format_tb(error.__traceback__))
            log.error("a request over HTTP failed: %s at\n%s", type(error).__name__, frames)
            return _internal().response

    def _authorize(self, request: Request) -> None:
        if self._closed:
            raise Refusal(403, self._closed, "http_token_missing")
        if self._token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), self._token):
            sentence = "a bearer token is needed: the one that the service's setting http_token names"
            refusal = Refusal(401, sentence, "invalid_api_key")
            refusal.headers["WWW-Authenticate"] = "Bearer"
            raise refusal

    async def _body(self, request: Request) -> bytes:
        """What was sent. Raises Refusal where it is no JSON, too large, or too long on its way."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "send JSON, with Content-Type: application/json")
        too_large = Refusal(413, f"the request is larger than {self._max_bytes} bytes", last=True)
        announced = int(request.headers.get("content-length", 0))
        waits = request.headers.get("expect", "").lower() == "100-continue"
        if announced > self._max_bytes * (1 if waits else PASSED_OVER):
            raise too_large
        kept, size = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size <= self._max_bytes:
                        kept.append(chunk)
                    else:
                        kept.clear()
                        if size > self._max_bytes * PASSED_OVER:
                            break
        except TimeoutError:
            raise Refusal(408, f"the request took longer than {BODY_SECONDS:.0f} s", last=True) from None
        if size > self._max_bytes:
            raise too_large
        return b"".join(kept)

    async def _answer(self, request: Request, asked: Asked) -> Response:
        answered = await self._embed_unless_gone(request, asked)
        vectors = answered.vectors
        if asked.dimensions is not None and asked.dimensions < vectors.shape[1]:
            vectors = _cut(vectors, asked.dimensions, normalize=self._queries.models[asked.model].normalize)
        if vectors.size > 10_000:
            return await asyncio.to_thread(_listed, asked, vectors, answered.tokens)
        return _listed(asked, vectors, answered.tokens)

    async def _embed_unless_gone(self, request: Request, asked: Asked) -> Answered:
        """The vectors; whoever hangs up is not worked for any longer. Raises ClientDisconnect, Refusal."""
        work = asyncio.create_task(self._embed(asked))
        gone = asyncio.create_task(_disconnect(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            work.cancel()
            await asyncio.wait({work, gone})
        if not work.cancelled():
            return work.result()
        if gone.cancelled():  # the service lets go of who still asks
            raise _unavailable("the service is stopping", 1.0)
        raise ClientDisconnect

    async def _embed(self, asked: Asked) -> Answered:
        try:
            if asked.dimensions is not None:
                nothing = await self._queries.embed(asked.model, [], asked.input_type)
                if asked.dimensions > (most := nothing.vectors.shape[1]):
                    raise Refusal(400, f"this model has {most} dimensions, not {asked.dimensions}", param="dimensions")
            return await self._queries.embed(asked.model, asked.texts, asked.input_type)
        except Problem as problem:
            raise _refusal(problem) from problem
        except psycopg.Error as error:
            log.warning("the models could not be looked up: %s", type(error).__name__)
            raise _unavailable("the database cannot be asked for the model now", 1.0) from error


def understood(body: bytes) -> Asked:
    """What a body asks for. Raises Refusal, which names the field and never its value."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Refusal(400, "the body is not JSON") from None
    if not isinstance(fields, dict):
        raise Refusal(400, "the body is not a JSON object")
    if unknown := fields.keys() - set(FIELDS):
        name = min(unknown)
        named = f" ({name})" if name.isidentifier() and len(name) <= 40 else ""
        raise Refusal(400, f"a field is not known{named}: there are {', '.join(FIELDS)}", param=name if named else None)
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise Refusal(400, "model is the name of a model", param="model")
    dimensions = fields.get("dimensions")
    if dimensions is not None and (type(dimensions) is not int or dimensions < 1):
        raise Refusal(400, "dimensions is a positive whole number", param="dimensions")
    return Asked(
        model,
        _texts(fields.get("input")),
        InputType(_choice(fields, "input_type", ("none", "query", "document"))),
        _choice(fields, "encoding_format", ("float", "base64")) == "base64",
        dimensions,
    )


def _choice(fields: Mapping[str, Any], name: str, choices: tuple[str, ...]) -> str:
    """One of `choices`; the first where none was made."""
    chosen = fields.get(name)
    if chosen is None:
        return choices[0]
    if not isinstance(chosen, str) or chosen not in choices:
        raise Refusal(400, f"{name} is one of {', '.join(choices)}", param=name)
    return chosen


def _texts(given: Any) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts:
        raise Refusal(400, "input is a text or a list of texts, and not empty", param="input")
    if len(texts) > MOST_INPUTS:
        raise Refusal(400, f"input has {len(texts)} texts; there may be {MOST_INPUTS}", param="input")
    for place, text in enumerate(texts, 1):
        if isinstance(text, (int, list)):
            hint = "send text (LangChain: check_embedding_ctx_length=False)"
            raise Refusal(400, f"token ids are not taken: {hint}", param="input")
        if not isinstance(text, str):
            raise Refusal(400, f"text {place} of input is not a string", param="input")
        if not text:
            raise Refusal(400, f"text {place} of input is empty", param="input")
    return texts


def _refusal(problem: Problem) -> Refusal:
    match problem:
        case UnknownModel():
            return Refusal(404, str(problem), "model_not_found", param="model")
        case TextRejected():
            return Refusal(400, str(problem), param="input")
        case TooManyRequests():
            return _rate_limited(str(problem), problem.retry_after)
        case NotReady():  # behind a balancer another connection may lead to the instance that works
            return _unavailable(problem.sentence, 1.0, last=True)
        case Temporary():
            log.warning("a request over HTTP was not answered: %s", problem.sentence)
            return _unavailable("the model cannot be used now", getattr(problem, "retry_after", None) or 1.0)
        case ModelFault():
            log.warning("a request over HTTP was not answered: %s", problem.sentence)
            return Refusal(
                500, "the model cannot be used: the service's log says why", "model_fault", kind="server_error"
            )
        case _:
            log.error("a request over HTTP was not answered: %s", problem.sentence)
            return _internal()


def _rate_limited(message: str, retry_after: float) -> Refusal:
    return Refusal(429, message, "rate_limit_exceeded", kind="rate_limit_error", retry_after=retry_after)


def _unavailable(message: str, retry_after: float, *, last: bool = False) -> Refusal:
    return Refusal(503, message, "service_unavailable", kind="server_error", retry_after=retry_after, last=last)


def _internal() -> Refusal:
    return Refusal(500, "the service failed: its log says more", "internal_error", kind="server_error")


def _cut(vectors: Vectors, dimensions: int, *, normalize: bool) -> Vectors:
    """The first `dimensions` of each, of unit length again where the model's are."""
    cut = vectors[:, :dimensions].copy()
    if normalize:
        norms = np.linalg.norm(cut, axis=1, keepdims=True)
        if (short := np.flatnonzero(norms < LEAST_NORM)).size:
            raise Refusal(400, f"text {short[0] + 1}: nothing is left at {dimensions} dimensions", param="dimensions")
        cut /= norms
    return cut


def _listed(asked: Asked, vectors: Vectors, tokens: int) -> Response:
    """Vector by vector, so that a thread that does this lets others run."""
    rows = vectors.astype("<f4", copy=False)
    data = [
        msgspec.Raw(
            msgspec.json.encode(
                {
                    "object": "embedding",
                    "index": index,
                    "embedding": base64.b64encode(row.tobytes()).decode() if asked.as_base64 else row.tolist(),
                }
            )
        )
        for index, row in enumerate(rows)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return _json(200, {"object": "list", "data": data, "model": asked.model, "usage": usage})


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = {"Connection": "close"}
    if request.url.path.startswith("/v1/"):
        posted = request.url.path == "/v1/embeddings"
        allowed = "POST" if posted else "GET, HEAD"
        if error.status_code == 405:
            headers["Allow"] = allowed
            refusal = Refusal(405, f"{allowed} is understood here", "method_not_allowed")
        else:
            refusal = Refusal(404, "there are /v1/embeddings and /v1/models", "unknown_url")
        refusal.headers |= headers
        return refusal.response
    if error.status_code == 405:
        return _json(405, {"error": "GET and HEAD are understood"}, headers | {"Allow": "GET, HEAD"})
    return _json(404, {"error": "there are /healthz, /readyz, /metrics, /v1/embeddings and /v1/models"}, headers)


def _json(status: int, body: Any, headers: Mapping[str, str] | None = None) -> Response:
    content = msgspec.json.encode(body) + b"\n"
    headers = {"Cache-Control": "no-store", **(headers or {})}
    return Response(content, status, headers, media_type="application/json")
