# SPDX-License-Identifier: Apache-2.0
"""Torch checkpoints, read without executing anything in them; outputs are safetensors.

The interpreter of pickles is imported when there is one to read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from surgery_formats.containers.base import Shard, ShardSet, one_file
from surgery_formats.errors import MalformedError, SurgeryError
from surgery_formats.files.raw import open_file

__all__ = ["TORCH"]


@dataclass(frozen=True, slots=True)
class _Torch:
    name: str = "torch"
    title: str = "pytorch_model.bin, .pt, .pth, .ckpt; sharded too; no code in it is run"
    written_as: str = "safetensors"
    suffixes: tuple[str, ...] = (".bin", ".pt", ".pth", ".ckpt")

    def detect(self, path: Path) -> bool:
        """A file that begins as ``torch.save`` begins it, now or before torch 1.6."""
        from surgery_formats.containers.torch.pickle_file import is_torch

        try:
            return is_torch(open_file(path))
        except (SurgeryError, OSError):
            return False

    def open(self, path: Path) -> dict[str, ShardSet]:
        """See `read_torch` and `state_dict`."""
        from surgery_formats.containers.torch.pickle_file import read_torch, state_dict

        file = open_file(path)
        try:
            tensors = tuple(state_dict(read_torch(file)).values())
        except MalformedError as error:
            raise MalformedError(error.message, file=path, tensor=error.tensor, hint=error.hint) from error
        return one_file(Shard(path, self.name, file, tensors))


TORCH = _Torch()
