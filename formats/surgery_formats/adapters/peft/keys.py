# SPDX-License-Identifier: Apache-2.0
"""The keys of a PEFT file: factors of modules, parameters stored whole, and tensors without effect."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from functools import lru_cache

from surgery_formats.canonical.adapter import Ignored
from surgery_formats.errors import MalformedError
from surgery_formats.tensors.tensor import StoredTensor

__all__ = [
    "HEADS",
    "INSIDE_ATTENTION",
    "PREFIX",
    "ROOT",
    "WEIGHTS",
    "WRAPPERS",
    "Sorted",
    "ancestors",
    "bare_pattern",
    "bared",
    "path_ends",
    "sort_tensors",
    "unwrapped",
]

WEIGHTS = "adapter_model"
"""What the names of its weight files begin with."""
ROOT = "base_model."
"""What the names of tensors of the whole adapter begin with, and those beside a soft prompt."""
PREFIX = f"{ROOT}model."
"""What the names of a module's tensors begin with."""
HEADS = frozenset(("score", "classifier", "qa_outputs"))  # added by PEFT itself for classification tasks
INSIDE_ATTENTION = ".base_layer.out_proj"
"""Where PEFT holds the output projection of a ``torch.nn.MultiheadAttention`` that it wrapped."""
_SAVED = "modules_to_save"
WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
"""Segments that torch.compile, FSDP and activation checkpointing put into paths, wherever they wrap a module."""
_PARALLEL = "module"
"""The segment of DataParallel and DistributedDataParallel, which wrap a whole model: inside one it is a name."""


@dataclass(frozen=True, slots=True)
class Sorted:
    """A file's tensors, each in one place.

    Attributes:
        modules: Factors by their module's path, then by name.
        plain: Parameters stored whole, by their own path.
        shared: Tensors of the whole adapter, by name.
        ignored: Tensors that have no effect and are meant to have none.
        wrappers: What programs of training had put around the keys' paths, and is left out.
    """

    modules: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)
    plain: dict[str, StoredTensor] = field(default_factory=dict)
    shared: dict[str, StoredTensor] = field(default_factory=dict)
    ignored: list[Ignored] = field(default_factory=list)
    wrappers: set[str] = field(default_factory=set)


def sort_tensors(
    tensors: Iterable[StoredTensor],
    factors: Set[str],
    shared: Set[str] = frozenset(),
    prefix: str = PREFIX,
    unused: Mapping[str, str] | None = None,
) -> Sorted:
    """Group factors by module; everything else is a parameter stored whole.

    Args:
        tensors: Of the file.
        factors: Names of factors after the module's path, as ``lora_A.weight``.
        shared: Names, after ``base_model.``, of tensors that belong to no module; see `PeftKind`.
        prefix: What the paths of parameters begin with.
        unused: Names after a module's path of tensors that do nothing, and why.

    Raises:
        MalformedError: a factor or parameter is stored twice.
    """
    contents, unused = Sorted(), unused or {}
    for tensor in tensors:
        key = bared(tensor.name, contents.wrappers)
        rest = key.removeprefix(ROOT)
        general = rest.partition(".")[0]
        if general in shared or f"{general}." in shared:
            _once(contents.shared, general if general in shared else rest, tensor, f"'{general}' twice")
            continue
        if why := next((unused[part] for part in rest.split(".") if part in unused), ""):
            contents.ignored.append(Ignored(tensor, why))
            continue
        name = key.removeprefix(prefix)
        module, factor = _split(name, factors)
        if factor:
            _once(contents.modules.setdefault(module, {}), factor, tensor, f"'{factor}' twice for module '{module}'")
        elif ".original_module." in name:
            contents.ignored.append(Ignored(tensor, "the base's own copy of a module trained in full"))
        else:
            _whole(name, tensor, contents)
    return contents


def bared(key: str, found: set[str] | None = None) -> str:
    """The key without the segments of wrappers: PEFT's prefix stands at its head, and there once.

    Args:
        key: Of a tensor.
        found: To which wrappers are added.
    """
    found = set() if found is None else found
    segments = key.split(".")
    found.update(WRAPPERS.intersection(segments))
    kept = [segment for segment in segments if segment not in WRAPPERS]
    head = PREFIX.strip(".").split(".")
    starts = [i for i in range(len(kept) - 2) if kept[i : i + 2] == head]
    if starts and starts[-1]:
        found.add(".".join(kept[: starts[-1]]))
        kept = kept[starts[-1] :]
    for first in (0, len(head)):  # around what PEFT wrapped, or inside it
        while kept[first : first + 1] == [_PARALLEL] and len(kept) > first + 2 and (first == 0 or kept[:2] == head):
            found.add(_PARALLEL)
            del kept[first]
    return ".".join(kept)


@lru_cache(maxsize=1024)
def bare_pattern(pattern: str) -> str:
    """A pattern on paths, or their ends, without the segments of wrappers."""
    return re.sub(rf"({'|'.join(sorted(WRAPPERS))})\\?\.", "", pattern)


def path_ends(path: str) -> list[str]:
    """``c``, ``b.c`` and ``a.b.c`` of ``a.b.c``."""
    segments = path.split(".")
    return [".".join(segments[start:]) for start in range(len(segments))]


def _once(where: dict[str, StoredTensor], key: str, tensor: StoredTensor, twice: str) -> None:
    if key in where:
        raise MalformedError(twice, file=tensor.file.path, tensor=tensor.name)
    where[key] = tensor


def _whole(name: str, tensor: StoredTensor, contents: Sorted) -> None:
    """PEFT trains the copy under modules_to_save, and stores the module it was copied from too."""
    clean = _whole_parameter(name)
    saved = f".{_SAVED}." in name
    twin = contents.plain.get(clean)
    if twin is not None and saved == (f".{_SAVED}." in twin.name):
        raise MalformedError(f"'{clean}' twice", file=tensor.file.path, tensor=tensor.name)
    if twin is not None:
        contents.ignored.append(Ignored(twin if saved else tensor, "the copy in modules_to_save takes its place"))
    if twin is None or saved:
        contents.plain[clean] = tensor


def unwrapped(module: str) -> str:
    """The module's own path, without PEFT's nested wrappers."""
    return ".".join(segment for segment in module.split(".") if segment != "base_layer")


def ancestors(module: str) -> list[str]:
    """The module and all modules that contain it.

    PEFT matches the ends of such paths, so ``norm`` matches ``input_layernorm`` too.
    """
    segments = module.split(".")
    return [".".join(segments[: i + 1]) for i in range(len(segments))]


def _whole_parameter(name: str) -> str:
    """The parameter's own name, without PEFT's wrappers and without the adapter's name."""
    segments = [segment for segment in name.split(".") if segment not in ("base_layer", "token_adapter")]
    if _SAVED in segments:
        at = segments.index(_SAVED)
        segments = segments[:at] + segments[at + (2 if len(segments) - at > 2 else 1) :]
    return ".".join(segments)


def _split(name: str, factors: Set[str]) -> tuple[str, str]:
    """``(module, factor)``; the factor is empty for a plain parameter. An adapter's name inside the key is dropped."""
    segments = name.split(".")
    roots = {factor.partition(".")[0] for factor in factors}
    for position in range(len(segments) - 1, max(len(segments) - 4, -1), -1):
        root = segments[position]
        if root not in roots:
            continue
        module, tail = segments[:position], segments[position + 1 :]
        if root == "trainable_tokens_delta":
            return ".".join(module[:-1] if module[-1:] == ["token_adapter"] else module), "tokens"
        if (exact := ".".join((root, *tail))) in factors:
            return ".".join(module), exact
        whole = f"{root}.{tail[-1]}" if tail else root
        return ".".join(module), whole if whole in factors else root
    return "", ""
