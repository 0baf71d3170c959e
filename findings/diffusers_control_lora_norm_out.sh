#!/usr/bin/env bash
# diffusers reorders both factors of the last modulation layer of a Flux control LoRA.
#
# Versions:  diffusers 0.42.1, torch 2.13.0 (CPU), transformers 5.23.0, peft 0.21.2.
# Behaviour: Black Forest Labs' `final_layer.adaLN_modulation.1` gives shift and scale, diffusers' `norm_out.linear` scale and shift.
#            A LoRA of it changes layout when the halves of B's rows are exchanged. For control LoRAs (Canny, Depth)
#            `lora_state_dict` exchanges the halves of A's rows too. These are the rank's directions, so that B's columns meet
#            other rows of A. The conversion of kohya's files exchanges those of B alone. Nothing is said.
# Seen:      kohya:   0.00 of the change of norm_out is wrong
#            control: 1.26 of the change of norm_out is wrong
# Fails if the control LoRA is converted rightly, or kohya's is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" \
  diffusers==0.42.1 peft==0.21.2 transformers==5.23.0 torch==2.13.0
cat > "$folder/look.py" <<'PY'
import torch
from diffusers import FluxControlPipeline, FluxPipeline

WIDTH, RANK = 3072, 4
torch.manual_seed(0)
A, B = torch.randn(RANK, 8), torch.randn(2 * WIDTH, RANK)
shift, scale = (B @ A).chunk(2)
wanted = torch.cat([scale, shift])


def wrong(converted):
    found = {key.rsplit("norm_out.linear.")[-1]: value for key, value in converted.items() if "norm_out.linear." in key}
    made = found["lora_B.weight"] @ found["lora_A.weight"]
    return ((made - wanted).norm() / wanted.norm()).item()


kohya = {
    "lora_unet_final_layer_adaLN_modulation_1.lora_down.weight": A,
    "lora_unet_final_layer_adaLN_modulation_1.lora_up.weight": B,
}
layers = {f"{name}.{part}": 1 for name in ("time_in", "vector_in", "guidance_in") for part in ("in_layer", "out_layer")}
layers |= {"img_in": 1, "txt_in": 1, "final_layer.linear": 1}
norms = []
for i in range(19):
    for side in ("img", "txt"):
        block = f"double_blocks.{i}.{side}"
        layers |= {f"{block}_attn.qkv": 3, f"{block}_attn.proj": 1, f"{block}_mlp.0": 4, f"{block}_mlp.2": 1, f"{block}_mod.lin": 6}
        norms.append(f"{block}_attn.norm")
for i in range(38):
    block = f"single_blocks.{i}"
    layers |= {f"{block}.linear1": 7, f"{block}.linear2": 1, f"{block}.modulation.lin": 3}
    norms.append(f"{block}.norm")
control = {}
for name, times in layers.items():
    control |= {f"{name}.lora_A.weight": torch.zeros(RANK, 8), f"{name}.lora_B.weight": torch.zeros(times * WIDTH, RANK)}
for name in norms:
    control |= {f"{name}.{part}_norm.scale": torch.ones(128) for part in ("query", "key")}
last = "final_layer.adaLN_modulation.1"
control |= {f"{last}.lora_A.weight": A, f"{last}.lora_B.weight": B}

of_kohya = wrong(FluxPipeline.lora_state_dict(kohya))
of_control = wrong(FluxControlPipeline.lora_state_dict(control))
print(f"kohya:   {of_kohya:.2f} of the change of norm_out is wrong")
print(f"control: {of_control:.2f} of the change of norm_out is wrong")
assert of_kohya < 1e-6
assert of_control > 0.5
PY
PYTHONPATH="$folder/site" python3 "$folder/look.py"
