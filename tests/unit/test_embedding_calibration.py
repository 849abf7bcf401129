"""The budget of tokens: measured once for a device, a model and versions, then remembered."""

from __future__ import annotations

import json
import pwd
from pathlib import Path
from typing import NoReturn

import pytest

from cdc_embedder.embedding import calibration
from cdc_embedder.embedding.base import ModelSpec
from cdc_embedder.embedding.local import LocalEmbedder
from tests import models


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "cdc-embedder" / "batch_tokens.json"


@pytest.mark.parametrize(
    ("rates", "chosen"),
    [
        ({1: 10.0, 2: 20.0, 4: 40.0}, 4),
        ({1: 10.0, 2: 39.0, 4: 40.0}, 2),
        ({1: 40.0, 2: 39.9, 4: 20.0}, 1),
        ({1: 10.0, 2: 20.0, 4: None}, 2),
        ({1: None}, None),
    ],
)
def test_the_smallest_budget_that_is_nearly_the_fastest_is_chosen(
    rates: dict[int, float | None], chosen: int | None
) -> None:
    assert calibration.choose(rates.__getitem__, sorted(rates)) == chosen


def test_a_budget_is_measured_once_for_each_key(cache: Path) -> None:
    asked: list[int] = []

    def rate(tokens: int) -> float:
        asked.append(tokens)
        return float(tokens)

    assert calibration.budget("a", rate, fallback=7) == 65_536
    assert calibration.budget("a", rate, fallback=7) == 65_536
    assert len(asked) == 5
    assert calibration.budget("b", rate, fallback=7) == 65_536
    assert len(asked) == 10
    assert json.loads(cache.read_text()) == {"a": 65_536, "b": 65_536}
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


def test_where_no_budget_fits_the_fallback_is_taken_and_not_remembered(cache: Path) -> None:
    assert calibration.budget("a", lambda _: None, fallback=7) == 7
    assert not cache.exists()


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": "x"}', '{"a": -1}'])
def test_a_file_that_makes_no_sense_is_measured_over(content: str, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text(content)
    assert calibration.budget("a", lambda _: 1.0, fallback=7) == 4_096
    assert json.loads(cache.read_text()) == {"a": 4_096}


def test_a_budget_that_cannot_be_kept_is_used_all_the_same(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.parent.write_text("a file where the folder should be")
    assert calibration.budget("a", lambda _: 1.0, fallback=7) == 4_096
    assert "cannot be kept" in caplog.text


def test_who_has_no_home_measures_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under systemd's DynamicUser where no name service knows the user."""

    def unknown(_: int) -> NoReturn:
        raise KeyError

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert calibration.cache_file() is None
    assert [calibration.budget("a", rate, fallback=7) for rate in (lambda _: 1.0, float)] == [4_096, 65_536]


@pytest.mark.parametrize("build", [models.bert, models.mpnet], ids=["packed", "padded"])
def test_a_model_is_timed_on_its_device(
    build: object, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(build)
    monkeypatch.setattr(calibration, "CANDIDATES", (64, 256))
    folder = build(tmp_path)
    embedder = LocalEmbedder(ModelSpec("tiny", models.HIDDEN, source=str(folder)), "cpu")
    assert embedder._forward is not None
    assert embedder._calibrate(embedder._forward) in (64, 256)
    (key,) = json.loads(cache.read_text())
    assert embedder.identity in key
    assert embedder.engine in key
