# SPDX-License-Identifier: Apache-2.0
"""Write the canonical form to an ``.onnx_adapter`` file, under the names of a graph's inputs; scales go into B.

Olive exports the model inside PEFT's, so that these are the names of the model's code, as in our own exports. Its ``convert-adapters``
(0.13) leaves PEFT's prefix on where no ``model.`` follows (``lm_head``, GPT-2, GPT-NeoX), and onnxruntime refuses these names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from surgery_formats.adapters.contents import contents_of
from surgery_formats.adapters.embeddings import following_head, is_embedding
from surgery_formats.adapters.format import NewTensor, Rendering
from surgery_formats.adapters.onnx_adapter.for_graph import GraphFilling
from surgery_formats.adapters.onnx_adapter.graph_slots import GraphSlots
from surgery_formats.adapters.onnx_adapter.names import is_of_head, is_parameter
from surgery_formats.adapters.onnx_adapter.read import A, B
from surgery_formats.adapters.packing import PackedFile
from surgery_formats.adapters.writing import ConversionLedger, factor_tensor, places_of, whole_place
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.containers.base import TensorSpec
from surgery_formats.containers.onnx_adapter_layout import plan_onnx_adapter
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.text import listing
from surgery_formats.updates import LoRA, Replacing, is_replacing

__all__ = ["render_onnx_adapter"]


def render_onnx_adapter(adapter: Adapter, base: Checkpoint | None, slots: GraphSlots | None = None) -> Rendering:
    """One file. A graph's inputs have the names of the model's code, which the adapter has, or the base where they are flattened.

    Args:
        adapter: What to write.
        base: The base, if it is known.
        slots: Those of the graph that it is for; None for one of ours or of Olive's.

    Raises:
        FitError: flattened names and no base, several parts of a pipeline, or sizes that the graph does not take.
    """
    if len(components := sorted({site.component for site in adapter.updates})) > 1:
        raise FitError(
            f"an .onnx_adapter file has the inputs of one graph, this adapter has {listing(components)}",
            file=adapter.path,
            hint="choose one with `component=`",
        )
    ledger = ConversionLedger()
    tensors: list[NewTensor] = []
    filling = None if slots is None else GraphFilling(slots, _modules(adapter, base))
    for site, chain in adapter.updates.items():
        for number, update in enumerate(chain):
            held = contents_of(update)
            lora = held.lora if not held.dora else None
            if site.module_kind == "experts":
                ledger.drop(site, update, "a graph has no inputs for LoRAs of stacked experts")
            elif is_replacing(update) and _has_place(site, update, slots):
                tensors.append(factor_tensor(site.path, update.factors()["value"], update.stored.shape))
                ledger.keep(site, update, "exact", "")
            elif lora is None:
                ledger.drop(site, update, f"a graph's inputs hold a LoRA, no {update.kind}")
            elif number or not site.path.endswith(".weight") or (site.kernel and filling is None):
                ledger.drop(
                    site, update, "a graph has one LoRA for each linear layer and table of tokens, and none elsewhere"
                )
            else:
                module = _module(site, lora, adapter, base)
                folded = [f"scale {lora.scale:g} in lora_B"] if lora.scale != 1.0 else []
                folded += [held.folded] if held.folded else []
                if filling is not None:
                    if (slot := filling.slot_of(module)) is None:
                        ledger.drop(site, update, "the graph has no slot for it")
                        continue
                    filling.fill(slot, module, site, lora, base)
                    ledger.keep(site, update, "folded" if folded else "exact", ", ".join([slot.A.name, *folded]))
                    continue
                tensors += _pair(module, lora, embedding=is_embedding(module, base, site))
                if head := following_head(site, lora, adapter, base):
                    tensors += _pair(head, lora, tied=True)
                ledger.keep(site, update, "folded" if folded else "exact", ", ".join(folded))
    ledger.drop_prompt(adapter)
    return Rendering(
        "adapter.onnx_adapter",
        (*sorted(tensors, key=lambda tensor: tensor.name), *(filling.tensors() if filling is not None else ())),
        entries=tuple(ledger.entries),
        held=ledger.held,
        packing=_packed,
        notes=() if filling is None else filling.notes(),
        filled={} if filling is None else filling.filled,
    )


def _has_place(site: Site, update: Replacing, slots: GraphSlots | None) -> bool:
    """Whether a parameter that is given in full can be an input under its own name: small, and one that the graph has."""
    shape = update.stored.shape
    if not is_parameter(site.path) or not (len(shape) == 1 or (len(shape) == 2 and is_of_head(site.path))):
        return False
    if slots is None:
        return True
    known = slots.parameters.get(site.path)
    return (
        known is not None
        and len(known.dims) == len(shape)
        and all(size in (None, own) for size, own in zip(known.dims, shape, strict=True))
    )


def _modules(adapter: Adapter, base: Checkpoint | None) -> list[str]:
    """Every module that a LoRA is for."""
    loras = ((site, contents_of(update).lora) for site, chain in adapter.updates.items() for update in chain)
    return list(dict.fromkeys(_module(site, lora, adapter, base) for site, lora in loras if lora is not None))


def _packed(tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> PackedFile:
    """A file without free strings: it has no place for them."""
    plan = plan_onnx_adapter(tensors)
    return PackedFile(plan.header, plan.ranges, plan.nbytes, plan.before, lambda: plan.end)


def _module(site: Site, lora: LoRA, adapter: Adapter, base: Checkpoint | None) -> str:
    path = site.path.removesuffix(".weight")
    if site.flat:
        if base is None:
            raise FitError(
                "its module names are flattened: only the base tells them apart",
                file=adapter.path,
                hint="give it with `base=`",
            )
        place = whole_place(places_of(site, base, lora.tensors))
        path = place[0].removesuffix(".weight") if place else path
    return path


def _pair(module: str, lora: LoRA, *, embedding: bool = False, tied: bool = False) -> list[NewTensor]:
    """The scale is multiplied into B: of a tied head into A, which is the embedding's B, so that both change alike to the bit."""
    (out, inputs), rank = lora.shape, lora.rank
    if embedding:
        return [
            factor_tensor(f"{module}{A}", lora.B, (out, rank)),
            factor_tensor(f"{module}{B}", lora.A, (rank, inputs), times=lora.scale),
        ]
    a, b = (lora.scale, 1.0) if tied else (1.0, lora.scale)
    return [
        factor_tensor(f"{module}{A}", lora.A, (inputs, rank), lambda t: t.T, times=a),
        factor_tensor(f"{module}{B}", lora.B, (rank, out), lambda t: t.T, times=b),
    ]
