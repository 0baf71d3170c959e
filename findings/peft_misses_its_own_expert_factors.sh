#!/usr/bin/env bash
# PEFT does not load the expert factors that it saved itself of Mistral Large 4.
#
# Versions:  peft 0.21.2, transformers 5.23.0, torch 2.13.0 (CPU).
# Behaviour: PEFT saves factors under the names of the model's code. As it loads them, it applies the renames by which transformers
#            brings a checkpoint's names to those of the code. For this model type one of them turns `.experts.` into
#            `.mlp.experts.`, and what is called so already becomes `.mlp.mlp.experts.`, which no module is. The factors stay as they
#            were made, with B zero. There is a warning of missing keys and no error.
# Seen:      experts' LoRA, saved and loaded by PEFT: 1.000 of what was trained is missing
#            attention's LoRA, saved and loaded by PEFT: 0.000 of what was trained is missing
# Fails if PEFT loads the experts' factors, or not those of attention.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" peft==0.21.2 transformers==5.23.0 torch==2.13.0
cat > "$folder/look.py" <<'PY'
import copy
import tempfile

import peft
import torch
import transformers

torch.manual_seed(0)
text = dict(
    model_type="mistral_large4_text", vocab_size=101, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
    num_hidden_layers=2, first_k_dense_replace=1, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, n_shared_experts=1,
    num_experts_per_tok=2, n_group=1, topk_group=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    head_dim=8, max_position_embeddings=64,
)
vision = dict(model_type="pixtral", hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8)
config = transformers.CONFIG_MAPPING["mistral_large4"](text_config=text, vision_config=vision)
model = transformers.MistralLarge4ForConditionalGeneration(config).eval()
for parameter in model.parameters():
    if parameter.dim() > 1:
        parameter.data = 0.08 * torch.randn_like(parameter)


def logits(some):
    with torch.no_grad():
        return some.eval()(input_ids=torch.arange(3, 15)[None]).logits


experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
for name, targets, parameters in (("experts", [], experts), ("attention", ["o_proj"], None)):
    lora = peft.LoraConfig(r=4, target_modules=targets, target_parameters=parameters)
    wrapped = peft.get_peft_model(copy.deepcopy(model), lora)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    folder = tempfile.mkdtemp()
    wrapped.save_pretrained(folder)
    trained, loaded = logits(wrapped), logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), folder))
    missing = ((loaded - trained).norm() / (trained - logits(model)).norm()).item()
    print(f"{name}' LoRA, saved and loaded by PEFT: {missing:.3f} of what was trained is missing".replace("attention'", "attention's"))
    assert missing > 0.9 if parameters else missing < 1e-4
PY
PYTHONPATH="$folder/site" python3 "$folder/look.py"
