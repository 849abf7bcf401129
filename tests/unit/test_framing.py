"""Frames of the streaming protocol, on captured bytes."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc_embedder.errors import ProtocolError
from cdc_embedder.lsn import LSN, ZERO
from cdc_embedder.wal.framing import Keepalive, XLogData, parse, standby_status_update
from tests.capture import CAPTURES, frames


@pytest.mark.parametrize("stem", CAPTURES)
def test_every_captured_frame_is_read(stem: str) -> None:
    kinds = set()
    for frame in frames(stem):
        parsed = parse(frame)
        kinds.add(type(parsed))
        match parsed:
            case XLogData(start, end, payload):
                assert start == end == int.from_bytes(frame[1:9], "big")
                assert payload == frame[25:]
            case Keepalive(end, reply_requested):
                assert end == int.from_bytes(frame[1:9], "big")
                assert reply_requested is False
    assert kinds == {XLogData, Keepalive}


@pytest.mark.parametrize("stem", CAPTURES)
def test_a_frame_cut_inside_its_header_is_a_protocol_error(stem: str) -> None:
    for frame in frames(stem):
        header = 25 if frame[:1] == b"w" else len(frame)
        for size in range(header):
            with pytest.raises(ProtocolError):
                parse(frame[:size])


def test_a_reply_request_is_seen() -> None:
    assert parse(memoryview(struct.pack("!cQqB", b"k", 7, 0, 1))) == Keepalive(LSN(7), True)


def test_a_keepalive_with_bytes_to_spare_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError):
        parse(struct.pack("!cQqBB", b"k", 7, 0, 1, 0))


@given(st.binary(max_size=64))
def test_whatever_arrives_only_a_protocol_error_is_raised(data: bytes) -> None:
    try:
        parsed = parse(data)
    except ProtocolError:
        return
    assert parsed.end == int.from_bytes(data[9:17] if data[:1] == b"w" else data[1:9], "big")


def test_a_status_update_has_the_layout_of_the_documentation() -> None:
    update = standby_status_update(LSN(3), LSN(2), LSN(1), reply=True, now_us=946_684_800_000_005)
    assert update == struct.pack("!cQQQqB", b"r", 3, 2, 1, 5, 1)
    assert standby_status_update(ZERO, ZERO, ZERO)[-1] == 0
