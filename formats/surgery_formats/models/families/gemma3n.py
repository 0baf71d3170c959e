# SPDX-License-Identifier: Apache-2.0
"""Gemma 3n (text): four streams of hidden states, an embedding for each layer, and last layers without keys of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
    Activation,
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
    local_base = settings.positive("rope_local_base_freq", default=10_000.0)
    global_base = settings.positive("rope_theta", default=1_000_000.0)
    local_rope, global_rope = ropes_of(settings, sizes, (local_base, global_base))
    near = settings.count("sliding_window", default=512)
    window = windows(settings, sizes, near, ((i + 1) % 5 != 0 for i in range(layers)))
    own = layers - settings.whole("num_kv_shared_layers", default=15, most=layers - 1)
    bias = settings.flag("attention_bias", default=False)
    activation = settings.activation("hidden_activation", default="gelu_pytorch_tanh")
    norm = rms_norms(settings)
    streams = _Streams.of(settings, hidden, norm)
    root = root_of(settings, "model.", "embed_tokens.weight")

    def attend(at: str, index: int) -> Attention:
        rope = global_rope if window[index] is None else local_rope
        full = attention(at, sizes, rope, bias=bias, scale=1.0, window=window[index], q_norm=norm(f"{at}.q_norm"))
        if (shared := _source(settings, index, window, own)) is not None:
            return replace(full, inputs=full.inputs[:1], shared=shared)
        return replace(
            full, k_norm=norm(f"{at}.k_norm"), v_norm=Norm("rms", "", full.q_norm.epsilon if full.q_norm else 0.0)
        )

    def layer(at: str, index: int) -> Layer:
        return Layer(
            attend(f"{at}.self_attn", index),
            Branch(norm(f"{at}.input_layernorm"), norm(f"{at}.post_attention_layernorm")),
            replace(gated_mlp(f"{at}.mlp", replace(sizes, inner=inner[index]), activation), sparsity=sparsity[index]),
            Branch(norm(f"{at}.pre_feedforward_layernorm"), norm(f"{at}.post_feedforward_layernorm")),
            altup=streams.layer(at, activation),
        )

    per_layer = streams.embeddings(settings, root, layers)
    embedding = Embedding(f"{root}embed_tokens.weight", scale=hidden**0.5, scale_rounded=True, per_layer=per_layer)
    softcap = settings.optional_positive("final_logit_softcapping", 30.0)
    model = decoder(settings, sizes, f"{root}layers", layer, norm(f"{root}norm"), embedding, tied=True, softcap=softcap)
    unused = dict(model.unused) | _unused(settings, root, range(own, layers))
    if not streams.scaled:
        gains = (f"{root}layers.{index}.altup.correct_output_scale" for index in range(layers))
        unused |= dict.fromkeys((name for name in gains if name in settings.names), "altup_correct_scale is false")
    return replace(model, unused=unused, altup=streams.around(root), only_text=_ONLY_TEXT)


@dataclass(frozen=True, slots=True)
class _Streams:
    """The streams of hidden states, and what layers do with them.

    Attributes:
        hidden: ``D``.
        norm: Makes a norm, by its name.
        count: Number of streams.
        active: That which layers compute.
        scaled: Whether a layer's correction has gains.
        rank: Of a layer's learned residual.
        width: Values of a token in a layer's own embedding.
    """

    hidden: int
    norm: Callable[[str], Norm]
    count: int
    active: int
    scaled: bool
    rank: int
    width: int

    @classmethod
    def of(cls, settings: ModelSettings, hidden: int, norm: Callable[[str], Norm]) -> _Streams:
        """As the configuration has them."""
        count = settings.count("altup_num_inputs", default=4, most=64)
        active = settings.whole("altup_active_idx", default=0, most=count - 1)
        scaled = settings.flag("altup_correct_scale", default=True)
        rank = settings.count("laurel_rank", default=64)
        width = settings.count("hidden_size_per_layer_input", default=256)
        settings.number("altup_coef_clip", default=120.0)  # bounds coefficients in training
        return cls(hidden, norm, count, active, scaled, rank, width)

    def layer(self, at: str, activation: Activation) -> AltUpLayer:
        """What happens around attention and MLP of the layer `at`."""
        altup, laurel = f"{at}.altup", f"{at}.laurel"
        return AltUpLayer(
            self.norm(f"{altup}.router_norm"),
            projection(f"{altup}.modality_router", self.hidden, self.count),
            projection(f"{altup}.prediction_coefs", self.count, self.count * self.count),
            projection(f"{altup}.correction_coefs", self.count, self.count),
            f"{altup}.correct_output_scale" if self.scaled else "",
            Laurel(
                projection(f"{laurel}.linear_left", self.hidden, self.rank),
                projection(f"{laurel}.linear_right", self.rank, self.hidden),
                self.norm(f"{laurel}.post_laurel_norm"),
            ),
            LayerInput(
                projection(f"{at}.per_layer_input_gate", self.hidden, self.width),
                activation,
                projection(f"{at}.per_layer_projection", self.width, self.hidden),
                self.norm(f"{at}.post_per_layer_input_norm"),
            ),
        )

    def embeddings(self, settings: ModelSettings, root: str, layers: int) -> LayerEmbeddings:
        """The embedding of every token for every layer."""
        return LayerEmbeddings(
            f"{root}embed_tokens_per_layer.weight",
            settings.count("vocab_size_per_layer_input", default=262144),
            self.width,
            self.width**0.5,
            projection(f"{root}per_layer_model_projection", self.hidden, layers * self.width),
            self.norm(f"{root}per_layer_projection_norm"),
        )

    def around(self, root: str) -> AltUp:
        """What makes them in front of the layers, and one of them behind."""
        begins, ends = (
            tuple(
                projection(f"{root}altup_{name}projections.{n}", self.hidden, self.hidden)
                for n in range(self.count - 1)
            )
            for name in ("", "unembed_")
        )
        return AltUp(self.active, begins, ends)


def _source(settings: ModelSettings, index: int, window: Sequence[int | None], own: int) -> int | None:
    """The layer whose keys and values layer `index` takes: the last of its kind among the `own` ones that have some."""
    if index < own:
        return None
    found = [number for number in range(own) if window[number] == window[index]]
    if not found:
        raise settings.fault(f"layer {index} shares the keys of another, but none of its kind has any")
    return found[-1]


def _unused(settings: ModelSettings, root: str, sharing: range) -> dict[str, str]:
    """Tensors for keys and values that some checkpoints have in the layers that share them."""
    names = (
        f"{root}layers.{index}.self_attn.{part}.{leaf}"
        for index in sharing
        for part in _KEYS
        for leaf in ("weight", "bias")
    )
    return dict.fromkeys((name for name in names if name in settings.names), _NOT_ITS_OWN)


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
