# SPDX-License-Identifier: Apache-2.0
"""The memory that a fresh adapter's report states, against what a step of AdamW holds (docs/insert.md).

    python benchmarks/insert.py [--layers 8]

A Llama of 36 M parameters with random weights, on the CPU: PEFT attaches what `surgery.insert` began and takes one step. Bytes are
the storages of every tensor in the process that is alive after the step, each counted once. What autograd saved for the backward
pass of 64 tokens, and is not a weight, stands beside them.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from pathlib import Path

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import surgery

KINDS = ("lora", "dora", "ia3", "loha", "lokr", "oft", "vera")
RANK, TOKENS = 16, 64


def model(folder: Path, dtype: torch.dtype) -> LlamaForCausalLM:
    made: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    return made


def alive() -> dict[int, int]:
    """Bytes of every storage that a tensor of the process has."""
    gc.collect()
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.device.type == "cpu":
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return found


def step(trained: torch.nn.Module, before: int) -> tuple[int, int]:
    """``(bytes held after one step, bytes saved for the backward pass)``; `before` were alive without the model."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*trained.parameters(), *trained.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    optimiser = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.arange(TOKENS)[None] % 1000
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trained(input_ids=ids, labels=ids).loss.backward()
    optimiser.step()
    return sum(alive().values()) - before, sum(saved.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    layers = parser.parse_args().layers
    config = LlamaConfig(
        vocab_size=8000, hidden_size=512, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    print("| base | trained | numbers | stated, MB | held after a step, MB | off by | activations of 64 tokens, MB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for dtype in (torch.float32, torch.bfloat16):
        with tempfile.TemporaryDirectory() as folder:
            base = Path(folder) / "base"
            torch.manual_seed(0)
            LlamaForCausalLM(config).to(dtype).save_pretrained(base)
            label = str(dtype).removeprefix("torch.")
            before = sum(alive().values())
            for kind in KINDS:
                result = surgery.insert(base, new=kind, rank=RANK, targets="all", output=Path(folder) / kind)
                assert isinstance(result, surgery.FreshResult)
                attached = peft.PeftModel.from_pretrained(model(base, dtype), Path(folder) / kind, is_trainable=True)
                assert attached.get_nb_trainable_parameters()[0] == result.trained
                row(label, kind, result.trained, result.memory.nbytes, *step(attached, before))
                del attached
            row(label, "all weights", result.parameters, result.full.nbytes, *step(model(base, dtype), before))


def row(base: str, trained: str, numbers: int, stated: int, held: int, saved: int) -> None:
    off = stated / held - 1
    assert abs(off) < 0.15, (base, trained, stated, held)
    print(
        f"| {base} | {trained} | {numbers:,} | {stated / 1e6:.1f} | {held / 1e6:.1f} | {off:+.1%} | {saved / 1e6:.1f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
