# SPDX-License-Identifier: Apache-2.0
"""HiDream: every program uses diffusers' names (diffusers 0.42.1, ``convert_hidream_transformer_to_diffusers``)."""

from __future__ import annotations

from surgery_formats.models.layouts.rule import Network, same

__all__ = ["NETWORK"]

_LINEAR = ("w1", "w2", "w3")
_OF_PICTURE = ("to_q", "to_k", "to_v", "to_out", "q_rms_norm", "k_rms_norm")
_INSIDE = (
    "adaLN_modulation.1",
    *(f"attn1.{name}" for name in _OF_PICTURE),
    *(
        f"ff_i.{name}"
        for name in ("gate", *(f"{part}.{each}" for part in ("shared_experts", "experts.#") for each in _LINEAR))
    ),
)
_OF_TEXT = (*(f"attn1.{name}_t" for name in _OF_PICTURE), *(f"ff_t.{name}" for name in _LINEAR))
_NAMES = (
    *(f"double_stream_blocks.#.block.{name}" for name in (*_INSIDE, *_OF_TEXT)),
    *(f"single_stream_blocks.#.block.{name}" for name in _INSIDE),
    *(f"t_embedder.timestep_embedder.linear_{number}" for number in (1, 2)),
    *(f"p_embedder.pooled_embedder.linear_{number}" for number in (1, 2)),
    *("x_embedder.proj", "final_layer.linear", "final_layer.adaLN_modulation.1", "caption_projection.#.linear"),
)
_RULES = tuple(same(name, name) for name in _NAMES)

NETWORK = Network("HiDream", ("HiDreamImageTransformer2DModel",), (lambda _: _RULES,))
