# SPDX-License-Identifier: Apache-2.0
"""Textual inversions: each layout is read, shown, converted to the other, and refused where weights are asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from surgery import combine, convert, diff, inspect, merge, resize
from surgery_formats.adapters.format import Format
from surgery_formats.adapters.registry import format_at, read_adapter
from surgery_formats.adapters.textual_inversion import EMBEDDING, LEARNED_EMBEDS
from surgery_formats.errors import FitError
from surgery_formats.testing.format import FORMAT_CHECKS, FormatCase
from tests.support.adapter_files import GOLDEN, draw, write_base

FOLDER = GOLDEN / "textual_inversion"
CASES: dict[str, dict[str, str]] = json.loads((FOLDER / "expected.json").read_text())["cases"]


@pytest.mark.parametrize("name", CASES)
def test_it_holds_what_its_program_reads(name: str) -> None:
    adapter = read_adapter(FOLDER / name)
    case = CASES[name]
    assert (adapter.format, adapter.config["token"], adapter.unconsumed()) == (case["format"], case["token"], ())
    wanted = load_file(FOLDER / "expected.safetensors")
    for site, (update,) in adapter.updates.items():
        rows = wanted[f"{name}/{site.component}"]
        assert np.array_equal(update.factors()["rows"].load(None), rows.reshape(update.shape))
    assert len(adapter.updates) == sum(key.startswith(f"{name}/") for key in wanted)
    report = inspect(FOLDER / name)
    assert (report.kinds, report.token) == ({"token embedding": len(adapter.updates)}, case["token"])
    assert case["token"] in str(report)


@pytest.mark.parametrize("name", [name for name in CASES if "xl" not in name])
def test_each_layout_becomes_the_other_and_keeps_its_token(name: str, tmp_path: Path) -> None:
    token = CASES[name]["token"]
    first, second = tmp_path / "learned_embeds.safetensors", tmp_path / "any.safetensors"
    convert(FOLDER / name, "learned-embeds", output=first)
    assert list(load_file(first)) == [token]
    convert(first, "embedding", output=second)
    assert list(load_file(second)) == ["emb_params"]
    with safe_open(second, "numpy") as file:
        assert file.metadata()["token"] == token
    assert read_adapter(second).config["token"] == token
    (update,) = next(iter(read_adapter(FOLDER / name).updates.values()))
    assert np.array_equal(load_file(second)["emb_params"], update.factors()["rows"].load(None))


def test_of_two_encoders_diffusers_has_a_file_each(tmp_path: Path) -> None:
    with pytest.raises(FitError, match="the rows for one text encoder") as caught:
        convert(FOLDER / "xl.safetensors", "learned-embeds", output=tmp_path / "x.safetensors")
    assert caught.value.hint == "choose one with `component=`: text_encoder, text_encoder_2"
    wanted = load_file(FOLDER / "xl.safetensors")
    for component, key in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
        out = tmp_path / f"{key}.safetensors"
        convert(FOLDER / "xl.safetensors", "learned-embeds", output=out, component=component)
        assert np.array_equal(load_file(out)["xl"], wanted[key])
    convert(FOLDER / "xl.safetensors", "embedding", output=tmp_path / "again.safetensors")
    assert load_file(tmp_path / "again.safetensors").keys() == {"clip_l", "clip_g"}


def test_two_that_differ_do_not_differ_by_nothing(tmp_path: Path) -> None:
    a, b = ({"emb_params": draw(seed, 2, 768)} for seed in (1, 2))
    for name, tensors in (("a", a), ("b", b), ("c", a)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    found = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert not found.equal
    assert found.difference is None
    assert "of A's norm" not in str(found.summary())
    assert diff(tmp_path / "a.safetensors", tmp_path / "c.safetensors").equal


def test_no_weight_can_hold_them(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"model.embed_tokens.weight": (8, 768)}, {})
    for name in CASES:
        with pytest.raises(FitError, match="does not know"):
            merge(base, FOLDER / name, output=tmp_path / "out")
        with pytest.raises(FitError, match="token embedding"):
            convert(FOLDER / name, "comfyui", output=tmp_path / "x.safetensors")


CHECKS = {check.__name__: check for check in FORMAT_CHECKS}
HELD = (
    "detects_its_own",
    "is_silent_about_foreign_files",
    "accounts_for_every_tensor",
    "names_what_it_drops",
    "renders_the_same_twice",
)


@pytest.mark.parametrize("check", HELD)
@pytest.mark.parametrize("format", [EMBEDDING, LEARNED_EMBEDS], ids=lambda format: format.name)
def test_it_conforms_as_far_as_weights_are_not_asked_for(format: Format, check: str, tmp_path: Path) -> None:
    name = next(name for name, case in CASES.items() if case["format"] == format.name and "pt" not in name)

    def copied(folder: Path) -> Path:
        return Path(shutil.copy(FOLDER / name, folder))

    CHECKS[check](FormatCase(format, copied), tmp_path)


def test_other_single_tensors_are_none(tmp_path: Path) -> None:
    for tensors in ({"weight": draw(1, 4, 8)}, {"a.b": draw(1, 768)}, {"weight": draw(1, 300, 768)}):
        save_file(tensors, tmp_path / "x.safetensors")
        assert format_at(tmp_path / "x.safetensors") is None


def test_it_is_said_what_it_is_written_as(tmp_path: Path) -> None:
    """Neither a base nor a rank makes a weight of a token's rows."""
    one, two = FOLDER / "fluffy.safetensors", FOLDER / "xl.safetensors"
    for target in ("kohya", "peft", "mlx", "gguf"):
        with pytest.raises(FitError) as caught:
            convert(one, target, output=tmp_path / "x")
        assert str(caught.value.hint).startswith('a textual inversion is written as `to="embedding"`')
    for verb in (lambda: resize(two, rank=1, dry_run=True), lambda: combine([one, one], dry_run=True)):
        with pytest.raises(FitError, match="rows for a new token") as caught:
            verb()
        assert "load_textual_inversion" in str(caught.value.hint)
