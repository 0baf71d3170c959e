# SPDX-License-Identifier: Apache-2.0
"""AuraFlow: Fal's release (diffusers 0.42.1, ``convert_auraflow_transformer_checkpoint_to_diffusers``)."""

from __future__ import annotations

from collections.abc import Iterator

from surgery_formats.models.layouts.rule import Network, Rule, same, swapped

__all__ = ["NETWORK"]

_DOUBLE, _SINGLE = (
    ("double_layers.#.", "joint_transformer_blocks.#."),
    ("single_layers.#.", "single_transformer_blocks.#."),
)
_OF_PICTURE = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
_OF_TEXT = {"q": "add_q_proj", "k": "add_k_proj", "v": "add_v_proj", "o": "to_add_out"}
_MLP = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}


def _blocks() -> Iterator[Rule]:
    for (old, new), mlps in ((_DOUBLE, {"mlpX": "ff", "mlpC": "ff_context"}), (_SINGLE, {"mlp": "ff"})):
        for mlp, name in mlps.items():
            yield from (same(f"{old}{mlp}.{a}", f"{new}{name}.{b}") for a, b in _MLP.items())
    old, new = _DOUBLE
    yield same(f"{old}modX.1", f"{new}norm1.linear")
    yield same(f"{old}modC.1", f"{new}norm1_context.linear")
    yield from (same(f"{old}attn.w2{a}", f"{new}attn.{b}") for a, b in _OF_PICTURE.items())
    yield from (same(f"{old}attn.w1{a}", f"{new}attn.{b}") for a, b in _OF_TEXT.items())
    old, new = _SINGLE
    yield same(f"{old}modCX.1", f"{new}norm1.linear")
    yield from (same(f"{old}attn.w1{a}", f"{new}attn.{b}") for a, b in _OF_PICTURE.items())


_RULES = (
    *_blocks(),
    same("register_tokens", "register_tokens"),
    same("t_embedder.mlp.0", "time_step_proj.linear_1"),
    same("t_embedder.mlp.2", "time_step_proj.linear_2"),
    same("cond_seq_linear", "context_embedder"),
    same("positional_encoding", "pos_embed.pos_embed"),
    same("init_x_linear", "pos_embed.proj"),
    swapped("modF.1", "norm_out.linear"),
    same("final_linear", "proj_out"),
)

NETWORK = Network("AuraFlow", ("AuraFlowTransformer2DModel",), (lambda _: _RULES,))
