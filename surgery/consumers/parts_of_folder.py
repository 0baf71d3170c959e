# SPDX-License-Identifier: Apache-2.0
"""The parts of a PEFT folder beside its updates: fields of the configuration, names of tensors, files."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace

from surgery.consumers.part import AdapterPart
from surgery.consumers.parts_of_updates import vocabulary_rows
from surgery.consumers.peft_defaults import DEFAULT_TARGETS, WITH_DEFAULTS
from surgery_formats.adapters.contents import contents_of
from surgery_formats.adapters.peft.disagreements import beyond_targets, chooses_none, empty_saved, unusable_targets
from surgery_formats.adapters.peft.keys import PREFIX, ROOT, bared
from surgery_formats.adapters.peft.kinds import switches
from surgery_formats.adapters.peft.read_config import PeftConfig, parse_config
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.errors import FitError, InputError
from surgery_formats.files.bounded_json import read_object
from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["parts_of_folder"]

_IN_MEMORY = re.compile(
    r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\.(?!weight$|bias$)\w+(\.weight|\.bias)?$"
)
_ALL = frozenset(["all-linear", "all"])
_PREFIXES = frozenset(PREFIX.split("."))


def parts_of_folder(adapter: Adapter, base: Checkpoint) -> Iterator[AdapterPart]:
    """What a PEFT folder has beside its updates that a program may treat in a way of its own."""
    yield from _fields(adapter)
    yield from _names(adapter)
    yield from _added_tokens(adapter, base)
    yield from _files(adapter)
    yield from _contradictions(adapter, base)


def _fields(adapter: Adapter) -> Iterator[AdapterPart]:
    """What the configuration sets."""
    targets = adapter.config.get("target_modules")
    if isinstance(targets, str) and targets not in _ALL:
        yield AdapterPart("target_modules", "pattern of targets")
    for name in ("rank_pattern", "alpha_pattern"):
        if adapter.kind == "LORA" and name in adapter.config and adapter.config[name] is None:
            yield AdapterPart(name, "null patterns")
    if adapter.config.get("use_bdlora"):
        yield AdapterPart("use_bdlora", "block-diagonal factors")
    if adapter.config.get("target_parameters"):
        yield AdapterPart("target_parameters", "targeted parameters")


def _contradictions(adapter: Adapter, base: Checkpoint) -> Iterator[AdapterPart]:
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
    whole, trained, rows = set[str](), set[str](), False
    for site, chain in adapter.updates.items():
        held = [contents_of(update) for update in chain]
        rows = rows or any(one.rows is not None for one in held)
        if all(one.whole is not None for one in held):
            whole.add(site.path)
        elif any(one.rows is None for one in held):
            trained.add(site.path.removesuffix(".weight").removesuffix(".bias"))
    written = any(tensor.name.startswith(PREFIX) and bared(tensor.name) == tensor.name for tensor in adapter.tensors)
    config, chosen = _with_targets(config, base)
    exact = written or not isinstance(config.raw.get("target_modules"), str)  # a pattern is one on paths of PEFT's
    if exact:
        yield from (AdapterPart(path, "beyond the targets") for path in sorted(beyond_targets(config, trained)))
    unusable = unusable_targets(config)
    if not chosen or (not unusable and exact and all(chooses_none(config, some) for some in (trained, _modules(base)))):
        unusable = ["target_modules"]
    yield from (AdapterPart(name, "unusable targets") for name in unusable)
    yield from (AdapterPart(name, "promised modules") for name in empty_saved(config, trained, whole))
    if fields.get("trainable_token_indices") and not rows:
        yield AdapterPart("trainable_token_indices", "promised modules")


def _with_targets(config: PeftConfig, base: Checkpoint) -> tuple[PeftConfig, bool]:
    """The configuration with the targets that PEFT chooses where it has none; false if it finds none to choose."""
    model_type = next(iter(base.components.values())).config.get("model_type")
    if config.raw.get("target_modules") is not None or config.kind not in WITH_DEFAULTS or model_type is None:
        return config, True
    targets = DEFAULT_TARGETS.get(model_type)
    if targets is None:
        return config, bool(config.target_parameters) and config.kind == "LORA"
    raw = {**config.raw, "target_modules": targets if isinstance(targets, str) else [*targets]}
    return replace(config, raw=raw), True


def _modules(base: Checkpoint) -> Iterator[str]:
    """Paths of the base's modules, as its file has them and as its class does."""
    for component in base.components.values():
        live = component.names.eras.live
        for name in component.parameters:
            yield from (path.rpartition(".")[0] for path in {name, live(name)})


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
    """Tokens beyond the base's vocabulary."""
    file = adapter.path / "added_tokens.json"
    rows = vocabulary_rows(base)
    if rows is None or not file.is_file():
        return
    with contextlib.suppress(InputError, FitError):
        numbers = [number for number in read_object(file).values() if isinstance(number, int)]
        if any(number >= rows for number in numbers):
            yield AdapterPart(file.name, "added tokens")


def _files(adapter: Adapter) -> Iterator[AdapterPart]:
    """Files of weights that are not the one that PEFT writes today."""
    for name in sorted({file.path.name for file in adapter.files}):
        if name == "adapter_model.bin":
            yield AdapterPart(name, "pickled weights")
        elif name != "adapter_model.safetensors":
            yield AdapterPart(name, "other weight files")
