# SPDX-License-Identifier: Apache-2.0
"""Which layout of a textual inversion a file has, and its tensors by the text encoder that they are for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from surgery_formats.adapters.grammar.files import keys_at
from surgery_formats.adapters.grammar.leaves import ENCODERS as IN_BUNDLES
from surgery_formats.adapters.grammar.spelling import BUNDLE
from surgery_formats.containers.torch import TORCH
from surgery_formats.containers.weight_files import is_weight_file, open_shard
from surgery_formats.errors import MalformedError, SurgeryError
from surgery_formats.files.places import is_file
from surgery_formats.files.raw import open_file
from surgery_formats.models.known_files import known_file
from surgery_formats.tensors.tensor import StoredTensor

__all__ = ["ENCODERS", "OF_ONE", "Inversion", "layout_at", "open_inversion"]

OF_ONE = "emb_params"
"""The tensor of a file for one text encoder (A1111, kohya)."""
ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}
"""Components by the names of tensors in files for several text encoders: SDXL and SD3."""
_WIDTHS = {768: "text_encoder", 1024: "text_encoder", 1280: "text_encoder_2", 4096: "text_encoder_3"}
"""The component that an embedding of a width belongs to: SD 1, SD 2, the second of SDXL, T5."""
_MOST = 256  # rows of one token; A1111 goes up to 75


@dataclass(frozen=True, slots=True)
class Inversion:
    """A file.

    Attributes:
        tensors: By component.
        token: What calls it in a prompt; empty where the file does not tell, whose name then does.
        base_name: The model it says it was trained on.
        metadata: Of its header.
    """

    tensors: Mapping[str, StoredTensor]
    token: str = ""
    base_name: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)


def layout_at(path: Path) -> str:
    """``embedding`` or ``learned-embeds``; empty for any other file."""
    if not is_weight_file(path.name) or not is_file(path):
        return ""
    names = list(keys_at(path))
    try:
        if not names:
            return "embedding" if path.name.endswith(TORCH.suffixes) and _a1111(path) else ""
        if names == [OF_ONE] or set(names) <= ENCODERS.keys() or all(name.startswith(BUNDLE) for name in names):
            return "embedding"
        if len(names) != 1 or known_file(names) or ("." in names[0] and not names[0].startswith("<")):
            return ""
        (tensor,) = open_shard(path).tensors
    except (SurgeryError, OSError, ValueError):
        return ""
    rows = tensor.shape[0] if len(tensor.shape) == 2 else 1
    return "learned-embeds" if len(tensor.shape) in (1, 2) and rows <= _MOST and tensor.shape[-1] in _WIDTHS else ""


def open_inversion(path: Path) -> Inversion:
    """The file at `path`, of either layout.

    Raises:
        NotFoundError, MalformedError: no such file, or not one token.
    """
    if path.name.endswith(TORCH.suffixes) and (found := _a1111(path)) is not None:
        return found
    shard = open_shard(path)
    metadata, named = shard.metadata, {tensor.name: tensor for tensor in shard.tensors}
    base = metadata.get("ss_sd_model_name", "")
    if named and named.keys() <= ENCODERS.keys():
        tensors = {ENCODERS[name]: _checked(tensor) for name, tensor in named.items()}
        return Inversion(tensors, metadata.get("token", ""), base, metadata)
    if named and all(name.startswith(BUNDLE) for name in named):
        return _bundled(path, named, metadata)
    if len(named) != 1:
        raise MalformedError(f"{len(named)} tensors where a textual inversion has those of one token", file=path)
    ((name, tensor),) = named.items()
    token = metadata.get("token", "") if name == OF_ONE else name
    return Inversion({_WIDTHS.get(_checked(tensor).shape[-1], ""): tensor}, token, base, metadata)


def _bundled(path: Path, named: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> Inversion:
    """What is left of a LoRA of OneTrainer when its factors are left out: ``bundle_emb.TOKEN.clip_l``."""
    tokens = {name.split(".")[1] for name in named}
    tensors = {
        IN_BUNDLES[leaf]: _checked(named[name]) for name in named if (leaf := name.split(".", 2)[-1]) in IN_BUNDLES
    }
    if len(tokens) != 1 or len(tensors) != len(named):
        raise MalformedError(
            f"{len(tokens)} tokens and {len(named)} tensors in a bundle: choose the rows of one token", file=path
        )
    return Inversion(tensors, tokens.pop(), metadata=metadata)


def _a1111(path: Path) -> Inversion | None:
    """A1111's older file: ``{"string_to_param": {"*": rows}, "name": ..., "sd_checkpoint_name": ...}``; None for another."""
    from surgery_formats.containers.torch.pickle_file import read_torch

    tree = read_torch(open_file(path))
    if not isinstance(tree, dict) or not isinstance(rows := tree.get("string_to_param"), dict):
        return None
    tensors = [value for value in rows.values() if isinstance(value, StoredTensor)]
    if len(tensors) != 1 or len(rows) != 1:
        raise MalformedError(f"{len(rows)} tokens where one was expected", file=path, tensor="string_to_param")
    tensor = _checked(replace(tensors[0], name="string_to_param.*"))
    name, base = (tree.get(key) for key in ("name", "sd_checkpoint_name"))
    token = name if isinstance(name, str) else ""
    return Inversion({_WIDTHS.get(tensor.shape[-1], ""): tensor}, token, base if isinstance(base, str) else "")


def _checked(tensor: StoredTensor) -> StoredTensor:
    if len(tensor.shape) not in (1, 2) or not tensor.numel or not tensor.dtype.is_float_or_fp8:
        raise MalformedError(
            f"{list(tensor.shape)}, not rows of an embedding", file=tensor.file.path, tensor=tensor.name
        )
    return tensor
