"""Texts that somebody waits for, from HTTP and from SQL: gathered across callers, ahead of all other work.

A call of the model begins as soon as none is under way for the same model and prompt; what arrives meanwhile makes the
next one, of many callers together, each with the same share of it. Lives as long as the service does. No database.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from cdc_embedder.embedding.base import Embedder, InputType, ModelSpec, Vectors
from cdc_embedder.embedding.isolation import Outcome, embed_isolating
from cdc_embedder.embedding.registry import Embedders
from cdc_embedder.errors import Problem, TextRejected
from cdc_embedder.lane import BATCH_SECONDS, Size
from cdc_embedder.metering import Meters

MOST_TEXTS = 20_000
MOST_CHARACTERS = 64 << 20
"""What may wait for models; who asks for more is asked to come again."""

REFRESH_SECONDS = 0.05
"""How far apart the models are read again for those who ask for what is not among them."""

LEAST_NORM = 1e-12
"""A shorter vector has no direction."""


class UnknownModel(Problem):
    """No row of the `model` table has that name."""


class NotReady(Problem):
    """This instance has not loaded the model and is not the one that works."""


class TooManyRequests(Problem):
    """More waits than is worth waiting for. `retry_after` is in seconds."""

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message, hint=f"Try again in {retry_after:.0f} s")
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Answered:
    """`vectors` of shape (texts, dimensions), which texts lost their tail, and how many tokens it was."""

    vectors: Vectors
    truncated: NDArray[np.bool_]
    tokens: int


@dataclass(eq=False, slots=True)
class _Request:
    texts: list[str]
    characters: int
    answer: asyncio.Future[None]
    vectors: Vectors
    truncated: NDArray[np.bool_]
    tokens: float = 0.0
    taken: int = 0
    given: int = 0

    @property
    def waiting(self) -> int:
        return 0 if self.answer.done() else len(self.texts) - self.taken


@dataclass(eq=False, slots=True)
class _Queue:
    """What waits for one model with one kind of prompt."""

    spec: ModelSpec
    input_type: InputType
    requests: deque[_Request] = field(default_factory=deque)
    calls: int = 0
    at_once: int = 1
    size: Size = field(default_factory=lambda: Size(16, 1, 1024, BATCH_SECONDS, calls=True))


_Part = tuple[_Request, int, int]
"""Texts of a request, from and to."""


class Queries:
    """`embed` answers; the rest says who else has to wait.

    `models` are the rows of the table, kept by whoever reads it. `refresh` reads them again where a name is unknown, or
    whoever asks sees another row; None: this instance waits, and only models that it has loaded answer.
    """

    def __init__(self, embedders: Embedders, meters: Meters | None = None) -> None:
        self._embedders = embedders
        self._meters = meters or Meters()
        self._queues: dict[tuple[ModelSpec, InputType], _Queue] = {}
        self._calls: set[asyncio.Task[None]] = set()
        self._busy: Counter[Embedder] = Counter()
        self._refreshing = asyncio.Lock()
        self._refreshed_at = -math.inf
        self.models: Mapping[str, ModelSpec] = {}
        self.refresh: Callable[[], Awaitable[None]] | None = None
        self.ended: Callable[[], None] = lambda: None
        """Called whenever other work may go on."""
        self.latest = -math.inf
        """When a call began last, on the clock `time.monotonic`."""

    def busy(self, embedder: Embedder) -> bool:
        """Whether a query is with this embedder, so that no other work should begin there."""
        return self._busy[embedder] > 0

    async def embed(
        self,
        model: str,
        texts: Sequence[str],
        input_type: InputType,
        *,
        prompt: str | None = None,
        normalize: bool | None = None,
        via: str = "http",
        row: ModelSpec | None = None,
    ) -> Answered:
        """The vectors of `texts`. `prompt` goes before each in place of the model's; `normalize`: not as its row says;
        `via`: by which way the question came, for the meters; `row`: the model's row as it is seen by who asks.

        Raises UnknownModel, NotReady, TooManyRequests, TextRejected, and what embedders raise.
        """
        began, result = time.monotonic(), "failed"
        try:
            answered = await self._embed(model, texts, input_type, prompt, normalize, row)
            result = "answered"
            return answered
        except (UnknownModel, TooManyRequests, TextRejected, NotReady):
            result = "refused"
            raise
        finally:
            if texts:
                self._meters.query(via, result, time.monotonic() - began)

    async def _embed(
        self,
        model: str,
        texts: Sequence[str],
        input_type: InputType,
        prompt: str | None,
        normalize: bool | None,
        row: ModelSpec | None,
    ) -> Answered:
        spec = await self._spec(model, row)
        if prompt is not None:
            texts, input_type = [prompt + text for text in texts], InputType.NONE
        self._admit(texts)
        queue = self._queues.setdefault((spec, input_type), _Queue(spec, input_type))
        request = _Request(
            list(texts),
            sum(map(len, texts)),
            asyncio.get_running_loop().create_future(),
            np.zeros((len(texts), spec.dimensions), np.float32),
            np.zeros(len(texts), np.bool_),
        )
        if texts:
            queue.requests.append(request)
            self._begin(queue)
            await request.answer
        if spec.normalize if normalize is None else normalize:
            _normalize(request.vectors)
        return Answered(request.vectors, request.truncated, round(request.tokens))

    async def close(self) -> None:
        """Let go of whoever still asks; calls under way are not waited for."""
        for queue in self._queues.values():
            for request in queue.requests:
                request.answer.cancel()
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)

    async def _spec(self, model: str, row: ModelSpec | None) -> ModelSpec:
        if not self._knows(model, row) and self.refresh is not None:
            asked_at = time.monotonic()
            async with self._refreshing:
                await self._read_again(model, row, asked_at)
        spec = self.models.get(model)
        if self.refresh is None and (spec is None or not self._embedders.has(spec)):
            raise NotReady(f"the model {model} is not loaded here", hint="Another instance serves this database")
        if spec is None:
            known = ", ".join(sorted(self.models)) or "none"
            raise UnknownModel(f"there is no model {model}", hint=f"Known: {known}")
        return spec

    def _knows(self, model: str, row: ModelSpec | None) -> bool:
        """Whether the row is here, and is the one that is seen by who asks."""
        return model in self.models if row is None else self.models.get(model) == row

    async def _read_again(self, model: str, row: ModelSpec | None, asked_at: float) -> None:
        """Once for all who came before it begins: what is another row then has changed again, or is not committed."""
        await asyncio.sleep(self._refreshed_at + REFRESH_SECONDS - time.monotonic())
        if not self._knows(model, row) and self._refreshed_at < asked_at and self.refresh is not None:
            began = time.monotonic()
            await self.refresh()
            self._refreshed_at = began

    def _admit(self, texts: Sequence[str]) -> None:
        waiting = [r for queue in self._queues.values() for r in queue.requests if r.waiting]
        count, characters = sum(r.waiting for r in waiting), sum(r.characters for r in waiting)
        characters += sum(map(len, texts))
        if waiting and (count + len(texts) > MOST_TEXTS or characters > MOST_CHARACTERS):
            raise TooManyRequests(f"{count} texts wait for their vectors already", retry_after=1.0)

    def _begin(self, queue: _Queue) -> None:
        """Start a call where none is under way, or a full one beside it; with none waiting, forget the queue."""
        while queue.requests and queue.requests[0].waiting == 0:
            queue.requests.popleft()
        if not queue.requests:
            if queue.calls == 0:
                self._queues.pop((queue.spec, queue.input_type), None)
            return
        full = sum(request.waiting for request in queue.requests) >= queue.size.rows
        if queue.calls == 0 or (queue.calls < queue.at_once and full):
            queue.calls += 1
            task = asyncio.create_task(self._call(queue, self._take(queue)))
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)

    @staticmethod
    def _take(queue: _Queue) -> list[_Part]:
        """A batch: of each request that waits an equal share, in the order of their coming."""
        room, parts = queue.size.rows, []
        waiting = [request for request in queue.requests if request.waiting]
        for place, request in enumerate(waiting):
            if room <= 0:
                break
            share = max(1, room // (len(waiting) - place))
            end = request.taken + min(share, request.waiting)
            parts.append((request, request.taken, end))
            room -= end - request.taken
            request.taken = end
        return parts

    async def _call(self, queue: _Queue, parts: list[_Part]) -> None:
        """One call of the model, in a thread: loading it first where need be."""
        try:
            embedder = await asyncio.to_thread(self._embedders.get, queue.spec)
            queue.at_once = embedder.concurrency
            self._busy[embedder] += 1
            self.latest = began = time.monotonic()
            try:
                outcome = await asyncio.to_thread(_embed, embedder, queue, parts)
            finally:
                self._busy -= Counter((embedder,))
            self.latest = time.monotonic()
            rows = sum(end - begin for _, begin, end in parts)
            queue.size.took(rows, self.latest - began)
            self._meters.called(queue.spec.name, rows, outcome.tokens, outcome.spent, began, self.latest)
            _hand_out(parts, outcome)
        except Exception as error:  # whatever it was, it concerns those who asked
            self._meters.model(queue.spec.name).errors += 1
            for request, _, _ in parts:
                if not request.answer.done():
                    request.answer.set_exception(error)
        finally:
            queue.calls -= 1
            self._begin(queue)
            self.ended()


def _embed(embedder: Embedder, queue: _Queue, parts: list[_Part]) -> Outcome:
    """Vectors as the model makes them: whether they are normalized is each caller's own."""
    texts = [text for request, begin, end in parts for text in request.texts[begin:end]]
    return embed_isolating(embedder, replace(queue.spec, normalize=False), texts, queue.input_type)


def _hand_out(parts: list[_Part], outcome: Outcome) -> None:
    place = 0
    for request, begin, end in parts:
        mine = slice(place, place + end - begin)
        wrong = next((index for index in range(mine.start, mine.stop) if index in outcome.errors), None)
        if request.answer.done():
            pass
        elif wrong is not None:
            sentence = f"text {begin + wrong - place + 1}: {outcome.errors[wrong]}"
            request.answer.set_exception(TextRejected(sentence))
        else:
            request.vectors[begin:end] = outcome.vectors[mine]
            request.truncated[begin:end] = outcome.truncated[mine]
            request.tokens += outcome.tokens * (end - begin) / len(outcome.vectors)
            request.given += end - begin
            if request.given == len(request.texts):
                request.answer.set_result(None)
        place = mine.stop


def _normalize(vectors: Vectors) -> None:
    """Unit length, in place. Raises TextRejected where a vector has no direction."""
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))
    if (short := np.flatnonzero(norms < LEAST_NORM)).size:
        raise TextRejected(f"text {short[0] + 1}: the model gave this text a vector of zeros")
    vectors /= norms[:, None].astype(np.float32)
