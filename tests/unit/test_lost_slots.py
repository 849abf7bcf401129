"""Why a slot was given up, as each version of the server tells it, and what to do about it."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from cdc_embedder.wal.diagnosis import SlotLost, Surroundings, explain
from cdc_embedder.wal.slot import _slot

ROW = {
    "slot_name": "s",
    "plugin": "pgoutput",
    "database": "app",
    "active": False,
    "active_pid": None,
    "wal_status": "reserved",
    "safe_wal_size": None,
    "restart_lsn": "0/10",
    "confirmed_flush_lsn": "0/20",
    "two_phase": False,
}


@pytest.mark.parametrize(
    ("told", "reason", "remedy"),
    [
        ({"wal_status": "lost"}, "wal_removed", "raise max_slot_wal_keep_size"),
        ({"wal_status": "lost", "conflicting": False}, "wal_removed", "raise max_slot_wal_keep_size"),
        ({"wal_status": "lost", "conflicting": True}, "conflict", "hot_standby_feedback"),
        ({"wal_status": "lost", "invalidation_reason": "wal_removed"}, "wal_removed", "raise max_slot_wal_keep_size"),
        (
            {"wal_status": "lost", "conflicting": True, "invalidation_reason": "rows_removed"},
            "rows_removed",
            "hot_standby_feedback",
        ),
    ],
    ids=["15", "16", "16, on a standby", "18", "18, on a standby"],
)
def test_a_lost_slot_says_why_and_what_helps(told: dict[str, Any], reason: str, remedy: str) -> None:
    slot = _slot(ROW | told)
    assert (slot.lost, slot.invalidation_reason) == (True, reason)
    around = Surroundings(slot, "app", "role", True, "logical", 10, None)
    problem = explain(psycopg.errors.ObjectNotInPrerequisiteState(), "s", around)
    assert isinstance(problem, SlotLost)
    assert reason in str(problem)
    assert remedy in problem.hint


@pytest.mark.parametrize("told", [{}, {"conflicting": False}, {"conflicting": None, "invalidation_reason": None}])
def test_a_slot_that_is_well_is_not_lost(told: dict[str, Any]) -> None:
    assert not _slot(ROW | told).lost
