# SPDX-License-Identifier: Apache-2.0
"""Which dialect a folder's experts are in."""

from __future__ import annotations

from surgery_formats.adapters.peft.dialects import BUILT_IN, ExpertDialect
from surgery_formats.adapters.peft.kinds import switches
from surgery_formats.adapters.peft.read_config import parse_config
from surgery_formats.canonical.adapter import Adapter

__all__ = ["dialect_of"]


def dialect_of(adapter: Adapter) -> ExpertDialect | None:
    """The dialect of a folder that was read as PEFT's; None if it has no experts, or is of another format."""
    if adapter.format != "peft":
        return None
    config = parse_config(adapter.config, adapter.path, switches())
    return next((dialect for dialect in BUILT_IN if dialect.recognise(config, adapter.tensors)), None)
