# SPDX-License-Identifier: Apache-2.0
"""Ways that lose nothing: random adapters go to another format and come back bit for bit."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from surgery import convert
from surgery_formats.adapters.registry import format_named, read_adapter
from surgery_formats.updates import low_rank_part
from tests.support.adapter_files import GOLDEN, write_base

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LLAMA = GOLDEN / "litgpt/base"
SHAPES = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (48, 32),
    "mlp.up_proj": (48, 32),
    "mlp.down_proj": (32, 48),
}
WAN = {f"self_attn.{name}": (12, 12) for name in "qkvo"} | {"ffn.0": (20, 12), "ffn.2": (12, 20)}
FILES = ("kohya", "diffusers", "comfyui", "bare")
SUFFIXES = {"gguf": ".gguf", "loralib": ".pt", "onnx-adapter": ".onnx_adapter"}
EXAMPLES = pytest.mark.parametrize("examples", [3, pytest.param(200, marks=pytest.mark.slow)])


@contextmanager
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp())
    try:
        yield path
    finally:
        shutil.rmtree(path)


@dataclass(frozen=True)
class Drawn:
    """What an adapter is made of: modules with their ranks, one alpha, types, a seed for the numbers."""

    modules: tuple[tuple[str, tuple[int, int], int], ...]
    alpha: float
    dtype: torch.dtype
    kind: str
    seed: int

    def numbers(self, *shape: int) -> torch.Tensor:
        """As many as were asked for before give others."""
        generator = torch.Generator().manual_seed(self.seed + sum(shape))
        return torch.randn(shape, generator=generator).to(self.dtype)


@st.composite
def adapters(
    draw: st.DrawFn,
    shapes: dict[str, tuple[int, int]],
    layers: str,
    kinds: tuple[str, ...] = ("lora",),
    *,
    one_rank: bool,
    all_modules: bool,
    scale_of_one: bool = False,
) -> Drawn:
    names = [f"{layers}.{number}.{name}" for number in range(2) for name in shapes]
    chosen = names if all_modules else draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    rank = draw(st.integers(1, 4))
    ranks = {name: rank if one_rank else draw(st.integers(1, 4)) for name in chosen}
    alpha = float(rank) if scale_of_one else draw(st.sampled_from([1.0, 0.5, 3.0, 16.0, 7.25, 0.125]))
    modules = tuple((name, shapes[name.removeprefix(f"{layers}.")[2:]], ranks[name]) for name in sorted(chosen))
    kind, dtype = draw(st.sampled_from(kinds)), draw(st.sampled_from(DTYPES))
    return Drawn(modules, alpha, dtype, kind, draw(st.integers(0, 10_000)))


def peft_folder(drawn: Drawn, path: Path) -> Path:
    """By PEFT's names, with patterns where ranks differ."""
    tensors, ranks = {}, {}
    for name, (out, inputs), rank in drawn.modules:
        stem = f"base_model.model.{name}"
        tensors[f"{stem}.lora_A.weight"] = drawn.numbers(rank, inputs)
        tensors[f"{stem}.lora_B.weight"] = drawn.numbers(out, rank)
        if drawn.kind == "dora":
            tensors[f"{stem}.lora_magnitude_vector"] = drawn.numbers(out).abs() + 1
        ranks[name] = rank
    first = drawn.modules[0][2]
    config = {
        "peft_type": "LORA",
        "r": first,
        "lora_alpha": drawn.alpha,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != first},
        "target_modules": sorted(ranks),
        "use_dora": drawn.kind == "dora",
    }
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def same_bits(before: Path, after: Path) -> None:
    """The same names, types and bits."""
    mine, theirs = load_file(before), load_file(after)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        if name.endswith("alpha"):
            assert value.item() == pytest.approx(theirs[name].item(), rel=1e-6)
            continue
        assert value.dtype == theirs[name].dtype, name
        assert value.shape == theirs[name].shape, name
        assert torch.equal(value.view(torch.uint8), theirs[name].view(torch.uint8)), name


def scales(path: Path) -> list[float]:
    adapter = read_adapter(path)
    loras = [low_rank_part(update) for chain in adapter.updates.values() for update in chain]
    return [lora.scale for lora in loras if lora]


LORAS: dict[str, dict[str, object]] = {
    "mlx": {"one_rank": True, "all_modules": False},
    "gguf": {"one_rank": True, "all_modules": False},
    "torchtune": {"one_rank": True, "all_modules": False},
    "litgpt": {"one_rank": True, "all_modules": True},
    "loralib": {"one_rank": False, "all_modules": False},
    "onnx-adapter": {"one_rank": True, "all_modules": False, "scale_of_one": True},
    "tensorrt-llm": {"one_rank": True, "all_modules": True, "scale_of_one": True},
    "adapterhub": {"one_rank": True, "all_modules": False},
    "bare": {"one_rank": False, "all_modules": False},
    "comfyui": {"one_rank": False, "all_modules": False},
}


@EXAMPLES
@pytest.mark.parametrize("target", LORAS)
def test_peft_goes_there_and_back(target: str, examples: int) -> None:
    shapes = (
        SHAPES
        if target != "adapterhub"
        else {k: v for k, v in SHAPES.items() if k not in ("mlp.gate_proj", "self_attn.o_proj")}
    )
    kinds = ("lora", "dora") if target in ("mlx", "torchtune") else ("lora",)

    @settings(max_examples=examples, deadline=None)
    @given(adapters(shapes, "model.layers", kinds, **LORAS[target]))  # type: ignore[arg-type]
    def holds(drawn: Drawn) -> None:
        with folder() as place:
            source = peft_folder(drawn, place / "source")
            there = convert(source, target, output=place / f"there{SUFFIXES.get(target, suffix(target))}", base=LLAMA)
            assert {entry.outcome for entry in there.entries} == {"exact"}
            told = [float(w.rpartition(" ")[2]) for w in there.warnings if "read with alpha" in w]
            middle = read_adapter(there.output, told[0] if told else None)
            convert(middle, "peft", output=place / "back", base=LLAMA)
            same_bits(source / "adapter_model.safetensors", place / "back/adapter_model.safetensors")
            assert scales(place / "back") == pytest.approx(scales(source), rel=1e-7)

    holds()


def suffix(target: str) -> str:
    return ".safetensors" if format_named(target).single_file else ""


def wan_file(drawn: Drawn, target: str, path: Path) -> Path:
    """One file in the spelling that a format writes."""
    prefix = {"kohya": "lora_unet_", "diffusers": "transformer.", "comfyui": "diffusion_model.", "bare": ""}[target]
    down, up = (
        ("lora_down.weight", "lora_up.weight") if target in ("kohya", "bare") else ("lora_A.weight", "lora_B.weight")
    )
    called = {"self_attn": "attn1", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
    parts = {"attn1.q": "attn1.to_q", "attn1.k": "attn1.to_k", "attn1.v": "attn1.to_v", "attn1.o": "attn1.to_out.0"}
    tensors: dict[str, torch.Tensor] = {}
    for module, (out, inputs), rank in drawn.modules:
        name = module
        if target == "diffusers":
            for old, new in (*called.items(), *parts.items()):
                name = name.replace(old, new)
        stem = f"{prefix}{name.replace('.', '_') if target == 'kohya' else name}."
        alpha = torch.tensor(drawn.alpha)
        if drawn.kind in ("lora", "dora"):
            tensors |= {f"{stem}{down}": drawn.numbers(rank, inputs), f"{stem}{up}": drawn.numbers(out, rank)}
            if drawn.kind == "dora":
                leaf, shape = ("lora_magnitude_vector", (out,)) if target == "diffusers" else ("dora_scale", (out, 1))
                tensors[f"{stem}{leaf}"] = drawn.numbers(*shape).abs() + 1
        elif drawn.kind == "loha":
            sizes = {"w1_a": (out, rank), "w1_b": (rank, inputs), "w2_a": (out, rank), "w2_b": (rank, inputs)}
            tensors |= {f"{stem}hada_{key}": drawn.numbers(*size) for key, size in sizes.items()}
        else:
            sizes = {"w1": (4, 4), "w2_a": (out // 4, rank), "w2_b": (rank, inputs // 4)}
            tensors |= {f"{stem}lokr_{key}": drawn.numbers(*size) for key, size in sizes.items()}
        if target != "diffusers":
            tensors[f"{stem}alpha"] = alpha
    notes = {"ss_tag": "x", "modelspec.title": "t"}
    save_file(tensors, path, notes)
    return path


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shapes = {f"blocks.{number}.{name}.weight": shape for number in range(2) for name, shape in WAN.items()}
    return write_base(tmp_path_factory.mktemp("wan") / "base", shapes, {})


@EXAMPLES
@pytest.mark.parametrize(("source", "target"), [(a, b) for a in FILES for b in FILES if a != b])
def test_one_file_goes_there_and_back(source: str, target: str, examples: int, wan: Path) -> None:
    """A file of diffusers states its alphas in the header; without it they are the ranks."""
    kinds = ("lora", "dora") if "diffusers" in (source, target) else ("lora", "dora", "loha", "lokr")
    kinds = ("lora", "dora") if target == "kohya" else kinds  # from other formats it writes LoRA and DoRA

    @settings(max_examples=examples, deadline=None)
    @given(adapters(WAN, "blocks", kinds, one_rank=True, all_modules=False, scale_of_one=source == "diffusers"))
    def holds(drawn: Drawn) -> None:
        with folder() as place:
            file = wan_file(drawn, source, place / "source.safetensors")
            there = convert(file, target, output=place / "there.safetensors", base=wan)
            assert {entry.outcome for entry in there.entries} == {"exact"}
            convert(place / "there.safetensors", source, output=place / "back.safetensors", base=wan)
            same_bits(file, place / "back.safetensors")
            assert scales(place / "back.safetensors") == pytest.approx(scales(file), rel=1e-6)

    holds()
