# SPDX-License-Identifier: Apache-2.0
"""KerasHub's backbones: which of their layers have weights, in the order in which KerasHub numbers them, and transformers' names.

The order is that of ``Backbone._flatten_layers``, the same from KerasHub 0.18 with Keras 3.7 to 0.32 with 3.15. Orientations are those of
KerasHub's own converters (``keras_hub/src/utils/transformers/convert_*.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["FAMILIES", "Backbone", "NumberedLayer", "Shape"]

Shape = Literal["dense", "heads", "heads first", "from heads"]
"""How a kernel lies.

``dense``
    ``(in, out)``.
``heads``
    ``(in, heads, size)``.
``heads first``
    ``(heads, in, size)``.
``from heads``
    ``(heads, size, out)``.
"""


@dataclass(frozen=True, slots=True)
class NumberedLayer:
    """A layer with weights.

    Attributes:
        name: Of the module in a block of transformers; empty for one that has no LoRA that is read.
        shape: Of its kernel.
        heads: Field of the backbone's configuration with its number of heads, if it has some.
        part: Which third of the module it is, for a fused one; -1 for a whole module.
        where: Field that is true in backbones that have the layer; empty if all do.
    """

    name: str = ""
    shape: Shape = "dense"
    heads: str = ""
    part: int = -1
    where: str = ""


@dataclass(frozen=True, slots=True)
class Backbone:
    """A backbone.

    Attributes:
        before: Layers with weights in front of the first block.
        block: Those of a block.
        path: Path of a block in transformers.
        absent: Fields that have to be empty: what they add is not numbered here.
    """

    before: int
    block: tuple[NumberedLayer, ...]
    path: str = "model.layers.{}"
    absent: tuple[str, ...] = ()

    def layers(self, config: Mapping[str, Any]) -> tuple[NumberedLayer, ...]:
        """Those that a block of this backbone has."""
        return tuple(layer for layer in self.block if not layer.where or config.get(layer.where) is True)


_Q, _KV, _PLAIN = "num_query_heads", "num_key_value_heads", "num_heads"
_NONE = NumberedLayer()


def _attention(shape: Shape, *, norms: bool = False) -> tuple[NumberedLayer, ...]:
    """Output, value, key and query, the latter two behind norms of theirs in some models."""
    norm = (_NONE,) if norms else ()
    return (
        NumberedLayer("self_attn.o_proj", "from heads", _Q),
        NumberedLayer("self_attn.v_proj", shape, _KV),
        *norm,
        NumberedLayer("self_attn.k_proj", shape, _KV),
        *norm,
        NumberedLayer("self_attn.q_proj", shape, _Q),
    )


_MLP = (NumberedLayer("mlp.down_proj"), NumberedLayer("mlp.gate_proj"), NumberedLayer("mlp.up_proj"))
_MLP_OF_GEMMA = (NumberedLayer("mlp.down_proj"), NumberedLayer("mlp.up_proj"), NumberedLayer("mlp.gate_proj"))
_LLAMA = Backbone(1, (_NONE, _NONE, *_MLP, _NONE, _NONE, *_attention("heads")))  # block, norm, MLP, norm, attention
_QWEN3 = Backbone(1, (_NONE, _NONE, *_MLP, _NONE, _NONE, *_attention("heads", norms=True)))


def _gemma(norms: tuple[NumberedLayer, ...] = ()) -> tuple[NumberedLayer, ...]:
    output, *rest = _attention("heads first")
    return (
        _NONE,
        *_MLP_OF_GEMMA,
        NumberedLayer(where="use_post_ffw_norm"),
        _NONE,
        _NONE,
        output,
        *norms,
        *rest,
        NumberedLayer(where="use_post_attention_norm"),
        _NONE,
    )


_QK_NORMS = (NumberedLayer(where="use_query_key_norm"), NumberedLayer(where="use_query_key_norm"))
_GPT2 = Backbone(
    2,
    (
        *(_NONE, _NONE),
        NumberedLayer("mlp.c_proj"),
        NumberedLayer("mlp.c_fc"),
        *(_NONE, _NONE),
        NumberedLayer("attn.c_proj", "from heads", _PLAIN),
        *(NumberedLayer("attn.c_attn", "heads", _PLAIN, part) for part in (2, 1, 0)),
    ),
    "h.{}",
)
_BERT = Backbone(
    4,
    (
        _NONE,
        NumberedLayer("output.dense"),
        NumberedLayer("intermediate.dense"),
        *(_NONE, _NONE, _NONE),
        NumberedLayer("attention.output.dense", "from heads", _PLAIN),
        *(NumberedLayer(f"attention.self.{name}", "heads", _PLAIN) for name in ("value", "key", "query")),
    ),
    "encoder.layer.{}",
)

FAMILIES: Mapping[str, Backbone] = {
    "LlamaBackbone": _LLAMA,
    "Llama3Backbone": _LLAMA,
    "MistralBackbone": _LLAMA,
    "QwenBackbone": _LLAMA,
    "Qwen3Backbone": _QWEN3,
    "GemmaBackbone": Backbone(1, _gemma()),
    "Gemma3Backbone": Backbone(1, _gemma(_QK_NORMS), absent=("vision_encoder",)),
    "GPT2Backbone": _GPT2,
    "BertBackbone": _BERT,
}
"""By ``class_name`` of a backbone's configuration."""
