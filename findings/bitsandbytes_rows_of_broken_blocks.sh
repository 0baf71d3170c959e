#!/usr/bin/env bash
# On a CPU with AVX-512, bitsandbytes reads NF4 and FP4 with the scales of other blocks where a row is no whole number of them.
#
# Versions:  bitsandbytes 0.50.2, torch 2.13.0.
# Behaviour: `quantize_4bit` counts its blocks through the flattened weight, so that with 96 columns and blocks of 64 a
#            block ends in the next row. `dequantize_4bit` on such a CPU takes the scales as if every row began a block;
#            the definition in torch (bitsandbytes/backends/default), which the kernels for GPUs follow, does not. No
#            error is raised, and a model computes with these weights.
# Seen:      8 x 64, blocks of 64: 0.0921 of the norm from the weight on the CPU, 0.0921 by the definition
#            8 x 96, blocks of 64: 0.2576 of the norm from the weight on the CPU, 0.0919 by the definition
# Fails if the second weight is read as it is defined, or the first is not. Says so and ends where the CPU has no AVX-512.
set -euo pipefail
grep -qw avx512f /proc/cpuinfo || { echo "not on this CPU: it has no AVX-512"; exit 0; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" bitsandbytes==0.50.2 torch==2.13.0 numpy
cat > "$folder/look.py" <<'PY'
import bitsandbytes.functional as bnb
import torch

torch.manual_seed(0)
apart = []
for columns in (64, 96):
    weight = torch.randn(8, columns)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    halves = torch.stack([codes[:, 0] >> 4, codes[:, 0] & 15], dim=1).reshape(-1)
    defined = (state.code[halves.long()].reshape(-1, 64) * state.absmax[:, None]).reshape(weight.shape)
    read = bnb.dequantize_4bit(codes, state)
    errors = [((each - weight).norm() / weight.norm()).item() for each in (read, defined)]
    apart.append(not torch.equal(read, defined))
    print(f"8 x {columns}, blocks of 64: {errors[0]:.4f} of the norm from the weight on the CPU, {errors[1]:.4f} by the definition")
assert apart == [False, True], apart
PY
TORCHDYNAMO_DISABLE=1 PYTHONPATH="$folder/site" python3 "$folder/look.py"
