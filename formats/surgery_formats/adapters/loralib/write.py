# SPDX-License-Identifier: Apache-2.0
"""Write the canonical form as ``loralib.lora_state_dict`` gives it: ``lora_A``, ``lora_B`` and biases.

Whoever builds the layers gives each its rank, which its factors show, and ``lora_alpha``, which nothing shows: one alpha is chosen for
all, other scales are multiplied into ``lora_B``, and `Rendering.alpha` is what a reader has to be told.
"""

from __future__ import annotations

from surgery_formats.adapters.contents import Contents, contents_of
from surgery_formats.adapters.embeddings import following_head, is_embedding
from surgery_formats.adapters.format import NewTensor, Rendering
from surgery_formats.adapters.packing import packed_as_torch
from surgery_formats.adapters.writing import ConversionLedger, commonest, copied, factor_tensor, places_of, whole_place
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.updates import LoRA, Update

__all__ = ["render_loralib"]

TENSOR_FILE = "lora.pt"


def render_loralib(adapter: Adapter, base: Checkpoint | None, alpha: float | None = None) -> Rendering:
    """A torch file.

    Args:
        adapter: What to write.
        base: The model it is for; needed where names are flattened.
        alpha: ``lora_alpha`` of the layers that will load it; by default that of most of the adapter's modules.

    Raises:
        FitError: flattened names and no base.
    """
    ledger = ConversionLedger()
    tensors: list[NewTensor] = []
    found: list[tuple[Site, Contents, str, LoRA]] = []
    taken: set[str] = set()
    for site, chain in adapter.updates.items():
        name = _name(site, chain[0], base, adapter)
        for update in chain:
            held = contents_of(update)
            why = "a second one on one module" if name in taken else _fault(site, held, name, base)
            if why:
                ledger.drop(site, update, why)
                continue
            taken.add(name)
            if held.whole is not None:
                ledger.keep(site, update, "exact")
                tensors.append(copied(name, held.whole.stored))
            elif held.lora is not None:
                found.append((site, held, name.removesuffix(".weight"), held.lora))
    ledger.drop_prompt(adapter)
    alphas = [lora.scale * lora.rank for *_, lora in found if lora.scale]
    chosen = alpha or commonest(alphas) or 1.0
    for site, held, module, lora in found:
        times = lora.scale * lora.rank / chosen
        said = [f"alpha {lora.scale * lora.rank:g} / {chosen:g}"] if times != 1.0 else []
        said += [held.folded] if held.folded else []
        ledger.keep(site, held.update, "folded" if said else "exact", ", ".join(said))
        tensors += _factors(module, lora, times)
        if head := following_head(site, lora, adapter, base):
            tensors += _factors(head, lora, times, tied=True)
    return Rendering(
        TENSOR_FILE,
        tuple(sorted(tensors, key=lambda tensor: tensor.name)),
        entries=tuple(ledger.entries),
        held=ledger.held_in_order(adapter),
        packing=packed_as_torch,
        alpha=chosen if found else None,
    )


def _factors(module: str, lora: LoRA, times: float, *, tied: bool = False) -> tuple[NewTensor, NewTensor]:
    """``lora_A`` (r, in) and ``lora_B`` (out, r); an embedding's change is the transpose of their product.

    What is left of the scale is multiplied into B: of a tied head into A, which is the embedding's B, so that both change alike
    to the bit.
    """
    a, b = f"{module}.lora_A", f"{module}.lora_B"
    (out, inputs), rank = lora.shape, lora.rank
    if is_embedding(module):
        turned = factor_tensor(a, lora.B, (rank, out), lambda values: values.T)
        return turned, factor_tensor(b, lora.A, (inputs, rank), lambda values: values.T, times=times)
    of_a, of_b = (times, 1.0) if tied else (1.0, times)
    return factor_tensor(a, lora.A, (rank, inputs), times=of_a), factor_tensor(b, lora.B, (out, rank), times=of_b)


def _name(site: Site, update: Update, base: Checkpoint | None, adapter: Adapter) -> str:
    """The parameter's own name: the adapter's, or the base's where names are flattened."""
    if not site.flat:
        return site.path
    if base is None:
        raise FitError(
            "its module names are flattened: only the base tells them apart",
            file=adapter.path,
            hint="give it with `base=`",
        )
    place = whole_place(places_of(site, base, update.tensors))
    return "" if place is None else place[0]


def _fault(site: Site, held: Contents, name: str, base: Checkpoint | None) -> str:
    """Why the format cannot hold an update; empty if it can."""
    module, _, leaf = name.rpartition(".")
    if not module:
        return "it is a part of a weight, or no module's"
    if held.whole is not None and leaf == "bias":
        return ""
    if held.lora is None or held.dora is not None:
        return f"this format has no {held.update.kind}"
    if leaf != "weight" or site.kernel:
        return "this format is written with linear layers and embeddings"
    if is_embedding(module, base, site) != is_embedding(module):
        return "its name alone tells a reader whether it is an embedding, and tells it wrongly"
    return ""
