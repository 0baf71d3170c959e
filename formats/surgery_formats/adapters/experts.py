# SPDX-License-Identifier: Apache-2.0
"""The three spellings of expert weights.

They are single (``experts.3.up_proj``), fused (``experts.gate_up_proj``) or stacked by MLX (``switch_mlp.up_proj``).
The families' `Fused` records relate them; without a base, the name of the block distinguishes Mixtral's spelling.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from surgery_formats.adapters.rows import row_slice
from surgery_formats.binding.sizes import component_of
from surgery_formats.canonical.adapter import Site
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.families import mixtral, qwen_moe
from surgery_formats.models.families.family import Fused
from surgery_formats.updates import LoRA, Update, experts_of

__all__ = ["SWITCH", "fused_of", "one_expert", "taken_apart"]

SWITCH = ".switch_mlp."  # the module that holds MLX's stacks
_MIXTRAL = re.compile(r"\.block_sparse_moe\.|\.experts\.\d+\.w[123]\.")


def fused_of(site: Site, base: Checkpoint | None) -> tuple[Fused, ...]:
    """How the experts of the weight `site` are named: by the base's family, or by the spelling of the path."""
    if base is not None and (records := component_of(site, base).family.fused):
        return records
    return mixtral.MIXTRAL.fused if _MIXTRAL.search(site.path) else qwen_moe.QWEN2_MOE.fused


def taken_apart(path: str, update: Update, fused: Iterable[Fused]) -> Iterator[tuple[str, LoRA]]:
    """``(path of one expert's part, its LoRA)`` for every expert of a stacked update.

    Nothing if no record has the name.
    """
    for record in fused:
        if path.endswith(f".{record.whole}"):
            stem = path.removesuffix(record.whole)
            for number, expert in enumerate(part.low_rank() for part in experts_of(update)):
                if expert is None or expert.shape[0] % len(record.parts):
                    return
                height = expert.shape[0] // len(record.parts)
                for position, part in enumerate(record.parts):
                    piece = (
                        expert
                        if len(record.parts) == 1
                        else row_slice(expert, position * height, (position + 1) * height)
                    )
                    yield f"{stem}{part.format(e=number)}", piece
            return


def one_expert(path: str, fused: Iterable[Fused]) -> tuple[str, int] | None:
    """``(path of MLX's stack, number)`` for the path of one expert's part."""
    for record in fused:
        if f".{record.whole}".startswith(SWITCH):
            pattern = re.escape(record.parts[0]).replace(r"\{e\}", r"(\d{1,5})")
            if match := re.fullmatch(rf"(.*\.){pattern}", path):
                return f"{match[1]}{record.whole}", int(match[2])
    return None
