# SPDX-License-Identifier: Apache-2.0
"""PEFT's weights without a configuration: found, and told from a model's. Kinds are imported only for names that may be some."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from surgery_formats.adapters.grammar.files import file_keys, weights_at
from surgery_formats.adapters.grammar.spelling import OF_FLUX
from surgery_formats.adapters.peft.keys import PREFIX, WEIGHTS, bared
from surgery_formats.adapters.peft.read_config import CONFIG_FILE
from surgery_formats.containers.base import ShardSet
from surgery_formats.containers.sharded import open_folder_tensors, open_shards
from surgery_formats.errors import SurgeryError
from surgery_formats.files.places import exists, is_folder

if TYPE_CHECKING:
    from surgery_formats.adapters.peft.kinds.kind import PeftKind

__all__ = ["holds_lone_weights", "open_lone", "roots_of"]

_OTHERS = ("unet.", "text_encoder", "diffusion_model.", "lora_", "lycoris_")
"""Beginnings of keys that PEFT writes in no file, whatever it is called."""


def holds_lone_weights(path: Path) -> bool:
    """Whether PEFT's weights are at `path`, and no configuration in that folder.

    Every key has PEFT's prefix, which a file of PEFT's own name may lack, and some are factors. LoRAs of Flux in the names of its
    makers are none: fal publishes them so, and every program reads them at a scale of 1.
    """
    names = _names_at(path)
    if any(name.startswith(OF_FLUX) for name in names):
        return False
    if not names or not (all(bared(name).startswith(PREFIX) for name in names) or _is_called_so(path, names)):
        return False
    modules = _factored(names)
    bases = sum(f"{module}.base_layer.weight" in names or f"{module}.weight" in names for module in modules)
    return 2 * bases < len(modules)  # else it is the whole model, as it was in memory


def open_lone(path: Path) -> ShardSet:
    """The weights at `path`.

    Raises:
        NotFoundError, MalformedError: none, or not what their container says.
    """
    if is_folder(path) and any(path.glob(f"{WEIGHTS}*")):
        return open_folder_tensors(path, (WEIGHTS,))
    return open_shards(weights_at(path) or path)


def roots_of(kind: PeftKind) -> set[str]:
    """What the names of a kind's tensors begin with, behind the module or in front of everything."""
    return {name.partition(".")[0] for name in kind.factors | kind.shared | kind.unused.keys()}


def _names_at(path: Path) -> Collection[str]:
    if not is_folder(path):
        return file_keys(path).keys() if path.suffix else ()
    if exists(path / CONFIG_FILE, links=True):
        return ()
    try:
        return open_lone(path).tensors.keys() if weights_at(path) or any(path.glob(f"{WEIGHTS}*")) else ()
    except (SurgeryError, OSError, ValueError):
        return ()


def _is_called_so(path: Path, names: Collection[str]) -> bool:
    own = any(path.glob(f"{WEIGHTS}*")) if is_folder(path) else path.name.startswith(WEIGHTS)
    return own and not any(name.startswith(_OTHERS) for name in names)


def _factored(names: Collection[str]) -> set[str]:
    """The modules that have factors among `names`."""
    from surgery_formats.adapters.peft.kinds import kinds

    roots = set().union(*map(roots_of, kinds().values()))
    paths = (name.split(".") for name in names)
    found = ((path, next((at for at, segment in enumerate(path) if segment in roots), 0)) for path in paths)
    return {".".join(path[:at]) for path, at in found if at}
