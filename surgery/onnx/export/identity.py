# SPDX-License-Identifier: Apache-2.0
"""What an export is, for its manifest, and the digest by which it is known again."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from surgery._version import __version__
from surgery.onnx.export.assemble import Assembly
from surgery.onnx.export.layouts import Arrangement
from surgery.onnx.export.place import Mode
from surgery.onnx.graph.build import GraphSet

__all__ = ["export_facts", "export_id"]


def export_facts(draft: GraphSet, mode: Mode, arrangement: Arrangement) -> dict[str, Any]:
    """For the manifest."""
    contract = draft.contract
    layout = arrangement.layout.name
    return {
        **({"layout": layout} if layout != "plain" else {}),
        **({"renamed": dict(arrangement.weights)} if arrangement.weights else {}),
        "target": contract.target,
        "dtype": contract.dtype,
        "weights": mode,
        "adapters": [dict(facts) for facts in contract.adapters],
        "virtual_tokens": contract.virtual_tokens,
        "slots": [slot.weight for slot in contract.slots],
    }


def export_id(draft: GraphSet, assembly: Assembly, arrangement: Arrangement) -> str:
    """Digest of everything that decides the files: the draft's graphs name weights and adapters by content."""
    state = hashlib.sha256(json.dumps([__version__, assembly.form]).encode())
    for name, graph in draft.graphs.items():
        state.update(name.encode() + graph.data)
    if arrangement.files or arrangement.layout.name != "plain":
        state.update(json.dumps([arrangement.layout.name, dict(arrangement.files)], sort_keys=True).encode())
    return state.hexdigest()
