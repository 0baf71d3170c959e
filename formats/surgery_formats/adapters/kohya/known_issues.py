# SPDX-License-Identifier: Apache-2.0
"""Signs in the headers, alphas and metadata of a kohya file that its scale is not the one that was trained."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

from surgery_formats.adapters.contents import contents_of
from surgery_formats.text import show
from surgery_formats.updates import LoRA, Update

__all__ = ["stated_issues"]

_MERGED_FROM = "modelspec.merged_from"  # written by the merge scripts of sd-scripts, and by no trainer


def stated_issues(updates: Collection[Update], metadata: Mapping[str, str]) -> Iterable[str]:
    """Facts worth a warning.

    Sources: sd-scripts ``networks/merge_lora.py`` and ``svd_merge_lora.py``, and diffusers' loader. docs/combine.md
    explains each case.

    Args:
        updates: All updates of the file.
        metadata: Its metadata, with ``ss_*`` and ``modelspec.*``.
    """
    contents = [contents_of(update) for update in updates]
    loras = [held.lora for held in contents if held.lora]
    alpha, dim = _number(metadata, "ss_network_alpha"), _number(metadata, "ss_network_dim")
    lacking = sum(not lora.noted for lora in loras)
    if lacking:
        yield f"{lacking} modules without alpha: their scale is 1" + _lost(loras, alpha, dim)
    if any(held.dora for held in contents):
        yield "DoRA: diffusers drops its magnitudes when it loads such a file"
    grown = {round(lora.rank / dim, 6) for lora in loras if dim}
    if loras and min(grown, default=1.0) > 1.0 and all(ratio == int(ratio) for ratio in grown):
        low = dim / max(lora.rank for lora in loras) if dim else 1.0
        yield (
            f"its metadata says dim {dim:g}, its factors have {max(grown):g} times that: "
            "merge_lora.py --concat of sd-scripts leaves alpha "
            f"as it was, so that what it joined acts at {low:.2g} of its strength; combine the originals instead"
        )
    elif _MERGED_FROM in metadata:
        yield (
            f"merged by a script of sd-scripts from {show(metadata[_MERGED_FROM], 100)}: "
            "merge_lora.py squares the ratios and adds products of one file's up and another's down, "
            "svd_merge_lora.py clamps the largest values; combine the originals instead"
        )


def _lost(loras: Collection[LoRA], alpha: float | None, dim: float | None) -> str:
    """The trained scale by the metadata, if no alpha in the file has it."""
    if alpha is None or not dim or alpha == dim or any(lora.noted for lora in loras):
        return ""
    scale = f"{alpha / dim:.3g}"
    return f", but its metadata says alpha {alpha:g} for dim {dim:g}: then {scale} was trained (combine FILE={scale})"


def _number(metadata: Mapping[str, str], key: str) -> float | None:
    """The value of `key` if it is a positive number; None for ``Dynamic``, ``None`` and other texts."""
    try:
        value = float(metadata.get(key, ""))
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None
