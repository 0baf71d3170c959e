# SPDX-License-Identifier: Apache-2.0
"""Makes what lies beside it with torchtune: what its checkpointer saves of small models, and what its merge makes of them.

    python make.py [--check]

Needs torchtune 0.6.1, torchao 0.9, torch, omegaconf. ``epoch`` is what ``FullModelHFCheckpointer`` saved with
``adapter_only`` (torchtune's own file, and its export to PEFT), without the copied tokenizer; ``expected.safetensors`` has
the weights that ``get_merged_lora_ckpt`` changed, as torchtune writes them back for transformers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

for absent in ("datasets", "datasets.distributed"):  # torchtune imports it at once, and only its data sets need it
    sys.modules[absent] = MagicMock()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402
from torchtune import training  # noqa: E402
from torchtune.models.gemma import lora_gemma  # noqa: E402
from torchtune.models.llama3 import lora_llama3  # noqa: E402
from torchtune.models.qwen2 import lora_qwen2  # noqa: E402
from torchtune.modules.peft import get_adapter_params, get_merged_lora_ckpt  # noqa: E402

HERE = Path(__file__).parent
RANK, ALPHA = 3, 12
ATTENTION = ["q_proj", "k_proj", "v_proj", "output_proj"]

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 24,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 10000.0},
    "llama-dora": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 10000.0},
    "qwen2": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "gemma": {
        "model_type": "gemma",
        "architectures": ["GemmaForCausalLM"],
        "tie_word_embeddings": True,
        "head_dim": 16,
        "hidden_act": "gelu_pytorch_tanh",
    },
}
_TYPES = {"llama": "LLAMA3", "qwen2": "QWEN2", "gemma": "GEMMA"}


def values(name: str, *sizes: int) -> np.ndarray:
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    return (draw.standard_normal(sizes) / 4).astype(np.float32)


def write_base(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    width = config.get("head_dim", hidden // config["num_attention_heads"])
    q, kv = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = config["vocab_size"], hidden
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = rows, hidden
            if config["model_type"] == "qwen2":
                shapes[f"{at}.self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{at}.self_attn.o_proj.weight"] = hidden, q
        shapes[f"{at}.mlp.gate_proj.weight"] = shapes[f"{at}.mlp.up_proj.weight"] = inner, hidden
        shapes[f"{at}.mlp.down_proj.weight"] = hidden, inner
        shapes[f"{at}.input_layernorm.weight"] = shapes[f"{at}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    save_file(
        {name: values(name, *sizes) for name, sizes in shapes.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def model_of(name: str, config: dict[str, Any]) -> torch.nn.Module:
    common: dict[str, Any] = {
        "lora_attn_modules": ATTENTION,
        "apply_lora_to_mlp": True,
        "vocab_size": config["vocab_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config["num_key_value_heads"],
        "embed_dim": config["hidden_size"],
        "max_seq_len": 64,
        "intermediate_dim": config["intermediate_size"],
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
    }
    if config["model_type"] == "llama":
        return lora_llama3(**common, apply_lora_to_output=True, use_dora=name.endswith("dora"))
    if config["model_type"] == "qwen2":
        return lora_qwen2(**common, tie_word_embeddings=True)
    return lora_gemma(**common, head_dim=config["head_dim"])


def make(name: str, root: Path) -> None:
    config = {**_COMMON, **CASES[name]}
    base, epoch = root / "base", root / "epoch"
    write_base(base, config)

    def checkpointer(output: Path) -> Any:
        return training.FullModelHFCheckpointer(
            str(base), ["model.safetensors"], _TYPES[config["model_type"]], str(output)
        )

    saver = checkpointer(root / "out")
    state = saver.load_checkpoint()[training.MODEL_KEY]
    model = model_of(name, config)
    model.load_state_dict(state, strict=False)
    adapter = {}
    for key, parameter in get_adapter_params(model).items():
        drawn = values(key, *parameter.shape)
        adapter[key] = torch.from_numpy(1 + np.abs(drawn) if key.endswith("magnitude") else drawn)
    whole = {**state, **adapter}
    targets = [*ATTENTION, "w1", "w2", "w3", *(["output"] if config["model_type"] == "llama" else [])]
    fields = {"r": RANK, "lora_alpha": ALPHA, "target_modules": targets, "peft_type": "LORA"}
    parts = {
        training.MODEL_KEY: {},
        training.ADAPTER_KEY: {key: value.clone() for key, value in adapter.items()},
        training.ADAPTER_CONFIG: fields,
    }
    saver.save_checkpoint(parts, epoch=0, adapter_only=True)
    saved = root / "out" / "epoch_0"
    epoch.mkdir()
    for file in ("adapter_model.pt", "adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(saved / file, epoch / file)
    merged = get_merged_lora_ckpt({key: value.clone() for key, value in whole.items()}, RANK, ALPHA)
    merger = checkpointer(root / "merged")
    merger.load_checkpoint()
    merger.save_checkpoint({training.MODEL_KEY: merged}, epoch=0)
    (written,) = (root / "merged" / "epoch_0").glob("*.safetensors")
    before, after = load_file(base / "model.safetensors"), load_file(written)
    save_file({k: v for k, v in after.items() if not np.array_equal(v, before[k])}, root / "expected.safetensors")
    shutil.rmtree(root / "out")
    shutil.rmtree(root / "merged")


def make_all(root: Path) -> None:
    for name in CASES:
        make(name, root / name)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    sys.path.insert(0, str(HERE.parent))
    from regenerate import keep, same_values

    keep(HERE, make_all, check=options.check, same=same_values)


if __name__ == "__main__":
    main()
