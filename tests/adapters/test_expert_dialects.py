# SPDX-License-Identifier: Apache-2.0
"""Every dialect of expert LoRA read and written, from and to every other, for seven types of mixtures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import surgery
from surgery_formats import read_adapter
from surgery_formats.adapters.peft import PEFT
from surgery_formats.adapters.peft.dialects import BUILT_IN
from surgery_formats.adapters.peft.recognise import dialect_of
from surgery_formats.errors import FitError, NotFoundError
from tests.oracles import disk
from tests.support import expert_models

DIALECTS = (*(dialect.name for dialect in BUILT_IN), "mlx")
STACKED_IN_VLLM = ("gpt_oss", "qwen3_5_moe", "qwen3_vl_moe")


def held(name: str, model: str) -> bool:
    """Whether a dialect has experts of such a model at all."""
    return name != "unsloth-linears" or model == "gpt_oss"


def convert(adapter: Path, dialect: str, base: Path, output: Path) -> surgery.ConvertResult:
    if dialect == "mlx":
        return surgery.convert(adapter, to="mlx", output=output, base=base)
    return surgery.convert(adapter, to="peft", dialect=dialect, output=output, base=base)


@dataclass
class Mixture:
    """A base, an adapter by PEFT, what the two merge to, and the adapter in every dialect."""

    name: str
    base: Path
    adapter: Path
    merged: dict[str, Tensor]
    dialects: dict[str, Path]

    def error(self, adapter: Path, output: Path) -> float:
        """How far the merge of `adapter` is from what was trained."""
        surgery.merge(self.base, adapter, output=output)
        found = disk.read_tensors(output)
        assert found.keys() == self.merged.keys()
        return max((found[key] - value).abs().max().item() for key, value in self.merged.items())


@pytest.fixture(scope="module", params=expert_models.MODELS)
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    folder = tmp_path_factory.mktemp(request.param)
    base = expert_models.build(request.param, folder / "base")
    adapter = expert_models.train(request.param, base, folder / "adapter")
    surgery.merge(base, adapter, output=folder / "merged")
    names = [name for name in DIALECTS if held(name, request.param)]
    for name in names:
        convert(adapter, name, base, folder / name)
    return Mixture(
        request.param,
        base,
        adapter,
        disk.read_tensors(folder / "merged"),
        {name: folder / name for name in names},
    )


def test_every_dialect_merges_to_what_peft_trained(mixture: Mixture, tmp_path: Path) -> None:
    before = disk.read_tensors(mixture.base)
    changed = [name for name, value in mixture.merged.items() if not torch.equal(value, before[name])]
    assert any("expert" in name for name in changed)
    for name, folder in mixture.dialects.items():
        assert mixture.error(folder, tmp_path / name) < 1e-6, name


def test_what_was_written_is_recognised(mixture: Mixture) -> None:
    for name, folder in mixture.dialects.items():
        found = dialect_of(read_adapter(folder))
        wanted = {"vllm": "peft" if mixture.name in STACKED_IN_VLLM else "per-expert", "mlx": None}.get(name, name)
        assert (found.name if found else None) == wanted


def test_mlx_has_the_paths_of_its_own_classes(mixture: Mixture) -> None:
    """Compared with the classes of mlx-lm 0.32.2, which load these files and give the same logits."""
    stems = {"mixtral": "model.layers.{}.block_sparse_moe.switch_mlp", "gpt_oss": "model.layers.{}.mlp.experts"}
    composite = "language_model.model.layers.{}.mlp.switch_mlp"
    stem = stems.get(mixture.name, composite if "qwen3_" in mixture.name[:8] else "")
    stem = "model.layers.{}.mlp.switch_mlp" if mixture.name == "qwen3_moe" or not stem else stem
    (file,) = mixture.dialects["mlx"].glob("*.safetensors")
    names = {name for name in disk.read_tensors(mixture.dialects["mlx"]) if ".self_attn." not in name}
    assert file.name == "adapters.safetensors"
    layers = (1,) if mixture.name == "deepseek_v3" else (0, 1)
    parts = ("gate_proj", "up_proj", "down_proj")
    assert names == {f"{stem.format(n)}.{part}.lora_{side}" for n in layers for part in parts for side in "ab"}


@pytest.mark.parametrize("source", DIALECTS)
def test_every_dialect_becomes_every_other(mixture: Mixture, source: str, tmp_path: Path) -> None:
    if source not in mixture.dialects:
        with pytest.raises(FitError, match="only gpt-oss"):
            convert(mixture.adapter, source, mixture.base, tmp_path / "out")
        return
    for target in mixture.dialects:
        result = convert(mixture.dialects[source], target, mixture.base, tmp_path / target)
        assert max(result.errors.values()) < 1e-6, target
        assert {entry.outcome for entry in result.entries} <= {"exact", "folded"}
    last = list(mixture.dialects)[len(source) % len(mixture.dialects)]
    assert mixture.error(tmp_path / last, tmp_path / "merged") < 1e-6


def test_an_unknown_dialect_is_named() -> None:
    with pytest.raises(NotFoundError, match="'sglnag'") as caught:
        PEFT.with_dialect("sglnag")
    assert "sglang" in str(caught.value.hint)


def test_only_a_base_tells_how_experts_are_held(mixture: Mixture) -> None:
    with pytest.raises(FitError, match="only the base") as caught:
        surgery.convert(mixture.adapter, to="peft", dialect="tinker", dry_run=True)
    assert caught.value.hint == "give it with `base=`"
