"""LSNs read and print as psql shows them, and are never computed by accident."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc_embedder.lsn import LSN, ZERO


@given(st.integers(0, 2**64 - 1))
def test_what_is_printed_is_read_back(position: int) -> None:
    assert LSN.parse(str(LSN(position))) == position


@pytest.mark.parametrize(
    ("text", "position"),
    [("0/0", 0), ("16/B374D848", 0x16_B374D848), ("FFFFFFFF/FFFFFFFF", 2**64 - 1), ("1/0", 2**32)],
)
def test_an_lsn_reads_as_psql_prints_it(text: str, position: int) -> None:
    assert LSN.parse(text) == position
    assert str(LSN(position)) == text


@pytest.mark.parametrize("text", ["", "/", "1", "1/", "/1", "x/1", "1/100000000", "123456789/0"])
def test_anything_else_is_not_an_lsn(text: str) -> None:
    with pytest.raises(ValueError, match=r"not an LSN|invalid literal"):
        LSN.parse(text)


def test_a_computed_position_is_no_lsn() -> None:
    assert type(LSN.parse("0/10") + 1) is int
    assert type(max(ZERO, LSN(1))) is LSN
