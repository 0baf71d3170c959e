#!/usr/bin/env bash
# transformers saves a model that it quantised to 4 bits itself, and cannot save the same model once it was loaded from that folder.
#
# Versions:  transformers 5.23.0, bitsandbytes 0.50.2, torch 2.13.0.
# Behaviour: `save_pretrained` of the loaded model raises NotImplementedError, with PEFT's adapter merged into it or without: saving
#            reverses the conversions that loading did, and the one that puts codes and scales together has no reverse.
# Seen:      quantised on loading: saved; loaded in 4 bits: NotImplementedError
# Fails if the second model is saved, or another error is raised.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" \
    bitsandbytes==0.50.2 torch==2.13.0 transformers==5.23.0 accelerate
cat > "$folder/look.py" <<'PY'
import sys

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

folder = sys.argv[1]
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
LlamaForCausalLM(LlamaConfig(**sizes)).bfloat16().save_pretrained(f"{folder}/plain")
four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def saved(source, target, **options):
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/{source}", device_map="cpu", **options)
    try:
        model.save_pretrained(f"{folder}/{target}")
    except NotImplementedError:
        return "NotImplementedError"
    return "saved"


first, second = saved("plain", "quantised", quantization_config=four_bits), saved("quantised", "again")
print(f"quantised on loading: {first}; loaded in 4 bits: {second}")
assert (first, second) == ("saved", "NotImplementedError")
PY
PYTHONPATH="$folder/site" HF_HUB_OFFLINE=1 python3 "$folder/look.py" "$folder" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
