# SPDX-License-Identifier: Apache-2.0
"""Write the canonical form as litgpt's folder: ``lit_model.pth.lora``, ``hyperparameters.yaml`` and ``model_config.yaml``.

litgpt builds the layers that its switches name, in every block, with one rank and alpha: what an adapter lacks of them is
zeros, smaller ranks are padded with zeros, and other scales multiplied into ``lora_B``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from surgery_formats.adapters.alphas import written_alpha
from surgery_formats.adapters.contents import Contents, contents_of
from surgery_formats.adapters.format import NewTensor, Rendering
from surgery_formats.adapters.litgpt.files import (
    HYPERPARAMETERS,
    MODEL_CONFIG,
    MODULES,
    QKV,
    TENSOR_FILE,
    written_yaml,
)
from surgery_formats.adapters.packing import packed_as_torch
from surgery_formats.adapters.writing import (
    ConversionLedger,
    commonest,
    factor_dtype,
    places_of,
    whole_place,
    zero_padded,
)
from surgery_formats.arrays import Array
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.families.settings import ModelSettings, Sizes, read_sizes
from surgery_formats.updates import LoRA

__all__ = ["render_litgpt"]

_OURS = {theirs: own for own, theirs in MODULES.items()}
_SWITCHES = {"attn.proj": "lora_projection", "mlp.fc_1": "lora_mlp", "mlp.fc_2": "lora_mlp", "mlp.proj": "lora_mlp"}
_READ = ("llama", "mistral")


def render_litgpt(adapter: Adapter, base: Checkpoint | None) -> Rendering:
    """A folder. Only LoRAs of Llama's and Mistral's linear layers and head have a place in it.

    Raises:
        FitError: no base is given, or it is none of these.
    """
    if base is None or base.is_pipeline or base.main.config.get("model_type") not in _READ:
        raise FitError(
            "litgpt's layers have the sizes of the base" if base is None else "is no Llama or Mistral",
            file=adapter.path if base is None else base.path,
            hint="give the base with `base=`" if base is None else None,
        )
    ledger = ConversionLedger()
    found: dict[str, LoRA] = {}
    noted: list[tuple[Site, Contents]] = []
    for site, chain in adapter.updates.items():
        for update in chain:
            held = contents_of(update)
            name = "" if (why := _fault(site, held)) else _name(site, held, base)
            if not why and (not name or name in found):
                why = "a second one on one module" if name else "litgpt trains no such module of this model"
            if why:
                ledger.drop(site, update, why)
            elif held.lora is not None:
                found[name] = held.lora
                noted.append((site, held))
    ledger.drop_prompt(adapter)
    rank = max((lora.rank for lora in found.values()), default=1)
    scale = commonest(lora.scale for lora in found.values() if lora.scale) or 1.0
    for site, held in noted:
        assert held.lora is not None
        said = [f"scale {held.lora.scale:g} / {scale:g}"] if held.lora.scale != scale else []
        said += [f"rank {held.lora.rank} padded to {rank}"] if held.lora.rank != rank else []
        said += [held.folded] if held.folded else []
        ledger.keep(site, held.update, "folded" if said else "exact", ", ".join(said))
    config, switches = base.main.config, _switches(found)
    tensors = list(_tensors(found, switches, _shapes(config), rank, scale)) if found else []
    settings = {
        "checkpoint_dir": adapter.base_name or str(base.path.name),
        "precision": "32-true",
        "lora_r": rank,
        "lora_alpha": written_alpha(scale * rank),
        "lora_dropout": 0.0,
        **switches,
    }
    small = {HYPERPARAMETERS: written_yaml(settings), MODEL_CONFIG: written_yaml(_model(config))}
    packing = partial(packed_as_torch, within="model")
    return Rendering(TENSOR_FILE, tuple(tensors), {}, small, tuple(ledger.entries), ledger.held, packing=packing)


def _fault(site: Site, held: Contents) -> str:
    """Why the format cannot hold an update; empty if it can."""
    if site.flat or site.component:
        return "litgpt has language models only"
    if held.lora is None or held.dora is not None:
        return f"this format has no {held.update.kind}"
    if site.kernel or not site.path.endswith(".weight"):
        return "this format has linear layers alone"
    return ""


def _name(site: Site, held: Contents, base: Checkpoint) -> str:
    """The path of transformers, for a module that litgpt trains; else empty."""
    place = whole_place(places_of(site, base, held.update.tensors))
    name = place[0].removesuffix(".weight") if place is not None else ""
    module = name.partition("layers.")[2].partition(".")[2]
    inside = module in _OURS or module.removeprefix("self_attn.") in QKV
    return name if inside or (name == "lm_head" and not base.main.tied) else ""


def _switches(found: Mapping[str, LoRA]) -> dict[str, bool]:
    modules = {name.partition("layers.")[2].partition(".")[2] or name for name in found}
    on = {switch: f"self_attn.{part}" in modules for part, switch in QKV.items()}
    for own, switch in _SWITCHES.items():
        on[switch] = on.get(switch, False) or MODULES[own] in modules
    return {**on, "lora_head": "lm_head" in modules}


def _sizes(config: Mapping[str, Any]) -> Sizes:
    """What the base's config.json says; what it leaves out is as in transformers' classes.

    Raises:
        FitError: a size is none.
    """
    kv_heads, inner = (8, 14336) if config["model_type"] == "mistral" else (None, 11008)
    return read_sizes(ModelSettings(config), vocabulary=32000, max_positions=4096, kv_heads=kv_heads, inner=inner)


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Sizes of the modules of one layer, and of the head."""
    sizes = _sizes(config)
    hidden, inner = sizes.hidden, sizes.inner
    q, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    return {
        **{f"self_attn.{part}": (rows, hidden) for part, rows in (("q_proj", q), ("k_proj", kv), ("v_proj", kv))},
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "lm_head": (sizes.vocabulary, hidden),
        "layers": (sizes.layers, 0),
    }


def _tensors(
    found: Mapping[str, LoRA],
    switches: Mapping[str, bool],
    shapes: Mapping[str, tuple[int, int]],
    rank: int,
    scale: float,
) -> Sequence[NewTensor]:
    new: list[NewTensor] = []
    parts = [f"self_attn.{part}" for part, switch in QKV.items() if switches[switch]]
    for layer in range(shapes["layers"][0]):
        at, own = f"transformer.h.{layer}", f"model.layers.{layer}"
        if parts:
            new += _joined(f"{at}.attn.qkv", [(found.get(f"{own}.{p}"), shapes[p]) for p in parts], rank, scale, found)
        for module, switch in _SWITCHES.items():
            if switches[switch]:
                theirs = MODULES[module]
                new += _joined(f"{at}.{module}", [(found.get(f"{own}.{theirs}"), shapes[theirs])], rank, scale, found)
    if switches["lora_head"]:
        new += _joined("lm_head", [(found["lm_head"], shapes["lm_head"])], rank, scale, found)
    return new


def _joined(
    name: str,
    parts: Sequence[tuple[LoRA | None, tuple[int, int]]],
    rank: int,
    scale: float,
    found: Mapping[str, LoRA],
) -> list[NewTensor]:
    """Both factors of one of litgpt's modules: those of its parts, one below the other, zeros where there is none.

    Raises:
        FitError: a part has another size than the base's configuration says.
    """
    for lora, shape in parts:
        if lora is not None and lora.shape != shape:
            raise FitError(
                f"a weight of {list(lora.shape)}, which is {list(shape)} by the base's config.json", tensor=name
            )
    out, inputs = sum(shape[0] for _, shape in parts), parts[0][1][1]
    present = [lora for lora, _ in parts if lora is not None] or list(found.values())

    def load_a() -> Array:
        import numpy

        whole = numpy.zeros((len(parts) * rank, inputs))
        for number, (lora, _) in enumerate(parts):
            if lora is not None:
                whole[number * rank : (number + 1) * rank] = zero_padded(lora.A.load(DType.F64), 0, rank)
        return whole

    def load_b() -> Array:
        import numpy

        whole, at = numpy.zeros((out, rank)), 0
        for lora, (rows, _) in parts:
            if lora is not None:
                times = 1.0 if lora.scale == scale else lora.scale / scale
                whole[at : at + rows] = zero_padded(lora.B.load(DType.F64), 1, rank) * times
            at += rows
        return whole

    folded = any(lora.scale != scale for lora in present)
    return [
        NewTensor(
            f"{name}.lora_A",
            factor_dtype([lora.A for lora in present], folded=False),
            (len(parts) * rank, inputs),
            load_a,
        ),
        NewTensor(f"{name}.lora_B", factor_dtype([lora.B for lora in present], folded=folded), (out, rank), load_b),
    ]


def _model(config: Mapping[str, Any]) -> dict[str, Any]:
    """The model_config.yaml of such a model, as far as its layers' sizes go."""
    sizes = _sizes(config)
    return {
        "name": str(config.get("_name_or_path") or "model").rpartition("/")[2] or "model",
        "block_size": sizes.max_positions,
        "vocab_size": sizes.vocabulary,
        "padded_vocab_size": sizes.vocabulary,
        "n_layer": sizes.layers,
        "n_head": sizes.heads,
        "head_size": sizes.head_dim,
        "n_query_groups": sizes.kv_heads,
        "n_embd": sizes.hidden,
        "intermediate_size": sizes.inner,
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": False,
        "norm_class_name": "RMSNorm",
        "norm_eps": config.get("rms_norm_eps", 1e-5),
        "mlp_class_name": "LLaMAMLP",
        "rope_base": int(config.get("rope_theta") or 10000),
    }
