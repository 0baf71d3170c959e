# SPDX-License-Identifier: Apache-2.0
"""PEFT's weights without their adapter_config.json: people pass on the one file, and training scripts save no other.

=====================================================  =================================================================
``adapter_model.safetensors`` (``.bin``, shards)       alone, or in a folder without the configuration
``base_model.model.transformer_blocks.0...lora_A``     one file of a diffusion network (HunyuanDiT, PixArt, ACE-Step)
``unet.base_model.model...``, ``text_encoder....``     the same behind the component of a pipeline (older PixArt)
=====================================================  =================================================================

The tensors tell ranks, modules, magnitudes, biases and what was trained in full. They do not tell alpha, which has to be given, nor
whether it was divided by the rank or, with rsLoRA, by its root. The vectors of (IA)^3 have no scale and need nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from surgery_formats.adapters.alphas import TELL_ALPHA
from surgery_formats.adapters.peft.disagreements import NO_RANK
from surgery_formats.adapters.peft.embedded import embedded_fields
from surgery_formats.adapters.peft.keys import sort_tensors, unwrapped
from surgery_formats.adapters.peft.kinds import kinds, switches
from surgery_formats.adapters.peft.kinds.kind import PeftKind
from surgery_formats.adapters.peft.lone_weights import open_lone, roots_of
from surgery_formats.adapters.peft.read import is_embedding_weight, read_tensors
from surgery_formats.adapters.peft.read_config import CONFIG_FILE, parse_config
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.canonical.provenance import Provenance
from surgery_formats.errors import FitError
from surgery_formats.models.families.denoisers import denoiser_of
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show
from surgery_formats.updates import Update

__all__ = ["read_unconfigured"]

_COMPONENT = re.compile(r"(unet|transformer|prior|text_encoder(?:_[23])?)\.base_model\.model\.")
_TOLD_BY_TENSORS = ("LORA", "LOHA", "IA3")
"""Kinds whose tensors mean one thing once their alpha is known; the configuration of the others decides more."""
_OF_KASA = "lora_diag"
"""Singular values, which replace a part of the base; all else in such a file is a LoRA's."""
_BESIDE = f"put {CONFIG_FILE} beside it"


def read_unconfigured(path: Path, alpha: float | None) -> Adapter:
    """Read a file of PEFT's weights, or a folder with one.

    Args:
        path: Of the file or folder.
        alpha: ``lora_alpha`` of all modules.

    Raises:
        NotFoundError, MalformedError: no weights, or not PEFT's.
        FitError: no alpha and a kind that has one, or the reverse; a kind, or a part, that only the configuration explains.
    """
    opened = open_lone(path)
    file = opened.shards[0].path
    if file.with_name(CONFIG_FILE).exists():
        raise FitError(f"PEFT's weights, with their {CONFIG_FILE} beside them", file=file, hint="name their folder")
    kind = _kind_of(opened.tensors, file)
    scaled = kind.name != "IA3"
    if scaled and alpha is None:
        raise FitError(
            f"PEFT's weights without their {CONFIG_FILE}, which has their scale",
            file=file,
            hint=f"{_BESIDE}, or {TELL_ALPHA} (of rsLoRA: that times the root of its rank); "
            'convert with `to="peft"` writes the folder that every command reads',
        )
    if not scaled and alpha is not None:
        raise FitError("an alpha was given, and (IA)^3 has none", file=file)
    groups: dict[str, list[StoredTensor]] = {}
    for tensor in opened.tensors.values():
        match = _COMPONENT.match(tensor.name)
        groups.setdefault(match[1] if match else "", []).append(tensor)
    fields = {"peft_type": kind.name, **({kind.switches.alpha: alpha} if scaled else {})}
    parts = {name: _read_part(path, kind, fields, tensors, name) for name, tensors in groups.items()}
    family = denoiser_of(site.path.rpartition(".")[0] for part in parts.values() for site in part.updates)
    placed = [_within(part, name or ("denoiser" if family else "")) for name, part in parts.items()]
    updates = {site: chain for part in placed for site, chain in part.updates.items()}
    issues = dict.fromkeys(issue for part in placed for issue in part.stated_issues if issue != NO_RANK)
    return replace(
        placed[0],
        updates=dict(sorted(updates.items())),
        tensors=tuple(opened.tensors.values()),
        ignored=tuple(entry for part in placed for entry in part.ignored),
        optional=frozenset().union(*(part.optional for part in placed)),
        new_modules=frozenset().union(*(part.new_modules for part in placed)),
        config=_with_ranks(kind, placed[0].config, updates),
        metadata=dict(opened.shards[0].metadata),
        stated_issues=(*issues, *_said(alpha)),
        unmet=_nothing_promised,
        provenance=Provenance("PEFT (its keys)", family.name if family else ""),
    )


def _within(adapter: Adapter, component: str) -> Adapter:
    """The adapter, of a part of a pipeline."""
    updates = {replace(site, component=component): chain for site, chain in adapter.updates.items()}
    optional = frozenset(replace(site, component=component) for site in adapter.optional)
    return replace(adapter, updates=updates, optional=optional)


def _nothing_promised(parameters: Collection[str], changed: Collection[str]) -> tuple[str, ...]:
    """No configuration says what the file should have."""
    return ()


def _kind_of(names: Iterable[str], file: Path) -> PeftKind:
    """The kind of an adapter by the names of its tensors.

    Raises:
        FitError: the configuration decides what they mean.
    """
    known = kinds()
    every = set().union(*map(roots_of, known.values()))
    found = {segment for name in names for segment in name.split(".") if segment in every}
    if "trainable_tokens_delta" in found:
        what = "rows of trained tokens, whose ids stand there alone"
    else:
        fitting = [] if _OF_KASA in found else [kind for kind in known.values() if found <= roots_of(kind)]
        if told := [kind for kind in fitting if kind.name in _TOLD_BY_TENSORS]:
            return told[0]
        names = " or ".join(kind.name for kind in fitting) or "KaSA or another variant"
        what = f"of type {names}, whose numbers that file explains"
    raise FitError(f"PEFT's weights without their {CONFIG_FILE}: {what}", file=file, hint=_BESIDE)


def _read_part(
    path: Path, kind: PeftKind, fields: Mapping[str, Any], tensors: list[StoredTensor], component: str
) -> Adapter:
    """The tensors of one component, with the configuration that they show."""
    contents = sort_tensors(tensors, kind.factors, kind.shared, unused=kind.unused)
    for module, parts in contents.modules.items():
        _refuse_stack(module, parts)
    plain = [(name, *name.rpartition(".")[::2]) for name in contents.plain]
    whole = {module for _, module, leaf in plain if leaf != "bias"}
    biased = any(leaf == "bias" and module not in whole for _, module, leaf in plain)
    saved = sorted(module for name, module, leaf in plain if leaf != "bias" and not is_embedding_weight(name))
    shown: dict[str, Any] = {
        **fields,
        "modules_to_save": saved or None,
        **({"bias": "all"} if biased and "bias" in kind.switches.understood else {}),
    }
    if kind.name == "LORA":
        shown["use_dora"] = any("lora_magnitude_vector" in parts for parts in contents.modules.values())
        shown["lora_bias"] = any("lora_B.bias" in parts for parts in contents.modules.values())
    config = parse_config(shown, tensors[0].file.path, switches())
    return read_tensors(path, config, tensors, around=component)


def _refuse_stack(module: str, parts: Mapping[str, StoredTensor]) -> None:
    """Refuse factors of stacked experts, which have several readings.

    Raises:
        FitError: they are some.
    """
    segments = unwrapped(module).split(".")
    behind = segments[segments.index("experts") + 1 :] if "experts" in segments else ["0"]
    if not behind or not behind[0].isdecimal():
        stored = next(iter(parts.values()))
        raise FitError(
            f"factors of stacked experts in PEFT's weights without their {CONFIG_FILE}, which tells how they lie",
            file=stored.file.path,
            tensor=stored.name,
            hint=_BESIDE,
        )


def _with_ranks(
    kind: PeftKind, config: Mapping[str, Any], updates: Mapping[Site, tuple[Update, ...]]
) -> dict[str, Any]:
    """The configuration, with the ranks and the targets that the tensors have: what is written of it is complete."""
    ranks = {
        site.path.removesuffix(".weight"): update.rank
        for site, chain in updates.items()
        for update in chain
        if update.rank is not None
    }
    alpha = config.get(kind.switches.alpha)
    if alpha is None:
        modules = sorted(site.path.removesuffix(".weight") for site in updates if site.path.endswith(".weight"))
        return {**config, "target_modules": modules}
    stated = embedded_fields({}, {module: (rank, float(alpha)) for module, rank in ranks.items()})
    own = {field: stated[field] for field in ("r", "rank_pattern", "target_modules")}
    return {**config, **own}


def _said(alpha: float | None) -> tuple[str, ...]:
    if alpha is None:
        return (f"no {CONFIG_FILE}: it is read by its tensors alone",)
    return (
        f"no {CONFIG_FILE}: alpha {show(f'{alpha:g}')} is what was given, for every module; whether it was divided by the root of the rank "
        "(rsLoRA), differs by module, acts after certain tokens (aLoRA) or belongs to a changed base (PiSSA) stands there alone",
    )
