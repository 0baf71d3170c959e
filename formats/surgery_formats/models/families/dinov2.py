# SPDX-License-Identifier: Apache-2.0
"""DINOv2, with and without registers: a factor for each value of a branch, and SwiGLU in the largest."""

from __future__ import annotations

from dataclasses import replace

from surgery_formats.models.families.decoder import layer_norm, plain_mlp, projection, root_of
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import MLP, Branch, Head, Layer, Model, PooledHead
from surgery_formats.models.families.settings import ModelSettings
from surgery_formats.models.families.vision import classifier_head, image_model, image_sizes, separate_attention
from surgery_formats.models.families.vit import ATTENTION_NAMES, embedded_patches
from surgery_formats.text import show

__all__ = ["FAMILY"]


def recipe(settings: ModelSettings) -> Model:
    """The class token and the mean of the patches are classified (arXiv:2304.07193; registers: arXiv:2309.16588)."""
    with_registers = settings.raw("model_type") == "dinov2_with_registers"
    sizes = image_sizes(settings)
    inner = int(sizes.hidden * settings.positive("mlp_ratio", default=4))
    epsilon = settings.positive("layer_norm_eps", default=1e-6)
    activation = settings.activation("hidden_act", default="gelu")
    bias, gated = settings.flag("qkv_bias", default=True), settings.flag("use_swiglu_ffn", default=False)
    settings.raw("layerscale_value", "apply_layernorm", "reshape_hidden_states")  # of initialisation and of backbones
    classes = settings.architectures()
    if not all(name.endswith(("ForImageClassification", "Model")) for name in classes):
        raise settings.fault(
            f"architectures is {show(', '.join(classes), 80)}; supported are classifiers and the bare model"
        )
    name = "dinov2_with_registers." if with_registers else "dinov2."
    root = root_of(settings, name, "embeddings.cls_token")
    at = f"{root}embeddings"
    count = settings.count("num_register_tokens", default=4) if with_registers else 0
    patches = embedded_patches(settings, at, sizes, 16 if with_registers else 14, count)

    def transform(at: str) -> MLP:
        if not gated:
            return plain_mlp(f"{at}.mlp.fc1", f"{at}.mlp.fc2", replace(sizes, inner=inner), activation)
        width = (int(inner * 2 / 3) + 7) // 8 * 8
        both = projection(f"{at}.mlp.weights_in", sizes.hidden, 2 * width, True)
        return MLP((both,), projection(f"{at}.mlp.weights_out", width, sizes.hidden, True), "silu", gated=True)

    def layer(at: str) -> Layer:
        first, second = (
            Branch(before=layer_norm(f"{at}.norm{number}", epsilon), gains=f"{at}.layer_scale{number}.lambda1")
            for number in (1, 2)
        )
        attention = separate_attention(f"{at}.attention", ATTENTION_NAMES, sizes, bias=bias)
        return Layer(attention, first, transform(at), second)

    bare = any(name.endswith("Model") for name in classes)
    head: Head = PooledHead("pooler_output") if bare else classifier_head(settings, sizes, "first_and_patches")
    return image_model(
        settings,
        sizes,
        patches,
        tuple(layer(f"{root}encoder.layer.{index}") for index in range(sizes.layers)),
        head,
        final_norm=layer_norm(f"{root}layernorm", epsilon),
        unused={f"{at}.mask_token": "only pretraining reads it"},
    )


FAMILY = Family(names=("dinov2", "dinov2_with_registers"), recipe=recipe)
