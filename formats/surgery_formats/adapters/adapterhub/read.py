# SPDX-License-Identifier: Apache-2.0
"""Read a folder of AdapterHub's library (docs/formats.md) into the canonical form.

Keys are ``MODULE.CONTAINER.NAME.PART``, with the adapter's name inside. A module of a container other than ``loras`` is one more
module of the network, whose answer no weight of the base can give: it is kept, shown, and refused by what merges.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from surgery_formats.adapters.adapterhub.config import HubConfig, read_hub_config
from surgery_formats.adapters.adapterhub.files import CONFIG_FILE, HEAD_CONFIG, HEAD_FILES, WEIGHT_FILES
from surgery_formats.adapters.adapterhub.lora import LoRAModule, updates_of
from surgery_formats.canonical.adapter import Adapter, Ignored, Site
from surgery_formats.containers.base import Shard
from surgery_formats.containers.weight_files import open_shard
from surgery_formats.errors import MalformedError, NotFoundError
from surgery_formats.files.raw import stays_inside
from surgery_formats.tensors.tensor import StoredTensor, Tensor
from surgery_formats.updates import Factor, Replacement, Unmerged, Update

__all__ = ["INSERTED", "inserted_module", "read_adapterhub"]

_BEHIND = "the library puts them behind the embeddings, with their positions and norm, where no other program has virtual tokens"
INSERTED: Mapping[str, tuple[str, str]] = {
    "adapters": ("bottleneck adapter", "a network of its own behind a layer, with an activation inside"),
    "shared_parameters": ("shared factors", "a part of several bottleneck adapters"),
    "invertible_adapters": ("invertible adapter", "a network of its own behind the embeddings"),
    "prefix_tunings": (
        "prefix",
        "keys and values in front of every layer's, beside which tokens keep the positions they had without it",
    ),
    "prefix_gates": ("gate of a prefix", "it weighs the prefix anew for every input"),
    "prompt_tunings": ("prompt", f"virtual tokens: {_BEHIND}"),
    "refts": ("ReFT", "it changes what a layer gives at some positions of the text"),
}
"""Containers of modules that are inserted: what they are, and why no weight can hold them."""
_LEGACY = {
    "attention_text_task_adapters": "adapters",
    "attention_text_lang_adapters": "adapters",
    "layer_text_task_adapters": "adapters",
    "layer_text_lang_adapters": "adapters",
    "invertible_lang_adapters": "invertible_adapters",
}
"""Containers by their names before adapter-transformers 2 (``AdapterLoader.legacy_weights_mapping``)."""
_CONTAINERS = "|".join(("loras", *INSERTED, *_LEGACY))
_KEEP = "load it with the library adapters, beside the base: only a LoRA, a DoRA or an (IA)^3 becomes a part of weights"

_INSERT = (
    "`surgery export-onnx BASE ADAPTER` inserts it into a graph, and the library adapters runs it beside the base: only a "
    "LoRA, a DoRA or an (IA)^3 becomes a part of weights"
)
_FOR_GRAPHS = ("adapters", "shared_parameters", "invertible_adapters")
"""Containers of modules that a graph can hold (`inserted.py`)."""

_UNION = ". `without=` leaves a part out, and merges the rest"


def read_adapterhub(path: Path) -> Adapter:
    """Read a folder with adapter_config.json and pytorch_adapter.bin or adapter.safetensors, and its head if it has one.

    Raises:
        NotFoundError: no weights.
        MalformedError: the configuration or a key is not the library's.
        FitError: tensors and configuration contradict each other.
    """
    config = read_hub_config(path / CONFIG_FILE)
    shard = _opened(path, WEIGHT_FILES)
    if shard is None:
        raise NotFoundError(f"neither {' nor '.join(WEIGHT_FILES)}", file=path)
    loras: dict[str, dict[str, StoredTensor]] = {}
    shared: dict[str, dict[str, StoredTensor]] = {}
    inserted: dict[tuple[str, str], dict[str, StoredTensor]] = {}
    ignored: list[Ignored] = []
    seen: dict[tuple[object, ...], str] = {}
    key = re.compile(rf"(?:(.+)\.)?({_CONTAINERS})\.{re.escape(config.name)}\.(.+)")
    for tensor in sorted(shard.tensors, key=lambda tensor: (".pool." in tensor.name, tensor.name)):
        found = key.fullmatch(tensor.name)
        if found is None:
            raise MalformedError(
                f"not a key of the adapter '{config.name}'", file=shard.path, tensor=tensor.name,
                hint="the name in adapter_config.json is the one in the keys",
            )  # fmt: skip
        module, container, part = found[1] or "", _LEGACY.get(found[2], found[2]), found[3]
        if container == "loras":
            loras.setdefault(module, {})[part] = tensor
        elif container == "shared_parameters":
            shared.setdefault(module, {})[part] = tensor
        elif ".pool." in tensor.name and seen.get((*tensor.place, part)):
            ignored.append(Ignored(tensor, f"the same numbers as '{seen[(*tensor.place, part)]}'"))
        else:
            seen[(*tensor.place, part)] = tensor.name
            inserted.setdefault((module, container), {})[part] = tensor
    updates: dict[Site, tuple[Update, ...]] = {}
    optional: set[Site] = set()
    for path_of, parts in loras.items():
        weight, bias = updates_of(LoRAModule(path_of, parts, next(iter(shared.values()), {})), config)
        updates[Site(f"{path_of}.weight", module_kind="linear")] = (weight,)
        if bias is not None:
            site = Site(f"{path_of}.bias", module_kind="linear")
            updates[site] = (bias,)
            optional.add(site)
    if shared and not any("vera_D" in parts for parts in loras.values()):
        inserted |= {(module, "shared_parameters"): parts for module, parts in shared.items()}
    for (module, container), parts in inserted.items():
        site = Site(f"{module}.{container}.weight" if module else f"{container}.weight")
        updates[site] = (inserted_module(container, parts, beside=bool(loras)),)
    return _with_head(path, config, shard, updates, tuple(ignored), frozenset(optional))


def inserted_module(container: str, parts: Mapping[str, Tensor], *, beside: bool = False) -> Unmerged:
    """A module of a container of `INSERTED`, of its tensors by what follows the adapter's name in their keys.

    Args:
        container: Its name.
        parts: The tensors.
        beside: Whether the adapter has LoRAs too.
    """
    kind, why = INSERTED[container]
    held = tuple((name, Factor.of(tensor)) for name, tensor in sorted(parts.items()))
    instead = _INSERT if container in _FOR_GRAPHS else _KEEP
    return Unmerged(kind, held, why, instead + (_UNION if beside else ""))


def _with_head(
    path: Path,
    config: HubConfig,
    shard: Shard,
    updates: dict[Site, tuple[Update, ...]],
    ignored: tuple[Ignored, ...],
    optional: frozenset[Site],
) -> Adapter:
    """The adapter, with the prediction head that lies beside it.

    A head of transformers' own classes is parameters trained in full. One of the library's classes goes along as files.
    """
    shard_of_head = _opened(path, HEAD_FILES)
    head = shard_of_head.tensors if shard_of_head else ()
    flexible = shard_of_head if any(tensor.name.startswith("heads.") for tensor in head) else None
    static = () if flexible else head
    updates |= {Site(tensor.name): (Replacement(Factor.of(tensor), "copy"),) for tensor in static}
    carried = () if flexible is None else _files_of_head(path, flexible)
    said = (
        (f"'{carried[0].name}' is a head of the library's own model classes: it goes along as a file",)
        if carried
        else ()
    )
    base = config.raw.get("model_name")
    return Adapter(
        path=path,
        format="adapterhub",
        kind=config.kind,
        updates=dict(sorted(updates.items())),
        tensors=(*shard.tensors, *static),
        ignored=ignored,
        new_modules=frozenset(tensor.name.partition(".")[0] for tensor in static),
        base_name=base if isinstance(base, str) else "",
        base_id=shard.metadata.get("surgery.base", ""),
        config=config.raw,
        metadata=dict(shard.metadata),
        side_files=carried,
        stated_issues=(*config.issues, *said),
        optional=optional,
    )


def _opened(path: Path, names: tuple[str, ...]) -> Shard | None:
    return next((open_shard(path / name) for name in names if (path / name).is_file()), None)


def _files_of_head(path: Path, weights: Shard) -> tuple[Path, ...]:
    """The files of a head; its configuration names its layers.

    Raises:
        MalformedError: other tensors among them.
    """
    for tensor in weights.tensors:
        if not tensor.name.startswith("heads."):
            raise MalformedError("not of a head, as the others are", file=weights.path, tensor=tensor.name)
    return tuple(file for file in (weights.path, path / HEAD_CONFIG) if file.is_file() and stays_inside(file))
