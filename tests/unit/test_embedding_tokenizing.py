"""Token ids from several threads: the tokenizer's own, in order, cut and marked as cut."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from tokenizers import Tokenizer

from cdc_embedder.embedding import tokenizing
from cdc_embedder.embedding.tokenizing import Tokenizing
from tests import models

WORDS = models.WORDS.split()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(models.bert(tmp_path_factory.mktemp("tiny")) / "tokenizer.json"))
    # As published files have it: a limit and a padding that are not the model's.
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    return tokenizer


@pytest.fixture
def ours(theirs: Tokenizer) -> Iterator[Tokenizing]:
    made = Tokenizing(theirs, 12, direction="right", threads=3)
    yield made
    made.close()


def test_each_text_gets_the_tokenizers_ids_whatever_thread_made_them(theirs: Tokenizer, ours: Tokenizing) -> None:
    texts = [" ".join(WORDS[i % 7 : i % 7 + i % 10]) for i in range(500)]
    plain = Tokenizer.from_str(theirs.to_str())
    plain.no_padding()
    plain.no_truncation()
    got = ours.encode(texts)
    assert [ids.tolist() for ids in got.ids] == [plain.encode(text).ids for text in texts]
    assert not got.truncated.any()
    assert {ids.dtype for ids in got.ids} == {np.dtype(np.int64)}


@pytest.mark.parametrize(("direction", "kept"), [("right", WORDS[:10]), ("left", WORDS[10:20])])
def test_a_text_is_cut_on_the_tokenizers_side_and_marked_only_if_it_lost_something(
    theirs: Tokenizer, direction: str, kept: list[str]
) -> None:
    made = Tokenizing(theirs, 12, direction=direction, threads=1)
    got = made.encode([" ".join(WORDS[:20]), " ".join(kept), "cat"])
    assert got.truncated.tolist() == [True, False, False]
    assert got.ids[0].tolist() == got.ids[1].tolist()


def test_without_a_limit_nothing_is_cut(theirs: Tokenizer) -> None:
    got = Tokenizing(theirs, None, direction="right", threads=1).encode(["cat " * 3_000])
    assert (len(got.ids[0]), got.truncated.tolist()) == (3_002, [False])


def test_texts_are_taken_in_groups_that_are_bounded_in_number_and_in_characters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert [len(group) for group in tokenizing._groups(["cat"] * 130)] == [64, 64, 2]
    monkeypatch.setattr(tokenizing, "MOST_CHARACTERS", 10)
    texts = ["x" * n for n in (4, 6, 1, 30, 2, 0)]
    assert [[len(text) for text in group] for group in tokenizing._groups(texts)] == [[4, 6], [1], [30], [2, 0]]


def test_a_lone_surrogate_is_an_error_of_its_call_alone(ours: Tokenizing) -> None:
    with pytest.raises(TypeError):
        ours.encode(["cat"] * 100 + ["\ud800"])
    assert len(ours.encode(["cat"] * 100).ids) == 100


def test_no_texts_are_no_ids(ours: Tokenizing) -> None:
    got = ours.encode([])
    assert (got.ids, got.truncated.shape) == ([], (0,))
