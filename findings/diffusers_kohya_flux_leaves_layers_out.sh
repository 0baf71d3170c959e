#!/usr/bin/env bash
# diffusers loads a kohya LoRA of Flux without the layers outside the blocks, and does not say so.
#
# Versions:  diffusers 0.42.1, torch 2.13.0 (CPU), transformers 5.23.0, peft 0.21.2.
# Behaviour: `load_lora_weights` converts kohya's names. Those of the blocks get the prefix `transformer.`; those of img_in, txt_in,
#            time_in, vector_in, guidance_in and final_layer get none, and are then passed over, since they lack it. With the
#            prefix the same factors are loaded.
# Seen:      kohya's names:     1 of 6 layers loaded: single_transformer_blocks.0.proj_out
#            diffusers' names:  6 of 6 layers loaded
# Fails if all layers of the kohya file are loaded, or those of the other file are not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" \
  diffusers==0.42.1 peft==0.21.2 transformers==5.23.0 torch==2.13.0
cat > "$folder/look.py" <<'PY'
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

torch.manual_seed(0)
LAYERS = {
    "img_in": ("x_embedder", 16, 4),
    "txt_in": ("context_embedder", 16, 8),
    "time_in_in_layer": ("time_text_embed.timestep_embedder.linear_1", 16, 256),
    "vector_in_in_layer": ("time_text_embed.text_embedder.linear_1", 16, 8),
    "final_layer_linear": ("proj_out", 4, 16),
    "single_blocks_0_linear2": ("single_transformer_blocks.0.proj_out", 16, 80),
}


def loaded(weights):
    network = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )
    others = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=network, **others)
    pipeline.load_lora_weights(weights, adapter_name="lora")
    return [name.removesuffix(".lora_A.lora.weight") for name, _ in network.named_parameters() if ".lora_A." in name]


kohya, diffusers = {}, {}
for name, (theirs, outputs, inputs) in LAYERS.items():
    down, up = torch.randn(2, inputs), torch.randn(outputs, 2)
    kohya |= {f"lora_unet_{name}.lora_down.weight": down, f"lora_unet_{name}.lora_up.weight": up}
    kohya[f"lora_unet_{name}.alpha"] = torch.tensor(2.0)
    diffusers |= {f"transformer.{theirs}.lora_A.weight": down, f"transformer.{theirs}.lora_B.weight": up}
first, second = loaded(kohya), loaded(diffusers)
print(f"kohya's names:     {len(first)} of {len(LAYERS)} layers loaded: {', '.join(first)}")
print(f"diffusers' names:  {len(second)} of {len(LAYERS)} layers loaded")
assert first == ["single_transformer_blocks.0.proj_out"]
assert len(second) == len(LAYERS)
PY
PYTHONPATH="$folder/site" python3 "$folder/look.py"
