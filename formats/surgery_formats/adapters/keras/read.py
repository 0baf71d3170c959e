# SPDX-License-Identifier: Apache-2.0
"""Read what KerasHub's ``Backbone.save_lora_weights`` wrote (KerasHub 0.18 to 0.32: ``models/backbone.py``; Keras 3.7 to 3.15).

``/lora/vars/rank``, and for each layer ``/lora/N/vars/lora_kernel_a`` and ``lora_kernel_b``: N counts the backbone's layers that have
weights, so that only its configuration tells which layer it is. KerasHub gives no alpha, and Keras then adds ``A @ B`` as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery_formats.adapters.keras.families import FAMILIES, Backbone, NumberedLayer
from surgery_formats.adapters.keras.files import CONFIG, METADATA, own_file
from surgery_formats.adapters.keras.kernels import fused_lora, lora_of
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.canonical.provenance import Provenance
from surgery_formats.containers.hdf5 import datasets
from surgery_formats.errors import FitError, MalformedError, NotFoundError
from surgery_formats.files.bounded_json import read_object
from surgery_formats.files.raw import open_file
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show
from surgery_formats.updates import LoRA

__all__ = ["read_keras"]

_KEY = re.compile(r"lora/(0|[1-9][0-9]{0,5})/vars/lora_kernel_([ab])")
_RANK = "lora/vars/rank"
_FIRST, _LAST = (0, 18), (0, 32)  # the KerasHubs whose order of layers was looked at
_RANGE = " to ".join(f"{major}.{minor}" for major, minor in (_FIRST, _LAST))


def read_keras(path: Path) -> Adapter:
    """Read a file, or the one in a folder.

    Raises:
        NotFoundError, MalformedError: no such file, or one that is not KerasHub's.
        FitError: its layers are not known.
    """
    file = own_file(path)
    if file is None:
        raise NotFoundError("no .lora.h5, or several", file=path)
    tensors = datasets(open_file(file))
    family, config = _backbone(file)
    layers: dict[int, dict[str, StoredTensor]] = {}
    stated: int | None = None
    for tensor in tensors:
        key = _KEY.fullmatch(tensor.name)
        if key is not None:
            layers.setdefault(int(key[1]), {})[key[2]] = tensor
        elif tensor.name == _RANK and tensor.shape == () and not tensor.dtype.is_float:
            stated = int(tensor.read())
        else:
            raise MalformedError("neither a rank nor a factor", file=file, tensor=tensor.name)
    if stated is None or not layers:
        raise MalformedError("no rank or no factors in it", file=file)
    updates: dict[Site, LoRA] = {}
    fused: dict[Site, list[tuple[int, LoRA]]] = {}
    for number, parts in sorted(layers.items()):
        block, layer = _layer(number, parts, family, config)
        for lack in {"a", "b"} - parts.keys():
            raise MalformedError(f"without its lora_kernel_{lack}", file=file, tensor=next(iter(parts.values())).name)
        _check(parts["a"], parts["b"], layer, stated, config)
        site = Site(f"{family.path.format(block)}.{layer.name}.weight", module_kind="linear")
        lora = lora_of(parts["a"], parts["b"], layer.shape)
        if layer.part >= 0:
            fused.setdefault(site, []).append((layer.part, lora))
        else:
            updates[site] = lora
    updates |= {site: fused_lora(sorted(found, key=lambda part: part[0]), 3) for site, found in fused.items()}
    return Adapter(
        path=path,
        format="keras",
        kind="LORA",
        updates={site: (lora,) for site, lora in sorted(updates.items())},
        tensors=tuple(tensor for tensor in tensors if tensor.name != _RANK),
        config={"rank": stated},
        stated_issues=_version(file),
        provenance=Provenance("KerasHub (its names)"),
    )


def _backbone(file: Path) -> tuple[Backbone, Mapping[str, Any]]:
    """The family of the backbone and its configuration, by the preset's config.json beside the file."""
    beside = file.with_name(CONFIG)
    if not beside.is_file():
        raise FitError(
            "it numbers layers, and no config.json of its KerasHub preset is beside it to say which they are",
            file=file,
            hint="backbone.save_to_preset writes it",
        )
    described = read_object(beside)
    name, config = described.get("class_name"), described.get("config")
    if not isinstance(name, str) or not isinstance(config, dict):
        raise FitError("is no configuration of a KerasHub backbone", file=beside)
    family = FAMILIES.get(name.rpartition(">")[2])
    if family is None:
        raise FitError(f"the layers of KerasHub's {show(name, 60)} are not known", file=beside)
    for field in family.absent:
        if config.get(field) is not None:
            raise FitError(f"the layers of a {show(name, 60)} with a {field} are not known", file=beside)
    return family, config


def _layer(
    number: int, parts: Mapping[str, StoredTensor], family: Backbone, config: Mapping[str, Any]
) -> tuple[int, NumberedLayer]:
    """Block and layer of a number."""
    tensor = next(iter(parts.values()))
    layers, blocks = family.layers(config), config.get("num_layers")
    if type(blocks) is not int or blocks < 1:
        raise FitError("no num_layers in the config.json beside it", file=tensor.path)
    block, place = divmod(number - family.before, len(layers))
    if not 0 <= block < blocks or not layers[place].name:
        raise FitError("is of a layer of this backbone that has no LoRA", file=tensor.path, tensor=tensor.name)
    return block, layers[place]


def _check(a: StoredTensor, b: StoredTensor, layer: NumberedLayer, rank: int, config: Mapping[str, Any]) -> None:
    """Sizes are those of a factor of this layer: the rank, the heads, the width."""
    width, axes = config.get("hidden_dim"), 2 if layer.shape == "dense" else 3
    fits = len(a.shape) == axes and len(b.shape) == 2 and 0 not in (*a.shape, *b.shape)
    fits = fits and a.shape[-1] == b.shape[0] == rank and a.dtype.is_float and b.dtype.is_float
    if fits and layer.heads:
        heads, inputs = (a.shape[1], a.shape[0]) if layer.shape == "heads" else a.shape[:2]
        fits = heads == config.get(layer.heads) and width == (b.shape[1] if layer.shape == "from heads" else inputs)
    elif fits:
        fits = width in (a.shape[0], b.shape[1])
    if not fits:
        raise FitError(
            f"is {list(a.shape)}, its lora_kernel_b {list(b.shape)}: no factors of rank {rank} of {layer.name}",
            file=a.path,
            tensor=a.name,
        )


def _version(file: Path) -> tuple[str, ...]:
    """What is to be said of the program that numbered its layers."""
    beside = file.with_name(METADATA)
    version = read_object(beside).get("keras_hub_version") if beside.is_file() else None
    known = re.match(r"([0-9]{1,4})\.([0-9]{1,4})", version) if isinstance(version, str) else None
    if known is None:
        return (f"no metadata.json beside it: its layers are taken to be numbered as in KerasHub {_RANGE}",)
    if not _FIRST <= (int(known[1]), int(known[2])) <= _LAST:
        return (f"KerasHub {show(version, 20)} wrote it: its layers are taken to be numbered as in {_RANGE}",)
    return ()
