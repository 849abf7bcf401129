"""Findings for people, or as JSON. Never loads torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console

from cdc_embedder.doctor.finding import Finding

_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


def print_findings(findings: Sequence[Finding], console: Console, *, as_json: bool) -> None:
    """As lines and a sum, or as a JSON list of objects with the fields of Finding."""
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))
        return
    width = max((len(finding.check) for finding in findings), default=0)
    for finding in findings:
        console.print(f"{finding.level:8}", style=_STYLES[finding.level], end="")
        console.print(f"{finding.check:{width}}  {_shown(finding.subject)}: {_shown(finding.sentence)}", soft_wrap=True)
        for line in finding.remedy.splitlines():
            console.print(" " * (width + 10) + "→ " + _shown(line), soft_wrap=True)
    levels = Counter(finding.level for finding in findings)
    console.print(f"{levels['error']} error(s), {levels['warning']} warning(s), {levels['ok']} ok")


def _shown(text: str) -> str:
    """As a terminal may have it: names are the user's, and may hold what would steer it."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
