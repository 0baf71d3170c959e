# SPDX-License-Identifier: Apache-2.0
"""Read what ``loralib.lora_state_dict`` saved (loralib 0.1.2, ``layers.py``).

A layer is ``lora_A`` (r, in) and ``lora_B`` (out, r), its scale ``lora_alpha / r``; of an embedding the change is the transpose of
``lora_B lora_A``. ``lora_alpha`` is an argument of the layers and stands in no file.
"""

from __future__ import annotations

from pathlib import Path

from surgery_formats.adapters.alphas import TELL_ALPHA
from surgery_formats.adapters.embeddings import is_embedding
from surgery_formats.adapters.grammar.files import open_adapter_file
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.canonical.provenance import Provenance
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.updates import Factor, LoRA, Replacement, Update

__all__ = ["read_loralib"]


def read_loralib(path: Path, alpha: float | None = None) -> Adapter:
    """Read one file.

    Args:
        path: Of it, or of a folder with it alone.
        alpha: ``lora_alpha`` of its layers.

    Raises:
        NotFoundError, MalformedError: not such a file.
        FitError: no alpha was given; or a layer whose parts the file does not tell.
    """
    shards = open_adapter_file(path)
    file = shards.shards[0].path
    if alpha is None:
        raise FitError(
            "the scale of its LoRAs is not in its file: loralib stores no lora_alpha",
            file=file,
            hint=TELL_ALPHA,
        )
    modules: dict[str, dict[str, StoredTensor]] = {}
    updates: dict[Site, tuple[Update, ...]] = {}
    for tensor in shards.tensors.values():
        module, _, leaf = tensor.name.rpartition(".")
        if leaf == "bias":
            updates[Site(tensor.name)] = (Replacement(Factor.of(tensor)),)
        elif leaf in ("lora_A", "lora_B") and module:
            modules.setdefault(module, {})[leaf] = tensor
        else:
            raise MalformedError("neither lora_A, lora_B nor a bias", file=file, tensor=tensor.name)
    for module, parts in modules.items():
        for lack in {"lora_A", "lora_B"} - parts.keys():
            raise MalformedError(f"without its '{lack}'", file=file, tensor=next(iter(parts.values())).name)
        embedding = is_embedding(module)
        site = Site(f"{module}.weight", module_kind="embedding" if embedding else "")
        updates[site] = (_lora(parts["lora_A"], parts["lora_B"], alpha, embedding=embedding),)
    return Adapter(
        path=path,
        format="loralib",
        kind="LORA",
        updates=dict(sorted(updates.items())),
        tensors=tuple(shards.tensors.values()),
        stated_issues=(f"its file states no scale: lora_alpha {alpha:g} is what was given",),
        provenance=Provenance("loralib (its keys)"),
    )


def _lora(a: StoredTensor, b: StoredTensor, alpha: float, *, embedding: bool) -> LoRA:
    if len(a.shape) != 2 or len(b.shape) != 2 or 0 in (*a.shape, *b.shape) or a.shape[0] % b.shape[1]:
        raise FitError(f"is {list(a.shape)}, its lora_B {list(b.shape)}", file=a.path, tensor=a.name)
    if a.shape[0] != b.shape[1]:
        raise FitError(
            f"has {a.shape[0] // b.shape[1]} times the rank of its lora_B: a MergedLinear, and which of its parts were trained "
            "(enable_lora) the file does not tell",
            file=a.path,
            tensor=a.name,
            hint="save the merged weight, model.eval() merges it",
        )
    rank = b.shape[1]
    lora = LoRA(Factor.of(a), Factor.of(b), alpha / rank, alpha)
    return lora.transpose() if embedding else lora
