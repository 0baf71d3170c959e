# SPDX-License-Identifier: Apache-2.0
"""All targets. A new one is an entry in one of these modules."""

from __future__ import annotations

import importlib.util

from ..target import Target
from . import documents, parsers, peers, readers, texts, verbs

__all__ = ["all_targets", "missing_for"]


def all_targets(match: str = "") -> list[Target]:
    """Those whose names contain `match`, in the order of the table in docs/fuzzing.md."""
    found = [target for module in (parsers, readers, peers, documents, texts, verbs) for target in module.targets()]
    return [target for target in found if match in target.name]


def missing_for(target: Target) -> list[str]:
    """The packages that it needs and that are not installed."""
    return [name for name in target.needs if importlib.util.find_spec(name) is None]
