"""Where a model comes from and what exactly was loaded: folders, packages, and a hub's cache on the disk."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cdc_embedder.embedding import model_source
from cdc_embedder.embedding.base import ModelSpec
from cdc_embedder.embedding.local import LocalEmbedder
from cdc_embedder.errors import EmbedderDown, ModelFault
from tests import models

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.bert(tmp_path_factory.mktemp("tiny"))


def spec_of(source: str, **changes: object) -> ModelSpec:
    return ModelSpec(**{"name": "tiny", "dimensions": models.HIDDEN, "source": source, **changes})  # type: ignore[arg-type]


def test_other_weights_are_another_identity_and_a_copy_is_the_same(tiny: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    other = models.bert(tmp_path / "other", seed=7)
    identities = [LocalEmbedder(spec_of(str(folder)), "cpu").identity for folder in (tiny, copy, other)]
    assert identities[0] == identities[1] != identities[2]
    assert identities[0].startswith("sha256:")
    (copy / "README.md").write_text("another text")
    assert model_source.identity(model_source.locate(spec_of(str(copy)))) == identities[0]


def test_a_model_in_the_hubs_cache_loads_offline_and_is_known_by_its_commit(tiny: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(tiny, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    code = """
import sys
from cdc_embedder.embedding.base import InputType, ModelSpec
from cdc_embedder.embedding.local import LocalEmbedder
from cdc_embedder.errors import EmbedderDown, ModelFault

for revision in (None, "main", sys.argv[1], "no-such-branch"):
    try:
        embedder = LocalEmbedder(ModelSpec("someone/tiny", 32, revision=revision), "cpu")
        print(embedder.identity, embedder.embed(["cat"], InputType.NONE).vectors.shape)
    except ModelFault as fault:
        print("ModelFault", fault.hint)
"""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path), "PATH": "", "HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code, COMMIT], capture_output=True, text=True, check=False, env=environment
    )
    lines = run.stdout.splitlines()
    assert lines[:3] == [f"commit:{COMMIT} (1, 32)"] * 3, run.stderr[-3000:]
    assert lines[3] == "ModelFault HF_HUB_OFFLINE is set: download the model first, or name a folder as `source`"


def test_an_unknown_model_offline_is_the_rows_fault_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelFault, match=r"no-such/model") as fault:
        LocalEmbedder(spec_of("no-such/model"), "cpu")
    assert "HF_HUB_OFFLINE" in fault.value.hint


def test_a_folder_without_a_model_is_the_rows_fault(tmp_path: Path) -> None:
    with pytest.raises(ModelFault, match="cannot be loaded") as fault:
        LocalEmbedder(spec_of(str(tmp_path)), "cpu")
    assert "folder" in fault.value.hint


def test_a_folder_with_broken_files_is_the_rows_fault(tiny: Path, tmp_path: Path) -> None:
    for name, content in (("model.safetensors", "garbage"), ("config.json", "{"), ("modules.json", "[]")):
        broken = Path(shutil.copytree(tiny, tmp_path / name))
        (broken / name).write_text(content)
        with pytest.raises(ModelFault, match="cannot be loaded"):
            LocalEmbedder(spec_of(str(broken)), "cpu")


def test_code_that_a_model_brings_does_not_run_unless_its_row_says_so(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Own: pass\n")
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["type"] = "own.Own"
    (folder / "modules.json").write_text(json.dumps(modules))
    for trusted in (False, True):
        with pytest.raises(ModelFault):
            LocalEmbedder(spec_of(str(folder), trust_remote_code=trusted), "cpu")
        assert (tmp_path / "ran").exists() == trusted


def test_a_folder_has_no_revision_and_must_exist(tiny: Path) -> None:
    with pytest.raises(ModelFault, match="no revision"):
        model_source.locate(spec_of(str(tiny), revision="main"))
    for missing in ("/nonexistent/model", "./nonexistent", "~/nonexistent-model"):
        with pytest.raises(ModelFault, match="does not exist"):
            model_source.locate(spec_of(missing))


def test_minilm_comes_from_its_package_unless_a_revision_is_asked_for() -> None:
    for name in ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"):
        assert model_source.locate(spec_of(name)).folder is not None
    assert model_source.locate(spec_of("all-MiniLM-L6-v2", revision="main")).folder is None


def test_a_hub_that_cannot_be_reached_is_told_apart_from_a_row_that_is_wrong() -> None:
    source = model_source.Source("someone/model", None, offline=False)
    unreachable = OSError("We couldn't connect to the hub")
    unreachable.__cause__ = ConnectionRefusedError("refused")
    with pytest.raises(EmbedderDown, match="hub cannot be reached"), model_source.translated(spec_of("x"), source):
        raise unreachable
    offline = model_source.Source("someone/model", None, offline=True)
    with pytest.raises(ModelFault), model_source.translated(spec_of("x"), offline):
        raise unreachable
    with pytest.raises(ModelFault), model_source.translated(spec_of("x"), source):
        raise ValueError("Unrecognized model")
