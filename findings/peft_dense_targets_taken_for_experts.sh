#!/usr/bin/env bash
# PEFT trains the experts of other layers when a dense layer's projections are asked for.
#
# Versions:  peft 0.21.2, transformers 5.23.0, torch 2.13.0 (CPU).
# Behaviour: for model types whose experts transformers now stores as stacks, PEFT rewrites `target_modules`: every entry that ends
#            in gate_proj, up_proj or down_proj becomes a parameter of the experts, whichever module it names. Many of these models
#            have dense layers and shared experts with the same names. Those get no LoRA: a new one trains the experts instead, an
#            old adapter's factors for them are not loaded. No error is raised.
# Seen:      targets layers.0.mlp.(gate|up|down)_proj of DeepSeek-V3, layer 0 dense: LoRA at layers.1.mlp.experts
#            targets gate_proj, up_proj, down_proj: LoRA at layers.1.mlp.experts
# Fails if a LoRA is put on layer 0 or on the shared experts.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" peft==0.21.2 transformers==5.23.0 torch==2.13.0
cat > "$folder/look.py" <<'PY'
import copy

import peft
import torch
import transformers

torch.manual_seed(0)
config = transformers.DeepseekV3Config(
    vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, first_k_dense_replace=1,
    num_attention_heads=2, num_key_value_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
    n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, n_shared_experts=1,
)
model = transformers.DeepseekV3ForCausalLM(config)
names = dict(model.named_modules())
assert "model.layers.0.mlp.gate_proj" in names and "model.layers.1.mlp.shared_experts.gate_proj" in names
leaves = ["gate_proj", "up_proj", "down_proj"]
for said, targets in (
    ("layers.0.mlp.(gate|up|down)_proj of DeepSeek-V3, layer 0 dense", [f"layers.0.mlp.{leaf}" for leaf in leaves]),
    ("gate_proj, up_proj, down_proj", leaves),
):
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=targets, r=4))
    owners = {name.split(".lora_")[0].replace(".base_layer", "") for name, _ in wrapped.named_parameters() if ".lora_" in name}
    owners = sorted(name.removeprefix("base_model.model.model.") for name in owners)
    print(f"targets {said}: LoRA at {', '.join(owners)}")
    assert owners == ["layers.1.mlp.experts"]
PY
PYTHONPATH="$folder/site" python3 "$folder/look.py"
