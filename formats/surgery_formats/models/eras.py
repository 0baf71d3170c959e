# SPDX-License-Identifier: Apache-2.0
"""What transformers renames, merges, splits and turns between a checkpoint's names and those of the model's modules.

Adapters have the names of the modules, checkpoints those that ``save_pretrained`` writes, which are of the release that
first had the model. The records are data, ``eras.json``, written by ``tools/eras.py`` from transformers itself; here
they are read as transformers reads them: every rename in order, then at most one conversion.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.resources import files
from typing import Any

__all__ = [
    "Era",
    "Eras",
    "WeightConversion",
    "class_ties",
    "eras_of",
    "expert_counts",
    "experts_transposed",
    "is_known",
    "taken_for_experts",
]


@dataclass(frozen=True, slots=True)
class WeightConversion:
    """One record: spellings on disk, those of the modules, and what happens to the values.

    Attributes:
        patterns: Regular expressions of names on disk; the group ``expert`` is a number.
        targets: What replaces the match; several if one tensor on disk is several parameters.
        steps: Operations of transformers on the values with their arguments, in order; none of a rename.
        scope: Path of the model inside a composite that the record is about.
        prefix: Leading segment of the composite, which files may lack.
    """

    patterns: tuple[re.Pattern[str], ...]
    targets: tuple[str, ...]
    steps: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    scope: str | None = None
    prefix: str = ""

    @property
    def renames(self) -> bool:
        """Whether the values stay as they are."""
        return all(step in ("Offset", "Together") for step, _ in self.steps)

    @property
    def together(self) -> bool:
        """Whether it acts only where the first of its patterns is met, since its spellings overlap."""
        return any(step == "Together" for step, _ in self.steps)

    def match(self, name: str) -> tuple[str, int, re.Match[str]] | None:
        """``(what stands before the scope's names, number of the pattern, its match)``."""
        before = ""
        if self.scope is not None:
            scope, prefix = (f"{part}." if part else "" for part in (self.scope, self.prefix))
            before = prefix + scope if name.startswith(prefix + scope) else scope
            if not name.startswith(before):
                return None
        rest = name[len(before) :]
        found = [(m.start(), -len(p.pattern), i, m) for i, p in enumerate(self.patterns) if (m := p.search(rest))]
        if not found:
            return None
        _, _, number, match = min(found, key=lambda entry: entry[:3])
        return before, number, match

    def renamed(self, name: str) -> str:
        """`name` with the match replaced, for a record that only renames."""
        return replaced[0] if (replaced := self.replaced(name)) else name

    def replaced(self, name: str) -> tuple[str, ...]:
        """`name` with the match replaced by every target; empty if there is no match."""
        if (found := self.match(name)) is None:
            return ()
        before, number, match = found
        rest = name[len(before) :]
        targets = (self.targets[number],) if self.together else self.targets
        offset = next((int(given["offset"]) for step, given in self.steps if step == "Offset"), 0)

        def group(at: re.Match[str]) -> str:
            value = match.group(int(at[1])) or ""
            return str(int(value) + offset) if offset else value

        filled = (re.sub(r"\\(\d)", group, target) for target in targets)
        return tuple(before + rest.replace(match.group(0), target, 1) for target in filled)


@dataclass(frozen=True, slots=True)
class Era:
    """A parameter of the model's code, and the weights of the checkpoint that make it.

    Attributes:
        stored: Names on disk by ``(number of the pattern, number of the expert or -1)``.
        conversion: What is done to them; None if the name alone differs.
        part: Which of the conversion's targets this is.
    """

    stored: Mapping[tuple[int, int], str]
    conversion: WeightConversion | None = None
    part: int = 0


@dataclass(frozen=True)
class Eras:
    """The names of a checkpoint as the model's code has them.

    Attributes:
        names: Names on disk.
        conversions: Records of the type, of its parts too.
    """

    names: frozenset[str]
    conversions: tuple[WeightConversion, ...]

    @cached_property
    def _renames(self) -> tuple[WeightConversion, ...]:
        """Records that rename; those that act together only if the checkpoint has the first of their spellings."""
        return tuple(
            entry
            for entry in self.conversions
            if entry.renames
            and (not entry.together or any(found[1] == 0 for name in self.names if (found := entry.match(name))))
        )

    @cached_property
    def _converters(self) -> tuple[WeightConversion, ...]:
        return tuple(entry for entry in self.conversions if not entry.renames)

    def renamed(self, name: str) -> str:
        """A name on disk, or of an older release, after every rename."""
        for entry in self._renames:
            name = entry.renamed(name)
        return name

    def converted(self, renamed: str) -> tuple[WeightConversion, int, int, tuple[str, ...]] | None:
        """``(conversion, number of the pattern, of the expert or -1, names of the parameters)`` of a renamed name."""
        for entry in self._converters:
            if found := entry.match(renamed):
                _, number, match = found
                expert = match.groupdict().get("expert")
                return entry, number, -1 if expert is None else int(expert), entry.replaced(renamed)
        return None

    @cached_property
    def renamings(self) -> dict[str, str]:
        """``{name after every rename: name on disk}``; names that several become are left out."""
        found: dict[str, list[str]] = {}
        for name in sorted(self.names):
            found.setdefault(self.renamed(name), []).append(name)
        return {renamed: names[0] for renamed, names in found.items() if len(names) == 1}

    @cached_property
    def parameters(self) -> dict[str, Era]:
        """``{name in the model's code: what makes it}``, where that is not the weight of the same name."""
        found: dict[str, Era] = {}
        for renamed, name in self.renamings.items():
            if (converted := self.converted(renamed)) is None:
                if renamed != name:
                    found[renamed] = Era({(0, -1): name})
                continue
            entry, number, expert, targets = converted
            for part, target in enumerate(targets):
                known = found.setdefault(target, Era({}, entry, part))
                if known.conversion is entry and known.part == part:
                    found[target] = replace(known, stored={**known.stored, (number, expert): name})
        return found

    def live(self, name: str) -> str:
        """The name in the model's code of a weight on disk; of a part of one, that of the first whole it belongs to."""
        renamed = self.renamed(name)
        converted = self.converted(renamed)
        return renamed if converted is None else converted[3][0]


@cache
def _data() -> dict[str, Any]:
    text = files("surgery_formats.models").joinpath("eras.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data


@cache
def _records(name: str) -> tuple[WeightConversion, ...]:
    entries = _data()["records"].get(name, [])
    if isinstance(entries, str):
        return _records(entries)
    return tuple(
        WeightConversion(
            tuple(re.compile(pattern) for pattern in patterns),
            tuple(targets),
            tuple((step, given) for step, given in steps),
        )
        for patterns, targets, steps in entries
    )


def eras_of(config: Mapping[str, Any], names: frozenset[str]) -> Eras:
    """The records for a checkpoint with this configuration: of its class or type, then of the models inside it."""
    architectures = config.get("architectures")
    kind = str(architectures[0]) if isinstance(architectures, Sequence) and architectures else ""
    found = [*_of(config, kind)]
    model_type = str(config.get("model_type", ""))
    prefix = _data()["bases"].get(model_type, ["", ""])[1]
    seen = {kind, model_type}
    for path, part, made in _parts(config, kind, model_type, prefix):
        own = _records(made) if made not in seen else ()
        own = own or (() if part in seen else _records(part))
        seen |= {made, part}
        scope = path.removeprefix(prefix).removeprefix(".")
        found += [replace(entry, scope=scope, prefix=prefix) for entry in own]
    return Eras(names, tuple(found))


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether transformers knows the model type, so that the records tell all that it renames and converts."""
    data = _data()
    own = str(config.get("model_type"))
    return own in data["bases"] or own in data["records"]


def experts_transposed(config: Mapping[str, Any]) -> bool | None:
    """Whether the type's experts are ``(E, in, out)``; None of a type that transformers does not know."""
    if not is_known(config):
        return None
    data, own = _data(), str(config.get("model_type"))
    parts = (str(part.get("model_type")) for part in config.values() if isinstance(part, Mapping))
    return any(kind in data["transposed"] for kind in (own, *parts))


def taken_for_experts(config: Mapping[str, Any]) -> frozenset[str]:
    """Last segments of modules that PEFT takes for experts of an older release in a model of this type.

    It does so wherever they stand, in a dense layer too, and then attaches nothing there (PEFT 0.21,
    ``_convert_peft_config_moe``). A LoRA on the module's parameter is left alone.
    """
    return frozenset(_data()["taken_for_experts"].get(str(config.get("model_type")), ()))


def class_ties(config: Mapping[str, Any]) -> dict[str, str]:
    """``{parameter that is another: that other}`` of the class in `config`, by the names of the model's code."""
    architectures = config.get("architectures")
    kind = architectures[0] if isinstance(architectures, Sequence) and architectures else ""
    ties: dict[str, str] = _data()["ties"].get(str(kind), {})
    return ties


def expert_counts(config: Mapping[str, Any]) -> frozenset[int]:
    """How many experts a layer has, by every name that configurations have for it."""
    parts = (config, *(part for part in config.values() if isinstance(part, Mapping)))
    return frozenset(
        value
        for part in parts
        for key, value in part.items()
        if "experts" in key and "per_tok" not in key and "shared" not in key
        if isinstance(value, int) and not isinstance(value, bool) and value > 1
    )


def _of(config: Mapping[str, Any], kind: str) -> tuple[WeightConversion, ...]:
    return _records(kind) or _records(str(config.get("model_type", "")))


def _parts(config: Mapping[str, Any], kind: str, model_type: str, prefix: str) -> Iterator[tuple[str, str, str]]:
    """``(path, model type, class)`` of every model inside a composite, or of the bare model below its head."""
    data = _data()
    paths = data["architectures"].get(kind)
    if paths is None:
        made = data["bases"].get(model_type, ["", ""])[0]
        if prefix and kind != made:
            yield prefix, model_type, made
        return
    for path, key, *classes in paths:
        own = config if not key else config.get(key)
        part = str(own.get("model_type", "")) if isinstance(own, Mapping) else key
        yield path, part, classes[0] if classes else data["bases"].get(part, ["", ""])[0]
