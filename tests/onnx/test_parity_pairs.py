# SPDX-License-Identifier: Apache-2.0
"""Encoder-decoders: on every target, every graph and the reference compute what transformers computes, padding included."""

from __future__ import annotations

import functools

import numpy as np
import onnxruntime
import pytest
import torch

import surgery
from surgery.onnx.graph.build import GraphOptions, build
from surgery.onnx.graph.pair_names import BEGUN, ENCODER, FIRST, MERGED
from surgery.onnx.graph.target import TARGETS
from surgery.reference import encode, forward, open_reference
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import open_checkpoint
from tests.oracles import recipes

IDS = np.array([[5, 17, 3, 88, 42], [29, 8, 77, 1, 1]])
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
STARTS = np.array([[2, 5, 9, 33], [2, 8, 4, 11]])
NEXT = np.array([[7], [13]])
CASES = [
    *((name, "cpu", None) for name in recipes.PAIRS),
    *((name, target, None) for name in ("t5_flan", "bart", "marian", "whisper") for target in ("cuda", "portable")),
    *((name, "portable", 17) for name in ("t5", "whisper")),
]
SOUND = np.random.default_rng(3).normal(size=(2, 5, 24)).astype(np.float32)


def source_of(name):
    if name == "whisper":
        return {"input_features": SOUND}
    return {"input_ids": IDS, "attention_mask": MASK}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """By name: folder, and transformers' logits of the starts and the next token."""

    @functools.cache
    def make(name):
        folder = recipes.build(name, tmp_path_factory.mktemp(name) / "base")
        model = recipes.load(name, folder)
        inputs = {key: torch.from_numpy(value) for key, value in source_of(name).items()}
        with torch.no_grad():
            expected = model(**inputs, decoder_input_ids=torch.from_numpy(np.concatenate([STARTS, NEXT], 1)))
        return folder, expected.logits.numpy()

    return make


def run(session, feed):
    return dict(zip([one.name for one in session.get_outputs()], session.run(None, feed), strict=True))


def as_past(outputs):
    return {name.replace("present", "past_key_values"): value for name, value in outputs.items() if name != "logits"}


@pytest.mark.parametrize(("name", "target", "opset"), CASES)
def test_every_graph_matches_transformers(made, name, target, opset):
    folder, expected = made(name)
    built = build(open_checkpoint(folder).main, GraphOptions(TARGETS[target], DType.F32, opset=opset))
    sessions = {}
    for file, graph in built.graphs.items():
        (folder / file).write_bytes(graph.data)
        sessions[file] = onnxruntime.InferenceSession(folder / file, providers=["CPUExecutionProvider"])
    source = source_of(name)
    mask = {"encoder_attention_mask": MASK} if "attention_mask" in source else {}
    states = {"encoder_hidden_states": run(sessions[ENCODER], source)["last_hidden_state"]}
    first = run(sessions[FIRST], {**mask, **states, "input_ids": STARTS})
    begun = run(sessions[BEGUN], {**mask, **as_past(first), "input_ids": NEXT})
    nothing = {key: np.zeros((2, value.shape[1], 0, value.shape[3]), "f4") for key, value in as_past(first).items()}
    feed = {**mask, **states, **nothing, "input_ids": STARTS, "use_cache_branch": np.array([False])}
    branch = run(sessions[MERGED], feed)
    feed |= {**as_past(branch), "input_ids": NEXT, "use_cache_branch": np.array([True])}
    other = run(sessions[MERGED], feed)
    for found, wanted in ((first, expected[:, :4]), (branch, expected[:, :4]), (begun, expected[:, 4:])):
        assert np.abs(found["logits"] - wanted).max() <= 1e-4
    assert np.abs(other["logits"] - expected[:, 4:]).max() <= 1e-4
    for key, value in begun.items():
        assert np.array_equal(other[key], value)
    assert built.contract.encoder == ENCODER
    assert built.contract.padding == ("any" if "t5" in name or name == "whisper" else "right")


@pytest.mark.parametrize("name", recipes.PAIRS)
def test_the_reference_matches_transformers(made, name):
    folder, expected = made(name)
    reference = open_reference(open_checkpoint(folder).main)
    source = [torch.from_numpy(value) for value in source_of(name).values()]
    encoded = encode(reference, *source)
    begun = forward(reference, torch.from_numpy(STARTS), encoded=encoded)
    following = forward(reference, torch.from_numpy(NEXT), past=begun.cache, encoded=encoded)
    found = torch.cat((begun.logits, following.logits), 1).numpy()
    assert np.abs(found - expected).max() <= 1e-4


@pytest.mark.parametrize("name", recipes.PAIRS)
def test_greedy_tokens_are_those_of_generate(made, name, tmp_path):
    folder, _ = made(name)
    out = tmp_path / "out"
    surgery.export_onnx(folder, output=out)
    model = recipes.load(name, folder)
    inputs = {key: torch.from_numpy(value) for key, value in source_of(name).items()}
    pad = model.config.pad_token_id
    if "input_ids" in inputs:
        inputs["input_ids"] = inputs["input_ids"].where(inputs["attention_mask"].bool(), pad)
        found = surgery.run(out, [IDS[0].tolist(), IDS[1, :3].tolist()], max_new=12)
    else:
        files = [tmp_path / f"{number}.npy" for number in range(2)]
        for file, spectrogram in zip(files, SOUND, strict=True):
            np.save(file, spectrogram)
        found = surgery.run(out, audio=files, max_new=12)
    generate = super(type(model), model).generate if name != "whisper" else _plain_generate(model)
    expected = generate(**inputs, max_new_tokens=12, do_sample=False, num_beams=1).tolist()
    stop = model.config.eos_token_id
    for text, row in zip(found.texts, expected, strict=True):
        wanted = row[1:]
        assert list(text.tokens) == (wanted[: wanted.index(stop)] if stop in wanted else wanted)


def _plain_generate(model):
    """Without Whisper's own choice of first ids, of which the configuration of a tiny model has none."""
    from transformers import GenerationMixin

    return lambda **options: GenerationMixin.generate(model, **options)


def test_a_folder_has_all_graphs_and_one_file_of_weights(made, tmp_path):
    folder, _ = made("bart")
    surgery.export_onnx(folder, output=tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {ENCODER, FIRST, BEGUN, MERGED, "model.safetensors", "config.json"} <= names
    assert "genai_config.json" not in names
    surgery.export_onnx(folder, output=tmp_path / "whole", weights="embed")
    names = {path.name for path in (tmp_path / "whole").iterdir() if path.suffix in (".onnx", ".safetensors")}
    assert names == {ENCODER, MERGED}


@pytest.mark.parametrize("name", ["t5_flan", "whisper"])
def test_codes_of_both_halves_are_verified(made, name, tmp_path):
    folder, _ = made(name)
    result = surgery.export_onnx(folder, output=tmp_path / "out", weights_type="int8")
    coded = {weight for entry in result.contract.quantised for weight in entry["weights"]}
    assert any("encoder." in weight for weight in coded)
    assert any("decoder." in weight for weight in coded)
    surgery.verify(tmp_path / "out")


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("knows of encoder-decoders Whisper", {"layout": "genai"}),
        ("one graph, and this has", {"layout": "triton"}),
        ("runs no graph that generates", {"layout": "sentence-transformers"}),
        ("weights of each graph", {"layout": "transformers.js", "weights": "copy"}),
    ],
)
def test_layouts_of_programs_that_run_no_such_files_are_refused(made, match, options, tmp_path):
    folder, _ = made("bart")
    with pytest.raises(FitError, match=match):
        surgery.export_onnx(folder, output=tmp_path / "out", **options)


def test_an_encoder_can_be_exported_alone(made, tmp_path):
    folder, _ = made("t5")
    result = surgery.export_onnx(folder, output=tmp_path / "out", task="feature-extraction")
    assert result.contract.kind == "encoder"
    surgery.verify(tmp_path / "out")
    with pytest.raises(FitError, match="text-classification"):
        surgery.export_onnx(folder, output=tmp_path / "other", task="text-classification")
