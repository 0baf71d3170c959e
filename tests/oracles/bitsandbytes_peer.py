# SPDX-License-Identifier: Apache-2.0
"""transformers with bitsandbytes on a CPU, for tests that start it in an environment of its own.

``quantise BASE OUT CONFIG`` loads a folder with a BitsAndBytesConfig, given as JSON, and saves it.
``greedy FOLDER IDS COUNT`` prints the token ids that follow IDS, also as JSON, one by one the likeliest.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import bitsandbytes
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

CPU = {"": "cpu"}


def quantise(base: str, out: str, config: dict[str, Any]) -> None:
    chosen = BitsAndBytesConfig(**config)
    AutoModelForCausalLM.from_pretrained(base, quantization_config=chosen, device_map=CPU).save_pretrained(out)


@torch.no_grad()
def greedy(folder: str, ids: list[int], count: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=CPU, dtype=torch.float32).eval()
    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    for module in model.modules():
        for parameter in module.parameters(recurse=False) if module not in layers else ():
            parameter.data = (
                parameter.data.float()
            )  # whatever type is asked for; codes held in bfloat16 stay as they are
    for layer in layers:
        layer.compute_dtype = torch.float32
        layer.weight.quant_state.dtype = torch.float32  # else weights are rounded to the type they had at first
        layer.support_avx512bf16_for_cpu = False  # it would multiply in bfloat16, whatever type is asked for
    tokens = list(ids)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    print(f"{len(layers)} layers of bitsandbytes", file=sys.stderr)
    return tokens[len(ids) :]


if __name__ == "__main__":
    verb, folder, *rest = sys.argv[1:]
    if verb == "quantise":
        quantise(folder, rest[0], json.loads(rest[1]))
    else:
        print(json.dumps(greedy(folder, json.loads(rest[0]), int(rest[1]))))
