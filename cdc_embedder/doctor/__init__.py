"""`cdc-embedder doctor`: everything that can be wrong before and while the service runs, each with its remedy.

Each check is a small function in the module of its theme. Nothing is written anywhere, and nothing here repairs.
"""

from __future__ import annotations

from cdc_embedder.doctor.examining import CHECKS, examine
from cdc_embedder.doctor.finding import Finding
from cdc_embedder.doctor.printing import print_findings

__all__ = ["CHECKS", "Finding", "examine", "print_findings"]
