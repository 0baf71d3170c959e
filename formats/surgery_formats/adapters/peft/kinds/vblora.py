# SPDX-License-Identifier: Apache-2.0
"""VBLORA: factors mixed from one bank of vectors (PEFT 0.21, ``tuners/vblora``)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.keys import ROOT
from surgery_formats.adapters.peft.kinds.each import put_each
from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates, PeftKind, malformed
from surgery_formats.adapters.peft.read_config import COMMON, Switches
from surgery_formats.adapters.peft.write_config import targets
from surgery_formats.adapters.writing import copied
from surgery_formats.arrays import Array
from surgery_formats.canonical.adapter import Site
from surgery_formats.errors import MalformedError
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.updates import Factor, Update, VBLoRA

__all__ = ["VBLORA"]

_BANK = "vblora_vector_bank"
_LOGITS = ("vblora_logits_A", "vblora_logits_B")


def _read(module: Module) -> ModuleUpdates:
    """All logits; or, of the greatest alone (``save_only_topk_weights``), their indices and weights but the last."""
    bank = module.shared.get(_BANK)
    if bank is None or len(bank.shape) != 2 or not bank.numel:
        raise MalformedError(
            f"'base_model.{_BANK}' is missing, or no matrix", file=next(iter(module.parts.values())).file.path
        )
    chosen, few = module.config.integer("topk", 2, low=1), f"{_LOGITS[0]}_topk_indices" in module.parts
    A, B = (module.part(f"{name}_topk_weights" if few else name) for name in _LOGITS)
    picks: tuple[StoredTensor, StoredTensor] | tuple[()] = ()
    if few:
        picks = module.part(f"{_LOGITS[0]}_topk_indices"), module.part(f"{_LOGITS[1]}_topk_indices")
    last = chosen - 1 if few else bank.shape[0]
    for stored in (A, B):
        if len(stored.shape) != 3 or stored.shape[2] != last or not stored.shape[0] or not stored.shape[1]:
            raise malformed(stored, f"not {last} numbers for each vector of a factor")
    if A.shape[0] != B.shape[1] or chosen > bank.shape[0]:
        raise malformed(B, f"'{A.name}' is {list(A.shape)}, the bank {list(bank.shape)}")
    for weights, index in zip((A, B), picks, strict=False):
        _check_index(index, (*weights.shape[:2], chosen), bank.shape[0])
    factor = Factor((bank,), bank.shape, _as_stored)
    update = VBLoRA(Factor.of(A), Factor.of(B), factor, chosen, picks)
    return ModuleUpdates({module.site(): (update,)})


def _check_index(index: StoredTensor, shape: tuple[int, ...], vectors: int) -> None:
    if index.shape != shape or index.dtype.is_float:
        raise malformed(index, f"not whole numbers, {list(shape)}")
    numbers = index.read()
    if numbers.min() < 0 or numbers.max() >= vectors:
        raise malformed(index, f"an index outside of a bank of {vectors} vectors")


def _as_stored(stored: Array) -> Array:
    """The bank as it is. All modules share its view, so it is read once and recognised as one tensor."""
    return stored


def _write(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> None:
    """PEFT knows no scale here: an update that has one is dropped."""

    def put(key: str, update: VBLoRA) -> None:
        for name, factor in zip(_LOGITS, (update.A, update.B), strict=True):
            file.put(f"{key}.{name}{'_topk_weights' if update.picks else ''}", factor)
        for name, index in zip(_LOGITS, update.picks, strict=False):
            file.add(copied(f"{key}.{name}_topk_indices", index))

    first: VBLoRA | None = None
    same = [(site, update) for site, update in updates if not isinstance(update, VBLoRA) or update.scale == 1.0]
    for site, update in updates:
        if isinstance(update, VBLoRA) and update.scale != 1.0:
            file.drop(site, update, "this kind has no scale, and the vectors are shared")
    first = put_each(file, same, VBLoRA, put, _common, "all modules of a file share their vectors, and have one rank")
    if first is not None:
        file.put(f"{ROOT}{_BANK}", first.bank)
    file.defaults = {"fan_in_fan_out": False, "vblora_dropout": 0.0}
    file.fields = {
        "num_vectors": first.bank.shape[0] if first is not None else 256,
        "r": first.rank if first is not None else 4,
        "save_only_topk_weights": first is not None and bool(first.picks),
        "target_modules": targets(file),
        "topk": first.chosen if first is not None else 2,
        "vector_length": first.bank.shape[1] if first is not None else 256,
    }


def _common(update: VBLoRA) -> Hashable:
    return update.rank, update.bank.tensors, update.chosen, bool(update.picks)


VBLORA = PeftKind(
    name="VBLORA",
    factors=frozenset([f"{name}{part}" for name in _LOGITS for part in ("", "_topk_indices", "_topk_weights")]),
    read=_read,
    writes=frozenset([VBLoRA.kind]),
    write=_write,
    ranks={_LOGITS[0]: 0, f"{_LOGITS[0]}_topk_weights": 0},
    switches=Switches(
        # the sizes are the tensors'
        COMMON | {"r", "num_vectors", "vector_length", "vblora_dropout", "init_vector_bank_bound", "init_logits_std"},
        frozenset(["topk", "save_only_topk_weights", "bias", "modules_to_save"]),
    ),
    shared=frozenset([_BANK]),
)
