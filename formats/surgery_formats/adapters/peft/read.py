# SPDX-License-Identifier: Apache-2.0
"""Read a PEFT folder (docs/peft.md) into the canonical form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from surgery_formats.adapters.peft.beside import Beside, weights_beside
from surgery_formats.adapters.peft.carried import held_by_config, stored_transposed, task_of
from surgery_formats.adapters.peft.disagreements import stated_disagreements, unmet_promises
from surgery_formats.adapters.peft.keys import (
    HEADS,
    PREFIX,
    ROOT,
    WEIGHTS,
    Sorted,
    ancestors,
    sort_tensors,
    unwrapped,
)
from surgery_formats.adapters.peft.kinds import kinds, switches
from surgery_formats.adapters.peft.kinds.kind import Module
from surgery_formats.adapters.peft.kinds.tokens import check_copies
from surgery_formats.adapters.peft.known_issues import issues_by_value, torchtune_issues
from surgery_formats.adapters.peft.parameters import wrappers_of
from surgery_formats.adapters.peft.prompt import PROMPTS, read_prompt
from surgery_formats.adapters.peft.read_config import CONFIG_FILE, PeftConfig, parse_config
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.canonical.ungathered import UNGATHERED, is_ungathered
from surgery_formats.containers.base import Shard
from surgery_formats.containers.sharded import open_folder_tensors
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.files.bounded_json import read_object
from surgery_formats.models.sets_beside import sets_beside
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import listing
from surgery_formats.updates import Factor, Replacement, Update, is_replacing

__all__ = ["is_embedding_weight", "read_peft", "read_tensors"]

_EMBEDDINGS = frozenset(
    [
        "embed_tokens",
        "lm_head",
        "wte",
        "embed_in",
        "embed_out",
        "word_embeddings",
        "shared",
        "embedding",
        "embeddings",
        "decoder",
        "output_projection",
    ]
)  # modules whose whole weight PEFT stores when the vocabulary was resized


def read_peft(path: Path, alpha: float | None = None) -> Adapter:
    """Read a folder with adapter_config.json and adapter_model.safetensors (or .bin).

    Args:
        path: Of the folder.
        alpha: As it was given, which has to be the configuration's.

    Raises:
        NotFoundError: no weights.
        MalformedError: the configuration or a key is not PEFT's.
        FitError: a kind or a switch that no merged weight can express, or another alpha.
    """
    file = path / CONFIG_FILE
    config = parse_config(read_object(file), file, switches())
    if alpha not in (None, config.alpha):
        raise FitError(f"an alpha of {alpha:g} was given, {CONFIG_FILE} says {config.alpha:g}", file=path)
    opened = open_folder_tensors(path, (WEIGHTS,))
    beside = weights_beside(path, {shard.path for shard in opened.shards})
    metadata = _metadata(opened.shards)
    side_files = sorted([*beside.carried, *(p for s in sets_beside(path).values() for p in s.values())])
    adapter = read_tensors(path, config, tuple(opened.tensors.values()))
    whole = replace(adapter, metadata=metadata, base_id=metadata.get("surgery.base", ""), side_files=tuple(side_files))
    return _with_beside(whole, beside)


def read_tensors(path: Path, config: PeftConfig, tensors: Sequence[StoredTensor], *, around: str = "") -> Adapter:
    """What tensors mean by a configuration.

    Args:
        path: Of the adapter.
        config: Its configuration.
        tensors: All of its tensors.
        around: What stands in front of PEFT's prefix in their names and is no program's that wrapped the model.

    Raises:
        MalformedError, FitError: as `read_peft`.
    """
    whole = Adapter(
        path=path,
        format="peft",
        kind=config.kind,
        updates={},
        tensors=tuple(tensors),
        new_modules=frozenset(config.modules_to_save) | HEADS,
        base_name=_text(config.raw.get("base_model_name_or_path")),
        config=config.raw,
        task=task_of(config.raw),
        stored_transposed=stored_transposed(config.raw),
    )
    if config.kind in PROMPTS:
        return _soft_prompt(whole, tensors, config)
    kind = kinds()[config.kind]
    if why := kind.lacks(config):
        raise FitError(why, file=config.file)
    contents = sort_tensors(tensors, kind.factors, kind.shared, unused=kind.unused)
    contents.wrappers.discard(around)
    updates = _whole_parameters(contents, config)
    optional: set[Site] = set()
    wrappers = wrappers_of(contents.modules)
    _check_gathered(tensor for parts in contents.modules.values() for tensor in parts.values())
    for module, parts in contents.modules.items():
        read = kind.read(Module(unwrapped(module), module, parts, contents.shared, config, wrappers))
        for name in kind.ranks.keys() & parts.keys():
            config.check_rank(unwrapped(module), parts[name].shape[kind.ranks[name]], parts[name])
        optional |= read.optional
        contents.ignored.extend(read.ignored)
        for site, chain in read.updates.items():
            updates[site] = (*updates.pop(site, ()), *chain)  # under the site that knows its kind of module
    check_copies(updates, config)
    issues = (
        [] if contents.wrappers or around or _prefixed(tensors) else ["its keys lack PEFT's prefix 'base_model.model.'"]
    )
    exact = not issues
    if contents.wrappers:
        named = listing(f"'{name}'" for name in sorted(contents.wrappers))
        issues.append(f"its keys hold {named}, of programs that wrapped the model in training: left out of all paths")
    if empty := sorted(name for name, tensor in contents.plain.items() if is_ungathered(tensor)):
        issues.append(f"{listing(empty)}: shape [0]. {UNGATHERED}")
    issues += torchtune_issues(path, config.raw, (tensor.name for tensor in tensors))
    issues += stated_disagreements(config, kind.switches, contents.modules, contents.plain, exact=exact)
    return replace(
        whole,
        updates=dict(sorted(updates.items())),
        ignored=tuple(contents.ignored),
        optional=frozenset(optional),
        stated_issues=(*issues, *kind.issues(config.raw, tensors)),
        examine=partial(issues_by_value, config.kind, config.raw, tensors),
        unmet=partial(unmet_promises, config),
    )


def is_embedding_weight(name: str) -> bool:
    """Whether a parameter is one that PEFT stores whole when the vocabulary was resized."""
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and module.rpartition(".")[2] in _EMBEDDINGS


def _with_beside(adapter: Adapter, beside: Beside) -> Adapter:
    """The adapter with the parameters of other files of its folder, as if PEFT had saved them as modules of its own.

    Raises:
        MalformedError: PEFT's file has one of them too.
    """
    updates = dict(adapter.updates)
    for path, tensor in beside.parameters.items():
        site = Site(path)
        if any(is_replacing(update) for update in updates.get(site, ())):
            raise MalformedError(
                f"'{path}' is in the adapter's own file too", file=tensor.file.path, tensor=tensor.name
            )
        updates[site] = (Replacement(Factor.of(tensor), "copy"), *updates.get(site, ()))
    listed = adapter.config.get("modules_to_save") or []
    saved = {"modules_to_save": sorted({*listed, *beside.modules})} if beside.modules else {}
    return replace(
        adapter,
        updates=dict(sorted(updates.items())),
        tensors=(*adapter.tensors, *beside.parameters.values(), *beside.unknown),
        config={**adapter.config, **saved},
        stated_issues=(*adapter.stated_issues, *beside.issues),
    )


def _check_gathered(factors: Iterable[StoredTensor]) -> None:
    """Refuse factors that a training with ZeRO-3 did not gather before it saved them."""
    if empty := next((tensor for tensor in factors if is_ungathered(tensor)), None):
        raise MalformedError("a factor of shape [0]", file=empty.file.path, tensor=empty.name, hint=UNGATHERED)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _prefixed(tensors: Iterable[StoredTensor]) -> bool:
    names = [tensor.name for tensor in tensors]
    return not names or any(name.startswith(ROOT) for name in names)


def _metadata(shards: Iterable[Shard]) -> dict[str, str]:
    merged: dict[str, str] = {}
    for shard in shards:
        merged |= shard.metadata
    return merged


def _soft_prompt(adapter: Adapter, tensors: Sequence[StoredTensor], config: PeftConfig) -> Adapter:
    """Virtual tokens, and the parameters trained in full beside them."""
    prompt = read_prompt(tensors, config)
    beside = (tensor for tensor in tensors if tensor is not prompt.table)
    rest = sort_tensors(beside, frozenset(), prefix=ROOT)
    updates = dict(sorted(_whole_parameters(rest, config).items()))
    return replace(adapter, updates=updates, ignored=tuple(rest.ignored), prompt=prompt)


def _whole_parameters(contents: Sorted, config: PeftConfig) -> dict[Site, tuple[Update, ...]]:
    """Parameters that the file has in full.

    Raises:
        MalformedError: a tensor is not a parameter that PEFT stores whole.
    """
    updates: dict[Site, tuple[Update, ...]] = {}
    for name, tensor in contents.plain.items():
        _check_plain(name, tensor, config)
        updates[Site(name)] = (Replacement(Factor.of(tensor), held_by_config(name, config.raw)),)
    return updates


def _check_plain(name: str, tensor: StoredTensor, config: PeftConfig) -> None:
    module, _, leaf = name.rpartition(".")
    saved = any(ancestor.endswith(config.modules_to_save) for ancestor in ancestors(module))
    embedding = is_embedding_weight(name)
    bias = leaf == "bias" and (config.bias != "none")
    head = bool(HEADS & set(module.split("."))) and config.raw.get("task_type") in (
        "SEQ_CLS",
        "TOKEN_CLS",
        "QUESTION_ANS",
    )
    if not (saved or embedding or bias or head):
        raise MalformedError(
            "neither a factor of this kind nor a module the configuration lists",
            file=tensor.file.path,
            tensor=tensor.name,
            hint="is this a full model?" if not tensor.name.startswith(PREFIX) else None,
        )
