# SPDX-License-Identifier: Apache-2.0
"""Write the canonical form to an MLX-LM adapter folder.

mlx-lm builds every LoRA layer with the rank and scale of the configuration and refuses tensors of another shape. So
smaller ranks are padded with zeros and other scales are multiplied into ``lora_b``; the deltas do not change.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from surgery_formats.adapters.contents import Contents, contents_of
from surgery_formats.adapters.embeddings import is_embedding
from surgery_formats.adapters.expert_layers import ExpertStack, expert_layers
from surgery_formats.adapters.experts import SWITCH, fused_of, one_expert, taken_apart
from surgery_formats.adapters.format import NewTensor, Rendering
from surgery_formats.adapters.mlx.files import TENSOR_FILE
from surgery_formats.adapters.writing import (
    ConversionLedger,
    commonest,
    factor_dtype,
    factor_tensor,
    places_of,
    surviving_metadata,
    whole_place,
    zero_padded,
)
from surgery_formats.arrays import Array
from surgery_formats.binding.bind import bind
from surgery_formats.binding.sizes import component_of
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.expert_stacks import parse_expert_path
from surgery_formats.updates import Factor, LoRA, Replacing, Update

__all__ = ["render_mlx"]

_COMPOSITE = "model.language_model."
_AS_TRANSFORMERS = ("gemma3n",)
"""Composites whose class in mlx-lm has the names of transformers (mlx-lm 0.32, ``models/gemma3n.py``)."""
_CONTAINERS = ("layers", "h", "blocks", "block")  # what holds the numbered blocks


@dataclass
class _Stack:
    """One SwitchLinear while its experts are collected."""

    experts: dict[int, LoRA] = field(default_factory=dict)
    count: int = 0


def render_mlx(adapter: Adapter, base: Checkpoint | None) -> Rendering:
    """adapters.safetensors and adapter_config.json. Convolutions, biases and single token rows are dropped.

    Raises:
        FitError: the adapter has experts and no base is given, or it belongs to a pipeline.
    """
    if base is not None and base.is_pipeline:
        raise FitError("mlx-lm has language models only, the base is a pipeline", file=adapter.path)
    ledger = ConversionLedger()
    updates = [(site, contents_of(update)) for site, chain in adapter.updates.items() for update in chain]
    whole = {site: held.whole for site, held in updates if held.whole}
    if updates and len(whole) == len(updates):
        return _full(adapter, whole, ledger)
    dora = any(held.dora for _, held in updates)
    layers = _Layers(adapter, base, _tie(adapter, base), dora, ledger)
    for site, held in updates:
        layers.take(site, held)
    scale = commonest(lora.scale for _, _, lora in layers.noted if lora.scale) or 0.0
    rank = max((lora.rank for _, _, lora in layers.noted), default=1)
    layers.state(scale, rank)
    tensors: list[NewTensor] = []
    moved = _is_moved(base)
    for module in sorted(layers.plain):
        embedding = is_embedding(module, base)
        tensors += _linear(_in_mlx(module, moved=moved), layers.plain[module], scale, rank, embedding=embedding)
    for path, stack in sorted(layers.stacks.items()):
        tensors += _switch(_in_mlx(path.removesuffix(".weight"), moved=moved), stack, scale, rank)
    ledger.drop_prompt(adapter)
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0}
    paths = (*layers.plain, *layers.stacks)
    keys, number = _keys([_in_mlx(path.removesuffix(".weight"), moved=moved) for path in paths])
    config = _config(adapter, "dora" if dora else "lora") | {
        "num_layers": number,
        "lora_parameters": {**parameters, "keys": keys},
    }
    return _rendering(adapter, tensors, config, ledger)


@dataclass
class _Layers:
    """The LoRA layers of mlx-lm while updates are sorted into them.

    Attributes:
        adapter: The adapter.
        base: Its base, if one was given.
        tie: What becomes of a tied head.
        dora: Whether all layers have magnitudes.
        ledger: Told of every update.
        plain: Layers of one matrix, by module.
        stacks: Layers of experts, by path.
        noted: What is in them: site, contents, and each LoRA.
    """

    adapter: Adapter
    base: Checkpoint | None
    tie: _TiedHead
    dora: bool
    ledger: ConversionLedger
    plain: dict[str, Contents] = field(default_factory=dict)
    stacks: dict[str, _Stack] = field(default_factory=dict)
    noted: list[tuple[Site, Contents, LoRA]] = field(default_factory=list)

    def take(self, site: Site, held: Contents) -> None:
        """Put an update into its layer, or drop it.

        Raises:
            FitError: experts, and no base is given.
        """
        adapter, base = self.adapter, self.base
        source, update = held.update, held.lora or held.update
        why = _fault(site, held, adapter, base, dora=self.dora) or _parted(site, update, base, self.tie)
        if why:
            self.ledger.drop(site, source, why)
        elif base is not None and self.tie.follows and _stored_name(site, update, base) == base.main.head:
            self.ledger.keep(site, source, "folded", "tied to the embedding, which has the same update")
        elif not held.dora and (experts := _by_path(site, adapter, base)):
            for path, known in experts.items():
                self.stacks.setdefault(path, _Stack(count=known.count)).experts.update(known.loras)
                self.noted += [(site, held, lora) for lora in known.loras.values()]
        elif held.lora is None:
            for path, lora in _apart(site, source, base):
                _stack(self.stacks, path, lora, fused_of(site, base))
                self.noted.append((site, held, lora))
        elif not held.dora and (place := one_expert(site.path, fused_of(site, base))):
            stack = self.stacks.setdefault(place[0], _Stack())
            stack.experts[place[1]] = held.lora
            stack.count = max(stack.count, place[1] + 1, _experts_of(site, base))
            self.noted.append((site, held, held.lora))
        elif (module := _module_name(site, update, base)) in self.plain:
            self.ledger.drop(site, source, "a second one on one module")
        else:
            self.plain[module] = held
            self.noted.append((site, held, held.lora))

    def state(self, scale: float, rank: int) -> None:
        """Note of every update what giving all layers one scale and rank did to it."""
        first: dict[tuple[Site, int], tuple[Site, Contents, LoRA]] = {}
        for entry in self.noted:
            first.setdefault((entry[0], id(entry[1])), entry)
        for site, held, lora in first.values():
            folded = [f"scale {lora.scale:g} / {scale:g}"] if lora.scale != scale else []
            folded += [f"rank {lora.rank} padded to {rank}"] if lora.rank != rank else []
            folded += ["stacked"] if held.stack and SWITCH not in site.path else []
            folded += [held.folded] if held.folded else []
            self.ledger.keep(site, held.update, "folded" if folded else "exact", ", ".join(folded))


def _full(adapter: Adapter, whole: Mapping[Site, Replacing], ledger: ConversionLedger) -> Rendering:
    """Whole parameters: what mlx-lm calls ``full``."""
    tensors = []
    for site, update in whole.items():
        stored = update.stored
        tensors.append(NewTensor(site.path, stored.dtype, stored.shape, stored.read))
        ledger.keep(site, update, "exact")
    return _rendering(adapter, tensors, _config(adapter, "full") | {"num_layers": -1, "lora_parameters": {}}, ledger)


def _config(adapter: Adapter, kind: str) -> dict[str, Any]:
    own = dict(adapter.config) if adapter.format == "mlx" else {}
    return {**own, "fine_tune_type": kind, **({"model": adapter.base_name} if adapter.base_name else {})}


def _rendering(
    adapter: Adapter, tensors: Iterable[NewTensor], config: Mapping[str, Any], ledger: ConversionLedger
) -> Rendering:
    text = json.dumps(config, indent=4, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n"
    metadata = surviving_metadata(adapter) | {"format": "mlx"}
    small = {"adapter_config.json": text.encode()}
    return Rendering(TENSOR_FILE, tuple(tensors), metadata, small, tuple(ledger.entries), ledger.held)


def _is_moved(base: Checkpoint | None) -> bool:
    """Whether mlx-lm's class holds the language model of this composite under ``language_model``."""
    if base is None or str(base.main.config.get("model_type")) in _AS_TRANSFORMERS:
        return False
    return any(name.startswith(_COMPOSITE) for name in base.main.parameters)


def _in_mlx(path: str, *, moved: bool) -> str:
    """The path in mlx-lm's class."""
    if not moved:
        return path
    if path.startswith(_COMPOSITE):
        return f"language_model.model.{path.removeprefix(_COMPOSITE)}"
    return f"language_model.{path}" if path.startswith("lm_head") else path


def _by_path(site: Site, adapter: Adapter, base: Checkpoint | None) -> dict[str, ExpertStack]:
    """The stacks of a site by mlx-lm's path, if the base tells its experts.

    mlx-lm keeps the names that the disk has for what holds them; in gpt-oss, whose rows of gate and up alternate, there is
    no ``switch_mlp``.
    """
    if base is None or parse_expert_path(site.path) is None:
        return {}
    layers, _ = expert_layers(adapter.only([site]), base)
    homes = {layer.module: f"{layer.module}." if layer.interleaved else f"{layer.stem}{SWITCH}" for layer in layers}
    return {f"{homes[layer.module]}{role}.weight": stack for layer in layers for role, stack in layer.split().items()}


def _fault(site: Site, held: Contents, adapter: Adapter, base: Checkpoint | None, *, dora: bool) -> str:
    """Why the format cannot hold an update; empty if it can."""
    if site.flat or site.component:
        return "mlx-lm has language models only"
    told = base is not None and bool(_by_path(site, adapter, base))
    if stack := held.stack:
        if SWITCH in site.path:
            return "DoRA and stacked experts do not go together" if dora else ""
        if stack.if_transposed and base is None:
            raise FitError(
                f"only the base can tell how the experts of '{site}' are held",
                file=stack.tensors[0].path,
                tensor=stack.tensors[0].name,
                hint="give it with `base=`",
            )
        if not (told or _apart(site, stack, base)):
            return "the names of its experts are not known"
        return "DoRA and stacked experts do not go together" if dora else ""
    if held.lora is None:
        return f"this format has no {held.update.kind}"
    if dora and not held.dora:
        return "one file holds either LoRA or DoRA"
    if not site.path.endswith(".weight") and not told:
        return "this format names modules, not parameters"
    if held.dora and not held.dora.per_row:
        return "its magnitudes belong to columns, this format's to rows"
    if _is_convolution(site, held.lora, base):
        return "this format has no convolutions"
    return ""


def _apart(site: Site, update: Update, base: Checkpoint | None) -> list[tuple[str, LoRA]]:
    if SWITCH in site.path:
        return [(site.path, lora) for _, expert in update.parts() if (lora := expert.low_rank())]
    return list(taken_apart(site.path, update, fused_of(site, base)))


def _stack(stacks: dict[str, _Stack], path: str, lora: LoRA, fused: Iterable[Any]) -> None:
    where, number = (path, None) if SWITCH in path else one_expert(path, fused) or (path, None)
    stack = stacks.setdefault(where, _Stack())
    stack.experts[len(stack.experts) if number is None else number] = lora
    stack.count = max(stack.count, len(stack.experts), (number or 0) + 1)


def _experts_of(site: Site, base: Checkpoint | None) -> int:
    """How many experts the base has where `site` is one of them; 0 if no base was given."""
    if base is None or not (place := one_expert(site.path, fused_of(site, base))):
        return 0
    return len(component_of(site, base).names.resolve(place[0]))


@dataclass(frozen=True, slots=True)
class _TiedHead:
    """A head that shares the embedding's tensor: in mlx-lm it follows every update of the embedding.

    Attributes:
        follows: The base ties them, and the adapter changes both equally.
        parts: The base ties them, and the adapter changes them differently.
    """

    follows: bool = False
    parts: bool = False


def _tie(adapter: Adapter, base: Checkpoint | None) -> _TiedHead:
    if base is None or not (base.main.tied and base.main.head) or not adapter.updates:
        return _TiedHead()
    tied = [
        site
        for site, chain in adapter.updates.items()
        if site not in adapter.optional and _stored_name(site, chain[0], base) in (base.main.head, base.main.embedding)
    ]  # binding these two sites alone tells, and the adapter as a whole is bound by whoever needs that
    parts = bool(tied) and base.main.name in bind([(adapter.only(tied), 1.0)], base).untied
    return _TiedHead(not parts, parts)


def _parted(site: Site, update: Update, base: Checkpoint | None, tie: _TiedHead) -> str:
    if base is None or not tie.parts or _stored_name(site, update, base) not in (base.main.head, base.main.embedding):
        return ""
    return "head and embedding are one tensor in mlx-lm, and the adapter does not do the same to both"


def _stored_name(site: Site, update: Update, base: Checkpoint) -> str:
    place = whole_place(places_of(site, base, update.tensors))
    return place[0] if place else ""


def _module_name(site: Site, update: Update, base: Checkpoint | None) -> str:
    """mlx-lm keeps the names of the checkpoint; without a base, the adapter's own."""
    name = _stored_name(site, update, base) if base is not None else ""
    return (name or site.path).removesuffix(".weight")


def _is_convolution(site: Site, update: Update, base: Checkpoint | None) -> bool:
    if base is not None:
        return len(places_of(site, base, update.tensors)[0].parameter.sizes) > 2 and ".experts." not in site.path
    return bool(site.kernel)


def _linear(module: str, held: Contents, scale: float, rank: int, *, embedding: bool) -> list[NewTensor]:
    lora = held.lora
    assert lora is not None
    out, inputs = lora.shape
    times = lora.scale / scale if lora.scale != scale else 1.0
    if embedding:  # dW = s a b, without a transpose
        new = [
            factor_tensor(f"{module}.lora_a", lora.B, (out, rank), lambda t: zero_padded(t, 1, rank)),
            factor_tensor(f"{module}.lora_b", lora.A, (rank, inputs), lambda t: zero_padded(t, 0, rank), times=times),
        ]
    else:
        new = [
            factor_tensor(f"{module}.lora_a", lora.A, (inputs, rank), lambda t: zero_padded(t, 0, rank).T),
            factor_tensor(f"{module}.lora_b", lora.B, (rank, out), lambda t: zero_padded(t, 1, rank).T, times=times),
        ]
    if held.dora:
        new.append(factor_tensor(f"{module}.m", held.dora.magnitude, (out,)))
    return new


def _switch(module: str, stack: _Stack, scale: float, rank: int) -> list[NewTensor]:
    """Stacks of all experts; one that was not trained is zero."""
    loras = stack.experts
    out, inputs = next(iter(loras.values())).shape
    folded = any(lora.scale != scale for lora in loras.values())

    def load_a() -> Array:
        return _experts([(e, loras[e].A, 0, 1.0) for e in sorted(loras)], stack.count, rank, (rank, inputs))

    def load_b() -> Array:
        times = {e: lora.scale / scale if lora.scale != scale else 1.0 for e, lora in loras.items()}
        return _experts([(e, loras[e].B, 1, times[e]) for e in sorted(loras)], stack.count, rank, (out, rank))

    types = [factor_dtype([getattr(lora, side) for lora in loras.values()], folded=False) for side in "A"]
    types.append(factor_dtype([lora.B for lora in loras.values()], folded=folded))
    return [
        NewTensor(f"{module}.lora_a", types[0], (stack.count, rank, inputs), load_a),
        NewTensor(f"{module}.lora_b", types[1], (stack.count, out, rank), load_b),
    ]


def _experts(parts: list[tuple[int, Factor, int, float]], count: int, rank: int, shape: tuple[int, int]) -> Array:
    import numpy

    whole = numpy.zeros((count, *shape))
    for number, factor, axis, times in parts:
        whole[number] = zero_padded(factor.load(DType.F64) * times, axis, rank)
    return whole


def _keys(modules: list[str]) -> tuple[list[str], int]:
    """``keys`` and ``num_layers`` under which mlx-lm finds exactly these modules.

    Names relative to a block apply to every block, so they are used when all blocks have the same modules. Otherwise
    full paths are used.
    """
    inside: dict[tuple[str, int], set[str]] = {}
    outside: list[str] = []
    for module in modules:
        segments = module.split(".")
        at = next((i for i, segment in enumerate(segments) if segment.isdigit() and segments[i - 1] in _CONTAINERS), 0)
        if at:
            inside.setdefault((".".join(segments[:at]), int(segments[at])), set()).add(".".join(segments[at + 1 :]))
        else:
            outside.append(module)
    numbers = sorted(number for _, number in inside)
    same = len({frozenset(names) for names in inside.values()}) == 1 and len({stem for stem, _ in inside}) == 1
    if same and numbers == list(range(len(numbers))):
        return sorted([*next(iter(inside.values())), *outside]), -1
    return sorted(modules), -1
