# SPDX-License-Identifier: Apache-2.0
"""Read a textual inversion (docs/formats.md): shown and converted, and kept out of weights, which have no row for its token."""

from __future__ import annotations

from pathlib import Path

from surgery_formats.adapters.textual_inversion.files import open_inversion
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.updates import Factor, Unmerged

__all__ = ["KIND", "read_textual_inversion"]

KIND = "token embedding"
_WHY = "rows for a new token, which the base's tokenizer does not know: no weight of it can be asked for them"
_INSTEAD = "keep it beside the base: `load_textual_inversion` of diffusers, the folder embeddings of A1111 and ComfyUI"


def read_textual_inversion(path: Path, format: str) -> Adapter:
    """Read one file.

    Raises:
        NotFoundError, MalformedError: see `files.open_inversion`.
    """
    found = open_inversion(path)
    token = found.token or path.name.partition(".")[0]
    updates = {
        Site("token_embedding.weight", component, module_kind="embedding"): (_rows(tensor),)
        for component, tensor in sorted(found.tensors.items())
    }
    return Adapter(
        path=path,
        format=format,
        kind="TEXTUAL_INVERSION",
        updates=updates,
        tensors=tuple(found.tensors.values()),
        base_name=found.base_name,
        config={"token": token},
        metadata={key: value for key, value in found.metadata.items() if key != "token"},
    )


def _rows(tensor: StoredTensor) -> Unmerged:
    shape = (1, tensor.shape[0]) if len(tensor.shape) == 1 else (tensor.shape[0], tensor.shape[1])
    return Unmerged(KIND, (("rows", Factor((tensor,), shape)),), _WHY, _INSTEAD, shape)
