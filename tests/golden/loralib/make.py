# SPDX-License-Identifier: Apache-2.0
"""Makes what lies beside it with loralib's own layers: state dicts, and the weights that its layers merge.

    python make.py [--check]
    python make.py --load FILE ALPHA  # whether its own layers take FILE, and merge to expected.safetensors

Needs loralib 0.1.2 and torch. ``expected.safetensors`` has what ``eval()`` left in the layers' weights, and the biases.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from pathlib import Path

import loralib as lora
import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

HERE = Path(__file__).parent
RANK, ALPHA = 3, 12


def values(name: str, *sizes: int) -> torch.Tensor:
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    return torch.from_numpy((draw.standard_normal(sizes) / 4).astype(np.float32))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = lora.Embedding(24, 16, r=RANK, lora_alpha=ALPHA)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "fc1": lora.Linear(16, 40, r=RANK, lora_alpha=ALPHA),
                    "fc2": lora.Linear(40, 16, r=RANK, lora_alpha=ALPHA, bias=False),
                }
            )
            for _ in range(2)
        )


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn = lora.MergedLinear(16, 48, r=RANK, lora_alpha=ALPHA, enable_lora=[True, False, True])


def make(root: Path) -> None:
    model = Model()
    state = {name: values(name, *tensor.shape) for name, tensor in model.state_dict().items()}
    trained = {name: values(f"{name} trained", *t.shape) for name, t in state.items() if name.endswith("bias")}
    (root / "base").mkdir()
    plain = {name: tensor.numpy() for name, tensor in state.items() if "lora_" not in name}
    save_file(plain, root / "base" / "model.safetensors", {"format": "pt"})
    model.load_state_dict({**state, **trained})
    torch.save(lora.lora_state_dict(model), root / "none.pt")
    torch.save(lora.lora_state_dict(model, bias="all"), root / "all.pt")
    model.train()
    model.eval()  # merges
    after = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items() if "lora_" not in name}
    save_file(after, root / "expected.safetensors")
    fused = Fused()
    fused.load_state_dict({name: values(name, *tensor.shape) for name, tensor in fused.state_dict().items()})
    torch.save(lora.lora_state_dict(fused), root / "fused.pt")


def load(file: str, alpha: float) -> None:
    """A state dict of the model above, loaded as loralib's page says, must give the weights that its own gives."""
    global ALPHA
    ALPHA = alpha
    model, trained = Model(), torch.load(file, weights_only=True)
    base = {name: torch.from_numpy(values) for name, values in load_file(HERE / "base" / "model.safetensors").items()}
    first = model.load_state_dict(base, strict=False)
    second = model.load_state_dict(trained, strict=False)
    assert not first.unexpected_keys
    assert not second.unexpected_keys
    assert all("lora_" not in name or name in trained for name in model.state_dict())
    model.train()
    model.eval()
    for name, wanted in load_file(HERE / "expected.safetensors").items():
        made, change = model.state_dict()[name].numpy(), abs(wanted - base[name].numpy()).max()
        assert abs(made - wanted).max() <= 2e-6 * max(change, 1e-3), name
    print("OK")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--load", nargs=2)
    options = parser.parse_args()
    if options.load:
        load(options.load[0], float(options.load[1]))
        return
    sys.path.insert(0, str(HERE.parent))
    from regenerate import keep, same_values

    keep(HERE, make, check=options.check, same=same_values)


if __name__ == "__main__":
    main()
