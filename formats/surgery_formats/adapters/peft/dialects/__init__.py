# SPDX-License-Identifier: Apache-2.0
"""Dialects of expert LoRA: how the programs that write and read PEFT-like folders hold the experts of a mixture.

Reading needs no name: names, shapes and the configuration tell the dialect, and what has two readings is refused.
"""

from __future__ import annotations

from surgery_formats.adapters.peft.dialects.dialect import ExpertDialect
from surgery_formats.adapters.peft.dialects.leaves import SGLANG, TINKER
from surgery_formats.adapters.peft.dialects.single import LINEARS, PER_EXPERT
from surgery_formats.adapters.peft.dialects.stacks import PEFT_018, PEFT_STACKS, UNSLOTH, UNSLOTH_GROUPED
from surgery_formats.adapters.peft.dialects.vllm import VLLM
from surgery_formats.errors import NotFoundError
from surgery_formats.text import closest, listing

__all__ = ["BUILT_IN", "ExpertDialect", "dialect_named"]

BUILT_IN: tuple[ExpertDialect, ...] = (
    PEFT_STACKS,
    PEFT_018,
    UNSLOTH,
    UNSLOTH_GROUPED,
    TINKER,
    SGLANG,
    VLLM,
    LINEARS,
    PER_EXPERT,
)


def dialect_named(name: str) -> ExpertDialect:
    """The dialect called `name`.

    Raises:
        NotFoundError: no such dialect.
    """
    known = {dialect.name: dialect for dialect in BUILT_IN}
    if name not in known:
        raise NotFoundError(
            f"no dialect of experts '{name}'", hint=closest(name, known) or f"known: {listing(known, 20)}"
        )
    return known[name]
