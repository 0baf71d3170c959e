# SPDX-License-Identifier: Apache-2.0
"""Encoders of images, and of texts about them, match transformers; adapters match PEFT; the reference matches both."""

from __future__ import annotations

import json
import re

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

from surgery.onnx.graph.build import GraphOptions, build
from surgery.onnx.graph.target import TARGETS
from surgery.onnx.run import images
from surgery.reference import forward, open_reference
from surgery.verbs.export_onnx import export_onnx
from surgery.verbs.run import run
from surgery.verbs.verify import verify
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.models.families.parameters import parameters
from tests.oracles import recipes
from tests.support import trained
from tests.support.sessions import open_session

TOLERANCE = 1e-4
# 7 ends a text for the newer models; 98 is the greatest id, which ends it for the older ones
IDS = np.array([[5, 17, 3, 98, 7, 9, 61, 7], [1, 90, 7, 98, 95, 6, 1, 1]])
MASK = np.array([[1] * 8, [1] * 6 + [0] * 2])


def _inputs(name, model, rows=2):
    """Random images of the model's size, or texts."""
    if name in recipes.TOWERS:
        return {"input_ids": IDS[:rows], "attention_mask": MASK[:rows]}
    patches = model.embedding.patches
    assert patches is not None
    shape = (rows, patches.channels, *patches.image)
    return {"pixel_values": np.random.default_rng(5).normal(size=shape).astype(np.float32)}


def _expected(model, inputs):
    with torch.no_grad():
        found = model(**{key: torch.from_numpy(value) for key, value in inputs.items()})
    return {key: value.numpy() for key, value in found.items() if isinstance(value, torch.Tensor)}


def _assert_equal(found, expected, inputs):
    assert set(found) == set(expected)
    for key, wanted in expected.items():
        value = np.asarray(found[key])
        assert value.shape == wanted.shape
        real = inputs["attention_mask"].astype(bool) if key == "last_hidden_state" and "input_ids" in inputs else ...
        assert np.abs(value - wanted)[real].max() <= TOLERANCE, key


@pytest.mark.parametrize("name", [*recipes.IMAGES, *recipes.TOWERS])
def test_graphs_and_reference_match_transformers(name, tmp_path):
    folder = recipes.build(name, tmp_path)
    component = open_checkpoint(folder).main
    reference = open_reference(component)
    inputs = _inputs(name, reference.model)
    expected = _expected(recipes.load(name, folder), inputs)
    first, *mask = (torch.from_numpy(value) for value in inputs.values())
    found = forward(reference, first, real=mask[0] if mask else None).outputs
    _assert_equal({key: value.numpy() for key, value in found.items()}, expected, inputs)
    for target in TARGETS:
        built = build(component, GraphOptions(TARGETS[target], DType.F32))
        (folder / f"{target}.onnx").write_bytes(built.graphs["model.onnx"].data)
        session, contract = open_session(folder / f"{target}.onnx")
        names = [one.name for one in session.get_outputs()]
        _assert_equal(dict(zip(names, session.run(None, inputs), strict=True)), expected, inputs)
        assert (contract.kind, contract.cache) == ("encoder", "none")
        assert (contract.padding == "right") or name not in recipes.TOWERS
    asked, stored = parameters(reference.model), set(reference.weights.names)
    assert set(asked) | set(reference.model.unused) == stored
    assert all(tuple(reference.weights.load(key).shape) == shape for key, shape in asked.items() if -1 not in shape)


ADAPTED = ["vit_classifier", "dinov2_registers", "clip_vision_projected", "siglip_vision", "clip_text_projected"]


@pytest.mark.parametrize("name", ADAPTED)
def test_a_lora_of_queries_and_values_gives_what_peft_gives(name, tmp_path):
    base = recipes.build(name, tmp_path / "base")
    targets = ["q_proj", "v_proj"]
    adapter = trained.train(name, base, trained._lora(target_modules=targets), tmp_path / "adapter", task=None)
    inputs = _inputs(name, open_reference(open_checkpoint(base).main).model)
    expected = _expected(trained.attached(name, base, (adapter, 1.0)), inputs)
    plain = _expected(recipes.load(name, base), inputs)
    assert all(np.abs(expected[key] - plain[key]).max() > 0.05 for key in expected)
    export_onnx(base, [adapter], output=tmp_path / "merged", target="cpu")
    export_onnx(base, swap=[adapter], output=tmp_path / "slots", target="cpu")
    loaded, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    loaded.Load(str(tmp_path / "slots" / "adapters" / "adapter.onnx_adapter"))
    options.add_active_adapter(loaded)
    for folder, active in (("merged", None), ("slots", options)):
        session, _ = open_session(tmp_path / folder / "model.onnx")
        names = [one.name for one in session.get_outputs()]
        _assert_equal(dict(zip(names, session.run(None, inputs, active), strict=True)), expected, inputs)
        verify(tmp_path / folder)


@pytest.mark.parametrize("target", ["cuda", "portable"])
@pytest.mark.parametrize("name", ["vit_classifier", "siglip_vision", "clip_text"])
def test_graphs_of_16_bits_are_proved_in_float32(name, target, tmp_path):
    base = recipes.build(name, tmp_path / "base", dtype=torch.float16)
    export_onnx(base, output=tmp_path / "out", target=target, dtype="fp16")
    difference = verify(tmp_path / "out").difference
    assert difference is not None
    assert difference <= 1e-3


@pytest.mark.parametrize(
    ("name", "fields", "fault"),
    [
        ("vit_classifier", {"patch_size": 3}, r"patches of \[3, 3\] do not divide images"),
        ("vit_bare", {"pooler_act": "relu"}, "pooler_act is relu"),
        ("siglip_vision", {"vision_use_head": False}, "vision_use_head is False"),
        ("clip_classifier", {"architectures": ["CLIPModel"]}, "two towers, each of which is a model of its own"),
        ("vit_classifier", {"architectures": ["ViTForMaskedImageModeling"]}, "ViTForMaskedImageModeling"),
    ],
)
def test_what_no_recipe_covers_is_refused(name, fields, fault, tmp_path):
    base = recipes.build(name, tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | fields
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(FitError, match=fault):
        export_onnx(base, output=tmp_path / "out")


_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": 12,
}
_SEES, _READS = {"image_size": 16, "patch_size": 8, **_TOWER}, {"vocab_size": 99, **_TOWER}


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_a_tower_of_a_model_with_two_is_saved_as_the_refusal_says(name, tmp_path):
    configuration = getattr(transformers, f"{name}Config")(vision_config=_SEES, text_config=_READS, projection_dim=12)
    getattr(transformers, f"{name}Model")(configuration).save_pretrained(tmp_path / "both")
    with pytest.raises(FitError, match="two towers") as refused:
        export_onnx(tmp_path / "both", output=tmp_path / "out")
    wanted = next(word for word in re.findall(r"\w+", str(refused.value)) if word.startswith(f"{name}Vision"))
    tower = getattr(transformers, wanted).from_pretrained(tmp_path / "both").eval()
    tower.save_pretrained(tmp_path / "tower")
    export_onnx(tmp_path / "tower", output=tmp_path / "out", target="cpu")
    inputs = {"pixel_values": np.random.default_rng(3).normal(size=(2, 3, 16, 16)).astype(np.float32)}
    session, _ = open_session(tmp_path / "out" / "model.onnx")
    names = [one.name for one in session.get_outputs()]
    _assert_equal(dict(zip(names, session.run(None, inputs), strict=True)), _expected(tower, inputs), inputs)


def test_the_runner_takes_pixel_values(tmp_path, monkeypatch):
    base = recipes.build("vit_classifier", tmp_path / "base")
    export_onnx(base, output=tmp_path / "out", target="cpu")
    pixels = np.random.default_rng(3).normal(size=(3, 3, 16, 16)).astype(np.float32)
    np.save(tmp_path / "two.npy", pixels[:2])
    np.save(tmp_path / "one.npy", pixels[2])
    found = run(tmp_path / "out", images=[tmp_path / "two.npy", tmp_path / "one.npy"])
    expected = _expected(recipes.load("vit_classifier", base), {"pixel_values": pixels})["logits"]
    assert np.abs(found.arrays["logits"] - expected).max() <= TOLERANCE
    shares = [text.scores[0] for text in found.texts]
    assert [max(one, key=one.get) for one in shares] == [f"LABEL_{label}" for label in expected.argmax(-1)]
    assert found.inputs == (f"{tmp_path}/two.npy[0]", f"{tmp_path}/two.npy[1]", f"{tmp_path}/one.npy")
    assert "one.npy" in str(found.summary())
    sizes, whole = [], images.run_encoder
    monkeypatch.setattr(
        images,
        "run_encoder",
        lambda graph, known, slots: sizes.append(len(known["pixel_values"])) or whole(graph, known, slots),
    )
    parted = run(tmp_path / "out", images=[tmp_path / "two.npy", tmp_path / "one.npy"], batch_size=2)
    assert sizes == [2, 1]
    assert np.abs(parted.arrays["logits"] - expected).max() <= TOLERANCE


def test_what_is_no_image_of_the_graph_is_refused(tmp_path):
    pictures = tmp_path / "images"
    export_onnx(recipes.build("vit_classifier", tmp_path / "base"), output=pictures, target="cpu")
    texts = tmp_path / "texts"
    export_onnx(recipes.build("clip_text", tmp_path / "text"), output=texts, target="cpu")
    np.save(tmp_path / "wide.npy", np.zeros((3, 16, 20), np.float32))
    np.save(tmp_path / "bytes.npy", np.zeros((3, 16, 16), np.uint8))
    np.save(tmp_path / "right.npy", np.zeros((3, 16, 16), np.float32))
    for file in ("wide", "bytes"):
        with pytest.raises(FitError, match=r"the graph takes numbers \[3, 16, 16\]"):
            run(pictures, images=tmp_path / f"{file}.npy")
    with pytest.raises(FitError, match="this graph reads images"):
        run(pictures, [[5, 6]])
    with pytest.raises(FitError, match="is for encoders of images"):
        run(texts, images=tmp_path / "right.npy")
    with pytest.raises(FitError, match="text, sound or images at once"):
        run(pictures, [[5, 6]], images=tmp_path / "right.npy")
