"""A worker's own process: it loads the model, says so, and embeds what it is sent until its pipe closes.

The other side, in the service, is `workers`. Nothing here returns to what started the process.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import Any, NoReturn

from cdc_embedder.embedding import shared
from cdc_embedder.embedding.base import Embedded, Embedder, InputType, ModelSpec
from cdc_embedder.embedding.crossing import Failure, answer
from cdc_embedder.errors import EmbedderDown, ModelFault, Problem, TextRejected

Load = Callable[[ModelSpec, str], Embedder]
"""Makes the embedder of a row on a device. It is called in the worker, so it must pickle."""

Message = tuple[Any, ...]
"""ready, failed, log, attached or done, and what belongs to it."""

OURS = "cdc_embedder"
"""The logger whose lines are relayed."""

_PR_SET_PDEATHSIG = 1  # prctl(2)


def main(
    pipe: Connection[Message, Message | None],
    parent: int,
    load: Load,
    spec: ModelSpec,
    device: str,
    environment: Mapping[str, str],
    level: int,
) -> None:
    """The worker's process, which does not come back from here."""
    _end_with(parent)
    _leave_signals()
    os.environ.update(environment)
    voice = _Voice(pipe, level)
    try:
        embedder = load(spec, device)
        voice.say("ready", embedder.identity, embedder.engine, embedder.concurrency)
    except Exception as error:
        # What a library raised may quote anything: its kind has to do.
        fault = ModelFault(f"the model {spec.name} cannot be loaded: {type(error).__name__}")
        voice.say("failed", Failure.of(error if isinstance(error, Problem) else fault))
        _exit()
    _leave_signals()  # a library may have wanted them
    desks = [_Desk(spec, embedder, voice, number) for number in range(embedder.concurrency)]
    with ThreadPoolExecutor(len(desks)) as threads:
        while True:
            try:
                request = pipe.recv()
            except (EOFError, OSError):
                break
            if request is None:
                break
            number, *call = request
            threads.submit(desks[number].serve, *call)
        embedder.close()
        _exit()


class _Voice(logging.Handler):
    """What the worker says to the service, from any thread; its log lines too."""

    def __init__(self, pipe: Connection[Message, Message | None], level: int) -> None:
        super().__init__()
        self._pipe = pipe
        self._saying = threading.Lock()
        root = logging.getLogger()
        root.handlers[:] = [self]
        root.setLevel(logging.WARNING)
        logging.getLogger(OURS).setLevel(level)

    def say(self, *message: object) -> None:
        with self._saying:
            try:
                self._pipe.send(message)
            except OSError:
                """Nobody listens: the main thread sees it too, and ends the process."""

    def emit(self, record: logging.LogRecord) -> None:
        self.say("log", record.name, record.levelno, record.getMessage())


class _Desk:
    """The worker's side of a slot."""

    def __init__(self, spec: ModelSpec, embedder: Embedder, voice: _Voice, number: int) -> None:
        self._spec = spec
        self._embedder = embedder
        self._voice = voice
        self._number = number
        self._memory: list[SharedMemory | None] = [None, None]

    def serve(self, input_type: str, count: int, *names: str | None) -> None:
        """One call, from the texts in memory to the vectors there."""
        try:
            self._attach(names)
            texts, vectors = map(shared.view, self._memory)
            result = answer(self._embedder, shared.get_texts(texts, count), InputType(input_type))
            if isinstance(result, Embedded):
                self._check(result, count)
                shared.put_vectors(vectors, result)
                self._voice.say("done", self._number, (result.tokens, result.spent))
                return
            failure = result
        except Problem as problem:
            failure = Failure.of(problem)
        except Exception as error:
            failure = Failure.of(EmbedderDown(f"the worker failed ({type(error).__name__})"))
        self._voice.say("failed", self._number, failure)
        if failure.kind == EmbedderDown.__name__:
            _exit()

    def _attach(self, names: Sequence[str | None]) -> None:
        if not any(names):
            return
        for place, name in enumerate(names):
            if name is not None:
                if (old := self._memory[place]) is not None:
                    old.close()
                self._memory[place] = SharedMemory(name)
        self._voice.say("attached", self._number)

    def _check(self, embedded: Embedded, count: int) -> None:
        rows, dimensions = embedded.vectors.shape
        if rows != count:
            raise TextRejected(f"the embedder gave {rows} vectors for {count} texts")
        if dimensions != self._spec.dimensions:
            raise ModelFault(
                f"the model {self._spec.name} gave {dimensions} dimensions, its row says {self._spec.dimensions}",
                hint="Correct `dimensions` in its row, or its `source`",
            )


def _end_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            _exit()


def _leave_signals() -> None:
    """Handlers, since what is ignored stays ignored in the programs that a library may start."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)


def _exit() -> NoReturn:
    """Without the teardown of libraries, which may take long and may crash."""
    sys.stderr.flush()
    os._exit(0)
