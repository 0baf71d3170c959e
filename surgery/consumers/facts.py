# SPDX-License-Identifier: Apache-2.0
"""An adapter in the parts that programs tell apart. Only headers are read."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from surgery.algebra.group import applicable_updates
from surgery.consumers.traits import Trait
from surgery.engine.input_checks import check_base_id
from surgery_formats.adapters.contents import contents_of
from surgery_formats.adapters.embeddings import EMBEDDINGS
from surgery_formats.adapters.peft.disagreements import beyond_targets, empty_saved
from surgery_formats.adapters.peft.keys import PREFIX, ROOT, bared
from surgery_formats.adapters.peft.kinds import switches
from surgery_formats.adapters.peft.read_config import parse_config
from surgery_formats.adapters.peft.recognise import dialect_of
from surgery_formats.adapters.writing import places_of, whole_place
from surgery_formats.binding.bind import bind
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.canonical.consumption import check_consumed
from surgery_formats.errors import FitError, InputError
from surgery_formats.files.bounded_json import read_object
from surgery_formats.models.checkpoint import Checkpoint, Component
from surgery_formats.models.eras import expert_counts, taken_for_experts
from surgery_formats.models.families.family import role_of
from surgery_formats.updates import Update, is_refusing

__all__ = ["AdapterFacts", "AdapterPart", "bound_facts", "facts_of", "lacks_experts"]

_HEADS = frozenset(["lm_head", "embed_out", "output_projection"])
_CLASSIFIERS = frozenset(["score", "classifier", "qa_outputs"])
_IN_MEMORY = re.compile(
    r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\.(?!weight$|bias$)\w+(\.weight|\.bias)?$"
)
_EXPERTS = ".experts."
_PROJECTIONS = 3  # of an expert: gate, up, down; unless the base stores others
_ALL = frozenset(["all-linear", "all"])
_PREFIXES = frozenset(PREFIX.split("."))


@dataclass(frozen=True, slots=True)
class AdapterPart:
    """One part.

    Attributes:
        name: Path of a parameter, name of a field, or name of a file.
        trait: What it is.
        kind: Kind of its update (`Update.kind`), or empty.
        rank: Inner size of its LoRA.
        scale: What its LoRA was trained with.
        update: The update, where the part is one.
    """

    name: str
    trait: Trait
    kind: str = ""
    rank: int | None = None
    scale: float | None = None
    update: Update | None = field(default=None, compare=False, repr=False)

    @property
    def module(self) -> str:
        """Path of the module."""
        return self.name.removesuffix(".weight").removesuffix(".bias")

    @property
    def leaf(self) -> str:
        """Last name of the module's path."""
        return self.module.rpartition(".")[2]


@dataclass(frozen=True)
class AdapterFacts:
    """What rules look at.

    Attributes:
        adapter: The adapter.
        base: The model it belongs to.
        parts: Every update, field and file that a program may treat in a way of its own.
        updates: Its updates with the sizes that the base tells, without optional ones that it lacks.
        greatest_rank: What the program was started with; None if nothing was said.
    """

    adapter: Adapter
    base: Checkpoint
    parts: tuple[AdapterPart, ...]
    updates: Mapping[Site, tuple[Update, ...]]
    greatest_rank: int | None = None

    @property
    def config(self) -> Mapping[str, Any]:
        """The adapter's own configuration."""
        return self.adapter.config

    @cached_property
    def dialect(self) -> str:
        """How a PEFT folder holds experts, see `surgery_formats.adapters.peft.dialects`; empty without any."""
        found = dialect_of(self.adapter)
        return "" if found is None else found.name

    @property
    def main(self) -> Component:
        """The base, or the first part of a pipeline: what rules about language models look at."""
        return next(iter(self.base.components.values()))

    @cached_property
    def model_type(self) -> str:
        """Of the base's language model."""
        config = self.main.config
        nested = config.get("text_config")
        return str((nested if isinstance(nested, Mapping) else config).get("model_type", ""))

    @cached_property
    def incomplete_layers(self) -> frozenset[str]:
        """Paths of layers with LoRAs of single experts, and not of all projections of all experts."""
        trained, stored = _by_layer(self.modules), _by_layer(self.main.parameters)
        count = max(expert_counts(self.main.config), default=0)
        lacking = set()
        for layer, paths in trained.items():
            numbers = {path.partition(".")[0] for path in paths}
            own = [name for name in stored.get(layer, ()) if name.startswith("0.") and name.endswith(".weight")]
            if len(numbers) < count or len(paths) < (len(own) or _PROJECTIONS) * len(numbers):
                lacking.add(layer)
        return frozenset(lacking)

    @cached_property
    def _class_modules(self) -> frozenset[str]:
        """Paths of the modules in the model's code."""
        live = self.main.names.eras.live
        return frozenset(live(name).rpartition(".")[0] for name in self.main.parameters)

    def is_renamed_again(self, part: AdapterPart) -> bool:
        """Whether a program that renames a file's factors, as if they had names on disk, would miss this LoRA."""
        if part.scale is None:
            return False
        stack = part.trait == "LoRA of stacked experts"
        module = part.module.rpartition(".")[0] if stack else part.module
        return module in self._class_modules and self.main.names.misses_factors(module)

    @cached_property
    def modules(self) -> frozenset[str]:
        """Paths of the modules with a LoRA."""
        return frozenset(part.module for part in self.parts if part.scale is not None)


def lacks_experts(part: AdapterPart, facts: AdapterFacts) -> bool:
    """Whether its layer has LoRAs of single experts, and not of all projections of all experts."""
    return part.module.partition(_EXPERTS)[0] in facts.incomplete_layers


def _by_layer(names: Iterable[str]) -> dict[str, list[str]]:
    """Names of single experts' modules or parameters, from the expert's number on, by the path of their layer."""
    layers: dict[str, list[str]] = {}
    for name in names:
        layer, found, rest = name.partition(_EXPERTS)
        if found and rest.partition(".")[0].isdecimal():
            layers.setdefault(layer, []).append(rest)
    return layers


def facts_of(adapter: Adapter, base: Checkpoint, greatest_rank: int | None = None) -> AdapterFacts:
    """Take an adapter apart."""
    updates = applicable_updates(adapter, base)
    parts = [replace(_part(site, update, base), update=update) for site, chain in updates.items() for update in chain]
    if adapter.format == "peft":
        parts = [_as_taken(part, adapter, base) for part in parts]
    if adapter.prompt is not None:
        parts.append(AdapterPart(adapter.prompt.table.name, "virtual tokens", adapter.kind))
    if adapter.format == "peft":
        parts += _fields(adapter, base)
        parts += _contradictions(adapter)
    return AdapterFacts(adapter, base, tuple(parts), updates, greatest_rank)


def bound_facts(
    adapter: Adapter, base: Checkpoint, greatest_rank: int | None = None
) -> tuple[AdapterFacts, tuple[str, ...]]:
    """An adapter that was found to belong to a base, taken apart, and what binding it warns of.

    Biases of layers that have none in the base are no fault here: rules speak of them.

    Raises:
        FitError: tensors that no update uses, or a base that the adapter was not made for.
    """
    check_consumed(adapter)
    warnings = adapter.known_issues()
    if adapter.updates:
        warnings = bind([(adapter, 1.0)], base, new_biases=True).warnings
        check_base_id(base, [adapter])
    return facts_of(adapter, base, greatest_rank), warnings


def _part(site: Site, update: Update, base: Checkpoint) -> AdapterPart:
    held, name = contents_of(update), str(site)
    if is_refusing(update):
        return AdapterPart(name, "other kind", update.kind)
    if held.whole is not None and held.whole.held == "carried" and ".base_layer." in held.whole.stored.name:
        return AdapterPart(name, "carried weight", update.kind)
    if held.whole is not None:
        return AdapterPart(name, _saved(site, held.whole.stored.shape, base), update.kind)
    if held.rows is not None:
        return AdapterPart(name, "token rows", update.kind)
    if held.dora is not None:
        return AdapterPart(name, "DoRA", update.kind, held.dora.direction.rank, held.dora.direction.scale)
    if held.stack is not None:
        return AdapterPart(name, "LoRA of stacked experts", update.kind, held.stack.rank, held.stack.scale)
    if held.offset is not None:
        return AdapterPart(name, "bias of a LoRA" if site.path.endswith(".bias") else "other kind", update.kind)
    if held.lora is update:
        return AdapterPart(name, _lora(site, update, base), update.kind, update.rank, update.scale)
    if update.kind.startswith("LoRA"):
        return AdapterPart(name, "LoRA on a changed base", update.kind, update.rank, update.scale)
    return AdapterPart(name, "other kind", update.kind)


def _lora(site: Site, update: Update, base: Checkpoint) -> Trait:
    """What a LoRA is of."""
    path = site.path.removesuffix(".weight")
    leaf = path.rpartition(".")[2]
    main = None if base.is_pipeline else base.main
    if site.module_kind == "experts" and not site.path.endswith(".weight"):
        return "LoRA of stacked experts"
    if site.module_kind == "convolution" or any(site.kernel):
        return "LoRA of a convolution"
    if site.module_kind == "embedding" or leaf in EMBEDDINGS:
        return "LoRA of an embedding"
    if leaf in _HEADS or (main is not None and main.head == f"{path}.weight"):
        return "LoRA of the head"
    if ".experts." in f".{path}." and any(segment.isdecimal() for segment in path.partition("experts.")[2].split(".")):
        return "LoRA of one expert"
    if main is not None and main.family.stores_transposed(f"{path}.weight"):
        return "LoRA of a turned weight"
    place = whole_place(places_of(site, base, update.tensors))
    if place is not None and len(place[1]) > 2:
        return "LoRA of a convolution"
    return "LoRA"


def _as_taken(part: AdapterPart, adapter: Adapter, base: Checkpoint) -> AdapterPart:
    """The part, where PEFT takes its module for experts of an older release unless it is a parameter's LoRA."""
    if part.trait != "LoRA" or base.is_pipeline or part.leaf not in taken_for_experts(base.main.config):
        return part
    own = adapter.config.get("target_parameters") or ()
    is_parameter = any(f".{part.module}.weight".endswith(f".{name}") for name in own)
    return part if is_parameter else replace(part, trait="LoRA taken for experts")


def _saved(site: Site, shape: tuple[int, ...], base: Checkpoint) -> Trait:
    """What a parameter is that is stored in full."""
    module, _, leaf = site.path.rpartition(".")
    if leaf == "bias":
        return "trained bias" if role_of(site.path) not in ("norm", "head") else _of_role(role_of(site.path))
    last = module.rpartition(".")[2]
    if last in _HEADS or last in EMBEDDINGS:
        rows = _rows(site, base)
        return "added rows" if rows is not None and shape[0] > rows else "saved vocabulary"
    if last in _CLASSIFIERS:
        return "saved head"
    return _of_role(role_of(site.path))


def _of_role(role: str) -> Trait:
    return "saved norm" if role == "norm" else "saved head" if role == "head" else "saved module"


def _rows(site: Site, base: Checkpoint) -> int | None:
    """Rows of the base's parameter; None where it has none of that name."""
    if base.is_pipeline or not base.main.embedding:
        return None
    return base.main.parameters[base.main.embedding].shape[0]


def _fields(adapter: Adapter, base: Checkpoint) -> Iterator[AdapterPart]:
    """Fields and files of a PEFT folder."""
    targets = adapter.config.get("target_modules")
    if isinstance(targets, str) and targets not in _ALL:
        yield AdapterPart("target_modules", "pattern of targets")
    for name in ("rank_pattern", "alpha_pattern"):
        if adapter.kind == "LORA" and name in adapter.config and adapter.config[name] is None:
            yield AdapterPart(name, "null patterns")
    if adapter.config.get("use_bdlora"):
        yield AdapterPart("use_bdlora", "block-diagonal factors")
    yield from _names(adapter)
    if adapter.config.get("target_parameters"):
        yield AdapterPart("target_parameters", "targeted parameters")
    yield from _added_tokens(adapter, base)
    names = sorted({file.path.name for file in adapter.files})
    for name in names:
        if name == "adapter_model.bin":
            yield AdapterPart(name, "pickled weights")
        elif name != "adapter_model.safetensors":
            yield AdapterPart(name, "other weight files")


def _contradictions(adapter: Adapter) -> Iterator[AdapterPart]:
    """Where the configuration says less or more than the tensors: programs go by the one or by the others."""
    fields = adapter.config
    if "peft_type" not in fields or adapter.prompt is not None:
        return
    if adapter.kind == "LORA":
        for name in ("r", "lora_alpha"):
            if fields.get(name) is None:
                yield AdapterPart(name, "missing fields")
    if fields.get("target_modules") is None:
        yield AdapterPart("target_modules", "no targets")
    if fields.get("bias", "none") != "none":
        yield AdapterPart("bias", "bias setting")
    if fields.get("lora_bias"):
        yield AdapterPart("lora_bias", "bias setting")
    config = parse_config(fields, adapter.path / "adapter_config.json", switches())
    whole, trained = set[str](), set[str]()
    for site, chain in adapter.updates.items():
        held = [contents_of(update) for update in chain]
        if all(one.whole is not None for one in held):
            whole.add(site.path)
        elif any(one.rows is None for one in held):
            trained.add(site.path.removesuffix(".weight").removesuffix(".bias"))
    written = any(tensor.name.startswith(PREFIX) and bared(tensor.name) == tensor.name for tensor in adapter.tensors)
    if written or not isinstance(fields.get("target_modules"), str):  # a pattern is one on the paths that PEFT writes
        yield from (AdapterPart(path, "beyond the targets") for path in sorted(beyond_targets(config, trained)))
    yield from (AdapterPart(name, "promised modules") for name in empty_saved(config, trained, whole))


def _names(adapter: Adapter) -> Iterator[AdapterPart]:
    """Ways of naming tensors that are not PEFT's: one part each, called like the first tensor."""
    names = [tensor.name for tensor in adapter.tensors] if adapter.prompt is None else []
    if names and not any(name.startswith(ROOT) for name in names):
        yield AdapterPart(names[0], "bare names")
    for name in names:
        found: set[str] = set()
        bared(name, found)
        for what in found:
            yield AdapterPart(name, "doubled prefix" if {*what.split(".")} <= _PREFIXES else "wrapped names")
        if found:
            break
    if own := next((name for name in names if _IN_MEMORY.search(name)), ""):
        yield AdapterPart(own, "names of an adapter")


def _added_tokens(adapter: Adapter, base: Checkpoint) -> Iterator[AdapterPart]:
    file = adapter.path / "added_tokens.json"
    rows = _rows(Site(""), base)
    if rows is None or not file.is_file():
        return
    with contextlib.suppress(InputError, FitError):
        numbers = [number for number in read_object(file).values() if isinstance(number, int)]
        if any(number >= rows for number in numbers):
            yield AdapterPart(file.name, "added tokens")
