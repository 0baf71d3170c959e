# SPDX-License-Identifier: Apache-2.0
"""LORA and TRAINABLE_TOKENS: LoRA, DoRA, ``lora_bias``, experts, token rows (PEFT 0.21, ``tuners/lora/layer.py``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from surgery_formats.adapters.peft.dialects.leaves import named_by_peft
from surgery_formats.adapters.peft.dialects.reading import experts_of
from surgery_formats.adapters.peft.keys import INSIDE_ATTENTION
from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates, PeftKind, malformed
from surgery_formats.adapters.peft.kinds.lora_variants import (
    UNUSED,
    blocks_of,
    changed_base_issue,
    diagonal,
    not_plain,
    on_changed_base,
    taken,
)
from surgery_formats.adapters.peft.kinds.lora_write import write_lora
from surgery_formats.adapters.peft.kinds.tokens import ROWS, read_rows
from surgery_formats.adapters.peft.known_issues import combination_issues, untrue_export
from surgery_formats.adapters.peft.packing import LAYOUT
from surgery_formats.adapters.peft.read_config import COMMON, PeftConfig, Switches
from surgery_formats.canonical.adapter import Ignored, ModuleKind, Site
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.updates import ChangedBase, DoRA, Factor, LoRA, Offset, TokenRows, Update

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
        ROWS,
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
    tokens = (read_rows(clean, parts["tokens"], config),) if "tokens" in parts else ()
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
    bias_scale = lora.scale
    if in_attention:
        # PEFT adds this delta twice, attached or merged (MultiheadAttention.merge adds it, then calls out_proj.merge):
        # it was trained at twice the scale. Its bias is added once.
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
    bias = parts.get("lora_B.bias")
    if bias is not None and len(bias.shape) != 1:
        raise malformed(bias, "not a vector")
    if bias is not None and f"{module.path}.out_proj" in module.wrappers:
        return ModuleUpdates(updates, ignored=(Ignored(bias, "PEFT adds none to the inputs of an attention"),))
    if bias is not None:
        updates[replace(site, path=f"{clean}.bias")] = (Offset(Factor.of(bias), bias_scale),)
    return ModuleUpdates(updates)


def _lora(
    pattern_path: str, a: StoredTensor, b: StoredTensor, config: PeftConfig, blocks: tuple[int, int], *, embedding: bool
) -> LoRA:
    """The factors as (rank, in) and (out, rank): convolutions flattened, embeddings transposed to (vocabulary, dim).

    `blocks` are those on the diagonals of A and B.
    """
    rank = a.shape[0]
    flat_b = b.shape[0], b.numel // max(b.shape[0], 1) * blocks[1]
    if len(a.shape) > 2 and flat_b[1] and rank > flat_b[1] and rank % flat_b[1] == 0:
        raise FitError(
            f"the LoRA of a convolution in {rank // flat_b[1]} groups: its A sees the inputs of all groups, "
            "and a weight of that convolution none but its own",
            file=b.file.path,
            tensor=b.name,
            hint="keep it beside the base, in PEFT",
        )
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
            "a magnitude vector, but use_dora is false",
            file=magnitude.file.path,
            tensor=magnitude.name,
            hint=untrue_export(config.raw),
        )
    size = lora.shape[1 if embedding else 0]
    if magnitude.numel != size:
        raise FitError(
            f"{magnitude.numel} magnitudes for {size} {'columns' if embedding else 'rows'}",
            file=magnitude.file.path,
            tensor=magnitude.name,
        )
    return DoRA(lora, Factor((magnitude,), (size,)), per_row=not embedding)


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
    write=write_lora,
    switches=SWITCHES,
    issues=_issues,
    unused=UNUSED,
)
TRAINABLE_TOKENS = PeftKind("TRAINABLE_TOKENS", _FACTORS, _read, frozenset(), write_lora, SWITCHES)
