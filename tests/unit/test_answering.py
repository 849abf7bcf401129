"""What answers SQL ends when it is told to, whatever happens to its own stream at that moment."""

from __future__ import annotations

import asyncio
from typing import NoReturn

import pytest

from cdc_embedder.answering import Answering
from cdc_embedder.embedding.registry import Embedders
from cdc_embedder.errors import ServerGone
from cdc_embedder.querying import Queries

pytestmark = pytest.mark.asyncio


class Lost(Answering):
    """One whose streams are lost as soon as `end` says so, and whose turns are counted."""

    def __init__(self) -> None:
        super().__init__("", "", "slot", Queries(Embedders()), 60.0)
        self.end = asyncio.Event()
        self.turns = 0
        self.again = asyncio.Event()

    async def _turn(self) -> None:
        self.turns += 1
        if self.turns > 1:
            self.again.set()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._lose())
            await asyncio.Event().wait()

    async def _lose(self) -> NoReturn:
        await self.end.wait()
        raise ServerGone("the stream was lost")


async def test_a_cancellation_that_comes_with_the_end_of_its_stream_is_not_lost() -> None:
    """A server that goes away ends every stream at once: one of them ends the session, and this has to end with it."""
    answering = Lost()
    task = asyncio.create_task(answering.run())
    await asyncio.sleep(0)
    answering.end.set()
    for _ in range(2):  # its TaskGroup has asked it to end, and it has not been told yet
        await asyncio.sleep(0)
    assert task.cancelling() == 1
    task.cancel()
    await asyncio.wait({task}, timeout=30)
    assert task.cancelled()
    assert answering.turns == 1


async def test_trouble_is_told_once_with_what_happens_next(caplog: pytest.LogCaptureFixture) -> None:
    answering = Lost()
    answering.end.set()
    task = asyncio.create_task(answering.run())
    await answering.again.wait()
    task.cancel()
    await asyncio.wait({task})
    assert caplog.messages == ["SQL is not answered: the stream was lost; trying again"]
