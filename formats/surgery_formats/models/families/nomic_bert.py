# SPDX-License-Identifier: Apache-2.0
"""NomicBERT and Jina's third embedder: BERT's layers with rotary positions, under the names of flash-attention's BERT."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from surgery_formats.models.families.decoder import fused_attention, layer_norm, plain_mlp, projection
from surgery_formats.models.families.encoder import encoder, encoder_norm, language_head
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import (
    MLP,
    Activation,
    Branch,
    Embedding,
    LanguageHead,
    Layer,
    Model,
    Projection,
    Rope,
)
from surgery_formats.models.families.roberta import roberta_headed
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings, Sizes, read_sizes
from surgery_formats.text import show

__all__ = ["JINA", "NOMIC"]

_GATES: Mapping[str, Activation] = {"swiglu": "silu", "geglu": "gelu"}
"""Activations of gates, by what the configuration of the authors' own code calls the MLP."""


def nomic(settings: ModelSettings) -> Model:
    """Nussbaum et al. 2024, arXiv:2402.01613; configurations of transformers, and of the authors' own code."""
    sizes = read_sizes(
        settings,
        vocabulary=30528,
        max_positions=2048,
        hidden=768,
        inner=None,
        layers=12,
        heads=12,
        grouped=False,
        hidden_keys=("hidden_size", "n_embd"),
        inner_keys=("intermediate_size", "n_inner"),
        layers_keys=("num_hidden_layers", "n_layer"),
        heads_keys=("num_attention_heads", "n_head"),
        max_positions_keys=("max_position_embeddings", "n_positions"),
    )
    if settings.count("head_dim", default=sizes.head_dim) != sizes.head_dim:
        raise settings.fault(f"head_dim is not hidden_size / num_attention_heads, {sizes.head_dim}")
    activation, epsilon, theta = _own(settings) if settings.has("n_embd") else _of_transformers(settings)
    rope = read_rope(settings, sizes, theta=theta)
    root = _root(settings, ("nomic_bert.", "bert."))

    def mlp(at: str) -> MLP:
        gate, up = (_projection(settings, f"{at}.{part}", sizes.hidden, sizes.inner) for part in ("fc12", "fc11"))
        return MLP((gate, up), _projection(settings, f"{at}.fc2", sizes.inner, sizes.hidden), activation, gated=True)

    pooler = projection(f"{root}pooler.dense", sizes.hidden, sizes.hidden, True)
    embedding = _embedding(settings, root, epsilon)

    def language() -> LanguageHead:
        at = "cls.predictions"
        dense = f"{at}.transform.dense"
        norm = encoder_norm(settings, f"{at}.transform.layer_norm", epsilon)
        return language_head(settings, sizes, embedding.tokens, dense, norm, f"{at}.decoder", activation)

    return encoder(
        settings,
        sizes,
        embedding,
        (_layer(settings, f"{root}encoder.layers.{n}", "attn", sizes, rope, mlp, epsilon) for n in range(sizes.layers)),
        before=(pooler, "tanh"),
        pooler=pooler,
        language=language,
        heads={"question-answering": None},
    )


def _of_transformers(settings: ModelSettings) -> tuple[Activation, float, float]:
    """Activation, epsilon, and base of the rotation."""
    activation = settings.activation("hidden_act", default="silu")
    return activation, settings.positive("layer_norm_eps", default=1e-12), 1000.0


def _own(settings: ModelSettings) -> tuple[Activation, float, float]:
    """The same of a configuration of the authors' own code, which is GPT-2's and more."""
    for key in ("prenorm", "parallel_block", "use_rms_norm", "causal", "rotary_emb_interleaved"):
        settings.only(key, False)
    for key in ("rotary_emb_scale_base", "rotary_scaling_factor"):
        settings.only(key)
    for key in ("num_experts", "moe_every_n_layers"):
        settings.only(key, 0, -1)
    settings.only("scale_attn_weights", True)
    settings.only("scale_attn_by_inverse_layer_idx", False)
    settings.raw("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias")  # the file tells
    if settings.number("rotary_emb_fraction", default=0.0) != 1:
        raise settings.fault("rotary_emb_fraction must be 1: whole heads are rotated")
    name = settings.text("activation_function", default="gelu_new")
    if name not in _GATES:
        raise settings.fault(f"activation_function is '{show(name, 40)}', supported are {', '.join(sorted(_GATES))}")
    epsilon = settings.positive("layer_norm_epsilon", default=1e-5)
    return _GATES[name], epsilon, settings.positive("rotary_emb_base", default=10000.0)


def jina(settings: ModelSettings) -> Model:
    """Sturua et al. 2024, arXiv:2409.10173: XLM-RoBERTa with rotary positions instead of learned ones."""
    sizes = read_sizes(
        settings,
        vocabulary=250002,
        max_positions=8194,
        hidden=1024,
        inner=4096,
        layers=24,
        heads=16,
        grouped=False,
    )
    activation = settings.activation("hidden_act", default="gelu")
    epsilon = settings.positive("layer_norm_eps", default=1e-5)
    rope = read_rope(settings, sizes, theta=20000.0)
    root = _root(settings, ("roberta.",))
    embedding = _embedding(settings, root, epsilon)

    def mlp(at: str) -> MLP:
        return plain_mlp(f"{at}.fc1", f"{at}.fc2", sizes, activation)

    layers = (
        _layer(settings, f"{root}encoder.layers.{n}", "mixer", sizes, rope, mlp, epsilon) for n in range(sizes.layers)
    )
    return roberta_headed(settings, sizes, root, embedding, layers, epsilon, choices=False)


def _root(settings: ModelSettings, prefixes: tuple[str, ...]) -> str:
    probe = "embeddings.word_embeddings.weight"
    return next((prefix for prefix in (*prefixes, "") if prefix + probe in settings.names), prefixes[0])


def _embedding(settings: ModelSettings, root: str, epsilon: float) -> Embedding:
    types = settings.whole("type_vocab_size", default=2) > 0
    return Embedding(
        f"{root}embeddings.word_embeddings.weight",
        types=f"{root}embeddings.token_type_embeddings.weight" if types else "",
        norm=layer_norm(f"{root}emb_ln", epsilon),
    )


def _projection(settings: ModelSettings, module: str, inputs: int, outputs: int) -> Projection:
    """The projection of a module, with the bias that the file has or has not."""
    return projection(module, inputs, outputs, f"{module}.bias" in settings.names)


def _layer(
    settings: ModelSettings, at: str, name: str, sizes: Sizes, rope: Rope, mlp: Callable[[str], MLP], epsilon: float
) -> Layer:
    """Attention, norm of the sum, MLP, norm of the sum."""
    module = f"{at}.{name}"
    bias = f"{module}.Wqkv.bias" in settings.names
    return Layer(
        fused_attention(f"{module}.Wqkv", f"{module}.out_proj", sizes, rope=rope, bias=bias),
        Branch(on_sum=layer_norm(f"{at}.norm1", epsilon)),
        mlp(f"{at}.mlp"),
        Branch(on_sum=layer_norm(f"{at}.norm2", epsilon)),
    )


NOMIC = Family(
    names=("nomic_bert",),
    embedding="nomic_bert.embeddings.word_embeddings",
    head="cls.predictions.decoder",
    tied=True,
    ties=(("cls.predictions.decoder.bias", "cls.predictions.bias"),),
    derivable=("rotary_emb.inv_freq", "embeddings.position_ids", "embeddings.token_type_ids"),
    recipe=nomic,
)
JINA = Family(
    names=("jina_embeddings_v3",),
    embedding="roberta.embeddings.word_embeddings",
    head="lm_head.decoder",
    tied=True,
    ties=(("lm_head.decoder.bias", "lm_head.bias"),),
    derivable=NOMIC.derivable,
    recipe=jina,
)
