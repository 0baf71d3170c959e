#!/usr/bin/env bash
# transformers' load_adapter runs a DoRA adapter without its trained magnitudes.
#
# Versions:  transformers 5.23.0, peft 0.21.2, torch 2.13.0 (CPU).
# Behaviour: PEFT saves the lengths of a DoRA as `lora_magnitude_vector`, and its own loader puts `.weight` behind the name.
#            `model.load_adapter` does not: its load report lists the vectors as UNEXPECTED and those of the model as MISSING, these
#            stay as they were made from the base's rows, and the model runs. No error is raised.
# Seen:      LoRA: 0.000 of what was trained is missing with PeftModel, 0.000 with load_adapter
#            DoRA: 0.000 of what was trained is missing with PeftModel, 0.803 with load_adapter
# Fails if load_adapter gives the trained model, or the others do not.
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
config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
)
model = transformers.LlamaForCausalLM(config).eval()


def logits(some):
    with torch.no_grad():
        return some.eval()(torch.arange(12)[None]).logits


for dora in (False, True):
    folder = tempfile.mkdtemp()
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, use_dora=dora)
    wrapped = peft.get_peft_model(copy.deepcopy(model), lora)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder)
    trained = logits(wrapped)
    by_peft = logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), folder))
    other = copy.deepcopy(model)
    other.load_adapter(folder)
    moved = (trained - logits(model)).norm()
    first, second = (((made - trained).norm() / moved).item() for made in (by_peft, logits(other)))
    name = "DoRA" if dora else "LoRA"
    print(f"{name}: {first:.3f} of what was trained is missing with PeftModel, {second:.3f} with load_adapter")
    assert first < 1e-4
    assert second > 0.1 if dora else second < 1e-4
PY
PYTHONPATH="$folder/site" python3 "$folder/look.py"
