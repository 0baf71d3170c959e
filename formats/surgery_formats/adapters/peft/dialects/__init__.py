# SPDX-License-Identifier: Apache-2.0
"""Dialects of expert LoRA: how the programs that write and read PEFT-like folders hold the experts of a mixture.

Reading needs no name: names, shapes and the configuration tell the dialect, and what has two readings is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery_formats.adapters.peft.dialects.dialect import ExpertDialect
from surgery_formats.adapters.peft.dialects.leaves import SGLANG, TINKER
from surgery_formats.adapters.peft.dialects.single import LINEARS, PER_EXPERT
from surgery_formats.adapters.peft.dialects.stacks import PEFT_018, PEFT_STACKS, UNSLOTH, UNSLOTH_GROUPED
from surgery_formats.adapters.peft.dialects.vllm import VLLM
from surgery_formats.errors import NotFoundError
from surgery_formats.text import closest, listing

if TYPE_CHECKING:
    from surgery_formats.adapters.format import Rendering
    from surgery_formats.canonical.adapter import Adapter
    from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["BUILT_IN", "ExpertDialect", "dialect_named", "dialect_of", "write"]

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


def dialect_of(adapter: Adapter) -> ExpertDialect | None:
    """The dialect of a folder that was read as PEFT's; None if it has no experts, or is of another format."""
    if adapter.format != "peft":
        return None
    from surgery_formats.adapters.peft.kinds import switches
    from surgery_formats.adapters.peft.read_config import parse_config

    config = parse_config(adapter.config, adapter.path, switches())
    return next((dialect for dialect in BUILT_IN if dialect.recognise(config, adapter.tensors)), None)


def write(adapter: Adapter, dialect: str, base: Checkpoint | None) -> Rendering:
    """An adapter as the files of a dialect, not yet written; ``mlx`` is the format of that name.

    Args:
        adapter: Of any format.
        dialect: Name of one of `BUILT_IN`, or ``mlx``.
        base: The model it is for; needed where the adapter has experts.

    Raises:
        NotFoundError: no such dialect.
        FitError: the base is missing or another one, or the dialect cannot hold the adapter's experts.
    """
    from surgery_formats.adapters.mlx import MLX
    from surgery_formats.adapters.peft import PEFT

    target = MLX if dialect == MLX.name else PEFT.with_dialect(dialect)
    return target.render(adapter, base)
