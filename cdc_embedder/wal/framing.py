"""The frames of the streaming replication protocol: what a walsender wraps messages in, and our status updates.

Bytes in, values out; no I/O and no idea of any output plugin. Source:
https://www.postgresql.org/docs/current/protocol-replication.html
"""

from __future__ import annotations

import time
from struct import Struct
from typing import NamedTuple

from cdc_embedder.errors import ProtocolError
from cdc_embedder.lsn import LSN

_XLOG_DATA = Struct("!xQQq")  # 'w', start, end, sent at; the payload follows
_KEEPALIVE = Struct("!xQqB")  # 'k', end, sent at, reply requested
_STATUS = Struct("!cQQQqB")  # 'r', written, flushed, applied, our clock, reply requested
_EPOCH_US = 946_684_800_000_000  # 2000-01-01 00:00 UTC, where PostgreSQL's clock starts, in Unix microseconds


class XLogData(NamedTuple):
    """One message of the output plugin. Both LSNs are 0/0 for messages that have no place in the log.

    A named tuple and not a dataclass because one is made for every change: 5 times cheaper than a frozen dataclass.
    """

    start: LSN
    end: LSN
    payload: memoryview | bytes


class Keepalive(NamedTuple):
    """Decoding has come to `end`. `reply_requested`: the server wants a status update now."""

    end: LSN
    reply_requested: bool


def parse(data: memoryview | bytes) -> XLogData | Keepalive:
    """Read one CopyData payload from the server. Raises ProtocolError for anything it does not know."""
    kind = data[0] if data else None
    if kind == 0x77:  # w
        if len(data) < _XLOG_DATA.size:
            raise ProtocolError(f"a WAL data frame of {len(data)} bytes is cut short")
        start, end, _ = _XLOG_DATA.unpack_from(data)
        return XLogData(LSN(start), LSN(end), data[_XLOG_DATA.size :])
    if kind == 0x6B:  # k
        if len(data) != _KEEPALIVE.size:
            raise ProtocolError(f"a keepalive has {len(data)} bytes instead of {_KEEPALIVE.size}")
        end, _, reply = _KEEPALIVE.unpack_from(data)
        return Keepalive(LSN(end), reply != 0)
    raise ProtocolError(f"the server sent a frame of an unknown kind ({'empty' if kind is None else hex(kind)})")


def standby_status_update(
    written: LSN, flushed: LSN, applied: LSN, *, reply: bool = False, now_us: int | None = None
) -> bytes:
    """What the client tells the server. `flushed` confirms (0/0 confirms nothing); `now_us` is Unix microseconds."""
    clock = (time.time_ns() // 1000 if now_us is None else now_us) - _EPOCH_US
    return _STATUS.pack(b"r", written, flushed, applied, clock, reply)
