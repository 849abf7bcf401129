"""Mistakes that this program could have been written with, each with the test that tells.

A mutant is a change to the text of the package. The test must fail with it, and say what `says` has: a mutant that dies
of anything else (a name that is not there, a machine that is slow) was not caught.
"""

from __future__ import annotations

from dataclasses import dataclass

UNIT = "tests/unit/"
ROWS = "tests/integration/test_rows.py::"
SERVICE = "tests/integration/test_service.py::"
RULES = "tests/faults/test_rules.py::"


@dataclass(frozen=True)
class Edit:
    """In `file` of the package the text `old`, which is there once, becomes `new`."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """`caught_by` is a test's node id; one of `says` is in what pytest prints of its failure."""

    name: str
    edits: tuple[Edit, ...]
    caught_by: str
    says: tuple[str, ...]


def mutant(name: str, file: str, old: str, new: str, caught_by: str, *says: str) -> Mutant:
    return Mutant(name, (Edit(file, old, new),), caught_by, says)


_NOT_CONFIRMED = RULES + "test_rule_1_what_could_not_be_written_is_not_confirmed_not_even_by_a_stop"
_OLDER_HOLDS_BACK = UNIT + "test_watermark.py::test_an_older_commit_with_work_holds_back_newer_ones_that_are_done"
_STALE_TEXT = ROWS + "test_rule_4_a_text_that_changed_while_it_was_embedded_is_not_written[18-pgoutput]"

MUTANTS = [
    # Rule 1: what is confirmed
    mutant(
        "early acknowledgement: a key is done when it was embedded",
        "pipeline.py",
        "            if await self._embed(batch, embedder):\n",
        "            if await self._embed(batch, embedder):\n"
        "                self.settle(batch.lane, batch.pending.finish(batch.entries))\n"
        "                self.confirm()\n",
        _NOT_CONFIRMED,
        "assert not past(bench18, before)",
    ),
    mutant(
        "a row that could not be written counts as written",
        "writing.py",
        "judged(batch, (entry for index, entry in enumerate(entries) if index in done))",
        "judged(batch, entries)",
        _NOT_CONFIRMED,
        "assert not past(bench18, before)",
    ),
    mutant(
        "a commit is passed while work of it is unfinished",
        "watermark.py",
        "while positions and positions[0].held == 0 and (end",
        "while positions and (end",
        _OLDER_HOLDS_BACK,
        "assert LSN(0/14) == LSN(0/0)",
    ),
    mutant(
        "commits are passed out of order",
        "watermark.py",
        "        while positions and positions[0].held == 0 and (end := positions[0].end) is not None:\n"
        "            positions.popleft()\n",
        "        for position in [one for one in positions if one.held == 0 and one.end is not None]:\n"
        "            end = position.end\n"
        "            positions.remove(position)\n",
        _OLDER_HOLDS_BACK,
        "assert LSN(0/14) == LSN(0/0)",
    ),
    mutant(
        "a keepalive is acknowledged while work is in flight",
        "watermark.py",
        "if not self._positions and server_end > self._flushed:",
        "if server_end > self._flushed:",
        UNIT + "test_watermark.py::test_a_transaction_that_is_still_being_read_is_not_passed",
        "assert (LSN(0/64), 1) == (LSN(0/0), 1)",
    ),
    mutant(
        "an LSN of our own arithmetic: where the commit begins and how long its message is",
        "wal/pgoutput.py",
        "Commit(LSN(commit_lsn), LSN(end_lsn))",
        "Commit(LSN(commit_lsn), LSN(commit_lsn + len(data)))",
        RULES + "test_rule_1_a_transaction_ends_where_the_server_says[pgoutput]",
        "assert LSN(0/1550542) == LSN(0/1550558)",
    ),
    mutant(
        "an LSN that is not the end: where the commit begins",
        "wal/wal2json.py",
        "Commit(_lsn(event.lsn), _lsn(event.nextlsn))",
        "Commit(_lsn(event.lsn), _lsn(event.lsn))",
        RULES + "test_rule_1_a_transaction_ends_where_the_server_says[wal2json]",
        "assert LSN(0/1550528) == LSN(0/1550558)",
    ),
    mutant(
        "vectors are committed with synchronous_commit = off, and acknowledged at once",
        "rows/session.py",
        '"synchronous_commit": "local"',
        '"synchronous_commit": "off"',
        RULES + "test_rule_1_a_vector_whose_change_was_confirmed_survives_a_crash",
        "in assert_every_vector_is_of_its_text",
        "AssertionError: never confirmed",  # a verdict rested on the vector, which nobody flushed
    ),
    mutant(
        "a verdict is confirmed though it rests on a commit that a crash would take back",
        "pipeline.py",
        "        if self._judged:\n",
        "        if False:\n",
        "tests/faults/test_confirming.py::"
        "test_a_verdict_that_rests_on_an_asynchronous_commit_is_confirmed_when_that_is_flushed",
        "assert (False,) == (True,)",
    ),
    mutant(
        "the last batch is dropped on SIGTERM",
        "pipeline.py",
        "            if await self._embed(batch, embedder):\n",
        "            if await self._embed(batch, embedder) and not self._stopping.is_set():\n",
        SERVICE + "test_sigterm_finishes_the_batch_in_hand_and_nothing_is_done_twice[18-pgoutput]",
        "the batch in hand was dropped",
    ),
    # Rule 2: what is visible
    mutant(
        "a row is judged before its transaction is visible",
        "pipeline.py",
        "if entry.reason.xid is not None and not snapshot.sees(entry.reason.xid):",
        "if False:",
        RULES + "test_rule_2_a_change_that_is_decoded_and_not_visible_is_judged_when_it_is",
        "in assert_every_vector_is_of_its_text",
        "AssertionError: held up",  # the neighbour, too, was decoded a moment before it could be seen
    ),
    # Rule 3: newest wins
    mutant(
        "the greatest xid decides, not the latest commit's",
        "pending.py",
        "reason.xid, reason.last = xid, position.commit",
        "reason.xid, reason.last = max(reason.xid or 0, xid), position.commit",
        UNIT + "test_pending.py::test_the_xid_of_the_latest_commit_in_stream_order_decides_even_if_it_is_lower",
        "assert [861] == [860]",
    ),
    mutant(
        "a change to a key in flight is answered by the work that began before it",
        "pending.py",
        "        if entry.in_flight:\n            reason = entry.dirty = entry.dirty or Reason(now)\n        else:\n",
        "        if False:\n            reason = entry.dirty = entry.dirty or Reason(now)\n        else:\n",
        UNIT + "test_pending.py::test_a_change_in_flight_comes_back_and_holds_only_from_its_own_commit",
        "assert LSN(0/14) == 10",
    ),
    mutant(
        "a change of the key is ignored: the old one is looked for",
        "routing.py",
        "        value = values.get(column)\n",
        "        value = identity.get(column) or values.get(column)\n",
        UNIT + "test_routing.py::test_the_key_is_the_new_rows_and_what_was_not_sent_is_taken_from_the_old_identity"
        "[values1-identity1-key1]",
        "assert [('8', '9')] == [('1', '2')]",
    ),
    mutant(
        "an unchanged TOAST value is taken for NULL",
        "wal/pgoutput.py",
        "elif kind == 0x6E:",
        "elif kind in (0x6E, 0x75):",
        UNIT + "test_pgoutput.py::test_null_unchanged_and_empty_are_three_things",
        "'note': None}",
    ),
    # Rule 4: the guarded write-back
    mutant(
        "an unconditional write-back",
        "rows/writeback.py",
        "WHERE {fingerprint} = i.fingerprint AND EXISTS (SELECT FROM guard)",
        "WHERE EXISTS (SELECT FROM guard)",
        _STALE_TEXT,
        "assert {0, 1} == {1}",
    ),
    mutant(
        "texts are compared by their collation",
        "rows/expressions.py",
        'octets = "convert_to({0}, getdatabaseencoding())"',
        'octets = "int8send(hashtextextended({0}, 0))"',
        ROWS + "test_the_fingerprint_depends_on_no_setting_and_no_collation[15-pgoutput]",
        "assert 7 == 8",
    ),
    mutant(
        "a vector is written under a generation that is superseded",
        "rows/writeback.py",
        "WHERE g.column_id = {column_id} AND g.generation = {generation} AND g.superseded_at IS NULL",
        "WHERE g.column_id = {column_id}",
        ROWS + "test_rule_4_nothing_is_written_under_a_generation_that_is_superseded[18-pgoutput]",
        "assert {0} == set()",
    ),
    Mutant(
        "the ledger tells of rows that were not locked",
        (
            Edit(
                "rows/writeback.py",
                "), recorded AS (\n",
                "), sent AS (\n"
                "    SELECT {source_key}, i.ordinal, i.fingerprint, i.flags, i.error, {vector} AS vector\n"
                "      FROM unnest({inputs}) WITH ORDINALITY AS i({input_names}, ordinal)\n"
                "      JOIN {table} t ON {input_is_source}\n"
                "), recorded AS (\n",
            ),
            Edit(
                "rows/writeback.py",
                "      FROM held h\n    ON CONFLICT",
                "      FROM (SELECT k.*, hash_array_extended(k.vector::real[], 0) AS digest FROM sent k) h\n"
                "    ON CONFLICT",
            ),
        ),
        _STALE_TEXT,
        ("assert {0, 1} == {1}",),
    ),
    mutant(
        "the ledger is written in another transaction, before the vectors",
        "rows/writeback.py",
        "        await cursor.execute(self._statement, parameters, prepare=True)\n",
        "        ledger_alone = self._statement.replace('k.flags & 4 = 0', 'false').replace("
        "'u.ordinal IS NULL', 'false').replace('OR u.digest IS', 'AND u.digest IS')\n"
        "        await cursor.execute(ledger_alone, parameters, prepare=True)\n"
        "        await cursor.execute(self._statement, parameters, prepare=True)\n",
        RULES + "test_rule_4_a_write_that_fails_leaves_nothing_in_the_ledger",
        "assert 2 == 0",
    ),
    # Rule 7: what kills the process
    mutant(
        "suspects are not tried alone",
        "pipeline.py",
        "kept = alone[:1] if self._trial else others",
        "kept = alone if self._trial else others",
        RULES + "test_rule_7_who_was_with_the_model_beside_a_killer_is_not_blamed",
        "== [('999',)]",
    ),
    # Rule 8: the backlog
    mutant(
        "a spill is confirmed before it is durable",
        "spilling.py",
        "        first, fresh = await backlog.spill(connection, column, self._term, spills)\n",
        "        lane.pending.spilled([(spill, 0) for spill in spills])\n"
        "        self._pipeline.confirm()\n"
        "        first, fresh = await backlog.spill(connection, column, self._term, spills)\n",
        RULES + "test_rule_8_what_could_not_be_spilled_is_not_confirmed_not_even_by_a_stop",
        "assert not past(bench18, before)",
    ),
    mutant(
        "a row of the backlog is removed whatever its seq",
        "rows/backlog.py",
        " AND b.seq = i.seq",
        "",
        RULES + "test_rule_8_a_row_of_the_backlog_goes_only_with_the_judgement_of_its_last_spill",
        "assert (0, 1) == (0, 0)",
    ),
    mutant(
        "a row of the backlog is removed when it is taken up",
        "spilling.py",
        "            pending.restore(row.key, row.seq, row.xid, row.committed_at, now())\n",
        "            pending.restore(row.key, row.seq, row.xid, row.committed_at, now())\n"
        "            await backlog.remove(connection, lane.column, [(row.key, row.seq)])\n",
        RULES + "test_rule_8_what_was_taken_up_stays_in_the_backlog_until_it_is_written",
        "assert 0 == 1",
    ),
    # Rule 9: one consumer
    mutant(
        "a vector is written after another process took the slot over",
        "rows/writeback.py",
        " AND e.term = {term}",
        "",
        "tests/faults/test_standby.py::test_a_write_of_an_earlier_term_changes_nothing",
        "assert {0} == set()",
    ),
    mutant(
        "a key is spilled after another process took the slot over",
        "rows/backlog.py",
        " AND term = {term} FOR SHARE",
        " AND term >= {term} FOR SHARE",
        "tests/integration/test_backlog.py::test_who_was_replaced_spills_nothing_and_holds_up_nobody[18]",
        "DID NOT RAISE",
    ),
    # Rule 10: the scan
    mutant(
        "a scan counts whatever was open when it began",
        "scanning.py",
        "self._began_sound = lane.barrier is not None and oldest_xid > lane.barrier",
        "self._began_sound = True",
        RULES + "test_rule_10_a_scan_that_began_before_the_stream_covered_every_transaction_is_made_again",
        "in assert_every_vector_is_of_its_text",
    ),
    mutant(
        "a slot is made anew without a scan",
        "preparation.py",
        '    await _want_all(connection, slot, "the slot was made anew")\n    await _make_publication(',
        "    await _make_publication(",
        RULES + "test_rule_10_a_slot_that_is_made_anew_is_a_reason_to_scan",
        "in assert_every_vector_is_of_its_text",
    ),
    mutant(
        "a scan notes where it is before its keys are judged",
        "scanning.py",
        "            if not lane.scan_drained():\n                return TICK_SECONDS\n            if not current.enum",
        "            if current.enumerated and not lane.scan_drained():\n"
        "                return TICK_SECONDS\n"
        "            if not current.enum",
        RULES + "test_rule_10_a_scan_that_goes_on_after_a_kill_has_passed_over_no_row",
        "in assert_every_vector_is_of_its_text",
    ),
]
