# SPDX-License-Identifier: Apache-2.0
"""Algebra on adapter files: sums are exact, cuts are optimal, PEFT reads the result, and what depends on the base is refused."""

from __future__ import annotations

import json
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

from surgery import combine, convert, diff, resize
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.errors import FitError, NothingChangedError, OutputExistsError, ProofError
from tests.adapter_files import (
    assert_close,
    config_of,
    draw,
    kohya_deltas,
    llama,
    mlx_deltas,
    peft_deltas,
    unet,
    write_mlx,
    write_peft,
)

_SETTINGS = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
_MODULES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
Q = "base_model.model.model.layers.0.self_attn.q_proj"

Arrays = dict[str, np.ndarray]


def lora(folder: Path, seed: int, rank: int, shapes: dict[str, tuple[int, int]], **config: object) -> Path:
    """A PEFT LoRA on `shapes` of layer 0."""
    tensors = {}
    for number, (module, (out, inputs)) in enumerate(sorted(shapes.items())):
        stem = f"base_model.model.model.layers.0.{module}"
        tensors[f"{stem}.lora_A.weight"] = draw(seed + 2 * number, rank, inputs)
        tensors[f"{stem}.lora_B.weight"] = draw(seed + 2 * number + 1, out, rank)
    return write_peft(folder, tensors, **{"r": rank, "lora_alpha": 2 * rank, **config})


def simple(folder: Path, seed: int = 1, rank: int = 3, **config: object) -> Path:
    return lora(folder, seed, rank, {"self_attn.q_proj": (24, 32)}, **config)


def total(deltas: list[tuple[Arrays, float]]) -> tuple[Arrays, dict[str, float]]:
    """The weighted sum by module, and the norms of the terms added up."""
    names = {name for one, _ in deltas for name in one}
    wanted = {n: sum((w * one[n] for one, w in deltas if n in one), np.zeros(())) for n in names}
    sizes = {n: sum(abs(w) * float(np.linalg.norm(one[n])) for one, w in deltas if n in one) for n in names}
    return wanted, sizes


def best(wanted: np.ndarray, rank: int) -> float:
    """Error of the best approximation of a rank."""
    return float(np.linalg.norm(np.linalg.svd(wanted, compute_uv=False)[rank:]))


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

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = torch.nn.Linear(48, 40, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q_proj(x)

    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"])
    model = peft.get_peft_model(Model(), config, adapter_name="a")
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


# --- formats ----------------------------------------------------------------------------------------------------------------


def test_peft_and_mlx_combine_into_either(tmp_path: Path) -> None:
    one = lora(tmp_path / "a", 1, 3, {"self_attn.q_proj": (6, 6)})
    parameters = {"rank": 2, "scale": 4.0, "dropout": 0.0}
    stem = "model.layers.0.self_attn.q_proj"
    other = write_mlx(
        tmp_path / "m", {f"{stem}.lora_a": draw(5, 6, 2), f"{stem}.lora_b": draw(6, 2, 6)}, lora_parameters=parameters
    )
    wanted, _ = total([(peft_deltas(one), 0.7), (mlx_deltas(other), -0.3)])
    combine([(one, 0.7), (other, -0.3)], output=tmp_path / "p")
    combine([(other, -0.3), (one, 0.7)], output=tmp_path / "q")
    assert_close(peft_deltas(tmp_path / "p"), wanted)
    assert_close(mlx_deltas(tmp_path / "q"), wanted)


def test_kohya_files_combine_through_the_base(tmp_path: Path) -> None:
    base = unet(tmp_path / "base")
    paths = []
    for number in range(2):
        r = number + 2
        tensors = {
            "base_model.model.conv_in.lora_A.weight": draw(number, r, 3, 3, 3),
            "base_model.model.conv_in.lora_B.weight": draw(number + 9, 4, r, 1, 1),
        }
        folder = write_peft(tmp_path / f"p{number}", tensors, r=r)
        paths.append(convert(folder, "kohya", tmp_path / f"k{number}.safetensors", base=base).output)
    pairs = list(zip(paths, (0.7, -0.3), strict=True))
    wanted, _ = total([(kohya_deltas(path), weight) for path, weight in pairs])
    result = combine(pairs, output=tmp_path / "out.safetensors", base=base)
    assert_close(kohya_deltas(tmp_path / "out.safetensors"), wanted)
    assert (result.modules[0].ranks, result.modules[0].rank) == ((2, 3), 4)  # the weight has four rows
    combine([(tmp_path / "p0", 0.7), (paths[1], -0.3)], output=tmp_path / "mixed", base=base)
    assert_close(peft_deltas(tmp_path / "mixed"), {"conv_in": next(iter(wanted.values()))})
    with pytest.raises(FitError, match="come from the base"):
        combine(pairs, output=tmp_path / "none.safetensors")


def test_names_that_only_a_base_can_tell_apart(tmp_path: Path) -> None:
    one = lora(tmp_path / "a", 1, 2, {"self_attn.q_proj": (6, 6)})
    bare = "base_model.model.layers.0.self_attn.q_proj"
    other = write_peft(
        tmp_path / "b", {f"{bare}.lora_A.weight": draw(3, 2, 6), f"{bare}.lora_B.weight": draw(4, 6, 2)}, r=2
    )
    with pytest.raises(FitError, match="may be") as caught:
        combine([(one, 1.0), (other, 1.0)], output=tmp_path / "out")
    assert "--base" in str(caught.value)
    combine([(one, 1.0), (other, 1.0)], output=tmp_path / "out", base=llama(tmp_path / "base"))
    wanted = peft_deltas(one)["model.layers.0.self_attn.q_proj"] + peft_deltas(other)["layers.0.self_attn.q_proj"]
    assert_close(peft_deltas(tmp_path / "out"), {"model.layers.0.self_attn.q_proj": wanted})


def test_the_configuration_names_every_module_of_both(tmp_path: Path) -> None:
    one = simple(tmp_path / "a", target_modules=["q_proj"], base_model_name_or_path="org/x", task_type="CAUSAL_LM")
    other = lora(tmp_path / "b", 5, 3, {"self_attn.v_proj": (24, 32)}, target_modules=["v_proj"])
    combine([(one, 1.0), (other, 1.0)], output=tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["target_modules"] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    assert config["base_model_name_or_path"] == "org/x"
    assert config["task_type"] == "CAUSAL_LM"
    manifest = json.loads((tmp_path / "out" / "surgery_manifest.json").read_text())
    assert [source["weight"] for source in manifest["sources"]] == [1.0, 1.0]
    assert str(tmp_path) not in json.dumps(manifest)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_stored_types(tmp_path: Path, dtype: str) -> None:
    pairs = [(simple(tmp_path / "a"), 0.7), (simple(tmp_path / "b", seed=5), -0.3)]
    result = combine(pairs, output=tmp_path / "out", dtype=dtype)
    stored = {tensor.dtype.label for tensor in read_adapter(tmp_path / "out").tensors}
    assert stored == {{"fp32": "F32", "bf16": "BF16", "fp16": "F16"}[dtype]}
    assert 0 < result.error < {"fp32": 1e-6, "bf16": 2**-7, "fp16": 2**-10}[dtype]  # type: ignore[operator]


# --- what depends on the base -----------------------------------------------------------------------------------------------


def _dora(folder: Path) -> Path:
    tensors = {
        f"{Q}.lora_A.weight": draw(1, 2, 32),
        f"{Q}.lora_B.weight": draw(2, 24, 2),
        f"{Q}.lora_magnitude_vector": np.abs(draw(3, 24)),
    }
    return write_peft(folder, tensors, r=2, use_dora=True, target_modules=["q_proj"])


def test_dora_survives_alone_and_is_refused_otherwise(tmp_path: Path) -> None:
    dora = _dora(tmp_path / "d")
    stem = Q.replace("q_proj", "v_proj")
    tensors = load_file(dora / "adapter_model.safetensors")
    second = write_peft(
        tmp_path / "e",
        {k.replace(Q, stem): v for k, v in tensors.items()},
        r=2,
        use_dora=True,
        target_modules=["v_proj"],
    )
    result = combine([(dora, 1.0), (second, 1.0)], output=tmp_path / "out")
    assert {one.outcome for one in result.modules} == {"kept"}
    merged = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(np.array_equal(merged[name], value) for name, value in tensors.items())
    assert config_of(tmp_path / "out")["use_dora"] is True
    for pairs in ([(dora, 0.5)], [(dora, 1.0), (simple(tmp_path / "a"), 1.0)]):
        with pytest.raises(FitError, match="depends on the base"):
            combine(pairs, output=tmp_path / "x")
    with pytest.raises(FitError, match="rank cannot change"):
        resize(dora, output=tmp_path / "x", rank=1)
    assert not (tmp_path / "x").exists()


def test_whole_parameters_are_kept_at_weight_one_and_refused_otherwise(tmp_path: Path) -> None:
    tensors = {
        f"{Q}.lora_A.weight": draw(1, 2, 32),
        f"{Q}.lora_B.weight": draw(2, 24, 2),
        "base_model.model.model.norm.weight": draw(3, 32),
    }
    saved = write_peft(tmp_path / "s", tensors, r=2, modules_to_save=["norm"])
    other = simple(tmp_path / "a")
    combine([(other, 0.5), (saved, 1.0)], output=tmp_path / "out")
    got = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert np.array_equal(got["base_model.model.model.norm.weight"], tensors["base_model.model.model.norm.weight"])
    assert config_of(tmp_path / "out")["modules_to_save"] == ["norm"]
    with pytest.raises(FitError, match=r"0\.5 times depends on the base"):
        combine([(other, 1.0), (saved, 0.5)], output=tmp_path / "x")
    twice = write_peft(tmp_path / "t", tensors, r=2, modules_to_save=["norm"])
    with pytest.raises(FitError, match="by one of them as replacement") as caught:
        combine([(saved, 1.0), (twice, 1.0)], output=tmp_path / "x")
    assert caught.value.exit_code == 4


def test_soft_prompts_shapes_and_empty_results_are_refused(tmp_path: Path) -> None:
    one = simple(tmp_path / "a")
    wide = lora(tmp_path / "w", 3, 2, {"self_attn.q_proj": (24, 40)})
    with pytest.raises(FitError, match="made for different weights"):
        combine([(one, 1.0), (wide, 1.0)], output=tmp_path / "x")
    with pytest.raises(NothingChangedError, match="cancel"):
        combine([(one, 1.0), (simple(tmp_path / "b"), -1.0)], output=tmp_path / "x")
    with pytest.raises(NothingChangedError, match="what it was"):
        combine([(one, 1.0)], output=tmp_path / "x")
    with pytest.raises(NothingChangedError, match="every weight is 0"):
        combine([(one, 0.0)], output=tmp_path / "x")
    with pytest.raises(FitError, match="a weight of nan"):
        combine([(one, math.nan)], output=tmp_path / "x")
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "w"]


# --- TIES, DARE, pruning ----------------------------------------------------------------------------------------------------


def ties(deltas: list[np.ndarray], weights: list[float], density: float) -> np.ndarray:
    """arXiv:2306.01708, algorithm 1, element by element; lambda is the weights, on the task vectors."""
    n = deltas[0].size
    trimmed = []
    for delta, weight in zip(deltas, weights, strict=True):
        keep = np.argsort(-np.abs(delta).ravel(), kind="stable")[: math.ceil(density * n)]
        flat = np.zeros(n)
        flat[keep] = delta.ravel()[keep]
        trimmed.append(weight * flat)
    merged = np.zeros(n)
    for p in range(n):
        gamma = np.sign(sum(vector[p] for vector in trimmed))
        agreeing = [vector[p] for vector in trimmed if vector[p] != 0 and np.sign(vector[p]) == gamma]
        merged[p] = np.mean(agreeing) if agreeing else 0.0
    return merged.reshape(deltas[0].shape)


@pytest.fixture
def pair(tmp_path: Path) -> list[tuple[Path, float]]:
    return [
        (simple(tmp_path / "a", 1, 3), 0.7),
        (simple(tmp_path / "b", 5, 4), -0.4),
        (simple(tmp_path / "c", 9, 2), 1.1),
    ]


def _found(pairs: list[tuple[Path, float]], out: Path, **options: object) -> np.ndarray:
    combine(pairs, output=out, rank=24, **options)  # type: ignore[arg-type]  # full rank: nothing is lost
    return peft_deltas(out)["model.layers.0.self_attn.q_proj"]


def _deltas(pairs: list[tuple[Path, float]]) -> tuple[list[np.ndarray], list[float]]:
    return [peft_deltas(path)["model.layers.0.self_attn.q_proj"] for path, _ in pairs], [weight for _, weight in pairs]


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_its_paper(pair: list[tuple[Path, float]], tmp_path: Path, density: float) -> None:
    wanted = ties(*_deltas(pair), density)
    got = _found(pair, tmp_path / "out", method="ties", density=density)
    assert np.linalg.norm(got - wanted) <= 1e-6 * np.linalg.norm(wanted)


def test_magnitude_prune_is_the_sum_of_what_is_left(pair: list[tuple[Path, float]], tmp_path: Path) -> None:
    deltas, weights = _deltas(pair)
    wanted = sum(
        w * np.where(np.abs(d) >= np.quantile(np.abs(d), 0.75, method="higher"), d, 0)
        for d, w in zip(deltas, weights, strict=True)
    )
    got = _found(pair, tmp_path / "out", method="magnitude-prune", density=0.25)
    assert np.linalg.norm(got - wanted) <= 1e-6 * np.linalg.norm(wanted)


@pytest.mark.parametrize("method", ["dare-linear", "dare-ties"])
def test_dare_drops_and_rescales(pair: list[tuple[Path, float]], tmp_path: Path, method: str) -> None:
    """arXiv:2311.03099: every value is what one of the 2^3 ways to drop gives, and each is dropped as often as it should be."""
    deltas, weights = _deltas(pair)
    density = 0.6
    got = _found(pair, tmp_path / "out", method=method, density=density)
    masks = [[bool(bits >> i & 1) for i in range(3)] for bits in range(8)]
    ways = []
    for mask in masks:
        parts = [w * d / density * keep for d, w, keep in zip(deltas, weights, mask, strict=True)]
        ways.append(sum(parts) if method == "dare-linear" else ties(parts, [1.0] * 3, 1.0))
    apart = np.abs(np.stack(ways) - got)
    assert apart.min(axis=0).max() <= 1e-5 * np.abs(got).max()
    if method == "dare-linear":
        nearest = apart.argmin(axis=0)
        for number in range(3):
            kept = np.mean([masks[way][number] for way in nearest.ravel()])
            assert abs(kept - density) < 4 * math.sqrt(density * (1 - density) / got.size)
    again = _found(pair, tmp_path / "again", method=method, density=density)
    other = _found(pair, tmp_path / "other", method=method, density=density, seed=1)
    assert np.array_equal(got, again)
    assert not np.allclose(got, other)


def test_dare_keeps_the_mean(tmp_path: Path) -> None:
    """Rescaling makes the expectation of what is left the delta itself."""
    from surgery.task_vectors import merge_deltas

    delta = torch.full((400, 400), 3.0, dtype=torch.float64)
    found = merge_deltas([delta.clone], [1.0], method="dare-linear", density=0.1, seed=0, name="x", owners=[0])
    assert float(found.mean()) == pytest.approx(3.0, rel=0.03)
    assert set(found.unique().tolist()) == {0.0, 30.0}


def test_a_dense_method_is_cut_optimally(pair: list[tuple[Path, float]], tmp_path: Path) -> None:
    wanted = ties(*_deltas(pair), 0.3)
    result = combine(pair, output=tmp_path / "out", rank=5, method="ties", density=0.3)
    apart = np.linalg.norm(peft_deltas(tmp_path / "out")["model.layers.0.self_attn.q_proj"] - wanted)
    assert apart <= 1.0001 * best(wanted, 5) + 1e-6 * np.linalg.norm(wanted)
    assert result.error == pytest.approx(apart / np.linalg.norm(wanted), rel=1e-4)
    by_energy = combine(pair, output=tmp_path / "e", energy=0.9, method="ties", density=0.3)
    squares = np.linalg.svd(wanted, compute_uv=False) ** 2
    assert by_energy.modules[0].rank == int((np.cumsum(squares) < 0.9 * squares.sum()).sum()) + 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "ties", "rank": 4}, "needs a density"),
        ({"method": "ties", "density": 0.5}, "full rank"),
        ({"method": "exact", "density": 0.5}, "no density"),
        ({"method": "tise"}, "no method"),
        ({"rank": 0}, "rank of 0"),
        ({"energy": 1.5}, "energy"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises(FitError, match=said):
        combine([(tmp_path / "never read", 1.0)], output=tmp_path / "x", **options)  # type: ignore[arg-type]


# --- resize -----------------------------------------------------------------------------------------------------------------


def _decaying(folder: Path, rank: int = 8) -> Path:
    """Directions whose strengths fall, so that thresholds have something to decide."""
    tensors = {
        f"{Q}.lora_A.weight": draw(1, rank, 32),
        f"{Q}.lora_B.weight": draw(2, 24, rank) * 0.5 ** np.arange(rank, dtype=np.float32),
    }
    return write_peft(folder, tensors, r=rank, lora_alpha=4)


@pytest.mark.parametrize("limit", [{"rank": 3}, {"energy": 0.99}, {"max_error": 0.1}, {"rank": 2, "energy": 0.99}])
def test_resize_is_optimal(tmp_path: Path, limit: dict[str, float]) -> None:
    source = _decaying(tmp_path / "a")
    wanted = peft_deltas(source)["model.layers.0.self_attn.q_proj"]
    result = resize(source, output=tmp_path / "b", **limit)  # type: ignore[arg-type]
    rank = result.modules[0].rank
    norm = float(np.linalg.norm(wanted))
    apart = np.linalg.norm(peft_deltas(tmp_path / "b")["model.layers.0.self_attn.q_proj"] - wanted)
    assert apart <= 1.0001 * best(wanted, rank) + 1e-6 * norm
    allowed = limit.get("max_error", math.sqrt(1 - limit.get("energy", 0.0)))
    needed = next(r for r in range(1, 9) if best(wanted, r) <= allowed * norm)
    assert rank == (
        min(int(limit["rank"]), needed) if "energy" in limit and "rank" in limit else limit.get("rank", needed)
    )
    dry = resize(
        source, rank=limit.get("rank"), energy=limit.get("energy"), max_error=limit.get("max_error"), dry_run=True
    )  # type: ignore[arg-type]
    assert dry.error == pytest.approx(result.error, rel=1e-4)


def test_resize_never_pads(tmp_path: Path) -> None:
    source = _decaying(tmp_path / "a")
    with pytest.raises(NothingChangedError, match="the highest is 8") as caught:
        resize(source, output=tmp_path / "b", rank=16)
    assert "zeros" in str(caught.value)


def test_resize_keeps_what_is_small_enough(tmp_path: Path) -> None:
    stem = Q.replace("q_proj", "v_proj")
    tensors = {
        f"{Q}.lora_A.weight": draw(1, 6, 32), f"{Q}.lora_B.weight": draw(2, 24, 6),
        f"{stem}.lora_A.weight": draw(3, 2, 32), f"{stem}.lora_B.weight": draw(4, 24, 2),
    }  # fmt: skip
    source = write_peft(tmp_path / "a", tensors, r=6, rank_pattern={"v_proj": 2})
    result = resize(source, output=tmp_path / "b", rank=4)
    assert [(one.outcome, one.rank) for one in result.modules] == [("approximated", 4), ("kept", 2)]
    assert np.array_equal(
        load_file(tmp_path / "b/adapter_model.safetensors")[f"{stem}.lora_B.weight"], tensors[f"{stem}.lora_B.weight"]
    )
    assert_close(
        {n: v for n, v in peft_deltas(tmp_path / "b").items() if "v_proj" in n},
        {n: v for n, v in peft_deltas(source).items() if "v_proj" in n},
    )


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
    room = sys.modules["surgery.combine"]
    honest = room.format_named("peft")

    class Liar:
        single_file, name, read = honest.single_file, honest.name, staticmethod(honest.read)

        def render(self, adapter: object, base: object) -> object:
            rendering = honest.render(adapter, base)  # type: ignore[arg-type]

            def off(tensor: object) -> object:
                return replace(tensor, load=lambda: tensor.load() * 1.02) if "lora_A" in tensor.name else tensor  # type: ignore[attr-defined, type-var]

            return replace(rendering, tensors=tuple(off(tensor) for tensor in rendering.tensors))

    monkeypatch.setattr(room, "format_named", lambda name: Liar())
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
