# SPDX-License-Identifier: Apache-2.0
"""OFT: rotations of the inputs of modules (PEFT 0.21, ``tuners/oft/layer.py``)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates, PeftKind, malformed
from surgery_formats.adapters.peft.read_config import COMMON, Switches
from surgery_formats.adapters.peft.write_config import targets
from surgery_formats.canonical.adapter import Site
from surgery_formats.errors import FitError, SurgeryError
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.updates import OFT as Rotation
from surgery_formats.updates import Factor, Update

__all__ = ["OFT"]

_MOST_TERMS = 100  # PEFT has 5; each is a product of matrices
_FIRST_VERSION = "0.18.0"
"""The version of PEFT whose Cayley-Neumann series is read and written here."""


def _read(module: Module) -> ModuleUpdates:
    config = module.config
    embedding = "oft_embedding_R.weight" in module.parts
    if "oft_r" in module.parts:
        stored = module.part("oft_r")
        raise _refused(
            stored, "OFT as PEFT stored it before 0.16", "load and save it with PEFT 0.15, or train it again"
        )
    stored = module.part("oft_embedding_R.weight" if embedding else "oft_R.weight")
    if len(stored.shape) != 2 or not stored.shape[0]:
        raise malformed(stored, "not a matrix")
    # No angles: blocks of one, which PEFT falls back to where nothing else divides the width.
    blocks, angles = stored.shape
    block = (1 + math.isqrt(1 + 8 * angles)) // 2
    if block * (block - 1) // 2 != angles:
        raise malformed(stored, f"{angles} numbers are no strictly upper triangle")
    shared = config.flag("block_share")
    if shared and blocks != 1:
        raise malformed(stored, f"'block_share' is set, and there are {blocks} blocks")
    if "use_cayley_neumann" not in config.raw:
        raise _refused(
            stored, "no 'use_cayley_neumann' in the configuration: which transform it means cannot be told", ""
        )
    terms = config.integer("num_cayley_neumann_terms", 5, low=1) if config.flag("use_cayley_neumann") else 0
    if terms > _MOST_TERMS:
        raise _refused(stored, f"a Cayley-Neumann series of {terms} terms", "")
    if terms and config.before(0, 18):
        raise _refused(stored, "the Cayley-Neumann series of a PEFT before 0.18 was another one", "train it again")
    update = Rotation(
        Factor.of(stored),
        block,
        terms,
        config.number("eps", 6e-5) if config.flag("coft") else None,
        shared,
        embedding,
        inputs=0 if shared else blocks * block,
    )
    site = Site(f"{module.path}.weight", module_kind="embedding" if embedding else "")
    return ModuleUpdates({site: (update,)})


def _refused(tensor: StoredTensor, why: str, hint: str) -> SurgeryError:
    return FitError(why, file=tensor.file.path, tensor=tensor.name, hint=hint or None)


def _write(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> None:
    """All modules have one transform and one size of blocks, the first one's."""
    first: Rotation | None = None
    for site, update in updates:
        if not isinstance(update, Rotation):
            file.hold_other(site, update)
            continue
        first = first or update
        if file.own is None and _common(update) != _common(first):
            file.drop(site, update, "all modules of a file have one transform and blocks of one size")
            continue
        module = site.path.removesuffix(".weight")
        key = f"{file.prefix}{module}.{'oft_embedding_R' if update.embedding else 'oft_R'}.weight"
        file.put(key, update.angles)
        file.ledger.keep(site, update, "exact", key)
    terms = first.terms if first else 0
    file.defaults = {"fan_in_fan_out": False, "init_weights": True, "module_dropout": 0.0}
    file.fields = {
        "block_share": first is not None and first.shared,
        "coft": first is not None and first.radius is not None,
        "num_cayley_neumann_terms": terms or 5,
        "oft_block_size": first.block if first else 32,
        "peft_version": _FIRST_VERSION,
        "r": 0,
        "target_modules": targets(file),
        "use_cayley_neumann": bool(terms),
    }
    if first is not None and first.radius is not None:
        file.fields["eps"] = first.radius


def _common(update: Rotation) -> tuple[object, ...]:
    return update.block, update.terms, update.radius, update.shared


def _issues(config: Mapping[str, Any], tensors: Sequence[StoredTensor]) -> Iterable[str]:
    if config.get("use_cayley_neumann") is True:
        yield "OFT by a Cayley-Neumann series: its blocks are only nearly orthogonal, as in training"


OFT = PeftKind(
    name="OFT",
    factors=frozenset(["oft_R.weight", "oft_embedding_R.weight", "oft_r"]),
    read=_read,
    writes=frozenset([Rotation.kind]),
    write=_write,
    switches=Switches(
        COMMON | {"r", "oft_block_size", "module_dropout"},  # the sizes are the tensors'
        frozenset(
            ["bias", "modules_to_save", "coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms"]
        ),
        least_rank=0,  # 0 where the size of a block is given instead
    ),
    issues=_issues,
)
