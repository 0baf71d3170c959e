# SPDX-License-Identifier: Apache-2.0
"""A recipe that was killed goes on at the step that was not finished, and keeps of the others only what is proved to be theirs."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

import surgery
from surgery.recipes.apply_result import Done, Place
from surgery.recipes.recipe import Step
from surgery.recipes.resuming import JOURNAL
from surgery.verbs.apply import _Runner
from tests.support.applied_recipes import files_of, write

BETWEEN = """\
steps:
  - {verb: convert, adapter: examples/lora, to: mlx, as: small}
  - {verb: merge, base: examples/base, adapters: small, output: merged}
"""
TWO = """\
steps:
  - {verb: resize, adapter: examples/lora, rank: 2, as: small, output: small}
  - {verb: merge, base: examples/base, adapters: small, output: merged}
"""
BESIDE = """\
steps:
  - {verb: merge, base: examples/base, adapters: examples/lora, as: model, output: merged, dtype: fp32}
  - {verb: export-onnx, base: model, output: merged}
"""
MOVED = """\
steps:
  - {verb: layers, base: examples/base, drop: 2, adapter: examples/lora, as: short, dtype: fp32}
  - {verb: merge, base: short, adapters: short.adapter, output: merged}
"""
FIRST = {BETWEEN: "convert", TWO: "resize", BESIDE: "merge", MOVED: "layers"}
LAST = {BETWEEN: "merge", TWO: "merge", BESIDE: "export_onnx", MOVED: "merge"}


def _replace(patch: pytest.MonkeyPatch, verb: str, does: Callable[[], object]) -> None:
    """Let a verb do something else; its parameters stay."""
    place = f"surgery.verbs.{verb}"
    patch.setattr(f"{place}.{verb}", functools.wraps(getattr(import_module(place), verb))(lambda *_, **__: does()))


def _killed(recipe: str, at: str) -> None:
    """Apply the recipe in a process that dies when a verb is called."""
    pid = os.fork()
    if not pid:
        with pytest.MonkeyPatch.context() as patch:
            _replace(patch, at, lambda: os.kill(os.getpid(), signal.SIGKILL))
            try:
                surgery.apply(recipe)
            finally:
                os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


def _fails() -> None:
    raise AssertionError("done again")


def _folder() -> Path:
    (folder,) = Path().glob(".merged.surgery-*")
    return folder


@pytest.mark.parametrize("text", FIRST, ids=["between", "two", "beside", "moved"])
def test_finished_steps_are_not_done_again(text: str, kitchen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write(text)
    surgery.apply(recipe)
    undisturbed = {name: files_of(Path(name)) for name in ("small", "merged") if Path(name).exists()}
    for name in undisturbed:
        Path(name).rename(f"{name}-before")
    _killed(recipe, LAST[text])
    assert (_folder() / JOURNAL).read_text().count("\n{") == 1
    _replace(monkeypatch, FIRST[text], _fails)
    result = surgery.apply(recipe)
    assert [step.kept for step in result.steps] == [True, False]
    assert "a run that was killed had finished: steps 1" in str(result)
    assert {name: files_of(Path(name)) for name in undisturbed} == undisturbed
    assert not list(kitchen.glob(".*surgery*"))


def test_all_steps_of_a_recipe_that_was_killed_at_its_end_are_kept(
    kitchen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, do = write(TWO), _Runner.do

    def dies_behind_the_last(runner: _Runner, step: Step, place: Place) -> Done:
        done = do(runner, step, place)
        return done if step.number == 1 else os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[return-value]

    if not (pid := os.fork()):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("surgery.verbs.apply._Runner.do", dies_behind_the_last)
            try:
                surgery.apply(recipe)
            finally:
                os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert len(list(kitchen.glob(".merged.surgery-*"))) == 1
    _replace(monkeypatch, "resize", _fails)
    _replace(monkeypatch, "merge", _fails)
    assert [step.kept for step in surgery.apply(recipe).steps] == [True, True]
    assert not list(kitchen.glob(".*surgery*"))


def _touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def _change_byte(path: Path) -> None:
    """Change a byte of a file, and nothing that `stat` tells."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _weights() -> Path:
    return next((_folder() / "small").glob("*.safetensors"))


@pytest.mark.parametrize(
    "differ",
    [
        pytest.param(lambda: _touch(Path("examples/lora/adapter_model.safetensors")), id="input touched"),
        pytest.param(lambda: Path("examples/lora/more.txt").write_text("more"), id="file added to an input"),
        pytest.param(lambda: _touch(_weights()), id="result touched"),
        pytest.param(lambda: _change_byte(_weights()), id="byte of a result"),
        pytest.param(lambda: _change_byte(_folder() / "small/surgery_manifest.json"), id="manifest of a result"),
        pytest.param(lambda: (_folder() / "small/more").write_bytes(b""), id="file added to a result"),
        pytest.param(lambda: write(BETWEEN.replace("to: mlx", "to: mlx, dtype: bf16")), id="argument"),
        pytest.param(lambda: (_folder() / JOURNAL).write_bytes(b'\n{"id": "'), id="journal torn"),
        pytest.param(lambda: (_folder() / JOURNAL).write_bytes(b'[]\n{"id":1,"outputs":[1],"warnings":0}'), id="junk"),
    ],
)
def test_what_differs_is_done_again(differ: Callable[[], object], kitchen: Path) -> None:
    recipe = write(BETWEEN)
    _killed(recipe, "merge")
    differ()
    result = surgery.apply(recipe)
    assert not any(step.kept for step in result.steps)
    result_of = files_of(Path("merged"))
    Path("merged").rename("before")
    surgery.apply(recipe)
    assert files_of(Path("merged")) == result_of
    assert not list(kitchen.glob(".*surgery*"))


def test_a_step_with_another_weight_is_done_again(kitchen: Path) -> None:
    text = TWO.replace("resize, adapter: examples/lora, rank: 2", "combine, adapters: {examples/lora: 0.5}")
    recipe = write(text)
    _killed(recipe, "merge")
    write(text.replace("0.5", "0.7"))
    assert [step.kept for step in surgery.apply(recipe, overwrite=True).steps] == [False, False]


def test_another_version_does_all_again(kitchen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write(BETWEEN)
    _killed(recipe, "merge")
    monkeypatch.setattr("surgery.recipes.resuming.__version__", "0.0.0")
    assert not any(step.kept for step in surgery.apply(recipe).steps)


def test_an_output_that_is_another_now_is_refused(kitchen: Path) -> None:
    recipe = write(TWO)
    _killed(recipe, "merge")
    _change_byte(next(Path("small").glob("*.safetensors")))
    with pytest.raises(surgery.OutputExistsError, match="already exists"):
        surgery.apply(recipe)
    assert not Path("merged").exists()
    assert not list(kitchen.glob(".*surgery*"))


def test_two_at_once_on_one_output(kitchen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write(TWO)

    def meets() -> None:
        with pytest.raises(surgery.OutputExistsError, match="another process is writing it"):
            surgery.apply(recipe)
        raise KeyboardInterrupt

    _replace(monkeypatch, "resize", meets)
    with pytest.raises(KeyboardInterrupt):
        surgery.apply(recipe)
    assert not list(kitchen.glob(".*surgery*"))


def test_a_place_that_is_not_there_is_told_before_the_first_step(
    kitchen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _replace(monkeypatch, "convert", _fails)
    with pytest.raises(surgery.NotFoundError, match="no such folder to write into"):
        surgery.apply(write(BETWEEN), output="missing/merged")
