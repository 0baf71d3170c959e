# SPDX-License-Identifier: Apache-2.0
"""What the leaves of a module make: one file for each group of leaves, with a function each way.

To add a group, write its `kind.LeafKind` in a file here and list it in `KINDS`; its leaves belong into
`surgery_formats.adapters.grammar.leaves`.
"""

from __future__ import annotations

from collections.abc import Mapping

from surgery_formats.adapters.grammar.kinds.embeddings import EMBEDDINGS
from surgery_formats.adapters.grammar.kinds.full import FULL
from surgery_formats.adapters.grammar.kinds.glora import GLORA
from surgery_formats.adapters.grammar.kinds.ia3 import IA3
from surgery_formats.adapters.grammar.kinds.kind import LeafKind
from surgery_formats.adapters.grammar.kinds.loha import LOHA
from surgery_formats.adapters.grammar.kinds.lokr import LOKR
from surgery_formats.adapters.grammar.kinds.lora import LORA
from surgery_formats.adapters.grammar.kinds.oft import OFT
from surgery_formats.adapters.grammar.kinds.rotations import ROTATIONS
from surgery_formats.adapters.grammar.kinds.whole import WHOLE

__all__ = ["KINDS", "kind_of_update"]

KINDS: tuple[LeafKind, ...] = (LORA, LOHA, LOKR, IA3, GLORA, ROTATIONS, OFT, FULL, WHOLE, EMBEDDINGS)

_WRITERS: Mapping[str, LeafKind] = {name: kind for kind in KINDS for name in kind.writes}


def kind_of_update(kind: str) -> LeafKind | None:
    """The group that holds updates of a kind; None if none does."""
    return _WRITERS.get(kind)
