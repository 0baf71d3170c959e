# SPDX-License-Identifier: Apache-2.0
"""Makes the golden files of ``.onnx_adapter``: adapters that PEFT trained and saved, converted by Olive's convert-adapters.

Run it from this folder, in an environment with ``olive-ai``, ``peft``, ``torch`` and ``onnxruntime`` (see ../README.md)::

    python make.py            # rewrites the folders and expected.json
    python make.py --check    # makes everything again elsewhere and compares it with what is here

Expected weights are those that PEFT's merge leaves. Olive takes one scale for all modules, so the adapters have one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

HERE = Path(__file__).resolve().parent
LLAMA = LlamaConfig(
    vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    max_position_embeddings=32, tie_word_embeddings=False,
)  # fmt: skip
NEOX = GPTNeoXConfig(
    vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
    max_position_embeddings=32,
)  # fmt: skip
CASES = {
    "llama": (LlamaForCausalLM, LLAMA, {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj", "lm_head"]}, "float32"),
    "llama-rslora": (LlamaForCausalLM, LLAMA, {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["v_proj"]}, "float32"),
    "llama-fp16": (LlamaForCausalLM, LLAMA, {"r": 2, "lora_alpha": 2, "target_modules": ["o_proj"]}, "float16"),
    "neox": (GPTNeoXForCausalLM, NEOX, {"r": 2, "lora_alpha": 6, "target_modules": ["query_key_value"]}, "float32"),
}  # fmt: skip


def seeded(model: PreTrainedModel, seed: int, only: str = "") -> PreTrainedModel:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if only in name:
                parameter.copy_(0.4 * torch.randn_like(parameter))
    return model


def make(case: str, root: Path) -> None:
    kind, config, settings, dtype = CASES[case]
    folder = root / case
    model = seeded(kind(config), 1)
    model.save_pretrained(folder)
    for file in folder.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = seeded(get_peft_model(model, LoraConfig(**settings)), 5, "lora_")
    if dtype == "float16":  # values that the file holds exactly
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.copy_(parameter.half().float())
    with tempfile.TemporaryDirectory() as saved:
        adapted.save_pretrained(saved)
        command = ["convert-adapters", "-a", saved, "-o", str(folder / "adapter"), "--dtype", dtype]
        subprocess.run(
            [sys.executable, "-m", "olive", *command, "--disable_telemetry"], check=True, capture_output=True
        )
    merged = adapted.merge_and_unload().state_dict()
    save_file(
        {name: value for name, value in merged.items() if not torch.equal(value, before[name])},
        folder / "expected.safetensors",
    )


def write(root: Path) -> None:
    for case in CASES:
        make(case, root)
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "olive-ai")}
    (root / "expected.json").write_text(json.dumps({"versions": versions, "cases": list(CASES)}, indent=1) + "\n")


def main() -> None:
    sys.path.insert(0, str(HERE.parent))
    from regenerate import keep

    keep(HERE, write, check=sys.argv[1:] == ["--check"])


if __name__ == "__main__":
    main()
