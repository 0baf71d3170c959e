# SPDX-License-Identifier: Apache-2.0
"""Algebra on adapter files: sums are exact, cuts are optimal, PEFT reads the result, outputs and inputs are safe."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from surgery import combine, diff
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.errors import FitError, NothingChangedError, OutputExistsError, ProofError
from tests.support.adapter_files import (
    assert_close,
    peft_deltas,
)
from tests.support.combinations import OneLayer, best, lora, simple, total

_SETTINGS = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
_MODULES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")


# --- the sum ----------------------------------------------------------------------------------------------------------------


@st.composite
def _adapters(draw_: st.DrawFn) -> tuple[list[dict[str, object]], dict[str, tuple[int, int]], list[float]]:
    """Two or three adapters on some of three modules: ranks, alphas, rsLoRA, patterns, weights of either sign."""
    shapes = {name: (draw_(st.integers(2, 24)), draw_(st.integers(2, 24))) for name in _MODULES}
    made = []
    for _ in range(draw_(st.integers(2, 3))):
        rank = draw_(st.integers(1, 6))
        config: dict[str, object] = {
            "modules": draw_(st.lists(st.sampled_from(_MODULES), min_size=1, unique=True)),
            "rank": rank,
            "lora_alpha": draw_(st.sampled_from([1, 4, 0.5, 16])),
            "use_rslora": draw_(st.booleans()),
        }
        if draw_(st.booleans()):
            config["alpha_pattern"] = {"q_proj": draw_(st.sampled_from([3, 0.25]))}
        made.append(config)
    weights = draw_(st.lists(st.sampled_from([1.0, -1.0, 0.7, -0.3, 2.5]), min_size=len(made), max_size=len(made)))
    return made, shapes, weights


@_SETTINGS
@given(_adapters(), st.integers(0, 10_000), st.integers(1, 8))
def test_sums_are_exact_and_cuts_are_optimal(
    made: tuple[list[dict[str, object]], dict[str, tuple[int, int]], list[float]], seed: int, rank: int
) -> None:
    configs, shapes, weights = made
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = []
        for number, config in enumerate(configs):
            mine = {module: shapes[module] for module in config.pop("modules")}  # type: ignore[attr-defined]
            paths.append(lora(folder / f"a{number}", seed + 100 * number, int(config.pop("rank")), mine, **config))  # type: ignore[call-overload]
        pairs = list(zip(paths, weights, strict=True))
        wanted, sizes = total([(peft_deltas(path), weight) for path, weight in pairs])

        result = combine(pairs, output=folder / "exact")
        got = peft_deltas(folder / "exact")
        assert got.keys() == wanted.keys()
        for module, value in wanted.items():
            assert np.linalg.norm(got[module] - value) <= 1e-6 * sizes[module], module
        for one in result.modules:
            value = wanted[one.site.removesuffix(".weight")]
            apart = float(np.linalg.norm(got[one.site.removesuffix(".weight")] - value))
            assert one.norm == pytest.approx(np.linalg.norm(value), rel=1e-9)
            assert one.error == pytest.approx(apart / np.linalg.norm(value), rel=1e-3, abs=1e-12)

        cut = combine(pairs, output=folder / "cut", rank=rank)
        got = peft_deltas(folder / "cut")
        for module, value in wanted.items():
            apart = np.linalg.norm(got[module] - value)
            assert apart <= 1.0001 * best(value, rank) + 1e-6 * sizes[module], module
        assert all(one.rank <= rank for one in cut.modules)


def test_peft_linear_is_off_and_its_cat_agrees(tmp_path: Path) -> None:
    """What the field's own tool makes of .7 A - .3 B, beside the sum of the two deltas."""
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"])
    model = peft.get_peft_model(OneLayer(), config, adapter_name="a")
    model.add_adapter("b", config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    model.save_pretrained(tmp_path)
    wanted = 0.7 * peft_deltas(tmp_path / "a")["q_proj"] - 0.3 * peft_deltas(tmp_path / "b")["q_proj"]

    def off(delta: np.ndarray) -> float:
        return float(np.linalg.norm(delta - wanted) / np.linalg.norm(wanted))

    layer = model.base_model.model.q_proj
    for kind in ("linear", "cat"):
        model.add_weighted_adapter(["a", "b"], [0.7, -0.3], kind, combination_type=kind)
    assert off(layer.get_delta_weight("linear").detach().double().numpy()) > 0.5
    assert off(layer.get_delta_weight("cat").detach().double().numpy()) < 1e-6
    combine([(tmp_path / "a", 0.7), (tmp_path / "b", -0.3)], output=tmp_path / "ours")
    assert off(peft_deltas(tmp_path / "ours")["q_proj"]) < 1e-6
    combine([(tmp_path / "a", 0.7), (tmp_path / "b", -0.3)], output=tmp_path / "cut", rank=8)
    cut = off(peft_deltas(tmp_path / "cut")["q_proj"])
    assert cut <= 1.0001 * best(wanted, 8) / np.linalg.norm(wanted)
    assert cut < 0.5


CASES = {
    "linear": ("llama", {}, {"use_rslora": True, "r": 5, "alpha_pattern": {"v_proj": 3}, "rank_pattern": {"up_proj": 2}}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}, {"target_modules": ["embed_tokens"], "r": 2}),
    "conv1d": ("gpt2", {}, {"r": 3}),
    "convolution": ("resnet", {}, {"r": 3, "use_rslora": True}),
    "experts": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "r": 2},
    ),
    "bias": ("bert", {"target_modules": ["query"], "lora_bias": True}, {"target_modules": ["query"], "lora_bias": True, "r": 2}),
    "attention": ("torch_module", {"target_modules": ["attention"]}, {"target_modules": ["attention"], "r": 2}),
    "saved": ("llama", {"modules_to_save": ["norm"]}, {"target_modules": ["k_proj"], "r": 2}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rank", [None, 3])
def test_peft_loads_the_sum(case: str, rank: int | None, tmp_path: Path) -> None:
    """PEFT attaches and merges the combination as it does the adapters one after the other."""
    from tests.oracles import models, peft_oracle

    arch, one, other = CASES[case]
    base = models.build_base(arch, tmp_path / "base")
    defaults = {"r": 4, "lora_alpha": 6, "target_modules": list(models.ARCHS[arch].targets)}
    paths = [tmp_path / "a", tmp_path / "b"]
    for number, (path, config) in enumerate(zip(paths, (one, other), strict=True)):
        peft_oracle.train(arch, base, "LoraConfig", {**defaults, **config}, path, seed=number)
    weights = (1.0, -0.3) if case == "saved" else (0.7, -0.3)
    pairs = list(zip(paths, weights, strict=True))
    result = combine(pairs, output=tmp_path / "out", rank=rank)
    ours = peft_oracle.merge(arch, base, [(tmp_path / "out", 1.0)])
    theirs = peft_oracle.merge(arch, base, pairs)
    before = models.load(arch, base).state_dict() if case != "experts" else {}
    assert ours.tensors.keys() == theirs.tensors.keys()
    squares = {
        name: float((ours.tensors[name] - value).double().square().sum()) for name, value in theirs.tensors.items()
    }
    if rank is None:
        moved = (
            max(float((v - before[n]).abs().max()) for n, v in theirs.tensors.items() if n in before) if before else 1.0
        )
        assert moved > 0.1
        worst = max(float((ours.tensors[name] - value).abs().max()) for name, value in theirs.tensors.items())
        assert worst <= 2e-6 * moved
        torch.testing.assert_close(ours.attached, theirs.attached, rtol=0, atol=1e-4)
    else:
        lost = math.hypot(*((m.norm or 0.0) * (m.error or 0.0) for m in result.modules))
        assert math.sqrt(sum(squares.values())) == pytest.approx(lost, rel=1e-3)
        assert lost > 0.1


def test_a_single_adapter_is_scaled_without_touching_its_factors(tmp_path: Path) -> None:
    source = simple(tmp_path / "a")
    combine([(source, 0.5)], output=tmp_path / "b")
    one, other = (load_file(tmp_path / side / "adapter_model.safetensors") for side in "ab")
    assert all(np.array_equal(one[key], other[key]) for key in one)
    assert_close(peft_deltas(tmp_path / "b"), {name: 0.5 * value for name, value in peft_deltas(source).items()})


def test_more_directions_than_the_matrix_has_are_folded_without_loss(tmp_path: Path) -> None:
    paths = [lora(tmp_path / f"a{i}", i, 6, {"self_attn.q_proj": (8, 10)}) for i in range(3)]
    result = combine([(path, 1.0) for path in paths], output=tmp_path / "out")
    assert result.modules[0].rank == 8
    assert result.modules[0].outcome == "exact"
    wanted, _ = total([(peft_deltas(path), 1.0) for path in paths])
    assert_close(peft_deltas(tmp_path / "out"), wanted)


def test_svd_finds_the_rank_that_the_sum_has(tmp_path: Path) -> None:
    paths = [simple(tmp_path / "a"), simple(tmp_path / "b"), simple(tmp_path / "c", seed=9, rank=2)]
    result = combine([(path, 1.0) for path in paths], output=tmp_path / "out", method="svd")
    assert [one.rank for one in result.modules] == [5]  # a and b are one adapter twice
    wanted, _ = total([(peft_deltas(path), 1.0) for path in paths])
    assert_close(peft_deltas(tmp_path / "out"), wanted)


# --- laws -------------------------------------------------------------------------------------------------------------------


def test_the_same_bytes_with_any_number_of_threads(tmp_path: Path) -> None:
    pairs = [(lora(tmp_path / f"a{i}", i, 24, {"mlp.down_proj": (300, 400)}), 1.0) for i in range(2)]
    before = torch.get_num_threads()
    try:
        for name, threads in (("one", 1), ("two", 2), ("again", 2)):
            torch.set_num_threads(threads)
            combine(pairs, output=tmp_path / name, rank=8)
    finally:
        torch.set_num_threads(before)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two", "again")]
    assert files[0] == files[1] == files[2]


def test_outputs_and_inputs_are_left_alone(tmp_path: Path) -> None:
    pairs = [(simple(tmp_path / "a"), 1.0), (simple(tmp_path / "b", 5), 1.0)]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(FitError, match="in"):
        combine(pairs, output=tmp_path / "a", overwrite=True)
    combine(pairs, output=tmp_path / "out")
    with pytest.raises(OutputExistsError):
        combine(pairs, output=tmp_path / "out")
    assert combine(pairs, output=tmp_path / "out", overwrite=True, rank=2).modules[0].rank == 2
    assert combine(pairs, dry_run=True).output is None
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "out"]


@pytest.mark.parametrize("rank", [None, 2])
def test_a_writer_that_errs_is_caught(tmp_path: Path, rank: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [(simple(tmp_path / "a"), 1.0), (simple(tmp_path / "b", 5), 1.0)]
    room = sys.modules["surgery.verbs.combine"]
    honest = room.format_to_write("peft")

    class Liar:
        single_file, name = honest.single_file, honest.name
        read, detect = staticmethod(honest.read), staticmethod(honest.detect)

        def render(self, adapter: object, base: object) -> object:
            rendering = honest.render(adapter, base)  # type: ignore[arg-type]

            def off(tensor: object) -> object:
                return replace(tensor, load=lambda: tensor.load() * 1.02) if "lora_A" in tensor.name else tensor  # type: ignore[attr-defined, type-var]

            return replace(rendering, tensors=tuple(off(tensor) for tensor in rendering.tensors))

    monkeypatch.setattr(room, "format_to_write", lambda name: Liar())
    with pytest.raises(ProofError, match="away from the sum") as caught:
        combine(pairs, output=tmp_path / "out", rank=rank)
    assert caught.value.exit_code == 5
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_subtracting_again_gives_the_first_back(tmp_path: Path) -> None:
    a, b = simple(tmp_path / "a"), simple(tmp_path / "b", 5)
    combine([(a, 1.0), (b, 1.0)], output=tmp_path / "ab")
    combine([(tmp_path / "ab", 1.0), (b, -1.0)], output=tmp_path / "back", method="svd")
    assert diff(a, tmp_path / "back").equal
    assert [one.rank for one in read_ranks(tmp_path / "back")] == [3]


def read_ranks(folder: Path) -> list[object]:
    return [update for chain in read_adapter(folder).updates.values() for update in chain]


def test_adapters_that_nearly_cancel_are_told_and_svd_keeps_what_is_left(tmp_path: Path) -> None:
    one = simple(tmp_path / "a", 1)
    pair = [(one, 1.0), (one, -1.0000001)]
    result = combine(pair, output=tmp_path / "exact")
    assert (result.error or 0) > 0.02
    assert any("nearly cancel" in warning and "--method svd" in warning for warning in result.warnings)
    assert (combine(pair, output=tmp_path / "svd", method="svd").error or 0) < 1e-6
    assert not combine([(one, 1.0), (one, -0.5)], output=tmp_path / "half").warnings


def test_a_density_that_drops_everything_is_not_blamed_on_the_weights(tmp_path: Path) -> None:
    one, other = simple(tmp_path / "a", 1), simple(tmp_path / "b", 2)
    with pytest.raises(NothingChangedError, match="density"):
        combine([(one, 0.5), (other, 0.5)], output=tmp_path / "x", method="dare-linear", density=1e-9, rank=4)
