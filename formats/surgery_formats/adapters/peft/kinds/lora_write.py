# SPDX-License-Identifier: Apache-2.0
"""Write the kind LORA: one module's LoRA, DoRA or LoRA on a changed base, what lies beside it, experts, token rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from surgery_formats.adapters.contents import Contents, contents_of
from surgery_formats.adapters.embeddings import following_head, is_embedding
from surgery_formats.adapters.experts import SWITCH, fused_of, taken_apart
from surgery_formats.adapters.peft.dialects.leaves import named_by_peft
from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.keys import INSIDE_ATTENTION
from surgery_formats.adapters.peft.kinds.lora_variants import base_fields, put_diag
from surgery_formats.adapters.peft.kinds.tokens import put_rows
from surgery_formats.adapters.peft.parameters import (
    StackedParameter,
    is_parameter_here,
    put_parameters,
    todays_order,
)
from surgery_formats.adapters.peft.write_config import ranks_and_alphas, targets
from surgery_formats.adapters.writing import zero_padded
from surgery_formats.arrays import Array
from surgery_formats.canonical.adapter import Site
from surgery_formats.updates import ChangedBase, LoRA, Offset, Part, Stacked, Update

__all__ = ["write_lora"]


@dataclass(frozen=True, slots=True)
class _PlainLoRA:
    """A plain LoRA that is in the file: its key, and the scale of a bias beside it."""

    key: str
    scale: float


def write_lora(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> None:
    """LoRAs and DoRAs first, then what goes beside them, then parameters with a LoRA of their own."""
    contents = [(site, contents_of(update)) for site, update in updates]
    dora = any(held.dora for _, held in contents)
    changed = {update.taken for _, update in updates if isinstance(update, ChangedBase)}
    part = min(changed, default=None)
    file.rows = {site.path.removesuffix(".weight"): held.rows.indices for site, held in contents if held.rows}
    plain: dict[Site, _PlainLoRA] = {}
    stacks: list[StackedParameter] = []
    rest: list[tuple[Site, Contents]] = []
    for site, held in contents:
        if isinstance(held.update, ChangedBase):
            _put_low_rank(file, site, held, held.update.lora, {}, dora=dora, part=part)
        elif held.lora is None:
            rest.append((site, held))
        elif not held.dora and (site.module_kind == "experts" or is_parameter_here(file, site)):
            stacks.append(StackedParameter(site, held.update, Stacked((held.lora,))))
        else:
            _put_low_rank(file, site, held, held.lora, plain, dora=dora, part=part)
    for site, held in rest:
        if held.stack and SWITCH not in site.path:
            if len({expert.rank for expert in held.stack.experts}) > 1:
                file.drop(site, held.update, "its experts have several ranks")
            else:
                stacks.append(StackedParameter(site, held.update, todays_order(file, site, held.stack)))
        elif held.stack:
            _put_experts(file, site, held.update)
            file.rewritten = True  # its configuration has no such modules
        elif held.offset:
            _put_bias(file, site, held, held.offset, plain)
        elif held.rows:
            put_rows(file, site, held.rows)
        else:
            file.hold_other(site, held.update, by_key=False)
    put_parameters(file, stacks)
    named = {tensor.name.removeprefix(file.prefix).partition(".lora_")[0] for tensor in file.adapter.tensors}
    file.rewritten |= any(named_by_peft(path) != path for path in named)
    biased = any(key.endswith(".lora_B.bias") for key in file.tensors)
    if (
        biased and file.own is not None and not file.own.raw.get("lora_bias")
    ):  # mergekit-extract-lora 0.1.5 leaves it out
        file.rewritten = True
    file.defaults = {"fan_in_fan_out": False, "init_lora_weights": True, "lora_dropout": 0.0}
    file.fields = {
        **ranks_and_alphas(file),
        "lora_bias": biased,
        **base_fields(part),
        "target_modules": targets(file),
        "use_dora": dora,
        "use_rslora": file.scaling is not None and file.scaling.rslora,
    }
    if file.own is not None and file.own.raw.get("use_bdlora"):  # factors are stored whole here
        file.fields["use_bdlora"] = None
        file.rewritten = True
    if file.rows and file.own is None:
        file.fields["trainable_token_indices"] = {module: list(rows) for module, rows in file.rows.items()}


def _put_low_rank(
    file: PeftFile,
    site: Site,
    held: Contents,
    lora: LoRA,
    plain: dict[Site, _PlainLoRA],
    *,
    dora: bool,
    part: Part | None,
) -> None:
    """One module's LoRA or DoRA."""
    why, mine = "", held.dora
    changed = held.update if isinstance(held.update, ChangedBase) else None
    if part != (changed.taken if changed else None):
        why = "all modules of a file begin in one way"
    if dora and not mine:
        why = "use_dora holds for every module of a file"
    module, shape = file.module_of(site, lora)
    module = file.spelt(module)
    key = f"{file.prefix}{module}"
    embedding = is_embedding(module, file.base, site)
    if mine:
        size = lora.shape[1 if embedding else 0]
        if mine.per_row == embedding or mine.magnitude.shape[0] != size:
            why = f"its magnitudes belong to {'rows' if mine.per_row else 'columns'}, this format's do not"
    if f"{key}.lora_A.weight" in file.tensors or f"{key}.lora_embedding_A" in file.tensors:
        why = "a second one on one module"
    if not site.path.endswith(".weight"):
        why = "this format names modules, not parameters"
    if why:
        file.drop(site, held.update, why)
        return
    inside = module.endswith(INSIDE_ATTENTION)  # configured with its attention, and applied twice (`lora.py`)
    scale = lora.scale / 2 if inside else lora.scale
    path, alpha = module.removesuffix(INSIDE_ATTENTION), file.alpha_of(lora.rank, scale)
    rank, stated = file.settings.get(path, (lora.rank, alpha))
    if rank != lora.rank or (alpha and not stated):
        file.drop(
            site, held.update, f"the rest of its attention has rank {rank} and alpha {stated:g}, it has other ones"
        )
        return
    times = 1.0 if alpha == stated else alpha / stated
    if file.even is not None:
        rank, even = file.even
        stated, times = file.alpha_of(rank, even), scale / even
    file.settings[path] = (rank, stated)
    lora = put_diag(file, key, changed) if changed else lora
    _put_factors(file, key, lora, shape, embedding=embedding, times=times, rank=rank)
    if mine:
        ones = (1,) * (len(shape) - 2)
        magnitude = (1, shape[0], *ones) if ones else mine.magnitude.shape
        file.put(f"{key}.lora_magnitude_vector", mine.magnitude, magnitude)
    else:
        plain[site] = _PlainLoRA(key, scale / times if times else scale)
        _put_tied_head(file, site, lora)
    stored = sum(tensor.numel for tensor in (*lora.A.tensors, *lora.B.tensors))
    same = not held.folded or changed is not None
    same = same and len(lora.A.tensors) + len(lora.B.tensors) == 2 and times == 1.0 and rank == lora.rank
    same = same and stored == math.prod(lora.A.shape) + math.prod(lora.B.shape)
    file.ledger.keep(site, held.update, "exact" if same else "folded", key)


def _put_tied_head(file: PeftFile, site: Site, lora: LoRA) -> None:
    """A tied head that follows the embedding (mlx-lm) needs the same LoRA of its own here."""
    if module := following_head(site, lora, file.adapter, file.base):
        _put_factors(file, f"{file.prefix}{module}", lora, lora.shape, embedding=False)
        file.settings[module] = (lora.rank, file.alpha_of(lora.rank, lora.scale))


def _put_factors(
    file: PeftFile,
    key: str,
    lora: LoRA,
    shape: tuple[int, ...],
    *,
    embedding: bool,
    times: float = 1.0,
    rank: int | None = None,
) -> None:
    """The two factors, `times` multiplied into B, with zeros up to `rank` directions."""
    rank = lora.rank if rank is None else rank

    def a(values: Array) -> Array:
        return zero_padded(values, 0, rank)

    def b(values: Array) -> Array:
        return zero_padded(values, 1, rank)

    if embedding:  # delta = (B A)^T
        file.put(f"{key}.lora_embedding_A", lora.B, (rank, lora.shape[0]), lambda t: b(t).T, times=times)
        file.put(f"{key}.lora_embedding_B", lora.A, (lora.shape[1], rank), lambda t: a(t).T)
    else:
        ones = (1,) * (len(shape) - 2)
        padded = (a, b) if rank != lora.rank else (None, None)
        file.put(f"{key}.lora_A.weight", lora.A, (rank, *shape[1:]), padded[0])
        file.put(f"{key}.lora_B.weight", lora.B, (shape[0], rank, *ones), padded[1], times=times)


def _put_bias(file: PeftFile, site: Site, held: Contents, offset: Offset, plain: Mapping[Site, _PlainLoRA]) -> None:
    """``lora_bias``: an addition to the bias, scaled like the LoRA of its module."""
    lora = plain.get(replace(site, path=site.path.removesuffix("bias") + "weight"))
    if not site.path.endswith(".bias") or lora is None:
        file.drop(site, held.update, "this format adds to a bias only where its module has a LoRA")
        return
    times = 1.0 if offset.scale == lora.scale else offset.scale / lora.scale
    file.put(f"{lora.key}.lora_B.bias", offset.value, times=times)
    file.ledger.keep(site, held.update, "exact" if times == 1.0 else "folded", "lora_bias")


def _put_experts(file: PeftFile, site: Site, update: Update) -> None:
    """MLX's stacks, as one LoRA per expert."""
    pieces = list(taken_apart(site.path, update, fused_of(site, file.base)))
    if not pieces:
        file.drop(site, update, "the names of its experts are not known")
        return
    for path, lora in pieces:
        module = path.removesuffix(".weight")
        _put_factors(file, f"{file.prefix}{module}", lora, lora.shape, embedding=False)
        file.settings[module] = (lora.rank, file.alpha_of(lora.rank, lora.scale))
    file.ledger.keep(site, update, "exact", f"{len(pieces)} modules")
