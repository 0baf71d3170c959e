# SPDX-License-Identifier: Apache-2.0
"""Shared parts of decoders: names, and the blocks of their recipes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

from surgery_formats.models.families.recipe import (
    MLP,
    Activation,
    Alibi,
    Attention,
    Branch,
    Embedding,
    Experts,
    Head,
    LanguageHead,
    Layer,
    Model,
    Norm,
    Projection,
    Rope,
)
from surgery_formats.models.families.settings import ModelSettings, Sizes
from surgery_formats.models.families.tasks import DECODER_TASKS, asked_task, decoder_head, head_names, other_heads

__all__ = [
    "attention",
    "decoder",
    "fused_attention",
    "fused_gated_mlp",
    "gated_mlp",
    "layer_norm",
    "llama_layer",
    "llama_named",
    "plain_mlp",
    "pre_norm",
    "projection",
    "rms_norms",
    "root_of",
    "windows",
]

_FURTHER = "predicts several tokens at once, which a decoder does not do"
_LAYER_TYPES = ("full_attention", "sliding_attention")


def root_of(settings: ModelSettings, prefix: str, probe: str) -> str:
    """Return `prefix`, or nothing if the file has `probe` without it: a checkpoint of the bare model."""
    if settings.root:
        return settings.root
    return "" if prefix + probe not in settings.names and probe in settings.names else prefix


def projection(name: str, inputs: int, outputs: int, bias: bool = False, *, transposed: bool = False) -> Projection:
    """The projection of module `name`, with its weight and bias."""
    return Projection(f"{name}.weight", inputs, outputs, f"{name}.bias" if bias else "", transposed)


def rms_norms(settings: ModelSettings, default: float = 1e-6, *, plus_one: bool = False) -> Callable[[str], Norm]:
    """Maps a module's name to its RMS norm, with ``rms_norm_eps``."""
    epsilon = settings.positive("rms_norm_eps", default=default)
    return lambda name: Norm("rms", f"{name}.weight", epsilon, plus_one=plus_one)


def layer_norm(name: str, epsilon: float, *, affine: bool = True, bias: bool = True) -> Norm:
    """The layer norm of module `name`, with gain and bias if `affine`."""
    return Norm("layer", f"{name}.weight" if affine else "", epsilon, f"{name}.bias" if affine and bias else "")


def attention(
    at: str,
    sizes: Sizes,
    rope: Rope | None,
    *,
    bias: bool = False,
    output_bias: bool | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    norm_over: Literal["head", "heads", "width"] = "head",
    clip: float | None = None,
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
        output=projection(f"{at}.{output}", queries, sizes.hidden, bias if output_bias is None else output_bias),
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        scale=sizes.head_dim**-0.5 if scale is None else scale,
        rope=rope,
        window=window,
        softcap=softcap,
        q_norm=q_norm,
        k_norm=k_norm,
        norm_over=norm_over,
        clip=clip,
    )


def fused_attention(
    qkv: str,
    output: str,
    sizes: Sizes,
    *,
    layout: Literal["concatenated", "by_head", "by_group"] = "concatenated",
    rope: Rope | None = None,
    bias: bool = False,
    scale: float | None = None,
    window: int | None = None,
    transposed: bool = False,
    alibi: Alibi | None = None,
    clip: float | None = None,
) -> Attention:
    """Attention with one projection for queries, keys and values, from the modules `qkv` and `output`."""
    queries = sizes.heads * sizes.head_dim
    together = queries + 2 * sizes.kv_heads * sizes.head_dim
    return Attention(
        inputs=(projection(qkv, sizes.hidden, together, bias, transposed=transposed),),
        layout=layout,
        output=projection(output, queries, sizes.hidden, bias, transposed=transposed),
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        scale=sizes.head_dim**-0.5 if scale is None else scale,
        rope=rope,
        window=window,
        alibi=alibi,
        clip=clip,
    )


def gated_mlp(at: str, sizes: Sizes, activation: Activation, *, bias: bool = False) -> MLP:
    """A gated MLP: ``gate_proj``, ``up_proj`` and ``down_proj`` in module `at`."""
    gate, up = (projection(f"{at}.{name}_proj", sizes.hidden, sizes.inner, bias) for name in ("gate", "up"))
    return MLP((gate, up), projection(f"{at}.down_proj", sizes.inner, sizes.hidden, bias), activation, gated=True)


def fused_gated_mlp(at: str, sizes: Sizes, activation: Activation) -> MLP:
    """A gated MLP with gate and up in one projection: ``gate_up_proj`` and ``down_proj`` in module `at`."""
    gate_up = projection(f"{at}.gate_up_proj", sizes.hidden, 2 * sizes.inner)
    return MLP((gate_up,), projection(f"{at}.down_proj", sizes.inner, sizes.hidden), activation, gated=True)


def plain_mlp(
    up: str, down: str, sizes: Sizes, activation: Activation, *, bias: bool = True, transposed: bool = False
) -> MLP:
    """An MLP without a gate, from the modules `up` and `down`."""
    inputs = (projection(up, sizes.hidden, sizes.inner, bias, transposed=transposed),)
    output = projection(down, sizes.inner, sizes.hidden, bias, transposed=transposed)
    return MLP(inputs, output, activation, gated=False)


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
    sizes: Sizes,
    stack: str,
    layer: Callable[[str, int], Layer],
    final_norm: Norm | None,
    embedding: Embedding,
    *,
    tied: bool = False,
    head: str = "lm_head",
    before: Projection | None = None,
    softcap: float | None = None,
    divisor: float = 1.0,
    head_bias: bool = False,
    further_layers: int = 0,
) -> Model:
    """Assemble the decoder, then check the settings that nobody read.

    `layer` maps the module of a layer (below `stack`) and its index to its record. `tied` is the family's default of
    ``tie_word_embeddings``, `head` the module of a language model's head; `before`, `softcap` and `divisor` are those of
    `LanguageHead`; `head_bias` tells whether the head has a bias. Of the layers after the last, files may have
    `further_layers`, which predict several tokens at once and are not used.

    Raises:
        FitError: a task that decoders do not have, bidirectional attention, attention to an encoder, or an
            unread setting that may change the computation.
    """
    settings.only("use_bidirectional_attention", False)
    settings.only("is_causal", True)
    settings.only("add_cross_attention", False)
    settings.raw("quantization_config", "compression_config")  # how weights are stored: their readers see to it
    task = asked_task(settings, DECODER_TASKS, "decoders")
    width, head = before.outputs if before else sizes.hidden, settings.head or head
    reads: Head
    unused: dict[str, str] = {}
    if task in ("", "text-generation"):
        stored = f"{head}.weight" in settings.names
        share = settings.flag("tie_word_embeddings", default=tied or not stored)
        weight = embedding.tokens if share else f"{head}.weight"
        unused = {f"{head}.weight": "tied: the token embedding is used"} if share and stored else {}
        bias = f"{head}.bias" if head_bias else ""
        reads = LanguageHead(Projection(weight, width, sizes.vocabulary, bias), before, softcap, divisor)
    else:
        reads = decoder_head(settings, task, width, before)
        unused = other_heads(settings, head_names(reads))
    further = tuple(f"{stack}.{sizes.layers + number}." for number in range(further_layers))
    unused |= dict.fromkeys((name for name in settings.names if name.startswith(further)), _FURTHER) if further else {}
    settings.finish()
    return Model(
        kind="decoder",
        hidden=sizes.hidden,
        vocabulary=sizes.vocabulary,
        embedding=embedding,
        layers=tuple(layer(f"{stack}.{index}", index) for index in range(sizes.layers)),
        final_norm=final_norm,
        head=reads,
        max_positions=sizes.max_positions,
        unused=unused,
    )


def llama_named(
    settings: ModelSettings,
    sizes: Sizes,
    layer: Callable[[str, int], Layer],
    norm: Callable[[str], Norm],
    *,
    scale: float = 1.0,
    scale_rounded: bool = False,
    tied: bool = False,
    softcap: float | None = None,
    divisor: float = 1.0,
    head_bias: bool = False,
    final_name: str = "norm",
    further_layers: int = 0,
) -> Model:
    """A decoder with Llama's names of embedding, layers and final norm; arguments as in `decoder` and `Embedding`.

    `final_name` is the final norm's module.
    """
    root = root_of(settings, "model.", "embed_tokens.weight")
    if root and "transformer.embed_tokens.weight" in settings.names:
        root = "transformer."  # of question answering
    embedding = Embedding(f"{root}embed_tokens.weight", scale=scale, scale_rounded=scale_rounded)
    final = norm(f"{root}{final_name}")
    return decoder(
        settings,
        sizes,
        f"{root}layers",
        layer,
        final,
        embedding,
        tied=tied,
        softcap=softcap,
        divisor=divisor,
        head_bias=head_bias,
        further_layers=further_layers,
    )


def llama_layer(
    settings: ModelSettings,
    sizes: Sizes,
    attend: Callable[[str, int], Attention],
    norm: Callable[[str], Norm],
    *,
    activation: Activation | None = None,
    mlp_bias: bool = False,
    multiplier: float = 1.0,
    transform: Callable[[str, int], MLP | Experts] | None = None,
) -> Callable[[str, int], Layer]:
    """Layers with Llama's names and order: norm, attention, norm, gated MLP; the activation is ``hidden_act`` if None.

    `attend` maps the module of a layer's attention, and the layer's index, to its record; `transform` the module of a layer,
    and its index, to what stands in place of the MLP.
    """
    gate = activation or settings.activation("hidden_act", default="silu")
    return lambda at, index: Layer(
        attend(f"{at}.self_attn", index),
        pre_norm(norm(f"{at}.input_layernorm"), multiplier),
        transform(at, index) if transform else gated_mlp(f"{at}.mlp", sizes, gate, bias=mlp_bias),
        pre_norm(norm(f"{at}.post_attention_layernorm"), multiplier),
    )
