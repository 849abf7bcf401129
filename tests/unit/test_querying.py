"""Queries gathered across callers, with the fake model: who shares a call, who is refused, who is answered wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest
import pytest_asyncio

from cdc_embedder import querying
from cdc_embedder.embedding.base import InputType, ModelSpec
from cdc_embedder.embedding.fake import fake_vector
from cdc_embedder.embedding.registry import Embedders
from cdc_embedder.errors import EmbedderDown, TextRejected
from cdc_embedder.querying import Answered, NotReady, Queries, TooManyRequests, UnknownModel

PLAIN = ModelSpec("plain", 8, "fake", query_prompt="q: ", document_prompt="d: ")
SLOW = ModelSpec("slow", 8, "fake", options={"delay_s": 0.1})
FUSSY = ModelSpec("fussy", 8, "fake", options={"reject": "poison", "nan": "void"})
DOWN = ModelSpec("down", 8, "fake", options={"down": True})

pytestmark = pytest.mark.asyncio


async def nothing() -> None:
    """What the working instance does about an unknown name, where the table has not changed."""


@pytest_asyncio.fixture
async def queries() -> AsyncIterator[Queries]:
    embedders = Embedders()
    asked = Queries(embedders)
    asked.models = {spec.name: spec for spec in (PLAIN, SLOW, FUSSY, DOWN)}
    asked.refresh = nothing
    yield asked
    await asked.close()
    embedders.close()


def right(answered: Answered, model: str, *texts: str) -> bool:
    expected = np.array([fake_vector(model, text, 8) for text in texts])
    return bool(np.allclose(answered.vectors, expected, atol=1e-6))


async def test_prompts_are_the_models_unless_one_is_given(queries: Queries) -> None:
    assert right(await queries.embed("plain", ["a"], InputType.NONE), "plain", "a")
    assert right(await queries.embed("plain", ["a"], InputType.QUERY), "plain", "q: a")
    assert right(await queries.embed("plain", ["a", "b"], InputType.DOCUMENT), "plain", "d: a", "d: b")
    assert right(await queries.embed("plain", ["a"], InputType.QUERY, prompt="own: "), "plain", "own: a")
    assert right(await queries.embed("plain", ["a"], InputType.QUERY, prompt=""), "plain", "a")


async def test_tokens_are_counted_for_each_caller_and_no_text_is_no_work(queries: Queries) -> None:
    assert (await queries.embed("plain", ["one", "two words"], InputType.NONE)).tokens == 3
    nobody = await queries.embed("plain", [], InputType.NONE)
    assert (nobody.vectors.shape, nobody.tokens) == ((0, 8), 0)


async def test_what_arrives_during_a_call_goes_together_into_the_next(queries: Queries) -> None:
    calls = []
    queries.ended = lambda: calls.append(1)
    answers = await asyncio.gather(*(queries.embed("slow", [f"t {n}"], InputType.NONE) for n in range(17)))
    assert all(right(answer, "slow", f"t {n}") for n, answer in enumerate(answers))
    assert len(calls) == 2, "the first goes alone, all others go together"


async def test_a_caller_with_many_texts_shares_every_call_with_the_others(queries: Queries) -> None:
    """Sixteen texts a call at first: the large request alone fills many."""
    large = asyncio.create_task(queries.embed("slow", [f"many {n}" for n in range(400)], InputType.NONE))
    await asyncio.sleep(0.05)
    small = await queries.embed("slow", ["one"], InputType.NONE)
    assert right(small, "slow", "one")
    assert not large.done()
    assert right(await large, "slow", *(f"many {n}" for n in range(400)))


async def test_a_text_that_is_refused_costs_its_own_caller_alone(queries: Queries) -> None:
    fine, poisoned, void = await asyncio.gather(
        queries.embed("fussy", ["fine", "too"], InputType.NONE),
        queries.embed("fussy", ["fine", "poison"], InputType.NONE),
        queries.embed("fussy", ["void"], InputType.NONE),
        return_exceptions=True,
    )
    assert isinstance(fine, Answered)
    assert right(fine, "fussy", "fine", "too")
    assert isinstance(poisoned, TextRejected)
    assert str(poisoned).startswith("text 2: ")
    assert isinstance(void, TextRejected)


async def test_a_model_that_is_down_or_unknown_is_told(queries: Queries) -> None:
    with pytest.raises(EmbedderDown):
        await queries.embed("down", ["a"], InputType.NONE)
    with pytest.raises(UnknownModel, match="there is no model other"):
        await queries.embed("other", ["a"], InputType.NONE)

    async def refresh() -> None:
        queries.models = {"other": ModelSpec("other", 8, "fake")}

    queries.refresh = refresh
    assert right(await queries.embed("other", ["a"], InputType.NONE), "other", "a")


async def test_whoever_sees_another_row_of_a_model_is_answered_by_it(queries: Queries) -> None:
    """The row is read again, once for all who asked before; where it is the same then, it is not committed."""
    changed, unseen = replace(PLAIN, query_prompt="new: "), replace(PLAIN, query_prompt="not committed: ")
    reads = []

    async def refresh() -> None:
        await asyncio.sleep(0.01)
        reads.append(1)
        queries.models = {"plain": changed}

    queries.refresh = refresh
    assert right(await queries.embed("plain", ["a"], InputType.QUERY, row=PLAIN), "plain", "q: a")
    assert right(await queries.embed("plain", ["a"], InputType.QUERY), "plain", "q: a")
    assert reads == []
    asked = [queries.embed("plain", ["a"], InputType.QUERY, row=row) for row in (changed, unseen, unseen, unseen)]
    assert all(right(answer, "plain", "new: a") for answer in await asyncio.gather(*asked))
    assert len(reads) <= 2, "one of those who came while it was read may ask again, and that is for all"


async def test_a_read_that_failed_is_none(queries: Queries) -> None:
    async def fail() -> None:
        raise EmbedderDown("the database is not there")

    queries.refresh = fail
    for _ in range(2):
        with pytest.raises(EmbedderDown):
            await queries.embed("other", ["a"], InputType.NONE)


async def test_an_instance_that_waits_answers_by_what_it_has_loaded(queries: Queries) -> None:
    await queries.embed("plain", ["a"], InputType.NONE)
    queries.refresh = None
    assert right(await queries.embed("plain", ["a"], InputType.NONE), "plain", "a")
    for name in ("slow", "other"):
        with pytest.raises(NotReady):
            await queries.embed(name, ["a"], InputType.NONE)


async def test_too_much_that_waits_is_refused(queries: Queries, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(querying, "MOST_TEXTS", 20)
    first = asyncio.create_task(queries.embed("slow", ["a"] * 40, InputType.NONE))  # alone it may be larger
    await asyncio.sleep(0.05)
    with pytest.raises(TooManyRequests) as refusal:
        await queries.embed("slow", ["b"], InputType.NONE)
    assert refusal.value.retry_after > 0
    await first
    monkeypatch.setattr(querying, "MOST_CHARACTERS", 100)
    second = asyncio.create_task(queries.embed("slow", ["a"] * 40, InputType.NONE))
    await asyncio.sleep(0)
    with pytest.raises(TooManyRequests):
        await queries.embed("slow", ["b" * 100], InputType.NONE)
    await second


async def test_whoever_leaves_is_not_worked_for(queries: Queries) -> None:
    first = asyncio.create_task(queries.embed("slow", ["a"] * 16, InputType.NONE))
    await asyncio.sleep(0.05)
    gone = asyncio.create_task(queries.embed("slow", ["gone"] * 1000, InputType.NONE))
    last = asyncio.create_task(queries.embed("slow", ["last"], InputType.NONE))
    await asyncio.sleep(0)
    gone.cancel()
    assert right(await last, "slow", "last")
    await first
    assert not queries._queues


async def test_other_work_is_held_back_while_a_query_is_with_the_model(queries: Queries) -> None:
    await queries.embed("plain", ["a"], InputType.NONE)
    embedder = queries._embedders.get(SLOW)
    ended = asyncio.Event()
    queries.ended = ended.set
    asked = asyncio.create_task(queries.embed("slow", ["a"], InputType.NONE))
    for _ in range(10_000):
        if queries.busy(embedder):
            break
        await asyncio.sleep(0.001)
    assert queries.busy(embedder)
    assert not ended.is_set()
    await asked
    await ended.wait()
    assert not queries.busy(embedder)


async def test_a_vector_that_was_not_to_be_normalized_is_as_the_model_made_it(queries: Queries) -> None:
    """The fake model's vectors have unit length: of those two of one direction, one is asked for as it is."""
    queries.models = {"raw": ModelSpec("raw", 8, "fake", normalize=False)}
    as_made = await queries.embed("raw", ["a"], InputType.NONE)
    asked_for = await queries.embed("raw", ["a"], InputType.NONE, normalize=True)
    assert right(as_made, "raw", "a")
    assert right(asked_for, "raw", "a")
    with pytest.raises(TextRejected, match="zeros"):
        querying._normalize(np.zeros((1, 8), np.float32))
    scaled = np.array([[3.0, 4.0], [0.0, 2.0]], np.float32)
    querying._normalize(scaled)
    assert scaled.tolist() == [[np.float32(0.6), np.float32(0.8)], [0.0, 1.0]]
