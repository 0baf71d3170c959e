# SPDX-License-Identifier: Apache-2.0
"""Gemma 3n (text): four streams of hidden states, an embedding for each layer, and last layers without keys of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from surgery_formats.models.families.decoder import (
    attention,
    decoder,
    gated_mlp,
    projection,
    rms_norms,
    root_of,
    windows,
)
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import (
    AltUp,
    AltUpLayer,
    Attention,
    Branch,
    Embedding,
    Laurel,
    Layer,
    LayerEmbeddings,
    LayerInput,
    Model,
    Norm,
)
from surgery_formats.models.families.rope import ropes_of
from surgery_formats.models.families.settings import ModelSettings, read_sizes

__all__ = ["GEMMA3N"]

_KEYS = ("k_proj", "v_proj", "k_norm", "v_norm")
_NOT_ITS_OWN = "the layer takes the keys and values of another"
_ONLY_TEXT = "each layer has an embedding of the token itself besides"


def gemma3n(settings: ModelSettings) -> Model:
    """Gemma 3n: AltUp (arXiv:2301.13310), LAuReL (2411.07501), embeddings of each layer; grouped if no layer shares keys."""
    sizes = read_sizes(
        settings,
        vocabulary=262400,
        max_positions=32768,
        kv_heads=2,
        head_dim=256,
        hidden=2048,
        layers=35,
        heads=8,
        inner_keys=(),
    )
    layers, hidden = sizes.layers, sizes.hidden
    inner = _inner(settings, layers)
    sparsity = _sparsity(settings, layers)
    local_rope, global_rope = ropes_of(
        settings,
        sizes,
        (
            settings.positive("rope_local_base_freq", default=10_000.0),
            settings.positive("rope_theta", default=1_000_000.0),
        ),
    )
    window = windows(
        settings, sizes, settings.count("sliding_window", default=512), ((i + 1) % 5 != 0 for i in range(layers))
    )
    own = layers - settings.whole("num_kv_shared_layers", default=15, most=layers - 1)
    bias = settings.flag("attention_bias", default=False)
    activation = settings.activation("hidden_activation", default="gelu_pytorch_tanh")
    norm = rms_norms(settings)
    streams = settings.count("altup_num_inputs", default=4, most=64)
    active = settings.whole("altup_active_idx", default=0, most=streams - 1)
    scaled = settings.flag("altup_correct_scale", default=True)
    rank = settings.count("laurel_rank", default=64)
    width = settings.count("hidden_size_per_layer_input", default=256)
    settings.number("altup_coef_clip", default=120.0)  # bounds coefficients in training
    root = root_of(settings, "model.", "embed_tokens.weight")

    def source(index: int) -> int | None:
        """The layer whose keys and values layer `index` takes: the last of its kind that has its own."""
        if index < own:
            return None
        found = [number for number in range(own) if window[number] == window[index]]
        if not found:
            raise settings.fault(f"layer {index} shares the keys of another, but none of its kind has any")
        return found[-1]

    def attend(at: str, index: int) -> Attention:
        rope = global_rope if window[index] is None else local_rope
        full = attention(at, sizes, rope, bias=bias, scale=1.0, window=window[index], q_norm=norm(f"{at}.q_norm"))
        if (shared := source(index)) is not None:
            return replace(full, inputs=full.inputs[:1], shared=shared)
        return replace(
            full, k_norm=norm(f"{at}.k_norm"), v_norm=Norm("rms", "", full.q_norm.epsilon if full.q_norm else 0.0)
        )

    def layer(at: str, index: int) -> Layer:
        altup, laurel = f"{at}.altup", f"{at}.laurel"
        return Layer(
            attend(f"{at}.self_attn", index),
            Branch(norm(f"{at}.input_layernorm"), norm(f"{at}.post_attention_layernorm")),
            replace(
                gated_mlp(f"{at}.mlp", replace(sizes, inner=inner[index]), activation),
                sparsity=sparsity[index],
            ),
            Branch(norm(f"{at}.pre_feedforward_layernorm"), norm(f"{at}.post_feedforward_layernorm")),
            altup=AltUpLayer(
                norm(f"{altup}.router_norm"),
                projection(f"{altup}.modality_router", hidden, streams),
                projection(f"{altup}.prediction_coefs", streams, streams * streams),
                projection(f"{altup}.correction_coefs", streams, streams),
                f"{altup}.correct_output_scale" if scaled else "",
                Laurel(
                    projection(f"{laurel}.linear_left", hidden, rank),
                    projection(f"{laurel}.linear_right", rank, hidden),
                    norm(f"{laurel}.post_laurel_norm"),
                ),
                LayerInput(
                    projection(f"{at}.per_layer_input_gate", hidden, width),
                    activation,
                    projection(f"{at}.per_layer_projection", width, hidden),
                    norm(f"{at}.post_per_layer_input_norm"),
                ),
            ),
        )

    begins, ends = (
        tuple(projection(f"{root}altup_{name}projections.{n}", hidden, hidden) for n in range(streams - 1))
        for name in ("", "unembed_")
    )
    per_layer = LayerEmbeddings(
        f"{root}embed_tokens_per_layer.weight",
        settings.count("vocab_size_per_layer_input", default=262144),
        width,
        width**0.5,
        projection(f"{root}per_layer_model_projection", hidden, layers * width),
        norm(f"{root}per_layer_projection_norm"),
    )
    embedding = Embedding(f"{root}embed_tokens.weight", scale=hidden**0.5, scale_rounded=True, per_layer=per_layer)
    softcap = settings.optional_positive("final_logit_softcapping", 30.0)
    model = decoder(settings, sizes, f"{root}layers", layer, norm(f"{root}norm"), embedding, tied=True, softcap=softcap)
    unused = dict(model.unused)
    for index in range(layers):
        at = f"{root}layers.{index}"
        if index >= own:
            names = [f"{at}.self_attn.{part}.{leaf}" for part in _KEYS for leaf in ("weight", "bias")]
            unused |= dict.fromkeys((name for name in names if name in settings.names), _NOT_ITS_OWN)
        if not scaled and f"{at}.altup.correct_output_scale" in settings.names:
            unused[f"{at}.altup.correct_output_scale"] = "altup_correct_scale is false"
    return replace(model, unused=unused, altup=AltUp(active, begins, ends), only_text=_ONLY_TEXT)


def _inner(settings: ModelSettings, layers: int) -> tuple[int, ...]:
    """``intermediate_size`` of each layer: one for all, or a list."""
    value = settings.raw("intermediate_size")
    if not isinstance(value, list):
        return (settings.count("intermediate_size", default=16384),) * layers
    sizes = _each(settings, value, "intermediate_size", layers)
    if any(isinstance(size, bool) or not isinstance(size, int) or not 0 < size < 1 << 31 for size in sizes):
        raise settings.fault("intermediate_size must have whole numbers above 0")
    return tuple(sizes)


def _sparsity(settings: ModelSettings, layers: int) -> tuple[float, ...]:
    """``activation_sparsity_pattern``: the share of each MLP's gate that is cut off; of the first ten layers by default."""
    value = settings.raw("activation_sparsity_pattern")
    if value is None:
        return tuple(0.95 if layers > 10 and index < 10 else 0.0 for index in range(layers))
    shares = _each(settings, value, "activation_sparsity_pattern", layers)
    if any(isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1 for share in shares):
        raise settings.fault("activation_sparsity_pattern must have numbers from 0 to below 1")
    return tuple(float(share) for share in shares)


def _each(settings: ModelSettings, value: Any, key: str, layers: int) -> list[Any]:
    if not isinstance(value, list) or len(value) != layers:
        raise settings.fault(f"{key} must be a list with an entry for each of the {layers} layers")
    return value


GEMMA3N = Family(names=("gemma3n_text",), embedding="model.embed_tokens", head="lm_head", tied=True, recipe=gemma3n)
