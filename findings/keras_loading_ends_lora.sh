#!/usr/bin/env bash
# A LoRA in Keras trains no further once the model was saved and loaded.
#
# Versions:  keras 3.15.1, torch 2.13.0 (CPU).
# Behaviour: saving adds the factors to the kernel and stores the kernel alone, as documented. Loading into a model with LoRA, by
#            `load_weights` or `load_model`, then sets *both* factors to 0 (`load_own_variables`). The gradient of each is a product with
#            the other, so that both stay 0 whatever is trained. They are listed as trainable, and no error or warning is given.
# Seen:      new: the factors moved by up to 1.62
#            load_model: the factors moved by up to 0.00
#            load_weights: the factors moved by up to 0.00
# Fails if the loaded ones move, or the new one does not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" keras==3.15.1 torch==2.13.0
cat > "$folder/look.py" <<'PY'
import os
import tempfile

import keras
import numpy

keras.utils.set_random_seed(0)
x = numpy.random.default_rng(0).standard_normal((64, 8)).astype("float32")
y = x @ numpy.random.default_rng(1).standard_normal((8, 4)).astype("float32")


def new():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, use_bias=False)])
    model.layers[0].enable_lora(2)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


def moved(model, wanted):
    layer = model.layers[0]
    factors = [layer.lora_kernel_a, layer.lora_kernel_b]
    assert all(any(factor is one for one in model.trainable_variables) for factor in factors)
    before = [keras.ops.convert_to_numpy(factor).copy() for factor in factors]
    model.fit(x, wanted, epochs=20, verbose=0)
    return max(float(abs(keras.ops.convert_to_numpy(f) - b).max()) for f, b in zip(factors, before))


folder = tempfile.mkdtemp()
first = new()
steps = {"new": moved(first, y)}
first.save(os.path.join(folder, "m.keras"))
first.save_weights(os.path.join(folder, "m.weights.h5"))
steps["load_model"] = moved(keras.models.load_model(os.path.join(folder, "m.keras")), -y)
second = new()
second.load_weights(os.path.join(folder, "m.weights.h5"))
steps["load_weights"] = moved(second, -y)
for name, step in steps.items():
    print(f"{name}: the factors moved by up to {step:.2f}")
assert steps["new"] > 0.1
assert steps["load_model"] == steps["load_weights"] == 0
PY
KERAS_BACKEND=torch CUDA_VISIBLE_DEVICES="" PYTHONPATH="$folder/site" python3 "$folder/look.py"
