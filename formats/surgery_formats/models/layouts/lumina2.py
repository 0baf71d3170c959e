# SPDX-License-Identifier: Apache-2.0
"""Lumina-Image 2: Alpha-VLLM's release (diffusers 0.42.1, ``convert_lumina2_to_diffusers``).

Keys and values have a third of the queries' heads.
"""

from __future__ import annotations

from collections.abc import Iterator

from surgery_formats.models.layouts.rule import Network, Rule, fused, same

__all__ = ["NETWORK"]


def _block(at: str, first_norm: str) -> Iterator[Rule]:
    yield fused(f"{at}.attention.qkv", *(f"{at}.attn.{part}" for part in ("to_q", "to_k", "to_v")), units=(3, 1, 1))
    yield same(f"{at}.attention.out", f"{at}.attn.to_out.0")
    yield same(f"{at}.attention.q_norm", f"{at}.attn.norm_q")
    yield same(f"{at}.attention.k_norm", f"{at}.attn.norm_k")
    yield from (same(f"{at}.feed_forward.w{number}", f"{at}.feed_forward.linear_{number}") for number in (1, 2, 3))
    yield from (same(f"{at}.ffn_norm{number}", f"{at}.ffn_norm{number}") for number in (1, 2))
    yield same(f"{at}.attention_norm1", f"{at}.{first_norm}")
    yield same(f"{at}.attention_norm2", f"{at}.norm2")
    yield same(f"{at}.adaLN_modulation.1", f"{at}.norm1.linear")


_EMBEDDED = "time_caption_embed"
_RULES = (
    *_block("layers.#", "norm1.norm"),
    *_block("noise_refiner.#", "norm1.norm"),
    *_block("context_refiner.#", "norm1"),
    same("x_embedder", "x_embedder"),
    *(same(f"cap_embedder.{number}", f"{_EMBEDDED}.caption_embedder.{number}") for number in (0, 1)),
    same("t_embedder.mlp.0", f"{_EMBEDDED}.timestep_embedder.linear_1"),
    same("t_embedder.mlp.2", f"{_EMBEDDED}.timestep_embedder.linear_2"),
    same("final_layer.adaLN_modulation.1", "norm_out.linear_1"),
    same("final_layer.linear", "norm_out.linear_2"),
)

NETWORK = Network("Lumina 2", ("Lumina2Transformer2DModel",), (lambda _: _RULES,))
