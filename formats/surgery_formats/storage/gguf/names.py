# SPDX-License-Identifier: Apache-2.0
"""Which weight of the model's code a tensor of a GGUF is, by architecture, and in which order its rows lie.

The tables follow llama.cpp's converter (``conversion/*.py`` and gguf-py's ``tensor_mapping.py``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from surgery_formats.errors import FitError, MalformedError
from surgery_formats.tensors.ggml import BY_NAME
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show

__all__ = ["ARCHITECTURES", "ARCHITECTURE_KEY", "Architecture", "Namer", "Place", "named_weight", "stored_weight"]

ARCHITECTURE_KEY = "general.architecture"
"""The key of a GGUF, and of the configuration made from it, that says which table applies."""


@dataclass(frozen=True, slots=True)
class Place:
    """What a tensor of a GGUF is.

    Attributes:
        name: As the model's code has it.
        sizes: Of the weight in the model's code.
        shape: Rows and columns as the file stores them.
        transposed: Whether the file's rows are the columns of `sizes`.
        head: Rows of a head with interleaved halves; 1 if rows lie as in the model's code.
        plus_one: Whether 1 was added to the values (Gemma's norms).
        in_full: Whether llama.cpp expects float32: vectors, norms, routers, learned positions.
    """

    name: str
    sizes: tuple[int, ...]
    shape: tuple[int, int]
    transposed: bool = False
    head: int = 1
    plus_one: bool = False
    in_full: bool = False


@dataclass(frozen=True, slots=True)
class Architecture:
    """The names of one architecture.

    Attributes:
        layers: Module path of a layer, with ``{}`` for its number.
        modules: Module of a tensor of a layer, below the layer.
        whole: Module of a tensor of the whole model; Llama's, if it is empty.
        interleaved: Whether queries and keys are stored with interleaved halves.
        plus_one: Whether norms are stored with 1 added.
        conv1d: Whether the model's code has linear weights as ``(in, out)``.
    """

    modules: Mapping[str, str]
    layers: str = "model.layers.{}"
    whole: Mapping[str, str] = field(default_factory=dict)
    interleaved: bool = False
    plus_one: bool = False
    conv1d: bool = False


_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_AFTER = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_SANDWICH = {**_AFTER, "ffn_norm": "pre_feedforward_layernorm"}


def _experts(block: str) -> dict[str, str]:
    """Stacks of experts, under the names that MLX gives them: transformers has gate and up as one stack."""
    return {
        "ffn_gate_inp": f"{block}.gate",
        "ffn_gate_exps": f"{block}.switch_mlp.gate_proj",
        "ffn_up_exps": f"{block}.switch_mlp.up_proj",
        "ffn_down_exps": f"{block}.switch_mlp.down_proj",
    }


_SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_DENSE = {**_ATTENTION, **_MLP}
_CODE = {**_ATTENTION, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
_PHI2 = {
    **_ATTENTION,
    "attn_output": "self_attn.dense",
    "attn_qkv": "self_attn.qkv_proj",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
_GPT2 = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_PHI3 = {**_ATTENTION, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture({**_DENSE, **_experts("block_sparse_moe")}, interleaved=True),
    "granite": Architecture(_DENSE, interleaved=True),
    "smollm3": Architecture(_DENSE, interleaved=True),
    "qwen2": Architecture(_DENSE),
    "qwen3": Architecture({**_DENSE, **_HEAD_NORMS}),
    "qwen2moe": Architecture({**_DENSE, **_experts("mlp"), **_SHARED}),
    "qwen3moe": Architecture({**_DENSE, **_HEAD_NORMS, **_experts("mlp")}),
    "gemma": Architecture(_DENSE, plus_one=True),
    "gemma2": Architecture({**_DENSE, **_SANDWICH}, plus_one=True),
    "gemma3": Architecture({**_DENSE, **_HEAD_NORMS, **_SANDWICH}, plus_one=True),
    "olmo2": Architecture({**_DENSE, **_HEAD_NORMS, **_AFTER}),
    "olmo": Architecture(_DENSE, interleaved=True),
    "olmoe": Architecture({**_DENSE, **_HEAD_NORMS, **_experts("mlp")}),
    "starcoder2": Architecture(_CODE),
    "command-r": Architecture({**_DENSE, **_HEAD_NORMS}),
    "phi2": Architecture(_PHI2, whole={**_WHOLE, "output_norm": "model.final_layernorm"}),
    "phi3": Architecture(_PHI3),
    "gpt2": Architecture(
        _GPT2,
        "transformer.h.{}",
        {"token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f"},
        conv1d=True,
    ),
}
_IN_FULL = (
    "ffn_gate_inp",
    "ffn_gate_inp_shexp",
    "position_embd",
    "rope_freqs",
    "rope_factors_long",
    "rope_factors_short",
)


_OUTSIDE = ("", "model.", "transformer.", "language_model.", "model.language_model.", "language_model.model.")
"""What stands before the layers of a language model, alone or within a larger one."""


def _whole_of(architecture: Architecture) -> Mapping[str, str]:
    return architecture.whole or _WHOLE


def named_weight(name: str, stored: str) -> tuple[str, str, str]:
    """Stem, leaf and the model's name of a tensor of the architecture `name`; one that no table has keeps its own."""
    architecture = ARCHITECTURES[name]
    stem, _, leaf = stored.rpartition(".")
    if not stem.startswith("blk."):
        module = _whole_of(architecture).get(stem)
        return stem, leaf, stored if module is None else f"{module}.{leaf}"
    number, _, stem = stem.removeprefix("blk.").partition(".")
    module = architecture.modules.get(stem)
    if module is None and (expert := stem.rpartition("."))[2].isdecimal() and name == "llama":
        # Mixtral as it was stored before experts were stacked.
        part = {"ffn_gate": "w1", "ffn_up": "w3", "ffn_down": "w2"}.get(expert[0])
        module = part and f"block_sparse_moe.experts.{expert[2]}.{part}"
    if module is None or not number.isdecimal():
        return stem, leaf, stored
    return stem, leaf, f"{architecture.layers.format(number)}.{module}.{leaf}"


def stored_weight(name: str, weight: str) -> str:
    """What a file of the architecture `name` calls the weight of a model; empty if it has no place for it."""
    architecture = ARCHITECTURES[name]
    module, _, leaf = weight.rpartition(".")
    last = architecture.layers.partition(".{}")[0].rpartition(".")[2]
    if layer := re.fullmatch(rf"((?:[^.]+\.)*){last}\.(\d+)\.(.+)", module):
        stem = next((stem for stem, known in architecture.modules.items() if known == layer[3]), "")
        return f"blk.{layer[2]}.{stem}.{leaf}" if stem and layer[1] in _OUTSIDE else ""
    for stem, known in _whole_of(architecture).items():
        end = known.rpartition(".")[2]
        if module == end or (module.endswith(f".{end}") and module.removesuffix(end) in _OUTSIDE):
            return f"{stem}.{leaf}"
    return ""


class Namer:
    """Finds the weights of one network.

    Args:
        config: Made of the file's key-values; its own keys of llama.cpp's are `ARCHITECTURE_KEY` alone.

    Raises:
        FitError: an architecture that is not known.
    """

    def __init__(self, config: Mapping[str, Any], file: StoredTensor) -> None:
        name = config.get(ARCHITECTURE_KEY)
        if name not in ARCHITECTURES:
            raise FitError(
                f"a GGUF of the architecture '{show(name, 40)}' is not read",
                file=file.path,
                hint=f"known are {', '.join(sorted(ARCHITECTURES))}",
            )
        self._name = str(name)
        self._architecture = ARCHITECTURES[self._name]
        queries = config.get("num_attention_heads")
        self._heads = {"attn_q": queries, "attn_k": config.get("num_key_value_heads", queries)}

    def place(self, tensor: StoredTensor) -> Place:
        """What a tensor is; one that no table has keeps its own name.

        Raises:
            MalformedError: it has no shape that such a weight can have.
        """
        architecture, type_ = self._architecture, BY_NAME[tensor.packed_as]
        stem, leaf, name = named_weight(self._name, tensor.name)
        sizes = type_.sizes(tensor.shape)
        if name.endswith(".switch_mlp.gate_proj.weight") and len(sizes) != 3:
            raise MalformedError("is no stack of experts", file=tensor.path, tensor=tensor.name)
        if stem == "ffn_gate_inp_shexp" and len(sizes) == 1:
            sizes = (1, *sizes)  # the converter drops the axis of one row
        if len(sizes) == 1:
            shape = (sizes[0], 1)
        else:
            shape = (math.prod(sizes[:-1]), sizes[-1]) if sizes else (1, 1)
        turned = architecture.conv1d and stem not in ("token_embd", "position_embd", "output") and len(sizes) == 2
        norm = stem.endswith("norm") and leaf == "weight"
        return Place(
            name,
            sizes[::-1] if turned else sizes,
            shape,
            transposed=turned,
            head=self._head(stem, shape[0], tensor) if architecture.interleaved else 1,
            plus_one=architecture.plus_one and norm,
            in_full=len(sizes) < 2 or norm or stem in _IN_FULL,
        )

    def stored_name(self, name: str) -> str:
        """What a file of this architecture calls the weight `name`, of those that an output may add; else empty."""
        return "output.weight" if name == "lm_head.weight" and "output" in _whole_of(self._architecture) else ""

    @property
    def architecture(self) -> str:
        """Its name."""
        return self._name

    def _head(self, stem: str, rows: int, tensor: StoredTensor) -> int:
        if stem not in self._heads:
            return 1
        heads = self._heads[stem]
        if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1 or rows % (2 * heads):
            raise MalformedError(
                f"{rows} rows are not {show(heads, 40)} heads of an even number of rows",
                file=tensor.path,
                tensor=tensor.name,
            )
        return rows // heads
