# SPDX-License-Identifier: Apache-2.0
"""GPT-Neo: GPT-2's names with ordinary linear layers, windows in every other layer, scores that are not scaled."""

from __future__ import annotations

from surgery_formats.models.families.decoder import attention, decoder, layer_norm, plain_mlp, pre_norm, root_of
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Embedding, Layer, Model
from surgery_formats.models.families.settings import ModelSettings, read_sizes

__all__ = ["FAMILY"]

_KINDS = ("global", "local")


def recipe(settings: ModelSettings) -> Model:
    """Black et al. 2021, *GPT-Neo*: learned positions, windows in every other layer, scores that are not scaled."""
    sizes = read_sizes(
        settings,
        vocabulary=50257,
        max_positions=2048,
        hidden=2048,
        inner=None,
        layers=24,
        heads=16,
        grouped=False,
        layers_keys=("num_layers", "num_hidden_layers"),
        heads_keys=("num_heads", "num_attention_heads"),
    )
    epsilon = settings.positive("layer_norm_epsilon", default=1e-5)
    activation = settings.activation("activation_function", default="gelu_new")
    window = settings.count("window_size", default=256)
    kinds = _kinds(settings, sizes.layers)

    def layer(at: str, index: int) -> Layer:
        own = window if kinds[index] == "local" else None
        return Layer(
            attention(f"{at}.attn.attention", sizes, None, output_bias=True, scale=1.0, window=own, output="out_proj"),
            pre_norm(layer_norm(f"{at}.ln_1", epsilon)),
            plain_mlp(f"{at}.mlp.c_fc", f"{at}.mlp.c_proj", sizes, activation),
            pre_norm(layer_norm(f"{at}.ln_2", epsilon)),
        )

    root = root_of(settings, "transformer.", "wte.weight")
    embedding = Embedding(f"{root}wte.weight", positions=f"{root}wpe.weight")
    return decoder(settings, sizes, f"{root}h", layer, layer_norm(f"{root}ln_f", epsilon), embedding, tied=True)


def _kinds(settings: ModelSettings, layers: int) -> tuple[str, ...]:
    """What each layer sees, from ``attention_layers``, or ``attention_types``: runs of kinds with how often they repeat."""
    stored = settings.words("attention_layers", layers, _KINDS)
    runs = settings.raw("attention_types")
    if stored is not None:
        return stored
    if runs is None:
        return tuple(_KINDS[index % 2] for index in range(layers))
    kinds: list[str] = []
    for run in runs if isinstance(runs, list) else (None,):
        if not (isinstance(run, list) and len(run) == 2 and isinstance(run[0], list) and type(run[1]) is int):
            raise settings.fault("attention_types must be a list of a list of kinds and how often it repeats")
        kinds += [str(kind) for kind in run[0]] * min(run[1], layers)
    if len(kinds) != layers or any(kind not in _KINDS for kind in kinds):
        raise settings.fault(f"attention_types must name each of the {layers} layers, as {' or '.join(_KINDS)}")
    return tuple(kinds)


FAMILY = Family(
    names=("gpt_neo",),
    embedding="transformer.wte",
    head="lm_head",
    tied=True,
    derivable=("attn.attention.bias", "attn.attention.masked_bias"),
    recipe=recipe,
)
