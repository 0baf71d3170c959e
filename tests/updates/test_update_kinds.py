# SPDX-License-Identifier: Apache-2.0
"""What the parity cases cannot show of PEFT's kinds beside LoRA: blocks, transposed storage, experts, reports, conversions, diffs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import surgery
from surgery.verbs.convert import convert
from surgery.verbs.inspect import AdapterReport, inspect
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.arrays import Array
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.refs import resolve
from surgery_formats.tensors.views import Index
from surgery_formats.updates import Fit, is_linear, is_unsized
from surgery_formats.updates.weights import HeldWeight
from tests.oracles import disk, measure, models, peft_oracle
from tests.support.updates import EVERY_KIND

KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ia3": ("gpt2", "IA3", {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}),
    "loha": ("llama", "LoHa", {"target_modules": ["q_proj", "up_proj"], "r": 3}),
    "lokr": ("llama", "LoKr", {"target_modules": ["q_proj", "up_proj"], "r": 3}),
    "lokr-conv": ("torch_module", "LoKr", {"target_modules": ["conv1", "conv2"], "r": 12}),
    "oft": ("llama", "OFT", {"target_modules": ["q_proj", "down_proj"], "oft_block_size": 8}),
    "vera": ("gpt2", "Vera", {"target_modules": ["c_attn", "c_proj"], "r": 5}),
    "ln": ("llama", "LNTuning", {"target_modules": ["input_layernorm"]}),
    "adalora": ("gpt2", "AdaLora", {"target_modules": ["c_attn"], "init_r": 3, "total_step": 10}),
    "miss": ("llama", "Miss", {"target_modules": ["q_proj", "down_proj"], "r": 5}),
    "bat": ("llama", "Miss", {"target_modules": ["q_proj", "down_proj"], "r": 8, "init_weights": "bat"}),
    "hira": ("gpt2", "Hira", {"target_modules": ["c_attn"], "r": 3}),
    "hra": ("llama", "HRA", {"target_modules": ["q_proj", "down_proj"], "r": 4}),
    "boft": ("llama", "BOFT", {"target_modules": ["q_proj", "down_proj"], "boft_block_size": 4}),
    "c3a": ("llama", "C3A", {"target_modules": ["q_proj", "up_proj"], "block_size": 8}),
    "shira": ("llama", "Shira", {"target_modules": ["q_proj", "up_proj"], "r": 2}),
    "road": ("bert", "Road", {"target_modules": ["query", "dense"], "group_size": 8, "variant": "road_4"}),
    "delora": ("llama", "Delora", {"target_modules": ["q_proj", "up_proj"], "r": 3}),
    "gralora": ("gpt2", "Gralora", {"target_modules": ["c_attn"], "r": 4, "gralora_k": 2, "hybrid_r": 3}),
    "fourierft": ("gpt2", "FourierFT", {"target_modules": ["c_attn", "c_fc"], "n_frequency": 60}),
    "randlora": ("gpt2", "RandLora", {"target_modules": ["c_attn", "c_proj"], "r": 5}),
    "pvera": ("gpt2", "Pvera", {"target_modules": ["c_attn", "c_proj"], "r": 4}),
    "vblora": ("llama", "VBLoRA", {"target_modules": ["q_proj"], "r": 2, "num_vectors": 9, "vector_length": 8}),
    "beft": ("bert", "Beft", {"target_modules": ["query"]}),
}
ADDS = (
    "loha",
    "lokr",
    "vera",
    "adalora",
    "miss",
    "c3a",
    "shira",
    "delora",
    "gralora",
    "fourierft",
    "randlora",
    "pvera",
    "vblora",
    "beft",
)
"""Kinds that satisfy `Linear`."""
WHOLE = ("oft", "ln", "bat", "hra", "boft", "road", "beft")
"""Kinds that need whole groups of columns, the weight itself, or a vector."""


def made(name: str, folder: Path, seed: int = 2) -> tuple[Path, Path]:
    arch, kind, fields = KINDS[name]
    base = models.build_base(arch, folder / "base")
    peft_oracle.train(arch, base, f"{kind}Config", fields, folder / f"adapter{seed}", seed=seed)
    return base, folder / f"adapter{seed}"


def looked_at(path: Path) -> AdapterReport:
    found = inspect(resolve(str(path)))
    assert isinstance(found, AdapterReport)
    return found


@pytest.mark.parametrize("elements", [1, 37, 300])
@pytest.mark.parametrize("name", KINDS)
def test_blocks_of_any_height_give_the_same(
    name: str, elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = made(name, tmp_path)
    surgery.merge(base, adapter, output=tmp_path / "whole")
    monkeypatch.setattr("surgery.engine.blocks.BLOCK_ELEMENTS", elements)
    surgery.merge(base, adapter, output=tmp_path / "blocks")
    whole, blocks = disk.read_tensors(tmp_path / "whole"), disk.read_tensors(tmp_path / "blocks")
    for key, value in whole.items():
        assert measure.relative_error(blocks[key], value) < 5e-7, key


SIZES = {"SHiRA": (56, 32), "RandLoRA": (96, 32)}
"""Of weights whose sizes a file does not tell, and limits."""


@dataclass(frozen=True)
class Weight:
    """What `prepare` may ask for; these kinds do not look at the weight."""

    shape: tuple[int, int]
    dtype: DType = DType.F64
    device: str = "cpu"

    def blocks(self) -> Iterator[tuple[Array, Index, Index]]:
        raise AssertionError("only kinds that need the weight look at it")


@pytest.mark.parametrize("name", [name for name in KINDS if name not in WHOLE])
def test_any_rows_and_columns_are_those_of_the_whole(name: str, tmp_path: Path) -> None:
    """Permuted and transposed storage hands an equation any positions, in any order."""
    draw = np.random.default_rng(8)
    adapter = read_adapter(made(name, tmp_path)[1])
    for chain in adapter.updates.values():
        for given in chain:
            height, width = (size or 11 for size in (SIZES.get(given.kind) or given.shape))
            update = given.fitted(Fit((height, width), 1, (height, width))) if is_unsized(given) else given
            apply = update.prepare(Weight((height, width)))
            weight = draw.standard_normal((height, width))
            whole = apply(weight.copy(), range(height), range(width))
            assert not np.array_equal(whole, weight)
            rows, cols = (tuple(draw.permutation(size)[: size // 2 + 1].tolist()) for size in (height, width))
            part = apply(weight[list(rows)][:, list(cols)], rows, cols)
            np.testing.assert_allclose(part, whole[list(rows)][:, list(cols)], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("elements", [1, 100])
def test_coefficients_are_summed_in_any_number_of_rows_at_once(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: many meet in one row, and each row is summed in the same order."""
    update = EVERY_KIND["WaveFT by long filters"].fitted(Fit((24, 40)))
    zeros = HeldWeight.zeros((24, 40), DType.F32)
    whole = update.prepare(zeros)(np.zeros((24, 40), np.float32), range(24), range(40))
    monkeypatch.setattr("surgery_formats.updates.waveft._ELEMENTS", elements)
    parts = update.prepare(zeros)(np.zeros((24, 40), np.float32), range(24), range(40))
    assert whole.any()
    np.testing.assert_array_equal(parts, whole)


def turned(weight: Tensor, angles: Tensor, block: int) -> Tensor:
    """``W R^T`` with the exact transform, one block at a time."""
    result = weight.clone()
    for i, row in enumerate(angles.double()):
        Q = torch.zeros(block, block, dtype=torch.float64)
        at = 0
        for a in range(block):
            for b in range(a + 1, block):
                Q[a, b], Q[b, a] = row[at], -row[at]
                at += 1
        one = torch.eye(block, dtype=torch.float64)
        R = (one - Q) @ torch.linalg.inv(one + Q)
        columns = slice(i * block, (i + 1) * block)
        result[:, columns] = weight[:, columns] @ R.T
    return result


@pytest.mark.parametrize("elements", [1, 500, 1 << 19])
def test_a_rotation_meets_whole_groups_where_a_weight_is_stored_transposed(
    elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT has no OFT on GPT-2's Conv1D, whose storage rows are the columns that are mixed; blocks of 5 do not divide blocks of rows."""
    monkeypatch.setattr("surgery.engine.blocks.BLOCK_ELEMENTS", elements)
    base = models.build_base("gpt2", tmp_path / "base", n_embd=40, n_head=4)
    angles = 0.3 * torch.randn(8, 10, generator=torch.Generator().manual_seed(1))
    fields = {"peft_type": "OFT", "peft_version": "0.21.2", "use_cayley_neumann": False}
    name = "transformer.h.0.attn.c_attn"
    disk.write_adapter(tmp_path / "adapter", fields, {f"base_model.model.{name}.oft_R.weight": angles})
    surgery.merge(base, tmp_path / "adapter", output=tmp_path / "out")
    before, after = (disk.read_tensors(folder)[f"{name}.weight"].double() for folder in (base, tmp_path / "out"))
    assert measure.relative_error(after.T, turned(before.T, angles, 5)) < 5e-7


@pytest.mark.parametrize("elements", [1, 500, 1 << 19])
@pytest.mark.parametrize("name", ["hra", "boft", "bat"])
def test_whole_groups_are_mixed_wherever_a_weight_is_stored_transposed(
    name: str, elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT has these kinds on no Conv1D; a weight that is stored so must change as its transpose does."""
    monkeypatch.setattr("surgery.engine.blocks.BLOCK_ELEMENTS", elements)
    _, trained = made(name, tmp_path)
    config, tensors = disk.adapter(trained)
    base = models.build_base("gpt2", tmp_path / "gpt2", n_embd=32, n_head=4)
    path = "transformer.h.0.attn.c_proj"
    key = next(key for key in tensors if "q_proj" in key).rpartition(".")[0]
    mine = {k.replace(key, f"base_model.model.{path}"): v for k, v in tensors.items() if k.startswith(f"{key}.")}
    disk.write_adapter(tmp_path / "moved", config, mine)
    surgery.merge(base, tmp_path / "moved", output=tmp_path / "out")
    before, after = (disk.read_tensors(folder)[f"{path}.weight"] for folder in (base, tmp_path / "out"))
    ((chain,),) = ([*read_adapter(tmp_path / "moved").updates.values()],)
    update = chain[0].fitted(Fit((32, 32))) if is_unsized(chain[0]) else chain[0]
    meant = update.prepare(HeldWeight(before.T.double().numpy()))(before.T.double().numpy(), range(32), range(32))
    assert measure.relative_error(after.T, torch.from_numpy(np.array(meant))) < 5e-7


def test_experts_trained_one_by_one_meet_a_fused_base(tmp_path: Path) -> None:
    """Adapters of transformers 4 name each expert's layers; the base of today holds them in one tensor, or apart as then."""
    base = models.build_base("mixtral", tmp_path / "base")
    before = disk.read_tensors(base)
    path = "model.layers.1.block_sparse_moe.experts.2"
    generator = torch.Generator().manual_seed(3)
    gain = {part: 1 + 0.3 * torch.randn(1, 24, generator=generator) for part in ("w1", "w2")}
    gain["w1"] = gain["w1"].T
    tensors = {f"base_model.model.{path}.{part}.ia3_l": value for part, value in gain.items()}
    fields = {"peft_type": "IA3", "feedforward_modules": ["w2"]}
    disk.write_adapter(tmp_path / "adapter", fields, tensors)
    surgery.merge(base, tmp_path / "adapter", output=tmp_path / "out")
    after = disk.read_tensors(tmp_path / "out")
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed == {f"{path}.w1.weight", f"{path}.w2.weight"}
    for part, value in gain.items():
        torch.testing.assert_close(after[f"{path}.{part}.weight"], before[f"{path}.{part}.weight"] * value)


@pytest.mark.parametrize("name", KINDS)
def test_only_what_is_added_can_be_scaled_in_its_factors(name: str, tmp_path: Path) -> None:
    adapter = read_adapter(made(name, tmp_path)[1])
    linear = {is_linear(update) for chain in adapter.updates.values() for update in chain}
    assert linear == {name.partition("-")[0] in ADDS}


@pytest.mark.parametrize("name", KINDS)
def test_conversion_within_peft_keeps_every_kind(name: str, tmp_path: Path) -> None:
    base, adapter = made(name, tmp_path)
    for number, known in enumerate((None, base)):
        out = tmp_path / f"out{number}"
        result = convert(adapter, "peft", output=out, base=known)
        assert {entry.outcome for entry in result.entries} == {"exact"}
        before, after = disk.read_tensors(adapter), disk.read_tensors(out)
        assert before.keys() == after.keys()
        assert all(torch.equal(after[key], value) for key, value in before.items())
        assert disk.adapter(out)[0] == disk.adapter(adapter)[0]


@pytest.mark.parametrize("target", ["mlx", "compact", "peft"])
def test_what_is_low_rank_becomes_a_lora_in_formats_without_its_kind(target: str, tmp_path: Path) -> None:
    base, adapter = made("vera", tmp_path)
    result = convert(adapter, target, output=tmp_path / "out", base=base)
    written = {update.kind for chain in read_adapter(tmp_path / "out").updates.values() for update in chain}
    assert written == {"VeRA" if target == "peft" else "LoRA"}
    assert result.max_error < 1e-6
    assert target != "mlx" or {entry.outcome for entry in result.entries} == {"folded"}


@pytest.mark.parametrize("name", ["ia3", "loha", "lokr", "oft"])
def test_other_formats_say_that_they_have_no_such_thing(name: str, tmp_path: Path) -> None:
    base, adapter = made(name, tmp_path)
    with pytest.raises(FitError, match="cannot hold"):
        convert(adapter, "mlx", output=tmp_path / "out", base=base)


@pytest.mark.parametrize(
    ("name", "why", "way"),
    [
        ("ia3", "their sum depends on the base", "give the base (`base=`) and a rank (`rank=`), or merge them"),
        ("oft", "their sum depends on the base", "give the base (`base=`) and a rank (`rank=`), or merge them"),
        ("c3a", "their sum has no low rank", "give a rank (`rank=`), or merge them"),
        ("shira", "their sum depends on the base", "give the base (`base=`) and a rank (`rank=`), or merge them"),
        ("vera", "their sum depends on the base", "give the base (`base=`) and a rank (`rank=`), or merge them"),
        ("ln", "their sum depends on the base", "merge them"),
    ],
)
def test_a_sum_without_low_rank_names_what_is_missing(name: str, why: str, way: str, tmp_path: Path) -> None:
    _, one = made(name, tmp_path)
    _, other = made(name, tmp_path, seed=3)
    with pytest.raises(FitError) as caught:
        surgery.combine([(one, 0.5), (other, 0.5)], output=tmp_path / "out")
    assert why in caught.value.message
    assert way in str(caught.value.hint)


@pytest.mark.parametrize(
    "name", ["ia3", "loha", "lokr", "oft", "vera", "bat", "hira", "hra", "c3a", "shira", "fourierft"]
)
def test_with_a_base_and_a_rank_any_change_is_combined(name: str, tmp_path: Path) -> None:
    """At full rank the combination changes every weight as the two adapters do, one after the other with half its weight."""
    base, one = made(name, tmp_path)
    _, other = made(name, tmp_path, seed=3)
    needed = {} if name.startswith("lo") or name == "c3a" else {"base": base}
    surgery.combine([(one, 0.5), (other, 0.5)], output=tmp_path / "sum", rank=models.HIDDEN * 4, **needed)  # type: ignore[arg-type]
    surgery.merge(base, [(one, 0.5), (other, 0.5)], output=tmp_path / "both", dtype="fp32")
    surgery.merge(base, tmp_path / "sum", output=tmp_path / "on-sum", dtype="fp32")
    meant, merged = disk.read_tensors(tmp_path / "both"), disk.read_tensors(tmp_path / "on-sum")
    for key, value in meant.items():
        torch.testing.assert_close(merged[key], value, atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ["ia3", "oft", "vera"])
def test_what_depends_on_the_base_is_not_resized_without_it(name: str, tmp_path: Path) -> None:
    _, adapter = made(name, tmp_path)
    with pytest.raises(FitError, match="its rank cannot change without it"):
        surgery.resize(adapter, rank=1, output=tmp_path / "out")


@pytest.mark.parametrize("name", KINDS)
def test_two_adapters_of_a_kind_are_told_apart(name: str, tmp_path: Path) -> None:
    _, one = made(name, tmp_path)
    _, other = made(name, tmp_path, seed=3)
    assert surgery.diff(one, one).equal
    assert not surgery.diff(one, other).equal


def test_reports_count_what_was_trained(tmp_path: Path) -> None:
    base, adapter = made("vera", tmp_path)
    tensors = disk.read_tensors(adapter)
    found = looked_at(adapter)
    assert found.kinds == {"VeRA": 6}
    assert found.ranks == {5: 6}
    assert found.parameters == sum(v.numel() for k, v in tensors.items() if "lambda" in k)
    assert surgery.report(adapter, base=base).adapters[0].trained == found.parameters


@pytest.mark.parametrize(
    ("arch", "kind", "fields"),
    [
        ("torch_module", "IA3", {"target_modules": ["conv2", "head"], "feedforward_modules": ["conv2"]}),
        ("llama", "OFT", {"target_modules": ["q_proj", "embed_tokens"], "block_share": True, "oft_block_size": 8}),
        ("gpt2", "Vera", {"target_modules": ["c_attn", "c_proj"], "r": 5, "save_projection": False}),
    ],
)
def test_a_report_finds_that_sizes_the_file_does_not_tell_fit(
    arch: str, kind: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    base = models.build_base(arch, tmp_path / "base")
    peft_oracle.train(arch, base, f"{kind}Config", fields, tmp_path / "adapter", seed=1)
    assert surgery.report(tmp_path / "adapter", base=base).adapters[0].warnings == ()


def test_norms_that_were_tuned_are_no_baggage(tmp_path: Path) -> None:
    found = looked_at(made("ln", tmp_path)[1])
    assert (found.parameters, found.carried, found.traps) == (2 * models.HIDDEN, 0, ())


def test_a_bias_that_follows_is_no_parameter_of_its_own(tmp_path: Path) -> None:
    _, adapter = made("ia3", tmp_path)
    found = looked_at(adapter)
    assert found.kinds == {"IA3": 4}
    assert found.parameters == sum(v.numel() for v in disk.read_tensors(adapter).values())


def test_projections_that_are_drawn_again_are_a_trap(tmp_path: Path) -> None:
    base = models.build_base("llama", tmp_path / "base")
    fields = {"target_modules": ["q_proj"], "r": 4, "save_projection": False}
    peft_oracle.train("llama", base, "VeraConfig", fields, tmp_path / "adapter", seed=1)
    assert any("projection_prng_key" in trap for trap in looked_at(tmp_path / "adapter").traps)
