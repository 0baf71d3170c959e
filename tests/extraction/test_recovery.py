# SPDX-License-Identifier: Apache-2.0
"""The recovery of an extraction is that of transformers and PEFT, is in all that is written, and is defined or refused."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import surgery
from examples.evaluate import load, nats
from surgery.extraction.recovery import LEAST_GAIN, least_gain
from surgery.reports.sections import Chart
from surgery.verbs import extract_lora as verb
from surgery_cli.group import surgery as command
from surgery_formats.errors import FitError, InputError, NotFoundError, SurgeryError
from tests.oracles import recipes
from tests.support.kit import ROOT
from tests.support.page_reader import check_page

EXAMPLES = ROOT / "examples"
BASE, TUNED = EXAMPLES / "base", EXAMPLES / "tuned"
BYTES = 1200


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "excerpt.txt"
    path.write_bytes((EXAMPLES / "heldout" / "target.txt").read_bytes()[:BYTES])
    return path


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory, text: Path) -> surgery.ExtractResult:
    output = tmp_path_factory.mktemp("extracted") / "lora"
    return surgery.extract_lora(BASE, TUNED, rank=8, table=True, eval=text, output=output)


def folder_of(result: surgery.ExtractResult) -> Path:
    assert result.output is not None
    return result.output


def test_it_is_that_of_transformers_and_peft(extracted: surgery.ExtractResult, text: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    base, adapter, tuned = (
        nats(load(folder, BASE), ids, tokenizer.bos_token_id) / math.log(2) / BYTES
        for folder in (BASE, folder_of(extracted), TUNED)
    )
    found = extracted.recovery
    assert found is not None
    assert found.tokens == len(ids)
    bits = found.base.bits_per_byte, found.adapter.bits_per_byte, found.tuned
    assert bits == pytest.approx((base, adapter, tuned), abs=1e-5)
    assert found.recovered == pytest.approx((base - adapter) / (base - tuned), abs=1e-4)
    assert 0.2 < found.recovered < 0.8


def test_divergence_and_agreement_are_those_of_eval(extracted: surgery.ExtractResult, text: Path) -> None:
    found = surgery.eval(BASE, adapters=folder_of(extracted), against=TUNED, text=text)
    recovery = extracted.recovery
    assert recovery is not None
    assert (recovery.adapter.divergence, recovery.adapter.agreement) == (found.divergence, found.agreement)
    assert recovery.base.divergence > recovery.adapter.divergence
    assert recovery.base.agreement < recovery.adapter.agreement


def test_a_rank_of_the_table_recovers_what_its_extraction_does(extracted: surgery.ExtractResult, text: Path) -> None:
    shares = {choice.rank: choice.recovered for choice in extracted.table if choice.layers == "all"}
    assert extracted.recovery is not None
    assert shares[8] == pytest.approx(extracted.recovery.recovered, abs=1e-9)
    alone = surgery.extract_lora(BASE, TUNED, rank=32, kind="lora", eval=text, dry_run=True)
    assert alone.recovery is not None
    assert shares[32] == pytest.approx(alone.recovery.recovered, abs=1e-4)
    assert list(shares.values()) == sorted(shares.values())  # type: ignore[type-var]
    assert all(choice.score is None for choice in extracted.table if choice.layers in ("attention", "mlp"))


def test_measuring_changes_no_byte_of_the_adapter(extracted: surgery.ExtractResult, tmp_path: Path) -> None:
    surgery.extract_lora(BASE, TUNED, rank=8, output=tmp_path / "out")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder_of(extracted) / name).read_bytes()
    surgery.verify(folder_of(extracted))


def test_it_is_in_all_that_is_shown_and_written(extracted: surgery.ExtractResult, text: Path) -> None:
    recovery = extracted.recovery
    assert recovery is not None
    assert recovery.recovered is not None
    share, bits = f"{recovery.recovered:.1%}", f"{recovery.adapter.bits_per_byte:.4f}"
    summary = extracted.summary()
    said = str(summary)
    assert f"{share} of what TUNED gains on the text" in said
    assert str(text) in said
    page = check_page(summary.as_html())
    assert {share, bits} <= {cell.text for cell in page.all("td")}
    (chart,) = [section for section in summary.sections if isinstance(section, Chart) and "by rank" in section.title]
    assert chart.title == "Missing of the whole change, and recovered on the text, by rank and size"
    assert [row[6] for row in chart.table.rows] == [choice.recovered for choice in extracted.table]
    assert said.count("missing of all") == 1, "one table has both"
    ranks = {choice.rank: choice.recovered or 0.0 for choice in extracted.table if choice.layers == "all"}
    least = min(rank for rank, share in ranks.items() if share >= 0.9 * max(ranks.values()))
    assert f"rank {least} recovers {ranks[least]:.1%} on the text" in said
    card = (folder_of(extracted) / "README.md").read_text()
    assert f"| base with this adapter | {bits} | {share} |" in card
    recorded = json.loads((folder_of(extracted) / "surgery_manifest.json").read_text())["recovery"]
    assert recorded == extracted.as_json()["recovery"] == recovery.as_json()
    assert recorded["recovered"] == pytest.approx(recovery.recovered, rel=1e-5)
    assert str(text) not in card + json.dumps(recorded)


def test_codes_and_what_a_format_lacks_are_measured_as_they_are_read_back(text: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"rank": 4, "eval": text}
    codes = surgery.extract_lora(BASE, TUNED, factors="int4", table=True, output=tmp_path / "int4", **asked)
    without = surgery.extract_lora(BASE, TUNED, to="mlx", allow_loss=True, output=tmp_path / "mlx", **asked)
    plain = surgery.extract_lora(BASE, TUNED, factors="int4", dry_run=True, **asked)
    found = [result.recovery.adapter.bits_per_byte for result in (codes, without, plain) if result.recovery]
    assert len(set(found)) == 3
    for result, bits in zip((codes, without), found, strict=False):
        assert bits == surgery.eval(BASE, adapters=folder_of(result), text=text).bits_per_byte
    assert any("ranks of the table were not evaluated" in warning for warning in codes.warnings)
    assert any("a dry run makes no compact" in warning for warning in plain.warnings)


def test_a_fine_tune_that_gained_nothing_has_no_share_of_it(tmp_path: Path) -> None:
    source = tmp_path / "source.txt"
    source.write_bytes((EXAMPLES / "heldout" / "source.txt").read_bytes()[:BYTES])
    result = surgery.extract_lora(BASE, TUNED, rank=4, eval=source, output=tmp_path / "out")
    assert result.recovery is not None
    assert result.recovery.gain < 0
    assert result.recovery.recovered is None
    assert "not defined: TUNED does not predict the text clearly better than BASE" in str(result.summary())
    assert result.as_json()["recovery"]["recovered"] is None
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| fine-tune | {result.recovery.tuned:.4f} |  | 0 | 100.0% |" in card


@given(st.integers(2, 60), st.integers(0, 2**32 - 1), st.integers(1, 1000))
def test_the_least_gain_is_three_standard_errors_of_the_sum(tokens: int, seed: int, nbytes: int) -> None:
    each = np.random.default_rng(seed).normal(size=tokens)
    error = each.std(ddof=1) * math.sqrt(tokens) / math.log(2) / nbytes
    found = least_gain(each.sum(), (each**2).sum(), tokens, nbytes)
    assert found == pytest.approx(max(LEAST_GAIN, 3 * error))


def test_one_token_and_equal_models_show_no_gain() -> None:
    assert least_gain(1.0, 1.0, 1, 4) == math.inf
    assert least_gain(0.0, 0.0, 10, 40) == LEAST_GAIN


def linked(folder: Path, model: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        os.link(model / name, folder / name)
    return folder


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def scan(*_: Any) -> None:
        raise AssertionError("the checkpoints were compared")

    monkeypatch.setattr(verb, "scan", scan)


@pytest.mark.usefixtures("no_work")
def test_what_cannot_be_evaluated_is_refused_before_anything_is_compared(text: Path, tmp_path: Path) -> None:
    def refused(base: Path, tuned: Path, kind: type[SurgeryError], said: str, on: Path = text) -> None:
        with pytest.raises(kind, match=said):
            surgery.extract_lora(base, tuned, eval=on, dry_run=True)

    refused(BASE, TUNED, InputError, "No such file", tmp_path / "nowhere")
    blank = tmp_path / "blank"
    blank.write_text("\n")
    refused(BASE, TUNED, FitError, "there is no text", blank)
    weights = ("config.json", "model.safetensors")
    bare = linked(tmp_path / "bare", BASE, *weights), linked(tmp_path / "bare-tuned", TUNED, *weights)
    refused(*bare, NotFoundError, r"no tokenizer\.json")
    other = linked(tmp_path / "other", TUNED, *weights)
    tokenizer = json.loads((BASE / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    first, second = list(words)[300:302]
    words[first], words[second] = words[second], words[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(BASE, other, FitError, "different vocabularies")
    encoder = recipes.build("modernbert_mask", tmp_path / "encoder")
    refused(encoder, encoder, FitError, "predicts no next token")
    unknown = tmp_path / "unknown"
    shutil.copytree(BASE, unknown)
    (unknown / "config.json").write_text(json.dumps({"model_type": "nobodys", "architectures": ["NobodysForCausalLM"]}))
    refused(unknown, unknown, FitError, "nobodys")


def test_the_command_says_what_was_measured_and_where(text: Path, tmp_path: Path) -> None:
    words = ["extract-lora", str(BASE), str(TUNED), "--rank", "4", "--dry-run", "--eval", str(text)]
    page = tmp_path / "page.html"
    quiet = CliRunner().invoke(command, [*words, "-q", "--html", str(page)])
    assert (quiet.exit_code, quiet.stderr) == (0, "")
    assert "recovered on the text, by rank" in page.read_text()
    as_json = json.loads(CliRunner().invoke(command, [*words, "--json"]).stdout)["result"]
    assert 0 < as_json["recovery"]["recovered"] < 1
    missing = CliRunner().invoke(command, [*words[:-1], str(tmp_path / "nix")])
    assert missing.exit_code == 3
    assert "nix: No such file" in missing.stderr
