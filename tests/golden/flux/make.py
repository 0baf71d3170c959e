# SPDX-License-Identifier: Apache-2.0
"""Makes LoRA files of Flux in the layouts of others: BFL's control LoRA, XLabs, fal's Kontext trainer; and what diffusers reads.

Run it from this folder, in an environment with torch, diffusers and peft (see ../README.md)::

    python make.py            # rewrites the folders and expected.json
    python make.py --check    # makes everything again elsewhere and compares it with what is here

One tiny network of BFL's release is converted by diffusers 0.42, which then loads each file into it; expected weights are measured:
every layer with an adapter is given the unit vectors, in float32. diffusers' converters have the widths and depths of Flux.1 as
constants, which are replaced by the tiny network's; nothing else of them is.

Expected weights are under diffusers' names, and under BFL's: those are joined here, and diffusers' own conversion of them has to give
the former. `norm_out` of the control LoRA is by the equation, since diffusers 0.42.1 exchanges the halves of both factors there, and
those of the first are no scale and shift but directions.
"""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import lora_conversion_utils, lora_pipeline, single_file_utils
from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
Tensors = dict[str, torch.Tensor]

WIDTH, CHANNELS, TEXT, POOLED = 16, 4, 8, 8
FLUX = {
    "in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": TEXT, "pooled_projection_dim": POOLED, "axes_dims_rope": (2, 2, 4),
    "guidance_embeds": True,
}  # fmt: skip
CONSTANTS = {
    "inner_dim = 3072": f"inner_dim = {WIDTH}",
    "num_layers = 19": "num_layers = 1",
    "num_single_layers = 38": "num_single_layers = 1",
}


def tiny(function: Callable[..., Any], module: Any) -> Callable[..., Any]:
    """A converter with the sizes of the tiny network."""
    source = inspect.getsource(function)
    for old, new in CONSTANTS.items():
        source = source.replace(old, new)
    names = dict(vars(module))
    exec(source, names)
    return names[function.__name__]


for name in ("_convert_bfl_flux_control_lora_to_diffusers", "_convert_fal_kontext_lora_to_diffusers"):
    setattr(lora_pipeline, name, tiny(getattr(lora_conversion_utils, name), lora_conversion_utils))
as_diffusers = tiny(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers, single_file_utils)


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """The parameters of BFL's release, one block of each kind."""
    h = WIDTH
    layers = {
        "img_in": (h, CHANNELS), "txt_in": (h, TEXT), "time_in.in_layer": (h, 256), "time_in.out_layer": (h, h),
        "vector_in.in_layer": (h, POOLED), "vector_in.out_layer": (h, h), "guidance_in.in_layer": (h, 256),
        "guidance_in.out_layer": (h, h), "final_layer.linear": (CHANNELS, h), "final_layer.adaLN_modulation.1": (2 * h, h),
        "single_blocks.0.linear1": (7 * h, h), "single_blocks.0.linear2": (h, 5 * h), "single_blocks.0.modulation.lin": (3 * h, h),
    }  # fmt: skip
    for side in ("img", "txt"):
        block = f"double_blocks.0.{side}"
        layers |= {f"{block}_attn.qkv": (3 * h, h), f"{block}_attn.proj": (h, h), f"{block}_mlp.0": (4 * h, h)}
        layers |= {f"{block}_mlp.2": (h, 4 * h), f"{block}_mod.lin": (6 * h, h)}
    for layer, shape in layers.items():
        yield f"{layer}.weight", shape
        yield f"{layer}.bias", shape[:1]
    for norm in ("double_blocks.0.img_attn.norm", "double_blocks.0.txt_attn.norm", "single_blocks.0.norm"):
        yield f"{norm}.query_norm.scale", (8,)
        yield f"{norm}.key_norm.scale", (8,)


def base() -> Tensors:
    torch.manual_seed(3)
    return {name: 0.3 * torch.randn(shape) for name, shape in shapes()}


class Pipeline(FluxLoraLoaderMixin):
    """As much of a pipeline as the loader of LoRAs asks for."""

    def __init__(self) -> None:
        self.transformer = FluxTransformer2DModel(**FLUX).eval().requires_grad_(False)
        self.transformer.load_state_dict(as_diffusers(base()))
        self.text_encoder = None
        self.components = {"transformer": self.transformer}
        self.hf_device_map = self.hf_quantizer = None


def measured(model: torch.nn.Module, before: Tensors) -> Tensors:
    """What became of the weights: of layers with an adapter by what they answer to unit inputs."""
    found: Tensors = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            zero = layer(torch.zeros(1, layer.base_layer.in_features)).reshape(-1)
            found[f"{path}.weight"] = (layer(torch.eye(layer.base_layer.in_features)) - zero).T
            if not torch.allclose(zero, before[f"{path}.bias"], atol=1e-6):
                found[f"{path}.bias"] = zero
    state = model.state_dict()
    found |= {n: state[n] for n in before if ".norm_" in n and n in state and not torch.equal(state[n], before[n])}
    return {name: value.detach().contiguous() for name, value in found.items()}


def layers(*parts: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Modules of the base whose names have one of the parts, with the shapes of their weights."""
    for name, shape in shapes():
        if name.endswith(".weight") and any(part in name for part in parts):
            yield name.removesuffix(".weight"), shape


def pair(stem: str, out: int, inputs: int, leaves: tuple[str, str], rank: int = 4) -> Tensors:
    return {f"{stem}.{leaves[0]}": 0.5 * torch.randn(rank, inputs), f"{stem}.{leaves[1]}": 0.5 * torch.randn(out, rank)}


AB = ("lora_A.weight", "lora_B.weight")


def control() -> Tensors:
    """Every layer with a bias, all norms whole, twice the channels."""
    tensors: Tensors = {}
    for module, (out, inputs) in layers(""):
        tensors |= pair(module, out, inputs * (2 if module == "img_in" else 1), AB)
        tensors[f"{module}.lora_B.bias"] = 0.3 * torch.randn(out)
    return tensors | {name: 1 + 0.1 * torch.randn(shape) for name, shape in shapes() if name.endswith(".scale")}


def xlabs() -> Tensors:
    """Processors of the attentions: both streams of a double block, q, k and v and the output of a single one."""
    tensors: Tensors = {}
    sides = ("down.weight", "up.weight")
    for part, out in (("qkv", 3 * WIDTH), ("proj", WIDTH)):
        for stream in "12":
            tensors |= pair(f"double_blocks.0.processor.{part}_lora{stream}", out, WIDTH, sides)
    tensors |= pair("single_blocks.0.processor.qkv_lora", 3 * WIDTH, WIDTH, sides)
    return tensors | pair("single_blocks.0.processor.proj_lora", WIDTH, 5 * WIDTH, sides)


def fal() -> Tensors:
    """BFL's names behind PEFT's prefix, without a configuration."""
    tensors: Tensors = {}
    for module, (out, inputs) in layers("_blocks.", "final_layer.linear"):
        tensors |= pair(f"base_model.model.{module}", out, inputs, AB)
    return tensors


CASES = {"control": control, "xlabs": xlabs, "fal": fal}


def joined(found: Tensors, before: Tensors) -> Tensors:
    """Measured weights under BFL's names: the conversion that diffusers has, backwards, by trying it on row numbers."""
    numbers = {name: torch.arange(value.shape[0]).float() for name, value in base().items()}
    rows = {name: value.clone() for name, value in base().items()}
    after = before | found
    result: Tensors = {}
    for name, value in rows.items():
        probe = {other: torch.full_like(v, -1) for other, v in rows.items()}
        probe[name] = numbers[name].reshape(-1, *[1] * (value.dim() - 1)).expand_as(value).clone()
        parts = {key: part for key, part in as_diffusers(probe).items() if (part >= 0).any()}
        if not parts.keys() & found.keys():
            continue
        width = max(after[key].shape[1:] for key in parts)
        whole = torch.empty(value.shape[0], *width)
        for key, part in parts.items():
            whole[part.reshape(part.shape[0], -1)[:, 0].long()] = after[key]
        result[name] = whole
    return result


def write(folder: Path) -> None:
    """Make everything in `folder`."""
    bfl, before = base(), as_diffusers(base())
    save(bfl, folder / "base-bfl.safetensors")
    save(before, folder / "base-diffusers.safetensors")
    wrong = {}
    for number, (name, case) in enumerate(CASES.items()):
        place = folder / name
        place.mkdir(exist_ok=True)
        torch.manual_seed(20 + number)
        tensors = case()
        save(tensors, place / "adapter.safetensors")
        pipeline = Pipeline()
        pipeline.load_lora_weights({key: value.clone() for key, value in tensors.items()})
        found = measured(pipeline.transformer, before)
        if name == "control":
            key, stem = "norm_out.linear.weight", "final_layer.adaLN_modulation.1"
            delta = tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
            right = before[key] + torch.cat(delta.chunk(2)[::-1])
            wrong[f"{name}: {key}"] = round(((found[key] - right).norm() / delta.norm()).item(), 3)
            found[key] = right
        save(found, place / "expected-diffusers.safetensors")
        save(joined(found, before), place / "expected-bfl.safetensors")
    report = {
        "versions": {p: version(p) for p in ("torch", "diffusers", "peft", "safetensors")},
        "files": sorted(CASES),
        "diffusers is off by (share of the change)": wrong,
    }
    (folder / "expected.json").write_text(json.dumps(report, indent=1) + "\n")


def save(tensors: Tensors, path: Path) -> None:
    save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, path, {"format": "pt"})


def differences(folder: Path) -> Iterator[str]:
    """Files in `folder` that are not those here."""
    for path in sorted(folder.rglob("*.safetensors")):
        mine, theirs = load_file(HERE / path.relative_to(folder)), load_file(path)
        if mine.keys() != theirs.keys() or not all(torch.allclose(mine[k], theirs[k], atol=1e-6) for k in mine):
            yield str(path.relative_to(folder))


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as fresh:
            write(Path(fresh))
            sys.exit("\n".join(differences(Path(fresh))) or 0)
    write(HERE)
