"""Several members that embed the same model, worker processes or actors: who gets a call, and what if one dies.

A call goes whole to one member. Where a member ends under it, the call is repeated once, on a member that does
nothing else meanwhile; where that one ends too, the texts are at fault (TextRejected), and `isolation` halves them
until the guilty one is alone. So a text that kills a process is set aside, at the price of a few loads of the model,
while the other members go on. A member that ended is made anew at once; one that cannot be loaded, or that ends before
it did anything, after a pause that grows. While none is left that works or loads, calls fail with what the last load
said.

There are no timeouts here: a member that hangs keeps its calls (as a hanging model in this process would), and the
others go on. Ending its process frees it: the call is repeated elsewhere.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from cdc_embedder.embedding.base import Embedded, InputType, ModelSpec
from cdc_embedder.embedding.crossing import Failure
from cdc_embedder.errors import EmbedderDown, ModelFault, Problem, TextRejected

_log = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 60.0


class Lost(Exception):
    """The member ended under a call; `begun` is false where it had ended before."""

    def __init__(self, how: str, *, begun: bool = True) -> None:
        super().__init__(how)
        self.begun = begun


class Member(Protocol):
    """One life of a process that holds the model; the next life is another object."""

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> str: ...

    @property
    def engine(self) -> str: ...

    @property
    def slots(self) -> int:
        """How many calls at once are worth it."""
        ...

    def start(self) -> None:
        """Block until the model is loaded. Raises Problem."""
        ...

    def embed(self, texts: Sequence[str], input_type: InputType) -> Embedded:
        """Raises Lost, or Problem as an Embedder does."""
        ...

    def wait(self) -> str:
        """Block until it has ended; how it did, in a few words."""
        ...

    def close(self) -> None:
        """End it, even while it starts. Idempotent, from any thread."""
        ...


class Pool:
    """An Embedder over the members that `makers` make.

    The constructor blocks until `needed` of them are loaded (default: all). Raises ModelFault, EmbedderDown or
    Misconfigured where so many cannot be.
    """

    def __init__(self, spec: ModelSpec, makers: Sequence[Callable[[], Member]], needed: int | None = None) -> None:
        self._spec = spec
        self._size = len(makers)
        self._calls: dict[Member, int] = {}
        """Members that work, and the slots of each that are taken."""
        self._members: set[Member] = set()
        """All that live, or did until just now."""
        self._hopeful = len(makers)
        """Members that work or load; the others pause."""
        self._proven: set[Member] = set()
        """Members that have embedded something."""
        self._alone = 0
        """Calls that wait for a member of their own; they come first."""
        self._trouble: Problem = EmbedderDown(f"the model {spec.name} is not loaded")
        self._first: Member | None = None
        self._changed = threading.Condition()
        self._closing = threading.Event()
        # A thread for each that lives as long as the pool: a worker is killed when the thread that started it ends.
        self._keepers = [threading.Thread(target=self._keep, args=(make,), daemon=True) for make in makers]
        # What waits for its children at the interpreter's end would wait for ever.
        atexit.register(self.close)
        for keeper in self._keepers:
            keeper.start()
        try:
            self._await(self._size if needed is None else needed)
        except BaseException:
            self.close()
            raise

    @property
    def identity(self) -> str:
        """That of every member."""
        return self._model.identity

    @property
    def engine(self) -> str:
        return self._model.engine

    @property
    def concurrency(self) -> int:
        """One call more than members, so that the next is ready when one ends; or what the members ask for."""
        return max(self._size + 1, self._size * self._model.slots)

    def embed(self, texts: Sequence[str], input_type: InputType) -> Embedded:
        """Embed `texts` in order on one member. Blocks while all are busy."""
        deaths = 0
        while True:
            member, taken = self._take(alone=deaths > 0)
            try:
                embedded = member.embed(texts, input_type)
                self._proven.add(member)
                return embedded
            except Lost as lost:
                self._bury(member)
                deaths += lost.begun
                if deaths > 1:
                    raise TextRejected(
                        f"the process that embedded the text ended, twice ({lost})",
                        hint="It is out of memory, or the text meets a defect of the model's code",
                    ) from None
            finally:
                self._give_back(member, taken)

    def close(self) -> None:
        """End every member; calls that wait or run fail with EmbedderDown. Idempotent."""
        with self._changed:
            self._closing.set()
            members = [*self._members]
            self._changed.notify_all()
        for member in members:
            member.close()
        for keeper in self._keepers:
            keeper.join()
        atexit.unregister(self.close)

    @property
    def _model(self) -> Member:
        assert self._first is not None
        return self._first

    def _await(self, needed: int) -> None:
        with self._changed:
            while len(self._calls) < needed:
                if self._hopeful < needed:
                    raise Failure.of(self._trouble).problem()
                self._changed.wait()

    def _take(self, *, alone: bool) -> tuple[Member, int]:
        """A member and how many of its slots are taken now."""
        with self._changed:
            self._alone += alone
            try:
                while True:
                    if self._closing.is_set():
                        raise EmbedderDown(f"the model {self._spec.name} has been closed")
                    if self._calls:
                        member = min(self._calls, key=self._calls.__getitem__)
                        if alone and not self._calls[member]:
                            self._calls[member] = member.slots
                            return member, member.slots
                        if not alone and not self._alone and self._calls[member] < member.slots:
                            self._calls[member] += 1
                            return member, 1
                    elif not self._hopeful:
                        raise Failure.of(self._trouble).problem()
                    self._changed.wait()
            finally:
                self._alone -= alone
                self._changed.notify_all()

    def _give_back(self, member: Member, taken: int) -> None:
        with self._changed:
            if member in self._calls:
                self._calls[member] -= taken
                self._changed.notify_all()

    def _keep(self, make: Callable[[], Member]) -> None:
        """Keep one member alive until the pool is closed."""
        failures = 0
        while True:
            member = make()
            with self._changed:
                if self._closing.is_set():
                    return
                self._members.add(member)
            try:
                member.start()
                self._admit(member)
            except Problem as problem:
                failures += 1
                trouble = problem
            else:
                how = member.wait()
                busy = self._dismissed(member)
                failures = 0 if busy or member in self._proven else failures + 1
                trouble = EmbedderDown(f"{member.name} ended ({how})")
                if not self._closing.is_set():
                    _log.warning(
                        "%s of the model %s ended (%s)%s; it is made anew",
                        member.name,
                        self._spec.name,
                        how,
                        ": what it embedded is embedded again" if busy else "",
                    )
            member.close()
            with self._changed:
                self._members.discard(member)
                self._proven.discard(member)
            if failures:
                self._pause(trouble, min(_LONGEST_PAUSE_S, 2.0 ** (failures - 1)))

    def _admit(self, member: Member) -> None:
        with self._changed:
            if self._first is not None and member.identity != self._first.identity:
                raise ModelFault(
                    f"{member.name} loaded another model of the name {self._spec.name} than the others did"
                    f" ({member.identity}, not {self._first.identity})",
                    hint="Pin its revision in the model's row, or put the same files on every machine",
                )
            self._first = self._first or member
            self._calls[member] = 0
            self._changed.notify_all()

    def _bury(self, member: Member) -> None:
        """It gets no more calls, though its keeper may not have heard yet."""
        with self._changed:
            self._calls.pop(member, None)

    def _dismissed(self, member: Member) -> bool:
        """It gets no more calls; whether it ended under one."""
        with self._changed:
            return self._calls.pop(member, 1) > 0

    def _pause(self, trouble: Problem, seconds: float) -> None:
        with self._changed:
            self._hopeful -= 1
            self._trouble = trouble
            self._changed.notify_all()
        if self._first is not None and not self._closing.is_set():
            _log.warning("%s; the next attempt is in %g s", trouble.sentence, seconds)
        self._closing.wait(seconds)
        with self._changed:
            self._hopeful += 1
