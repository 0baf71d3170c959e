# SPDX-License-Identifier: Apache-2.0
"""Which form each tensor's change can take in an adapter, judged by its name, its shape and the model's family.

PEFT addresses modules by their names in the model that transformers builds, which may differ from those on disk.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from surgery.extraction.made_weights import made_weights
from surgery.extraction.pairing import Delta, Pair, Strip
from surgery_formats.errors import FitError
from surgery_formats.models.component import Component
from surgery_formats.models.eras import Era, Eras, expert_counts, is_known
from surgery_formats.models.families.family import Fused
from surgery_formats.storage.aligned import turned

__all__ = [
    "Form",
    "LowRankTarget",
    "TunedParameter",
    "low_rank_targets",
    "sharing",
    "tree_name",
    "tuned_parameters",
]

Form = Literal["linear", "conv", "embedding", "experts", "norm", "bias", "whole", "owner", "part"]
"""``whole``: a weight that only a copy of its module can hold; ``owner``: a parameter that belongs to a module of
several; ``part``: a tensor that transformers makes a parameter of with others, or several parameters of, and that only
factors can hold."""
_TABLES = (
    "embed", "embed_in", "embed_tokens", "embedding", "embeddings", "shared", "tok_embeddings", "token_embedding",
    "token_embeddings", "word_embeddings", "wpe", "wte",
)  # fmt: skip  # looked up by index, nothing else: PEFT has a LoRA for them
_OTHER_TABLES = ("relative_attention_bias",)
"""Tables of an unusual name or with a forward() of their own (``embed_positions`` computes the positions itself), where
a LoRA would be missed; whatever has ``emb`` in its name is taken for one."""
_LINEAR = ("proj", "linear", "dense")  # with ``emb`` in their name, and linear all the same: ``time_emb_proj``
_BARE = {"whisper": ("conv1", "conv2"), "deepseek_v4": ("o_a_proj",)}
"""By model type: modules whose attributes the model reads (``conv1.stride``), which PEFT's LoRA layer does not pass on,
or that compute something else than a LoRA beside them would."""
_MAMBA = frozenset(("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"))
"""Model types in which PEFT refuses to attach anything to a mixer's ``out_proj`` (PEFT 0.21)."""
_ROUTERS = ("gate", "router")  # beside ``experts``: parameters of a router module, which no LoRA layer wraps


@dataclass(frozen=True, slots=True)
class TunedParameter:
    """A compared pair of tensors and the parameter that it is in the model's tree.

    Attributes:
        pair: The two tensors.
        path: Parameter path in the model's tree.
        form: The form that its change can take.
    """

    pair: Pair
    path: str
    form: Form

    @property
    def module(self) -> str:
        """Path of the module that owns the parameter."""
        return self.path.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class LowRankTarget:
    """A weight whose change is held by factors: one matrix, or one per expert.

    Attributes:
        path: Parameter path in the model's tree.
        form: ``linear``, ``conv``, ``embedding`` or ``experts``.
        deltas: The differences, one per expert; a single one for any other form.
        shape: ``(out, in[, k...])`` of the weight, of one expert where there are several.
        names: The tensors of TUNED that hold it.
        order: The row of a difference that each row of the parameter is; empty for the same.
    """

    path: str
    form: Form
    deltas: tuple[Delta, ...]
    shape: tuple[int, ...]
    names: tuple[str, ...]
    order: tuple[int, ...] = ()

    @property
    def cost(self) -> int:
        """Numbers that one rank costs: ``(out + in)`` times the number of experts."""
        return sum(self.deltas[0].logical_shape) * len(self.deltas)

    @property
    def largest_rank(self) -> int:
        """Rank at which factors hold the whole change."""
        return min(self.deltas[0].logical_shape)


def tuned_parameters(pairs: Iterable[Pair], base: Component) -> tuple[TunedParameter, ...]:
    """Find the parameter and the form of every compared pair."""
    prefix = _prefix(base)
    paths = {pair.name: tree_name(pair.name, base, prefix) for pair in pairs if pair.match == "pair"}
    by_path = {paths[pair.name]: pair for pair in pairs if pair.name in paths}
    routed = {path.partition(".experts.")[0] for path in by_path if ".experts." in path}
    eras = _eras(paths, base, prefix)
    parts = {name.removeprefix(prefix) for era in eras.parameters.values() if era.conversion for name in _stored(era)}
    return tuple(
        TunedParameter(
            pair, paths[pair.name], "part" if pair.name in parts else _form(pair, base, by_path, routed, paths)
        )
        for pair in pairs
        if pair.name in paths
    )


def _stored(era: Era) -> Iterable[str]:
    return era.stored.values()


def _eras(names: Iterable[str], base: Component, prefix: str) -> Eras:
    """The records of BASE's class over the names of TUNED."""
    return Eras(frozenset(f"{prefix}{name}" for name in names), base.names.eras.conversions)


def _prefix(base: Component) -> str:
    """Prefix that the tree adds to the names on disk, where a bare model's file is loaded into a class with a head."""
    first, _, bare = base.family.embedding.partition(".")
    names = base.config.get("architectures")
    with_head = any(mark in str(name) for name in names or () for mark in ("For", "LMHead", "DoubleHeads"))
    return f"{first}." if with_head and bare and base.embedding == f"{bare}.weight" else ""


def tree_name(name: str, base: Component, prefix: str = "") -> str:
    """The path of the parameter `name` in the model's tree, in today's spelling; of a part, that of the first whole."""
    if is_known(base.config):
        return base.names.eras.live(f"{prefix}{name}")
    path = f".{prefix}{name}."
    for rename in base.family.renames:
        path = path.replace(f".{rename.old}.", f".{rename.new}.")
    return path[1:-1]


def _form(pair: Pair, base: Component, known: Mapping[str, Pair], routed: set[str], paths: Mapping[str, str]) -> Form:
    path = paths[pair.name]
    module, _, leaf = path.rpartition(".")
    last = module.rpartition(".")[2]
    shape = pair.tuned.sizes
    if not pair.is_float:
        return "whole" if module else "owner"
    if len(shape) == 2 and last == "experts" and leaf.endswith("_bias"):
        return "linear"
    if len(shape) == 3 and _is_stack(pair, last, leaf, base):
        return "experts"
    if leaf == "bias" and len(shape) == 1:
        weight = known.get(f"{module}.weight")
        return "norm" if weight is not None and len(weight.tuned.sizes) == 1 else "bias"
    if leaf != "weight" or not module:
        # what batch norms keep beside their weight belongs to them; anything else to its module as a whole
        return (
            "norm"
            if len(shape) <= 1 and f"{module}.weight" in known and leaf.startswith(("running_", "num_batches"))
            else "owner"
        )
    if len(shape) == 1:
        return "norm"
    if last in _BARE.get(str(base.config.get("model_type")), ()) or base.names.misses_factors(module):
        return "whole"
    if len(shape) == 2:
        if pair.name in (base.embedding, base.head) or last in _TABLES:
            return "linear" if pair.name == base.head else "embedding"
        mixer = module.rpartition(".")[0]
        if f"{mixer}.A_log" in known and (last == "dt_proj" or (last == "out_proj" and _is_mamba(base))):
            return "whole"  # its weight is read, and not its module called
        table = last in _OTHER_TABLES or ("emb" in last and not last.endswith(_LINEAR))
        if table or _routes(module, routed):
            return "whole"
        return "linear"
    # Of a grouped convolution the file shows less input channels than there are; a depthwise one shows one.
    return "conv" if len(shape) <= 5 and shape[1] > 1 else "whole"


def _routes(module: str, routed: set[str]) -> bool:
    """Whether it is a router beside experts, or a layer of one."""
    owner = module.rpartition(".")[0]
    beside = module if module.rpartition(".")[2] in _ROUTERS else owner
    return beside.rpartition(".")[2] in _ROUTERS and beside.rpartition(".")[0] in routed


def _is_mamba(base: Component) -> bool:
    return base.config.get("model_type") in _MAMBA


def _is_stack(pair: Pair, last: str, leaf: str, base: Component) -> bool:
    """Whether a tensor of three axes is a stack of experts: by its name, or as the configuration counts experts."""
    if leaf != "weight":
        return last == "experts" or pair.tuned.sizes[0] in expert_counts(base.config)
    return pair.base.shape[0] == math.prod(pair.base.sizes[:2]) != pair.base.sizes[0]


def low_rank_targets(parameters: Iterable[TunedParameter], base: Component) -> tuple[LowRankTarget, ...]:
    """Collect the weights that factors can hold: each matrix by itself, the experts of a layer together."""
    targets: list[LowRankTarget] = []
    apart: dict[str, dict[tuple[int, int], TunedParameter]] = {}
    fused_by_path: dict[str, Fused] = {}
    parameters = tuple(parameters)
    for parameter in parameters:
        if not parameter.pair.numel:
            continue  # without values, thus without a change
        place = _expert_part(parameter, base)
        if place is not None:
            path, number, position, fused = place
            apart.setdefault(path, {})[number, position] = parameter
            fused_by_path[path] = fused
        elif parameter.form == "experts":
            targets.append(_stack(parameter, base))
        elif parameter.form in ("linear", "conv", "embedding"):
            targets.append(_single(parameter, base))
    for path, parts in apart.items():
        targets.append(_gathered(path, parts, len(fused_by_path[path].parts)))
    prefix = _prefix(base)
    pairs = {f"{prefix}{parameter.pair.name}": parameter.pair for parameter in parameters}
    eras = _eras([parameter.pair.name for parameter in parameters], base, prefix)
    for made in made_weights(eras, pairs, base):
        form: Form = "experts" if made.stacked else "linear"
        targets.append(
            LowRankTarget(made.path, form, made.deltas, made.deltas[0].logical_shape, made.names, made.order)
        )
    return tuple(targets)


def sharing(targets: Iterable[LowRankTarget]) -> list[tuple[LowRankTarget, ...]]:
    """Targets that have a tensor in common together, the others by themselves."""
    groups: dict[str, list[LowRankTarget]] = {}
    for target in targets:
        known = next((groups[name] for name in target.names if name in groups), [])
        known.append(target)
        groups |= dict.fromkeys(target.names, known)
    return list({id(group): tuple(group) for group in groups.values()}.values())


def _single(parameter: TunedParameter, base: Component) -> LowRankTarget:
    pair = parameter.pair
    strip = _strip(pair)
    turns = len(pair.tuned.sizes) == 2 and base.family.stores_transposed(pair.name) != strip.base.transposed
    delta = Delta((strip,), turns, (pair.name,))
    shape = delta.logical_shape if len(pair.tuned.sizes) == 2 else pair.tuned.sizes
    return LowRankTarget(parameter.path, parameter.form, (delta,), shape, (pair.name,))


def _strip(pair: Pair, *, upright: bool = False) -> Strip:
    base, tuned = pair.matrices()
    if upright and base.transposed:  # rows of the model's code, as those of the strips that lie above and below
        base, tuned = turned(base), turned(tuned)
    return Strip(base, tuned, 0, min(base.shape[0], tuned.shape[0]))


def _stack(parameter: TunedParameter, component: Component) -> LowRankTarget:
    """The target of a 3-D tensor ``(E, out, in)`` or ``(E, in, out)``, with one difference per expert."""
    pair = parameter.pair
    count = pair.tuned.sizes[0]
    base, tuned = pair.matrices(stacked=True)
    turns = component.family.experts_transposed
    if base.transposed and not turns:
        base, tuned = turned(base), turned(tuned)
    flips = turns and not base.transposed
    height = tuned.shape[0] // count
    strips = [Strip(base, tuned, e * height, (e + 1) * height) for e in range(count)]
    deltas = tuple(Delta((strip,), flips, (pair.name,)) for strip in strips)
    return LowRankTarget(parameter.path, "experts", deltas, deltas[0].logical_shape, (pair.name,))


def _expert_part(parameter: TunedParameter, base: Component) -> tuple[str, int, int, Fused] | None:
    """``(path of the 3-D parameter, expert, position of the part, record)`` of one expert's own tensor."""
    if parameter.form != "linear" or ".experts." not in parameter.path or is_known(base.config):
        return None
    for fused in base.family.fused:
        for position, part in enumerate(fused.parts):
            pattern = re.escape(part).replace(r"\{e\}", r"(\d{1,5})")
            if match := re.fullmatch(rf"(.*\.){pattern}", parameter.path):
                return f"{match[1]}{fused.whole}", int(match[2]), position, fused
    return None


def _gathered(path: str, parts: Mapping[tuple[int, int], TunedParameter], width: int) -> LowRankTarget:
    """The target of experts that the files hold one by one and the tree stacks."""
    count = max(number for number, _ in parts) + 1
    if len(parts) != count * width:
        raise FitError(
            f"{len(parts)} tensors do not make {count} experts of {width} parts",
            tensor=next(iter(parts.values())).pair.name,
        )
    deltas = []
    for number in range(count):
        pairs = [parts[number, position].pair for position in range(width)]
        strips = tuple(_strip(pair, upright=True) for pair in pairs)
        deltas.append(Delta(strips, names=tuple(pair.name for pair in pairs)))
    names = tuple(name for delta in deltas for name in delta.names)
    return LowRankTarget(path, "experts", tuple(deltas), deltas[0].logical_shape, names)
