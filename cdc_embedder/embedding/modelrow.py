"""What every backend reads from a model's row in the same way: its prompts and the options that it knows. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cdc_embedder.embedding.base import InputType, ModelSpec
from cdc_embedder.errors import ModelFault


def prompt_of(spec: ModelSpec, input_type: InputType) -> str | None:
    """The row's own prompt for `input_type`; None where the row leaves it to the model's files."""
    match input_type:
        case InputType.DOCUMENT:
            return spec.document_prompt
        case InputType.QUERY:
            return spec.query_prompt
        case InputType.NONE:
            return ""


def prompted(spec: ModelSpec, texts: Sequence[str], input_type: InputType) -> list[str]:
    """`texts` with the row's prompt before each, for backends without files to ask."""
    prompt = prompt_of(spec, input_type) or ""
    return [prompt + text for text in texts]


def check_options(spec: ModelSpec, known: Mapping[str, str]) -> None:
    """Refuse an option that the backend does not know, lest a misspelt one be ignored. Raises ModelFault."""
    if unknown := sorted(set(spec.options) - set(known)):
        offered = "; ".join(f"{name}: {meaning}" for name, meaning in sorted(known.items()))
        raise ModelFault(
            f"the model {spec.name} has options that the backend {spec.backend} does not know: {', '.join(unknown)}",
            hint=f"It knows {offered}",
        )


def number_option(spec: ModelSpec, name: str, default: float, *, least: float) -> float:
    """The option `name` as a number not below `least`. Raises ModelFault."""
    value = spec.options.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
        raise ModelFault(f"the model {spec.name}: the option {name} must be a number of at least {least:g}")
    return value
