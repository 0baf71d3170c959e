#!/usr/bin/env bash
# gptqmodel's dequantiser reads an asymmetric GPTQ model otherwise than gptqmodel saved it.
#
# Versions:  gptqmodel 7.7.0, torch 2.13.0, transformers 5.23.0.
# Behaviour: The first version of the format stores zero points minus one. Saving subtracts one from whole words of eight
#            zero points, so that a 0 borrows from the next; loading adds one to the words and gets both back. The
#            dequantiser (gptqmodel.utils.model_dequant.convert_gptq_file) takes every zero point by itself, modulo 16:
#            the one behind a 0 is one too low, and every weight of its group one step too high.
# Seen:      zero points  [8, 0, 7, 9, 8, 0, 0, 5]
#            loaded       [8, 0, 7, 9, 8, 0, 0, 5]
#            dequantised  [8, 0, 6, 9, 8, 0, 15, 4]
# Fails if the layer that is loaded does not have its zero points back, or if the dequantiser does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
install="python3 -m pip install --quiet --disable-pip-version-check --target $folder/site"
$install torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0 numpy==2.4.6 pillow protobuf \
  pypcre==0.6.4 logbar==0.4.15 tokenicer==0.0.14 device-smi==0.5.7 threadpoolctl==3.8.0 dill datasets defuser \
  torchao==0.18.0
$install --no-deps gptqmodel==7.7.0
cat > "$folder/look.py" <<'PY'
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.config import FORMAT
from gptqmodel.utils.backend import BACKEND
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module
from gptqmodel.utils.model_dequant import convert_gptq_file
from safetensors.torch import save_file

zeros = torch.tensor([8.0, 0, 7, 9, 8, 0, 0, 5])[:, None]
scales = torch.ones(8, 1)
linear = torch.nn.Linear(32, 8, bias=False)
linear.weight.data = torch.arange(32.0).remainder(16)[None] - zeros
layer = TorchLinear(
    bits=4, group_size=32, desc_act=False, sym=False, in_features=32, out_features=8, bias=False,
    pack_dtype=torch.int32, backend=BACKEND.TORCH, adapter=None, register_buffers=True, format=FORMAT.GPTQ,
)
layer.pack_original(linear, scales, zeros, None)
layer.qzero_format(format=2)
convert_gptq_v2_to_v1_format_module(layer, SimpleNamespace(bits=4, pack_dtype=torch.int32))
path = Path(sys.argv[1])
save_file({f"w.{name}": part.clone() for name, part in layer.state_dict().items() if not name.startswith("wf")}, path)
dequantised = convert_gptq_file(path, torch.float32, {"bits": 4, "checkpoint_format": "gptq"}, device="cpu")["w.weight"]
convert_gptq_v1_to_v2_format_module(layer, 4, torch.int32)  # as a model is loaded
layer.post_init()
loaded = layer.dequantize_weight().T.float()

print({name: version(name) for name in ("gptqmodel", "torch", "transformers")})
print("zero points ", zeros.flatten().int().tolist())
for name, weight in (("loaded      ", loaded), ("dequantised ", dequantised)):
    print(name, (-weight[:, 0]).int().tolist())  # the first code is 0
assert torch.equal(loaded, linear.weight.data)
assert not torch.equal(dequantised, linear.weight.data)
PY
PYTHONPATH="$folder/site" CUDA_VISIBLE_DEVICES="" python3 "$folder/look.py" "$folder/one.safetensors"
