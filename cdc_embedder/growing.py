"""What a backfill adds to the disk, by arithmetic: for `cdc-embedder plan`. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

VECTOR_BYTES = {"vector": (8, 4), "halfvec": (8, 2), "float4": (24, 4), "float8": (24, 8)}
"""Of a stored vector: its header, and a dimension of it."""


@dataclass(frozen=True, slots=True)
class Growth:
    """Bytes. `table` and `indexes` are at their most, with no VACUUM in between; `ledger` is ours and stays."""

    vector: int
    table: int
    indexes: int
    ledger: int
    wal: int
    wal_of_pages: int


PAGE = 8192
_ROOM, _ITEM, _TUPLE_HEADER = PAGE - 24, 4, 24
_TOAST_ABOVE, _CHUNK, _CHUNK_HEADER, _CHUNK_ENTRY = 2032, 1996, 36, 20
_LEDGER_ROW, _LEDGER_ENTRY = 144, 40
_WAL_UPDATE, _WAL_LOCK, _WAL_ENTRY, _WAL_CHUNK, _WAL_LEDGER = 90, 55, 70, 130, 230


def growth(
    rows: int,
    to_embed: int,
    dimensions: int,
    kind: str,
    heap_bytes: int,
    index_bytes: Sequence[int],
    fillfactor: int = 100,
    *,
    full_pages: bool,
) -> Growth:
    """What embedding `to_embed` of `rows` would add, by this arithmetic:

    A row's new version is what a row has now plus the vector; where both are more than 2,032 bytes, the vector goes
    out of line, in chunks of 1,996 (less is needed where the server then compresses the text instead). As many as fit
    into a page's share by `fillfactor` take a page. Each version has an entry in each index, as long as those there are
    now. The ledger takes 144 bytes a row, and 40 in its index. WAL holds the new version, 145 bytes around it, 70 and
    the entry for each index, 300 for the ledger, 130 for each chunk beside it; with full_page_writes each page that
    there is once more, as after one checkpoint.
    """
    header, each = VECTOR_BYTES[kind]
    vector = header + each * dimensions
    now = heap_bytes / rows - _ITEM if rows else _TUPLE_HEADER
    chunks = _chunks(vector) if now + vector > _TOAST_ABOVE else []
    version = now + (18 if chunks else vector)
    fitting = max(1, int(_ROOM * fillfactor / 100 / (version + _ITEM)))
    entry = sum(index_bytes) / rows if rows else 0.0
    in_wal = version + _WAL_UPDATE + _WAL_LOCK + entry + _WAL_ENTRY * len(index_bytes)
    in_wal += sum(chunks) + len(chunks) * _WAL_CHUNK + _WAL_LEDGER + _WAL_ENTRY
    return Growth(
        vector=vector,
        table=round(to_embed * (PAGE / fitting + _out_of_line(chunks))),
        indexes=round(to_embed * entry),
        ledger=to_embed * (_LEDGER_ROW + _LEDGER_ENTRY),
        wal=round(to_embed * in_wal),
        wal_of_pages=heap_bytes + sum(index_bytes) if full_pages else 0,
    )


def _chunks(size: int) -> list[int]:
    return [min(_CHUNK, size - at) for at in range(0, size, _CHUNK)]


def _out_of_line(chunks: list[int]) -> float:
    """Bytes a row beside the table: pages are filled one after another, a chunk that does not fit begins the next."""
    pages, free = 0, 0
    for chunk in chunks * 100:
        if chunk + _CHUNK_HEADER > free:
            pages, free = pages + 1, _ROOM
        free -= chunk + _CHUNK_HEADER
    return pages * PAGE / 100 + len(chunks) * _CHUNK_ENTRY
