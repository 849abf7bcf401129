"""Past one machine: the model in actors of a Ray cluster (`backend = 'ray'`), one already there or one of our own.

Ray's driver is a process of its own, a worker of `workers` whose embedder is the pool of actors: it prints what the
cluster's daemons say, takes SIGTERM for itself, and ends its process a minute after it has lost the cluster, none of
which the service can have. That process ends whenever the cluster is gone and is started anew until one answers:
meanwhile calls fail with EmbedderDown. An actor that is lost is replaced, and its batch redone, as `pool` does it.

What the actors load is the row as for `backend = 'local'`, on the cluster's machines: cdc-embedder must be installed
there in the same version, with its extra `local`, and so must Ray and Python as here.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

from cdc_embedder.embedding.base import Embedded, Embedder, InputType, ModelSpec
from cdc_embedder.embedding.crossing import Failure, answer
from cdc_embedder.embedding.modelrow import number_option
from cdc_embedder.embedding.pool import Lost, Pool
from cdc_embedder.embedding.worker_process import Load
from cdc_embedder.embedding.workers import WorkerPool
from cdc_embedder.errors import EmbedderDown, ModelFault, Problem

_log = logging.getLogger(__name__)

OPTIONS = {
    "address": "a cluster that runs: auto, host:port of its head from one of its machines, or ray://host:port from any"
    " (none: a Ray of our own on this machine)",
    "actors": "how many, by default one for each GPU of the cluster, else one",
    "num_gpus": "GPUs of each actor, a fraction where several share one; by default 1 if the cluster has any, else 0",
    "num_cpus": "CPU cores of each actor, by default 1",
}
"""Beside them a row may have the options of the backend that the actors load."""

_HINT = "The Ray cluster may be gone: look at it with `ray status`; Ray and Python must be of the same versions as here"

_OBJECT_STORE_BYTES = 256 << 20
"""Of a Ray of our own: batches are small, and its default is a third of the machine's memory."""

_PATIENCE_S = 30.0
"""After so long the log says that the cluster has had no room for an actor."""


def ray_embedder(spec: ModelSpec, load: Load) -> Embedder:
    """`spec` in actors that call `load`. Blocks until one is loaded.

    Raises ModelFault where the row or the installation is wrong, EmbedderDown where the cluster cannot be reached.
    """
    if find_spec("ray") is None:
        raise ModelFault(
            f"the model {spec.name} needs ray, which is not installed", hint="pip install 'cdc-embedder[ray]'"
        )
    _options(spec)
    return WorkerPool(spec, ["Ray"], partial(_connect, load), down_counts=False, hint=_HINT)


@dataclass(frozen=True, slots=True)
class _Options:
    address: str | None
    actors: int | None
    num_gpus: float | None
    num_cpus: float
    theirs: ModelSpec
    """What the actors load."""


def _options(spec: ModelSpec) -> _Options:
    address = spec.options.get("address")
    if address is not None and not (isinstance(address, str) and address):
        raise ModelFault(
            f"the model {spec.name}: the option address must name a Ray cluster",
            hint='As "auto", "10.0.0.1:6379" or "ray://10.0.0.1:10001"',
        )
    given = spec.options
    return _Options(
        address=address,
        actors=int(number_option(spec, "actors", 1, least=1)) if "actors" in given else None,
        num_gpus=number_option(spec, "num_gpus", 0, least=0) if "num_gpus" in given else None,
        num_cpus=number_option(spec, "num_cpus", 1, least=0),
        theirs=replace(spec, options={name: value for name, value in given.items() if name not in OPTIONS}),
    )


def _connect(load: Load, spec: ModelSpec, device: str) -> Embedder:
    """In the driver's process: its embedder."""
    options = _options(spec)
    _be_quiet()
    if options.address is None:
        # Else Ray writes a token into the home folder, which a service may not have.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    import ray

    # Ray's own lines are of no use to the operator of a database; what fails is raised.
    common: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "namespace": "cdc_embedder"}
    try:
        if options.address is None:
            ray.init(address="local", include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, **common)
        else:
            ray.init(address=options.address, **common)
        gpus = int(ray.cluster_resources().get("GPU", 0))
    except Exception as error:
        where = options.address or "of our own"
        raise EmbedderDown(
            f"the Ray cluster {where} cannot be reached ({type(error).__name__})",
            hint=_HINT,
        ) from error
    actors = options.actors if options.actors is not None else max(1, gpus)
    each = options.num_gpus if options.num_gpus is not None else min(gpus, 1)
    return _Actors(load, options, actors, each)


class _Actors(Pool):
    """Serves as soon as one actor is loaded: a cluster that grows on demand brings them one by one."""

    def __init__(self, load: Load, options: _Options, actors: int, num_gpus: float) -> None:
        self._size_asked = actors
        make = partial(_Actor, load, options, num_gpus)
        super().__init__(options.theirs, [partial(make, f"actor {n}") for n in range(1, actors + 1)], needed=1)

    @property
    def engine(self) -> str:
        return f"{self._size_asked} Ray actor{'s' * (self._size_asked > 1)}: {super().engine}"

    def close(self) -> None:
        import ray

        super().close()
        ray.shutdown()


class _Actor:
    """One life of an actor, as a `pool.Member`."""

    def __init__(self, load: Load, options: _Options, num_gpus: float, name: str) -> None:
        self.name = name
        self.identity = self.engine = ""
        self.slots = 1
        self._load = load
        self._options = options
        self._num_gpus = num_gpus
        self._handle: Any = None
        self._closed = threading.Event()

    def start(self) -> None:
        import ray

        # Lost actors are made anew by the pool, which looks at what they load: Ray need not restart them.
        # Threads: the one that lives, one that answers at once, and those that embed.
        remote = ray.remote(max_restarts=0, max_concurrency=8)(_Host)
        device = "cuda:0" if self._num_gpus else "cpu"
        self._handle = remote.options(num_gpus=self._num_gpus, num_cpus=self._options.num_cpus).remote()
        loading = self._handle.load.remote(self._load, self._options.theirs, device)
        try:
            while not ray.wait([loading], timeout=_PATIENCE_S)[0]:
                _log.warning(
                    "%s of the model %s is not loaded yet: it needs num_cpus=%g num_gpus=%g of the cluster's %s",
                    self.name,
                    self._options.theirs.name,
                    self._options.num_cpus,
                    self._num_gpus,
                    {name: ray.cluster_resources().get(name, 0) for name in ("CPU", "GPU")},
                )
            told = self._get(loading)
        except Lost as lost:
            raise EmbedderDown(
                f"{self.name} ended while it loaded the model {self._options.theirs.name} ({lost})",
                hint="It found too little memory, or no cdc-embedder[local] of this version; Ray's log of it says more",
            ) from None
        if isinstance(told, Failure):
            raise told.problem()
        self.identity, self.engine, self.slots = told

    def embed(self, texts: Sequence[str], input_type: InputType) -> Embedded:
        try:
            self._get(self._handle.ping.remote())
        except Lost as lost:
            raise Lost(str(lost), begun=False) from None
        result: Embedded | Failure = self._get(self._handle.embed.remote(list(texts), input_type.value))
        if isinstance(result, Embedded):
            return result
        problem = result.problem()
        if isinstance(problem, EmbedderDown):
            # Its device is lost to its process, perhaps by a text's doing.
            self.close()
            raise Lost(str(problem))
        raise problem

    def wait(self) -> str:
        try:
            self._get(self._handle.live.remote())
        except (Lost, EmbedderDown) as end:
            return str(end)
        return "it ended"

    def close(self) -> None:
        import ray

        if self._handle is not None and not self._closed.is_set():
            self._closed.set()
            try:
                ray.kill(self._handle)
            except Exception as error:
                _log.debug("%s cannot be ended: %s", self.name, type(error).__name__)

    def _get(self, reference: Any) -> Any:
        """Raises Lost where the actor is, EmbedderDown where more than the actor is."""
        import ray

        try:
            return ray.get(reference)
        except ray.exceptions.RayActorError as error:
            self.close()
            raise Lost(type(error).__name__) from None
        except Exception as error:
            raise EmbedderDown(f"the Ray cluster failed ({type(error).__name__})", hint=_HINT) from error


class _Host:
    """The actor itself: an embedder on one of the cluster's machines."""

    def load(self, load: Load, spec: ModelSpec, device: str) -> tuple[str, str, int] | Failure:
        try:
            self._embedder = load(spec, device)
        except Problem as problem:
            return Failure.of(problem)
        except Exception as error:
            return Failure.of(ModelFault(f"the model {spec.name} cannot be loaded: {type(error).__name__}"))
        return self._embedder.identity, self._embedder.engine, self._embedder.concurrency

    def ping(self) -> None:
        """It is there."""

    def live(self) -> None:
        """For ever: whoever waits for it hears of the actor's end."""
        threading.Event().wait()

    def embed(self, texts: list[str], input_type: str) -> Embedded | Failure:
        return answer(self._embedder, texts, InputType(input_type))


def _be_quiet() -> None:
    """No usage reports; what Ray prints, on whichever stream, goes nowhere."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    sys.stdout.flush()
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    os.close(nowhere)
