# SPDX-License-Identifier: Apache-2.0
"""Modules that adapters insert into a model's computation, as data: where they stand, and the recipe with them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeGuard, cast, get_args, get_type_hints

from surgery_formats.errors import FitError
from surgery_formats.models.families.recipe import (
    Activation,
    Bottleneck,
    BottleneckForm,
    Branch,
    Coupling,
    LanguageHead,
    Layer,
    Model,
    Projection,
)

__all__ = ["PlacedModule", "as_fields", "from_fields", "inserted_shapes", "named", "with_inserted"]

_LARGEST = 1 << 31


@dataclass(frozen=True, slots=True)
class PlacedModule:
    """One module and its place.

    Attributes:
        network: What it computes.
        behind: The body of the branch that it stands behind, or the embedding.
        layer: Number of the layer; 0 for the embedding.
        inverted: Whether a coupling is turned round in front of the head, too.
    """

    network: Bottleneck | Coupling
    behind: Literal["attention", "mlp", "embedding"]
    layer: int = 0
    inverted: bool = False


def named(module: PlacedModule, name: str) -> PlacedModule:
    """The same module, its tensors under another name."""
    return replace(module, network=replace(module.network, module=name))


def as_fields(module: PlacedModule) -> dict[str, Any]:
    """Plain values, from which `from_fields` makes the module again."""
    network = module.network
    own: dict[str, Any]
    if isinstance(network, Coupling):
        own = {"ranks": list(network.ranks), "activation": network.activation}
    else:
        own = {"rank": network.rank, "form": asdict(network.form)}
    place = {"behind": module.behind, "layer": module.layer, "inverted": module.inverted}
    return {"module": network.module, "width": network.width, **place, **own}


def from_fields(fields: Mapping[str, Any]) -> PlacedModule:
    """The module that plain values describe.

    Raises:
        ValueError: they describe none.
    """
    module, width, layer = fields.get("module"), fields.get("width"), fields.get("layer")
    behind, inverted = fields.get("behind"), fields.get("inverted")
    if not isinstance(module, str) or not _is_size(width) or not _is_size(layer) or not isinstance(inverted, bool):
        raise ValueError("not an inserted module")
    if behind == "embedding":
        ranks, activation = fields.get("ranks"), fields.get("activation")
        if not isinstance(ranks, list) or len(ranks) != len("FG") or not all(map(_is_size, ranks)):
            raise ValueError("no ranks of a coupling")
        _check_choice(activation, Activation)
        network = Coupling(module, width, (ranks[0], ranks[1]), cast(Activation, activation))
        return PlacedModule(network, "embedding", layer, inverted)
    if behind not in ("attention", "mlp") or not _is_size(rank := fields.get("rank")):
        raise ValueError("not a place, or no rank")
    form = BottleneckForm(**fields["form"]) if isinstance(fields.get("form"), Mapping) else None
    if form is None:
        raise ValueError("no form")
    for name, value in asdict(form).items():
        if name in ("activation", "residual"):
            _check_choice(value, get_type_hints(BottleneckForm)[name])
        elif not isinstance(value, bool):
            raise ValueError(f"'{name}' is no switch")
    return PlacedModule(Bottleneck(module, width, rank, form), behind, layer, inverted)


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < _LARGEST


def _check_choice(value: object, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError("not a choice")


def with_inserted(model: Model, modules: Iterable[PlacedModule]) -> Model:
    """The recipe with modules inserted, each behind those that stand there already.

    Raises:
        FitError: a module of another width, for a layer that the model lacks, or where the model's branches are not those of
            the adapter library.
    """
    layers, embedding, head = list(model.layers), model.embedding, model.head
    for module in modules:
        network = module.network
        if network.width != model.hidden:
            raise FitError(
                f"made for hidden states of {network.width}, but the model has {model.hidden}",
                tensor=network.module,
                hint="is this the base it was trained on?",
            )
        if isinstance(network, Coupling):
            embedding = replace(embedding, couplings=(*embedding.couplings, network))
            if module.inverted and isinstance(head, LanguageHead):
                head = replace(head, inverted=(*head.inverted, network))
        elif module.layer >= len(layers):
            raise FitError(f"for layer {module.layer}, but the model has {len(layers)}", tensor=network.module)
        elif sum(layer.attention.output == layers[module.layer].attention.output for layer in layers) > 1:
            raise FitError("no module can be inserted into layers that share their weights", tensor=network.module)
        else:
            layers[module.layer] = _inserted(layers[module.layer], module.behind, network)
    unused = {
        name: "an inserted module takes the place of this norm"
        for layer in layers
        for branch in (layer.attention_branch, layer.mlp_branch)
        if branch.inserted and branch.on_sum and not _reads_norm(branch)
        for name in (branch.on_sum.weight, branch.on_sum.bias)
    }
    return replace(model, layers=tuple(layers), embedding=embedding, head=head, unused={**model.unused, **unused})


def _reads_norm(branch: Branch) -> bool:
    """Whether a branch with inserted networks still has the norm of its sum; what is optional leaves it."""
    forms = [network.form for network in branch.inserted]
    return forms[-1].finishes or any(form.sums_before for form in forms) or not branch.inserted[-1].rank


def _inserted(layer: Layer, behind: str, network: Bottleneck) -> Layer:
    stack, own = (re.match(r"(?:.+?\.)?\d+(?=\.)", name) for name in (layer.attention.output.weight, network.module))
    if (
        stack is None
        or own is None
        or not (f".{stack[0]}".endswith(f".{own[0]}") or f".{own[0]}".endswith(f".{stack[0]}"))
    ):
        raise FitError(
            f"the model's layer is '{stack[0] if stack else layer.attention.output.weight}'",
            tensor=network.module,
            hint="is this the base it was trained on?",
        )
    branch = layer.attention_branch if behind == "attention" else layer.mlp_branch
    if layer.parallel or branch.after is not None or branch.multiplier != 1.0:
        raise FitError("no module can be inserted into this family's branches", tensor=network.module)
    changed: Branch = replace(branch, inserted=(*branch.inserted, network))
    return replace(layer, attention_branch=changed) if behind == "attention" else replace(layer, mlp_branch=changed)


def inserted_shapes(network: Bottleneck | Coupling) -> Mapping[str, tuple[int, ...]]:
    """Names and stored shapes of a network's tensors."""
    shapes: dict[str, tuple[int, ...]] = {}
    for projection in _projections(network):
        shapes[projection.weight] = projection.inputs, projection.outputs
        shapes[projection.bias] = (projection.outputs,)
    for norm in (network.before, network.after) if isinstance(network, Bottleneck) else ():
        if norm is not None:
            shapes |= {norm.weight: (network.width,), norm.bias: (network.width,)}
    return shapes


def _projections(network: Bottleneck | Coupling) -> Iterator[Projection]:
    if isinstance(network, Coupling):
        yield from (*network.first, *network.second)
        return
    yield from (network.down, network.up)
    if network.gate is not None:
        yield network.gate
