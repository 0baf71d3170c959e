# SPDX-License-Identifier: Apache-2.0
"""What models and adapters are: in memory, on disk, and their arithmetic."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from surgery_formats.errors import *  # noqa: F403

# onnxruntime 1.29 and later sends data about its use, unless this is set before it is imported, and starts a thread for it,
# after which no process can be forked. Nothing here sends anything (docs/guarantees.md); who wants it sets 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from surgery_formats.adapters.registry import read_adapter as read_adapter
    from surgery_formats.binding.bind import Binding as Binding
    from surgery_formats.binding.bind import bind as bind
    from surgery_formats.canonical.adapter import Adapter as Adapter
    from surgery_formats.canonical.adapter import Site as Site
    from surgery_formats.canonical.adapter import WeightedAdapter as WeightedAdapter
    from surgery_formats.models.checkpoint import Checkpoint as Checkpoint
    from surgery_formats.models.checkpoint import open_checkpoint as open_checkpoint
else:
    from surgery_formats import errors as _errors
    from surgery_formats.lazy import lazy as _lazy

    __getattr__, __dir__, __all__ = _lazy(
        __name__,
        {
            "surgery_formats.adapters.registry": ["read_adapter"],
            "surgery_formats.binding.bind": ["Binding", "bind"],
            "surgery_formats.canonical.adapter": ["Adapter", "Site", "WeightedAdapter"],
            "surgery_formats.errors": _errors.__all__,
            "surgery_formats.models.checkpoint": ["Checkpoint", "open_checkpoint"],
        },
    )
