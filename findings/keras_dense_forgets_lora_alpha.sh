#!/usr/bin/env bash
# Keras's Dense forgets the lora_alpha that it is made with.
#
# Versions:  keras 3.15.1, torch 2.13.0 (CPU).
# Behaviour: `Dense(lora_rank=2, lora_alpha=16)` scales its LoRA by 1, not by 8: `build` calls `enable_lora(self.lora_rank)`, which
#            takes the rank as alpha. `EinsumDense` hands the alpha on. A model that is loaded is built in the same way, so that
#            `dense.enable_lora(2, lora_alpha=16)` is undone as well. No error is raised.
# Seen:      Dense: alpha 2, EinsumDense: alpha 16, Dense made again of its configuration: alpha 2
# Fails if a Dense keeps its alpha, or an EinsumDense does not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" keras==3.15.1 torch==2.13.0
cat > "$folder/look.py" <<'PY'
import keras

dense = keras.layers.Dense(4, lora_rank=2, lora_alpha=16)
einsum = keras.layers.EinsumDense("ab,bc->ac", 4, lora_rank=2, lora_alpha=16)
enabled = keras.layers.Dense(4)
for layer in (dense, einsum, enabled):
    layer.build((None, 8))
enabled.enable_lora(2, lora_alpha=16)
assert enabled.lora_alpha == 16
again = keras.layers.Dense.from_config(enabled.get_config())
again.build((None, 8))
print(
    f"Dense: alpha {dense.lora_alpha}, EinsumDense: alpha {einsum.lora_alpha}, "
    f"Dense made again of its configuration: alpha {again.lora_alpha}"
)
assert (dense.lora_alpha, einsum.lora_alpha, again.lora_alpha) == (2, 16, 2)
PY
KERAS_BACKEND=torch CUDA_VISIBLE_DEVICES="" PYTHONPATH="$folder/site" python3 "$folder/look.py"
