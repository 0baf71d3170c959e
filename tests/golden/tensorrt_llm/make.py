# SPDX-License-Identifier: Apache-2.0
"""Makes what lies beside it with TensorRT-LLM's own converter of PEFT's adapters.

    python make.py PEER [--check]

PEER is ``examples/hf_lora_convert.py`` of TensorRT-LLM at 5573a380. It runs as it is; only the few names that it imports from the
package, which needs a GPU, are stand-ins. Needs torch. The base is ``../litgpt/base``; ``expected.safetensors`` has what the runtime
makes of it: ``g * (W + out in)``, g being 1 without a magnitude, in float64.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
import tempfile
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
BASE = HERE.parent / "litgpt/base/model.safetensors"
NAMES = [
    *("attn_qkv", "attn_q", "attn_k", "attn_v", "attn_dense", "mlp_h_to_4h", "mlp_4h_to_h", "mlp_gate"),
    *("cross_attn_qkv", "cross_attn_q", "cross_attn_k", "cross_attn_v", "cross_attn_dense"),
    *("moe_h_to_4h", "moe_4h_to_h", "moe_gate", "moe_router", "mlp_router", "mlp_gate_up"),
]
ALL = [*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]
CASES: dict[str, dict[str, Any]] = {
    "all": {"modules": dict.fromkeys(ALL, 3), "alpha": 7, "dtype": "float32"},
    "ranks": {"modules": {ALL[0]: 2, ALL[6]: 4}, "alpha": 6, "use_rslora": True, "dtype": "float32"},
    "half": {"modules": dict.fromkeys(ALL[:3], 2), "alpha": 4, "dtype": "float16"},
    "brain": {"modules": dict.fromkeys(ALL[:3], 2), "alpha": 4, "dtype": "bfloat16"},
    "dora": {"modules": dict.fromkeys(ALL, 2), "alpha": 5, "dora": True, "dtype": "float32"},
}


def stand_ins() -> None:
    def to_numpy(tensor: torch.Tensor) -> np.ndarray:
        return tensor.view(torch.int16).numpy().view("V2") if tensor.dtype is torch.bfloat16 else tensor.numpy()

    made: dict[str, dict[str, Any]] = {
        "tensorrt_llm": {},
        "tensorrt_llm._utils": {"str_dtype_to_torch": lambda name: getattr(torch, name), "torch_to_numpy": to_numpy},
        "tensorrt_llm.lora_manager": {
            "LoraManager": types.SimpleNamespace(LORA_MODULE_IDS={name: number for number, name in enumerate(NAMES)})
        },
        "tensorrt_llm.models": {},
        "tensorrt_llm.models.convert_utils": {
            "get_model_path": lambda folder, stem: f"{folder}/{stem}.safetensors",
            "load_state_dict": lambda path: {k: torch.from_numpy(v) for k, v in load_file(path).items()},
        },
    }
    for name, members in made.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(members)


def draw(name: str, *sizes: int) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return (rng.standard_normal(sizes) / 4).astype(np.float32)


def make(peer: Path, root: Path) -> None:
    stand_ins()
    convert = runpy.run_path(str(peer))["convert_hf_model"]
    base = load_file(BASE)
    for case, said in CASES.items():
        folder = root / case
        tensors, expected = {}, {}
        stored = getattr(torch, said["dtype"])
        for layer in range(2):
            for module, rank in said["modules"].items():
                name = f"model.layers.{layer}.{module}"
                weight = base[f"{name}.weight"].astype(np.float64)
                a, b = draw(f"{name}.a", rank, weight.shape[1]), draw(f"{name}.b", weight.shape[0], rank)
                scale = said["alpha"] / (rank**0.5 if said.get("use_rslora") else rank)
                tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
                inside = torch.from_numpy(a).to(stored).double().numpy()
                out = (torch.from_numpy(b) * scale).to(stored).double().numpy()
                changed = weight + out @ inside
                if said.get("dora"):
                    magnitude = np.abs(draw(f"{name}.m", weight.shape[0])) + 0.75
                    tensors[f"base_model.model.{name}.lora_magnitude_vector"] = magnitude
                    changed = magnitude[:, None].astype(np.float64) * changed
                expected[f"{name}.weight"] = changed.astype(np.float32)
        config = {"lora_alpha": said["alpha"], "r": 1, "use_rslora": said.get("use_rslora", False)}
        with tempfile.TemporaryDirectory() as place:
            save_file(tensors, Path(place) / "adapter_model.safetensors")
            (Path(place) / "adapter_config.json").write_text(json.dumps(config))
            convert(Path(place), said["dtype"], folder)
        save_file(expected, folder / "expected.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    sys.path.insert(0, str(HERE.parent))
    from regenerate import keep

    keep(HERE, lambda root: make(options.peer, root), check=options.check)


if __name__ == "__main__":
    main()
