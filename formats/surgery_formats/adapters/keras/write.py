# SPDX-License-Identifier: Apache-2.0
"""Write the canonical form as KerasHub's ``.lora.h5``, with the configuration of the backbone that says what its numbers mean.

``enable_lora`` gives every layer of the named kinds one rank: what an adapter lacks of them is zeros, smaller ranks are padded. A
kernel with an axis for heads shares B among them: it is a basis of what the heads' rows of the LoRA's B span, at most as large as a
head.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery_formats.adapters.contents import Contents, contents_of
from surgery_formats.adapters.format import NewTensor, Rendering
from surgery_formats.adapters.keras.families import FAMILIES, Backbone, NumberedLayer
from surgery_formats.adapters.keras.files import CONFIG, METADATA, TENSOR_FILE
from surgery_formats.adapters.packing import PackedFile, laid_out
from surgery_formats.adapters.rows import row_slice
from surgery_formats.adapters.writing import ConversionLedger, places_of, whole_place, zero_padded
from surgery_formats.arrays import Array
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.containers.base import TensorSpec
from surgery_formats.containers.hdf5_layout import lay_out_hdf5
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.families.settings import MOST_LAYERS, ModelSettings
from surgery_formats.updates import LoRA

__all__ = ["render_keras"]

_NUMBERED_AS = "0.32.0"  # the KerasHub whose numbers these are
_NOTHING = 1e-9  # of the greatest singular value: far below what float32 holds
_BACKBONES = {
    "llama": "Llama3Backbone",
    "mistral": "MistralBackbone",
    "qwen2": "QwenBackbone",
    "qwen3": "Qwen3Backbone",
    "gemma": "GemmaBackbone",
    "gemma2": "GemmaBackbone",
    "gemma3_text": "Gemma3Backbone",
    "gpt2": "GPT2Backbone",
    "bert": "BertBackbone",
}
"""Those that KerasHub makes of a model of transformers, by its ``model_type``."""


@dataclass(frozen=True, slots=True)
class _Kernel:
    """A LoRA of a kernel: A's values as a matrix ``(all but the rank, rank)``, B ``(rank, last)``, both in float64."""

    a: Callable[[], Array]
    b: Callable[[], Array]
    rank: int
    sizes: tuple[int, ...]
    last: int


def render_keras(adapter: Adapter, base: Checkpoint | None) -> Rendering:
    """A folder. Only LoRAs of the linear layers of blocks have a place in it.

    Raises:
        FitError: no base is given, or KerasHub makes no backbone of it whose layers are known.
    """
    if base is None:
        raise FitError(
            "KerasHub's files number the layers of a backbone: only the base tells them",
            file=adapter.path,
            hint="give the base with `base=`",
        )
    if base.is_pipeline or str(base.main.config.get("model_type")) not in _BACKBONES:
        raise FitError("is no model whose KerasHub backbone is known", file=base.path)
    name, config = _backbone(base.main.config)
    family = FAMILIES[name]
    layers = family.layers(config)
    ledger = ConversionLedger()
    found: dict[int, _Kernel] = {}
    taken: set[str] = set()
    for site, chain in adapter.updates.items():
        for update in chain:
            held = contents_of(update)
            module = "" if (why := _fault(site, held)) else _module(site, held, base, family)
            numbers = _numbers(module, family, layers)
            if not why and (not numbers or module in taken):
                why = "a second one on one module" if numbers else "KerasHub has no such layer in a block"
            if why or held.lora is None:
                ledger.drop(site, update, why)
                continue
            taken.add(module)
            height = held.lora.shape[0] // len(numbers)
            for number, layer in numbers:
                part = max(layer.part, 0)
                whole = held.lora if layer.part < 0 else row_slice(held.lora, part * height, (part + 1) * height)
                found[number] = _kernel(whole, layer, config)
            ledger.keep(site, update, "folded", held.folded or "factors as Keras has them")
    ledger.drop_prompt(adapter)
    if found:
        _fill(found, family, layers, config)
    rank = max((kernel.rank for kernel in found.values()), default=1)
    tensors = [NewTensor("lora/vars/rank", DType.I64, (), _constant(rank))] if found else []
    for number, kernel in sorted(found.items()):
        tensors += _tensors(f"lora/{number}/vars/lora_kernel", kernel, rank)
    small = {
        CONFIG: {
            "class_name": name,
            "config": {"name": name.lower(), **config},
            "registered_name": f"keras_hub>{name}",
        },
        METADATA: {"keras_hub_version": _NUMBERED_AS},
    }
    files = {file: (json.dumps(content, indent=4) + "\n").encode() for file, content in small.items()}
    return Rendering(TENSOR_FILE, tuple(tensors), {}, files, tuple(ledger.entries), ledger.held, packing=_packed)


def _packed(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> PackedFile:
    """It has no place for free strings."""
    return laid_out(lay_out_hdf5(specs))


def _backbone(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Class and sizes of the backbone that KerasHub makes of a model, as far as its layers go.

    Raises:
        FitError: a size is missing, or none.
    """
    kind, stated = config["model_type"], ModelSettings(config)
    hidden, heads = stated.count("hidden_size", "n_embd"), stated.count("num_attention_heads", "n_head")
    inner = {"default": 4 * hidden} if kind == "gpt2" else {}
    sizes = {
        "num_layers": stated.count("num_hidden_layers", "n_layer", most=MOST_LAYERS),
        "hidden_dim": hidden,
        "intermediate_dim": stated.count("intermediate_size", "n_inner", **inner),
    }
    if kind in ("bert", "gpt2"):
        return _BACKBONES[kind], {**sizes, "num_heads": heads}
    sizes |= {"num_query_heads": heads, "num_key_value_heads": stated.count("num_key_value_heads", default=heads)}
    sizes["head_dim"] = stated.count("head_dim", default=hidden // heads)
    if kind in ("gemma2", "gemma3_text"):
        sizes |= {"use_post_ffw_norm": True, "use_post_attention_norm": True}
    if kind == "gemma3_text":
        sizes["use_query_key_norm"] = True
    return _BACKBONES[kind], sizes


def _fault(site: Site, held: Contents) -> str:
    """Why the format cannot hold an update; empty if it can."""
    if site.flat or site.component:
        return "this format has language models only"
    if held.lora is None or held.dora is not None:
        return f"this format has no {held.update.kind}"
    if site.kernel or not site.path.endswith(".weight"):
        return "this format has linear layers alone"
    return ""


def _module(site: Site, held: Contents, base: Checkpoint, family: Backbone) -> str:
    """The module below the family's path, as ``3.self_attn.q_proj``; empty if the base has it in another way."""
    place = whole_place(places_of(site, base, held.update.tensors))
    stem = re.escape(family.path.removesuffix("{}").removeprefix("model."))
    found = re.fullmatch(rf"(?:.+\.)?{stem}(\d+\..+)\.weight", place[0]) if place is not None else None
    return found[1] if found is not None else ""


def _numbers(module: str, family: Backbone, layers: Sequence[NumberedLayer]) -> list[tuple[int, NumberedLayer]]:
    """The numbers of the layers that hold a module: of a fused one its parts, in order."""
    block, _, name = module.partition(".")
    if not name:
        return []
    first = family.before + int(block) * len(layers)
    held = [(first + place, layer) for place, layer in enumerate(layers) if layer.name == name]
    return sorted(held, key=lambda pair: pair[1].part)


def _kernel(lora: LoRA, layer: NumberedLayer, config: Mapping[str, Any]) -> _Kernel:
    """Factors of a kernel that do what a LoRA does."""
    (out, inputs), rank = lora.shape, lora.rank

    def down() -> Array:
        return lora.A.load(DType.F64).T * lora.scale

    def up() -> Array:
        return lora.B.load(DType.F64).T

    if layer.shape == "dense":
        return _Kernel(down, up, rank, (inputs,), out)
    heads = config[layer.heads]
    size = config.get("head_dim") or config["hidden_dim"] // heads
    if (inputs if layer.shape == "from heads" else out) != heads * size:
        raise FitError(f"a weight of {[out, inputs]} is not one of {heads} heads of {size}", tensor=layer.name)
    if layer.shape == "from heads":
        return _Kernel(down, up, rank, (heads, size), out)
    basis = _basis(up().T.reshape(heads, size, rank))
    kept = basis.shape[1]

    def by_head() -> Array:
        import numpy

        parts = numpy.einsum("dk,ndr,ir->ink", basis, lora.B.load(DType.F64).reshape(heads, size, rank), down())
        return (parts if layer.shape == "heads" else parts.swapaxes(0, 1)).reshape(-1, kept)

    sizes = (inputs, heads) if layer.shape == "heads" else (heads, inputs)
    return _Kernel(by_head, lambda: basis.T, kept, sizes, size)


def _basis(blocks: Array) -> Array:
    """An orthonormal basis ``(size, k)`` of the columns of all heads' blocks ``(heads, size, r)``."""
    import numpy

    columns = blocks.swapaxes(0, 1).reshape(blocks.shape[1], -1)
    left, values, _ = numpy.linalg.svd(columns, full_matrices=False)
    return left[:, : max(int((values > _NOTHING * values[0]).sum()), 1)]


def _fill(
    found: dict[int, _Kernel], family: Backbone, layers: Sequence[NumberedLayer], config: Mapping[str, Any]
) -> None:
    """Zeros for the layers of the same kinds in other blocks, which KerasHub looks for."""
    kinds = {(number - family.before) % len(layers): kernel for number, kernel in found.items()}
    for block in range(config["num_layers"]):
        for place, like in kinds.items():
            number = family.before + block * len(layers) + place
            if number not in found:
                found[number] = _Kernel(_zeros(like.sizes, 1), _zeros((1,), like.last), 1, like.sizes, like.last)


def _zeros(sizes: tuple[int, ...], last: int) -> Callable[[], Array]:
    def load() -> Array:
        import numpy

        return numpy.zeros((math.prod(sizes), last))

    return load


def _constant(value: int) -> Callable[[], Array]:
    def load() -> Array:
        import numpy

        return numpy.int64(value)

    return load


def _tensors(stem: str, kernel: _Kernel, rank: int) -> list[NewTensor]:
    def load_a() -> Array:
        return zero_padded(kernel.a(), 1, rank).reshape(*kernel.sizes, rank)

    def load_b() -> Array:
        return zero_padded(kernel.b(), 0, rank)

    return [
        NewTensor(f"{stem}_a", DType.F32, (*kernel.sizes, rank), load_a),
        NewTensor(f"{stem}_b", DType.F32, (rank, kernel.last), load_b),
    ]
