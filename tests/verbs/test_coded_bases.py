# SPDX-License-Identifier: Apache-2.0
"""A merge into codes that real programs made is the merge into the numbers that these programs decode."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.storage.base import read_rows
from tests.storage.golden.golden_cases import Case, read_cases

GOLDEN = Path(__file__).parents[1] / "storage" / "golden"
MODULE, EXPERTS = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts"
LINEAR = [
    ("fp8", "block"),
    ("fp8", "uneven"),
    ("fp8", "modelopt rows"),
    ("nvfp4", "linear"),
    ("mxfp4", "linear"),
    ("mxfp4", "deepseek"),
    ("compressed_tensors", "int4 groups"),
    ("compressed_tensors", "int3 asymmetric groups"),
    ("compressed_tensors", "int8 asymmetric"),
    ("compressed_tensors", "mxfp6"),
    ("compressed_tensors", "fp8 blocks"),
]

Tensors = dict[str, torch.Tensor]


def golden(file: str, case: str) -> Case:
    return read_cases(GOLDEN / f"{file}.safetensors")[case]


def model(folder: Path, tensors: Tensors, model_type: str, **config: object) -> Path:
    folder.mkdir()
    others = {"model.embed_tokens.weight": torch.zeros(8, 4), "model.norm.weight": torch.ones(4)}
    tensors = {name: tensor.contiguous() for name, tensor in {**others, **tensors}.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    said = {"model_type": model_type, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 8}
    (folder / "config.json").write_text(json.dumps({**said, **{key: value for key, value in config.items() if value}}))
    return folder


def adapter(folder: Path, shapes: dict[str, tuple[int, ...]], rank: int, **config: object) -> Path:
    folder.mkdir()
    made = torch.Generator().manual_seed(0)
    factors: Tensors = {}
    for stem, (out, inputs) in shapes.items():
        factors[f"base_model.model.{stem}.lora_A.weight"] = 0.1 * torch.randn(rank, inputs, generator=made)
        factors[f"base_model.model.{stem}.lora_B.weight"] = 0.1 * torch.randn(out, rank, generator=made)
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "task_type": "CAUSAL_LM", **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def check_merges(coded: Path, plain: Path, lora: Path, folder: Path) -> None:
    """Dequantised it is what the plain numbers give, to the byte; in codes again the same tensors, which hold the update."""
    surgery.merge(coded, lora, output=folder / "from codes", dtype="bf16")
    surgery.merge(plain, lora, output=folder / "from numbers", dtype="bf16")
    one, other = (load_file(folder / name / "model.safetensors") for name in ("from codes", "from numbers"))
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)
    assert "quantization_config" not in json.loads((folder / "from codes" / "config.json").read_text())

    surgery.merge(coded, lora, output=folder / "again", quantized="requantize", rounding="nearest", accept_loss=True)
    before, after = (load_file(path / "model.safetensors") for path in (coded, folder / "again"))
    assert {name: (t.dtype, t.shape) for name, t in after.items()} == {
        name: (t.dtype, t.shape) for name, t in before.items()
    }
    wanted, again = load_file(folder / "from codes" / "model.safetensors"), open_checkpoint(folder / "again").main
    for name, parameter in open_checkpoint(coded).main.parameters.items():
        meant = wanted[name].float()
        stored, base = (torch.from_numpy(read_rows(p.storage)) for p in (again.parameters[name], parameter))
        assert (stored - meant).norm() <= (base - meant).norm(), name


@pytest.mark.parametrize(("file", "name"), LINEAR)
def test_a_linear_layer(file: str, name: str, tmp_path: Path) -> None:
    case = golden(file, name)
    stored = {key.replace("layer", MODULE): tensor for key, tensor in case.tensors.items()}
    decoded = {key.replace("layer", MODULE): tensor for key, tensor in case.decoded.items()}
    coded = model(tmp_path / "coded", stored, "llama", quantization_config=case.config)
    plain = model(tmp_path / "plain", decoded, "llama")
    rows, columns = decoded[f"{MODULE}.weight"].shape
    lora = adapter(tmp_path / "lora", {MODULE: (rows, columns)}, 2, target_modules=["q_proj"])
    check_merges(coded, plain, lora, tmp_path)


@pytest.mark.parametrize(("file", "name"), [("mxfp4", "gpt-oss"), ("nvfp4", "experts"), ("fp8", "fbgemm")])
def test_stacks_of_experts(file: str, name: str, tmp_path: Path) -> None:
    """Of gpt-oss, whose stored matrices are transposed, and of Llama 4, whose scales belong to columns."""
    case, kind = golden(file, name), "gpt_oss" if name == "gpt-oss" else "llama4_text"
    stored = {EXPERTS + key[key.index("experts") + 7 :]: t for key, t in case.tensors.items() if "experts" in key}
    decoded = {EXPERTS + key[key.index("experts") + 7 :]: t for key, t in case.decoded.items() if "experts" in key}
    coded = model(tmp_path / "coded", stored, kind, quantization_config=case.config)
    plain = model(tmp_path / "plain", decoded, kind)
    parameters = sorted(decoded, reverse=True)  # the first that PEFT wraps lies inside of the second
    stems = [EXPERTS + ".base_layer" * (len(parameters) - 1 - place) for place in range(len(parameters))]
    shapes = {stem: tuple(decoded[name].shape[:0:-1]) for stem, name in zip(stems, parameters, strict=True)}
    targets = [f"mlp.experts.{parameter.rpartition('.')[2]}" for parameter in parameters]
    rank = 2 * len(decoded[parameters[0]])
    lora = adapter(tmp_path / "lora", shapes, rank, target_parameters=targets, target_modules=[])
    check_merges(coded, plain, lora, tmp_path)
