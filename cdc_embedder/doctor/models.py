"""The models that columns use: allowed here, named with the prompts that they want, loadable, of their dimensions.

Torch is imported by the loading alone, and only for a model that runs in this process.
"""

from __future__ import annotations

import asyncio
import re
import shlex

from psycopg import sql

from cdc_embedder.doctor.finding import Check, Verdict, error, ok, statement, warning
from cdc_embedder.doctor.patient import Patient
from cdc_embedder.embedding.base import InputType, ModelSpec, finish
from cdc_embedder.embedding.registry import Embedders
from cdc_embedder.errors import EmbedderDown, Misconfigured, ModelFault, Problem
from cdc_embedder.settings import Settings

LOADING = "model"
"""The check that loads; the others only read the models' rows."""

_E5 = re.compile(r"(^|/)(multilingual-)?e5-(small|base|large)(-v2|-unsupervised)?$")
"""Models that were trained with a word before each text, and whose files do not say so. Source: their model cards."""


async def prompts(patient: Patient) -> list[Verdict]:
    verdicts = []
    for spec in _used(patient):
        wanting = [
            column
            for column, text in (("document_prompt", spec.document_prompt), ("query_prompt", spec.query_prompt))
            if not text
        ]
        if _E5.search(spec.source or spec.name) and wanting:
            verdicts.append(
                warning(
                    f"model {spec.name}",
                    f"its row has no {' and no '.join(wanting)}, and E5 models find far less without 'query: ' and"
                    " 'passage: ' before the texts; another document_prompt embeds every row again",
                    statement(
                        "UPDATE cdc_embedder.model SET document_prompt = 'passage: ', query_prompt = 'query: '"
                        " WHERE name = {};",
                        sql.Literal(spec.name),
                    ),
                )
            )
        else:
            verdicts.append(ok(f"model {spec.name}", "nothing is known against its prompts"))
    return verdicts


async def permitted(patient: Patient) -> list[Verdict]:
    """Code of the model's own, and where its requests go and with which key: what the operator has to allow."""
    verdicts = []
    for spec in _used(patient):
        subject = f"model {spec.name}"
        if spec.trust_remote_code and not patient.settings.allow_remote_code:
            sentence = "it brings code of its own, which may not run here"
            verdicts.append(error(subject, sentence, "CDC_EMBEDDER_ALLOW_REMOTE_CODE=on # after reading that code"))
            continue
        try:
            if spec.backend == "openai":  # nothing is asked of the service yet
                await asyncio.to_thread(_with_embedder, patient.settings, spec, load_only=True)
        except Problem as problem:
            verdicts.append(error(subject, str(problem), _allow_key(patient.settings, spec) or problem.hint))
        else:
            verdicts.append(ok(subject, "its operator allows what it needs"))
    return verdicts


def _allow_key(settings: Settings, spec: ModelSpec) -> str:
    """The setting that allows the model its key, where that is what is refused."""
    key = spec.options.get("api_key_env")
    if key is None or key in settings.allowed_api_key_envs:
        return ""
    return f"CDC_EMBEDDER_API_KEY_ENVS={shlex.quote(f'{settings.api_key_envs},{key}')} # then restart the service"


async def loadable(patient: Patient) -> list[Verdict]:
    """Load it on the device of the settings, and embed a word."""
    verdicts = []
    for spec in _used(patient):
        subject = f"model {spec.name}"
        try:
            engine = await asyncio.to_thread(_with_embedder, patient.settings, spec)
        except Misconfigured as problem:  # the device
            verdicts.append(error(f"device {patient.settings.device}", str(problem), problem.hint))
        except EmbedderDown as problem:
            verdicts.append(error(subject, str(problem), problem.hint or "cdc-embedder doctor # again, when it is up"))
        except Problem as problem:
            verdicts.append(error(subject, str(problem), problem.hint))
        except Exception as problem:  # the libraries raise what they please
            first = next(iter(str(problem).splitlines()), "")
            sentence = f"it cannot be loaded: {type(problem).__name__}: {first}"
            verdicts.append(
                error(subject, sentence, "cdc-embedder embed 'a word' # with this model, for the whole story")
            )
        else:
            sentence = f"it embeds ({engine}), in {spec.dimensions} dimensions as its row says"
            verdicts.append(ok(subject, sentence))
    return verdicts


def _with_embedder(settings: Settings, spec: ModelSpec, *, load_only: bool = False) -> str:
    """Load `spec` and embed a word with it; how it runs. Blocks. Raises Problem."""
    embedders = Embedders(
        device=settings.device,
        allow_remote_code=settings.allow_remote_code,
        api_key_envs=tuple(settings.allowed_api_key_envs),
        base_urls=settings.allowed_base_urls,
    )
    try:
        embedder = embedders.get(spec)
        if not load_only:
            _, good = finish(embedder.embed(["canary"], InputType.DOCUMENT).vectors, spec)
            if not good.all():
                raise ModelFault(
                    f"the model {spec.name} gives a vector that is no number, or zero",
                    hint="cdc-embedder embed --model … # with another dtype, on another device",
                )
        return embedder.engine
    finally:
        embedders.close()


def _used(patient: Patient) -> list[ModelSpec]:
    """Each once, as its row is."""
    return list({column.model.name: column.model for column in patient.columns}.values())


CHECKS = (
    Check("prompts", prompts, "columns"),
    Check("model-permission", permitted, "columns"),
    Check(LOADING, loadable, "columns"),
)
