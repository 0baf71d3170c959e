# SPDX-License-Identifier: Apache-2.0
"""Reading and writing checkpoint and adapter files with the reference libraries (safetensors, torch), never with the product."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["adapter", "read_tensors", "scratch", "to_pickles", "write_adapter", "write_safetensors"]


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder."""
    with tempfile.TemporaryDirectory(prefix="oracle-") as name:
        yield Path(name)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file; tensors that share memory are written apart."""
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint or adapter folder, whatever its layout."""
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return {k: v for file in files for k, v in load_file(file).items()}
    files = sorted(folder.glob("*.bin"))
    if not files:
        raise FileNotFoundError(folder)
    return {k: v for file in files for k, v in torch.load(file, weights_only=True).items()}


def to_pickles(folder: Path) -> None:
    """Turn the safetensors files of ``folder`` into ``pytorch_model*.bin``, keeping the shards and their index."""
    for file in sorted(folder.glob("*.safetensors")):
        torch.save(
            load_file(file), folder / file.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        )
        file.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        fields = json.loads(index.read_text())
        fields["weight_map"] = {
            k: v.replace("model", "pytorch_model").replace(".safetensors", ".bin")
            for k, v in fields["weight_map"].items()
        }
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(fields))
        index.unlink()


def adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``(config, tensors)`` of a PEFT adapter folder."""
    return json.loads((folder / "adapter_config.json").read_text()), read_tensors(folder)


def write_adapter(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, pickled: bool = False
) -> Path:
    """Write a PEFT adapter folder, replacing the tensor file that is there. Dict order is kept: in patterns the first match wins."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in ("adapter_model.safetensors", "adapter_model.bin"):
        (folder / old).unlink(missing_ok=True)
    # PEFT keeps targets as a set, whose order changes with the hash seed
    fixed = {
        k: sorted(v) if k in ("target_modules", "exclude_modules") and isinstance(v, list) else v
        for k, v in config.items()
    }
    (folder / "adapter_config.json").write_text(json.dumps(fixed, indent=2))
    if pickled:
        torch.save({k: v.clone() for k, v in tensors.items()}, folder / "adapter_model.bin")
    else:
        write_safetensors(folder / "adapter_model.safetensors", tensors)
    return folder
