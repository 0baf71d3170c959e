# SPDX-License-Identifier: Apache-2.0
"""Weights are found by value in any layout, and nothing is claimed that is not there."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper

import surgery
from surgery.onnx.locate.search import Located
from tests.support.graphs_by_value import base_of, graph_of, initializer, located, nbits, random_weights

SHAPES = {
    **{f"layers.{n}.{x}.weight": (rows, 24) for n in range(3) for x, rows in (("q", 32), ("k", 16), ("v", 16))},
    **{f"layers.{n}.o.weight": (24, 32) for n in range(3)},
    **{f"layers.{n}.q.bias": (32,) for n in range(3)},
    **{f"layers.{n}.norm.weight": (24,) for n in range(3)},
}
WEIGHTS = random_weights(SHAPES)
Q, K, V, OUT, BIAS, NORM = (
    WEIGHTS[f"layers.1.{x}"] for x in ("q.weight", "k.weight", "v.weight", "o.weight", "q.bias", "norm.weight")
)
ROWS = np.linspace(2, 0.5, 32, dtype=np.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_of(tmp_path_factory.mktemp("base"), WEIGHTS)


def found(result: Located) -> dict[str, str]:
    return {piece.weight.name: piece.how for piece in result.pieces}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (Q, {"q": "as it is"}),
        (Q.T, {"q": "transposed"}),
        (Q.astype("f2"), {"q": "as it is, cast to F16"}),
        (Q.T.astype(ml_dtypes.bfloat16), {"q": "transposed, cast to BF16"}),
        (Q.astype("f8"), {"q": "as it is, cast to F64"}),
        (np.concatenate([Q, K, V]), {"q": "as it is, rows 0 to 32", "k": "as it is, rows 32 to 48", "v": "as it is, rows 48 to 64"}),
        (
            np.concatenate([Q, K, V]).T,
            {"q": "transposed, columns 0 to 32", "k": "transposed, columns 32 to 48", "v": "transposed, columns 48 to 64"},
        ),
        (Q[:20], {"q": "as it is, 20 of 32 rows"}),
        (OUT[:, 8:], {"o": "as it is, 24 of 32 columns"}),
        (Q.reshape(4, 8, 24), {"q": "as it is"}),
        (Q.T.reshape(24, 4, 8), {"q": "transposed"}),
        (Q * np.float32(8**-0.5), {"q": "as it is, times 0.353553"}),
        (Q * np.float32(0.3), {"q": "as it is, times 0.3"}),
        (Q.T * np.float32(0.125), {"q": "transposed, times 0.125"}),
        (Q * NORM, {"q": "as it is, columns times layers.1.norm.weight"}),
        ((Q * (1 + NORM)).T, {"q": "transposed, columns times layers.1.norm.weight + 1"}),
        (Q * ROWS[:, None], {"q": "as it is, each row times a number"}),
        ((Q * ROWS[:, None]).T, {"q": "transposed, each row times a number"}),
        (np.concatenate([Q * np.float32(0.5), K]), {"q": "as it is, rows 0 to 32, times 0.5", "k": "as it is, rows 32 to 48"}),
        (np.concatenate([np.ones((5, 24), "f4"), Q, K[:3]]), {"q": "as it is, rows 5 to 37", "k": "as it is, rows 37 to 40, 3 of 16 rows"}),
        (BIAS, {"bias": "as it is"}),
        (np.concatenate([np.zeros(3, "f4"), BIAS, NORM]), {"bias": "elements 3 to 35", "norm": "elements 35 to 59"}),
    ],
)  # fmt: skip
def test_a_layout_is_found(tmp_path: Path, base: Path, values: np.ndarray, expected: dict[str, str]) -> None:
    names = {"bias": "layers.1.q.bias"}
    wanted = {names.get(short, f"layers.1.{short}.weight"): how for short, how in expected.items()}
    assert found(located(graph_of(tmp_path / "g.onnx", [initializer("val_7", values)]), base)) == wanted


@pytest.mark.parametrize("turned", [False, True])
def test_what_a_converter_to_float16_raises_is_no_difference(tmp_path: Path, turned: bool) -> None:
    """onnxruntime.transformers.float16: values below 1e-7 become 1e-7, zeros stay."""
    small = Q.copy()
    small[17, 11], small[20, 3], small[5, 15] = 3e-8, -9e-8, 0
    tiny = BIAS.copy()
    tiny[20] = -1e-9
    base = base_of(tmp_path / "base", {"q.weight": small, "q.bias": tiny})
    raised = [np.where((np.abs(x) < 1e-7) & (x != 0), np.copysign(1e-7, x), x).astype("f2") for x in (small, tiny)]
    tensors = [initializer("w", raised[0].T if turned else raised[0]), initializer("b", raised[1])]
    assert not located(graph_of(tmp_path / "g.onnx", tensors), base).missing
    raised[0][17, 11] = 3e-7
    tensors = [initializer("w", raised[0].T if turned else raised[0]), initializer("b", raised[1])]
    assert len(located(graph_of(tmp_path / "h.onnx", tensors), base).missing) == 1


def test_rows_in_another_order_are_found(tmp_path: Path, base: Path) -> None:
    order = np.random.default_rng(5).permutation(32)
    result = located(graph_of(tmp_path / "g.onnx", [initializer("w", Q[order])]), base)
    (piece,) = result.pieces
    assert (piece.how, tuple(piece.rows)) == ("as it is, in another order", tuple(order))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", ["f2", "f4"])
def test_one_wrong_element_is_not_claimed(tmp_path: Path, base: Path, turned: bool, dtype: str) -> None:
    wrong = Q.astype(dtype)
    wrong[17, 11] = np.nextafter(wrong[17, 11], np.array(9, dtype))
    result = located(graph_of(tmp_path / "g.onnx", [initializer("w", wrong.T if turned else wrong)]), base)
    assert result.covered["layers.1.q.weight"] < 1
    assert len(result.pieces) == 1
    assert not claims(result, 17, 11)


def claims(result: Located, row: int, col: int) -> bool:
    """Whether an element of a weight is said to be in the graph: of a row, or of a column if those were found."""
    return any((col if piece.flipped else row) in piece.rows for piece in result.pieces)


ACTS = ("as is", "turned", "half", "packed", "packed turned", "sliced", "reordered", "stacked")


def laid_out(seed: int, acts: list[str]) -> list[tuple[str, np.ndarray, set[str]]]:
    """Tensors with the weights that each holds wholly; names say nothing."""
    rng = np.random.default_rng(seed)
    left = [name for name in WEIGHTS if WEIGHTS[name].ndim == 2]
    rng.shuffle(left)
    tensors: list[tuple[str, np.ndarray, set[str]]] = []
    for act in acts:
        if not left:
            break
        name = left.pop()
        value = WEIGHTS[name]
        held = {name}
        if act.startswith("packed"):
            fitting = [other for other in left if WEIGHTS[other].shape[1] == value.shape[1]][: int(rng.integers(3))]
            left = [other for other in left if other not in fitting]
            held |= set(fitting)
            value = np.concatenate([value, *(WEIGHTS[other] for other in fitting)])
        if act == "sliced":
            cut = int(rng.integers(2, len(value) - 2))
            tensors.append((f"t{len(tensors)}", value[:cut], {name}))
            value = value[cut:].T
        if act == "reordered":
            value = value[rng.permutation(len(value))]
        if act == "stacked":
            value = value.reshape(4, -1, value.shape[1])
        value = value.astype("f2") if act == "half" else value
        tensors.append((f"t{len(tensors)}", value.T if "turned" in act else value, held))
    return tensors


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**16), st.lists(st.sampled_from(ACTS), min_size=12, max_size=12))
def test_random_layouts_are_found_again(
    tmp_path_factory: pytest.TempPathFactory, base: Path, seed: int, acts: list[str]
) -> None:
    tensors = laid_out(seed, acts)
    path = graph_of(tmp_path_factory.mktemp("g") / "g.onnx", [initializer(name, value) for name, value, _ in tensors])
    result = located(path, base, workers=1)
    assert {weight.name for weight in result.whole} == {name for name in WEIGHTS if WEIGHTS[name].ndim == 2}
    for name, _, held in tensors:
        assert held <= {piece.weight.name for piece in result.pieces if piece.place.name == name}
    for piece in result.pieces:  # what is claimed is there
        value = next(value for name, value, _ in tensors if name == piece.place.name)
        there = value.reshape(piece.place.rows, piece.place.cols)
        there = (there.T if piece.turned else there)[list(piece.graph_rows)]
        mine = WEIGHTS[piece.weight.name]
        assert np.array_equal((mine.T if piece.flipped else mine)[list(piece.rows)].astype(value.dtype), there)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    row=st.integers(0, 31), col=st.integers(0, 23), size=st.floats(1e-3, 10), turned=st.booleans(), half=st.booleans()
)
def test_near_misses_are_not_claimed(
    tmp_path_factory: pytest.TempPathFactory, base: Path, row: int, col: int, size: float, turned: bool, half: bool
) -> None:
    wrong = Q.copy()
    wrong[row, col] += size
    wrong = wrong.astype("f2" if half else "f4")
    if wrong[row, col] == Q[row, col].astype(wrong.dtype):
        return
    path = graph_of(tmp_path_factory.mktemp("g") / "g.onnx", [initializer("w", wrong.T if turned else wrong)])
    result = located(path, base, workers=1)
    assert "layers.1.q.weight" in {weight.name for weight in result.missing}
    assert not claims(result, row, col)


def test_a_changed_weight_is_told_with_its_distance(tmp_path: Path, base: Path) -> None:
    changed = Q + 0.05 * np.random.default_rng(1).standard_normal(Q.shape).astype("f4")
    result = located(graph_of(tmp_path / "g.onnx", [initializer("w", np.concatenate([changed, K]).T)]), base)
    assert found(result) == {"layers.1.k.weight": "transposed, columns 32 to 48"}
    unpacked = located(graph_of(tmp_path / "h.onnx", [initializer("w", changed.T)]), base)
    (near,) = unpacked.near
    assert near.piece.weight.name == "layers.1.q.weight"
    assert near.distance == pytest.approx(0.05, rel=0.5)


def test_another_model_is_not_found(tmp_path: Path, base: Path) -> None:
    other = random_weights(SHAPES, seed=9)
    result = located(graph_of(tmp_path / "g.onnx", [initializer(name, value) for name, value in other.items()]), base)
    assert not result.pieces
    assert not result.near
    assert len(result.others) == len(other)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("bits", "size", "dtype"), [(4, 16, "f4"), (4, 32, "f2"), (8, 16, "f4"), (2, 16, "f4")])
def test_codes_are_found_within_their_step(
    tmp_path: Path, base: Path, bits: int, size: int, dtype: str, zeros: bool
) -> None:
    tensors, node = nbits("a", np.concatenate([Q, K, V]), bits, size, zeros=zeros, dtype=dtype)
    result = located(graph_of(tmp_path / "g.onnx", tensors, [node]), base)
    assert [piece.weight.name for piece in result.pieces] == [f"layers.1.{x}.weight" for x in "qkv"]
    assert all(0 < piece.error <= 1.01 for piece in result.pieces)
    tensors, node = nbits("a", Q + np.float32(0.5), bits, size, zeros=zeros, dtype=dtype)
    assert not located(graph_of(tmp_path / "h.onnx", tensors, [node]), base).pieces


def test_equal_values_are_told_apart_by_names(tmp_path: Path) -> None:
    ones = {f"layers.{n}.{norm}.weight": np.ones(24, "f4") for n in range(3) for norm in ("first", "second")}
    base = base_of(tmp_path / "base", {**ones, "w.weight": Q})
    tensors = [
        initializer(f"m.layers.{n}.{norm}.weight", np.ones(24, "f4")) for norm in ("second", "first") for n in range(3)
    ]
    result = located(graph_of(tmp_path / "g.onnx", tensors), base)
    assert {piece.place.name for piece in result.pieces} == {f"m.{piece.weight.name}" for piece in result.pieces}
    assert len({piece.weight.name for piece in result.pieces}) == 6


def test_equal_values_are_told_apart_by_the_operators_beside_them(tmp_path: Path) -> None:
    zeros = {f"layers.{n}.q.bias": np.zeros(32, "f4") for n in range(2)}
    base = base_of(tmp_path / "base", {**zeros, "w.weight": Q})
    nodes = [
        helper.make_node("Add", ["x", "val_1"], ["a"], name="/layers.1/q/Add"),
        helper.make_node("Add", ["a", "val_2"], ["y"], name="/layers.0/q/Add"),
    ]
    tensors = [initializer(name, np.zeros(32, "f4")) for name in ("val_1", "val_2")]
    result = located(graph_of(tmp_path / "g.onnx", tensors, nodes), base)
    assert found_in(result) == {"val_1": "layers.1.q.bias", "val_2": "layers.0.q.bias"}


def found_in(result: Located) -> dict[str, str]:
    return {piece.place.name: piece.weight.name for piece in result.pieces}


def test_weights_that_share_a_tensor_are_told(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", {"a.weight": Q, "b.weight": Q})
    result = located(graph_of(tmp_path / "g.onnx", [initializer("b.w", Q)]), base)
    (piece,) = result.pieces
    assert (piece.weight.name, [weight.name for weight in piece.also]) == ("b.weight", ["a.weight"])
    assert not result.missing


def test_what_an_exporter_computes_is_named(tmp_path: Path, base: Path) -> None:
    angles = np.arange(200)[:, None] * 10000.0 ** (-np.arange(16) / 16)
    mask = np.triu(np.full((8, 8), -np.inf, "f4"), 1)
    tensors = [
        initializer("a", np.cos(angles).astype("f4")),
        initializer("b", np.sin(angles).astype("f2")),
        initializer("c", np.full((7, 9), 3, "f4")),
        initializer("d", (10000.0 ** (-np.arange(16) / 16)).astype("f4")),
        initializer("e", mask),
    ]
    result = located(graph_of(tmp_path / "g.onnx", tensors), base)
    assert result.tables == {
        "a": "rotary cosines", "b": "rotary sines", "c": "every value 3", "d": "rotary frequencies", "e": "mask",
    }  # fmt: skip


def test_the_verb_reports_what_it_found(tmp_path: Path, base: Path) -> None:
    path = graph_of(tmp_path / "g.onnx", [initializer(name, value.T) for name, value in WEIGHTS.items()], external=True)
    result = surgery.locate(path, base)
    assert result.complete
    assert result.as_json()["tensors"]["layers.1.o.weight"] == [{"weight": "layers.1.o.weight", "how": "transposed"}]
    text = result.summary(verbose=True).as_text()
    assert "18 of 18 weights, 100.00% of the values" in text


def test_another_base_is_doubted(tmp_path: Path) -> None:
    weights = random_weights({f"layers.{n}.weight": (24, 32) for n in range(4)})
    path = graph_of(tmp_path / "g.onnx", [initializer(name, value.T) for name, value in weights.items()])
    others = random_weights({name: value.shape for name, value in weights.items()}, seed=1)
    assert surgery.locate(path, base_of(tmp_path / "base", weights)).warnings == ()
    (warning,) = surgery.locate(path, base_of(tmp_path / "other", others)).warnings
    assert "another model" in warning
    assert "--adapter names what was merged" in warning
