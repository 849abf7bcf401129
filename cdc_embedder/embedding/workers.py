"""Several devices of this machine: a process for each, started by the service, which loads the model and embeds.

Texts go out and vectors come back through shared memory (`shared`); the pipe carries sizes, errors as our own kinds
(`crossing`) and log lines. The process is told by `worker_process`; what follows from its end is `pool`'s business. A
worker ends with the service: when the pipe closes, and on Linux by the kernel's hand too, however the service ended.
Signals for the whole process group or unit (Ctrl-C, SIGTERM) are the service's to answer: workers ignore them, so that
what is begun can be finished.

A worker that hangs keeps the call that hangs: no timeout guesses how long a model may take. The service's event loop
and the other workers go on, and whoever ends the process gets the call repeated on another.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import queue
import threading
from collections.abc import Mapping, Sequence
from functools import partial

from cdc_embedder.embedding import shared
from cdc_embedder.embedding.base import Embedded, InputType, ModelSpec
from cdc_embedder.embedding.pool import Lost, Pool
from cdc_embedder.embedding.worker_process import OURS, Load, Message, main
from cdc_embedder.errors import EmbedderDown, Problem

_PATIENCE_S = 5.0
"""For a worker to end by itself after its pipe was closed; then it is killed."""
_POLL_S = 5.0
"""A process that a worker started may hold the pipe open after the worker's end: then this often it is looked for."""


class WorkerPool(Pool):
    """`spec`'s model on each of `devices`. Loading blocks; raises ModelFault, EmbedderDown or Misconfigured.

    `down_counts` says what an EmbedderDown of a worker's embedder means. True: its device is lost to that process,
    perhaps by a text's doing, which counts as the process's end. False: what it says, for all. Either way the process
    is replaced. `hint` is for a worker that ends while it loads.
    """

    def __init__(
        self,
        spec: ModelSpec,
        devices: Sequence[str],
        load: Load,
        *,
        down_counts: bool = True,
        hint: str = "It found too little memory, or its own lines on standard error say more",
    ) -> None:
        self._devices = tuple(devices)
        super().__init__(
            spec,
            [
                partial(Worker, spec, device, load, f"worker {number} on {device}", environment, down_counts, hint)
                for number, (device, environment) in enumerate(zip(devices, _environments(devices), strict=True), 1)
            ],
        )

    @property
    def engine(self) -> str:
        """As "2 workers: packed on cuda:0+cuda:1, bfloat16"."""
        one = super().engine
        if len(self._devices) == 1:
            return one
        assert isinstance(self._model, Worker)
        everywhere = "+".join(dict.fromkeys(self._devices))
        return f"{len(self._devices)} workers: {one.replace(self._model.device, everywhere)}"


class Worker:
    """One process, as a `pool.Member`. `start` and `wait` belong to one thread, which outlives the process."""

    def __init__(
        self,
        spec: ModelSpec,
        device: str,
        load: Load,
        name: str,
        environment: Mapping[str, str],
        down_counts: bool,
        hint: str,
    ) -> None:
        self.name = name
        self.device = device
        self.identity = self.engine = ""
        self.slots = 1
        self._spec = spec
        self._down_counts = down_counts
        self._hint = hint
        self._slots: list[_Slot] = []
        self._free: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        self._busy: set[_Slot] = set()
        self._lock = threading.Lock()
        """Of what is below, of `_busy`, and of sending."""
        self._loaded = self._ended = self._closed = False
        context = multiprocessing.get_context("spawn")
        self._pipe, self._far = context.Pipe()
        self._known_as = "cuda:0" if "CUDA_VISIBLE_DEVICES" in environment else device
        level = logging.getLogger(OURS).getEffectiveLevel()
        self._process = context.Process(
            target=main,
            args=(self._far, os.getpid(), load, spec, self._known_as, dict(environment), level),
            name=f"cdc-embedder {name}",
            daemon=True,
        )

    @property
    def pid(self) -> int | None:
        """None before `start`."""
        return self._process.pid

    def start(self) -> None:
        with self._lock:
            if self._closed:
                self._pipe.close()
                self._far.close()
                raise self._closed_down()
            self._process.start()
            self._far.close()
        while True:
            match self._receive():
                case ("log", *line):
                    _relay(*line)
                case ("ready", identity, engine, slots):
                    self.identity = identity
                    self.engine = engine.replace(self._known_as, self.device)
                    self.slots = slots
                    self._slots = [_Slot(number) for number in range(slots)]
                    for slot in self._slots:
                        self._free.put(slot)
                    with self._lock:
                        self._loaded = True
                    return
                case ("failed", failure):
                    self._reap()
                    raise failure.problem()
                case _:
                    raise EmbedderDown(
                        f"{self.name} ended while it loaded the model {self._spec.name} ({self._reap()})",
                        hint=self._hint,
                    )

    def embed(self, texts: Sequence[str], input_type: InputType) -> Embedded:
        encoded = shared.encode(texts)
        slot = self._free.get()
        try:
            with self._lock:
                if self._ended:
                    raise Lost("it had ended", begun=False)
                self._busy.add(slot)
            names = (
                slot.texts.ensure(sum(map(len, encoded))),
                slot.vectors.ensure(shared.vectors_size(len(texts), self._spec.dimensions)),
            )
            shared.put_texts(slot.texts.view, encoded)
            self._send((slot.number, input_type.value, len(texts), *names))
            return self._result(slot, len(texts))
        finally:
            with self._lock:
                self._busy.discard(slot)
                slot.rest(keep=not self._ended)
            self._free.put(slot)

    def wait(self) -> str:
        while (message := self._receive()) is not None:
            match message:
                case ("log", *line):
                    _relay(*line)
                case ("attached", number):
                    self._slots[number].attached()
                case (_, number, _):
                    self._slots[number].answers.put(message)
        how = self._reap()
        with self._lock:
            last = "closed" if self._closed else "lost"
            for slot in self._slots:
                if slot in self._busy:
                    slot.answers.put((last, slot.number, how))
                else:
                    slot.rest(keep=False)
        return how

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._process.pid is None:
                return
            if not self._loaded:
                self._process.kill()
            elif not self._ended:
                self._say_goodbye()
        self._process.join(_PATIENCE_S)
        self._process.kill()
        self._process.join()

    def _send(self, request: tuple[object, ...]) -> None:
        with self._lock:
            try:
                if not self._ended:
                    return self._pipe.send(request)
            except OSError:
                pass
            raise Lost("it had ended", begun=False)

    def _say_goodbye(self) -> None:
        try:
            self._pipe.send(None)
        except OSError:
            """It has ended already."""

    def _result(self, slot: _Slot, count: int) -> Embedded:
        kind, _, content = slot.answers.get()
        if kind == "done":
            return shared.get_vectors(slot.vectors.view, count, self._spec.dimensions, *content)
        problem: Problem | None = None
        if kind == "failed":
            problem = content.problem()
            if not isinstance(problem, EmbedderDown):
                raise problem
            kind, _, content = slot.answers.get()  # the process ends with it
        if kind == "closed":
            raise self._closed_down()
        if problem is None or self._down_counts:
            raise Lost(str(problem or content))
        raise problem

    def _receive(self) -> Message | None:
        """What the worker says next; None when it has ended."""
        try:
            while not self._pipe.poll(_POLL_S):
                if not self._process.is_alive() and not self._pipe.poll(0):
                    return None
            message: Message = self._pipe.recv()
        except (EOFError, OSError):
            return None
        return message

    def _reap(self) -> str:
        """Once it has ended or is about to: leave no zombie. How it ended."""
        self._process.join()
        with self._lock:
            self._ended = True
            self._pipe.close()
        code = self._process.exitcode or 0
        return f"signal {-code}" if code < 0 else f"status {code}"

    def _closed_down(self) -> EmbedderDown:
        return EmbedderDown(f"the model {self._spec.name} has been closed")


class _Slot:
    """Room for one call. Two objects are never the same slot."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.texts = shared.Segment()
        self.vectors = shared.Segment()
        self.answers: queue.SimpleQueue[Message] = queue.SimpleQueue()

    def attached(self) -> None:
        self.texts.attached()
        self.vectors.attached()

    def rest(self, *, keep: bool) -> None:
        for segment in (self.texts, self.vectors):
            segment.rest(keep=keep)


def _environments(devices: Sequence[str]) -> list[dict[str, str]]:
    """For each worker: its share of the cores, its own GPU and no other (libraries open contexts on the first)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = {}
    if len(devices) > 1:
        for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
            share[name] = os.environ.get(name, str(max(1, cores // len(devices))))
    return [share | _only(device) for device in devices]


def _only(device: str) -> dict[str, str]:
    kind, _, index = device.partition(":")
    if kind != "cuda" or not index.isdecimal():
        return {}
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = [index] if listed is None else listed.split(",")[int(index) :][:1]
    return {"CUDA_VISIBLE_DEVICES": visible[0].strip()} if visible else {}


def _relay(name: str, level: int, message: str) -> None:
    logging.getLogger(name).log(level, "%s", message)
