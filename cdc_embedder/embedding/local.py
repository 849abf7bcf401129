"""A sentence-transformers model in this process, on a GPU where there is one.

Prompts, pooling, normalization and the length limit are as the model's files say, unless its row says otherwise.
A text is embedded once a call, however often it comes. Texts are sorted by length and cut by a budget of tokens; when
memory runs out the budget halves, and grows again as calls succeed. How a batch gets through the model is `forward`
and `packed`, where the model comes from, and what exactly was loaded, is `model_source`.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from transformers.utils import logging as transformers_logging

from cdc_embedder.embedding import calibration, model_source
from cdc_embedder.embedding.base import Embedded, InputType, ModelSpec, Spent, Vectors
from cdc_embedder.embedding.forward import Forward, Library, Padded, Work, fastest_that_is_right
from cdc_embedder.embedding.loading import device_called, dtype_called, own_tokenizing, prompt_for, token_limit
from cdc_embedder.embedding.modelrow import check_options, number_option
from cdc_embedder.embedding.packed import Packed
from cdc_embedder.embedding.tokenizing import MOST_CHARACTERS, Tokenized
from cdc_embedder.embedding.transfer import Finish, transfer_to
from cdc_embedder.errors import EmbedderDown, ModelFault, TextRejected

_log = logging.getLogger(__name__)

OPTIONS = {
    "batch_tokens": "tokens in one forward pass, by default 2048 on a CPU, and measured at the first load on a GPU",
    "truncate_dim": "how many leading dimensions to keep, for models trained so (Matryoshka)",
}
_BATCH_TOKENS = {"cpu": 2_048, "gpu": 32_768}

_CONCURRENCY = 2
"""One call is tokenized while another is on the device."""

_MOST_THREADS = {"cpu": 4, "gpu": 16}
"""Of tokenizing: on a CPU the model wants the cores itself."""

_MEMORY_SIGNS = ("DefaultCPUAllocator: ", "not enough memory", "out of memory", "could not create a primitive")
"""What torch and oneDNN, which has no better word for it, say in a RuntimeError when memory runs out."""

_PROBE_TOKENS = 128
"""The length of the texts that calibration times, where the model reads so many."""

_LEAST_COSINE = {torch.float32: 0.999999, torch.float16: 0.9995, torch.bfloat16: 0.997}
"""How near a way through the model must come to the library's to be used: what rounding leaves of it."""

_PROOF = [
    "canary",
    "Which of 3 ways is the fastest?",
    "the cat and the dog read a short text, the list of words is in a file",
    "",
    "Which of 4 ways is the fastest?",
    "a long text of the table, the index and the time of a search " * 4,
]
"""Of different lengths, and two of the same, as the ways differ in how they treat a text's neighbours."""

transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def gpus() -> list[str]:
    """The GPUs that torch sees, as `device` takes them; none is touched."""
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]


class LocalEmbedder:
    """`spec`'s model on `device` (auto, cpu, cuda, cuda:1 …). Loading blocks for seconds.

    Raises ModelFault where the model is not what its row says, EmbedderDown where the hub cannot be reached,
    Misconfigured where there is no such device. `embed` may be called from several threads at once.
    """

    def __init__(self, spec: ModelSpec, device: str = "auto") -> None:
        check_options(spec, OPTIONS)
        self._spec = spec
        self._device = device_called(device)
        self._lock = threading.Lock()
        self._counting = threading.Lock()
        self._busy_until = 0.0
        source = model_source.locate(spec)
        dtype = dtype_called(spec.dtype, self._device)
        truncate_dim = int(number_option(spec, "truncate_dim", 0, least=0)) or None
        with model_source.translated(spec, source):
            model = SentenceTransformer(
                source.name,
                revision=source.revision,
                device=str(self._device),
                trust_remote_code=spec.trust_remote_code,
                local_files_only=source.offline,
                model_kwargs={"dtype": dtype},
                truncate_dim=truncate_dim,
            )
        model.eval()
        self._identity = model_source.identity(source)
        self._limit = token_limit(spec, model)
        if self._limit is not None:
            model.max_seq_length = self._limit
        kind = "cpu" if self._device.type == "cpu" else "gpu"
        self._tokenizing = own_tokenizing(model, self._limit, min(_MOST_THREADS[kind], os.cpu_count() or 1))
        self._prompts = {input_type: prompt_for(spec, model, input_type) for input_type in InputType}
        library = Library(model, self._prompts)
        self._forward: Forward | None = library
        self._full_budget = self._budget = int(number_option(spec, "batch_tokens", _BATCH_TOKENS[kind], least=1))
        self._warm_up()
        self._forward = self._choose_forward(model, library, dtype, truncate_dim)
        self._engine = f"{self._forward.name} on {self._device}, {str(dtype).removeprefix('torch.')}"
        if kind == "gpu" and "batch_tokens" not in spec.options and self._forward is not library:
            self._full_budget = self._budget = self._calibrate(self._forward)

    @property
    def identity(self) -> str:
        """`commit:<hub commit>` or `sha256:<of the weights>`."""
        return self._identity

    @property
    def engine(self) -> str:
        """`packed on cuda:0, bfloat16`: the way through the model, the device, what it computes in."""
        return self._engine

    @property
    def concurrency(self) -> int:
        """Calls at once that keep the device busy: one there, one on its way."""
        return _CONCURRENCY

    def embed(self, texts: Sequence[str], input_type: InputType) -> Embedded:
        """Embed `texts` in order. Raises TextRejected for a text that does not fit into memory even alone."""
        places: dict[str, int] = {}
        rows = np.array([places.setdefault(text, len(places)) for text in texts], dtype=np.intp)
        once = list(places)
        began = time.perf_counter()
        bounded = once if self._limit is None else [text[:MOST_CHARACTERS] for text in once]
        tokenized = self._tokenize(self._prompts[input_type], bounded)
        truncated = np.array([len(b) < len(t) for b, t in zip(bounded, once, strict=True)], dtype=np.bool_)
        if tokenized is None:
            lengths = np.array([len(text) // 3 + 2 for text in bounded], dtype=np.int64)
            if self._limit is not None:
                truncated |= lengths > self._limit
                lengths = np.minimum(lengths, self._limit)
            work = Work(bounded, None, lengths, input_type)
        else:
            truncated |= tokenized.truncated
            lengths = np.array([len(own) for own in tokenized.ids], dtype=np.int64)
            work = Work(bounded, tokenized.ids, lengths, input_type)
        tokenizing_s = time.perf_counter() - began
        with torch.inference_mode():
            vectors, padding, device_s = self._by_budget(work)
        spent = Spent(padding, tokenizing_s, device_s)
        return Embedded(vectors[rows], truncated[rows], int(lengths[rows].sum()), spent)

    def close(self) -> None:
        """Free the device's memory, after the batches under way."""
        with self._lock:
            self._forward = None
            if self._tokenizing is not None:
                self._tokenizing.close()
            self._free_memory()

    def _tokenize(self, prompt: str, texts: Sequence[str]) -> Tokenized | None:
        if self._tokenizing is None:
            return None
        try:
            return self._tokenizing.encode([prompt + text for text in texts])
        except RuntimeError:
            # Its threads take nothing after close().
            self._open_forward()
            raise

    def _open_forward(self) -> Forward:
        if self._forward is None:
            raise EmbedderDown(f"the model {self._spec.name} has been closed")
        return self._forward

    def _warm_up(self) -> None:
        """The first call of a device is slow, and shows how many dimensions the vectors really have."""
        found = self.embed(["warm-up"], InputType.NONE).vectors.shape[1]
        if found != self._spec.dimensions:
            self.close()
            raise ModelFault(
                f"the model {self._spec.name} has {found} dimensions, its row says {self._spec.dimensions}",
                hint="Correct `dimensions` in its row, or its `source`",
            )

    def _choose_forward(
        self, model: SentenceTransformer, library: Library, dtype: torch.dtype, truncate_dim: int | None
    ) -> Forward:
        """The fastest way through the model that gives the library's vectors."""
        if self._tokenizing is None or not self._tokenizing.single_segment():
            _log.info("padded: model=%s reason=its tokenizer is not a plain fast one", self._spec.name)
            return library
        transfer = transfer_to(self._device)
        candidates = (
            lambda: Packed(model, transfer, truncate_dim),
            lambda: Padded(model, transfer, truncate_dim),
        )
        ids = self._tokenizing.encode(_PROOF).ids
        work = Work(_PROOF, ids, np.array([len(own) for own in ids], dtype=np.int64), InputType.NONE)
        with torch.inference_mode(), self._device_errors():
            forward, reasons = fastest_that_is_right(candidates, library, work, least_cosine=_LEAST_COSINE[dtype])
        if reasons:
            _log.info("padded: model=%s reason=%s", self._spec.name, "; ".join(dict.fromkeys(reasons)))
        return forward

    def _calibrate(self, forward: Forward) -> int:
        """The budget for this device, found before or now."""
        device = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else self._device.type
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        key = f"{device}, {self._identity}, {self._limit}, {self._engine}, {versions}"
        length = min(self._limit or _PROBE_TOKENS, _PROBE_TOKENS)
        tokenized = self._tokenize("", _PROOF[-1:])
        if tokenized is None:
            return self._budget
        ids = np.resize(tokenized.ids[0], length)

        def rate(tokens: int) -> float | None:
            count = max(tokens // length, 1)
            work = Work([], [ids] * count, np.full(count, length), InputType.NONE)
            rows = np.arange(count)
            best = 0.0
            for _ in range(3):
                began = time.perf_counter()
                started = [self._start(forward, work, rows) for _ in range(4)]
                done = [self._finish(finish) for finish in started if finish is not None]
                if len(done) < len(started):
                    return None
                best = max(best, len(done) * count * length / (time.perf_counter() - began))
            return best

        with torch.inference_mode():
            return calibration.budget(key, rate, fallback=self._budget)

    def _by_budget(self, work: Work) -> tuple[Vectors, int, float]:
        """Vectors, tokens of padding, and for how many seconds the device was busy with this and nothing else.

        Longest first, so that memory runs out at once if at all. A batch is started before the last is awaited.
        """
        order = np.argsort(-work.lengths, kind="stable")
        lengths = work.lengths[order]
        under_way: deque[Finish] = deque()
        rows: list[Vectors] = []
        start = padding = 0
        with self._lock:
            forward = self._open_forward()
            began = time.perf_counter()
            while start < len(order):
                stop = start + forward.fit(lengths[start:], self._budget)
                finish = self._start(forward, work, order[start:stop])
                if finish is not None:
                    under_way.append(finish)
                    padding += forward.tokens(lengths[start:stop]) - int(lengths[start:stop].sum())
                    start = stop
                    self._budget = min(self._full_budget, self._budget + self._budget // 8 + 1)
                    if len(under_way) > 1:
                        rows.append(self._finish(under_way.popleft()))
                elif under_way:
                    rows.append(self._finish(under_way.popleft()))
                elif stop - start > 1:
                    self._budget = max(forward.tokens(lengths[start:stop]) // 2, 1)
                    _log.warning("out of memory: model=%s batch_tokens=%d from now on", self._spec.name, self._budget)
                else:
                    raise TextRejected(
                        f"a text of {lengths[start]} tokens does not fit into the memory of {self._device}",
                        hint="Lower `max_tokens` of the model's row, or use a device with more memory",
                    )
        # Another call may start its batches while this one waits for its last.
        rows += [self._finish(finish) for finish in under_way]
        out: Vectors = np.empty((len(order), rows[0].shape[1] if rows else self._spec.dimensions), dtype=np.float32)
        if rows:
            out[order] = np.concatenate(rows)
        return out, padding, self._busy(began, time.perf_counter())

    def _busy(self, began: float, ended: float) -> float:
        """How much of the time from `began` to `ended` no call before has counted."""
        with self._counting:
            began, self._busy_until = max(began, self._busy_until), max(ended, self._busy_until)
        return max(0.0, ended - began)

    def _start(self, forward: Forward, work: Work, rows: NDArray[np.intp]) -> Finish | None:
        """One batch on its way; None where memory ran out (outside the except clause, which keeps the tensors)."""
        try:
            with self._device_errors():
                return forward.start(work, rows)
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
        self._free_memory()
        return None

    def _finish(self, finish: Finish) -> Vectors:
        with self._device_errors():
            return finish()

    @contextmanager
    def _device_errors(self) -> Iterator[None]:
        try:
            yield
        except torch.AcceleratorError as error:
            raise EmbedderDown(
                f"the device {self._device} failed: {str(error).splitlines()[0]}",
                hint="An accelerator that failed so stays failed for this process: restart the service",
            ) from error

    def _free_memory(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(sign in str(error) for sign in _MEMORY_SIGNS)
