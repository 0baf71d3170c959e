# SPDX-License-Identifier: Apache-2.0
"""What verbs take: paths or what was opened, one adapter or several, with weights in any of their spellings."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import surgery
from surgery_formats import open_checkpoint
from tests.support.kit import make_base, make_lora


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


@pytest.fixture
def style(tmp_path: Path) -> Path:
    return make_lora(tmp_path / "style")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


WEIGHTED: dict[str, Callable[[Path], Any]] = {
    "adapter times number": lambda path: surgery.open(path) * 0.5,
    "number times adapter": lambda path: 0.5 * surgery.open(path),
    "minus an adapter": lambda path: -surgery.open(path) * -0.5,
    "weights multiply": lambda path: surgery.open(path) * 2 * 0.25,
    "pair of path and weight": lambda path: (path, 0.5),
    "pair of text and weight": lambda path: (str(path), 0.5),
    "pair of adapter and weight": lambda path: (surgery.open(path), 0.5),
    "pair with a weighted adapter": lambda path: (surgery.open(path) * 0.25, 2),
    "list": lambda path: [(path, 0.5)],
    "generator": lambda path: (pair for pair in [(path, 0.5)]),
    "mapping": lambda path: {path: 0.5},
    "mapping of adapters": lambda path: {surgery.open(path): 0.5},
    "mapping of text": lambda path: {str(path): 0.5},
}


@pytest.mark.parametrize("spell", WEIGHTED.values(), ids=WEIGHTED)
def test_every_spelling_of_a_weight_writes_the_same_bytes(
    base: Path, style: Path, tmp_path: Path, spell: Callable[[Path], Any]
):
    surgery.merge(base, [(style, 0.5)], output=tmp_path / "expected")
    surgery.merge(base, spell(style), output=tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tmp_path / "expected")


@pytest.mark.parametrize("spell", WEIGHTED.values(), ids=WEIGHTED)
def test_combine_takes_the_same_spellings(style: Path, tmp_path: Path, spell: Callable[[Path], Any]):
    surgery.combine([(style, 0.5)], output=tmp_path / "expected")
    surgery.combine(spell(style), output=tmp_path / "combined")
    assert contents(tmp_path / "combined") == contents(tmp_path / "expected")


def test_a_tuple_of_two_adapters_is_two_adapters(base: Path, style: Path, tmp_path: Path):
    other = make_lora(tmp_path / "other", strength=0.5)
    surgery.merge(base, [style, other], output=tmp_path / "expected")
    surgery.merge(base, (style, other), output=tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tmp_path / "expected")


def test_what_was_opened_is_not_opened_again(base: Path, style: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, adapter = surgery.open(base), surgery.open(style)
    opened: list[str] = []
    really_open = os.open

    def recorded(path: str, *rest: int, **more: Any) -> int:
        opened.extend([os.fspath(path)] if os.fspath(path).endswith(".safetensors") else [])
        return really_open(path, *rest, **more)

    monkeypatch.setattr(os, "open", recorded)
    assert surgery.inspect(model).parameters
    assert surgery.inspect(adapter).parameters
    assert surgery.report([model, adapter]).adapters
    assert surgery.merge(model, adapter, dry_run=True).ledger.classes
    assert surgery.combine([adapter * 0.5], dry_run=True).modules
    assert not opened
    surgery.inspect(base)
    assert opened == [str(base / "model.safetensors")]


def test_every_verb_takes_what_was_opened(base: Path, style: Path, tmp_path: Path):
    model, adapter = surgery.open(base), surgery.open(style)
    surgery.merge(model, adapter, output=tmp_path / "merged")
    tuned = surgery.open(tmp_path / "merged")
    assert surgery.extract_lora(model, tuned, rank=4, output=tmp_path / "extracted").output
    assert surgery.convert(adapter, "mlx", output=tmp_path / "mlx", base=model).output
    assert surgery.resize(adapter, rank=2, output=tmp_path / "small").output
    assert not surgery.diff(model, tuned).equal
    assert surgery.diff(adapter, surgery.open(style)).equal
    assert surgery.verify(tmp_path / "merged", against=model).checks


def test_a_checkpoint_that_changed_since_it_was_opened_is_refused(base: Path, style: Path, tmp_path: Path):
    model = surgery.open(base)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    with pytest.raises(surgery.ProofError):
        surgery.merge(model, style, output=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


WRONG: list[tuple[str, Callable[[Path, Path], Any], str]] = [
    ("base", lambda base, style: surgery.merge(7, style, dry_run=True), "base is a path or a Checkpoint, not int"),
    ("adapter", lambda base, style: surgery.merge(base, None, dry_run=True), "adapters is a path, an Adapter,.* not NoneType"),
    ("bytes", lambda base, style: surgery.merge(base, b"lora", dry_run=True), "adapters is a path, an Adapter,.* not bytes"),
    ("one of several", lambda base, style: surgery.merge(base, [style, 5], dry_run=True), r"adapters\[1\] is .* not int"),
    ("weight", lambda base, style: surgery.merge(base, (style, None), dry_run=True), "weight of adapters is a number, not NoneType"),
    ("weight is a flag", lambda base, style: surgery.merge(base, (style, True), dry_run=True), "is a number, not bool"),
    ("text of a weight", lambda base, style: surgery.merge(base, {style: "0.5"}, dry_run=True), "is a number, not str"),
    ("output", lambda base, style: surgery.merge(base, style), "output is required"),
    ("output of a wrong type", lambda base, style: surgery.convert(style, "mlx", output=3), "output is a path, not int"),
    ("takes no weight here", lambda base, style: surgery.convert(surgery.open(style) * 2, "mlx", dry_run=True), "takes no weight here"),
    ("dtype", lambda base, style: surgery.merge(base, style, dtype=16, dry_run=True), "dtype is a name"),
    ("format", lambda base, style: surgery.convert(style, None, dry_run=True), "a format is named, .* not NoneType"),
    ("device", lambda base, style: surgery.merge(base, style, device=0, dry_run=True), "device is a name such as 'cuda:0', not int"),
    ("graph", lambda base, style: surgery.run(5, "text"), "model is a path, not int"),
    ("graphs", lambda base, style: surgery.bench(base, 5), "against is a path, not int"),
    ("token", lambda base, style: surgery.run(base, [1.5]), r"inputs\[0\] is neither a text nor a pair, a row"),
    ("new tokens", lambda base, style: surgery.run(base, "text", max_new="5"), "max_new is a whole number, not str"),
    ("sampling", lambda base, style: surgery.run(base, "text", sampling=0.5), "sampling is a surgery.Sampling, not float"),
    ("device of run", lambda base, style: surgery.run(base, "text", device=0), "device is a name such as 'cuda:0', not int"),
    ("temperature", lambda base, style: surgery.Sampling("hot"), "temperature is a number, not str"),
    ("seed", lambda base, style: surgery.Sampling(1.0, seed=0.5), "seed is a whole number, not float"),
    ("workers of merge", lambda base, style: surgery.merge(base, style, workers="2", dry_run=True), "workers is a whole number, not str"),
    ("workers of an extraction", lambda base, style: surgery.extract_lora(base, base, workers=2.0), "is a whole number, not float"),
    ("rows", lambda base, style: surgery.bench(base, batch="1"), "batch is a whole number, not str"),
    ("tasks", lambda base, style: surgery.report(style, tasks=1.5), "tasks is a whole number, not float"),
    ("no references", lambda base, style: surgery.report([]), "no model and no adapter was named"),
    ("workers is a flag", lambda base, style: surgery.merge(base, style, workers=True, dry_run=True), "is a whole number, not bool"),
    ("progress", lambda base, style: surgery.merge(base, style, progress=5, dry_run=True), "progress is a function .*, not int"),
    ("progress of a diff", lambda base, style: surgery.diff(base, base, progress="bar"), "progress is a function .*, not str"),
    ("engine", lambda base, style: surgery.merge(base, style, engine=3, dry_run=True), "engine is 'local', 'ray', .*, not int"),
    ("tolerance of verify", lambda base, style: surgery.verify(base, tolerance="x"), "tolerance is a number, not str"),
    ("tolerance of diff", lambda base, style: surgery.diff(base, base, tolerance=True), "tolerance is a number, not bool"),
    ("alpha", lambda base, style: surgery.extract_lora(base, base, alpha="x", dry_run=True), "alpha is a number, not str"),
    ("density", lambda base, style: surgery.combine(style, density="x", dry_run=True), "density is a number, not str"),
    ("seed of combine", lambda base, style: surgery.combine(style, seed=None, dry_run=True), "seed is a whole number, not NoneType"),
    ("flag", lambda base, style: surgery.merge(base, style, dry_run="yes"), "dry_run is True or False, not str"),
    ("on_text", lambda base, style: surgery.run(base, "text", on_text=5), "on_text is a function .*, not int"),
    ("prompt", lambda base, style: surgery.run(base, "text", prompt="no"), "prompt is True or False, not str"),
    ("inputs of run", lambda base, style: surgery.run(base, 5), "inputs are texts or rows of token ids, not int"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_a_wrong_type_is_one_clear_error(base: Path, style: Path, call: Callable[[Path, Path], Any], message: str):
    with pytest.raises(surgery.UsageError, match=message) as caught:
        call(base, style)
    assert isinstance(caught.value, TypeError)
    assert caught.value.exit_code == 2


TOO_SMALL: dict[str, Callable[[Path, Path], Any]] = {
    "workers is 0; it is at least 1": lambda base, style: surgery.merge(base, style, workers=0, dry_run=True),
    "workers is -1; it is at least 1": lambda base, style: surgery.extract_lora(base, base, rank=1, workers=-1),
    "tasks is 0; it is at least 1": lambda base, style: surgery.report(style, tasks=(1, 0)),
    "max_new is -1; it is at least 0": lambda base, style: surgery.run(base, "text", max_new=-1),
    "batch is 0; it is at least 1": lambda base, style: surgery.bench(base, batch=0),
}


@pytest.mark.parametrize("message", TOO_SMALL)
def test_a_number_that_is_too_small_is_named(base: Path, style: Path, message: str):
    with pytest.raises(surgery.FitError, match=message):
        TOO_SMALL[message](base, style)


def test_an_opened_adapter_is_no_base_and_a_model_no_adapter(base: Path, style: Path):
    with pytest.raises(surgery.FitError, match="an adapter where a full model was expected"):
        surgery.merge(surgery.open(style), style, dry_run=True)
    with pytest.raises(surgery.FitError, match="a full model where an adapter was expected"):
        surgery.merge(base, surgery.open(base), dry_run=True)


@pytest.mark.parametrize("adapter", ["examples/lora", "tests/golden/mlx/llama/dora"])
def test_the_folder_of_an_adapter_is_no_base(style: Path, adapter: str):
    with pytest.raises(surgery.FitError, match="an adapter where a full model was expected"):
        surgery.merge(adapter, style, dry_run=True)


def test_the_folder_of_an_adapter_is_no_checkpoint() -> None:
    with pytest.raises(surgery.FitError, match="an adapter where a full model was expected"):
        open_checkpoint("examples/lora")


@pytest.mark.parametrize(
    ("device", "message"), [("cudda", "'cudda' is no device"), ("cpu,cpu", "more than one device")]
)
def test_a_device_is_checked_before_anything_is_read(tmp_path: Path, device: str, message: str):
    with pytest.raises(surgery.FitError, match=message):
        surgery.merge(tmp_path / "never", tmp_path / "read", device=device, dry_run=True)


NUMPY: dict[str, Callable[[Path, Path], surgery.Result]] = {
    "rank": lambda base, style: surgery.resize(style, rank=np.int64(1), dry_run=True),
    "density and seed": lambda base, style: surgery.combine(
        style, method="dare-linear", density=np.float32(0.5), seed=np.int64(3), rank=2, output=style.parent / "out"
    ),
    "energy": lambda base, style: surgery.resize(style, rank=surgery.Rank.energy(np.float32(0.5)), dry_run=True),
    "workers": lambda base, style: surgery.merge(base, style, workers=np.int64(1), dry_run=True),
    "weight": lambda base, style: surgery.merge(base, (style, np.float32(0.5)), dry_run=True),
    "tasks": lambda base, style: surgery.report(style, base=base, tasks=[np.int64(3), 4]),
    "one number of tasks": lambda base, style: surgery.report(style, base=base, tasks=np.int64(3)),
}


@pytest.mark.parametrize("call", NUMPY.values(), ids=NUMPY)
def test_numbers_of_numpy_become_python_s(base: Path, style: Path, call: Callable[[Path, Path], surgery.Result]):
    result = call(base, style)
    assert json.dumps(result.as_json())
    assert "np." not in repr(result)
