"""``surgery run`` with adapters and soft prompts: one graph, and what is chosen per run is what is computed."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

import surgery
from surgery.onnx.run import chosen_adapters, prepare
from surgery.onnx.run.adapter_file import read_adapter_file
from surgery_formats.errors import FitError
from tests.support.graphs import CONTRACT, decoder, factors, plain_logits, prefix
from tests.support.kit import spawn
from tests.support.onnx_files import write_adapter_file

ROWS = [[3, 17, 9, 4, 30], [8, 2]]
NEW = 6


def greedy(path, row, past=None, **more):
    ids = list(row)
    for _ in range(NEW):
        ids.append(int(plain_logits(path, ids, past, **more)[-1].argmax()))
    return ids[len(row) :]


def tokens(path, **how):
    return [list(one.tokens) for one in surgery.run(path, ROWS, device="cpu", max_new=NEW, threads=1, **how).texts]


@pytest.mark.parametrize("attention", ["grouped", "plain"])
def test_prompts_and_adapters_are_chosen_per_run(tmp_path, attention):
    path = decoder(tmp_path, attention, prefix=prefix(1, 4), slots=True)
    files = {name: tmp_path / f"{name}.onnx_adapter" for name in ("prompt", "one", "two")}
    write_adapter_file(files["prompt"], prefix(2, 7))
    write_adapter_file(files["one"], factors(3, 2))
    write_adapter_file(files["two"], factors(4, 5))
    both = {
        name: np.concatenate([factors(3, 2)[name], factors(4, 5)[name]], int(name.endswith("A")))
        for name in factors(3, 2)
    }
    cases = [
        ({}, prefix(1, 4), {}),
        ({"prompt": False}, None, {}),
        ({"prompt_adapter": files["prompt"]}, prefix(2, 7), {}),
        ({"adapters": [files["one"]]}, prefix(1, 4), factors(3, 2)),
        ({"prompt": False, "adapters": [files["one"], files["two"]]}, None, both),
        ({"prompt_adapter": files["prompt"], "adapters": [files["two"]]}, prefix(2, 7), factors(4, 5)),
    ]
    seen = []
    for how, past, more in cases:
        found = tokens(path, **how)
        assert found == [greedy(path, row, past, **more) for row in ROWS]
        seen.append(found)
    assert len({str(one) for one in seen}) == len(cases)  # each of them makes a difference


def test_a_folder_is_no_prompt_and_the_hint_says_what_makes_one(tmp_path):
    path = decoder(tmp_path, "grouped", prefix=prefix(1, 4))
    folder = tmp_path / "prompt"
    folder.mkdir()
    with pytest.raises(FitError, match="a folder") as caught:
        tokens(path, prompt_adapter=folder)
    assert "surgery prompt bake prompt BASE --as kv" in caught.value.hint
    write_adapter_file(folder / "past.onnx_adapter", prefix(2, 7))
    with pytest.raises(FitError, match="a folder") as caught:
        tokens(path, prompt_adapter=folder)
    assert "did you mean" in caught.value.hint
    assert "past.onnx_adapter" in caught.value.hint
    with pytest.raises(FitError, match="a folder") as caught:
        tokens(path, adapters=[tmp_path])
    assert "surgery convert" in caught.value.hint


def test_a_prompt_of_another_type_says_how_to_write_it(tmp_path):
    path = decoder(tmp_path, "grouped", prefix=prefix(1, 4))
    write_adapter_file(tmp_path / "half", {name: array.astype(np.float16) for name, array in prefix(2, 7).items()})
    with pytest.raises(FitError, match="the soft prompt is float16, but the cache is float32") as caught:
        tokens(path, prompt_adapter=tmp_path / "half")
    assert "--as kv --dtype fp32" in caught.value.hint


def test_groups_share_what_was_read_of_prompts_and_adapters(tmp_path, monkeypatch):
    path = decoder(tmp_path, slots=True)
    files = {name: tmp_path / f"{name}.onnx_adapter" for name in ("prompt", "one")}
    write_adapter_file(files["prompt"], prefix(2, 7))
    write_adapter_file(files["one"], factors(3, 2))
    how = {"prompt_adapter": files["prompt"], "adapters": [files["one"]]}
    together, read = tokens(path, **how), []
    for module in (chosen_adapters, prepare):
        monkeypatch.setattr(module, "read_adapter_file", lambda file: read.append(file) or read_adapter_file(file))
    assert tokens(path, batch_size=1, **how) == together
    assert sorted(read) == sorted(files.values())


def test_the_command_takes_prompts_and_adapters(tmp_path):
    path = decoder(tmp_path, prefix=prefix(1, 4), slots=True)
    write_adapter_file(tmp_path / "one", factors(3, 2))
    write_adapter_file(tmp_path / "prompt", prefix(2, 7))
    words = ["run", path, "--ids", "3,17,9,4,30", "--max-new", NEW, "--device", "cpu", "-q"]
    for more, past, slots in (
        (["--adapter", tmp_path / "one"], prefix(1, 4), factors(3, 2)),
        (["--adapter", tmp_path / "one", "--no-prompt"], None, factors(3, 2)),
        (["--prompt-adapter", tmp_path / "prompt"], prefix(2, 7), {}),
    ):
        done = spawn(*words, *more)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == ",".join(map(str, greedy(path, ROWS[0], past, **slots)))
    done = spawn(*words, "--prompt-adapter", tmp_path / "one", "--json")
    assert done.returncode == 4
    assert json.loads(done.stderr)["error"]["tensor"] == "q0.lora_A"
    assert spawn(*words, "--prompt-adapter", "x", "--no-prompt").returncode == 2


def test_soft_prompts_as_vocabulary_rows_go_in_front(tmp_path):
    path = decoder(tmp_path, contract=replace(CONTRACT, vocabulary_rows=(36, 4)))
    ahead = [36, 37, 38, 39]
    assert tokens(path) == [greedy(path, ahead + row) for row in ROWS]
    assert tokens(path, prompt=False) == [greedy(path, row) for row in ROWS]


def test_a_missing_default_prompt_is_an_error(tmp_path):
    path = decoder(tmp_path, contract=replace(CONTRACT, virtual_tokens=3))
    with pytest.raises(FitError, match="has no default"):
        tokens(path)


@pytest.mark.parametrize("said", [2, 3, 5])
def test_a_default_prompt_of_another_length_is_an_error(tmp_path, said):
    path = decoder(tmp_path, prefix=prefix(1, 4))
    path.write_bytes(path.read_bytes().replace(b'"virtual_tokens":4', f'"virtual_tokens":{said}'.encode()))
    with pytest.raises(FitError, match=rf"shape \[1, 2, 4, 16\].*implies \[1, 2, {said}, 16\]"):
        tokens(path)
