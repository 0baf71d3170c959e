# SPDX-License-Identifier: Apache-2.0
"""A PEFT folder under construction: tensors, configuration fields, and the outcome of every update."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from surgery_formats.adapters.format import NewTensor, Scaling
from surgery_formats.adapters.peft.keys import INSIDE_ATTENTION, PREFIX
from surgery_formats.adapters.peft.read_config import PeftConfig
from surgery_formats.adapters.writing import ConversionLedger, factor_tensor, places_of, whole_place
from surgery_formats.arrays import Array
from surgery_formats.binding.sizes import component_of
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.updates import Factor, Replacing, Update, is_replacing

if TYPE_CHECKING:
    from surgery_formats.adapters.expert_layers import ExpertStack

__all__ = ["PeftFile"]


@dataclass
class PeftFile:
    """What has been written so far.

    Attributes:
        kind: The ``peft_type`` that is written.
        adapter: The adapter that is written.
        base: The model it was trained for, if known.
        own: The configuration it came with, if it is a PEFT adapter's of the kind that is written.
        scaling: How to state scales; None keeps the adapter's own way.
        prefix: Prefix of all keys.
        has_biases: Whether the kind's configuration has a field ``bias``.
        ledger: What became of every update.
        tensors: By key.
        settings: Rank and alpha by the path PEFT looks them up with: a module's, or a targeted parameter's.
        targets: Paths of modules with factors.
        experts: Paths of parameters that have a LoRA of their own.
        rows: Token ids by the path of their module.
        saved: Paths of modules stored whole.
        whole_biases: Whether biases are stored whole (``bias="all"``).
        defaults: Default fields of the kind's configuration.
        fields: Fields that follow from what was written.
        dialect: Name of the way in which experts are held; empty for the one that is nearest to the adapter's own.
        spelt: The dialect's name of a module that holds no experts.
        even: The rank and the scale of all modules, for readers that know one.
        rewritten: Whether the adapter's own configuration is not true of what was written, whatever ranks and scales say.
    """

    kind: str
    adapter: Adapter
    base: Checkpoint | None
    own: PeftConfig | None
    scaling: Scaling | None = None
    prefix: str = PREFIX
    has_biases: bool = False
    ledger: ConversionLedger = field(default_factory=ConversionLedger)
    tensors: dict[str, NewTensor] = field(default_factory=dict)
    settings: dict[str, tuple[int, float]] = field(default_factory=dict)
    targets: set[str] = field(default_factory=set)
    experts: list[str] = field(default_factory=list)
    rows: dict[str, tuple[int, ...]] = field(default_factory=dict)
    saved: set[str] = field(default_factory=set)
    whole_biases: bool = False
    defaults: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    dialect: str = ""
    spelt: Callable[[str], str] = str
    even: tuple[int, float] | None = None
    rewritten: bool = False

    def rank_and_scale(self, stack: ExpertStack) -> tuple[int, float]:
        """Of all experts of a stack, as they are written."""
        return self.even or (stack.rank, stack.scale)

    def put(
        self,
        key: str,
        factor: Factor,
        shape: tuple[int, ...] | None = None,
        change: Callable[[Array], Array] | None = None,
        *,
        times: float = 1.0,
    ) -> None:
        """Store a factor, see `factor_tensor`; in its own shape unless another is given."""
        self.add(factor_tensor(key, factor, factor.shape if shape is None else shape, change, times=times))

    def add(self, tensor: NewTensor) -> None:
        """Store a tensor.

        Raises:
            FitError: its key is taken.
        """
        if tensor.name in self.tensors:
            raise FitError("two updates have the same key in this format", tensor=tensor.name)
        self.tensors[tensor.name] = tensor

    def module_of(self, site: Site, update: Update) -> tuple[str, tuple[int, ...]]:
        """``(module path, shape of its weight)``: the adapter's path, or the base's where names are flattened.

        The path has the wrapper that PEFT puts around an attention module.
        """
        out, inputs = update.shape
        path, kernel = site.path.removesuffix(".weight"), site.kernel
        shape = (out, inputs // math.prod(kernel), *kernel) if all(kernel) else (out, inputs)
        if self.base is not None and (place := whole_place(places_of(site, self.base, update.tensors))):
            shape = place[1] if len(place[1]) > 2 else (out, inputs)
            path = place[0].removesuffix(".weight") if site.flat else path
        if site.module_kind == "attention output":
            path = f"{path.removesuffix('.out_proj')}{INSIDE_ATTENTION}"
        return path, shape

    def alpha_of(self, rank: int, scale: float) -> float:
        """The alpha that gives `scale` at `rank`."""
        if self.scaling is None:
            return scale * rank
        stated = self.scaling.alpha_of(rank)
        if math.isclose(self.scaling.scale(rank), scale, rel_tol=1e-12):
            return stated
        return scale * (math.sqrt(rank) if self.scaling.rslora else rank)

    def drop(self, site: Site, update: Update, why: str) -> None:
        """Note that `update` is not in the file."""
        self.targets.discard(site.path.rpartition(".")[0])
        self.ledger.drop(site, update, why)

    def hold_other(self, site: Site, update: Update, why: str = "", *, by_key: bool = True) -> None:
        """Store a parameter that was trained in full, which every kind may have; drop any other update.

        Args:
            site: The parameter's site.
            update: The update of the parameter.
            why: Why it is dropped, if the kind has a more specific reason than that it holds no such update.
            by_key: Whether the ledger names the key, or else how the parameter is stored.
        """
        if self.base is not None and site in self.adapter.optional and self._is_absent(site, self.base):
            self.ledger.keep(site, update, "exact", "the base has no such bias")
            return
        if not is_replacing(update) or why:
            self.drop(site, update, why or f"files of the kind {self.kind} have no {update.kind}")
            return
        key, how = self._replaced(site, update)
        if not key:
            self.drop(site, update, how)
            return
        self.add(NewTensor(key, update.stored.dtype, update.stored.shape, update.stored.read))
        self.ledger.keep(site, update, "exact", key if by_key else how)

    @staticmethod
    def _is_absent(site: Site, base: Checkpoint) -> bool:
        return not component_of(site, base).names.resolve(site.path, flat=site.flat)

    def _replaced(self, site: Site, update: Replacing) -> tuple[str, str]:
        """``(key, how it is stored)`` of a whole parameter; an empty key and the reason if the format cannot hold it.

        The parameter is stored with its saved module, as a bias where all biases are stored, or (a vocabulary) under
        its own name.
        """
        module, _, leaf = site.path.rpartition(".")
        wrapper = "token_adapter." if module in self.rows and self.own and self.own.kind != "TRAINABLE_TOKENS" else ""
        plain, inside = f"{self.prefix}{site.path}", f"{self.prefix}{module}.{wrapper}base_layer.{leaf}"
        targeted = module in self.settings or module in self.targets or f"{module}.weight" in self.experts
        beside = self.adapter.updates.get(replace(site, path=f"{module}.weight"), ())
        if self.own is not None:
            wrapped = targeted or module in self.rows
            return (inside if wrapped and update.held != "copy" else plain), "modules_to_save"
        if leaf == "bias" and update.held != "copy" and not any(is_replacing(other) for other in beside):
            if not self.has_biases:
                return "", "this kind stores no biases"
            self.whole_biases = True
            return (inside if targeted else plain), "bias"
        if leaf == "weight" and targeted:  # a vocabulary that was resized, beside its LoRA
            return inside, "base_layer"
        if update.held != "resized":
            whole = (path for path in self.adapter.copied_modules if site.path.startswith(f"{path}."))
            self.saved.add(min(whole, default=module))
        return plain, "modules_to_save"

    def kept(self) -> bool:
        """Whether the adapter's own configuration is still true of the written tensors."""
        if self.own is None or self.scaling is not None or self.rewritten:
            return False
        for module, (rank, alpha) in self.settings.items():
            meant_scale, scale = alpha / rank, self.own.scale_of(module, rank)
            if self.own.rank_of(module) != rank or abs(scale - meant_scale) > 1e-12 * abs(meant_scale):
                return False
        return True
