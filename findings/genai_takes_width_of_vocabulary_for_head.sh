#!/usr/bin/env bash
# onnxruntime-genai's builder leaves layers out of a model whose feed-forward part is as wide as its vocabulary.
#
# Versions:  onnxruntime-genai 0.18.0, onnx-ir 1.1.0, onnxruntime 1.32.0, torch 2.13.0 (CPU), transformers 5.23.0.
# Behaviour: the builder walks all modules and takes a Linear with as many outputs as there are tokens for the output head. The first
#            `gate_proj` is one if `intermediate_size` equals `vocab_size` (byte and character models), so the logits are made
#            right behind the feed-forward norm of layer 0. The build ends without an error, the file loads, and its logits are
#            those of another model.
# Seen:      intermediate size 64, vocabulary 80: logits 1.1e-06 away from transformers', of up to 2.6
#            intermediate size 64, vocabulary 64: logits 2.8 away from transformers', of up to 2.3
# Fails if the second is right, or the first is wrong. (The figures depend on the seed.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" onnxruntime-genai==0.18.0 onnx-ir==1.1.0 \
    onnx==1.23.2 onnxruntime==1.32.0 torch==2.13.0 transformers==5.23.0
cat > "$folder/look.py" <<'PY'
import subprocess
import sys

import numpy
import onnxruntime
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

folder = sys.argv[1]
heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
ids = torch.tensor([[2, 5, 17, 3, 41]])
apart = {}
for words in (80, 64):
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=words, hidden_size=32, intermediate_size=64, num_hidden_layers=2, **heads)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    model.save_pretrained(f"{folder}/{words}")
    vocabulary = WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(vocabulary), eos_token="w2").save_pretrained(f"{folder}/{words}")
    made = f"{folder}/{words}-onnx"
    command = ["-i", f"{folder}/{words}", "-o", made, "-p", "fp32", "-e", "cpu", "-c", f"{folder}/cache"]
    subprocess.run(
        [sys.executable, "-m", "onnxruntime_genai.models.builder", *command], check=True, capture_output=True
    )
    session = onnxruntime.InferenceSession(f"{made}/model.onnx", providers=["CPUExecutionProvider"])
    past = numpy.zeros((1, 1, 0, 16), numpy.float32)
    feeds = {one.name: past for one in session.get_inputs() if one.name.startswith("past")}
    feeds |= {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
    wanted = model(ids).logits.detach().numpy()
    apart[words] = abs(session.run(["logits"], feeds)[0] - wanted).max()
    print(
        f"intermediate size 64, vocabulary {words}: logits {apart[words]:.2g} away from transformers', "
        f"of up to {abs(wanted).max():.2g}"
    )
assert apart[80] < 1e-4
assert apart[64] > 0.1
PY
PYTHONPATH="$folder/site" python3 "$folder/look.py" "$folder"
