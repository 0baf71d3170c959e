# SPDX-License-Identifier: Apache-2.0
"""Weights that lie beside PEFT's own file: what trainers save of a model that they trained beside its adapter.

===============================  ==========================================================================
``non_lora_state_dict.bin``,     parameters trained in full (Qwen-VL fine-tuning, LLaVA, ms-swift):
``non_lora_trainables.bin``,     read as if they lay in PEFT's file
``embedding.safetensors`` ...
``value_head.safetensors``       the value head of a reward model (LLaMA-Factory, TRL), which belongs to no class
                                 of transformers: carried along
``model.safetensors`` ...        a full model: told, not read
other names                      refused by name, unless its tensors have PEFT's prefix
states of a training             passed over
===============================  ==========================================================================
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from surgery_formats.adapters.peft.keys import PREFIX, ROOT, WEIGHTS, bared
from surgery_formats.canonical.ungathered import UNGATHERED, is_ungathered
from surgery_formats.containers.base import Shard
from surgery_formats.containers.sharded import MODEL_STEMS, is_training_state
from surgery_formats.containers.weight_files import UNREAD_SUFFIXES, is_weight_file, open_shard
from surgery_formats.errors import MalformedError, SurgeryError
from surgery_formats.files.raw import stays_inside
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import listing, show

__all__ = ["Beside", "weights_beside"]

_VALUE_HEAD = "v_head."
_HUB_HEAD = "heads."
_FULL_MODELS = (*MODEL_STEMS, "consolidated")
_TRAINED = re.compile(r"(non_lora\w*|(new_)?embeddings?|(mm_)?projector|vit)\.[^.]+")
"""Names that trainers give to files of parameters that they trained in full."""
_FACTORS = ("lora_", "hada_", "lokr_", "oft_", "ia3_", "vera_")


@dataclass(frozen=True, slots=True)
class Beside:
    """What lies beside an adapter's own file of weights.

    Attributes:
        parameters: Trained in full, by their path.
        carried: Files that go where the adapter goes.
        issues: What to say of the others.
        unknown: Tensors of files that nothing says belong to the adapter, or do not: an operation refuses them by name.
    """

    parameters: dict[str, StoredTensor] = field(default_factory=dict)
    carried: list[Path] = field(default_factory=list)
    issues: list[str] = field(default_factory=list)
    unknown: list[StoredTensor] = field(default_factory=list)

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that hold its parameters."""
        return tuple(sorted({path.rpartition(".")[0] for path in self.parameters}))


def weights_beside(folder: Path, own: Collection[Path] = ()) -> Beside:
    """The files of weights in the folder of an adapter, but for those that were read as the adapter's own.

    Raises:
        MalformedError: a parameter is in two of them.
    """
    beside = Beside()
    for path in _candidates(folder):
        name = show(path.name)
        if path.name.startswith(WEIGHTS):
            if path not in own:
                beside.issues.append(
                    f"'{name}' lies beside it, which PEFT does not read where there is another: not read"
                )
        elif path.name.endswith(UNREAD_SUFFIXES):
            beside.issues.append(f"'{name}' lies beside it, weights that are not read here")
        else:
            _sort(path, beside)
    return beside


def _sort(path: Path, beside: Beside) -> None:
    """Where the tensors of one file belong."""
    name = show(path.name)
    try:
        shard = open_shard(path)
    except SurgeryError as error:
        beside.issues.append(f"'{name}' lies beside it and is not read ({error.message})")
        return
    names = [tensor.name for tensor in shard.tensors]
    if any(segment.startswith(_FACTORS) for key in names for segment in key.split(".")):
        beside.issues.append(f"'{name}' lies beside it, another adapter by its tensors: not read")
    elif names and all(_path(tensor).startswith(_VALUE_HEAD) for tensor in shard.tensors):
        if path.name.startswith(_FULL_MODELS):
            beside.issues.append(
                f"'{name}' is a value head under a model's name: not carried, rename it value_head{path.suffix}"
            )
            return
        beside.carried.append(path)
        beside.issues.append(f"'{name}' is a value head, which no class of transformers has: it goes along as a file")
    elif names and all(key.startswith(_HUB_HEAD) for key in names):
        beside.carried.append(path)
        beside.issues.append(
            f"'{name}' is a head of AdapterHub's, which its library alone loads: it goes along as a file"
        )
    elif path.name.startswith(_FULL_MODELS):
        beside.issues.append(f"'{name}' lies beside it, a full model by its name: not read")
    elif _TRAINED.fullmatch(path.name) or any(bared(key).startswith(PREFIX) for key in names):
        _add(shard, beside)
    else:
        beside.issues.append(f"'{name}' lies beside it, and no rule says what it is to the adapter")
        beside.unknown.extend(shard.tensors)


def _path(tensor: StoredTensor) -> str:
    return bared(tensor.name).removeprefix(PREFIX).removeprefix(ROOT)


def _add(shard: Shard, beside: Beside) -> None:
    name, taken = show(shard.path.name), []
    for tensor in shard.tensors:
        path = _path(tensor)
        if path in beside.parameters:
            raise MalformedError(f"'{path}' is in two files beside the adapter", file=shard.path, tensor=tensor.name)
        if is_ungathered(tensor):
            beside.issues.append(f"'{name}': {show(tensor.name)} has shape [0]. {UNGATHERED}")
        beside.parameters[path] = tensor
        taken.append(path)
    if taken:
        beside.issues.append(
            f"'{name}' holds {len(taken)} parameters that were trained in full beside the adapter ({listing(taken, 2)}): "
            "they take the place of the base's, which PEFT alone does not do"
        )


def _candidates(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        known = is_weight_file(path.name) or path.name.endswith(UNREAD_SUFFIXES)
        passed = path.name.startswith(".") or is_training_state(path.name)
        if known and not passed and path.is_file() and stays_inside(path):
            yield path
