# SPDX-License-Identifier: Apache-2.0
"""Record what the linear layers of a model get while it reads a text: the file that ``surgery extract-lora --calibration`` takes.

    python examples/calibrate.py examples/tuned some-text.txt -o inputs.safetensors
    surgery extract-lora examples/base examples/tuned -o my-lora --calibration inputs.safetensors

Second moments (``<module>.gram``) and means, so that the file does not grow with the text. ``--activations N`` keeps N raw inputs
of each layer instead, which is smaller where layers are wide.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

__all__ = ["record"]


def record(model: Any, ids: list[int], context: int = 480, keep: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of every linear layer over windows of ``context`` tokens, as the file's tensors."""
    grams: dict[str, torch.Tensor] = {}
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    raw: dict[str, list[torch.Tensor]] = {}

    def hook(name: str) -> Any:
        def note(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            if keep:
                raw.setdefault(name, []).append(rows.half().cpu())
                return
            exact = rows.double()
            grams[name] = grams.get(name, 0) + exact.T @ exact
            sums[name] = sums.get(name, 0) + exact.sum(dim=0)
            counts[name] = counts.get(name, 0) + len(rows)

        return note

    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers]
    with torch.no_grad():
        for start in range(0, len(ids), context):
            model(torch.tensor([ids[start : start + context]], device=model.device))
    for one in hooks:
        one.remove()
    if keep:
        generator = torch.Generator().manual_seed(0)
        rows = {name: torch.cat(parts) for name, parts in raw.items()}
        return {f"{n}.activations": r[torch.randperm(len(r), generator=generator)[:keep]] for n, r in rows.items()}
    found = {f"{name}.gram": (gram / counts[name]).float() for name, gram in grams.items()}
    return found | {f"{name}.mean": (total / counts[name]).float() for name, total in sums.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder; the fine-tune, whose inputs the adapter is to be good for")
    parser.add_argument("text", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1 << 15, help="of the text, at most")
    parser.add_argument("--activations", type=int, default=0, metavar="N", help="keep N raw inputs per layer")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(options.device).eval()
    text = options.text.read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: options.tokens]
    found = record(model, ids, keep=options.activations)
    save_file(found, options.output)
    print(
        f"{options.output}: inputs of {len({name.rpartition('.')[0] for name in found})} layers over {len(ids)} tokens"
    )


if __name__ == "__main__":
    main()
