# SPDX-License-Identifier: Apache-2.0
"""Makes what lies beside it with KerasHub: LoRAs of small backbones, and the weights of transformers that they change.

    python make.py
    python make.py --load BASE FOLDER EXPECTED

The second gives a converted FOLDER to KerasHub and compares what its kernels hold then with EXPECTED. Needs keras 3.15.1,
keras-hub 0.32.0 and torch. KerasHub loads ``NAME/base``, a model of transformers all of whose weights are told apart by their values, so
that where each of them lies in a kernel is seen, not derived. ``NAME/lora*/expected.safetensors`` has what the kernels hold after
``load_lora_weights`` of the ``adapter.lora.h5`` beside it, put back where it came from.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any

os.environ |= {"KERAS_BACKEND": "torch", "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}

import h5py
import keras
import keras_hub
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
LAYERS, HIDDEN, INNER, HEADS, GROUPS, VOCABULARY = 2, 16, 24, 4, 2, 12
ALL = ["query", "key", "value", "attention_output"]
ALL += ["feedforward_gate_dense", "feedforward_intermediate_dense", "feedforward_output_dense"]
ALL += ["ffw_gating", "ffw_gating_2", "ffw_linear"]
LLAMA = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
GEMMA = LLAMA | {"head_dim": 8, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"}
GEMMA2 = GEMMA | {"query_pre_attn_scalar": 8, "sliding_window": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "mistral": LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None},
    "qwen2": LLAMA
    | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    | {"use_sliding_window": False, "sliding_window": None},
    "qwen3": LLAMA
    | {"model_type": "qwen3", "architectures": ["Qwen3Model"], "head_dim": 8}
    | {"use_sliding_window": False, "sliding_window": None, "tie_word_embeddings": True},
    "gemma": GEMMA | {"model_type": "gemma", "architectures": ["GemmaForCausalLM"]},
    "gemma2": GEMMA2
    | {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}
    | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    "gemma3": GEMMA2
    | {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    | {"rope_local_base_freq": 10000.0, "rope_scaling": None, "sliding_window_pattern": 2},
    "gpt2": {
        "model_type": "gpt2",
        "architectures": ["GPT2Model"],
        "n_embd": HIDDEN,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_positions": 32,
        "vocab_size": VOCABULARY,
        "resid_pdrop": 0.1,
    },
    "bert": {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32,
        "type_vocab_size": 2,
        "hidden_dropout_prob": 0.1,
    },
}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"rank": 2},
    "llama-all": {"rank": 3, "targets": ALL},
    "mistral": {"rank": 2, "targets": ALL},
    "qwen2": {"rank": 2, "targets": ALL},
    "qwen3": {"rank": 2, "targets": ALL},
    "gemma": {"rank": 2, "targets": ALL},
    "gemma2": {"rank": 2},
    "gemma3": {"rank": 2, "targets": ALL},
    "gpt2": {"rank": 2, "targets": ALL},
    "bert": {"rank": 2, "targets": ALL},
}


def llama_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    kind, stem = config["model_type"], "" if config["model_type"] == "qwen3" else "model."
    size = config.get("head_dim", HIDDEN // HEADS)
    shapes: dict[str, tuple[int, ...]] = {
        f"{stem}embed_tokens.weight": (VOCABULARY, HIDDEN),
        f"{stem}norm.weight": (HIDDEN,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if kind in ("gemma2", "gemma3_text") else []
    for layer in range(LAYERS):
        at = f"{stem}layers.{layer}"
        shapes |= {f"{at}.{name}.weight": (HIDDEN,) for name in norms}
        for name, count in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (count * size, HIDDEN)
            if kind == "qwen2":
                shapes[f"{at}.self_attn.{name}_proj.bias"] = (count * size,)
            if kind in ("qwen3", "gemma3_text") and name != "v":
                shapes[f"{at}.self_attn.{name}_norm.weight"] = (size,)
        shapes[f"{at}.self_attn.o_proj.weight"] = (HIDDEN, HEADS * size)
        shapes |= {f"{at}.mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (HIDDEN, INNER)
    return shapes


def gpt2_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (VOCABULARY, HIDDEN), "wpe.weight": (32, HIDDEN)}
    shapes |= {"ln_f.weight": (HIDDEN,), "ln_f.bias": (HIDDEN,)}
    for layer in range(LAYERS):
        at = f"h.{layer}"
        for name, sizes in (
            *(("attn.c_attn", (HIDDEN, 3 * HIDDEN)), ("attn.c_proj", (HIDDEN, HIDDEN))),
            *(("mlp.c_fc", (HIDDEN, 4 * HIDDEN)), ("mlp.c_proj", (4 * HIDDEN, HIDDEN))),
        ):
            shapes |= {f"{at}.{name}.weight": sizes, f"{at}.{name}.bias": sizes[1:]}
        shapes |= {f"{at}.{name}.{leaf}": (HIDDEN,) for name in ("ln_1", "ln_2") for leaf in ("weight", "bias")}
    return shapes


def bert_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        f"embeddings.{name}_embeddings.weight": (count, HIDDEN)
        for name, count in (("word", VOCABULARY), ("position", 32), ("token_type", 2))
    }

    def norm(at: str) -> None:
        shapes.update({f"{at}.LayerNorm.weight": (HIDDEN,), f"{at}.LayerNorm.bias": (HIDDEN,)})

    norm("embeddings")
    linear = {f"attention.self.{name}": (HIDDEN, HIDDEN) for name in ("query", "key", "value")}
    linear |= {"attention.output.dense": (HIDDEN, HIDDEN), "intermediate.dense": (INNER, HIDDEN)}
    linear["output.dense"] = (HIDDEN, INNER)
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}"
        norm(f"{at}.attention.output")
        norm(f"{at}.output")
        shapes.update({f"{at}.{name}.weight": sizes for name, sizes in linear.items()})
        shapes.update({f"{at}.{name}.bias": sizes[:1] for name, sizes in linear.items()})
    shapes.update({"pooler.dense.weight": (HIDDEN, HIDDEN), "pooler.dense.bias": (HIDDEN,)})
    return shapes


def weights(name: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Numbers of half precision, no two of which are equal."""
    halves = np.arange(9 << 10, 17 << 10, dtype=np.uint16).view(np.float16).astype(np.float32)  # 1 / 64 to 4
    pool = np.random.default_rng(zlib.crc32(name.encode())).permutation(np.concatenate([halves, -halves])) / 4
    found, at = {}, 0
    for key, sizes in shapes.items():
        count = int(np.prod(sizes))
        found[key] = pool[at : at + count].reshape(sizes).copy()
        at += count
    assert at <= len(pool)
    return found


def kernels(backbone: Any) -> list[tuple[Any, np.ndarray]]:
    """Layers that can have a LoRA, and their kernels as they act now."""
    layers = [layer for layer in backbone._flatten_layers(include_self=False) if hasattr(layer, "enable_lora")]
    layers = [layer for layer in layers if hasattr(layer, "kernel") or hasattr(layer, "_kernel")]
    return [(layer, keras.ops.convert_to_numpy(layer.kernel).astype(np.float32)) for layer in layers]


def places(base: dict[str, np.ndarray], found: list[tuple[Any, np.ndarray]]) -> list[tuple[str, np.ndarray]]:
    """For each kernel the weight that it was loaded from, and the position there of each of its values."""
    position = {value: (key, at) for key, tensor in base.items() for at, value in enumerate(tensor.ravel().tolist())}
    told: list[tuple[str, np.ndarray]] = []
    for _, kernel in found:
        origins = [position[value] for value in kernel.ravel().tolist()]
        (key,) = {key for key, _ in origins}
        told.append((key, np.array([at for _, at in origins])))
    return told


def make(case: str, said: dict[str, Any]) -> None:
    name = case.partition("-")[0]
    config = CONFIGS[name]
    base_folder, folder = HERE / name / "base", HERE / name / case.replace(name, "lora")
    shapes = gpt2_shapes() if name == "gpt2" else bert_shapes() if name == "bert" else llama_shapes(config)
    base = weights(name, shapes)
    base_folder.mkdir(parents=True, exist_ok=True)
    save_file(base, base_folder / "model.safetensors", {"format": "pt"})
    (base_folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    folder.mkdir(parents=True)
    backbone = keras_hub.models.Backbone.from_preset(str(base_folder), dtype="float32")
    trained = type(backbone).from_config(backbone.get_config())
    trained.enable_lora(said["rank"], target_layer_names=said.get("targets"))
    for number, layer in enumerate(trained._flatten_layers(include_self=False)):
        for side in ("a", "b"):
            if (kernel := getattr(layer, f"lora_kernel_{side}", None)) is not None:
                rng = np.random.default_rng(zlib.crc32(f"{case}.{number}.{side}".encode()))
                kernel.assign((rng.standard_normal(kernel.shape) / 2).astype(np.float32))
    trained.save_lora_weights(str(folder / "adapter.lora.h5"))
    trained.save_to_preset(str(folder / "preset"))
    for file in ("config.json", "metadata.json"):
        shutil.move(folder / "preset" / file, folder / file)
    shutil.rmtree(folder / "preset")
    found = kernels(backbone)
    origin = places(base, found)
    backbone.enable_lora(said["rank"], target_layer_names=said.get("targets"))
    backbone.load_lora_weights(str(folder / "adapter.lora.h5"))
    after = {key: value.copy() for key, value in base.items()}
    for (layer, _), (key, at) in zip(found, origin, strict=True):
        after[key].ravel()[at] = keras.ops.convert_to_numpy(layer.kernel).ravel()
    changed = {key: value for key, value in after.items() if not np.array_equal(value, base[key])}
    save_file(changed, folder / "expected.safetensors", {"format": "pt"})
    print(case, len(changed), sorted({key.rpartition(".")[0].split(".", 3)[-1] for key in changed}))


def load(base_folder: Path, folder: Path, expected: Path) -> None:
    """KerasHub loads a file into the backbone that it makes of a base, whose kernels then are what EXPECTED says."""
    backbone = keras_hub.models.Backbone.from_preset(str(base_folder), dtype="float32")
    base = load_file(base_folder / "model.safetensors")
    found = kernels(backbone)
    origin = places(base, found)
    layers = [layer for layer in backbone._flatten_layers(include_self=False) if layer.weights]
    with h5py.File(folder / "adapter.lora.h5") as file:
        names = sorted({layers[int(number)].name for number in file["lora"] if number != "vars"})
        backbone.enable_lora(int(file["lora/vars/rank"][()]), target_layer_names=names)
    backbone.load_lora_weights(str(folder / "adapter.lora.h5"))
    wanted = base | load_file(expected)
    worst = 0.0
    for (layer, before), (key, at) in zip(found, origin, strict=True):
        after, want = keras.ops.convert_to_numpy(layer.kernel), wanted[key].ravel()[at].reshape(before.shape)
        step = np.abs(want - before).max()
        worst = max(worst, float(np.abs(after - want).max() / step) if step else float(np.abs(after - before).max()))
    print("OK" if worst <= 1e-6 else "FAIL", f"{len(names)} kinds of layers, {worst:.1e} of the greatest change")
    sys.exit(worst > 1e-6)


def main() -> None:
    if sys.argv[1:2] == ["--load"]:
        load(*map(Path, sys.argv[2:5]))
    for name in CONFIGS:
        shutil.rmtree(HERE / name, ignore_errors=True)
    for case, said in CASES.items():
        make(case, said)
    with h5py.File(HERE / "bfloat16.h5", "w") as file:  # as keras.src.saving.saving_lib.H5Entry stores one
        file.create_dataset("x", data=np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)).attrs["dtype"] = "bfloat16"
    versions = {"keras": keras.__version__, "keras-hub": keras_hub.__version__, "h5py": h5py.__version__}
    (HERE / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
