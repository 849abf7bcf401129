"""What crosses from one process to another: a result, or an error as one of our own kinds. No I/O.

An exception's own text may quote a row, and its class may not exist on the other side: what crosses is a kind of
`errors`, its sentence and its hint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cdc_embedder.embedding.base import Embedded, Embedder, InputType
from cdc_embedder.errors import EmbedderDown, Misconfigured, ModelFault, Problem, TextRejected

_KINDS: dict[str, type[Problem]] = {
    kind.__name__: kind for kind in (EmbedderDown, Misconfigured, ModelFault, TextRejected)
}

_TEXT_ERRORS = (ValueError, TypeError, IndexError, UnicodeError)
"""What a model raises on a text that it cannot digest. Their messages may quote it, so they go no further."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A Problem that pickles: `kind` is its class's name."""

    kind: str
    message: str
    hint: str

    @classmethod
    def of(cls, problem: Problem) -> Failure:
        """Kinds that no embedder should raise arrive as EmbedderDown."""
        kind = next((name for name, known in _KINDS.items() if isinstance(problem, known)), EmbedderDown.__name__)
        return cls(kind, str(problem), problem.hint)

    def problem(self) -> Problem:
        """A new exception, to be raised once."""
        return _KINDS[self.kind](self.message, hint=self.hint)


def answer(embedder: Embedder, texts: Sequence[str], input_type: InputType) -> Embedded | Failure:
    """One call of `embed`, which does not raise."""
    try:
        return embedder.embed(texts, input_type)
    except Exception as error:
        return Failure.of(in_our_words(error, texts))


def in_our_words(error: Exception, texts: Sequence[str]) -> Problem:
    """What a model raised on `texts`, as TextRejected where it may be the text's fault, else as EmbedderDown.

    What a device or a library says is worth knowing, unless it quotes.
    """
    if isinstance(error, Problem):
        return error
    if isinstance(error, _TEXT_ERRORS):
        return TextRejected(f"the model failed on the text ({type(error).__name__})")
    detail = str(error).splitlines()[0][:300] if isinstance(error, RuntimeError | OSError) and str(error) else ""
    shown = f": {detail}" if detail and not _quotes(detail, texts) else ""
    return EmbedderDown(f"the embedder failed ({type(error).__name__}{shown})")


def _quotes(detail: str, texts: Sequence[str]) -> bool:
    """Whether some of a text may be in `detail`: a dozen characters in a row, or a short one as a whole."""
    said = detail.casefold()
    pieces = {said[start : start + 12] for start in range(max(1, len(said) - 11))}
    return any(
        text in said if len(text) <= 12 else any(piece in text for piece in pieces)
        for text in (text.casefold() for text in texts)
        if len(text.strip()) > 3
    )
