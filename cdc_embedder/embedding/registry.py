"""Which embedder serves a model's row: loads each once, whoever asks first, and keeps the operator's limits.

Where the device setting names several devices, a local model runs in a process for each. Also the models that come
pre-filled, for use without a database. Nothing here imports torch, httpx or Ray before a model that needs it is asked
for, so that commands which embed nothing start at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from types import ModuleType

from cdc_embedder.embedding.base import Embedder, ModelSpec
from cdc_embedder.errors import ModelFault

_BUILTIN = {
    spec.name: spec
    for spec in (
        ModelSpec("all-MiniLM-L6-v2", 384, source="sentence-transformers/all-MiniLM-L6-v2"),
        ModelSpec("intfloat/e5-small-v2", 384, document_prompt="passage: ", query_prompt="query: "),
        ModelSpec(
            "mixedbread-ai/mxbai-embed-large-v1",
            1024,
            query_prompt="Represent this sentence for searching relevant passages: ",
        ),
        ModelSpec("Alibaba-NLP/gte-large-en-v1.5", 1024, trust_remote_code=True),
    )
}


def builtin_spec(name: str) -> ModelSpec | None:
    """The pre-filled model of that name, as `sql/models.sql` has it; None where there is none."""
    return _BUILTIN.get(name)


class Embedders:
    """Loaded models by their row. Safe to call from several threads; calls block while a model loads."""

    def __init__(
        self,
        *,
        device: str = "auto",
        allow_remote_code: bool = False,
        api_key_envs: Iterable[str] = ("OPENAI_API_KEY",),
        base_urls: Iterable[str] | None = None,
    ) -> None:
        self._device = device
        self._allow_remote_code = allow_remote_code
        self._api_key_envs = frozenset(api_key_envs)
        self._base_urls = None if base_urls is None else tuple(base_urls)
        self._entries: dict[ModelSpec, _Entry] = {}
        self._lock = threading.Lock()

    def get(self, spec: ModelSpec) -> Embedder:
        """The embedder of `spec`, loaded if need be. Raises ModelFault, EmbedderDown or Misconfigured; a failed
        load is not remembered."""
        with self._lock:
            entry = self._entries.setdefault(spec, _Entry())
        with entry.lock:
            if entry.embedder is None:
                entry.embedder = self._load(spec)
            return entry.embedder

    def has(self, spec: ModelSpec) -> bool:
        """Whether `spec` is loaded."""
        with self._lock:
            entry = self._entries.get(spec)
        return entry is not None and entry.embedder is not None

    def forget(self, spec: ModelSpec) -> None:
        """Free what is held for `spec`; the next `get` loads it anew."""
        with self._lock:
            entry = self._entries.pop(spec, None)
        if entry is not None:
            entry.close()

    def close(self) -> None:
        """Free everything. Idempotent."""
        with self._lock:
            entries, self._entries = list(self._entries.values()), {}
        for entry in entries:
            entry.close()

    def _load(self, spec: ModelSpec) -> Embedder:
        match spec.backend:
            case "fake":
                return load_here(spec, "cpu")
            case "openai":
                from cdc_embedder.embedding.http import HttpEmbedder

                return HttpEmbedder(spec, allowed_key_envs=self._api_key_envs, allowed_base_urls=self._base_urls)
            case "local":
                self._permit(spec)
                devices = _devices(self._device)
                if len(devices) == 1:
                    return load_here(spec, devices[0])
                from cdc_embedder.embedding.workers import WorkerPool

                return WorkerPool(spec, devices, load_here)
            case "ray":
                self._permit(spec)
                from cdc_embedder.embedding.ray_pool import ray_embedder

                return ray_embedder(spec, load_here)
            case _:
                raise ModelFault(
                    f"the model {spec.name} has the backend {spec.backend}, which this version does not have",
                    hint="Use local, openai, ray or fake",
                )

    def _permit(self, spec: ModelSpec) -> None:
        if spec.trust_remote_code and not self._allow_remote_code:
            raise ModelFault(
                f"the model {spec.name} brings code of its own, which may not run here",
                hint="Read that code; then set CDC_EMBEDDER_ALLOW_REMOTE_CODE=on and restart the service",
            )


def load_here(spec: ModelSpec, device: str) -> Embedder:
    """`spec` on one `device` of this process, which may be a worker's or an actor's. Raises as `Embedders.get` does."""
    if spec.backend == "fake":
        from cdc_embedder.embedding.fake import FakeEmbedder

        return FakeEmbedder(spec)
    embedder: Embedder = _local().LocalEmbedder(spec, device)
    return embedder


def _devices(setting: str) -> list[str]:
    """What `CDC_EMBEDDER_DEVICE` names. `auto` is every GPU where there are several; torch is asked how many."""
    named = [part.strip() for part in setting.split(",")]
    if named != ["auto"]:
        return named
    gpus: list[str] = _local().gpus()
    return gpus if len(gpus) > 1 else named


def _local() -> ModuleType:
    try:
        from cdc_embedder.embedding import local
    except ImportError as error:
        raise ModelFault(
            f"a local model needs {error.name or 'torch'}, which is not installed",
            hint="pip install 'cdc-embedder[local]'",
        ) from error
    return local


class _Entry:
    """One model's place: empty until its load, which one thread does while others wait."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.embedder: Embedder | None = None

    def close(self) -> None:
        with self.lock:
            if self.embedder is not None:
                self.embedder.close()
                self.embedder = None
