"""The rules by which hypothesis drives the model: what it may draw, and how often. See `model` for what it checks."""

from __future__ import annotations

import math
import time
from typing import Any, ClassVar

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from tests.faults.model import Violation, World

KEYS = st.integers(1, 6)
TEXTS = st.one_of(
    st.sampled_from(["a", "b", "c", "", " ", "a\n\nb", "é€😀"]),
    st.none(),
    st.sampled_from("xyz").map(lambda letter: letter * 5000),
)
CHANGES = st.one_of(
    st.tuples(st.just("put"), KEYS, TEXTS),
    st.tuples(st.just("put"), KEYS, TEXTS),
    st.tuples(st.just("title"), KEYS, TEXTS),
    st.tuples(st.just("touch"), KEYS, st.none()),
    st.tuples(st.just("save_whole"), KEYS, st.sampled_from([None, "a", "scribbled"])),
    st.tuples(st.just("rekey"), KEYS, KEYS),
    st.tuples(st.just("delete"), KEYS, st.none()),
)
PARTS = st.one_of(
    CHANGES,
    CHANGES,
    CHANGES,
    st.tuples(st.just("lock"), KEYS, st.none()),
    st.tuples(st.just("savepoint"), st.just(0), st.none()),
    st.tuples(st.just("undo"), st.just(0), st.none()),
)
ENDS = st.sampled_from(["COMMIT", "COMMIT", "PREPARE", "ROLLBACK"])
SESSIONS = st.integers(0, 1)

SPILL_AFTER_S = {"15-wal2json": 2.0, "18-pgoutput": 0.5, "15-pgoutput": 2.0}
"""By server and plugin: where it is short, what waits is soon in the backlog; where it is long, the slot must wait."""

UNBOUNDED = settings(
    database=None,
    deadline=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
"""Nothing is shrunk: what goes wrong goes wrong at a moment that does not come again."""


class Worlds:
    """The world that all examples share, and its first violation: after it no example does anything."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.violation: Violation | None = None
        self.examples = 0

    def take(self) -> World:
        if self.violation is not None:
            raise self.violation
        self.examples += 1
        return self.world

    def count_anew(self) -> None:
        self.examples = 0
        self.world.operations.clear()
        self.world.faults.clear()

    def close(self) -> None:
        self.world.close()


class Machine(RuleBasedStateMachine):
    """One example: operations in any order, then all must come right. Hypothesis prefers the first rules by name."""

    worlds: ClassVar[Worlds]
    end: ClassVar[float]

    def __init__(self) -> None:
        super().__init__()
        self._idle = time.monotonic() >= self.end
        self.world = self.worlds.take()
        if not self._idle:
            self._guarded(self.world.fresh)

    def _do(self, operation: str, *arguments: Any) -> None:
        if not self._idle and time.monotonic() < self.end:
            self._guarded(self.world.do, operation, *arguments)

    def _guarded(self, call: Any, *arguments: Any) -> None:
        try:
            call(*arguments)
        except Violation as violation:
            self._idle = True
            self.worlds.violation = violation
            raise

    def teardown(self) -> None:
        if not self._idle:
            self._guarded(self.world.settle)

    @rule(change=CHANGES)
    def change(self, change: Any) -> None:
        self._do("change", change)

    @rule(change=CHANGES, seconds=st.sampled_from([0.0, 0.01, 0.05]))
    def change_and_rest(self, change: Any, seconds: float) -> None:
        self._do("change", change)
        self._do("rest", seconds)

    @rule(key=KEYS, text=TEXTS, other=TEXTS)
    def change_twice(self, key: int, text: Any, other: Any) -> None:
        """The second time while the first text is with the model."""
        self._do("embedder", "slow")
        self._do("change", ("put", key, text))
        self._do("rest", 0.1)
        self._do("change", ("put", key, other))

    @rule(change=CHANGES)
    def change_that_waits(self, change: Any) -> None:
        """For longer than it takes until the slot's position is told to the server."""
        self._do("embedder", "down")
        self._do("change", change)
        self._do("rest", 1.2)

    @rule(changes=st.lists(PARTS, min_size=2, max_size=8), end=ENDS)
    def transaction(self, changes: Any, end: str) -> None:
        self._do("transaction", changes, end)

    @rule(session=SESSIONS, change=PARTS)
    def work(self, session: int, change: Any) -> None:
        self._do("work", session, change)

    @rule(session=SESSIONS, change=PARTS)
    def work_more(self, session: int, change: Any) -> None:
        self._do("work", session, change)

    @rule(session=SESSIONS, how=ENDS)
    def finish(self, session: int, how: str) -> None:
        self._do("end", session, how)

    @rule(kind=st.sampled_from(["upsert", "upsert", "upsert", "delete", "truncate"]))
    def many(self, kind: str) -> None:
        self._do("bulk", kind)

    @rule(seconds=st.sampled_from([0.02, 0.1, 0.3, 0.7]))
    def rest(self, seconds: float) -> None:
        self._do("rest", seconds)

    @rule(
        what=st.sampled_from(["add", "remove", "pause", "resume", "separator", "model", "reconcile", "retry"]),
        which=SESSIONS,
    )
    def configure(self, what: str, which: int) -> None:
        self._do("configure", what, which)

    @rule(how=st.sampled_from(["down", "slow", "well"]))
    def embedder(self, how: str) -> None:
        self._do("embedder", how)

    @rule(how=st.sampled_from(["kill -9", "dead", "start", "SIGTERM", "SIGSTOP"]))
    def process(self, how: str) -> None:
        self._do("process", how)

    @rule(which=st.integers(0, 9))
    def cut(self, which: int) -> None:
        self._do("cut", which)

    @rule(mode=st.sampled_from(["fast", "immediate"]))
    def server(self, mode: str) -> None:
        self._do("server", mode)

    @rule(how=st.sampled_from(["service dead", "service alive"]))
    def drop_slot(self, how: str) -> None:
        self._do("drop_slot", how)


def run(worlds: Worlds, examples: settings, number: int, end: float = math.inf) -> None:
    """Run the examples of the seed `number`, doing nothing new after `end`. Raises Violation.

    Hypothesis repeats a failing example before it reports it; with real processes the repetition says nothing, and what
    hypothesis says of it neither: the violation is raised as it came.
    """

    class Bound(Machine):
        pass

    Bound.worlds, Bound.end = worlds, end
    try:
        run_state_machine_as_test(seed(number)(Bound), settings=examples)
    except Exception:
        if worlds.violation is not None:
            raise worlds.violation from None
        raise
