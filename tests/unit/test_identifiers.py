"""Names on the command line are read as SQL reads them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdc_embedder.errors import Problem
from cdc_embedder.identifiers import join, split

NAMES = st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=4)


@settings(deadline=None)
@given(NAMES, st.sampled_from(["", " ", "\n"]), st.sampled_from([".", ","]))
def test_what_is_quoted_is_read_back_letter_for_letter(parts: list[str], blank: str, separator: str) -> None:
    text = f"{blank}{separator}{blank}".join(join([part]) for part in parts)
    assert split(text, separator) == parts


@settings(deadline=None)
@given(NAMES)
def test_a_joined_name_is_one_name(parts: list[str]) -> None:
    assert split(join(parts)) == parts


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("body", ["body"]),
        ("Shop.Item.Body", ["shop", "item", "body"]),
        ('Shop."Odd ""Name".body', ["shop", 'Odd "Name', "body"]),
        ('"a.b".c', ["a.b", "c"]),
        (' a . "B" ', ["a", "B"]),
        ('" "', [" "]),
        ("_x$1", ["_x$1"]),
        ("STRASSE", ["strasse"]),
        ("Größe.ÄRGER", ["größe", "Ärger"]),
        ("İd", ["İd"]),
        ("\N{KELVIN SIGN}", ["\N{KELVIN SIGN}"]),
    ],
)
def test_unquoted_names_fold_as_in_sql_and_quoted_ones_stay(text: str, parts: list[str]) -> None:
    """PostgreSQL folds A to Z only, in every multi-byte encoding (downcase_identifier in scansup.c)."""
    assert split(text) == parts


@pytest.mark.parametrize(
    "text", ["", " ", ".", "a.", ".a", "a..b", "a b", '"', '""', '"a', '"a"b', 'a"b"', "a,b", '"a",b']
)
def test_anything_else_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(Problem, match="is not a name") as refused:
        split(text)
    assert refused.value.hint


def test_another_separator_lists_columns() -> None:
    assert split('title, "Body, long" ,x', ",") == ["title", "Body, long", "x"]
    with pytest.raises(Problem, match="is not a name"):
        split("title.body", ",")
