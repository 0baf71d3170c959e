# SPDX-License-Identifier: Apache-2.0
"""PEFT's LoRA on parameters (``target_parameters``): the experts of a mixture, stacked in one pair of factors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from surgery_formats.adapters.format import NewTensor
from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.packing import by_expert
from surgery_formats.adapters.peft.read_config import PeftConfig
from surgery_formats.adapters.writing import factor_dtype
from surgery_formats.arrays import Array
from surgery_formats.binding.sizes import component_of
from surgery_formats.canonical.adapter import Site
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.models.eras import taken_for_experts
from surgery_formats.models.parameter_order import innermost_first
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import listing
from surgery_formats.updates import Factor, LoRA, Stacked, Update

__all__ = [
    "StackedParameter",
    "for_peft",
    "is_parameter_here",
    "parameter_lora",
    "put_parameters",
    "targeted_parameters",
    "todays_order",
    "wrappers_of",
]


def is_parameter_here(file: PeftFile, site: Site) -> bool:
    """Whether the LoRA of a module is to be one of its parameter, ``weight``.

    It is if the adapter's own configuration says so, or if PEFT takes the module, in the base's model, for an expert of
    an older release, and would attach nothing to it.
    """
    if not site.path.endswith(".weight") or site.module_kind not in ("", "linear"):
        return False
    if file.own is not None:
        return any("." in name and f".{site.path}".endswith(f".{name}") for name in file.own.target_parameters)
    if file.base is None or not for_peft(file.dialect):
        return False
    return site.path.split(".")[-2] in taken_for_experts(component_of(site, file.base).config)


def for_peft(dialect: str) -> bool:
    """Whether a folder in the dialect of this name, or in none, is one for today's PEFT."""
    return dialect in ("", "peft")


def targeted_parameters(
    module: str, clean: str, config: PeftConfig, wrappers: Mapping[str, int], a: StoredTensor
) -> list[str]:
    """Parameters of the module `clean` that have a LoRA of their own; empty if the LoRA is the module's.

    A target may name its module (``experts.down_proj``) or not (``down_proj``), and then fits any module by name.
    `wrappers` is `wrappers_of` all modules.
    """
    here = f".{clean}."
    named = [name for name in config.target_parameters if "." in name and here.endswith(f".{name.rpartition('.')[0]}.")]
    bare = [name for name in config.target_parameters if "." not in name]
    if len(named) == wrappers[clean]:
        return named
    listed = config.raw.get("target_modules")
    is_module = isinstance(listed, list) and config.lists("target_modules", clean)
    stacks = module != clean or a.shape[0] != config.rank_of(clean)
    return [*named, *bare] if named or (stacks and not is_module) else []


def wrappers_of(modules: Iterable[str]) -> Mapping[str, int]:
    """How many LoRAs each module has, one wrapped in another as ``base_layer``."""
    return Counter(".".join(part for part in module.split(".") if part != "base_layer") for module in modules)


def parameter_lora(
    module: str,
    clean: str,
    parts: Mapping[str, StoredTensor],
    config: PeftConfig,
    wrappers: Mapping[str, int],
    parameters: list[str],
) -> tuple[Site, Update]:
    """A LoRA on a parameter, not a module: one pair of factors per expert, stacked (PEFT's ``ParamWrapper``)."""
    a, b = parts["lora_A.weight"], parts["lora_B.weight"]
    name = _which_parameter(module, clean, wrappers[clean], parameters, a)
    key = f"{clean}.{name}"
    rank = config.rank_of(key)
    count = a.shape[0] // rank
    if len(a.shape) != 2 or len(b.shape) != 2 or count * rank != a.shape[0] or b.shape[1] != a.shape[0]:
        raise FitError(
            f"A {list(a.shape)} and B {list(b.shape)} do not stack experts of rank {rank}",
            file=a.file.path,
            tensor=a.name,
        )
    scale, alpha = config.scale_of(key, rank), config.alpha_of(key)
    site = Site(key, module_kind="linear" if name == "weight" and count == 1 else "experts")
    if count == 1 and (name == "weight" or not config.experts_old_order):
        return site, LoRA(Factor.of(a), Factor.of(b), scale, alpha)

    grouped = by_expert(config, count, rank, b)

    def columns(stack: Array, e: int) -> Array:
        return stack.reshape(-1, count, rank)[:, e] if grouped else stack.reshape(-1, rank, count)[:, :, e]

    def forward(e: int) -> LoRA:  # PEFT >= 0.19: delta[e] = B[:, :, e] @ A[e], (rows, cols)
        return LoRA(
            Factor((a,), (rank, a.shape[1]), lambda t: t.reshape(count, rank, -1)[e]),
            Factor((b,), (b.shape[0], rank), lambda t: columns(t, e)),
            scale,
            alpha,
        )

    def backward(e: int) -> LoRA:  # before, and where experts are held (E, in, out): the transpose
        return LoRA(
            Factor((b,), (rank, b.shape[0]), lambda t: columns(t, e).T),
            Factor((a,), (a.shape[1], rank), lambda t: t.reshape(count, rank, -1)[e].T),
            scale,
            alpha,
        )

    turned = tuple(backward(e) for e in range(count))
    if config.experts_old_order:
        return site, Stacked(turned)
    return site, Stacked(tuple(forward(e) for e in range(count)), turned)


def _which_parameter(module: str, clean: str, present: int, parameters: list[str], a: StoredTensor) -> str:
    """Several targeted parameters of one module nest: the first registered is the innermost ``base_layer``."""
    names = [name.rpartition(".")[2] for name in parameters]
    depth = (len(module) - len(clean)) // len(".base_layer")
    if present != len(names) or depth >= present:
        raise MalformedError(
            f"{present} stacked LoRAs for the parameters {listing(names)} of '{clean}'", file=a.file.path, tensor=a.name
        )
    return innermost_first(names, a.file.path)[present - 1 - depth]


@dataclass(frozen=True, slots=True)
class StackedParameter:
    """A parameter to be written with a LoRA of its own.

    Attributes:
        site: The parameter.
        update: As the adapter has it.
        experts: The same as a stack, of one expert where it is not one.
    """

    site: Site
    update: Update
    experts: Stacked

    @property
    def module(self) -> str:
        """Path of the module that holds the parameter."""
        return self.site.path.rpartition(".")[0]

    @property
    def name(self) -> str:
        """The parameter's, within its module."""
        return self.site.path.rpartition(".")[2]


def todays_order(file: PeftFile, site: Site, update: Stacked) -> Stacked:
    """The stack with its axes as PEFT has read them since 0.19: by how the base holds its experts.

    Raises:
        FitError: the stack does not leave that open (its file is older, or of another format), and the base is not known.
    """
    if update.if_transposed:
        return update
    family = None if file.base is None else component_of(site, file.base).family
    if family is None or not family.known:
        raise FitError(
            "PEFT changed the order of the axes of stacked experts in 0.19: only the base tells today's from the old one",
            file=update.tensors[0].path,
            tensor=update.tensors[0].name,
            hint="give it with `base=`",
        )
    return Stacked(tuple(expert.transpose() for expert in update.experts)) if family.experts_transposed else update


def put_parameters(file: PeftFile, stacks: Sequence[StackedParameter]) -> None:
    """LoRAs on parameters (``target_parameters``): several on one module nest, the first registered innermost."""
    by_module: dict[str, list[StackedParameter]] = {}
    for stack in stacks:
        by_module.setdefault(stack.module, []).append(stack)
    for module, stacked in by_module.items():
        order = innermost_first([stack.name for stack in stacked], stacked[0].update.tensors[0].path)
        outermost_first = sorted(stacked, key=lambda stack: order.index(stack.name), reverse=True)
        for depth, stack in enumerate(outermost_first):
            key = f"{file.prefix}{module}{'.base_layer' * depth}"
            _put_stack(file, key, stack.experts.experts)
            first = stack.experts.experts[0]
            file.settings[stack.site.path] = (first.rank, file.alpha_of(first.rank, first.scale))
            file.experts.append(stack.site.path)
            file.ledger.keep(stack.site, stack.update, "exact", key)


def _put_stack(file: PeftFile, key: str, experts: Sequence[LoRA]) -> None:
    """``A`` (E * rank, cols), ``B`` (rows, rank * E), expert e being ``B.reshape(rows, rank, E)[:, :, e]``."""
    count, rank = len(experts), experts[0].rank
    out, inputs = experts[0].shape

    def load_a() -> Array:
        import numpy

        return numpy.concat([lora.A.load(DType.F64) for lora in experts])

    def load_b() -> Array:
        import numpy

        return numpy.stack([lora.B.load(DType.F64) for lora in experts], axis=-1).reshape(out, rank * count)

    types = [factor_dtype(factors, folded=False) for factors in zip(*((e.A, e.B) for e in experts), strict=True)]
    file.add(NewTensor(f"{key}.lora_A.weight", types[0], (count * rank, inputs), load_a))
    file.add(NewTensor(f"{key}.lora_B.weight", types[1], (out, rank * count), load_b))
