# SPDX-License-Identifier: Apache-2.0
"""Shared parts of Llama-like decoders: sizes, names, and the blocks of their recipes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from surgery_formats.models.families.recipe import (
    MLP,
    Activation,
    Attention,
    Branch,
    Embedding,
    LanguageHead,
    Layer,
    Model,
    Norm,
    Projection,
    Rope,
)
from surgery_formats.models.families.settings import LAYERS, ModelSettings
from surgery_formats.text import show

__all__ = [
    "Sizes",
    "attention",
    "causal_only",
    "decoder",
    "gated_mlp",
    "layer_norm",
    "llama_like",
    "plain_mlp",
    "pre_norm",
    "projection",
    "read_sizes",
    "rms",
    "root_of",
    "windows",
]

_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True)
class Sizes:
    """The validated sizes of a decoder.

    Attributes:
        hidden: ``D``.
        inner: Width of the MLP.
        layers: Number of layers.
        heads: Number of query heads.
        kv_heads: Number of key and value heads; divides `heads`.
        head_dim: Values per head.
        vocabulary: ``V``.
        max_positions: ``max_position_embeddings``.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_positions: int


def read_sizes(
    settings: ModelSettings,
    *,
    vocabulary: int,
    max_positions: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    hidden: int = 4096,
    inner: int = 11008,
    layers: int = 32,
    heads: int = 32,
    inner_key: str = "intermediate_size",
) -> Sizes:
    """Read sizes under Llama's keys; the arguments are the family's defaults.

    Args:
        settings: The model's settings.
        vocabulary: ``vocab_size``.
        max_positions: ``max_position_embeddings``.
        kv_heads: ``num_key_value_heads`` if the key is missing; None for as many as heads, as ``null`` always means.
        head_dim: ``head_dim`` if the key is missing; None for ``hidden_size / num_attention_heads``.
        hidden: ``hidden_size``.
        inner: ``intermediate_size``.
        layers: ``num_hidden_layers``.
        heads: ``num_attention_heads``.
        inner_key: The family's name for ``intermediate_size``.

    Raises:
        FitError: a size is invalid, or the heads do not divide.
    """
    width = settings.count("hidden_size", default=hidden)
    queries = settings.count("num_attention_heads", default=heads)
    keys = settings.optional_count("num_key_value_heads", kv_heads) or queries
    head_dim_read = settings.optional_count("head_dim", head_dim)
    if head_dim_read is None:
        if width % queries:
            raise settings.fault(f"hidden_size {width} is not a multiple of num_attention_heads {queries}")
        head_dim_read = width // queries
    if queries % keys:
        raise settings.fault(f"num_attention_heads {queries} is not a multiple of num_key_value_heads {keys}")
    return Sizes(
        hidden=width,
        inner=settings.count(inner_key, default=inner),
        layers=settings.count("num_hidden_layers", default=layers, most=LAYERS),
        heads=queries,
        kv_heads=keys,
        head_dim=head_dim_read,
        vocabulary=settings.count("vocab_size", default=vocabulary),
        max_positions=settings.count("max_position_embeddings", default=max_positions),
    )


def causal_only(settings: ModelSettings, *suffixes: str) -> None:
    """Refuse everything but a causal language model.

    Args:
        settings: The model's settings.
        *suffixes: Accepted endings of the class name; ``ForCausalLM`` by default.

    Raises:
        FitError: another task's head, bidirectional attention, attention to an encoder, or a quantised checkpoint.
    """
    known = suffixes or ("ForCausalLM",)
    names = settings.architectures()
    if names and not any(name.endswith(known) for name in names):
        raise settings.fault(
            f"architectures is {show(', '.join(names), 80)}; of decoders, only language models are supported"
        )
    settings.only("use_bidirectional_attention", False)
    settings.only("is_causal", True)
    settings.only("add_cross_attention", False)
    settings.only("quantization_config")


def root_of(names: Collection[str], prefix: str, probe: str) -> str:
    """Return `prefix`, or nothing if the file has `probe` without it: a checkpoint of the bare model."""
    return "" if prefix + probe not in names and probe in names else prefix


def projection(name: str, inputs: int, outputs: int, bias: bool = False, *, transposed: bool = False) -> Projection:
    """The projection of module `name`, with its weight and bias."""
    return Projection(f"{name}.weight", inputs, outputs, f"{name}.bias" if bias else "", transposed)


def rms(name: str, epsilon: float, *, plus_one: bool = False) -> Norm:
    """The RMS norm of module `name`."""
    return Norm("rms", f"{name}.weight", epsilon, plus_one=plus_one)


def layer_norm(name: str, epsilon: float, *, affine: bool = True, bias: bool = True) -> Norm:
    """The layer norm of module `name`, with gain and bias if `affine`."""
    return Norm("layer", f"{name}.weight" if affine else "", epsilon, f"{name}.bias" if affine and bias else "")


def attention(
    at: str,
    sizes: Sizes,
    rope: Rope | None,
    *,
    bias: bool = False,
    output_bias: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    output: str = "o_proj",
) -> Attention:
    """Attention with ``q_proj``, ``k_proj``, ``v_proj`` in module `at`; `scale` defaults to ``1 / sqrt(head_dim)``."""
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    return Attention(
        inputs=(
            projection(f"{at}.q_proj", sizes.hidden, queries, bias),
            projection(f"{at}.k_proj", sizes.hidden, keys, bias),
            projection(f"{at}.v_proj", sizes.hidden, keys, bias),
        ),
        output=projection(f"{at}.{output}", queries, sizes.hidden, output_bias),
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        scale=sizes.head_dim**-0.5 if scale is None else scale,
        rope=rope,
        window=window,
        softcap=softcap,
        q_norm=q_norm,
        k_norm=k_norm,
    )


def gated_mlp(at: str, sizes: Sizes, activation: Activation, *, bias: bool = False) -> MLP:
    """A gated MLP: ``gate_proj``, ``up_proj`` and ``down_proj`` in module `at`."""
    return MLP(
        inputs=(
            projection(f"{at}.gate_proj", sizes.hidden, sizes.inner, bias),
            projection(f"{at}.up_proj", sizes.hidden, sizes.inner, bias),
        ),
        output=projection(f"{at}.down_proj", sizes.inner, sizes.hidden, bias),
        activation=activation,
        gated=True,
    )


def plain_mlp(
    up: str, down: str, hidden: int, inner: int, activation: Activation, *, bias: bool = True, transposed: bool = False
) -> MLP:
    """An MLP without a gate, from the modules `up` and `down`."""
    return MLP(
        inputs=(projection(up, hidden, inner, bias, transposed=transposed),),
        output=projection(down, inner, hidden, bias, transposed=transposed),
        activation=activation,
        gated=False,
    )


def pre_norm(norm: Norm, multiplier: float = 1.0) -> Branch:
    """A residual step that normalises the input of its body."""
    return Branch(before=norm, multiplier=multiplier)


def windows(
    settings: ModelSettings, sizes: Sizes, window: int | None, sliding: Iterable[bool]
) -> tuple[int | None, ...]:
    """Return the window of every layer, from ``layer_types`` or else from `sliding`.

    Raises:
        FitError: an unknown layer type, or a sliding layer without a window.
    """
    types = settings.words("layer_types", sizes.layers, _LAYER_TYPES)
    slides = tuple(sliding) if types is None else tuple(kind == "sliding_attention" for kind in types)
    if any(slides) and window is None:
        raise settings.fault("a layer has sliding attention, but there is no sliding_window")
    return tuple(window if slide else None for slide in slides)


def decoder(
    settings: ModelSettings,
    names: Collection[str],
    sizes: Sizes,
    layers: Iterable[Layer],
    final_norm: Norm | None,
    embedding: Embedding,
    *,
    tied: bool = False,
    head: str = "lm_head",
    head_bias: bool = False,
    before: Projection | None = None,
    softcap: float | None = None,
    divisor: float = 1.0,
    max_positions: int | None = None,
) -> Model:
    """Assemble the decoder, then check the settings that nobody read.

    Args:
        settings: The model's settings; the rest must have been read.
        names: Tensor names of the checkpoint.
        sizes: The model's sizes.
        layers: The layers, in order.
        final_norm: Norm after the layers.
        embedding: The token embedding.
        tied: The family's default of ``tie_word_embeddings``.
        head: Module of the head.
        head_bias: Whether the head has a bias.
        before: Projection before the head.
        softcap: Soft cap of the logits.
        divisor: Divisor of the logits.
        max_positions: Overrides that of `sizes`.

    Raises:
        FitError: an unread setting may change the computation.
    """
    stored = f"{head}.weight" in names
    share = settings.flag("tie_word_embeddings", default=tied or not stored)
    weight = embedding.tokens if share else f"{head}.weight"
    unused = {f"{head}.weight": "tied: the token embedding is used"} if share and stored else {}
    width = before.outputs if before else sizes.hidden
    settings.finish()
    return Model(
        kind="decoder",
        hidden=sizes.hidden,
        vocabulary=sizes.vocabulary,
        embedding=embedding,
        layers=tuple(layers),
        final_norm=final_norm,
        head=LanguageHead(
            Projection(weight, width, sizes.vocabulary, f"{head}.bias" if head_bias else ""),
            before=before,
            softcap=softcap,
            divisor=divisor,
        ),
        max_positions=max_positions or sizes.max_positions,
        unused=unused,
    )


def llama_like(
    settings: ModelSettings,
    names: Collection[str],
    sizes: Sizes,
    attend: Callable[[str, int], Attention],
    norm: Callable[[str], Norm],
    *,
    activation: Activation,
    mlp_bias: bool = False,
    multiplier: float = 1.0,
    scale: float = 1.0,
    scale_rounded: bool = False,
    tied: bool = False,
    divisor: float = 1.0,
) -> Model:
    """A decoder with Llama's names and order: norm, attention, norm, gated MLP.

    Args:
        settings: The model's settings; the rest must have been read.
        names: Tensor names of the checkpoint.
        sizes: The model's sizes.
        attend: Maps the path of a layer's attention, and the layer's index, to its record.
        norm: Maps a module's path to its norm.
        activation: Activation of the gate.
        mlp_bias: Whether the MLP has biases.
        multiplier: Multiplier of both branches.
        scale: Scale of the embedding.
        scale_rounded: Whether the scale is first rounded to the stored type.
        tied: The family's default of ``tie_word_embeddings``.
        divisor: Divisor of the logits.
    """
    root = root_of(names, "model.", "embed_tokens.weight")

    def layer(index: int) -> Layer:
        at = f"{root}layers.{index}"
        return Layer(
            attend(f"{at}.self_attn", index),
            pre_norm(norm(f"{at}.input_layernorm"), multiplier),
            gated_mlp(f"{at}.mlp", sizes, activation, bias=mlp_bias),
            pre_norm(norm(f"{at}.post_attention_layernorm"), multiplier),
        )

    return decoder(
        settings,
        names,
        sizes,
        map(layer, range(sizes.layers)),
        norm(f"{root}norm"),
        Embedding(f"{root}embed_tokens.weight", scale=scale, scale_rounded=scale_rounded),
        tied=tied,
        divisor=divisor,
    )
