# SPDX-License-Identifier: Apache-2.0
"""LORA and TRAINABLE_TOKENS: LoRA, DoRA, ``lora_bias``, experts, token rows (PEFT 0.21, ``tuners/lora/layer.py``)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from surgery_formats.adapters.contents import Contents, contents_of
from surgery_formats.adapters.embeddings import is_embedding
from surgery_formats.adapters.experts import SWITCH, fused_of, taken_apart
from surgery_formats.adapters.peft.dialects.leaves import named_by_peft
from surgery_formats.adapters.peft.dialects.reading import experts_of
from surgery_formats.adapters.peft.dialects.writing import put_experts
from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.keys import INSIDE_ATTENTION
from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates, PeftKind, malformed
from surgery_formats.adapters.peft.kinds.lora_variants import (
    UNUSED,
    base_fields,
    blocks_of,
    changed_base_issue,
    diagonal,
    not_plain,
    on_changed_base,
    put_diag,
    taken,
)
from surgery_formats.adapters.peft.known_issues import combination_issues
from surgery_formats.adapters.peft.packing import LAYOUT
from surgery_formats.adapters.peft.parameters import (
    StackedParameter,
    is_parameter_here,
    put_parameters,
    todays_order,
)
from surgery_formats.adapters.peft.read_config import COMMON, PeftConfig, Switches
from surgery_formats.adapters.peft.write_config import ranks_and_alphas, targets
from surgery_formats.adapters.writing import places_of, whole_place, zero_padded
from surgery_formats.arrays import Array
from surgery_formats.canonical.adapter import ModuleKind, Site
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.updates import ChangedBase, DoRA, Factor, LoRA, Offset, Part, Stacked, TokenRows, Update

__all__ = ["LORA", "SWITCHES", "TRAINABLE_TOKENS"]

_FACTORS = frozenset(
    [
        "lora_A.weight",
        "lora_B.weight",
        "lora_B.bias",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_diag",
        "lora_magnitude_vector",
        "trainable_tokens_delta",
    ]
)
SWITCHES = Switches(
    harmless=COMMON
    | {
        "lora_dropout",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "velora_config",  # of training: what it and MonteCLoRA leave is a plain LoRA
        "monteclora_config",
        "qalora_group_size",
        "token_indices",
        "enable_lora",
        "merge_weights",
        "ensure_weight_tying",
    },
    understood=frozenset(
        [
            "r",
            "lora_alpha",
            "bias",
            "use_rslora",
            "modules_to_save",
            "init_lora_weights",
            "rank_pattern",
            "alpha_pattern",
            "trainable_token_indices",
            "use_dora",
            "lora_bias",
            "target_parameters",
            LAYOUT,
            "use_bdlora",
            "kasa_config",
        ]
    ),
    refused={
        "layer_replication": "its layers are copies that share the base's weights, each copy with a LoRA of its own: "
        "no single weight can hold them. Keep it beside the base, or train it on a base that has the copied layers",
        "alora_invocation_tokens": "it acts only after its invocation tokens: no merged weight does that. "
        "Keep it beside the base (PEFT and vLLM choose by the tokens)",
        "arrow_config": "it routes between adapters at run time, by each token. Merge one of the adapters that it routes "
        "between, or keep it beside the base",
        "use_qalora": "its A acts on inputs that were pooled to fit the groups of a quantised base. "
        "Keep it beside that base, in PEFT",
        "megatron_config": "its tensors are one part of a parallel layer",
        "corda_config": "raw CorDA changes the base in a way its files do not record; convert it with PEFT first",
        "lora_ga_config": "raw LoRA-GA changes the base in a way its files do not record; convert it with PEFT first",
    },
)


def _read(module: Module) -> ModuleUpdates:
    """All updates of one module."""
    parts, config, clean = module.parts, module.config, named_by_peft(module.path)
    tokens = (_token_rows(clean, parts["tokens"], config),) if "tokens" in parts else ()
    if tokens and len(parts) == 1:
        return ModuleUpdates({Site(f"{clean}.weight"): tokens})
    embedding = "lora_embedding_A" in parts
    a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    for have, lack in ((a, b), (b, a)):
        if have in parts and lack not in parts:
            tensor = parts[have]
            raise MalformedError(
                f"{have.removesuffix('.weight')} without {lack.removesuffix('.weight')}",
                file=tensor.file.path,
                tensor=tensor.name,
            )
    if a not in parts:
        tensor = next(iter(parts.values()))
        raise MalformedError("belongs to a LoRA that has no factors", file=tensor.file.path, tensor=tensor.name)
    if flat := next((tensor for tensor in (parts[a], parts[b]) if len(tensor.shape) < 2), None):
        raise malformed(flat, "not a factor of a LoRA")
    if len(parts[a].shape) != len(parts[b].shape):
        raise malformed(parts[b], f"its other factor is {list(parts[a].shape)}")
    part = taken(config)
    if not embedding and (experts := experts_of(module)):
        if part:
            raise not_plain(parts[a])
        return replace(experts, updates={**({Site(f"{clean}.weight"): tokens} if tokens else {}), **experts.updates})
    in_attention = module.wrapped.endswith(INSIDE_ATTENTION)  # whose alpha it has
    pattern_path = module.wrapped.removesuffix(INSIDE_ATTENTION) if in_attention else clean
    lora = _lora(pattern_path, parts[a], parts[b], config, blocks_of(clean, config), embedding=embedding)
    config.check_rank(pattern_path, lora.rank, parts[a])
    if in_attention:
        # PEFT adds this delta twice, attached or merged (MultiheadAttention.merge adds it, then calls out_proj.merge):
        # it was trained at twice the scale.
        lora = lora.scaled(2.0)
    kernel = parts[a].shape[2:]
    kind: ModuleKind = "embedding" if embedding else "convolution" if kernel else "linear"
    site = Site(f"{clean}.weight", module_kind="attention output" if in_attention else kind, kernel=kernel)
    if part is None and "lora_diag" in parts:
        raise malformed(parts["lora_diag"], "singular values, but no 'kasa_config'")
    if part:
        plain = kind == "linear" and not in_attention
        changed = on_changed_base(lora, part, parts.get("lora_diag"), config, plain=plain)
    updates: dict[Site, tuple[Update, ...]] = {
        site: (*tokens, changed if part else _with_magnitude(lora, parts, config, embedding=embedding))
    }
    if "lora_B.bias" in parts:
        updates[replace(site, path=f"{clean}.bias")] = (Offset(Factor.of(parts["lora_B.bias"]), lora.scale),)
    return ModuleUpdates(updates)


def _lora(
    pattern_path: str, a: StoredTensor, b: StoredTensor, config: PeftConfig, blocks: tuple[int, int], *, embedding: bool
) -> LoRA:
    """The factors as (rank, in) and (out, rank): convolutions flattened, embeddings transposed to (vocabulary, dim).

    `blocks` are those on the diagonals of A and B.
    """
    rank = a.shape[0]
    flat_b = b.shape[0], b.numel // max(b.shape[0], 1) * blocks[1]
    if flat_b[1] != rank or rank == 0:
        raise FitError(
            f"B is {list(b.shape)}, but A has rank {rank} ({list(a.shape)})", file=b.file.path, tensor=b.name
        )
    scale, alpha = config.scale_of(pattern_path, rank), config.alpha_of(pattern_path)
    if embedding:
        return LoRA(
            A=Factor((b,), (rank, b.shape[0]), lambda t: t.T),
            B=Factor((a,), (a.shape[1], rank), lambda t: t.T),
            scale=scale,
            alpha=alpha,
        )
    A = diagonal(a, blocks[0]) if blocks[0] > 1 else Factor((a,), (rank, a.numel // rank))
    B = diagonal(b, blocks[1]) if blocks[1] > 1 else Factor((b,), flat_b)
    return LoRA(A=A, B=B, scale=scale, alpha=alpha)


def _with_magnitude(
    lora: LoRA, parts: Mapping[str, StoredTensor], config: PeftConfig, *, embedding: bool
) -> LoRA | DoRA:
    magnitude = parts.get("lora_magnitude_vector")
    if magnitude is None:
        if config.dora:
            raise MalformedError(
                "use_dora is true, but this module has no magnitude vector",
                file=lora.A.tensors[0].path,
                tensor=lora.A.tensors[0].name,
            )
        return lora
    if not config.dora:
        raise MalformedError(
            "a magnitude vector, but use_dora is false", file=magnitude.file.path, tensor=magnitude.name
        )
    size = lora.shape[1 if embedding else 0]
    if magnitude.numel != size:
        raise FitError(
            f"{magnitude.numel} magnitudes for {size} {'columns' if embedding else 'rows'}",
            file=magnitude.file.path,
            tensor=magnitude.name,
        )
    return DoRA(lora, Factor((magnitude,), (size,)), per_row=not embedding)


def _token_rows(clean: str, tensor: StoredTensor, config: PeftConfig) -> TokenRows:
    indices = config.token_indices
    if isinstance(indices, Mapping):
        named = [rows for name, rows in indices.items() if f".{clean}".endswith(f".{name}")]
        indices = named[0] if len(named) == 1 else ()
    if len(tensor.shape) != 2 or len(indices) != tensor.shape[0]:
        raise MalformedError(
            f"{tensor.shape[0] if tensor.shape else 0} token rows for {len(indices)} indices",
            file=tensor.file.path,
            tensor=tensor.name,
        )
    return TokenRows(Factor.of(tensor), indices)


@dataclass(frozen=True, slots=True)
class _Written:
    """A plain LoRA that is in the file: what a bias beside it needs to know."""

    key: str
    scale: float


def _write(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> None:
    """LoRAs and DoRAs first, then what goes beside them, then parameters with a LoRA of their own."""
    updates = put_experts(file, updates) if file.dialect is not None else updates
    contents = [(site, contents_of(update)) for site, update in updates]
    dora = any(held.dora for _, held in contents)
    changed = {update.taken for _, update in updates if isinstance(update, ChangedBase)}
    part = min(changed, default=None)
    file.rows = {_module(site): held.rows.indices for site, held in contents if held.rows}
    plain: dict[Site, _Written] = {}
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
            wrapper = "" if file.own is not None and file.own.kind == "TRAINABLE_TOKENS" else ".token_adapter"
            file.put(f"{file.prefix}{_module(site)}{wrapper}.trainable_tokens_delta", held.rows.value)
            file.ledger.keep(site, held.update, "exact", "trainable tokens")
        else:
            file.hold_other(site, held.update, by_key=False)
    put_parameters(file, stacks)
    named = {tensor.name.removeprefix(file.prefix).partition(".lora_")[0] for tensor in file.adapter.tensors}
    file.rewritten |= any(named_by_peft(path) != path for path in named)
    file.defaults = {"fan_in_fan_out": False, "init_lora_weights": True, "lora_dropout": 0.0}
    file.fields = {
        **ranks_and_alphas(file),
        "lora_bias": any(key.endswith(".lora_B.bias") for key in file.tensors),
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


def _module(site: Site) -> str:
    return site.path.removesuffix(".weight")


def _put_low_rank(
    file: PeftFile,
    site: Site,
    held: Contents,
    lora: LoRA,
    plain: dict[Site, _Written],
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
    module = file.dialect.named(module) if file.dialect else module
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
    inside = module.endswith(INSIDE_ATTENTION)  # configured with its attention, and applied twice (`_read`)
    path, alpha = module.removesuffix(INSIDE_ATTENTION), file.alpha_of(lora.rank, lora.scale / (2 if inside else 1))
    rank, stated = file.settings.get(path, (lora.rank, alpha))
    if rank != lora.rank or (alpha and not stated):
        file.drop(
            site, held.update, f"the rest of its attention has rank {rank} and alpha {stated:g}, it has other ones"
        )
        return
    times = 1.0 if alpha == stated else alpha / stated
    if file.even is not None:
        rank, scale = file.even
        stated = file.alpha_of(rank, scale)
        times = lora.scale / (2 if inside else 1) / scale
    file.settings[path] = (rank, stated)
    lora = put_diag(file, key, changed) if changed else lora
    _put_factors(file, key, lora, shape, embedding=embedding, times=times, rank=rank)
    if mine:
        ones = (1,) * (len(shape) - 2)
        magnitude = (1, shape[0], *ones) if ones else mine.magnitude.shape
        file.put(f"{key}.lora_magnitude_vector", mine.magnitude, magnitude)
    else:
        plain[site] = _Written(key, lora.scale)
        _put_tied_head(file, site, lora)
    stored = sum(tensor.numel for tensor in (*lora.A.tensors, *lora.B.tensors))
    same = not held.folded or changed is not None
    same = same and len(lora.A.tensors) + len(lora.B.tensors) == 2 and times == 1.0 and rank == lora.rank
    same = same and stored == math.prod(lora.A.shape) + math.prod(lora.B.shape)
    file.ledger.keep(site, held.update, "exact" if same else "folded", key)


def _put_tied_head(file: PeftFile, site: Site, lora: LoRA) -> None:
    """A tied head that follows the embedding (mlx-lm) needs the same LoRA of its own here."""
    base = file.base
    if base is None or base.is_pipeline or not file.adapter.keeps_ties:
        return
    main = base.main
    place = whole_place(places_of(site, base, lora.tensors))
    if main.tied and main.head and place and place[0] == main.embedding and Site(main.head) not in file.adapter.updates:
        module = main.head.removesuffix(".weight")
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


def _put_bias(file: PeftFile, site: Site, held: Contents, offset: Offset, plain: Mapping[Site, _Written]) -> None:
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


def _issues(config: Mapping[str, Any], tensors: Sequence[StoredTensor]) -> Iterable[str]:
    if "lora_alpha" not in config:
        yield "no lora_alpha in its configuration: PEFT's default, 8, is used"
    yield from combination_issues(config)
    yield from changed_base_issue(config)


LORA = PeftKind(
    name="LORA",
    factors=_FACTORS,
    read=_read,
    writes=frozenset([LoRA.kind, DoRA.kind, ChangedBase.kind, Offset.kind, TokenRows.kind, "replacement"]),
    write=_write,
    switches=SWITCHES,
    issues=_issues,
    unused=UNUSED,
)
TRAINABLE_TOKENS = PeftKind("TRAINABLE_TOKENS", _FACTORS, _read, frozenset(), _write, SWITCHES)
