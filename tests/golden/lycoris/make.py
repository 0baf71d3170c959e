# SPDX-License-Identifier: Apache-2.0
"""Makes the LyCORIS golden files: one tiny network, a file for each algorithm, and what LyCORIS' own forward makes of it.

Run it from this folder, in an environment with torch and lycoris-lora (see ../README.md)::

    python make.py            # rewrites base.safetensors, the folders and expected.json
    python make.py --check    # makes everything again elsewhere and compares it with what is here

Expected weights are measured, not computed: each layer is given the unit vectors (a convolution patches of one pixel),
with LyCORIS' modules in its forward, in float32. So every file says what its own program does.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from safetensors.torch import load_file, save_file
from torch import nn

HERE = Path(__file__).resolve().parent
OUT, IN = 32, 16


class Block(nn.Module):
    """Layers of each sort, under names that flatten in more than one way."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(IN, OUT)
        self.to_out = nn.ModuleList([nn.Linear(OUT, IN, bias=False)])
        self.conv = nn.Conv2d(6, 8, 3)
        self.square = nn.Conv2d(8, 8, 1)
        self.norm = nn.LayerNorm(IN)


class Net(nn.Module):
    """Two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])


LAYERS = ("blocks.0.to_q", "blocks.0.to_out.0", "blocks.0.conv", "blocks.0.square")
MORE = ("blocks.0.norm",)

# algorithm, its options, and the layers it is put on
CASES: dict[str, tuple[type, dict[str, Any], tuple[str, ...]]] = {
    "locon": (LoConModule, {"lora_dim": 3, "alpha": 2}, LAYERS),
    "locon-core": (LoConModule, {"lora_dim": 3, "alpha": 2, "use_tucker": True}, LAYERS),
    "locon-rs": (LoConModule, {"lora_dim": 3, "alpha": 2, "rs_lora": True}, LAYERS),
    "dora-out": (LoConModule, {"lora_dim": 3, "alpha": 2, "weight_decompose": True, "wd_on_out": True}, LAYERS),
    "dora-in": (LoConModule, {"lora_dim": 3, "alpha": 2, "weight_decompose": True, "wd_on_out": False}, LAYERS),
    "loha": (LohaModule, {"lora_dim": 3, "alpha": 3}, LAYERS),
    "loha-alpha": (LohaModule, {"lora_dim": 3, "alpha": 1}, LAYERS),
    "loha-core": (LohaModule, {"lora_dim": 2, "alpha": 2, "use_tucker": True}, LAYERS),
    "doha": (LohaModule, {"lora_dim": 3, "alpha": 3, "weight_decompose": True}, LAYERS),
    "lokr": (LokrModule, {"lora_dim": 1, "alpha": 1, "factor": 4}, LAYERS),
    "lokr-alpha": (LokrModule, {"lora_dim": 2, "alpha": 1, "factor": 2}, LAYERS),
    "lokr-both": (LokrModule, {"lora_dim": 1, "alpha": 1, "factor": 4, "decompose_both": True}, LAYERS),
    "lokr-core": (LokrModule, {"lora_dim": 1, "alpha": 1, "factor": 2, "use_tucker": True}, LAYERS),
    "lokr-whole": (LokrModule, {"lora_dim": 8, "alpha": 1, "factor": 4, "full_matrix": True}, LAYERS),
    "dokr": (LokrModule, {"lora_dim": 8, "alpha": 1, "factor": 4, "weight_decompose": True}, LAYERS),
    "ia3-out": (IA3Module, {}, LAYERS),
    "ia3-in": (IA3Module, {"train_on_input": True}, LAYERS),
    "glora": (GLoRAModule, {"lora_dim": 3, "alpha": 2}, LAYERS),
    "oft": (DiagOFTModule, {"lora_dim": 4}, LAYERS),
    "oft-rescaled": (DiagOFTModule, {"lora_dim": 4, "rescaled": True}, LAYERS),
    "oft-limit": (DiagOFTModule, {"lora_dim": 4, "constraint": 0.06}, LAYERS),
    "boft": (ButterflyOFTModule, {"lora_dim": 4, "rescaled": True}, LAYERS),
    "boft-limit": (ButterflyOFTModule, {"lora_dim": 4, "constraint": 0.05}, LAYERS),
    "full": (FullModule, {}, LAYERS),
    "norm": (NormModule, {}, MORE),
}
PREFIX = {
    "locon-rs": "lycoris",
    "lokr-both": "lycoris",
    "glora": "lycoris",
}  # the wrapper's own; the others' are sd-scripts'


def network() -> Net:
    """The base, with seeded weights."""
    torch.manual_seed(7)
    net = Net()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            around = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_(around + 0.3 * torch.randn_like(parameter))
    return net.eval().requires_grad_(False)


def responses(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a layer, as what it answers to unit inputs shows."""
    if isinstance(layer, nn.LayerNorm):
        probe = torch.eye(IN)
        normed, answers = nn.functional.layer_norm(probe, (IN,), eps=layer.eps), layer(probe)
        rows = [(i, (i + 1) % IN) for i in range(IN)]  # of each element two equations
        steps = [(answers[a, i] - answers[b, i]) / (normed[a, i] - normed[b, i]) for i, (a, b) in enumerate(rows)]
        weight = torch.stack(steps)
        return weight, answers[0] - weight * normed[0]
    shape = (layer.in_features,) if isinstance(layer, nn.Linear) else (layer.in_channels, *layer.kernel_size)
    size = math.prod(shape)
    zero = layer(torch.zeros(1, *shape)).reshape(-1)
    answers = layer(torch.eye(size).reshape(size, *shape)).reshape(size, len(zero))
    return (answers - zero).T.reshape(len(zero), *shape), zero


def made(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A file's tensors, and the parameters that its program makes of the base."""
    algorithm, options, layers = CASES[name]
    net = network()
    torch.manual_seed(sum(map(ord, name)))
    tensors: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    for path in layers:
        layer = net.get_submodule(path)
        before = responses(layer)
        stem = f"{PREFIX.get(name, 'lora_unet')}_{path.replace('.', '_')}"
        module = algorithm(stem, layer, 1.0, **options)
        module.apply_to()
        with torch.no_grad():
            for parameter in module.parameters():
                magnitude = parameter is getattr(module, "dora_scale", None)
                noise = torch.randn_like(parameter)
                parameter.copy_(parameter * (1 + 0.2 * noise) if magnitude else parameter + 0.5 * noise)
        module.eval()
        weight, bias = responses(layer)
        expected[f"{path}.weight"] = weight
        if not torch.allclose(bias, before[1], atol=1e-6):
            expected[f"{path}.bias"] = bias
        tensors |= {f"{stem}.{leaf}": value for leaf, value in module.state_dict().items()}
    return tensors, expected


def write(folder: Path) -> None:
    """Make everything in `folder`."""
    save(network().state_dict(), folder / "base.safetensors")
    for name in CASES:
        tensors, expected = made(name)
        (folder / name).mkdir(exist_ok=True)
        save(tensors, folder / name / "adapter.safetensors")
        save(expected, folder / name / "expected.safetensors")
    report = {"versions": {p: version(p) for p in ("torch", "lycoris-lora", "safetensors")}, "files": sorted(CASES)}
    (folder / "expected.json").write_text(json.dumps(report, indent=1) + "\n")


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, path)


def differences(folder: Path) -> Iterator[str]:
    """Files in `folder` that are not those here."""
    for path in sorted(folder.rglob("*.safetensors")):
        mine, theirs = load_file(HERE / path.relative_to(folder)), load_file(path)
        same = mine.keys() == theirs.keys() and all(torch.allclose(mine[k], theirs[k], atol=1e-6) for k in mine)
        if not same:
            yield str(path.relative_to(folder))


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as fresh:
            write(Path(fresh))
            sys.exit("\n".join(differences(Path(fresh))) or 0)
    write(HERE)
