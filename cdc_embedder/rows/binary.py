"""Batches as PostgreSQL arrays in binary form, built by numpy: no list of lists, no text.

A Python list of vectors bound to a statement travels as a text array, thirty times slower (measured). The layouts are
those of `array_recv`, `vector_recv` and `halfvec_recv`; elements are big-endian. No I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct

import numpy as np
from psycopg import AsyncCursor
from psycopg.abc import Buffer
from psycopg.adapt import Dumper
from psycopg.pq import Format

from cdc_embedder.embedding.base import Vectors

_BYTEA, _TEXT, _FLOAT4, _FLOAT8 = 17, 25, 700, 701
_LENGTH = Struct("!i").pack
_NULL = _LENGTH(-1)


class BinaryArray(bytes):
    """The binary form of a whole array; the statement's own cast tells the server its type."""


class _BinaryArrayDumper(Dumper):
    format = Format.BINARY
    oid = 0

    def dump(self, value: BinaryArray) -> Buffer:
        return value


def register(cursor: AsyncCursor[object]) -> None:
    """Let `cursor` bind BinaryArray parameters."""
    cursor.adapters.register_dumper(BinaryArray, _BinaryArrayDumper)


def vectors(values: Vectors, kind: str, oid: int) -> BinaryArray:
    """`values` of shape (n, d) for `unnest($n::vector[])`, or for slicing where the target itself is an array.

    `kind` is vector or halfvec (an array of n elements of type `oid`), float4 or float8 (one flat array of n·d floats).
    """
    rows, dimensions = values.shape
    if kind in ("float4", "float8"):
        width, element, code = (4, _FLOAT4, ">f4") if kind == "float4" else (8, _FLOAT8, ">f8")
        flat = np.empty(rows * dimensions, dtype=[("length", ">i4"), ("value", code)])
        flat["length"], flat["value"] = width, values.reshape(-1)
        return _array(element, rows * dimensions, flat.data)
    code, width = (">f4", 4) if kind == "vector" else (">f2", 2)
    layout = [("length", ">i4"), ("dimensions", ">i2"), ("unused", ">i2"), ("value", code, (dimensions,))]
    body = np.zeros(rows, dtype=layout)
    body["length"], body["dimensions"], body["value"] = 4 + width * dimensions, dimensions, values
    return _array(oid, rows, body.data)


def octets(values: Sequence[bytes], width: int) -> BinaryArray:
    """A bytea[] of values that are all `width` bytes long, such as fingerprints."""
    body = np.empty(len(values), dtype=[("length", ">i4"), ("value", "u1", (width,))])
    body["length"] = width
    body["value"] = np.frombuffer(b"".join(values), dtype=np.uint8).reshape(len(values), width)
    return _array(_BYTEA, len(values), body.data)


def texts(values: Sequence[str | None]) -> BinaryArray:
    """A text[]; None is NULL. On sessions whose client_encoding is UTF-8."""
    parts: list[bytes] = []
    for value in values:
        if value is None:
            parts.append(_NULL)
        else:
            encoded = value.encode()
            parts += _LENGTH(len(encoded)), encoded
    return _array(_TEXT, len(values), b"".join(parts), nulls=None in values)


def _array(element: int, length: int, body: Buffer, *, nulls: bool = False) -> BinaryArray:
    """Header (dimensions, NULLs, element type, length, lower bound 1), body. Source: array_recv in arrayfuncs.c."""
    if length == 0:
        return BinaryArray(np.array([0, 0, element], dtype=">u4").tobytes())
    header = np.array([1, nulls, element, length, 1], dtype=">u4").tobytes()
    return BinaryArray(b"".join((header, body)))
