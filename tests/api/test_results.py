# SPDX-License-Identifier: Apache-2.0
"""Every result has the same members, prints in one line, and puts neither time nor path into what it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import surgery
from surgery.reports.summary import Summary
from tests.support.kit import ROOT, make_base, make_lora

EXAMPLES = ROOT / "examples"
GRAPHS = ROOT / "tests" / "golden" / "onnx_graphs"
BASE, TUNED, LORA, DORA, PROMPT = (EXAMPLES / name for name in ("base", "tuned", "lora", "dora", "prompt"))

WRITERS: dict[str, Callable[[Path | None], Any]] = {
    "merge": lambda out: surgery.merge(BASE, LORA, output=out, dry_run=out is None),
    "extract_lora": lambda out: surgery.extract_lora(BASE, TUNED, rank=2, output=out, dry_run=out is None),
    "convert": lambda out: surgery.convert(LORA, "compact", output=out, dry_run=out is None),
    "convert a graph": lambda out: surgery.convert(
        GRAPHS / "optimum-bert", "safetensors", output=out, dry_run=out is None
    ),
    "layers": lambda out: surgery.layers(BASE, drop="1", output=out, dry_run=out is None),
    "combine": lambda out: surgery.combine([(LORA, 0.5)], output=out, dry_run=out is None),
    "prompt_bake": lambda out: surgery.prompt_bake(PROMPT, BASE, output=out, dry_run=out is None),
    "prompt_bake, kv": lambda out: surgery.prompt_bake(PROMPT, BASE, form="kv", output=out, dry_run=out is None),
    "prompt_combine": lambda out: surgery.prompt_combine([PROMPT, PROMPT], output=out, dry_run=out is None),
    "prompt_convert": lambda out: surgery.prompt_convert(PROMPT, "p-tuning", output=out, dry_run=out is None),
    "prompt_transfer": lambda out: surgery.prompt_transfer(PROMPT, BASE, onto=TUNED, output=out, dry_run=out is None),
    "resize": lambda out: surgery.resize(LORA, rank=2, output=out, dry_run=out is None),
}
LOOKERS: dict[str, Callable[[], Any]] = {
    "inspect a model": lambda: surgery.inspect(BASE),
    "inspect an adapter": lambda: surgery.inspect(LORA),
    "diff of models": lambda: surgery.diff(BASE, TUNED),
    "fingerprint": lambda: surgery.fingerprint([BASE, TUNED], against=BASE),
    "inspect a graph": lambda: surgery.inspect(GRAPHS / "optimum-bert"),
    "diff of graphs": lambda: surgery.diff(GRAPHS / "optimum-bert", GRAPHS / "script-bert"),
    "diff of adapters": lambda: surgery.diff(LORA, DORA),
    "report": lambda: surgery.report(LORA, base=BASE),
    "show of a prompt": lambda: surgery.prompt_show(PROMPT, base=BASE),
    "tokens near a prompt": lambda: surgery.prompt_nearest(PROMPT, BASE, sample=50),
    "what a prompt does": lambda: surgery.prompt_nearest(PROMPT, BASE, by="effect", texts=[0, 5, 6, 7]),
    "formats": surgery.formats,
    "env": surgery.env,
}


def check(result: Any) -> None:
    assert isinstance(result, surgery.Result)
    assert isinstance(result.warnings, tuple)
    assert all(isinstance(text, str) for text in result.warnings)
    assert result.seconds > 0
    assert isinstance(result.nbytes, int)
    json.dumps(result.as_json(), allow_nan=False)
    assert isinstance(result.summary(), Summary)
    assert len(repr(result)) < 400
    assert "\n" not in repr(result)


@pytest.mark.parametrize("verb", WRITERS)
def test_what_writes_has_an_output_bytes_and_seconds(verb: str, tmp_path: Path):
    result = WRITERS[verb](tmp_path / "out")
    check(result)
    assert result.output == tmp_path / "out"
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert 0 < result.nbytes <= written
    assert result.as_json()["seconds"] == round(result.seconds, 3)
    assert result.as_json()["nbytes"] == result.nbytes
    assert result.as_json()["output"] == str(tmp_path / "out")


@pytest.mark.parametrize("verb", WRITERS)
def test_a_dry_run_has_no_output(verb: str):
    result = WRITERS[verb](None)
    check(result)
    assert result.output is None
    assert result.as_json()["output"] is None


@pytest.mark.parametrize("verb", WRITERS)
def test_times_and_places_are_in_no_file(verb: str, tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        WRITERS[verb](tmp_path / name / "out")
    one, two = (sorted((tmp_path / name / "out").rglob("*")) for name in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two]
    for first, second in zip(one, two, strict=True):
        assert first.is_dir() or first.read_bytes() == second.read_bytes()
        assert first.is_dir() or str(tmp_path).encode() not in first.read_bytes()


@pytest.mark.parametrize("verb", LOOKERS)
def test_what_looks_is_the_same_twice_and_takes_its_time(verb: str):
    result = LOOKERS[verb]()
    check(result)
    assert LOOKERS[verb]() == result, "seconds are not compared"
    assert "seconds" not in result.as_json()


def test_a_graph_has_the_same_members(tmp_path: Path):
    exported = surgery.export_onnx(surgery.open(BASE), merge=LORA, bake_prompt="def main", output=tmp_path / "out")
    check(exported)
    assert [adapter["mode"] for adapter in exported.contract.adapters] == ["merged", "prefix"]
    check(surgery.verify(tmp_path / "out", against=BASE, adapters=LORA))
    check(ran := surgery.run(tmp_path / "out", "import os", device="cpu", max_new=2))
    assert len(ran.texts) == 1
    assert surgery.run(tmp_path / "out", list(ran.texts[0].prompt), device="cpu", max_new=2).texts == ran.texts
    check(surgery.bench(tmp_path / "out", device="cpu", prompt_length=4, new_tokens=2))


def test_a_merge_warns_of_an_adapter_of_another_base(tmp_path: Path):
    base = make_base(tmp_path / "base")
    adapter = make_lora(tmp_path / "lora", base_model_name_or_path="another/model")
    warnings = surgery.merge(base, adapter, dry_run=True).warnings
    assert any("another/model" in text for text in warnings)
