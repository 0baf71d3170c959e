# SPDX-License-Identifier: Apache-2.0
"""The configuration of a network that has other layers: their number, what it lists for each, and rules that go by number.

Checked against transformers 5.23. A rule that gives a layer another role at its new place is written out where the family
has a list for it (``layer_types``, ``mlp_only_layers``, ``no_rope_layers``), and refused where it has none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery_formats.errors import FitError
from surgery_formats.models.rebuilt.layer_keys import (
    LAST_IS_FULL,
    LISTED,
    LISTS,
    NUMBERS,
    OF_LAYERS,
    OTHER_LISTS,
    PERIODS,
    REFUSED,
)
from surgery_formats.models.rebuilt.stack import COUNTS, LayerStack
from surgery_formats.text import show

__all__ = ["LayerConfig", "layer_config"]

_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """A configuration made true.

    Attributes:
        config: All of it.
        warnings: What programs that go by the family's own pattern will make of it.
    """

    config: Mapping[str, Any]
    warnings: tuple[str, ...] = ()


def layer_config(
    config: Mapping[str, Any], stack: LayerStack, order: Sequence[int], contents: Sequence[Hashable]
) -> LayerConfig:
    """`config` for a network whose layer `i` was the layer ``order[i]``.

    Args:
        config: config.json of all layers; empty where there is none.
        stack: The layers.
        order: Old numbers.
        contents: What each of the old layers consists of; where these differ, the configuration must say which is which.

    Raises:
        FitError: it does not, or says it by a rule that no longer holds.
    """
    whole = copy.deepcopy(dict(config))
    if not config:
        _check_alike(contents, [() for _ in contents])
        return LayerConfig(whole)
    holder = stack.holder(whole)
    assert isinstance(holder, dict)
    roles: list[list[Any]] = [[] for _ in range(stack.count)]
    changed = _Changes(holder, stack.count, tuple(order), roles)
    changed.types()
    changed.lists()
    changed.numbers()
    changed.settings()
    changed.stages()
    changed.rules()
    _check_alike(contents, [tuple(map(repr, role)) for role in roles])
    for key in COUNTS:
        if holder.get(key) == stack.count:
            holder[key] = len(order)
    return LayerConfig(whole, tuple(changed.warnings))


def _check_alike(contents: Sequence[Hashable], roles: Sequence[Hashable]) -> None:
    """Layers of one role must consist of the same tensors, or nothing would tell which is which."""
    seen: dict[Hashable, int] = {}
    for number, role in enumerate(roles):
        first = seen.setdefault(role, number)
        if contents[first] != contents[number]:
            raise FitError(
                f"layers {first} and {number} consist of different tensors, and config.json does not say by what rule",
                hint="this network's layers cannot be moved",
            )


class _Changes:
    """The corrections of one configuration, in place."""

    def __init__(self, config: dict[str, Any], count: int, order: tuple[int, ...], roles: list[list[Any]]) -> None:
        self.config, self.count, self.order, self.roles = config, count, order, roles
        self.warnings: list[str] = []

    def types(self) -> None:
        """What the family says of its layers by a pattern: written out where config.json does not list it.

        Raises:
            FitError: the family's rule is not known, and config.json does not list what it says.
        """
        kind = str(self.config.get("model_type"))
        lacking = [key for key in LISTED.get(kind, ()) if not isinstance(self.config.get(key), list)]
        if lacking and not self._stays:
            raise FitError(
                f"layers of '{show(kind)}' are of several types, and config.json does not list them ({lacking[0]})",
                hint=f"load and save it with transformers 5, which writes {lacking[0]}",
            )
        rule = _PATTERNS.get(kind)
        if rule is None:
            return
        key, before = rule(self.config)
        _, after = rule({**self.config, **self._windows_after()})
        pattern = [before(number) for number in range(self.count)]
        listed = self.config.get(key)
        old = listed if isinstance(listed, list) and len(listed) == self.count else pattern
        self._note(old)
        new = [old[number] for number in self.order]
        if new == [after(number) for number in range(len(new))]:
            return
        if not isinstance(listed, list):
            self.config[key] = old  # for `lists` to put in order
        if old == pattern:
            self.warnings.append(
                f"config.json lists {key}, because the layers no longer follow the pattern of {show(kind)}: programs "
                "that take the pattern for granted (llama.cpp, old servers) would run this model wrongly"
            )

    def lists(self) -> None:
        """What has an entry for each layer.

        Raises:
            FitError: a list that is not known and has as many entries as there are layers.
        """
        for key, value in self.config.items():
            if not isinstance(value, list) and not (key == "hybrid_override_pattern" and isinstance(value, str)):
                continue
            if key in LISTS and len(value) == self.count:
                self._note(value)
                new = [value[number] for number in self.order]
                self.config[key] = "".join(new) if isinstance(value, str) else new
            elif key in LISTS:
                raise FitError(f"config.json has {len(value)} {key} for {self.count} layers")
            elif len(value) == self.count > 3 and key not in (*OTHER_LISTS, *NUMBERS):
                raise FitError(
                    f"config.json has {self.count} values of '{show(key)}': whether there is one for each layer is not known"
                )
        if isinstance(self.config.get("attention_types"), list) and isinstance(
            names := self.config.get("attention_layers"), list
        ):
            self.config["attention_types"] = [[[name], 1] for name in names]  # GPT-Neo's short form of the same
        elif isinstance(types := self.config.get("attention_types"), list):
            names = [name for entry in types for _ in range(entry[1]) for name in entry[0]]
            self._note(names)
            self.config["attention_types"] = [[[names[number]], 1] for number in self.order]
        types, kind = self.config.get("layer_types"), str(self.config.get("model_type"))
        if kind in LAST_IS_FULL and isinstance(types, list) and types[-1] != _FULL:
            raise FitError(
                f"the last layer would be one with a window, and {kind} makes it attend to everything",
                hint="end with a layer of full attention",
            )

    def numbers(self) -> None:
        """Lists of numbers of layers.

        Raises:
            FitError: a list of numbers that is not known, and by its name is one of layers.
        """
        known = (*LISTS, *NUMBERS, *OTHER_LISTS)
        for key, value in self.config.items():
            odd = isinstance(value, list) and value and all(type(one) is int for one in value) and key not in known
            if odd and OF_LAYERS.search(key) and not self._stays:
                raise FitError(f"config.json has a list '{show(key)}', and whether it is one of layers is not known")
        for key in NUMBERS:
            value = self.config.get(key)
            if isinstance(value, list) and key != "mlp_only_layers":
                self._note([number in value for number in range(self.count)])
                self.config[key] = [new for new, old in enumerate(self.order) if old in value]

    def settings(self) -> None:
        """What single layers have otherwise than the rest, by number (transformers 5).

        Raises:
            FitError: of a layer that is not there.
        """
        told = self.config.get("per_layer_config")
        if not isinstance(told, Mapping):
            return
        if not all(str(key).isdecimal() and int(key) < self.count for key in told):
            raise FitError(f"config.json has a per_layer_config for other layers than the {self.count} there are")
        own = {int(key): value for key, value in told.items()}
        self._note([own.get(number) for number in range(self.count)])
        width = len(str(len(self.order) - 1))
        self.config["per_layer_config"] = {
            f"{new:0{width}}": own[old] for new, old in enumerate(self.order) if old in own
        }

    def stages(self) -> None:
        """Names of the layers of a vision backbone, and which of them it gives out.

        Raises:
            FitError: others than the last.
        """
        told = {"out_features": [f"stage{self.count}"], "out_indices": [self.count]}
        if any(self.config.get(key) not in (None, last) for key, last in told.items()) and not self._stays:
            raise FitError("config.json names layers whose outputs are taken (out_features, out_indices)")
        count = len(self.order)
        made = {"out_features": [f"stage{count}"], "out_indices": [count]}
        self.config.update({key: value for key, value in made.items() if self.config.get(key) == told[key]})
        names = ["stem", *(f"stage{number + 1}" for number in range(self.count))]
        if self.config.get("stage_names") == names:
            self.config["stage_names"] = ["stem", *(f"stage{number + 1}" for number in range(count))]

    def rules(self) -> None:
        """Rules that go by the number of a layer."""
        self.config.update(self._windows_after())
        self._dense_first()
        self._sparse_step()
        for key in PERIODS:
            period = self.config.get(key)
            if type(period) is not int or period < 2:
                continue
            self._note([number % period for number in range(self.count)])
            if any(new % period != old % period for new, old in enumerate(self.order)):
                raise FitError(f"every {period}. layer is of another kind ({key}), which would no longer be true")
        for key in REFUSED:
            if self.config.get(key) and not self._stays:
                raise FitError(f"{key} of config.json ties layers to their places")
        if self.config.get("scale_attn_by_inverse_layer_idx") and any(n != o for n, o in enumerate(self.order)):
            raise FitError(
                "attention is scaled by the number of the layer (scale_attn_by_inverse_layer_idx), so that no layer can move",
                hint="drop layers at the end only",
            )

    def _note(self, values: Sequence[Any]) -> None:
        """What tells one old layer from another."""
        for role, value in zip(self.roles, values, strict=True):
            role.append(value)

    @property
    def _stays(self) -> bool:
        return self.order == tuple(range(self.count))

    def _windows_after(self) -> Mapping[str, int]:
        """Qwen2's layers have a window from this one on, if any has."""
        first = self.config.get("max_window_layers")
        return {"max_window_layers": sum(number < first for number in self.order)} if type(first) is int else {}

    def _dense_first(self) -> None:
        """DeepSeek's first layers have no experts."""
        first = self.config.get("first_k_dense_replace")
        if type(first) is not int or isinstance(self.config.get("mlp_layer_types"), list):
            return
        self._note([number < first for number in range(self.count)])
        dense = [old < first for old in self.order]
        if dense != sorted(dense, reverse=True):
            raise FitError("a layer without experts would stand behind one with experts (first_k_dense_replace)")
        self.config["first_k_dense_replace"] = sum(dense)

    def _sparse_step(self) -> None:
        """Qwen's layers without experts: those that are listed, and all but every n-th."""
        step, listed = self.config.get("decoder_sparse_step"), self.config.get("mlp_only_layers")
        if type(step) is not int and not isinstance(listed, list):
            return
        step, listed = step if type(step) is int and step > 0 else 1, listed if isinstance(listed, list) else []

        def dense(number: int) -> bool:
            return number in listed or (number + 1) % step != 0

        self._note([dense(number) for number in range(self.count)])
        if all(dense(new) == dense(old) for new, old in enumerate(self.order)):
            self.config["mlp_only_layers"] = [number for number in listed if number < len(self.order)]
            return
        self.config["decoder_sparse_step"] = 1
        self.config["mlp_only_layers"] = [new for new, old in enumerate(self.order) if dense(old)]


_Pattern = Callable[[Mapping[str, Any]], tuple[str, Callable[[int], Any]]]


def _every(default: int, *keys: str, other: str = _SLIDING, first: int = 1) -> _Pattern:
    """Every n-th layer attends to everything."""

    def pattern(config: Mapping[str, Any]) -> tuple[str, Callable[[int], Any]]:
        told = (value for key in keys if type(value := config.get(key)) is int and value > 0)
        period = next(told, default)
        return "layer_types", lambda number: other if (number + first) % period else _FULL

    return pattern


def _from_a_layer_on(config: Mapping[str, Any]) -> tuple[str, Callable[[int], Any]]:
    """Qwen's."""
    first = config.get("max_window_layers", 28)
    slides = bool(config.get("use_sliding_window")) and config.get("sliding_window", 4096) is not None
    return "layer_types", lambda number: _SLIDING if slides and number >= first else _FULL


def _up_to_a_layer(config: Mapping[str, Any]) -> tuple[str, Callable[[int], Any]]:
    """Qwen2-MoE's."""
    first = config.get("max_window_layers", 28)
    slides = bool(config.get("use_sliding_window"))
    return "layer_types", lambda number: _SLIDING if slides and (number + 1) % 2 and number < first else _FULL


def _with_and_without_positions(config: Mapping[str, Any]) -> tuple[str, Callable[[int], Any]]:
    """SmolLM3's."""
    period = config.get("no_rope_layer_interval", 4)
    return "no_rope_layers", lambda number: int((number + 1) % period != 0)


_PATTERNS: Mapping[str, _Pattern] = {
    "gemma2": _every(2),
    "gpt_oss": _every(2),
    "gemma3_text": _every(6, "sliding_window_pattern", "_sliding_window_pattern"),
    "cohere2": _every(4, "sliding_window_pattern"),
    "olmo3": _every(4),
    "modernbert": _every(3, "global_attn_every_n_layers", first=0),
    "qwen3_next": _every(4, "full_attention_interval", other="linear_attention"),
    "qwen2": _from_a_layer_on,
    "qwen2_moe": _up_to_a_layer,
    "qwen3": _from_a_layer_on,
    "smollm3": _with_and_without_positions,
}
"""Of types whose layers follow a pattern: the list that says it, and its entry for a layer."""
