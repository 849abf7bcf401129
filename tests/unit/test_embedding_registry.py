"""The registry: each model once, nothing imported before it is needed, the operator's limits kept."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from cdc_embedder.embedding.base import InputType, ModelSpec
from cdc_embedder.embedding.registry import Embedders, builtin_spec
from cdc_embedder.errors import EmbedderDown, ModelFault
from tests import models

FAKE = ModelSpec("m", 8, backend="fake", options={"reject": "x"})


def test_nothing_heavy_is_imported_before_a_model_that_needs_it() -> None:
    code = (
        "import sys; from cdc_embedder.embedding.base import ModelSpec;"
        "from cdc_embedder.embedding.registry import Embedders, builtin_spec; import cdc_embedder.embedding.isolation;"
        "Embedders().get(ModelSpec('m', 4, backend='fake'));"
        "print(sorted({'torch', 'transformers', 'sentence_transformers', 'httpx', 'psycopg', 'ray'}"
        " & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_concurrent_callers_share_one_load(tmp_path: Path) -> None:
    spec = ModelSpec("tiny", models.HIDDEN, source=str(models.bert(tmp_path)))
    embedders = Embedders(device="cpu")
    together = threading.Barrier(4)

    def ask(_: int) -> int:
        together.wait()
        return id(embedders.get(spec))

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(ask, range(4)))) == 1
    embedders.close()


def test_another_setting_is_another_embedder_and_the_same_row_is_the_same() -> None:
    embedders = Embedders()
    assert embedders.get(FAKE) is embedders.get(replace(FAKE))
    assert embedders.get(FAKE) is not embedders.get(replace(FAKE, document_prompt="d: "))
    assert embedders.get(FAKE) is not embedders.get(replace(FAKE, options={"reject": "y"}))


def test_a_forgotten_model_is_closed_and_loaded_anew(tmp_path: Path) -> None:
    spec = ModelSpec("tiny", models.HIDDEN, source=str(models.bert(tmp_path)))
    embedders = Embedders(device="cpu")
    first = embedders.get(spec)
    embedders.forget(spec)
    with pytest.raises(EmbedderDown, match="closed"):
        first.embed(["a"], InputType.NONE)
    assert embedders.get(spec) is not first
    embedders.close()
    embedders.close()
    embedders.forget(spec)


def test_a_failed_load_is_tried_again(tmp_path: Path) -> None:
    spec = ModelSpec("tiny", models.HIDDEN, source=str(tmp_path / "model"))
    embedders = Embedders(device="cpu")
    with pytest.raises(ModelFault):
        embedders.get(spec)
    models.bert(tmp_path)
    assert len(embedders.get(spec).embed(["a"], InputType.NONE).vectors) == 1
    embedders.close()


def test_a_backend_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ModelFault, match="the backend onnx"):
        Embedders().get(ModelSpec("m", 8, backend="onnx"))


def test_code_from_a_repository_needs_the_operators_word_beside_the_row() -> None:
    with pytest.raises(ModelFault) as refused:
        Embedders().get(ModelSpec("m", 8, source="/nonexistent/model", trust_remote_code=True))
    assert "CDC_EMBEDDER_ALLOW_REMOTE_CODE" in refused.value.hint
    with pytest.raises(ModelFault, match="does not exist"):
        Embedders(allow_remote_code=True).get(ModelSpec("m", 8, source="/nonexistent/model", trust_remote_code=True))


def test_the_operators_limits_reach_http_backends() -> None:
    spec = ModelSpec("m", 8, backend="openai", options={"api_key_env": "PATH"})
    with pytest.raises(ModelFault, match="PATH"):
        Embedders().get(spec)
    with pytest.raises(ModelFault) as refused:
        Embedders(base_urls=["http://127.0.0.1:1/v1"]).get(ModelSpec("m", 8, backend="openai"))
    assert "CDC_EMBEDDER_BASE_URLS" in refused.value.hint


def test_the_prefilled_models_are_known_without_a_database() -> None:
    e5 = builtin_spec("intfloat/e5-small-v2")
    assert e5 is not None
    assert (e5.document_prompt, e5.query_prompt, e5.dimensions) == ("passage: ", "query: ", 384)
    gte = builtin_spec("Alibaba-NLP/gte-large-en-v1.5")
    assert gte is not None
    assert gte.trust_remote_code
    assert builtin_spec("nobody/nothing") is None
