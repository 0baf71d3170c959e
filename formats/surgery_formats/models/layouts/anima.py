# SPDX-License-Identifier: Apache-2.0
"""Anima: Nvidia's Cosmos-Predict2 with a text adapter in front (diffusers 0.42.1's conversion of Cosmos 2)."""

from __future__ import annotations

from collections.abc import Iterator

from surgery_formats.models.layouts.rule import Network, Rule, same

__all__ = ["NETWORK"]

_IN, _OUT = "blocks.#.", "transformer_blocks.#."
_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "output_proj": "to_out.0", "q_norm": "norm_q"}
_MODULATED = {"self_attn": "norm1", "cross_attn": "norm2", "mlp": "norm3"}


def _block() -> Iterator[Rule]:
    for old, new in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        for part, name in (_ATTENTION | {"k_norm": "norm_k"}).items():
            yield same(f"{_IN}{old}.{part}", f"{_OUT}{new}.{name}")
    for old, new in _MODULATED.items():
        for number in (1, 2):
            yield same(f"{_IN}adaln_modulation_{old}.{number}", f"{_OUT}{new}.linear_{number}")
    yield same(f"{_IN}mlp.layer1", f"{_OUT}ff.net.0.proj")
    yield same(f"{_IN}mlp.layer2", f"{_OUT}ff.net.2")


_RULES = (
    *_block(),
    same("x_embedder.proj.1", "patch_embed.proj"),
    same("t_embedder.1.linear_1", "time_embed.t_embedder.linear_1"),
    same("t_embedder.1.linear_2", "time_embed.t_embedder.linear_2"),
    same("t_embedding_norm", "time_embed.norm"),
    *(same(f"final_layer.adaln_modulation.{number}", f"norm_out.linear_{number}") for number in (1, 2)),
    same("final_layer.linear", "proj_out"),
)

NETWORK = Network("Cosmos-Predict2 or Anima", ("CosmosTransformer3DModel",), (lambda _: _RULES,))
