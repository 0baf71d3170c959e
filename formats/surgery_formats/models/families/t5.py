# SPDX-License-Identifier: Apache-2.0
"""T5 and its multilingual relatives: relative positions, one embedding for encoder and decoder, and (v1.0) for the head."""

from __future__ import annotations

from dataclasses import dataclass, replace

from surgery_formats.models.families.decoder import pre_norm, projection
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import (
    MLP,
    Activation,
    Attention,
    Cross,
    Embedding,
    HiddenHead,
    LanguageHead,
    Layer,
    Model,
    Norm,
    Projection,
    RelativeBias,
)
from surgery_formats.models.families.settings import MOST_LAYERS, ModelSettings
from surgery_formats.models.families.tasks import only_tasks
from surgery_formats.text import show

__all__ = ["FAMILY"]

_SHARED, _HEAD = "shared.weight", "lm_head.weight"
_LEFT_OVER = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"}
_ANY_LENGTH = 1 << 20  # distances have no end; graphs state one


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What all layers have in common."""

    hidden: int
    inner: int
    heads: int
    head_dim: int
    layers: int
    vocabulary: int
    activation: Activation
    gated: bool
    epsilon: float
    buckets: int
    max_distance: int
    own_bias: bool


def _sizes(settings: ModelSettings) -> _Sizes:
    kind = settings.text("model_type", default="t5")
    inner, heads, form = (2048, 8, "relu") if kind == "t5" else (1024, 6, "gated-gelu")
    name = settings.text("feed_forward_proj", default=form)
    told = {"gated-gelu": "gelu_new"}.get(name, name.rpartition("-")[2])
    activation = settings.activation_named(told, "feed_forward_proj")
    if settings.raw("dense_act_fn") not in (None, told):  # written beside it, and what transformers computes with
        activation = settings.activation("dense_act_fn", default=told)
    buckets = settings.count("relative_attention_num_buckets", default=32, most=1 << 16)
    reach = settings.count("relative_attention_max_distance", default=128, most=1 << 20)
    if buckets % 4 or reach <= buckets // 2:
        raise settings.fault(f"relative_attention_num_buckets is {buckets}, for distances up to {reach}")
    return _Sizes(
        hidden=settings.count("d_model", default=512),
        inner=settings.count("d_ff", default=inner),
        heads=settings.count("num_heads", default=heads),
        head_dim=settings.count("d_kv", default=64),
        layers=settings.count("num_layers", default=6 if kind == "t5" else 8, most=MOST_LAYERS),
        vocabulary=settings.count("vocab_size", default=32128 if kind == "t5" else 250112),
        activation=activation,
        gated=settings.flag("is_gated_act", default=name.startswith("gated-")),
        epsilon=settings.positive("layer_norm_epsilon", default=1e-6),
        buckets=buckets,
        max_distance=reach,
        own_bias=kind == "umt5",
    )


def _norm(name: str, sizes: _Sizes) -> Norm:
    return Norm("rms", f"{name}.weight", sizes.epsilon)


def _attention(at: str, sizes: _Sizes, bias: RelativeBias | None) -> Attention:
    """Scores are not scaled: the initial values of the weights were."""
    width = sizes.heads * sizes.head_dim
    q, k, v = (projection(f"{at}.{name}", sizes.hidden, width) for name in "qkv")
    output = projection(f"{at}.o", width, sizes.hidden)
    return Attention((q, k, v), output, sizes.heads, sizes.heads, sizes.head_dim, 1.0, bias=bias)


def _mlp(at: str, sizes: _Sizes) -> MLP:
    names = ("wi_0", "wi_1") if sizes.gated else ("wi",)
    inputs = tuple(projection(f"{at}.{name}", sizes.hidden, sizes.inner) for name in names)
    return MLP(inputs, projection(f"{at}.wo", sizes.inner, sizes.hidden), sizes.activation, sizes.gated)


def _bias(stack: str, index: int, sizes: _Sizes, *, both_ways: bool) -> RelativeBias:
    """The table of a layer: its own in UMT5, else the first layer's."""
    at = f"{stack}.block.{index if sizes.own_bias else 0}.layer.0.SelfAttention"
    return RelativeBias(f"{at}.relative_attention_bias.weight", sizes.buckets, sizes.max_distance, both_ways)


def _layer(at: str, sizes: _Sizes, bias: RelativeBias, *, crossed: bool) -> Layer:
    cross = None
    if crossed:
        branch = pre_norm(_norm(f"{at}.1.layer_norm", sizes))
        cross = Cross(_attention(f"{at}.1.EncDecAttention", sizes, None), branch)
    last = 2 if crossed else 1
    return Layer(
        _attention(f"{at}.0.SelfAttention", sizes, bias),
        pre_norm(_norm(f"{at}.0.layer_norm", sizes)),
        _mlp(f"{at}.{last}.DenseReluDense", sizes),
        pre_norm(_norm(f"{at}.{last}.layer_norm", sizes)),
        cross=cross,
    )


def _stack(stack: str, layers: int, sizes: _Sizes) -> tuple[Layer, ...]:
    """The layers below `stack`: those of a decoder look at an encoder's result too."""
    crossed = stack == "decoder"
    return tuple(
        _layer(f"{stack}.block.{n}.layer", sizes, _bias(stack, n, sizes, both_ways=not crossed), crossed=crossed)
        for n in range(layers)
    )


def _encoder(settings: ModelSettings, sizes: _Sizes) -> Model:
    own = "encoder.embed_tokens.weight"
    table = own if own in settings.names and _SHARED not in settings.names else _SHARED
    return Model(
        kind="encoder",
        hidden=sizes.hidden,
        vocabulary=sizes.vocabulary,
        embedding=Embedding(table),
        layers=_stack("encoder", sizes.layers, sizes),
        final_norm=_norm("encoder.final_layer_norm", sizes),
        head=HiddenHead(),
        max_positions=_ANY_LENGTH,
        unused={
            name: "an encoder reads no decoder"
            for name in settings.names
            if name.startswith("decoder.") or name == _HEAD
        },
    )


def _scaled(settings: ModelSettings) -> bool:
    """Whether the last hidden states are scaled in front of the head.

    T5 1.0 does it, of which only older configurations say that the head is tied; mT5 never does. UMT5 does it where its
    head is tied.
    """
    kind, tied = settings.text("model_type", default="t5"), settings.flag("tie_word_embeddings", default=True)
    told = settings.flag("scale_decoder_outputs", default=tied)
    return {"t5": told, "umt5": tied}.get(kind, False)


def _pair(settings: ModelSettings, sizes: _Sizes) -> Model:
    number = settings.raw("num_decoder_layers")
    layers = sizes.layers if number is None else settings.count("num_decoder_layers", most=MOST_LAYERS)
    encoder = replace(_encoder(settings, sizes), unused={})
    divisor = sizes.hidden**0.5 if _scaled(settings) else 1.0
    weight = _HEAD if _HEAD in settings.names else encoder.embedding.tokens
    return Model(
        kind="decoder",
        hidden=sizes.hidden,
        vocabulary=sizes.vocabulary,
        embedding=Embedding(encoder.embedding.tokens),
        layers=_stack("decoder", layers, sizes),
        final_norm=_norm("decoder.final_layer_norm", sizes),
        head=LanguageHead(Projection(weight, sizes.hidden, sizes.vocabulary), divisor=divisor),
        max_positions=_ANY_LENGTH,
        unused=dict.fromkeys(_LEFT_OVER & set(settings.names), "no program reads it"),
        encoder=encoder,
    )


def recipe(settings: ModelSettings) -> Model:
    """Pre-norm layers with a relative bias that all share (arXiv:1910.10683); UMT5's have one each."""
    sizes = _sizes(settings)
    classes = settings.architectures()
    settings.raw("quantization_config", "compression_config", "scale_decoder_outputs")
    only_tasks(settings, "text2text-generation", "feature-extraction")
    alone = settings.task == "feature-extraction" or any(name.endswith("EncoderModel") for name in classes)
    if classes and not alone and not any(name.endswith("ForConditionalGeneration") for name in classes):
        raise settings.fault(
            f"architectures is {show(', '.join(classes), 80)}; supported are the encoder, and conditional generation"
        )
    model = _encoder(settings, sizes) if alone else _pair(settings, sizes)
    settings.finish()
    return model


FAMILY = Family(
    names=("t5", "mt5", "umt5"),
    embedding="shared",
    head="lm_head",
    tied=True,
    inseparable="transformers scales T5's last hidden state by d_model ** -0.5 only while the head is tied",
    ties=(("encoder.embed_tokens.weight", "shared.weight"), ("decoder.embed_tokens.weight", "shared.weight")),
    recipe=recipe,
)
