# SPDX-License-Identifier: Apache-2.0
"""A checkpoint with other layers: some left out, some there again, in any order. No byte is read."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from surgery_formats.errors import FitError
from surgery_formats.files.bounded_json import INDEX_LIMIT, json_bytes, read_object
from surgery_formats.models.component import Component
from surgery_formats.models.rebuilt.layer_config import layer_config
from surgery_formats.models.rebuilt.rebuilt import Dropped, Rebuilt, copy_of, one_network, with_configs, with_shards
from surgery_formats.models.rebuilt.stack import LayerStack, layer_stack
from surgery_formats.storage.quantised import CONFIG_KEYS
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show

__all__ = ["places_of_layers", "with_layers"]

_QUANTISATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_PATTERN, _NUMBER = re.compile(r"[\\[(^$|]|\.\*"), re.compile(r"(?<![A-Za-z_])\d")
"""Of expressions that modules are named by, and of a number in one that is no part of a name."""


def places_of_layers(order: Sequence[int]) -> Mapping[int, tuple[int, ...]]:
    """From old numbers of layers to the new ones; those that are gone have none."""
    places: dict[int, tuple[int, ...]] = {}
    for new, old in enumerate(order):
        places[old] = (*places.get(old, ()), new)
    return places


def with_layers(rebuilt: Rebuilt, order: Sequence[int]) -> Rebuilt:
    """`rebuilt` with its layers in this order; one that is named twice is there twice, with bytes of its own.

    Raises:
        FitError: a pipeline or a GGUF; or layers of several kinds of which the configuration would no longer be true.
    """
    component = one_network(rebuilt.checkpoint)
    stack = layer_stack(component)
    found = layer_config(component.config, stack, order, _contents(component, stack))
    config = _quantisation(dict(found.config), stack, order)
    side_files = _quantisation_files(rebuilt, stack, order)
    places = places_of_layers(order)
    dropped: list[Dropped] = []
    origins: dict[str, tuple[StoredTensor, ...]] = {}
    shards = []
    for shard in component.shards:
        tensors: list[StoredTensor] = []
        for tensor in shard.tensors:
            at = stack.split(tensor.name)
            if at is None:
                tensors.append(tensor)
                origins[tensor.name] = rebuilt.origins[tensor.name]
                continue
            new = places.get(at[0], ())
            if not new:
                dropped += [Dropped(one, f"layer {at[0]} is left out") for one in rebuilt.origins[tensor.name]]
            for number in new:
                name = stack.named(number, at[1])
                tensors.append(replace(tensor, name=name) if number == new[0] else copy_of(tensor, name))
                origins[name] = rebuilt.origins[tensor.name]
        shards.append((shard, tensors))
    facts = {"layers": {"before": stack.count, "order": list(order), "stack": stack.prefix.rstrip(".")}}
    made = with_shards(rebuilt, shards, config, facts, dropped=dropped, origins=origins, warnings=found.warnings)
    return with_configs(made, config, side_files, ()) if side_files else made


def _contents(component: Component, stack: LayerStack) -> list[frozenset[tuple[str, tuple[int, ...]]]]:
    """Names and sizes of the tensors of each layer."""
    contents: list[set[tuple[str, tuple[int, ...]]]] = [set() for _ in range(stack.count)]
    for tensor in component.tensors.values():
        if (at := stack.split(tensor.name)) is not None:
            contents[at[0]].add((at[1], tensor.shape))
    return [frozenset(one) for one in contents]


def _quantisation(config: dict[str, Any], stack: LayerStack, order: Sequence[int]) -> dict[str, Any]:
    """Modules that a quantised model's configuration names, under their new numbers.

    Raises:
        FitError: it names layers in patterns.
    """
    inner = config.get("text_config")
    for holder in (config, inner if isinstance(inner, dict) else {}):
        for key in CONFIG_KEYS:
            if key in holder:
                holder[key] = _renumbered(copy.deepcopy(holder[key]), stack, order)
    return config


def _quantisation_files(rebuilt: Rebuilt, stack: LayerStack, order: Sequence[int]) -> dict[str, bytes]:
    """The same in files of their own, which quantisers write and servers read."""
    made: dict[str, bytes] = {}
    for name, path in rebuilt.checkpoint.side_files:
        if name in _QUANTISATION_FILES:
            told = dict(read_object(path, INDEX_LIMIT))
            if (new := _renumbered(told, stack, order)) != told:
                made[name] = json_bytes(new)
    return made


def _renumbered(told: Any, stack: LayerStack, order: Sequence[int]) -> Any:
    """A quantiser's settings with the modules that they name under their new numbers."""
    places = places_of_layers(order)
    numbered = re.compile(rf"({re.escape(stack.prefix)})(\d+)(?=\.|$)")

    def moved(text: str) -> list[str]:
        match = numbered.search(text)
        if match is None or _PATTERN.search(text):
            if re.search(r"\blayers?\b.*\d", text) or (_PATTERN.search(text) and _NUMBER.search(text)):
                raise FitError(f"its quantization_config names layers in a way that is not understood: '{show(text)}'")
            return [text]
        return [text[: match.start(2)] + str(new) + text[match.end(2) :] for new in places.get(int(match[2]), ())]

    def corrected(value: Any) -> Any:
        if isinstance(value, list):
            return [new for one in value for new in (moved(one) if isinstance(one, str) else [corrected(one)])]
        if isinstance(value, dict):
            return {new: corrected(inner) for key, inner in value.items() for new in moved(str(key))}
        return value

    return corrected(told)
