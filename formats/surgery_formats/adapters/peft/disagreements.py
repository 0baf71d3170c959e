# SPDX-License-Identifier: Apache-2.0
"""Where a PEFT configuration and the tensors beside it disagree.

PEFT loads such a folder with a warning at most: what its configuration promises and its file lacks stays as the base has
it, and what lies beyond its targets is left out. Each is a known issue, which names what it is about. A rank that is not
the configured one is no issue but an error (`PeftConfig.check_rank`): it leaves the scale open.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

from surgery_formats.adapters.peft.keys import HEADS, ancestors, bare_pattern, path_ends, unwrapped
from surgery_formats.adapters.peft.read_config import PeftConfig, Switches
from surgery_formats.text import listing, show

__all__ = [
    "NO_RANK",
    "beyond_targets",
    "chooses_none",
    "empty_saved",
    "stated_disagreements",
    "unmet_promises",
    "unusable_targets",
]


NO_RANK = "its configuration has no 'r': the tensors' rank is used"


def stated_disagreements(
    config: PeftConfig,
    switches: Switches,
    modules: Mapping[str, Collection[str]],
    plain: Collection[str],
    *,
    exact: bool = True,
) -> Iterator[str]:
    """What configuration and tensors show without a base.

    Args:
        config: The configuration.
        switches: Of its kind.
        modules: Names of the factors of each module, by its path as in the file's keys, with PEFT's wrappers.
        plain: Paths of the parameters stored whole.
        exact: Whether the paths are those that PEFT wrote: a pattern on whole paths says nothing about others.
    """
    trained = [module for module, parts in modules.items() if set(parts) != {"tokens"}]
    for name in unusable_targets(config):
        yield f"'{name}' is {show(repr(config.raw[name]), 40)}, which PEFT cannot use"
    yield from _numbers(config, switches, trained)
    yield from _targets(config, trained, plain, exact=exact)
    yield from _layers(config, trained)
    yield from _saved(config, trained, plain)


def unmet_promises(config: PeftConfig, parameters: Collection[str], changed: Collection[str]) -> tuple[str, ...]:
    """What the names of a base's parameters show besides: targets, saved modules and biases that stay as they are.

    Args:
        config: The configuration.
        parameters: Names of the base's parameters.
        changed: Those that the adapter changes.
    """
    found: list[str] = []
    left = [name for name in parameters if name not in changed and not _one_expert(name)]
    weights = [name.removesuffix(".weight") for name in left if name.endswith(".weight")]
    if missing := [module for module in weights if _selected(config, module) is True and not _is_saved(config, module)]:
        found.append(f"target_modules names {_some(missing)}, for which the file has nothing: they stay as in the base")
    touched = {name.rpartition(".")[0] for name in changed}
    promised = [name for name in left if name.endswith(".bias")] if config.bias != "none" else []
    if config.bias != "all":
        promised = [name for name in promised if name.rpartition(".")[0] in touched]
    if promised:
        found.append(f"bias is '{config.bias}', but the file lacks {_some(promised)}: they stay as in the base")
    partly = [name for name in config.modules_to_save if any(_saves(name, path) for path in changed)]
    kept = [path for path in left if any(_saves(name, path) for name in partly)]
    if kept:
        found.append(f"modules_to_save names {_some(kept)}, which the file lacks: they stay as in the base")
    return tuple(found)


def _numbers(config: PeftConfig, switches: Switches, trained: Collection[str]) -> Iterator[str]:
    if not trained:
        return
    if "r" in switches.understood and config.raw.get("r") is None:
        yield NO_RANK
    if switches.signed and switches.alpha in switches.understood and config.alpha < 0:
        yield f"'{switches.alpha}' is negative ({config.alpha:g}): what was trained is subtracted"
    if negative := [f"{key}: {alpha:g}" for key, alpha in config.alpha_pattern.items() if alpha < 0]:
        yield f"'alpha_pattern' is negative ({listing(negative)}): what was trained there is subtracted"


def _targets(config: PeftConfig, trained: Collection[str], plain: Collection[str], *, exact: bool) -> Iterator[str]:
    listed = config.raw.get("target_modules")
    if not trained or not isinstance(listed, list | str) or (isinstance(listed, str) and not exact):
        return
    paths = {path for module in trained for path in _names_of(module)}
    paths |= {path.rpartition(".")[0] for path in plain}
    if isinstance(listed, list):
        names = [name for name in listed if isinstance(name, str)]
        known = {end for path in paths for end in path_ends(path)}
        if empty := sorted(name for name in names if bare_pattern(name) not in known):
            yield f"target_modules names {_some(empty)}, for which the file has no tensors"
    if beyond := beyond_targets(config, trained):
        yield f"{_some(beyond)}: beyond the targets of its configuration, PEFT leaves them out"


def beyond_targets(config: PeftConfig, trained: Iterable[str]) -> list[str]:
    """Paths of modules with factors that the configuration does not choose; none where parameters are targets."""
    if config.target_parameters:  # of a module whose own name is no target
        return []
    return [
        unwrapped(module)
        for module in trained
        if not any(_selected(config, path) is not False for path in _names_of(module))
    ]


def chooses_none(config: PeftConfig, modules: Iterable[str]) -> bool:
    """Whether the configuration chooses none of a model's modules; false where parameters are targets."""
    return not config.target_parameters and all(_selected(config, module) is False for module in modules)


def unusable_targets(config: PeftConfig) -> list[str]:
    """Fields that choose modules and that PEFT cannot use: of a wrong type, or two that exclude each other.

    What is tried on each module's path is an error there (``check_target_module_exists``), the rest as LoRA's
    configuration is made (``LoraConfig.__post_init__``).
    """
    targets, excluded = config.raw.get("target_modules"), config.raw.get("exclude_modules")
    found = []
    listed = isinstance(targets, list | Mapping) and all(isinstance(name, str) for name in targets)
    if targets is not None and not isinstance(targets, str) and not listed:
        found.append("target_modules")
    if excluded and not isinstance(excluded, str | list | Mapping):
        found.append("exclude_modules")
    if config.kind != "LORA":
        return found
    layers, patterns = config.raw.get("layers_to_transform"), config.raw.get("layers_pattern")
    if layers is not None and (isinstance(targets, str) or isinstance(layers, str | float)):
        found.append("layers_to_transform")
    if patterns and (isinstance(targets, str) or layers is None or not isinstance(patterns, str | list | Mapping)):
        found.append("layers_pattern")
    return found


def _layers(config: PeftConfig, trained: Collection[str]) -> Iterator[str]:
    wanted, present = _wanted_layers(config), {_layer(config, unwrapped(module)) for module in trained}
    if trained and wanted is not None and (empty := sorted(wanted - present)):
        yield f"layers_to_transform names {_some(list(map(str, empty)))}, for which the file has no tensors"


def _saved(config: PeftConfig, trained: Collection[str], plain: Collection[str]) -> Iterator[str]:
    if empty := empty_saved(config, trained, plain):
        yield f"modules_to_save names {_some(empty)}, which the file lacks"


def empty_saved(config: PeftConfig, trained: Collection[str], plain: Collection[str]) -> list[str]:
    """Names in ``modules_to_save`` without a tensor. PEFT adds those of all heads of a task, of which a model has one."""
    modules = _modules_of(plain)
    empty = [name for name in config.modules_to_save if f"{name}\n" not in modules]
    heads = HEADS & set(config.modules_to_save)
    if heads and not heads <= set(empty):
        empty = [name for name in empty if name not in heads]
    modules = _modules_of(f"{unwrapped(path)}.weight" for path in trained)
    return [name for name in empty if f"{name}\n" not in modules]


def _names_of(module: str) -> set[str]:
    """Paths under which PEFT may have chosen a module: its own, and that of the module it is wrapped in."""
    return {unwrapped(module), unwrapped(module.partition(".base_layer")[0])}


def _selected(config: PeftConfig, module: str) -> bool | None:
    """Whether PEFT gives a module of this path factors (``check_target_module_exists``); None where it cannot be told."""
    targets, excluded = config.raw.get("target_modules"), config.raw.get("exclude_modules")
    if isinstance(excluded, str) and config.selects("exclude_modules", module):
        return False
    if config.lists("exclude_modules", module):
        return False
    if isinstance(targets, str):
        return None if targets == "all-linear" else config.selects("target_modules", module)
    if not isinstance(targets, list | Mapping):
        return None
    if not config.lists("target_modules", module):
        return False
    wanted = _wanted_layers(config)
    return wanted is None or _layer(config, module) in wanted


def _wanted_layers(config: PeftConfig) -> frozenset[float] | None:
    """Numbers of the layers in which modules are chosen; None for all."""
    listed: Any = config.raw.get("layers_to_transform")
    if listed is None or listed == [] or not isinstance(config.raw.get("target_modules"), list | Mapping):
        return None
    listed = listed if isinstance(listed, list) else [listed]
    return frozenset(number for number in listed if isinstance(number, int | float))


def _layer(config: PeftConfig, module: str) -> int:
    """The number of the layer that holds a module, the first of its path, or -1."""
    patterns: Any = config.raw.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns if isinstance(patterns, list | Mapping) else []
    segments = module.split(".")
    for position in range(1 if patterns else 2, len(segments) - 1):
        if segments[position].isdecimal() and (not patterns or segments[position - 1] in patterns):
            return int(segments[position])
    return -1


def _saves(name: str, path: str) -> bool:
    """Whether the module `name` of ``modules_to_save`` holds a parameter, as PEFT matches it."""
    return any(ancestor.endswith(name) for ancestor in ancestors(path.rpartition(".")[0]))


def _is_saved(config: PeftConfig, module: str) -> bool:
    return any(_saves(name, f"{module}.weight") for name in config.modules_to_save)


def _one_expert(name: str) -> bool:
    """A parameter of one expert: in memory transformers holds all experts in one, which no target names."""
    segments = name.split(".")
    return any(one == "experts" and other.isdecimal() for one, other in pairwise(segments))


def _modules_of(paths: Iterable[str]) -> str:
    """All modules that hold these parameters, a line each: one search tells whether any ends as a name."""
    return "".join(f"{module}\n" for module in {m for path in paths for m in ancestors(path.rpartition(".")[0])})


def _some(names: Iterable[str]) -> str:
    return listing([f"'{name}'" for name in names])
