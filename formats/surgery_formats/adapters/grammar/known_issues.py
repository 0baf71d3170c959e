# SPDX-License-Identifier: Apache-2.0
"""Signs in the headers, alphas and metadata of a file that its scale is not the one that was trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from surgery_formats.adapters.contents import contents_of
from surgery_formats.adapters.grammar.scales import StatedScales
from surgery_formats.adapters.grammar.training import network_arguments, positive_number
from surgery_formats.canonical.adapter import Site
from surgery_formats.text import show
from surgery_formats.updates import LoRA, OutputRotation, ProductGLoRA, Update

__all__ = ["stated_issues"]

_MERGED_FROM = "modelspec.merged_from"  # written by the merge scripts of sd-scripts, and by no trainer


def stated_issues(
    updates: Mapping[Site, tuple[Update, ...]], scales: StatedScales, metadata: Mapping[str, str], *, flat: bool
) -> Iterable[str]:
    """Facts worth a warning.

    Sources: sd-scripts ``networks/merge_lora.py``, ``svd_merge_lora.py`` and ``lora_sd3.py``, diffusers' loader and its conversion (0.42),
    LyCORIS' ``glora.py`` (4.1). docs/combine.md explains each case.

    Args:
        updates: All updates of the file.
        scales: Where their scales come from.
        metadata: Its metadata, with ``ss_*`` and ``modelspec.*``.
        flat: Whether modules are spelt as sd-scripts does, whose files have an alpha for each.
    """
    every = [update for chain in updates.values() for update in chain]
    contents = [contents_of(update) for update in every]
    loras = [held.lora for held in contents if held.lora]
    dim = positive_number(metadata.get("ss_network_dim"))
    lacking = [lora for lora in loras if not lora.noted]
    if scales.configs and any(lora.scale != 1.0 for lora in lacking):
        yield "its alphas stand in the header alone: programs that look for a tensor beside the factors take 1 for the scale"
    elif flat and lacking:
        yield f"{len(lacking)} modules without alpha: " + _meant([lora.scale for lora in lacking])
    if flat and any(held.dora for held in contents):
        yield "DoRA: diffusers drops its magnitudes when it loads such a file"
    if any(isinstance(update, OutputRotation) and update.noted and update.limit is None for update in every):
        yield "OFT with alpha 0: LyCORIS means no constraint by it, A1111 and sd-scripts one that lets nothing pass"
    trained = any(key.startswith("ss_") for key in metadata)
    if loras and not trained and all(_is_rank(lora) for lora in loras):
        yield (
            "its alphas are whole numbers, and the ranks, as diffusers' convert_state_dict_to_kohya writes them whatever alpha was: "
            "right only where it was trained with alpha = rank; else convert the original file"
        )
    if any(isinstance(update, ProductGLoRA) for update in every) and _is_on(metadata, "rs_lora"):
        yield (
            "GLoRA trained with rs_lora: LyCORIS leaves the alpha of such a file as it was, "
            "so that its scale is lower than in training by the root of the rank"
        )
    grown = {round(lora.rank / dim, 6) for lora in loras if dim}
    if _is_on(metadata, "split_qkv") and max(grown, default=1.0) > 1.0:
        weak = [lora for lora in loras if dim and lora.rank > dim]
        parts = " or ".join(f"1/{ratio:g}" for ratio in sorted(grown) if ratio > 1.0)
        yield (
            f"trained with split_qkv: sd-scripts joins the factors of the parts and leaves alpha as it was, so that {len(weak)} fused "
            f"projections act at {parts} of their strength in training, in every program"
        )
    elif loras and min(grown, default=1.0) > 1.0 and all(ratio == int(ratio) for ratio in grown):
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


def _is_rank(lora: LoRA) -> bool:
    """Whether its alpha is a tensor of whole numbers, which no trainer stores, and its rank."""
    return bool(lora.noted) and all(not stored.dtype.is_float for stored in lora.noted) and lora.alpha == lora.rank


def _is_on(metadata: Mapping[str, str], switch: str) -> bool:
    """Whether a switch of the network was on in training."""
    return str(network_arguments(metadata).get(switch)).lower() in ("true", "1", "yes")


def _meant(scales: list[float]) -> str:
    """The scale of modules without alpha: by the metadata, else 1."""
    stated = sorted({scale for scale in scales if scale != 1.0})
    if not stated:
        return "their scale is 1"
    shown = ", ".join(f"{scale:.3g}" for scale in stated)
    return f"their scale is {shown} by ss_network_alpha in its metadata; programs that look for alphas take 1"
