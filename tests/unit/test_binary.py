"""Arrays in binary form, byte for byte. The server's own reading of them is tested with the write-back.

Layouts: array_recv in arrayfuncs.c, vector_recv in vector.c, halfvec_recv in halfvec.c.
"""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdc_embedder.embedding.base import Vectors
from cdc_embedder.rows.binary import BinaryArray, octets, vectors

VALUES = np.array([[0.5, -0.25, 2.0], [0.0, 1.0, -1.0]], dtype=np.float32)

FLOATS = {"vector": ">f", "halfvec": ">e", "float4": ">f", "float8": ">d"}


def header(element: str, length: str) -> str:
    return f"00000001 00000000 {element} {length} 00000001 "


@pytest.mark.parametrize(
    ("kind", "oid", "written"),
    [
        (
            "vector",
            0x12345,
            header("00012345", "00000002")
            + "00000010 0003 0000 3f000000 be800000 40000000 00000010 0003 0000 00000000 3f800000 bf800000",
        ),
        (
            "halfvec",
            0xFFFFFFFE,
            header("fffffffe", "00000002") + "0000000a 0003 0000 3800 b400 4000 0000000a 0003 0000 0000 3c00 bc00",
        ),
        (
            "float4",
            0,
            header("000002bc", "00000006")
            + "00000004 3f000000 00000004 be800000 00000004 40000000"
            + "00000004 00000000 00000004 3f800000 00000004 bf800000",
        ),
        (
            "float8",
            0,
            header("000002bd", "00000006")
            + "00000008 3fe0000000000000 00000008 bfd0000000000000 00000008 4000000000000000"
            + "00000008 0000000000000000 00000008 3ff0000000000000 00000008 bff0000000000000",
        ),
    ],
)
def test_a_batch_of_vectors_is_written_as_the_server_reads_it(kind: str, oid: int, written: str) -> None:
    assert vectors(VALUES, kind, oid) == bytes.fromhex(written)


def test_fingerprints_are_written_as_a_bytea_array() -> None:
    written = header("00000011", "00000002") + "00000003 010203 00000003 ff00fe"
    assert octets([b"\x01\x02\x03", b"\xff\x00\xfe"], 3) == bytes.fromhex(written)


@pytest.mark.parametrize(
    ("array", "element"),
    [
        (vectors(np.zeros((0, 3), np.float32), "vector", 5), "00000005"),
        (vectors(np.zeros((0, 3), np.float32), "float4", 0), "000002bc"),
        (octets([], 32), "00000011"),
    ],
)
def test_an_empty_batch_is_an_array_without_dimensions(array: BinaryArray, element: str) -> None:
    assert array == bytes.fromhex("00000000 00000000" + element)


def test_it_is_bound_as_it_is() -> None:
    assert type(vectors(VALUES, "vector", 1)) is type(octets([b"a"], 1)) is BinaryArray


@pytest.mark.parametrize("layout", [VALUES[:, ::-1], VALUES.T, np.asfortranarray(VALUES), VALUES[::-1]])
@pytest.mark.parametrize("kind", FLOATS)
def test_a_view_is_written_as_its_copy(layout: Vectors, kind: str) -> None:
    assert vectors(layout, kind, 9) == vectors(np.ascontiguousarray(layout).copy(), kind, 9)


def test_octets_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="reshape"):
        octets([b"abc", b"abcd"], 3)


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(sorted(FLOATS)), st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_every_value_is_where_the_layout_says(kind: str, rows: int, dimensions: int, seed: int) -> None:
    values = np.random.default_rng(seed).uniform(-1, 1, (rows, dimensions)).astype(np.float32)
    code = FLOATS[kind]
    each = struct.Struct(code)
    body = b""
    for row in values:
        encoded = [each.pack(value) for value in row]
        if kind in ("float4", "float8"):
            body += b"".join(struct.pack(">i", each.size) + value for value in encoded)
        else:
            body += struct.pack(">ihh", 4 + each.size * dimensions, dimensions, 0) + b"".join(encoded)
    array = vectors(values, kind, 77)
    assert array[20:] == body
    assert struct.unpack(">5i", array[:20])[3] == (rows * dimensions if kind in ("float4", "float8") else rows)
