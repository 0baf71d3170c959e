# SPDX-License-Identifier: Apache-2.0
"""Outputs of a recipe that would meet are refused before its first step writes anything."""

from __future__ import annotations

from pathlib import Path

import pytest

import surgery
from surgery_formats.errors import UsageError
from tests.support.small_world import make_world

MERGE = "{{verb: merge, base: {base}, adapters: {lora}, as: first, output: {output}}}"
SECOND = "{{verb: {verb}, base: {base}, {rest}output: {output}}}"
REST = {"merge": "adapters: lora2, ", "export-onnx": ""}


@pytest.mark.parametrize(
    ("first", "second", "verb", "base", "says"),
    [
        ("out", "out", "merge", "base", "is an output of step 1"),
        ("out", "./out", "merge", "base", "is an output of step 1"),
        ("out", "link/out", "merge", "base", "is an output of step 1"),
        ("out", "out/inner", "merge", "base", "lie in one another"),
        ("outer/out", "outer", "merge", "base", "lie in one another"),
        ("out", "out", "export-onnx", "base", "is an output of step 1"),
        ("out", "out", "export-onnx", "first", ""),
        ("out", "out2", "merge", "base", ""),
    ],
)
def test_outputs_that_meet(
    first: str, second: str, verb: str, base: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_world(tmp_path / "in")
    place = tmp_path / "place"
    place.mkdir()
    (place / "link").symlink_to(".")
    monkeypatch.chdir(place)
    inputs = ", ".join(f"{name}: {tmp_path}/in/{name}" for name in ("base", "lora", "lora2"))
    steps = (
        MERGE.format(base="base", lora="lora", output=first),
        SECOND.format(verb=verb, base=base, rest=REST[verb], output=second),
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"inputs: {{{inputs}}}\nsteps:\n  - {steps[0]}\n  - {steps[1]}\n")
    if not says:
        assert surgery.apply(recipe).output == Path(second)
        return
    with pytest.raises(UsageError, match=says):
        surgery.apply(recipe)
    assert [path.name for path in place.iterdir()] == ["link"]
