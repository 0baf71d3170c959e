#!/usr/bin/env bash
# A Llama that torch.onnx.export writes for opset 23 runs with one row only, though its batch is declared dynamic.
#
# Versions:  torch 2.13.0 (CPU), onnxscript 0.7.2, onnx 1.23.2, onnxruntime 1.32.0, transformers 5.23.0.
# Behaviour: transformers makes the rotation's cosines and sines for a batch of one and lets them broadcast. For opset 23 the exporter
#            makes an operator RotaryEmbedding of the rotation and passes the tables as they are, (1, sequence, width), where the
#            operator wants a row for each of the batch. The export gives no warning, and onnx.checker passes the file. With
#            opset 18, which has no such operator, every batch runs.
# Seen:      opset 18, 1 row: runs
#            opset 18, 2 rows: runs
#            opset 23, 1 row: runs
#            opset 23, 2 rows: RotaryEmbedding: Inputs 'cos_cache' and 'sin_cache' are expected to have the same shape as input 'x'
# Fails if two rows run with opset 23, or fail with opset 18. (Tables that depend on a `position_ids` input have all rows.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" torch==2.13.0 onnxscript==0.7.2 onnx==1.23.2 \
    onnxruntime==1.32.0 transformers==5.23.0
cat > "$folder/look.py" <<'PY'
import sys

import onnx
import onnxruntime
import torch
from transformers import LlamaConfig, LlamaForCausalLM

onnxruntime.set_default_logger_severity(4)
torch.manual_seed(0)
shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=80, **shape)).eval()


class Logits(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


ids = torch.tensor([[2, 5, 17, 3], [7, 1, 60, 11]])
mask = torch.ones_like(ids)
axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
seen = {}
for opset in (18, 23):
    path = f"{sys.argv[1]}/{opset}.onnx"
    torch.onnx.export(
        Logits(), (ids, mask), path, dynamo=True, opset_version=opset, dynamic_shapes=(axes, axes),
        input_names=["input_ids", "attention_mask"], verbose=False,
    )
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for rows in (1, 2):
        try:
            given = {"input_ids": ids[:rows].numpy(), "attention_mask": mask[:rows].numpy()}
            logits = session.run(None, given)[0]
            wanted = Logits()(ids[:rows], mask[:rows]).detach().numpy()
            assert abs(logits - wanted).max() < 1e-4
            seen[opset, rows] = "runs"
        except onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument as error:
            text = str(error)
            assert "RotaryEmbedding" in text
            seen[opset, rows] = "RotaryEmbedding: " + text[text.index("Inputs 'cos") :].split(",")[0]
        print(f"opset {opset}, {rows} row{'s' * (rows > 1)}: {seen[opset, rows]}")
assert [seen[key] == "runs" for key in sorted(seen)] == [True, True, True, False]
PY
PYTHONPATH="$folder/site" python3 "$folder/look.py" "$folder" 2>/dev/null
