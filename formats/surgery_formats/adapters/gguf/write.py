# SPDX-License-Identifier: Apache-2.0
"""Write the canonical form to a GGUF LoRA: the names and the order of rows that llama.cpp has for the base's architecture.

There is one alpha for the whole file, and the scale of a pair is alpha by its own rank: other scales are multiplied into
``lora_b``.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from surgery_formats.adapters.contents import Contents, contents_of
from surgery_formats.adapters.expert_layers import ExpertStack, expert_layers, is_expert
from surgery_formats.adapters.experts import SWITCH
from surgery_formats.adapters.format import NewTensor, Rendering
from surgery_formats.adapters.packing import PackedFile, laid_out
from surgery_formats.adapters.writing import (
    ConversionLedger,
    commonest,
    factor_dtype,
    factor_tensor,
    places_of,
    surviving_metadata,
    whole_place,
    zero_padded,
)
from surgery_formats.arrays import Array
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.containers.base import TensorSpec
from surgery_formats.containers.gguf.config import architecture_of
from surgery_formats.containers.gguf.layout import lay_out_new
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.storage.gguf.names import ARCHITECTURE_KEY, ARCHITECTURES, stored_weight
from surgery_formats.updates import Factor, LoRA, PairedRows, Update, head_rows, paired

__all__ = ["render_gguf"]

_EMBEDDINGS = ("token_embd.weight", "position_embd.weight")


@dataclass(frozen=True, slots=True)
class _FactorPair:
    """A LoRA and the tensor of the base that it changes."""

    site: Site
    held: Contents
    stored: str
    lora: LoRA | ExpertStack


def render_gguf(adapter: Adapter, base: Checkpoint | None) -> Rendering:
    """One file. Only LoRAs of linear layers, of the embedding and of experts have a place in it.

    Raises:
        FitError: no base is given, or llama.cpp's names for it are not known.
    """
    name = _architecture(adapter, base)
    ledger = ConversionLedger()
    pairs: list[_FactorPair] = []
    stacked, left = _stacks(adapter, base, name)
    for site, chain in adapter.updates.items():
        for update in chain:
            held = contents_of(_as_stored(update, adapter, base))
            why = left.get(site, "") or _fault(site, held, base)
            mine = [] if why else [pair for pair in stacked if pair.site == site] or _single(site, held, base, name)
            if isinstance(mine, str) or why:
                ledger.drop(site, update, why or str(mine))
                continue
            taken = {other.stored: other.lora for other in pairs}  # experts of a stack have it together
            if any(taken.get(pair.stored, pair.lora) is not pair.lora for pair in mine):
                ledger.drop(site, update, "a second one on one tensor")
                continue
            pairs += [replace(pair, held=replace(held, update=update)) for pair in mine]
    ledger.drop_prompt(adapter)
    alpha = _float32(commonest(_alpha_of(pair.lora) for pair in pairs if _alpha_of(pair.lora)) or 1.0)
    tensors: list[NewTensor] = []
    for _, pair in sorted({pair.stored: pair for pair in pairs}.items()):
        tensors += _tensors(pair, alpha, adapter, base)
    noted: dict[tuple[Site, int], list[str]] = {}
    for pair in pairs:
        folded = noted.setdefault((pair.site, id(pair.held.update)), [])
        folded += [pair.held.folded] if pair.held.folded and pair.held.folded not in folded else []
        folded += [f"alpha {_alpha_of(pair.lora):g} / {alpha:g}"] if _times(pair.lora, alpha) != 1.0 else []
    for site, chain in adapter.updates.items():
        for update in chain:
            if (said := noted.get((site, id(update)))) is not None:
                ledger.keep(site, update, "folded" if said else "exact", ", ".join(dict.fromkeys(said)))
    entries: dict[str, str | int | float] = {
        ARCHITECTURE_KEY: name,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
        "general.name": adapter.metadata.get("general.name", "") or adapter.path.stem,
    }
    if adapter.base_name:
        entries["general.base_model.count"] = 1
        entries["general.base_model.0.name"] = adapter.base_name

    def packing(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> PackedFile:
        return laid_out(lay_out_new(specs, entries))

    return Rendering(
        f"{adapter.path.stem}.gguf",
        tuple(tensors),
        surviving_metadata(adapter),
        {},
        tuple(ledger.entries),
        ledger.held,
        packing=packing,
    )


def _architecture(adapter: Adapter, base: Checkpoint | None) -> str:
    if base is None:
        if adapter.format == "gguf":
            return str(adapter.config[ARCHITECTURE_KEY])
        raise FitError(
            "names and rows of a GGUF are those of the base's architecture",
            file=adapter.path,
            hint="give the base with `base=`",
        )
    if base.is_pipeline:
        raise FitError("llama.cpp has language models only, the base is a pipeline", file=adapter.path)
    name = architecture_of(base.main.config)
    if name not in ARCHITECTURES:
        raise FitError(
            "llama.cpp's names for this base are not known here",
            file=base.path,
            hint=f"known architectures are {', '.join(sorted(ARCHITECTURES))}",
        )
    return name


def _as_stored(update: Update, adapter: Adapter, base: Checkpoint | None) -> Update:
    """Of a file that is written again without a base: with its rows as they are."""
    stays = base is None and adapter.format == "gguf" and isinstance(update, PairedRows)
    return update.update if stays and isinstance(update, PairedRows) else update


def _fault(site: Site, held: Contents, base: Checkpoint | None) -> str:
    """Why the format cannot hold an update; empty if it can."""
    if site.flat or site.component:
        return "llama.cpp has language models only"
    if held.dora is not None or (held.lora is None and held.stack is None):
        return f"this format has no {held.update.kind}"
    if not site.path.endswith(".weight") and not is_expert(site):
        return "this format has factors of weights alone"
    if site.kernel:
        return "this format has no convolutions"
    if base is not None and base.main.tied:
        own = {base.main.embedding, base.main.head}
        if own & {place.alias or place.parameter.name for place in base.main.names.resolve(site.path)}:
            return "head and embedding are one tensor in this base, and llama.cpp cannot run a LoRA on it"
    return ""


def _stacks(adapter: Adapter, base: Checkpoint | None, name: str) -> tuple[list[_FactorPair], Mapping[Site, str]]:
    """The stacks of experts, and sites that are in none with the reason."""
    if base is None:
        own: list[_FactorPair] = []
        for site, chain in adapter.updates.items():
            for update in chain:
                if SWITCH in site.path and (held := contents_of(update).stack) is not None:
                    loras = dict(enumerate(held.experts))
                    whole = ExpertStack("down_proj", loras[0].shape, len(loras), loras)
                    own.append(_FactorPair(site, contents_of(update), stored_weight(name, site.path), whole))
        return own, {}
    layers, left = expert_layers(adapter, base)
    pairs: list[_FactorPair] = []
    for layer in layers:
        for role, stack in layer.split().items():
            paths = (f"{stem}{SWITCH}{role}.weight" for stem in (layer.stem, _mixtral(layer.stem)))
            stored = next((found for path in paths if (found := stored_weight(name, path))), "")
            for site, update in layer.updates:
                if not stored:
                    left = {**left, site: "llama.cpp has no place for its experts"}
                elif not any(pair.site == site and pair.stored == stored for pair in pairs):
                    pairs.append(_FactorPair(site, contents_of(update), stored, stack))
    return pairs, left


def _mixtral(stem: str) -> str:
    head, _, last = stem.rpartition(".")
    return f"{head}.block_sparse_moe" if last == "mlp" else stem


def _single(site: Site, held: Contents, base: Checkpoint | None, name: str) -> list[_FactorPair] | str:
    """The pair of one LoRA, or why there is none."""
    if held.lora is None:
        return "the names of its experts are not known"
    path = site.path
    if base is not None:
        place = whole_place(places_of(site, base, held.update.tensors))
        if place is None:
            return "the base holds its weight within another tensor: convert with `projections=` first"
        path = place[0]
    stored = stored_weight(name, path)
    if not stored:
        return f"llama.cpp's '{name}' has no such tensor"
    return [_FactorPair(site, held, stored, held.lora)]


def _alpha_of(lora: LoRA | ExpertStack) -> float:
    return lora.scale * lora.rank


def _times(lora: LoRA | ExpertStack, alpha: float) -> float:
    """What is multiplied into ``lora_b``, so that alpha by the rank is the scale."""
    own = _alpha_of(lora)
    return 1.0 if own == alpha else own / alpha


def _tensors(pair: _FactorPair, alpha: float, adapter: Adapter, base: Checkpoint | None) -> list[NewTensor]:
    times, names = _times(pair.lora, alpha), [f"{pair.stored}.lora_{side}" for side in "ab"]
    if isinstance(pair.lora, ExpertStack):
        return list(map(_at_most_float32, _stack(pair.lora, names, times)))
    lora = pair.lora
    rank = lora.rank
    if pair.stored in _EMBEDDINGS:
        new = [
            factor_tensor(names[0], lora.B, (lora.shape[0], rank)),
            factor_tensor(names[1], lora.A, (lora.shape[1], rank), lambda t: t.T, times=times),
        ]
        return list(map(_at_most_float32, new))
    stem = pair.stored.split(".")[-2]
    if (
        base is not None
        and stem in ("attn_q", "attn_k")
        and ARCHITECTURES[architecture_of(base.main.config)].interleaved
    ):
        head = head_rows(base.main.config, "queries" if stem == "attn_q" else "keys", lora.shape[0], lora.tensors[0])
        swapped = paired(lora, head)
        assert isinstance(swapped, LoRA)
        lora = swapped
    new = [factor_tensor(names[0], lora.A, lora.A.shape), factor_tensor(names[1], lora.B, lora.B.shape, times=times)]
    return list(map(_at_most_float32, new))


def _stack(stack: ExpertStack, names: Sequence[str], times: float) -> list[NewTensor]:
    """Factors of all experts, zeros where one was not trained."""
    rank, (out, inputs) = stack.rank, stack.shape

    def load_a() -> Array:
        return _filled(stack, "A", 0, (rank, inputs), 1.0)

    def load_b() -> Array:
        return _filled(stack, "B", 1, (out, rank), times)

    uneven = times != 1.0 or len({lora.scale for lora in stack.loras.values()}) > 1
    a, b = ([getattr(lora, side) for lora in stack.loras.values()] for side in "AB")
    return [
        NewTensor(names[0], factor_dtype(a, folded=False), (stack.count, rank, inputs), load_a),
        NewTensor(names[1], factor_dtype(b, folded=uneven), (stack.count, out, rank), load_b),
    ]


def _filled(stack: ExpertStack, side: str, axis: int, shape: tuple[int, int], times: float) -> Array:
    import numpy

    whole = numpy.zeros((stack.count, *shape))
    for number, lora in stack.loras.items():
        factor: Factor = getattr(lora, side)
        own = times * lora.scale / (stack.scale or 1.0) if side == "B" else 1.0
        whole[number] = zero_padded(factor.load(DType.F64), axis, stack.rank) * own
    return whole


def _at_most_float32(tensor: NewTensor) -> NewTensor:
    """llama.cpp multiplies no matrices of float64."""
    return replace(tensor, dtype=DType.F32) if tensor.dtype is DType.F64 else tensor


def _float32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])
