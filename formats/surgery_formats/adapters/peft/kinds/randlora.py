# SPDX-License-Identifier: Apache-2.0
"""RANDLORA: trained diagonals around random bases of full rank (PEFT 0.21, ``tuners/randlora``).

PEFT stores the bases, which all modules share, once for the adapter and once more for each module.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.keys import ROOT
from surgery_formats.adapters.peft.kinds.each import put_each
from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates, PeftKind, malformed
from surgery_formats.adapters.peft.kinds.shared import shared_pair
from surgery_formats.adapters.peft.read_config import COMMON, PeftConfig, Switches
from surgery_formats.adapters.peft.write_config import targets
from surgery_formats.canonical.adapter import Ignored, Site
from surgery_formats.errors import FitError
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.updates import Factor, RandLoRA, RandomBases, Update

__all__ = ["RANDLORA"]

_SHARED = ("randlora_A", "randlora_B")
_ALPHA = 640.0  # PEFT's default


def _read(module: Module) -> ModuleUpdates:
    lam, gamma = module.matrix("randlora_lambda"), module.matrix("randlora_gamma")
    rank, count = lam.shape
    if gamma.shape[0] != count:
        raise malformed(gamma, f"'randlora_lambda' is {list(lam.shape)}")
    copies = {name: module.parts[name] for name in _SHARED if name in module.parts}
    bases: tuple[Factor, Factor] | RandomBases
    stored = shared_pair(module, _SHARED, (3, 3))
    if stored is None:
        if copies or rank != module.config.integer("r", 32, low=1):
            raise malformed(lam, "'save_projection' and 'r' do not say with which bases it was trained")
        key = module.config.integer("projection_prng_key", 0, low=-(1 << 31))
        bases = RandomBases(key, rank, _very_sparse(module.config, lam))
    else:
        A, B = bases = stored
        if A.shape[:2] != (rank, 1) or B.shape[2] != rank or B.shape[1] < count or A.shape[2] < gamma.shape[1]:
            raise malformed(lam, f"the shared bases are {list(A.shape)} and {list(B.shape)}")
        for name, copy in copies.items():
            _check_copy(copy, module.shared[name])
    scale = module.config.number("randlora_alpha", _ALPHA)
    update = RandLoRA(Factor.of(lam), Factor.of(gamma), bases, scale / rank, scale)
    ignored = tuple(Ignored(copy, "one more copy of a basis that all modules share") for copy in copies.values())
    return ModuleUpdates({module.site(): (update,)}, ignored=ignored)


def _check_copy(copy: StoredTensor, shared: StoredTensor) -> None:
    """Refuse a copy that is another one. Its first row tells: random bases differ in all."""
    same = (copy.shape, copy.dtype) == (shared.shape, shared.dtype)
    if not same or copy.read(0, 1).tobytes() != shared.read(0, 1).tobytes():
        raise malformed(copy, f"not the same as '{shared.name}'")


def _very_sparse(config: PeftConfig, stored: StoredTensor) -> bool:
    """How sparse the bases are that are to be drawn again.

    Raises:
        FitError: they are dense.
    """
    if config.flag("very_sparse"):
        return True
    if config.flag("sparse"):
        return False
    raise FitError(
        "its dense random bases are not in the file: PEFT draws them in half precision, where other machines and other "
        "versions of torch draw other numbers",
        file=stored.file.path,
        tensor=stored.name,
        hint="load it where it was trained, set save_projection in its configuration, and save it again",
    )


def _write(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> None:
    """All modules share the first one's bases; a scale of their own goes into their diagonals."""
    scale = next((update.scale for _, update in updates if isinstance(update, RandLoRA)), 1.0)
    if file.own is not None:
        scale = file.own.number("randlora_alpha", _ALPHA) / file.own.integer("r", 32, low=1)

    def put(key: str, update: RandLoRA) -> float:
        times = 1.0 if update.scale == scale else update.scale / scale
        file.put(f"{key}.randlora_lambda", update.lam, times=times)
        file.put(f"{key}.randlora_gamma", update.gamma)
        if not isinstance(update.bases, RandomBases):
            for name, factor in zip(_SHARED, update.bases, strict=True):
                file.put(f"{key}.{name}", factor)
        return times

    first = put_each(file, updates, RandLoRA, put, _bases, "all modules of a file share their bases")
    bases = first.bases if first is not None else RandomBases(0, 32)
    if not isinstance(bases, RandomBases):
        for name, factor in zip(_SHARED, bases, strict=True):
            file.put(f"{ROOT}{name}", factor)
    rank = first.lam.shape[0] if first is not None else 32
    file.defaults = {"fan_in_fan_out": False, "init_weights": True, "randlora_dropout": 0.0}
    file.fields = {
        "projection_prng_key": bases.key if isinstance(bases, RandomBases) else 0,
        "r": rank,
        "randlora_alpha": scale * rank,
        "save_projection": not isinstance(bases, RandomBases),
        "sparse": isinstance(bases, RandomBases) and not bases.very_sparse,
        "target_modules": targets(file),
        "very_sparse": isinstance(bases, RandomBases) and bases.very_sparse,
    }


def _bases(update: RandLoRA) -> Hashable:
    """What two modules must have in common to be in one file."""
    if isinstance(update.bases, RandomBases):
        return update.bases.key, update.bases.rank, update.bases.very_sparse
    return tuple((factor.tensors, factor.shape) for factor in update.bases)


def _issues(config: Mapping[str, Any], tensors: Sequence[StoredTensor]) -> Iterable[str]:
    if not any("randlora_A" in tensor.name for tensor in tensors):
        yield "its random bases are not in the file: they are drawn again from projection_prng_key, as PEFT does"


RANDLORA = PeftKind(
    name="RANDLORA",
    factors=frozenset(["randlora_lambda", "randlora_gamma", *_SHARED]),
    read=_read,
    writes=frozenset([RandLoRA.kind]),
    write=_write,
    ranks={"randlora_lambda": 0},
    switches=Switches(
        COMMON | {"randlora_dropout"},
        frozenset(
            [
                "r",
                "randlora_alpha",
                "bias",
                "modules_to_save",
                "projection_prng_key",
                "save_projection",
                "sparse",
                "very_sparse",
            ]
        ),
    ),
    shared=frozenset(_SHARED),
    issues=_issues,
)
