#!/usr/bin/env bash
# A bitsandbytes layer in 4 bits that has computed on a CPU saves other scales than it had: without nested scales unusable ones.
#
# Versions:  bitsandbytes 0.50.2, torch 2.13.0, on a CPU with AVX512-BF16.
# Behaviour: The first forward pass packs the codes anew and rounds the scales to bfloat16, transposed. `state_dict`
#            undoes the codes alone: it returns the scales as a bfloat16 matrix `[blocks of a row, rows]`, which a layer
#            that loads them reads in that order. Nested scales are quantised anew, after their rounding.
# Seen:      before: absmax float32 [128], after: absmax bfloat16 [2, 64]
#            reloaded and read: 0.0930 of the norm from the weight before, 0.5603 after
# Fails if the scales are saved as they were. Says so and ends where the CPU has no AVX512-BF16.
set -euo pipefail
grep -qw avx512_bf16 /proc/cpuinfo || { echo "not on this CPU: it has no AVX512-BF16"; exit 0; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" bitsandbytes==0.50.2 torch==2.13.0 numpy
cat > "$folder/look.py" <<'PY'
import bitsandbytes
import torch

torch.manual_seed(0)
weight = torch.randn(64, 128) * torch.logspace(-1, 0, 64)[:, None]
layer = bitsandbytes.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.bfloat16, compress_statistics=False, quant_type="nf4")
layer.load_state_dict({"weight": weight})
layer = layer.to("cpu").eval()


def saved():
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def read(state):
    parts = {name.removeprefix("weight."): tensor for name, tensor in state.items() if name != "weight"}
    loaded = bitsandbytes.nn.Params4bit.from_prequantized(state["weight"], parts, device="cpu")
    values = bitsandbytes.functional.dequantize_4bit(loaded.data, loaded.quant_state).float()
    return ((values - weight).norm() / weight.norm()).item()


before = saved()
with torch.no_grad():
    layer(torch.randn(4, 128, dtype=torch.bfloat16))
after = saved()
scales = [state["weight.absmax"] for state in (before, after)]
print("before: absmax {} {}, after: absmax {} {}".format(*(x for s in scales for x in (str(s.dtype)[6:], list(s.shape)))))
errors = read(before), read(after)
print(f"reloaded and read: {errors[0]:.4f} of the norm from the weight before, {errors[1]:.4f} after")
assert scales[1].shape == (2, 64) and errors[1] > 2 * errors[0]
PY
TORCHDYNAMO_DISABLE=1 PYTHONPATH="$folder/site" python3 "$folder/look.py"
