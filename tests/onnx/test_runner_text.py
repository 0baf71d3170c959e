# SPDX-License-Identifier: Apache-2.0
"""From text to text: the shipped example through exporter and runner matches transformers, token by token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import surgery
from surgery.onnx.graph.build import GraphOptions, build
from surgery.onnx.graph.target import TARGETS, twin
from surgery.onnx.run.generate import generate
from surgery.onnx.run.inputs import said
from surgery.onnx.run.sampling import Sampling
from surgery.onnx.run.tokenizer import Tokenizer
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, InputError
from surgery_formats.models.checkpoint import open_checkpoint
from tests.support.kit import ROOT, spawn
from tests.support.onnx_files import write_adapter_file

BASE = ROOT / "examples" / "base"
TEXTS = ["The function returns", "import os", "A class"]
NEW = 12


@pytest.fixture(scope="module", params=["cpu", "cuda", "portable"])
def folder(request, tmp_path_factory) -> Path:
    """The example exported for each target, in fp32 so that it runs on the cpu, with its tokenizer beside it."""
    out = tmp_path_factory.mktemp(request.param) / "out"
    shutil.copytree(BASE, out)
    built = build(open_checkpoint(out).main, GraphOptions(twin(TARGETS[request.param]), DType.F32))
    for name, model in built.graphs.items():
        (out / name).write_bytes(model.data)
    return out


@pytest.fixture(scope="module")
def expected() -> list[tuple[str, list[int]]]:
    """Greedy texts and tokens by transformers, one text at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    found = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        new = model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :].tolist()
        kept = new[: new.index(1)] if 1 in new else new  # 1 ends a text
        found.append((tokenizer.decode(kept, skip_special_tokens=True), kept))
    return found


@pytest.mark.parametrize("which", [[0], [0, 1, 2]], ids=["one", "a batch"])
def test_greedy_text_matches_transformers(folder, expected, which):
    heard: list[str] = [""] * len(which)

    def on_text(row, text):
        heard[row] += text

    result = surgery.run(folder, [TEXTS[n] for n in which], device="cpu", max_new=NEW, threads=1, on_text=on_text)
    assert [list(one.tokens) for one in result.texts] == [expected[n][1] for n in which]
    assert [one.text for one in result.texts] == [expected[n][0] for n in which] == heard
    assert {one.reason for one in result.texts} <= {"stop", "length"}
    assert result.new_tokens == sum(len(one.tokens) for one in result.texts)


def test_a_seed_draws_the_same_text_again_and_another_seed_another(folder):
    def draw(seed, **how):
        sampling = Sampling(temperature=1.0, seed=seed, **how)
        return surgery.run(folder, TEXTS, device="cpu", max_new=8, threads=1, sampling=sampling).texts

    assert draw(1) == draw(1) != draw(2)
    assert draw(1, top_k=1) == draw(2, top_k=1) == surgery.run(folder, TEXTS, device="cpu", max_new=8, threads=1).texts


def test_a_stop_token_ends_its_row_only(folder, tmp_path):
    free = surgery.run(folder, TEXTS, device="cpu", max_new=NEW, threads=1).texts
    stop = free[0].tokens[3]
    shutil.copytree(folder, tmp_path / "out")
    (tmp_path / "out" / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop, 99999]}))
    found = surgery.run(tmp_path / "out", TEXTS, device="cpu", max_new=NEW, threads=1).texts
    assert found[0].tokens == free[0].tokens[: free[0].tokens.index(stop)]
    assert found[0].reason == "stop"
    for one, before in zip(found, free, strict=True):
        tokens = before.tokens
        assert one.tokens == (tokens[: tokens.index(stop)] if stop in tokens else tokens)


def test_missing_files_and_oversized_requests_are_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"no tokenizer\.json beside the graph; copy the base model's"):
        surgery.run(tmp_path / "bare", ["text"], device="cpu")
    assert len(surgery.run(tmp_path / "bare", [[5, 6]], device="cpu", max_new=3).texts[0].tokens) == 3
    (tmp_path / "bare" / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="not a tokenizer"):
        surgery.run(tmp_path / "bare", ["text"], device="cpu")
    with pytest.raises(FitError, match="not below 1536"):
        surgery.run(folder, [[5, 1536]], device="cpu")
    write_adapter_file(tmp_path / "x.onnx_adapter", {"a": np.zeros((2, 2), np.float32)})
    with pytest.raises(FitError, match="the graph has no slots"):
        surgery.run(folder, [[5]], device="cpu", adapters=[tmp_path / "x.onnx_adapter"])
    with pytest.raises(FitError, match="do not fit"):
        surgery.run(folder, [[5] * 513], device="cpu")


def test_a_text_ends_where_the_positions_end(folder):
    long = [[5] * 510]
    one = surgery.run(folder, long, device="cpu", max_new=9, threads=1).texts[0]
    assert one.reason in ("full", "stop")
    assert len(one.tokens) <= 3


def test_text_without_tokenizers_hints_at_the_package(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(surgery.MissingPackageError, match=r"pip install 'model-surgery\[run\]', or give token ids"):
        surgery.run(folder, ["text"], device="cpu")


def test_the_command_streams_text_and_gives_json(folder, expected):
    done = spawn("run", folder, "-p", TEXTS[0], "--max-new", NEW, "--device", "cpu", "-q")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == expected[0][0] + "\n"
    done = spawn("run", folder, "-p", TEXTS[0], "-p", TEXTS[2], "--max-new", NEW, "--device", "cpu", "--json")
    result = json.loads(done.stdout)["result"]
    assert [one["text"] for one in result["texts"]] == [expected[0][0], expected[2][0]]
    assert spawn("run", folder, "--device", "cpu").returncode == 2
    assert spawn("run", folder, "-p", "x", "--device", "cuda:99").returncode == 4


def test_a_run_imports_neither_torch_nor_onnx_nor_transformers(folder):
    import subprocess
    import sys

    from tests.support.kit import environment

    script = f"import surgery, sys; surgery.run({str(folder)!r}, ['a'], device='cpu', max_new=2); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "onnx", "transformers", "peft"}


def test_the_bench_measures_two_graphs_in_turns(folder):
    done = spawn(
        "bench", folder, "--against", folder, "--device", "cpu", "--prompt-length", 16, "--new-tokens", 10, "--json"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)["result"]
    one, other = result["sides"]
    assert all(0 < side[name] < 60 for side in (one, other) for name in ("token_seconds", "prefill_seconds"))
    config = json.loads((BASE / "config.json").read_text())
    table = config["vocab_size"] * config["hidden_size"] * 2
    read = (folder / "model.safetensors").stat().st_size - table
    assert read * 0.9 < one["step_nbytes"] == other["step_nbytes"] < read * 1.1
    assert (result["floors"], result["bandwidth"]) == ([], None)
    for ratio, pairs in ((result["prefill_ratio"], 5), (result["token_ratio"], 2)):
        assert ratio["pairs"] == pairs
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]


def test_generation_makes_no_step_after_the_last_token():
    class Counting:
        steps, room, switch = 0, 9, 0

        def prefill(self, rows):
            return np.eye(4)[[1] * len(rows)]

        def step(self, tokens):
            self.steps += 1
            return np.eye(4)[[2] * len(tokens)]

    decoder = Counting()
    found = generate(decoder, [[0]], max_new=3, sampling=Sampling())
    assert (found[0].tokens, found[0].reason, decoder.steps) == ((1, 2, 2), "length", 2)
    assert generate(decoder, [[0]], max_new=0, sampling=Sampling())[0].tokens == ()


def test_an_empty_text_is_shown_as_a_text():
    assert [said(given) for given in ("", "a", ("a", "b"), [3, 4])] == ["", "a", "a / b", (3, 4)]


@pytest.mark.parametrize("pair", [("\ud800", "a"), ("a", "\ud800"), ("\ud83d", "\ude00")])
def test_half_of_a_surrogate_pair_is_no_text(pair):
    with pytest.raises(FitError, match="surrogate"):
        Tokenizer(None).encode_pair(*pair)
