# SPDX-License-Identifier: Apache-2.0
"""LILY, PSOFT and ADAMSS: read and shown, and copied from PEFT to PEFT; no weight can be computed from their files (PEFT 0.21)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates, PeftKind, malformed
from surgery_formats.adapters.peft.read_config import COMMON, Switches
from surgery_formats.adapters.peft.write_config import targets
from surgery_formats.canonical.adapter import Site
from surgery_formats.updates import Factor, Unmerged, Update

__all__ = ["ADAMSS", "LILY", "PSOFT"]

_MERGE_WITH_PEFT = "merge it with PEFT where it was trained, and get a LoRA of that with `surgery extract-lora`"
_SUBSPACES = 64
_Sizes = Callable[[Module], tuple[int, int, int]]
"""Rows and columns of the weight, 0 where the tensors do not tell, and the rank."""


def _read(module: Module, name: str, why: str, instead: str, sizes: _Sizes) -> ModuleUpdates:
    out, inputs, rank = sizes(module)
    held = tuple((key, Factor.of(stored)) for key, stored in sorted(module.parts.items()))
    return ModuleUpdates({module.site(): (Unmerged(name, held, why, instead, (out, inputs), rank),)})


def _write(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> None:
    """As it was read: only its own configuration tells what it means."""
    for site, update in updates:
        if not isinstance(update, Unmerged):
            file.hold_other(site, update)
        elif file.own is None:
            file.drop(site, update, "its own configuration is lost")
        else:
            key = f"{file.prefix}{site.path.removesuffix('.weight')}"
            for name, factor in update.held:
                file.put(f"{key}.{name}", factor)
            file.ledger.keep(site, update, "exact", key)
    file.fields = {"target_modules": targets(file)}


def _lily(module: Module) -> tuple[int, int, int]:
    A, B = module.matrix("lily_A.weight"), module.matrix("lily_B.weight")
    if B.shape[0] % A.shape[0]:
        raise malformed(B, f"'lily_A' is {list(A.shape)}")
    return B.shape[1], A.shape[1], A.shape[0]


def _psoft(module: Module) -> tuple[int, int, int]:
    stored = module.part("psoft_R.weight")  # a square, or its strictly upper triangle
    return 0, 0, module.config.rank if len(stored.shape) == 1 else stored.shape[0]


def _adamss(module: Module) -> tuple[int, int, int]:
    return 0, 0, module.matrix("adamss_newB").shape[0]


def _kind(
    peft_type: str,
    name: str,
    factors: Sequence[str],
    harmless: Sequence[str],
    why: str,
    instead: str,
    sizes: _Sizes,
    ranks: Mapping[str, int] = {},
) -> PeftKind:
    read = partial(_read, name=name, why=why, instead=instead, sizes=sizes)
    switches = Switches(COMMON | set(harmless), frozenset(["r", "modules_to_save"]))
    return PeftKind(peft_type, frozenset(factors), read, frozenset([name]), _write, switches, ranks=ranks)


LILY = _kind(
    "LILY",
    "Lily",
    ("lily_A.weight", "lily_B.weight", "lily_router.weight"),
    ("num_B", "scaling", "stride_A"),
    "a router mixes its matrices B anew for every input",
    "keep it beside the base, in PEFT",
    _lily,
    {"lily_A.weight": 0},
)
PSOFT = _kind(
    "PSOFT",
    "PSOFT",
    ("psoft_R.weight", "psoft_R.vector_a", "psoft_R.vector_b"),
    (
        "ab_svd_init",
        "cayley_neumann_eps",
        "num_cayley_neumann_terms",
        "psoft_alpha",
        "psoft_dropout",
        "psoft_mag_a",
        "psoft_mag_b",
        "psoft_orth",
        "psoft_svd",
        "psoft_svd_lowrank_niter",
        "random_seed",
        "use_cayley_neumann",
    ),
    "it turns singular vectors of the base, whose signs are those of the library that computed them in training: another library, "
    "or another device, gives another weight, and no file tells which is meant",
    _MERGE_WITH_PEFT,
    _psoft,
)
ADAMSS = _kind(
    "ADAMSS",
    "AdaMSS",
    ("adamss_newB", *(f"adamss_{side}.{i}" for side in "AB" for i in range(_SUBSPACES))),
    (
        "asa_importance_beta",
        "asa_schedule_exponent",
        "asa_target_subspaces",
        "asa_uncertainty_beta",
        "final_warmup",
        "init_warmup",
        "mask_interval",
        "num_subspaces",
        "random_seed",
        "subspace_rank",
        "svd_threshold",
        "use_asa",
        "use_dynamic_rank",
    ),
    "which rows of the weight each of its parts changes is not in its files: PEFT groups them again by k-means of random projections",
    _MERGE_WITH_PEFT,
    _adamss,
)
