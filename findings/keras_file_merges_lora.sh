#!/usr/bin/env bash
# A model with LoRA that Keras saves as .keras comes back with the LoRA merged into its kernels, and with a new, empty LoRA.
#
# Versions:  keras 3.15.1 with the torch backend, torch 2.13.0 (CPU).
# Behaviour: `Model.save` stores the kernel with the factors' product added, and no factors. `load_model` enables LoRA again,
#            with the rank that the layer had: B is zero, and the frozen kernel is the merged one. The model computes the same, but
#            what was trained can no longer be taken off, and factors trained and saved from here on belong to other weights.
# Seen:      after load_model: outputs differ by 0.0, LoRA of rank 2 with B of 0.0, the frozen kernel moved by 5.4
# Fails if the factors are kept, the kernel is the one before, or no LoRA is enabled.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" keras==3.15.1 torch==2.13.0
cat > "$folder/look.py" <<'PY'
import os
import sys

os.environ["KERAS_BACKEND"] = "torch"
import keras
import numpy as np

keras.utils.set_random_seed(0)
given = keras.Input((8,))
layer = keras.layers.Dense(6, name="dense")
model = keras.Model(given, layer(given))
before = layer.get_weights()[0].copy()
layer.enable_lora(2)
layer.lora_kernel_a.assign(np.random.randn(8, 2))
layer.lora_kernel_b.assign(np.random.randn(2, 6))
rows = np.random.randn(3, 8).astype("float32")
trained = keras.ops.convert_to_numpy(model(rows))

path = os.path.join(sys.argv[1], "model.keras")
model.save(path)
again = keras.models.load_model(path)
loaded = again.get_layer("dense")
apart = np.abs(keras.ops.convert_to_numpy(again(rows)) - trained).max()
B = np.abs(keras.ops.convert_to_numpy(loaded.lora_kernel_b)).max()
kernel = next(weight for weight in loaded.non_trainable_variables if tuple(weight.shape) == before.shape)
moved = np.abs(keras.ops.convert_to_numpy(kernel) - before).max()
print(
    f"after load_model: outputs differ by {apart:.1f}, LoRA of rank {loaded.lora_rank} with B of {B:.1f}, "
    f"the frozen kernel moved by {moved:.1f}"
)
assert apart < 1e-5
assert loaded.lora_enabled and loaded.lora_rank == 2 and B == 0
assert moved > 1
PY
PYTHONPATH="$folder/site" python3 "$folder/look.py" "$folder"
