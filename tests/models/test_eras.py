# SPDX-License-Identifier: Apache-2.0
"""The records of what transformers renames and converts are those of the installed release, and are read as it does."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.models.conversions import SUPPORTED
from surgery_formats.models.eras import eras_of

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "eras.py"
DATA = json.loads((ROOT / "formats" / "surgery_formats" / "models" / "eras.json").read_text())

_LLAVA, _QWEN = "LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration"

NOT_READ = {
    ("Molmo2TextModel", "Split"): "its rows are told by the sizes of the model's own parameters",
    ("ernie4_5_vl_moe", "ErnieFuseAndSplitTextVisionExperts"): "one list of experts is two stacks, by config.json",
    ("qwen4_exp_text", "Concatenate by number"): "a table in a number of parts that config.json has",
}
"""Records that are known and not read, with what they need: this list can only shrink."""


def _tool() -> Any:
    spec = importlib.util.spec_from_file_location("eras_tool", TOOL)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_conversion_of_the_installed_transformers_has_its_record() -> None:
    recorded = {
        name: DATA["records"][entries] if isinstance(entries, str) else entries
        for name, entries in DATA["records"].items()
    }
    known = json.loads(json.dumps(_tool().records()))
    gaps = [f"{name}: {entry}" for name, entries in known.items() for entry in entries if entry not in recorded[name]]
    assert not gaps, "run python tools/eras.py"
    assert recorded == known


def test_types_and_orientations_are_those_of_the_installed_transformers() -> None:
    assert DATA["bases"] == _tool().bases()
    assert list(DATA["transposed"]) == _tool().transposed()


def test_names_that_peft_takes_for_experts_are_those_of_the_installed_peft() -> None:
    assert DATA["taken_for_experts"] == _tool().taken_for_experts()


def test_records_that_are_not_read_are_listed() -> None:
    found = set()
    for name, entries in DATA["records"].items():
        for _, _, steps in [] if isinstance(entries, str) else entries:
            for step, given in steps:
                if step not in SUPPORTED:
                    found.add((name, step))
                elif "num_shards_attribute" in given:
                    found.add((name, f"{step} by number"))
    assert found == set(NOT_READ)


@pytest.mark.parametrize(
    ("model_type", "architecture", "stored", "live"),
    [
        ("vit", "ViTForImageClassification", "vit.encoder.layer.0.output.dense.weight", "vit.layers.0.mlp.fc2.weight"),
        ("gpt_neox", "GPTNeoXForCausalLM", "embed_out.weight", "lm_head.weight"),
        ("nemotron_h", "NemotronHForCausalLM", "backbone.layers.0.norm.weight", "model.layers.0.norm.weight"),
        ("llava", _LLAVA, "language_model.model.norm.weight", "model.language_model.norm.weight"),
        ("qwen2_vl", _QWEN, "model.norm.weight", "model.language_model.norm.weight"),
        ("qwen2_vl", _QWEN, "visual.merger.mlp.0.weight", "model.visual.merger.mlp.0.weight"),
        ("inkling2_text", "Inkling2ForCausalLM", "attn_res.attn_queries.3", "layers.4.attention_input.query"),
    ],
)
def test_names_of_the_models_code(model_type: str, architecture: str, stored: str, live: str) -> None:
    config = {"model_type": model_type, "architectures": [architecture]}
    assert eras_of(config, frozenset({stored})).live(stored) == live
    assert eras_of(config, frozenset({stored})).live(live) == live  # a file of today's names stays as it is


def test_spellings_that_overlap_are_renamed_together() -> None:
    config = {"model_type": "kimi_k25"}
    old = frozenset(f"vision_tower.encoder.blocks.0.mlp.fc{number}.weight" for number in (0, 1))
    eras = eras_of(config, old)
    assert sorted(eras.live(name)[-10:] for name in old) == ["fc1.weight", "fc2.weight"]
    new = frozenset(f"vision_tower.encoder.blocks.0.mlp.fc{number}.weight" for number in (1, 2))
    assert sorted(eras_of(config, new).live(name)[-10:] for name in new) == ["fc1.weight", "fc2.weight"]


def _base(folder: Path, model_type: str, tensors: dict[str, np.ndarray], **config: object) -> Any:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **config}))
    return open_checkpoint(folder).main.names


def _values(names: Any, path: str) -> np.ndarray:
    places = names.resolve(path)
    rows = sum(place.parameter.shape[0] for place in places)
    whole = np.zeros((rows, places[0].parameter.shape[1]), np.float32)
    for place in places:
        at = place.parameter.view.row_origin
        whole[at : at + place.parameter.shape[0]] = place.parameter.get()
    return whole


def _draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def test_experts_one_by_one_are_a_stack_and_back(tmp_path: Path) -> None:
    parts = {
        f"model.layers.0.mlp.experts.{number}.{name}.weight": _draw(3 + number, 4) * (number + 1)
        for number in range(2)
        for name in ("gate_proj", "up_proj")
    }
    parts = {name: value[:3] for name, value in parts.items()}
    one_by_one = _base(tmp_path / "single", "qwen3_next", parts)
    want = np.concatenate(list(parts.values()))
    np.testing.assert_array_equal(_values(one_by_one, "model.layers.0.mlp.experts.gate_up_proj"), want)
    stack = _base(tmp_path / "stack", "qwen3_next", {"model.layers.0.mlp.experts.gate_up_proj": want.reshape(2, 6, 4)})
    for name, value in parts.items():
        np.testing.assert_array_equal(_values(stack, name), value)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    tensors = {f"model.layers.0.mlp.experts.{number}.down_proj.weight": _draw(3, 4) for number in (0, 2)}
    names = _base(tmp_path / "base", "qwen3_next", tensors)
    with pytest.raises(Exception, match="only the experts 0, 2"):
        names.resolve("model.layers.0.mlp.experts.down_proj")


def test_one_tensor_that_is_several_parameters(tmp_path: Path) -> None:
    fused = _draw(8, 5)
    names = _base(tmp_path / "base", "hrm_text", {"model.layers.0.attn.gqkv_proj.weight": fused})
    for part, name in enumerate(("gate_proj", "q_proj", "k_proj", "v_proj")):
        np.testing.assert_array_equal(
            _values(names, f"model.layers.0.self_attn.{name}.weight"), fused[part * 2 : part * 2 + 2]
        )


def test_rows_that_lie_alternately(tmp_path: Path) -> None:
    stored = _draw(2, 6, 3)
    names = _base(tmp_path / "base", "inkling2_text", {"model.llm.layers.0.mlp.experts.w13_weight": stored})
    want = np.concatenate([stored[:, 0::2], stored[:, 1::2]], axis=1).reshape(12, 3)
    np.testing.assert_array_equal(_values(names, "model.layers.0.mlp.experts.gate_up_proj"), want)


def test_rotary_pairs_in_halves(tmp_path: Path) -> None:
    stored = _draw(24, 3)
    names = _base(
        tmp_path / "base", "kimi_k25", {"vision_tower.encoder.blocks.0.wqkv.weight": stored},
        vision_config={"num_attention_heads": 2},
    )  # fmt: skip
    q, _, v = np.split(stored, 3)
    want = q.reshape(2, 2, 2, 3).transpose(0, 2, 1, 3).reshape(8, 3)
    np.testing.assert_array_equal(_values(names, "model.vision_tower.layers.0.attn.q_proj.weight"), want)
    np.testing.assert_array_equal(_values(names, "model.vision_tower.layers.0.attn.v_proj.weight"), v)


def test_the_records_are_regular_expressions() -> None:
    known = [entries for entries in DATA["records"].values() if not isinstance(entries, str)]
    patterns = [pattern for entries in known for own, _, _ in entries for pattern in own]
    assert len(patterns) > 100
    assert [pattern for pattern in patterns if not _compiles(pattern)] == []


def _compiles(pattern: str) -> bool:
    try:
        return re.compile(pattern) is not None
    except re.error:
        return False
