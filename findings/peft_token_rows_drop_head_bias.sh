#!/usr/bin/env bash
# With token rows trained beside a LoRA, PEFT's model loses the bias of a head that is tied to the embeddings.
#
# Versions:  peft 0.21.2, transformers 5.23.0, torch 2.13.0 (CPU).
# Behaviour: `trainable_token_indices` wraps the embeddings and the head tied to them. The wrapped head multiplies by the rows and
#            leaves the head's bias out. BERT, ELECTRA, XLM-R and their like have such a bias. A merge by PEFT keeps it, so that
#            the merged model is not the attached one, which was trained. No error is raised.
# Seen:      attached, nothing trained yet: the model's own logits less the head's bias, to 1.1e-07
#            merged, nothing trained yet: the model's own logits, to 0.0e+00
# Fails if the attached model has the bias, or the merged one lost it.
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
config = transformers.BertConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=32
)
model = transformers.BertForMaskedLM(config).eval()
bias = model.cls.predictions.bias
torch.nn.init.normal_(bias)
tokens = torch.arange(12)[None]
with torch.no_grad():
    own = model(tokens).logits
    lora = peft.LoraConfig(target_modules=["query", "value"], r=4, trainable_token_indices=[5, 7])
    wrapped = peft.get_peft_model(copy.deepcopy(model), lora).eval()
    attached = wrapped(tokens).logits
    merged = wrapped.merge_and_unload()(tokens).logits
lost, kept = (attached - (own - bias)).abs().max().item(), (merged - own).abs().max().item()
print(f"attached, nothing trained yet: the model's own logits less the head's bias, to {lost:.1e}")
print(f"merged, nothing trained yet: the model's own logits, to {kept:.1e}")
assert lost < 1e-5 and kept < 1e-5
assert (attached - own).abs().max() > 0.1
PY
PYTHONPATH="$folder/site" python3 "$folder/look.py"
