# SPDX-License-Identifier: Apache-2.0
"""Makes a Llama, prefixes that AdapterHub's library saved for it, and the logits of its forward with them.

Attention is the eager one: with torch's fused attention and no padding the library (1.3.0) asks for a causal mask, which torch
aligns at the first key, so that each token sees as many keys too few as the prefix has.

Run it in an environment with ``torch==2.13.0 adapters==1.3.0``::

    python make.py [--check]
    python make.py --load FOLDER NAME LOGITS    # loads the adapter NAME of FOLDER instead, and writes its logits
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import adapters
import torch
from adapters import PrefixTuningConfig
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
IDS = torch.tensor([[3, 7, 11, 2, 30, 9]])
CONFIG = LlamaConfig(
    vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=24, max_position_embeddings=64, tie_word_embeddings=False,
)  # fmt: skip
CASES = {
    "prefix": PrefixTuningConfig(flat=True, prefix_length=3),
    "prefix-mlp": PrefixTuningConfig(prefix_length=3, bottleneck_size=5),
}


def seeded(model: LlamaForCausalLM, seed: int, only: str = "") -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if not only or only in name:
                parameter.copy_(0.4 * torch.randn_like(parameter))


def loaded(root: Path) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(root / "base", attn_implementation="eager")
    adapters.init(model)
    return model


def write_logits(model: LlamaForCausalLM, name: str, file: Path) -> None:
    model.set_active_adapters(name)
    with torch.no_grad():
        save_file({"logits": model.eval()(input_ids=IDS).logits.contiguous()}, file)


def make(root: Path) -> None:
    base = LlamaForCausalLM(CONFIG)
    seeded(base, 0)
    base.save_pretrained(root / "base")
    (root / "base" / "generation_config.json").unlink()
    for name, config in CASES.items():
        model = loaded(root)
        model.add_adapter("task", config=config)
        seeded(model, 5, ".task.")
        write_logits(model, "task", root / f"{name}.logits.safetensors")
        model.save_adapter(str(root / name), "task", with_head=False)
        file = root / name / "adapter_config.json"  # which names the folder that the model was loaded from
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_name": "base"}, indent=2, sort_keys=True))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--load", nargs=3, metavar=("FOLDER", "NAME", "LOGITS"))
    options = parser.parse_args()
    if options.load:
        folder, name, logits = options.load
        model = loaded(HERE)
        write_logits(model, model.load_adapter(folder, load_as=name, use_safetensors=True), Path(logits))
        return
    sys.path.insert(0, str(HERE.parent))
    from regenerate import keep, same_values

    keep(HERE, make, check=options.check, same=same_values)


if __name__ == "__main__":
    main()
