# SPDX-License-Identifier: Apache-2.0
"""The modules of sentence-transformers in a graph: their head on the model, and their matrices in a file of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from surgery_formats.containers.base import FileLayout
from surgery_formats.containers.safetensors import SAFETENSORS
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.families.recipe import Model
from surgery_formats.models.sentence_modules import SentenceModules, read_sentence_modules
from surgery_formats.tensors.unwritten import UnwrittenFile, UnwrittenTensor

__all__ = ["SENTENCE_FILE", "SentenceFile", "sentence_file"]

SENTENCE_FILE = "sentence.safetensors"
"""File name of the matrices of modules."""


@dataclass(frozen=True)
class SentenceFile:
    """The modules behind a model.

    Attributes:
        modules: As they are stored.
        overrides: Their tensors in the file that is written, by name.
        layout: Of that file; None without any tensor.
    """

    modules: SentenceModules
    overrides: Mapping[str, UnwrittenTensor]
    layout: FileLayout | None

    def on(self, model: Model) -> Model:
        """The model with the modules behind it; a pooler of its own is not read."""
        pooler = getattr(model.head, "pooler", None)
        names = [name for name in (pooler.weight, pooler.bias) if name] if pooler else []
        unread = dict.fromkeys(names, "the modules of sentence-transformers do not read the pooler")
        return replace(model, head=self.modules.head, unused={**model.unused, **unread})

    def data(self) -> bytes:
        """The file.

        Raises:
            FitError: a value is not finite.
        """
        assert self.layout is not None
        file = bytearray(self.layout.nbytes)
        file[: len(self.layout.header)] = self.layout.header
        for name, tensor in self.modules.tensors.items():
            values = np.ascontiguousarray(tensor.read(), np.float32)
            if not np.isfinite(values).all():
                raise FitError("holds NaN or Inf", tensor=tensor.name, file=tensor.path)
            start, nbytes = self.layout.ranges[name]
            file[start : start + nbytes] = values.tobytes()
        return bytes(file)


def sentence_file(folder: Path, hidden: int) -> SentenceFile:
    """The modules in the folder of a model whose states have `hidden` values.

    Raises:
        InputError, FitError: see `read_sentence_modules`.
    """
    modules = read_sentence_modules(folder, hidden)
    if not modules.tensors:
        return SentenceFile(modules, {}, None)
    shapes = {name: tensor.shape for name, tensor in modules.tensors.items()}
    layout = SAFETENSORS.lay_out([(name, DType.F32, shape) for name, shape in shapes.items()], None, 64)
    file = UnwrittenFile(Path(SENTENCE_FILE), layout.nbytes, layout.header)
    overrides = {
        name: UnwrittenTensor(name, DType.F32, shape, file, *layout.ranges[name]) for name, shape in shapes.items()
    }
    return SentenceFile(modules, overrides, layout)
