# SPDX-License-Identifier: Apache-2.0
"""PEFT's kinds beside LoRA: (IA)^3, LoHa, LoKr, OFT, VeRA and LN tuning (tensors: PEFT 0.21, ``tuners/<kind>/layer.py``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from surgery_formats.adapters.peft.config import PeftConfig
from surgery_formats.canonical.adapter import Site
from surgery_formats.errors import FitError, MalformedError, SurgeryError
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import listing
from surgery_formats.updates import IA3, OFT, Factor, LoHa, LoKr, Replacement, Seed, Update, VeRA

if TYPE_CHECKING:
    import torch

__all__ = ["KINDS", "Kind", "Module", "ModuleUpdates"]


@dataclass(frozen=True, slots=True)
class Module:
    """One module's tensors.

    Attributes:
        path: Of the module, without PEFT's wrappers.
        parts: Stored tensors by their name after the module.
        shared: Tensors of the whole adapter.
        config: Its configuration.
    """

    path: str
    parts: Mapping[str, StoredTensor]
    shared: Mapping[str, StoredTensor]
    config: PeftConfig

    def site(self, kernel: tuple[int, ...] = ()) -> Site:
        """Its weight; a convolution where the file has a kernel."""
        return Site(f"{self.path}.weight", module_kind="convolution" if kernel else "", kernel=kernel)

    def part(self, name: str) -> StoredTensor:
        """The tensor `name`.

        Raises:
            MalformedError: it is missing, or has no elements.
        """
        if name not in self.parts:
            first = next(iter(self.parts.values()))
            raise MalformedError(f"'{name}' is missing beside it", file=first.file.path, tensor=first.name)
        return self.parts[name]

    def matrix(self, name: str) -> StoredTensor:
        """The tensor `name`, which must be a matrix."""
        found = self.part(name)
        if len(found.shape) != 2 or not found.numel:
            raise _odd(found, "not a matrix")
        return found

    def vector(self, name: str) -> StoredTensor:
        """The tensor `name`, which must be a vector."""
        found = self.part(name)
        if len(found.shape) != 1 or not found.numel:
            raise _odd(found, "not a vector")
        return found


@dataclass(frozen=True, slots=True)
class ModuleUpdates:
    """What a module's tensors mean.

    Attributes:
        updates: By site.
        optional: Sites that the base need not have.
    """

    updates: Mapping[Site, Update]
    optional: frozenset[Site] = frozenset()


@dataclass(frozen=True, slots=True)
class Kind:
    """How one ``peft_type`` stores its modules.

    Attributes:
        factors: Names after the module's path; with ``.weight`` where the file has it.
        read: From a module's tensors to updates.
        shared: Names of tensors that belong to the whole adapter.
    """

    factors: frozenset[str]
    read: Callable[[Module], ModuleUpdates]
    shared: frozenset[str] = frozenset()


def _ia3(module: Module) -> ModuleUpdates:
    """A row or a column vector; for convolutions both are (1, n, 1, 1), and the configuration tells."""
    stored = module.part("ia3_l")
    size, sizes = stored.numel, stored.shape
    inputs = module.config.selects("feedforward_modules", module.path)
    if len(sizes) == 2 and inputs is None:
        inputs = sizes[0] == 1 and size > 1
    if inputs is None:
        raise MalformedError("no 'feedforward_modules': inputs or outputs cannot be told", file=module.config.file)
    expected = (1, size) if inputs else (size, 1)
    if sizes != (expected if len(sizes) == 2 else (1, size, *(1,) * (len(sizes) - 2))) or not size:
        raise _odd(stored, f"a vector on the {'inputs' if inputs else 'outputs'}, going by 'feedforward_modules'")
    update = IA3(Factor((stored,), (size,)), per_row=not inputs)
    kernel = (0,) * (len(sizes) - 2)
    site = Site(f"{module.path}.weight", module_kind="convolution" if kernel else "linear", kernel=kernel)
    if inputs:
        return ModuleUpdates({site: update})
    bias = replace(site, path=f"{module.path}.bias")
    return ModuleUpdates({site: update, bias: update}, frozenset([bias]))


def _ln_tuning(module: Module) -> ModuleUpdates:
    return ModuleUpdates(
        {
            Site(f"{module.path}.{name.rpartition('.')[2]}", module_kind="norm"): Replacement(Factor.of(tensor), "copy")
            for name, tensor in module.parts.items()
        }
    )


def _loha(module: Module) -> ModuleUpdates:
    pairs = [_low_rank(module, f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in (1, 2)]
    (A1, B1), (A2, B2) = pairs
    if A1.shape != A2.shape or B1.shape != B2.shape:
        raise _odd(
            module.part("hada_w2_a"), f"the first pair makes {[A1.shape[0], B1.shape[1]]}, of rank {A1.shape[1]}"
        )
    alpha = module.config.alpha_of(module.path)
    site = module.site(module.parts["hada_t1"].shape[2:] if "hada_t1" in module.parts else ())
    return ModuleUpdates({site: LoHa(A1, B1, A2, B2, alpha / A1.shape[1], alpha)})


def _lokr(module: Module) -> ModuleUpdates:
    """Each of the two is stored whole or as low-rank factors; where both are whole, only the configuration tells the rank."""
    ranks = set()
    if "lokr_w1" in module.parts:
        first = module.matrix("lokr_w1")
        C = Factor.of(first)
    else:
        a, b = _low_rank(module, "lokr_w1_a", "lokr_w1_b", "")
        C = _product(a, b)
        ranks.add(a.shape[1])
    crossed, kernel = False, 1
    if "lokr_w2" in module.parts:
        second = module.part("lokr_w2")
        if len(second.shape) < 2 or not second.numel:
            raise _odd(second, "not a matrix or a kernel")
        crossed = len(second.shape) == 3
        kernel = second.shape[2] if crossed else 1
        D = Factor((second,), (second.shape[0], second.numel // second.shape[0]))
    else:
        a, b = _low_rank(module, "lokr_w2_a", "lokr_w2_b", "lokr_t2")
        D = _product(a, b)
        ranks.add(a.shape[1])
    used = {*(t.name for t in C.tensors), *(t.name for t in D.tensors)}
    if extra := [tensor for tensor in module.parts.values() if tensor.name not in used]:
        raise MalformedError("is there twice: whole and as factors", file=extra[0].file.path, tensor=extra[0].name)
    if len(ranks) > 1:
        stored = next(iter(module.parts.values()))
        raise FitError(
            f"factors of the ranks {listing(map(str, sorted(ranks)))}", file=stored.file.path, tensor=stored.name
        )
    rank = ranks.pop() if ranks else module.config.rank_of(module.path)
    alpha = module.config.alpha_of(module.path)
    whole = module.parts.get("lokr_w2", module.parts.get("lokr_t2"))
    site = module.site(() if whole is None else whole.shape[2:])
    return ModuleUpdates({site: LoKr(C, D, alpha / rank, alpha, rank, kernel, crossed)})


def _low_rank(module: Module, a: str, b: str, core: str) -> tuple[Factor, Factor]:
    """``(out, rank)`` and ``(rank, in)``. With a core (CP form of a kernel) they are stored ``(rank, out)`` and ``(rank, in)``."""
    left, right = module.matrix(a), module.matrix(b)
    if core not in module.parts:
        if left.shape[1] != right.shape[0]:
            raise _odd(right, f"'{a}' is {list(left.shape)}")
        return Factor.of(left), Factor.of(right)
    middle = module.part(core)
    rank = left.shape[0]
    if len(middle.shape) != 4 or middle.shape[:2] != (rank, right.shape[0]) or not middle.numel:
        raise _odd(middle, f"a core between {list(left.shape)} and {list(right.shape)}")
    width = right.shape[1] * math.prod(middle.shape[2:])

    def joined(t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (t.permute(0, 2, 3, 1) @ w).permute(0, 3, 1, 2)  # sum over j of t[i, j, k, l] w[j, in]

    A = Factor((left,), (left.shape[1], rank), lambda t: t.T)
    return A, Factor.computed((Factor.of(middle), Factor.of(right)), (rank, width), joined)


def _product(a: Factor, b: Factor) -> Factor:
    """``a b`` as one factor; it is small."""
    return Factor.computed((a, b), (a.shape[0], b.shape[1]), lambda left, right: left @ right)


def _oft(module: Module) -> ModuleUpdates:
    config = module.config
    embedding = "oft_embedding_R.weight" in module.parts
    if "oft_r" in module.parts:
        stored = module.part("oft_r")
        raise _refused(
            stored, "OFT as PEFT stored it before 0.16", "load and save it with PEFT 0.15, or train it again"
        )
    stored = module.part("oft_embedding_R.weight" if embedding else "oft_R.weight")
    if len(stored.shape) != 2 or not stored.shape[0]:
        raise _odd(stored, "not a matrix")
    blocks, angles = (
        stored.shape
    )  # no angles: blocks of one, which PEFT falls back to where nothing else divides the width
    block = (1 + math.isqrt(1 + 8 * angles)) // 2
    if block * (block - 1) // 2 != angles:
        raise _odd(stored, f"{angles} numbers are no strictly upper triangle")
    shared = config.flag("block_share")
    if shared and blocks != 1:
        raise _odd(stored, f"'block_share' is set, and there are {blocks} blocks")
    if "use_cayley_neumann" not in config.raw:
        raise _refused(
            stored, "no 'use_cayley_neumann' in the configuration: which transform it means cannot be told", ""
        )
    terms = config.integer("num_cayley_neumann_terms", 5, low=1) if config.flag("use_cayley_neumann") else 0
    if terms > _MOST_TERMS:
        raise _refused(stored, f"a Cayley-Neumann series of {terms} terms", "")
    if terms and config.before(0, 18):
        raise _refused(stored, "the Cayley-Neumann series of a PEFT before 0.18 was another one", "train it again")
    update = OFT(
        Factor.of(stored),
        block,
        terms,
        config.number("eps", 6e-5) if config.flag("coft") else None,
        shared,
        embedding,
        inputs=0 if shared else blocks * block,
    )
    return ModuleUpdates({replace(module.site(), module_kind="embedding" if embedding else ""): update})


_MOST_TERMS = 100  # PEFT has 5; each is a product of matrices


def _vera(module: Module) -> ModuleUpdates:
    b, d = module.vector("vera_lambda_b"), module.vector("vera_lambda_d")
    config = module.config
    A, B = (module.shared.get(name) for name in ("vera_A", "vera_B"))
    projections: tuple[Factor, Factor] | Seed
    if A is not None and B is not None:
        for stored in (A, B):
            if len(stored.shape) != 2 or not stored.numel:
                raise _odd(stored, "not a matrix")
        if A.shape[0] != d.numel or B.shape[1] != d.numel:
            raise _odd(d, f"the shared projections have the ranks {A.shape[0]} and {B.shape[1]}")
        if B.shape[0] < b.numel:
            raise _odd(b, f"the shared 'vera_B' has only {B.shape[0]} rows")
        projections = Factor((A,), A.shape, lambda t: t), Factor((B,), B.shape, lambda t: t)
    elif A is not None or B is not None or config.flag("save_projection", default=True):
        raise MalformedError(
            "'base_model.vera_A' or 'base_model.vera_B' is missing", file=b.file.path, hint="was the file cut down?"
        )
    else:
        if d.numel != config.integer("r", 256, low=1):
            raise _odd(d, "its size is not 'r', with which the projections were drawn")
        projections = Seed(config.integer("projection_prng_key", 0, low=-(1 << 31)))
    return ModuleUpdates({module.site(): VeRA(Factor.of(b), Factor.of(d), projections)})


def _odd(tensor: StoredTensor, why: str) -> MalformedError:
    return MalformedError(f"shape {list(tensor.shape)}: {why}", file=tensor.file.path, tensor=tensor.name)


def _refused(tensor: StoredTensor, why: str, hint: str) -> SurgeryError:
    return FitError(why, file=tensor.file.path, tensor=tensor.name, hint=hint or None)


KINDS: Mapping[str, Kind] = {
    "IA3": Kind(frozenset(["ia3_l"]), _ia3),
    "LN_TUNING": Kind(frozenset(["ln_tuning_layers.weight", "ln_tuning_layers.bias"]), _ln_tuning),
    "LOHA": Kind(
        frozenset(["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"]),
        _loha,
    ),
    "LOKR": Kind(
        frozenset(["lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"]),
        _lokr,
    ),
    "OFT": Kind(frozenset(["oft_R.weight", "oft_embedding_R.weight", "oft_r"]), _oft),
    "VERA": Kind(frozenset(["vera_lambda_b", "vera_lambda_d"]), _vera, shared=frozenset(["vera_A", "vera_B"])),
}
